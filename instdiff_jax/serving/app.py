"""The server's paths. Answers are JSON; an error is `{"error": one line}`."""

import asyncio
import contextlib
import dataclasses
import json
import math
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.middleware.cors import CORSMiddleware

from instdiff_jax.errors import InputError
from instdiff_jax.layout import Layout
from instdiff_jax.sampling.compiled import make_layout
from instdiff_jax.sampling.metadata import version
from instdiff_jax.sampling.pipeline import Pipeline
from instdiff_jax.serving.answers import PROBLEMS, describe_model, first_problem, job_answer, read_layout
from instdiff_jax.serving.gate import Access, Gate
from instdiff_jax.serving.jobs import Busy, Job, Queue, check_job
from instdiff_jax.serving.limits import Limits
from instdiff_jax.serving.metrics import Metrics
from instdiff_jax.serving.painter import Painter
from instdiff_jax.serving.requests import ImagesRequest, Work, check_work

STATIC = Path(__file__).parent / "static"
CLIENT_GONE = 499  # nobody reads it


@dataclasses.dataclass(frozen=True, eq=False)
class Server:
    """What the paths share."""

    pipeline: Pipeline
    limits: Limits
    queue: Queue
    painter: Painter
    metrics: Metrics
    examples: Mapping[str, Layout]


def make_app(
    pipeline: Pipeline,
    limits: Limits = Limits(),
    access: Access = Access(),
    fingerprint: str = "",
    examples: Mapping[str, Layout] = MappingProxyType({}),
    warm: bool = True,
) -> FastAPI:
    """The application.

    Args:
        pipeline: that draws.
        limits: of requests.
        access: who may ask.
        fingerprint: of the checkpoint, noted in pictures.
        examples: layouts that the page offers, by name.
        warm: draw two of them before `/readyz` says so; then the first request need not wait for the compiler.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        queue = Queue(limits)
        metrics = Metrics(lambda: len(queue))
        about = {"fingerprint": fingerprint, "dtype": pipeline.dtype}
        painter = Painter(pipeline, queue, metrics, about)
        app.state.server = Server(pipeline, limits, queue, painter, metrics, examples)
        painting = asyncio.create_task(painter.run(_first_works(pipeline, limits, examples) if warm else []))
        yield
        queue.close("the server stops")
        await painting

    app = FastAPI(
        title="instdiff", version=version(), lifespan=lifespan, docs_url=None, redoc_url=None, responses=PROBLEMS
    )
    app.exception_handler(InputError)(_on_input_error)
    app.exception_handler(RequestValidationError)(_on_invalid)
    app.exception_handler(AnyHTTPException)(_on_http_error)
    _add_images(app)
    _add_jobs(app)
    _add_rest(app)
    if access.origins:
        app.add_middleware(CORSMiddleware, allow_origins=list(access.origins), allow_methods=["*"], allow_headers=["*"])
    app.add_middleware(Gate, access=access, most_bytes=limits.body)
    return app


def _first_works(pipeline: Pipeline, limits: Limits, examples: Mapping[str, Layout]) -> list[Work]:
    """A layout without masks and one with: between them they need all programs of usual requests.

    Examples, where they are of the model's canvas.
    """
    config, stride = pipeline.config, pipeline.config.canvas_stride
    side = max(min(config.canvas_side, limits.side // stride * stride), stride)
    made = [make_layout(2, (side, side), mask) for mask in (True, False)]
    given = [layout for layout in reversed(list(examples.values())) if (layout.width, layout.height) == (side, side)]
    chosen = {any(one.rle for one in layout.instances): layout for layout in [*made, *given]}
    return [check_work(ImagesRequest(layout=layout.to_dict()), pipeline, limits) for layout in chosen.values()]


async def _on_input_error(request: Request, error: InputError) -> JSONResponse:
    return JSONResponse({"error": " ".join(str(error).split())[:2000]}, 422)


async def _on_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
    return JSONResponse({"error": first_problem(error.errors())}, 422)


async def _on_http_error(request: Request, error: AnyHTTPException) -> JSONResponse:
    return JSONResponse({"error": str(error.detail)}, error.status_code, error.headers)


def _server(request: Request) -> Server:
    return request.app.state.server


def _add_images(app: FastAPI) -> None:
    @app.post(
        "/v1/images",
        responses={
            200: {"content": {"image/png": {}}, "description": "the pictures, or with response png one PNG"},
            202: {"description": "with wait false: the job"},
        },
    )
    async def images(body: ImagesRequest, request: Request) -> Response:
        """Draws pictures of a layout."""
        server = _server(request)
        if not server.painter.ready:
            raise HTTPException(503, "the server starts; see /readyz", {"Retry-After": "2"})
        if not server.queue.open:
            raise HTTPException(503, "the server stops")
        work = await run_in_threadpool(check_work, body, server.pipeline, server.limits)
        job = Job(work, watched=not body.wait, live=body.live)
        try:
            server.queue.add(job)
        except Busy:
            seconds = max(1, math.ceil(len(server.queue) * server.painter.seconds_per_image))
            raise HTTPException(429, "too many images wait", {"Retry-After": str(seconds)}) from None
        loop = asyncio.get_running_loop()
        job.timer = loop.call_later(server.limits.seconds, server.queue.fail, job, "timed out")
        if not body.wait:
            return JSONResponse(job_answer(job), 202, {"Location": f"/v1/jobs/{job.id}"})
        await _wait_or_leave(job, request, server.queue)
        server.metrics.seconds.observe(job.finished - job.created)
        if job.state != "done":
            raise HTTPException(_status(job), job.problem)
        if body.response == "png":
            return Response(job.pictures[0], media_type="image/png")
        return JSONResponse(await run_in_threadpool(job_answer, job))


async def _wait_or_leave(job: Job, request: Request, queue: Queue) -> None:
    """Waits for a job; cancels it when its client leaves."""

    async def leaves() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    waiting, leaving = asyncio.create_task(job.wait()), asyncio.create_task(leaves())
    try:
        await asyncio.wait([waiting, leaving], return_when=asyncio.FIRST_COMPLETED)
    finally:
        if not job.is_finished:
            queue.cancel(job, "the client left")
        for task in (waiting, leaving):
            task.cancel()


def _status(job: Job) -> int:
    """The status of a job that has no pictures."""
    if job.fault:
        return 500
    if job.state == "failed":
        return 504 if job.problem == "timed out" else 422
    return {"the client left": CLIENT_GONE, "the server stops": 503}.get(job.problem, 409)


def _add_jobs(app: FastAPI) -> None:
    @app.get("/v1/jobs/{id}")
    async def job(id: str, request: Request) -> JSONResponse:
        """A job's state, and its pictures once it is done."""
        return JSONResponse(await run_in_threadpool(job_answer, _job(request, id)))

    @app.delete("/v1/jobs/{id}")
    async def cancel(id: str, request: Request) -> JSONResponse:
        """Cancels a job."""
        found = _job(request, id)
        _server(request).queue.cancel(found)
        return JSONResponse(job_answer(found, pictures=False))

    @app.get("/v1/jobs/{id}/images/{index}.png", responses={200: {"content": {"image/png": {}}}})
    async def picture(id: str, index: int, request: Request) -> Response:
        """One picture of a job."""
        found = _job(request, id).pictures.get(index)
        if found is None:
            raise HTTPException(404, "index: expected that of a picture that is drawn")
        return Response(found, media_type="image/png")

    @app.get("/v1/jobs/{id}/events", responses={200: {"content": {"text/event-stream": {}}}})
    async def events(id: str, request: Request) -> StreamingResponse:
        """A job's state after every change, as server-sent events, until it is finished."""
        found = _job(request, id)

        async def lines() -> AsyncIterator[str]:
            async for state in found.news():
                yield f"event: {state.state}\ndata: {json.dumps(job_answer(state, pictures=False))}\n\n"

        return StreamingResponse(lines(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})


