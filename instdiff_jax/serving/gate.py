"""What every request passes first: host, origin, token and size. Plain ASGI, so that a client's leaving is seen."""

import contextlib
import dataclasses
import hmac
import ipaddress
from collections.abc import Collection
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse

OPEN_PATHS = ("/healthz", "/readyz")
# The page and what it loads come from here only, and it talks to nobody else.
POLICY = (
    "default-src 'self'; img-src 'self' blob: data:; style-src 'self' 'unsafe-inline'; "
    "object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
]


@dataclasses.dataclass(frozen=True)
class Access:
    """Who may ask.

    Attributes:
        loopback: whether the server listens on this machine only.
        token: that requests to the API must carry; None for none.
        hosts: names, beside addresses, that the server is asked by.
        origins: of other sites' pages that may ask.
    """

    loopback: bool = True
    token: str | None = None
    hosts: Collection[str] = ()
    origins: Collection[str] = ()

    def allows_host(self, host: str) -> bool:
        """Whether a Host header is one of ours: a name that a foreign page makes lead here is not."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name == "localhost" or name in self.hosts:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or not self.loopback

    def allows_origin(self, origin: str, scheme: str, host: str) -> bool:
        """Whether an Origin header is this server's page, or one that was named."""
        return origin == f"{scheme}://{host}" or origin in self.origins

    def allows_token(self, authorization: str) -> bool:
        if self.token is None:
            return True
        kind, _, given = authorization.partition(" ")
        return kind.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self.token.encode())


class Gate:
    """Middleware: refuses requests, limits their bodies, and adds headers to answers."""

    def __init__(self, app: Any, access: Access, most_bytes: int):
        self.app, self.access, self.most_bytes = app, access, most_bytes

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refusal = self._refuse(scope)

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *_HEADERS]
            await send(message)

        if refusal is not None:
            status, problem = refusal
            await JSONResponse({"error": problem}, status)(scope, receive, send_with_headers)
            return
        body = _Body(receive, self.most_bytes)

        async def send_unless_too_large(message: Any) -> None:
            if not body.too_large:  # else the application answers to half a body
                await send_with_headers(message)

        with contextlib.suppress(TooLarge):
            await self.app(scope, body.receive, send_unless_too_large)
        if body.too_large:
            problem = f"expected a request of at most {self.most_bytes} bytes"
            await JSONResponse({"error": problem}, 413)(scope, receive, send_with_headers)

    def _refuse(self, scope: Any) -> tuple[int, str] | None:
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self.access.allows_host(host):
            return 421, "host: expected this server's address; see --allow_host"
        if origin is not None and not self.access.allows_origin(origin, scope["scheme"], host):
            return 403, "origin: expected this server's page; see --allow_origin"
        asks = scope["path"].startswith(("/v1/", "/metrics")) and scope["method"] != "OPTIONS"
        if asks and not self.access.allows_token(headers.get("authorization", "")):
            return 401, "authorization: expected Bearer and the token that the server was started with"
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > self.most_bytes:
            return 413, f"expected a request of at most {self.most_bytes} bytes"
        return None


class TooLarge(Exception):
    """A body without a stated length grew over the limit."""


class _Body:
    """A request's body, counted."""

    def __init__(self, receive: Any, most: int):
        self._receive, self._most, self._got = receive, most, 0

    @property
    def too_large(self) -> bool:
        return self._got > self._most

    async def receive(self) -> Any:
        message = await self._receive()
        self._got += len(message.get("body", b""))
        if self.too_large:
            raise TooLarge
        return message
