"""Batches by step: batch s depends only on the seed and s, not on the number of processes.

Row r of batch s is position s·B + r in an endless sequence of epochs; each epoch is a shuffle of the split. The image
at a position and all its random draws depend only on the seed and the position. So the loader's only state is the step,
and a run may resume with another number of processes or workers.
"""

import dataclasses
import multiprocessing
import multiprocessing.connection
import os
import queue
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags
from jaxtyping import Int

from instdiff_jax.data.dataset import InstanceDataset, Record
from instdiff_jax.data.examples import DataConfig, choose_phrases, draw_formats, locate, select_instances, write_caption
from instdiff_jax.data.images import Crop
from instdiff_jax.data.latents import LatentCache
from instdiff_jax.data.phrases import PhraseTable
from instdiff_jax.data.segments import new_segment, remove_segments
from instdiff_jax.errors import InputError
from instdiff_jax.images import open_image
from instdiff_jax.models.regions import Orientation, region_bits

TokenizeFunction = Callable[[list[str]], Int[np.ndarray, "n length"]]
Batch = dict[str, Any]

_MANY_STEPS = 1 << 62
_SAMPLE, _BATCH = 0, 1
# Arrays of a grounding without a slot axis.
_WHOLE = ("maps", "has_map")


class Sources(NamedTuple):
    """Where the parts of a batch come from. It is sent to worker processes, so everything must pickle.

    Attributes:
        dataset: the split.
        tokenize: maps captions to token ids of a fixed length.
        phrases: the phrase embeddings of `dataset`.
        latents: cached posteriors, used instead of the images.
    """

    dataset: InstanceDataset
    tokenize: TokenizeFunction
    phrases: PhraseTable
    latents: LatentCache | None = None


@dataclasses.dataclass(frozen=True)
class LoaderSettings:
    """How batches are made.

    Attributes:
        examples: how records become examples.
        batch_size: rows of the whole batch, over all processes.
        rows: the rows that this process loads, in this order; all by default.
        seed: for the shuffle and all draws; below 2^32.
        shuffle: whether to shuffle each epoch; otherwise images come in the split's order.
        masked: for masked attention, its orientation and the side of the latent grid.
        workers: processes that make batches; 0 uses a thread of this process.
        prefetch: batches made ahead, per worker.
    """

    examples: DataConfig
    batch_size: int
    rows: Sequence[int] | None = None
    seed: int = 0
    shuffle: bool = True
    masked: tuple[Orientation, int] | None = None
    workers: int = 0
    prefetch: int = 2

    def validate(self) -> None:
        """Raises InputError for rows outside the batch, or a setting out of range."""
        self.examples.validate()
        if not 0 <= self.seed < 1 << 32:
            raise InputError(f"seed: expected a whole number from 0 to {(1 << 32) - 1}, got {self.seed}")
        if self.batch_size < 1 or not all(0 <= row < self.batch_size for row in self.rows or ()):
            raise InputError(f"rows: expected numbers from 0 to {self.batch_size - 1} in a batch of {self.batch_size}")


class BatchReader:
    """Maps a step to this process's rows of its batch. It is sent to worker processes, so it pickles."""

    def __init__(self, sources: Sources, settings: LoaderSettings):
        settings.validate()
        self.sources, self.settings, self._shared = sources, settings, False
        order = grain.MapDataset.range(len(sources.dataset))
        # Each epoch has its own shuffle.
        self.order = (order.shuffle(settings.seed) if settings.shuffle else order).repeat()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._shared = multiprocessing.parent_process() is not None
        if multiprocessing.parent_process() is not None and threading.current_thread() is threading.main_thread():
            # A signal to the whole job also reaches the workers, but the run needs their batches until it has saved.
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
            threading.Thread(target=_end_with_parent, daemon=True).start()

    def __call__(self, step: int) -> Batch:
        """This process's rows of batch `step`, in the order of `settings.rows`."""
        settings, dropout = self.settings, None
        if settings.examples.dropout_per == "batch":
            dropout = self._draw_dropout(self._generator(_BATCH, step))
        examples = []
        for row in range(settings.batch_size) if settings.rows is None else settings.rows:
            position = step * settings.batch_size + row
            examples.append(self.example(int(self.order[position]), self._generator(_SAMPLE, position), dropout))
        return _stack(examples, new_segment if self._shared else np.empty)

    def example(
        self, index: int, rng: np.random.Generator, dropout: tuple[bool, frozenset[str]] | None = None
    ) -> Batch:
        """Makes one example from image `index` of the split, with random draws from `rng`.

        Args:
            index: which record.
            rng: source of all draws.
            dropout: whether the grounding is null, and which formats to keep; None draws both from `rng`.
        """
        record, config = self.sources.dataset[index], self.settings.examples
        crop = Crop(record.width, record.height, config.image_size, bool(rng.random() < config.flip))
        chosen = select_instances(record, crop, config)
        instances = [instance for instance, _ in chosen]
        caption = write_caption(record, [instance.category for instance in instances], config, rng)
        phrases = choose_phrases(instances, config, rng)
        null, kept = dropout or self._draw_dropout(rng)
        if null:
            # Without instances all arrays are zero, so every token is its null embedding.
            chosen, phrases = [], np.full_like(phrases, -1)
        grounding = locate(chosen, record, crop, config.map_size, rng, config.point, kept)
        grounding["phrase_embeddings"] = self.sources.phrases.lookup(phrases)
        result = {"caption_ids": np.asarray(self.sources.tokenize([caption])[0], np.int32)}
        if self.settings.masked is not None:
            orientation, side = self.settings.masked
            visual, tokens = region_bits(grounding, side, side, orientation)
            result["regions"] = {"visual": visual, "tokens": tokens}
        # The other slots are always empty; they are not sent to the devices.
        result["grounding"] = {k: x if k in _WHOLE else x[: config.max_instances] for k, x in grounding.items()}
        return result | self._pixels(index, record, crop)

    def _pixels(self, index: int, record: Record, crop: Crop) -> dict[str, np.ndarray]:
        if self.sources.latents is None:
            return {"image": crop.image(open_image(record.image, (record.width, record.height)))}
        mean, logvar = self.sources.latents.lookup(index, crop.flip)
        return {"latent_mean": mean, "latent_logvar": logvar}

    def _draw_dropout(self, rng: np.random.Generator) -> tuple[bool, frozenset[str]]:
        config = self.settings.examples
        return bool(rng.random() < config.null_grounding), draw_formats(config, rng)

    def _generator(self, kind: int, position: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(self.settings.seed, spawn_key=(kind, position)))


