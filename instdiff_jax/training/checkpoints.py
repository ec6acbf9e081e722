"""Checkpoints of a run: written atomically in the background, verified when read.

A run's folder `checkpoints/` has one folder per step (orbax). Each has the training state, and in `facts` what the
run started from and a checksum of every array. It has no frozen parameters: they come from the base checkpoint.
"""

import contextlib
import re
import signal
import threading
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from instdiff_jax.buckets import Owner, absolute, is_bucket, move_folder
from instdiff_jax.checkpoint.quiet import say_errors_once
from instdiff_jax.checkpoint.run import CHECKPOINTS, checked_sums, checksums, damage, leaf_paths, open_manager
from instdiff_jax.checkpoint.verify import signed
from instdiff_jax.errors import InputError
from instdiff_jax.files import remove_folder, write_errors
from instdiff_jax.parallel.failures import barrier
from instdiff_jax.paths import check_regular
from instdiff_jax.training.state import TrainState

DAMAGED = "damaged_checkpoints"
_UNFINISHED = re.compile(r"\d+\.orbax-checkpoint-tmp(-\d+)?")  # orbax gives a folder its name when it is whole

# The facts that a resumed run must share with the checkpoint, and their names in errors. The base is identified by
# its contents, because its folder may have moved.
_SAME = {
    "seed": "config.train.seed",
    "batch_size": "config.train.batch_size",
    "base_fingerprint": "the base checkpoint's fingerprint (config.train.start)",
    "dataset_fingerprint": "the dataset's fingerprint (config.data)",
    "model": "config.model",
}


