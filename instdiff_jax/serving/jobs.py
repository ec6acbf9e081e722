"""Jobs: requests on their way to pictures. They belong to the server's event loop; the painter's thread posts to it."""

import asyncio
import collections
import dataclasses
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Literal

from instdiff_jax.errors import InputError
from instdiff_jax.serving.limits import Limits
from instdiff_jax.serving.requests import Work

State = Literal["waiting", "drawing", "done", "failed", "cancelled"]
FINISHED = ("done", "failed", "cancelled")


class Busy(Exception):
    """The queue is full."""


@dataclasses.dataclass(eq=False)
class Job:
    """One request on its way.

    Attributes:
        work: what it asks for.
        watched: whether somebody follows its progress.
        live: a newer job with the same text replaces it while it waits.
        id: its name, which cannot be guessed.
        state: how far it is.
        problem: why it failed or was cancelled.
        fault: whether that was the server's.
        done: UNet evaluations, of `work.evaluations`.
        pictures: PNG files by index of the seed.
        created, finished: in seconds of the monotonic clock.
        timer: that ends it when its time is over.
    """

    work: Work
    watched: bool = False
    live: str | None = None
    id: str = dataclasses.field(default_factory=lambda: secrets.token_urlsafe(12))
    state: State = "waiting"
    problem: str = ""
    fault: bool = False
    done: int = 0
    pictures: dict[int, bytes] = dataclasses.field(default_factory=dict)
    created: float = dataclasses.field(default_factory=time.monotonic)
    finished: float | None = None
    timer: asyncio.TimerHandle | None = None
    _news: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)

    @property
    def is_finished(self) -> bool:
        return self.state in FINISHED

    def changed(self) -> None:
        """Wakes who waits for news."""
        self._news.set()
        self._news = asyncio.Event()

    async def wait(self) -> None:
        """Waits until the job is finished."""
        while not self.is_finished:
            await self._news.wait()

    async def news(self) -> AsyncIterator["Job"]:
        """The job now, and after every change until it is finished."""
        while True:
            event = self._news
            yield self
            if self.is_finished:
                return
            await event.wait()


@dataclasses.dataclass(frozen=True, eq=False)
class Image:
    """One image of a job: that of the seed with this index."""

    job: Job
    index: int

    @property
    def seed(self) -> int:
        return self.job.work.seeds[self.index]


class Queue:
    """Images that wait to be drawn, and the jobs that they belong to. All methods run in the event loop."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self.jobs: dict[str, Job] = {}
        self.open = True
        self._waiting: collections.deque[Image] = collections.deque()
        self._finished: collections.deque[str] = collections.deque()
        self._arrival = asyncio.Event()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, job: Job) -> None:
        """Queues a job's images; Busy if there is no room."""
        if job.live is not None:
            for image in list(self._waiting):
                if image.job.live == job.live and not image.job.is_finished:
                    self.cancel(image.job, "replaced by a newer request")
        if len(self) + len(job.work.seeds) > self.limits.waiting:
            raise Busy
        self.jobs[job.id] = job
        self._waiting.extend(Image(job, index) for index in range(len(job.work.seeds)))
        self._arrival.set()

    async def take(self, limit: Callable[[Work], int]) -> list[Image]:
        """The oldest image and others that may be drawn with it; [] once the queue is closed and empty.

        Args:
            limit: the most rows of a batch like a work's; a larger image is drawn alone.
        """
        while not self._waiting:
            if not self.open:
                return []
            self._arrival.clear()
            await self._arrival.wait()
        return self.take_now(limit)

    def take_now(self, limit: Callable[[Work], int]) -> list[Image]:
        """As `take`, of what is there."""
        batch: list[Image] = []
        rows = 0
        for image in self._of_one_key():
            size = image.job.work.rows
            if batch and rows + size > limit(image.job.work):
                break
            batch.append(image)
            rows += size
        # Batches of 1, 2, 4, 8, ... images: few programs to compile.
        batch = batch[: 1 << (len(batch).bit_length() - 1)] if batch else []
        taken = set(map(id, batch))
        self._waiting = collections.deque(image for image in self._waiting if id(image) not in taken)
        for image in batch:
            if image.job.state == "waiting":
                image.job.state = "drawing"
                image.job.changed()
        return batch

    def _of_one_key(self) -> Iterator[Image]:
        key = self._waiting[0].job.work.key if self._waiting else None
        return (image for image in self._waiting if image.job.work.key == key)

    def progress(self, job: Job, evaluations: int) -> None:
        """Notes evaluations that are done."""
        job.done += evaluations
        job.changed()

    def deliver(self, image: Image, picture: bytes) -> None:
        """Notes a picture."""
        job = image.job
        if job.is_finished:
            return
        job.pictures[image.index] = picture
        if len(job.pictures) == len(job.work.seeds):
            self._finish(job, "done")
        else:
            job.changed()

    def fail(self, job: Job, problem: str, fault: bool = False) -> None:
        """Ends a job that cannot be drawn."""
        job.fault = fault
        self._finish(job, "failed", problem)

    def cancel(self, job: Job, problem: str = "cancelled") -> None:
        """Ends a job that nobody wants any more; what is being drawn is drawn, and dropped."""
        self._finish(job, "cancelled", problem)

    def close(self, problem: str) -> None:
        """No more jobs; those that wait are cancelled."""
        self.open = False
        for job in {image.job for image in self._waiting}:
            self.cancel(job, problem)
        self._arrival.set()

    def _finish(self, job: Job, state: State, problem: str = "") -> None:
        if job.is_finished:
            return
        job.state, job.problem, job.finished = state, problem, time.monotonic()
        if job.timer is not None:
            job.timer.cancel()
        if state != "done":
            job.pictures.clear()
        self._waiting = collections.deque(image for image in self._waiting if image.job is not job)
        self._finished.append(job.id)
        while len(self._finished) > self.limits.kept:
            del self.jobs[self._finished.popleft()]
        job.changed()


def check_job(jobs: dict[str, Job], name: str) -> Job:
    """The job of an id; InputError for one that is not there."""
    if name not in jobs:
        raise InputError("id: expected that of a job; finished ones are forgotten after some time")
    return jobs[name]
