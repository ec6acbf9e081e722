"""Draw layouts in the browser: a server and its page, on this machine.

    instdiff studio                                     # the small model of this project; opens the browser
    instdiff studio --checkpoint checkpoints/sd15 --port 8000 --no_browser

Programs ask it too: POST /v1/images takes a layout and settings, and images of different requests share batches;
/openapi.json lists all paths, and docs/studio.md explains them. It listens on this machine only, unless --host
says otherwise; then requests need the token that it prints, or --token.
"""

import argparse
import ipaddress
import secrets
import socket
import sys
import threading
import time
import webbrowser
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from instdiff_jax.cli.box import default_checkpoint, default_layouts
from instdiff_jax.cli.parser import any_path, command_parser, local_path
from instdiff_jax.cli.sampling_flags import DTYPE_HELP, DTYPES, add_addon_flags
from instdiff_jax.errors import InputError
from instdiff_jax.files import json_files

if TYPE_CHECKING:
    from instdiff_jax.layout import Layout


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_parser("studio", __doc__)
    add = parser.add_argument
    add("--checkpoint", type=any_path, default=default_checkpoint(), help="a checkpoint folder, or a training workdir")
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)")
    add("--port", type=int, default=7860, help="(default: 7860; 0: any that is free)")
    add("--token", help="that requests must carry; made up where others can reach the server")
    add("--allow_host", action="append", default=[], metavar="NAME", help="a name that the server is asked by")
    add("--allow_origin", action="append", default=[], metavar="URL", help="another site whose pages may ask")
    add("--no_browser", action="store_true", help="do not open the page")
    add("--max_side", type=int, default=1024, help="of a canvas in pixels (default: 1024)")
    add("--max_steps", type=int, default=100, help="of the solver (default: 100)")
    add("--max_images", type=int, default=16, help="of one request (default: 16)")
    add("--max_waiting", type=int, default=256, help="images of all requests (default: 256)")
    add("--timeout", type=float, default=300.0, help="seconds for a request (default: 300)")
    add_addon_flags(parser)
    add("--taesd", type=local_path, metavar="FILE", help="decode with TAESD: a file, or a diffusers folder")
    add("--tile", type=int, help="decode in tiles of so many pixels a side, which needs less memory")
    add("--dtype", choices=DTYPES, help=DTYPE_HELP)
    add("--no_verify", action="store_true", help="do not compare the checkpoint with its checksums")
    add("--max_rows", type=int, help="latents denoised at a time per device; fewer need less memory")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    for name in ("max_side", "max_steps", "max_images", "max_waiting", "timeout", "max_rows"):
        value = getattr(args, name)
        if value is not None and not value >= 1:
            raise InputError(f"--{name}: expected a number of at least 1, got {value}")
    loopback = is_loopback(args.host)
    if not loopback and args.token is None:
        args.token = secrets.token_urlsafe(16)
    from instdiff_jax.serving.run import StudioServer  # before the model is loaded: uvicorn may not be installed

    with listen(args.host, args.port) as listener:
        app = make_app(args, loopback)
        port = listener.getsockname()[1]
        host = "localhost" if args.host in ("127.0.0.1", "0.0.0.0", "::", "::1") else args.host
        url = f"http://{host}:{port}/" + (f"#token={args.token}" if args.token else "")
        print(f"instdiff studio: {url}", flush=True)
        server = StudioServer(app, args.timeout)
        if not args.no_browser and sys.stdout.isatty():
            threading.Thread(target=open_when_up, args=(server, url), daemon=True).start()
        server.run([listener])


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """A socket there; InputError if it cannot be had."""
    if not 0 <= port < 2**16:
        raise InputError(f"--port: expected a number from 0 to 65535, got {port}")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"--host {host} --port {port}: cannot listen there: {reason}") from error


def make_app(args: argparse.Namespace, loopback: bool) -> Any:
    """The application on the checkpoint of the flags."""
    from instdiff_jax.cli.sample import open_pipeline, start_process
    from instdiff_jax.sampling.loading import checkpoint_fingerprint
    from instdiff_jax.serving import app
    from instdiff_jax.serving.gate import Access
    from instdiff_jax.serving.limits import Limits

    start_process(None)
    pipeline = open_pipeline(args)
    limits = Limits(args.max_side, args.max_steps, args.max_images, args.max_waiting, args.timeout)
    access = Access(loopback, args.token, tuple(args.allow_host), tuple(args.allow_origin))
    return app.make_app(
        pipeline,
        limits,
        access,
        checkpoint_fingerprint(args.checkpoint, not args.no_verify),
        read_examples(pipeline.config.canvas_side),
    )


def read_examples(side: int) -> Mapping[str, "Layout"]:
    """The project's own layouts whose shorter side is this many pixels, by name."""
    from instdiff_jax.layout import Layout

    layouts = map(Layout.from_json, json_files(default_layouts().parent, inner=True))
    return {layout.name: layout for layout in layouts if min(layout.width, layout.height) == side}


def open_when_up(server: Any, url: str) -> None:
    """Opens the page once the server answers."""
    while not server.started and not server.should_exit:
        time.sleep(0.05)
    if server.started:
        webbrowser.open(url)
