"""The painter draws batches of images from different requests, with the pipeline's compiled programs.

A batch shares one set of rows, as layouts of one call of `Pipeline.stream` do, and the next one is on its way to the
devices before the last one's images are awaited.
"""

import asyncio
import io
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from PIL import Image as PillowImage

from instdiff_jax.errors import InputError, NotFiniteError
from instdiff_jax.sampling.metadata import png_text
from instdiff_jax.sampling.outputs import fingerprint_inputs
from instdiff_jax.sampling.pipeline import Pipeline
from instdiff_jax.sampling.request import ImageRequest
from instdiff_jax.sampling.results import PendingBatch, Result
from instdiff_jax.serving.jobs import Image, Queue
from instdiff_jax.serving.metrics import Metrics
from instdiff_jax.serving.requests import Work

_logger = logging.getLogger(__name__)
INTERNAL = "the server failed; its log says why"


class _Batch(NamedTuple):
    images: list[Image]
    pending: PendingBatch
    began: float


class Painter:
    """Takes images from a queue and delivers pictures, until the queue is closed.

    Attributes:
        pipeline: that draws.
        about: what every picture notes of the server: fingerprint and dtype.
        ready: whether a first picture has been drawn, and so the programs compiled.
    """

    def __init__(self, pipeline: Pipeline, queue: Queue, metrics: Metrics, about: dict[str, Any]):
        self.pipeline, self.about, self.ready = pipeline, about, False
        self._queue, self._metrics = queue, metrics
        self.seconds_per_image = 1.0  # of late
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="painter")  # all that waits for devices

    async def run(self, warm: Sequence[Work] = ()) -> None:
        """Draws each of `warm` once, then the queue's images."""
        self._loop = asyncio.get_running_loop()
        for work in warm:
            await self._in_thread(self._warm, work)
        self.ready = True
        started: _Batch | None = None
        while True:
            images = self._queue.take_now(self._limit) if started else await self._queue.take(self._limit)
            if not images and not started:
                break
            following = await self._in_thread(self._start, images) if images else None
            if started:
                await self._in_thread(self._finish, started)
            started = following
        self._thread.shutdown()

    def _in_thread(self, function: Callable, *arguments: Any) -> "asyncio.Future":
        return self._loop.run_in_executor(self._thread, function, *arguments)

    def _limit(self, work: Work) -> int:
        """The most rows of a batch like a work's."""
        return self.pipeline.limits.row_limit(work.canvas, work.settings.masked_attention != "none")

    def _warm(self, work: Work) -> None:
        request = work.request(self.pipeline, [work.seeds[0]])
        list(self.pipeline.start_batch(request, [ImageRequest(0, work.layout, work.canvas, 0)]).results())

    def _start(self, images: list[Image]) -> _Batch | None:
        """Puts a batch on its way."""
        numbers: dict[int, int] = {}  # the images of one layout share its conditions
        work = images[0].job.work
        batch = []
        for index, image in enumerate(images):
            number = numbers.setdefault(id(image.job.work), len(numbers))
            batch.append(ImageRequest(number, image.job.work.layout, work.canvas, index))
        try:
            request = work.request(self.pipeline, [image.seed for image in images])
            watched = any(image.job.watched for image in images)
            pending = self.pipeline.start_batch(request, batch, watched)
        except Exception as error:
            self._fail(images, error)
            return None
        self._metrics.batch_images.observe(len(images))
        return _Batch(images, pending, time.monotonic())

    def _finish(self, batch: _Batch) -> None:
        """Waits for a batch, and delivers its pictures."""
        try:
            for event in batch.pending.events or ():
                event.ready.block_until_ready()
                self._report(batch.images, event.evaluations)
            for image, result in zip(batch.images, batch.pending.results(), strict=True):
                self._post(self._queue.deliver, image, self._encode(image, result))
                self._metrics.images.inc()
        except Exception as error:
            # One broken image must not take the others of its batch with it.
            if isinstance(error, NotFiniteError) and len(batch.images) > 1:
                for image in batch.images:
                    alone = self._start([image])
                    if alone is not None:
                        self._finish(alone)
            else:
                self._fail(batch.images, error)
        seconds = time.monotonic() - batch.began
        self._metrics.batch_seconds.observe(seconds)
        self.seconds_per_image += 0.2 * (seconds / len(batch.images) - self.seconds_per_image)

    def _report(self, images: Sequence[Image], evaluations: int) -> None:
        total = sum(image.job.work.evaluations / len(image.job.work.seeds) for image in images)
        for image in images:
            share = image.job.work.evaluations / len(image.job.work.seeds) / total
            self._post(self._queue.progress, image.job, round(evaluations * share))

    def _encode(self, image: Image, result: Result) -> bytes:
        work = image.job.work
        about = self.about | {"sampling": work.settings.to_dict(), "format": work.options.format}
        arrays = {"init_image": work.options.init_image, "inpaint_mask": work.options.inpaint_mask}
        given = {name: array for name, array in arrays.items() if array is not None}
        inputs = fingerprint_inputs(given)
        file = io.BytesIO()
        text = png_text(result, about | {"strength": work.options.strength}, inputs)
        PillowImage.fromarray(result.array).save(file, format="PNG", pnginfo=text)
        return file.getvalue()

    def _fail(self, images: Sequence[Image], error: Exception) -> None:
        fault = not isinstance(error, InputError)
        if fault:
            _logger.error("a batch failed", exc_info=error)
        for job in {image.job for image in images}:
            self._post(self._queue.fail, job, INTERNAL if fault else str(error), fault)

    def _post(self, function: Callable, *arguments: Any) -> None:
        self._loop.call_soon_threadsafe(function, *arguments)
