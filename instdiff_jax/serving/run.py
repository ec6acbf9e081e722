"""Runs the application until a signal ends it."""

import socket
from typing import Any

import uvicorn
from fastapi import FastAPI


class StudioServer(uvicorn.Server):
    """Uvicorn's server. When it is told to stop, requests whose images still wait are answered 503 at once.

    What is being drawn is finished and delivered, within the time that a request may take.
    """

    def __init__(self, app: FastAPI, seconds: float):
        super().__init__(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=int(seconds) + 1))
        self._app = app

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> Any:
        self._app.state.server.queue.close("the server stops")
        return await super().shutdown(sockets)