class Checkpoints:
    """A run's checkpoints. Every process of the job makes this object and calls every method.

    Args:
        workdir: the run's folder.
        facts: what the run started from: JSON-ready, with at least the keys of `_SAME`.
        keep_newest: how many of the newest to keep.
        keep_every: checkpoints of steps divisible by this are kept permanently; 0 for none.
        read_only: for reading another run's checkpoints.
    """

    def __init__(
        self,
        workdir: Path,
        facts: Mapping[str, Any],
        keep_newest: int = 3,
        keep_every: int = 0,
        read_only: bool = False,
    ):
        self.folder = absolute(workdir) / CHECKPOINTS
        self._owner = Owner(workdir) if _signs(workdir) and not read_only else None
        self._facts = dict(facts)
        say_errors_once()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep_newest,
            keep_period=keep_every or None,
            create=not read_only,
            read_only=read_only,
            async_options=ocp.options.AsyncOptions(barrier_sync_fn=barrier) if jax.process_count() > 1 else None,
        )
        with write_errors(self.folder):
            self._manager = open_manager(self.folder, options, item_names=("state", "facts"))
        if not read_only:
            self._remove_unfinished()  # of a run that was killed

    def save(self, step: int, state: TrainState) -> None:
        """Starts saving. Returns once the arrays are copied, so that the next step may overwrite them.

        Raises:
            InputError: here or in a later call of any method, if the disk is full. What was half written is removed.
        """
        if step in self._manager.all_steps():
            return
        if self._owner is not None:
            self._owner.check()
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            facts=ocp.args.JsonSave(signed(self._facts | {"step": step, "checksums": checksums(state)})),
        )
        with self._writing():
            self._manager.save(step, args=args, force=True)

    def check(self) -> None:
        """Raises InputError if the last save has failed, where one process can tell without the others."""
        if jax.process_count() == 1 and not self._manager.is_saving_in_progress():
            self.wait()

    def restore(self, shapes: TrainState) -> TrainState | None:
        """Restores the newest intact state, already sharded; None if the run has none.

        A damaged checkpoint is moved to `damaged_checkpoints/` with a warning, and the one before it is used.

        Args:
            shapes: the state as ShapeDtypeStructs with shardings, on any mesh.

        Raises:
            InputError: if the run started from something else, or none of its checkpoints can be read.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            state, _, problem = self._read(step, shapes)
            if problem is None:
                return state
            warnings.warn(f"{self.folder / str(step)}: damaged ({problem}); taking the one before it", stacklevel=2)
            self._set_aside(step)
        damaged = self.folder.parent / DAMAGED
        if steps or (damaged.is_dir() and any(damaged.iterdir())):
            raise InputError(
                f"{self.folder}: no checkpoint there can be read; the damaged ones are in {damaged}; "
                "choose another workdir, or move that folder away to begin anew"
            )
        return None

    def restore_at(self, step: int | None, shapes: TrainState) -> tuple[int, TrainState, dict[str, Any]]:
        """The step, state and facts of one checkpoint (None: the newest). Compares, moves and skips nothing.

        Raises:
            InputError: if it is missing or damaged.
        """
        steps = sorted(self._manager.all_steps())
        if not steps or (step is not None and step not in steps):
            raise InputError(f"{self.folder}: no checkpoint {'' if step is None else f'of step {step} '}there: {steps}")
        step = steps[-1] if step is None else step
        state, facts, problem = self._read(step, shapes, compare=False)
        if problem is not None:
            raise InputError(f"{self.folder / str(step)}: damaged ({problem})")
        return step, state, facts

    def wait(self) -> None:
        """Waits until everything is written."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits until everything is written, and ends the background threads."""
        with self._writing():
            self._manager.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            with write_errors(self.folder):
                yield
        except Exception:
            self._remove_unfinished()
            raise

    def _remove_unfinished(self) -> None:
        """Removes checkpoints that never became whole; in a bucket orbax does, by its own mark."""
        if jax.process_index() == 0 and not is_bucket(self.folder):
            for path in self.folder.iterdir():
                if _UNFINISHED.fullmatch(path.name):
                    remove_folder(path)

    def _read(
        self, step: int, shapes: TrainState, compare: bool = True
    ) -> tuple[TrainState | None, dict[str, Any], str | None]:
        """A state and its facts, or the problem. All processes agree whether there is a state."""
        try:
            check_regular(self.folder / str(step))
            facts = self._manager.restore(step, args=ocp.args.Composite(facts=ocp.args.JsonRestore()))["facts"]
            sums, problem = checked_sums(facts), None
        except Exception as error:  # orbax, tensorstore and json raise different errors for damaged files
            problem = damage(error)
        if not _everywhere(problem is None):
            return None, {}, problem or "another process cannot read it"
        if compare:
            self._compare(step, facts)
        expected = set(leaf_paths(shapes))
        if set(sums) != expected:
            odd = sorted(set(sums) ^ expected)
            raise InputError(
                f"{self.folder / str(step)}: its parameters are not those of config.train.trainable; "
                f"{len(odd)} differ, first {odd[0]}"
            )
        try:
            args = ocp.args.Composite(state=ocp.args.StandardRestore(shapes))
            state, problem = self._manager.restore(step, args=args)["state"], None
        except Exception as error:
            state, problem = None, damage(error)
        # Each process reads its own part. The checksums cover all parts, so every process must have read its part.
        if not _everywhere(problem is None):
            return None, facts, problem or "another process cannot read its part"
        wrong = [path for path, value in checksums(state).items() if sums[path] != value]
        if wrong:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            return None, facts, f"checksum of {wrong[0]}{more}"
        return state, facts, None

    def _compare(self, step: int, facts: Mapping[str, Any]) -> None:
        for key, name in _SAME.items():
            begun_earlier = key == "base_fingerprint" and facts.get(key) == self._facts.get("older_base_fingerprint")
            if facts.get(key) != self._facts[key] and not begun_earlier:
                old, new = (f" {value}" if np.isscalar(value) else "" for value in (facts.get(key), self._facts[key]))
                raise InputError(f"{self.folder / str(step)}: {name}: expected the run's{old}, got{new or ' another'}")

    def _set_aside(self, step: int) -> None:
        # Moved, not deleted: a later save of the same step needs this path.
        if jax.process_index() == 0:
            target = self.folder.parent / DAMAGED
            target.mkdir(exist_ok=True)
            count = len(list(target.glob(f"{step}*")))
            move_folder(self.folder / str(step), target / (f"{step}.{count}" if count else str(step)))
        _everywhere(True)
        self._manager.reload()


def _signs(workdir: Path) -> bool:
    """Whether this process signs the folder: in a bucket the first one of a job does."""
    return is_bucket(workdir) and jax.process_index() == 0


def _everywhere(value: bool) -> bool:
    """Whether `value` is True on every process of the job."""
    return bool(np.all(multihost_utils.process_allgather(np.array(value)))) if jax.process_count() > 1 else value


class StopSignal:
    """Notices SIGTERM (with one process also Ctrl-C), and lets all processes stop after the same step.

    With several processes, jax's preemption service notifies all of them and chooses the step. A second signal ends
    the process at once.
    """

    def __init__(self):
        self._asked = False
        self._before: dict[int, Any] = {}
        # Python allows signal handlers only in the main thread. The preemption service has its own.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        self._asked = True
        signal.signal(number, signal.SIG_DFL)

    def close(self) -> None:
        """Restores the previous signal handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def reached(self, step: int) -> bool:
        """Whether to stop after this step. Call after every step."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked
