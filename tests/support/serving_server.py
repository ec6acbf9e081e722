"""A server of the application in a thread of the test's process, on a free port."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import httpx

from instdiff_jax.serving.app import make_app
from instdiff_jax.serving.run import StudioServer


@contextlib.contextmanager
def serving(pipeline, **options) -> Iterator[httpx.Client]:
    """A client of a new server that is ready."""
    app = make_app(pipeline, **options)
    server, listener = StudioServer(app, seconds=200), socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.02)
    access = options.get("access")
    headers = {"Authorization": f"Bearer {access.token}"} if access is not None and access.token else {}
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=600, headers=headers) as client:
        client.app, client.server = app, server
        while client.get("/readyz").status_code != 200:
            time.sleep(0.05)
        yield client
        server.should_exit = True
        thread.join(300)
        assert not thread.is_alive()