def _end_with_parent() -> None:
    """Ends this worker when its parent has ended, and removes the shared memory of them all.

    Linux's PR_SET_PDEATHSIG does not work here: it follows the starting thread, which is not the main one.
    """
    parent = multiprocessing.parent_process()
    multiprocessing.connection.wait([parent.sentinel])
    remove_segments(parent.pid)
    os._exit(1)


def _explain(error: BaseException) -> BaseException:
    """Returns an InputError if a signal ended a worker for a reason that the user can fix."""
    found = re.search(r"Worker process was terminated unexpectedly with exit code -(\d+)", str(error))
    if found is None:
        return error
    number = int(found[1])
    if number == signal.SIGBUS:
        reason = "shared memory (/dev/shm) is full; make it larger (docker run --shm-size)"
    elif number == signal.SIGKILL:
        reason = "it was killed, perhaps for want of memory"
    else:
        return error
    return InputError(
        f"config.data.workers: a worker process ended: {reason}, or use fewer workers or a lower prefetch"
    )


def _stack(examples: list[Batch], new: Callable[..., np.ndarray]) -> Batch:
    """Stacks each array of the examples in an array that `new` makes."""
    batch: Batch = {}
    for key, value in examples[0].items():
        values = [example[key] for example in examples]
        if isinstance(value, dict):
            batch[key] = _stack(values, new)
        else:
            batch[key] = new((len(values), *np.shape(value)), np.asarray(value).dtype)
            np.stack(values, out=batch[key])
    return batch


def make_loader(sources: Sources, settings: LoaderSettings, start_step: int = 0) -> Iterator[Batch]:
    """Returns an endless iterator over batches, starting at `start_step`.

    Returns:
        Batches: caption_ids int32 [n, length]; image uint8 [n, S, S, 3], or latent_mean and latent_logvar float32
        [n, h, w, z]; grounding with k = `max_instances` slots: boxes [n, k, 4], points [n, k, 2], scribbles [n, k, 40],
        mask_points [n, k, 512], phrase_embeddings [n, k, width], valid, has_box, has_point, has_scribble, has_mask
        [n, k], has_map [n], float32, and maps uint32 [n, map_size, map_size], bit i for slot i; with `masked` also
        regions: visual uint32 [n, side²] and tokens [n, 184], see `regions.region_bits`.

    Raises:
        InputError: if rows are outside the batch, or a setting is out of range.
    """
    reader = BatchReader(sources, settings)
    steps = grain.MapDataset.range(start_step, _MANY_STEPS).map(reader)
    ahead = max(settings.prefetch, 1)
    batches = steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=ahead))
    if settings.workers:
        remove_segments()
        # grain reads absl's flags when it starts workers, but only absl.app parses them.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(num_workers=settings.workers, per_worker_buffer_size=ahead)
        batches = batches.mp_prefetch(options)
    return iter(batches)


class DevicePrefetch:
    """Transfers batches to the devices ahead of the step that uses them.

    Attributes:
        wait_seconds: total time that `next` has waited.
    """

    def __init__(self, batches: Iterator[Batch], put: Callable[[Batch], Any], depth: int = 2):
        """Starts a thread that calls `put` on each batch, `depth` batches ahead."""
        self.wait_seconds = 0.0
        self._queue: queue.Queue = queue.Queue(depth)
        self._batches, self._stop = batches, threading.Event()
        self._thread = threading.Thread(target=self._run, args=(batches, put), daemon=True)
        self._thread.start()

    def _run(self, batches: Iterator[Batch], put: Callable[[Batch], Any]) -> None:
        try:
            for batch in batches:
                if not self._offer((put(batch), None)):
                    return
            self._offer((None, StopIteration()))
        except BaseException as error:  # `next` raises it again
            self._offer((None, _explain(error)))

    def _offer(self, item: tuple[Any, BaseException | None]) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> "DevicePrefetch":
        return self

    def __next__(self) -> Any:
        start = time.perf_counter()
        value, error = self._queue.get()
        self.wait_seconds += time.perf_counter() - start
        if error is not None:
            self._queue.put((None, error))
            raise error
        return value

    def close(self) -> None:
        """Stops the thread and the loader's worker processes. Call it before the program ends."""
        self._stop.set()
        self._thread.join(timeout=10)
        # Otherwise prefetched batches stay in shared memory.
        if not self._thread.is_alive() and hasattr(self._batches, "close"):
            self._batches.close()
