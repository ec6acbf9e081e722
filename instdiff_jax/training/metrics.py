"""What a run reports: numbers in JSONL and TensorBoard, a progress line, images, a profiler trace."""

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np
from jaxtyping import UInt8

from instdiff_jax.analysis.chips import CHIPS
from instdiff_jax.buckets import as_path, check_writable, is_bucket, upload_folder
from instdiff_jax.data.loader import DevicePrefetch
from instdiff_jax.errors import InputError
from instdiff_jax.files import write_errors, write_text
from instdiff_jax.training.goodput import Goodput, read_lines
from instdiff_jax.training.settings import TrainSettings
from instdiff_jax.training.wandb_run import WandbRun

# Peak dense bfloat16 FLOP/s of one device, from the vendors' data sheets. Keys are prefixes of jax's device_kind; the
# longest match counts. On TPU v2 and v3 a device is half a chip.
PEAK_FLOPS = {
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v4 lite": 138e12,
    "TPU v5": CHIPS["v5p"].flops,
    "TPU v5p": CHIPS["v5p"].flops,
    "TPU v5 lite": CHIPS["v5e"].flops,
    "TPU v5e": CHIPS["v5e"].flops,
    "TPU v6 lite": CHIPS["v6e"].flops,
    "TPU v6e": CHIPS["v6e"].flops,
    "TPU7x": 1153.5e12,
    "NVIDIA A10": 125e12,
    "NVIDIA A100": 312e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GB200": 2500e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
}


# The metrics in the progress line, and their labels.
_SHOWN = {
    "loss": "loss",
    "learning_rate": "rate",
    "images_per_second": "images/s",
    "mfu": "mfu",
    "data_wait": "waits for data",
    "goodput": "goodput",
    "skipped": "skipped",
}


def peak_flops(device_kind: str) -> float | None:
    """Peak FLOP/s of a device; None for an unknown one."""
    known = [name for name in PEAK_FLOPS if device_kind == name or device_kind.startswith((f"{name} ", f"{name}-"))]
    return PEAK_FLOPS[max(known, key=len)] if known else None