def _job(request: Request, id: str) -> Job:
    try:
        return check_job(_server(request).queue.jobs, id)
    except InputError as error:
        raise HTTPException(404, str(error)) from error


def _add_rest(app: FastAPI) -> None:
    @app.get("/v1/model")
    async def model(request: Request) -> dict[str, Any]:
        """The model, its default settings, and the server's limits."""
        server = _server(request)
        return describe_model(server.pipeline, server.limits, server.painter.about)

    @app.get("/v1/examples")
    async def examples(request: Request) -> dict[str, Any]:
        """The names of example layouts, and the layouts."""
        return {name: read_layout(layout) for name, layout in _server(request).examples.items()}

    @app.post("/v1/layouts", openapi_extra={"requestBody": {"content": {"application/octet-stream": {}}}})
    async def layouts(request: Request) -> dict[str, Any]:
        """Reads a layout file of any kind, or a picture made here; masks come back as lists of run lengths."""
        data = await request.body()
        return await run_in_threadpool(read_layout, data, _server(request).limits)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Whether the server runs."""
        return {"status": "ok"}

    @app.get("/readyz", responses={503: {"description": "it still compiles, or stops"}})
    async def readyz(request: Request) -> JSONResponse:
        """Whether it can draw at once: the programs of usual requests are compiled, and it was not told to stop."""
        server = _server(request)
        status = "ready" if server.painter.ready else "compiles"
        if not server.queue.open:
            status = "stops"
        return JSONResponse({"status": status}, 200 if status == "ready" else 503)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        """Counters for Prometheus."""
        return Response(_server(request).metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(STATIC / "index.html")

    @app.get("/docs", include_in_schema=False)
    async def api_page() -> FileResponse:
        return FileResponse(STATIC / "api.html")

    app.mount("/static", StaticFiles(directory=STATIC, check_dir=False))
