"""Batches by step: batch s is a function of the seed and s, whatever number of processes loads it.

Row r of batch s is position s·B + r in an endless sequence of epochs, each a shuffle of the whole split. Which image
stands there, and every draw made for it, follow from the seed and that position alone. So the loader's position is
the step, and a run may go on with another number of processes or workers.
"""

import multiprocessing
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags
from jaxtyping import Int

from instdiff_jax.data.dataset import InstanceDataset, Record
from instdiff_jax.data.examples import DataConfig, choose_phrases, draw_formats, locate, select_instances, write_caption
from instdiff_jax.data.images import Crop, load_image
from instdiff_jax.data.latents import LatentCache
from instdiff_jax.data.phrases import PhraseTable
from instdiff_jax.errors import InputError
from instdiff_jax.models.regions import Orientation, region_bits

TokenizeFunction = Callable[[list[str]], Int[np.ndarray, "n length"]]
Batch = dict[str, Any]

_MANY_STEPS = 1 << 62
_SAMPLE, _BATCH = 0, 1
# What of a grounding has no slots.
_WHOLE = ("maps", "has_map")


class BatchReader:
    """From a step to this process's rows of its batch; sent to worker processes, so everything in it pickles."""

    def __init__(
        self,
        dataset: InstanceDataset,
        config: DataConfig,
        tokenize: TokenizeFunction,
        phrases: PhraseTable,
        batch_size: int,
        rows: Sequence[int],
        seed: int,
        shuffle: bool = True,
        latents: LatentCache | None = None,
        masked: tuple[Orientation, int] | None = None,
    ):
        """See `make_loader`."""
        if batch_size < 1 or not all(0 <= row < batch_size for row in rows):
            raise InputError(f"rows: expected numbers from 0 to {batch_size - 1} in a batch of {batch_size}")
        self.dataset, self.config, self.tokenize, self.phrases = dataset, config, tokenize, phrases
        self.batch_size, self.rows, self.seed, self.latents, self.masked = (
            batch_size,
            tuple(rows),
            seed,
            latents,
            masked,
        )
        order = grain.MapDataset.range(len(dataset))
        # Every epoch gets its own shuffle.
        self.order = (order.shuffle(seed) if shuffle else order).repeat()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if multiprocessing.parent_process() is not None and threading.current_thread() is threading.main_thread():
            # A signal to the whole job also reaches the workers, whose batches the run needs to come to its save.
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)

    def __call__(self, step: int) -> Batch:
        """This process's rows of batch `step`, in the order of `rows`."""
        dropout = None
        if self.config.dropout_per == "batch":
            dropout = self._draw_dropout(self._generator(_BATCH, step))
        examples = []
        for row in self.rows:
            position = step * self.batch_size + row
            examples.append(self.example(int(self.order[position]), self._generator(_SAMPLE, position), dropout))
        return _stack(examples)

    def example(
        self, index: int, rng: np.random.Generator, dropout: tuple[bool, frozenset[str]] | None = None
    ) -> Batch:
        """One example: image `index` of the split with the draws of `rng`.

        Args:
            index: which record.
            rng: every draw comes from it.
            dropout: whether the grounding is null, and the formats kept; drawn from `rng` where None.
        """
        record, config = self.dataset[index], self.config
        crop = Crop(record.width, record.height, config.image_size, bool(rng.random() < config.flip))
        chosen = select_instances(record, crop, config)
        instances = [instance for instance, _ in chosen]
        caption = write_caption(record, [instance.category for instance in instances], config, rng)
        phrases = choose_phrases(instances, config, rng)
        null, kept = dropout or self._draw_dropout(rng)
        if null:
            # No instance: zeros everywhere, and every feature is its null vector.
            chosen, phrases = [], np.full_like(phrases, -1)
        grounding = locate(chosen, record, crop, config.map_size, rng, config.point, kept)
        grounding["phrase_embeddings"] = self.phrases.lookup(phrases)
        result = {"caption_ids": np.asarray(self.tokenize([caption])[0], np.int32)}
        if self.masked is not None:
            orientation, side = self.masked
            visual, tokens = region_bits(grounding, side, side, orientation)
            result["regions"] = {"visual": visual, "tokens": tokens}
        # Slots that no image fills need not go to the devices.
        result["grounding"] = {k: x if k in _WHOLE else x[: config.max_instances] for k, x in grounding.items()}
        return result | self._pixels(index, record, crop)

    def _pixels(self, index: int, record: Record, crop: Crop) -> dict[str, np.ndarray]:
        if self.latents is None:
            return {"image": crop.image(load_image(record.image))}
        mean, logvar = self.latents.lookup(index, crop.flip)
        return {"latent_mean": mean, "latent_logvar": logvar}

    def _draw_dropout(self, rng: np.random.Generator) -> tuple[bool, frozenset[str]]:
        return bool(rng.random() < self.config.null_grounding), draw_formats(self.config, rng)

    def _generator(self, kind: int, position: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(kind, position)))