class MetricsWriter:
    """Writes metrics.jsonl and TensorBoard files to a run's folder.

    Args:
        workdir: the run's folder.
        start_step: lines of later steps, written by a killed run, are dropped.
        total_steps: the run's number of steps, for the progress line.
        active: whether this process writes; only one per job does. On the others the methods do nothing.
        wandb: writes there too, if given.
    """

    def __init__(
        self, workdir: Path, start_step: int, total_steps: int, active: bool = True, wandb: WandbRun | None = None
    ):
        self._active, self._total, self._started = active, total_steps, time.perf_counter()
        self._start_step, self._wandb = start_step, wandb
        if not active:
            return
        # A slow import, needed only on this process.
        from tensorboardX import SummaryWriter

        self._path = path = workdir / "metrics.jsonl"
        _drop_later_lines(path, start_step)
        with write_errors(path):
            self._file = _BucketLines(path) if is_bucket(path) else path.open("ab", buffering=0)
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=start_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes a step's numbers. Numbers that are not finite become null in JSON."""
        if not self._active:
            return
        numbers = {name: float(value) for name, value in values.items()}
        line = {"step": step, "time": round(time.time(), 3)} | {
            name: value if np.isfinite(value) else None for name, value in numbers.items()
        }
        with write_errors(self._path):
            self._append((json.dumps(line) + "\n").encode())
            for name, value in numbers.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.write(step, numbers)

    def save(self) -> None:
        """Makes sure that what was written is in the file."""
        if self._active and isinstance(self._file, _BucketLines):
            self._file.upload()

    def _append(self, line: bytes) -> None:
        """Adds a line, whole or not at all."""
        if isinstance(self._file, _BucketLines):
            self._file.add(line)
            return
        end = self._file.seek(0, os.SEEK_END)
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError:
            self._file.truncate(end)
            raise

    def image(self, step: int, name: str, image: UInt8[np.ndarray, "H W 3"] | None) -> None:
        """Adds an image to TensorBoard."""
        if self._active and image is not None:
            self._board.add_image(name, image, step, dataformats="HWC")
            if self._wandb is not None:
                self._wandb.image(step, name, image)

    def progress(self, step: int, values: Mapping[str, float]) -> None:
        """Shows the progress: on a terminal one line that is rewritten, elsewhere a new line each time."""
        if not self._active:
            return
        done = max(1, step - self._start_step)
        left = (time.perf_counter() - self._started) / done * (self._total - step)
        numbers = "  ".join(f"{label} {values[name]:.4g}" for name, label in _SHOWN.items() if name in values)
        text = f"step {step}/{self._total}  {numbers}  {_duration(left)} left"
        if sys.stderr.isatty():
            print(f"\r\x1b[K{text}", end="" if step < self._total else "\n", file=sys.stderr, flush=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Closes the files."""
        if self._active:
            with write_errors(self._path.parent):
                self._file.close()
                self._board.close()
            if self._wandb is not None:
                self._wandb.close()


class _BucketLines:
    """A file of lines in a bucket, where nothing can be added to an object: it is written anew at times."""

    def __init__(self, path: Path, every: float = 30.0):
        self._path, self._every, self._written = path, every, time.monotonic()
        self._lines = [path.read_text(encoding="utf-8")] if path.exists() else []

    def add(self, line: bytes) -> None:
        self._lines.append(line.decode())
        if time.monotonic() - self._written > self._every:
            self.upload()

    def upload(self) -> None:
        write_text(self._path, "".join(self._lines))
        self._written = time.monotonic()

    def close(self) -> None:
        self.upload()


def _drop_later_lines(path: Path, step: int) -> None:
    if path.exists():
        write_text(path, "".join(f"{text}\n" for text, line in read_lines(path) if line["step"] <= step))


def _duration(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


class Clock:
    """Speed since the last report: images per second, MFU, and the share of time spent waiting for data.

    Args:
        batch_size: images per step, over all devices.
        count_flops: returns the model FLOPs of one step on one device; called only if the chip's peak is known.
        device: one of the job's devices, which are all of one kind.
    """

    def __init__(self, batch_size: int, count_flops: Callable[[], float], device: jax.Device):
        self._batch_size = batch_size
        self._peak = peak_flops(device.device_kind)
        self._flops = count_flops() if self._peak is not None else 0.0
        self._step, self._time, self._waited = None, 0.0, 0.0

    def start(self, step: int, waited: float) -> None:
        """Starts measuring after `step`; `waited` is how long the loop has waited for data so far, in seconds."""
        self._step, self._time, self._waited = step, time.perf_counter(), waited

    def report(self, step: int, waited: float) -> dict[str, float]:
        """The speed since `start` or the last report, up to `step`; empty if there was no step."""
        seconds, steps = max(time.perf_counter() - self._time, 1e-9), step - self._step
        if steps < 1:
            return {}
        values = {
            "images_per_second": steps * self._batch_size / seconds,
            "seconds_per_step": seconds / steps,
            "data_wait": (waited - self._waited) / seconds,
        }
        if self._peak is not None:
            values["mfu"] = steps * self._flops / seconds / self._peak
        self.start(step, waited)
        return values


class Reporter:
    """Reads and writes a step's numbers while the next step runs, so that the devices never wait.

    Attributes:
        sound: False once `max_skips` updates in a row were skipped.
    """

    def __init__(self, settings: TrainSettings, writer: MetricsWriter, batches: DevicePrefetch, goodput: Goodput):
        self.sound, self._goodput = True, goodput
        self._settings, self._writer, self._batches = settings, writer, batches
        self._clock: Clock | None = None
        self._first, self._pending = 0, None

    @property
    def started(self) -> bool:
        return self._clock is not None

    def start(self, step: int, clock: Clock) -> None:
        """Call before the run's first step; `step` is the number of steps done."""
        self._clock, self._first = clock, step
        clock.start(step, self._batches.wait_seconds)

    def add(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Takes a step's numbers, which may not be computed yet, and writes those of the step before."""
        self._write_pending()
        self._pending = step, metrics
        if step == self._first + 1:
            # The speed does not include compilation.
            jax.block_until_ready(metrics)
            self._clock.start(step, self._batches.wait_seconds)

    def flush(self) -> None:
        """Waits for the last step's numbers and writes them to the file."""
        self._write_pending()
        self._writer.save()

    def _write_pending(self) -> None:
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        last = step == self._settings.steps
        if step % self._settings.log_every == 0 or last or values["skipped_in_row"]:
            values |= self._clock.report(step, self._batches.wait_seconds) | self._goodput.values()
            self._writer.write(step, values)
            self._writer.progress(step, values)
        self.sound = self.sound and values["skipped_in_row"] < self._settings.max_skips


class ProfilerWindow:
    """Traces `count` steps from step `first` on, for TensorBoard or Perfetto; `first` -1 traces nothing."""

    def __init__(self, workdir: Path, first: int, count: int):
        self._folder, self._first, self._last, self._running = workdir / "profile", first, first + count, False
        self._local = self._folder

    def before(self, step: int) -> None:
        """Call before each step."""
        if step == self._first:
            if is_bucket(self._folder):
                self._local = Path(tempfile.mkdtemp(prefix="instdiff-"))
            jax.profiler.start_trace(str(self._local))
            self._running = True

    def after(self, step: int, result: object) -> None:
        """Call after each step, with its result."""
        if self._running and step + 1 >= self._last:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """Ends a running trace."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
            if self._local != self._folder:
                upload_folder(self._local, self._folder, only_add=True)
                shutil.rmtree(self._local)


def make_workdir(path: str | os.PathLike) -> Path:
    """Returns the run's folder; makes it if it is missing.

    Raises:
        InputError: if it cannot be written.
    """
    folder = as_path(path)
    if is_bucket(path):
        check_writable(folder)
        return folder
    if "://" in os.fspath(path):
        raise InputError(f"--workdir: expected a folder or gs://BUCKET/NAME, got {path}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # A unique name: the job's processes share the folder, and may have equal process ids.
        tempfile.NamedTemporaryFile(dir=folder, prefix=".writable.").close()
    except OSError as error:
        raise InputError(f"--workdir: {folder}: this folder cannot be written ({error.strerror})") from error
    return folder
