"""A server of the application in a thread of the test's process, on a free port."""

import contextlib
import threading
import time
from collections.abc import Iterator

import httpx
import uvicorn

from instdiff_jax.serving.app import make_app


@contextlib.contextmanager
def serving(pipeline, **options) -> Iterator[httpx.Client]:
    """A client of a new server that is ready."""
    app = make_app(pipeline, **options)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=200))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.02)
    port = server.servers[0].sockets[0].getsockname()[1]
    access = options.get("access")
    headers = {"Authorization": f"Bearer {access.token}"} if access is not None and access.token else {}
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=600, headers=headers) as client:
        client.app = app
        while client.get("/readyz").status_code != 200:
            time.sleep(0.05)
        yield client
        server.should_exit = True
        thread.join(300)
        assert not thread.is_alive()