def _stack(examples: list[Batch]) -> Batch:
    first = examples[0]
    return {
        key: _stack([example[key] for example in examples])
        if isinstance(value, dict)
        else np.stack([example[key] for example in examples])
        for key, value in first.items()
    }


def make_loader(
    dataset: InstanceDataset,
    config: DataConfig,
    *,
    tokenize: TokenizeFunction,
    phrases: PhraseTable,
    batch_size: int,
    rows: Sequence[int] | None = None,
    seed: int = 0,
    start_step: int = 0,
    shuffle: bool = True,
    latents: LatentCache | None = None,
    masked: tuple[Orientation, int] | None = None,
    workers: int = 0,
    prefetch: int = 2,
) -> Iterator[Batch]:
    """An endless iterator over batches from `start_step` on.

    Args:
        dataset: the split to train on.
        config: how records become examples.
        tokenize: captions to token ids of a fixed length. Must pickle where there are workers.
        phrases: the phrase embeddings of `dataset`.
        batch_size: rows of the whole batch, over all processes.
        rows: the rows this process loads, in the order it wants them; all by default.
        seed: of the shuffle and every draw; below 2^32.
        start_step: the first batch to give.
        shuffle: whether epochs are shuffled; without, images come in the split's order.
        latents: cached posteriors, given instead of images.
        masked: for instance-masked attention, its orientation and the side of the latent grid; None without it.
        workers: processes that make batches; 0 makes them in a thread of this one.
        prefetch: batches made ahead (by each worker).

    Returns:
        Batches: caption_ids int32 [n, length]; image uint8 [n, S, S, 3], or latent_mean and latent_logvar float32
        [n, h, w, z]; grounding, of k = `config.max_instances` slots: boxes [n, k, 4], points [n, k, 2], scribbles
        [n, k, 40], mask_points [n, k, 512], phrase_embeddings [n, k, width], valid, has_box, has_point, has_scribble,
        has_mask [n, k], has_map [n], float32, and maps uint32 [n, map_size, map_size], bit i for slot i; with `masked`
        also regions: visual uint32 [n, side²] and tokens [n, 184], see `regions.region_bits`.

    Raises:
        InputError: for rows outside the batch, or a setting out of its range.
    """
    config.validate()
    if not 0 <= seed < 1 << 32:
        raise InputError(f"seed: expected a whole number from 0 to {(1 << 32) - 1}, got {seed}")
    rows = range(batch_size) if rows is None else rows
    reader = BatchReader(dataset, config, tokenize, phrases, batch_size, rows, seed, shuffle, latents, masked)
    steps = grain.MapDataset.range(start_step, _MANY_STEPS).map(reader)
    batches = steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=max(prefetch, 1)))
    if workers:
        # grain reads absl's flags when it starts workers, which only absl.app parses.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        batches = batches.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=max(prefetch, 1))
        )
    return iter(batches)


class DevicePrefetch:
    """Keeps batches on the devices ahead of the step that takes them.

    Attributes:
        wait_seconds: how long `next` has waited in all: the time the devices wait for data.
    """

    def __init__(self, batches: Iterator[Batch], put: Callable[[Batch], Any], depth: int = 2):
        """Starts a thread that takes batches and calls `put` on each, `depth` of them ahead."""
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
        except BaseException as error:  # raised again by the thread that asks for the batch
            self._offer((None, error))

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
        """Stops the thread and the loader's worker processes; to be called before the program ends."""
        self._stop.set()
        self._thread.join(timeout=10)
        # Else what its workers have made ahead stays in shared memory until the system finds it.
        if not self._thread.is_alive() and hasattr(self._batches, "close"):
            self._batches.close()
