"""Programs compiled ahead of time: `instdiff compile` fills a folder, and later processes start from it.

The folder is a compilation cache of jax's, whose keys hold the program, the versions and the compiler's options; beside
it is a note of the machine and of the files' checksums. jax looks every program up, so that a stale one is never run.
A folder's files are machine code: use only folders that you made yourself, never one that came with a checkpoint.
"""

import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jaxlib
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from instdiff_jax.checkpoint.verify import check_intact, file_crcs, signed
from instdiff_jax.copies import local_copy
from instdiff_jax.errors import InputError
from instdiff_jax.files import read_json, replace_folder, write_json
from instdiff_jax.layout import Instance, Layout
from instdiff_jax.models.kernels.cpu import processor
from instdiff_jax.sampling.pipeline import Pipeline
from instdiff_jax.sampling.request import SamplingOptions, make_request

NOTE = "compiled.json"
_LONG = 1.0  # seconds; a program that compiles for less is not worth a line
_NEVER = 1e9  # seconds of compilation from which on jax adds a program to a folder that it only reads
_COMPILED, _FOUND = "/jax/core/compile/backend_compile_duration", "/jax/compilation_cache/cache_hits"


def this_machine() -> dict[str, str]:
    """What compiled programs depend on beside the program."""
    device = jax.local_devices()[0]
    found = dict(
        jax=jax.__version__,
        jaxlib=jaxlib.__version__,
        runtime=device.client.platform_version,
        device=device.device_kind,
        devices=str(jax.local_device_count()),
        XLA_FLAGS=os.environ.get("XLA_FLAGS", ""),
    )
    if device.platform == "cpu":
        found["processor"] = hashlib.sha256(processor().encode()).hexdigest()[:16]
    return found


def use_compiled(folder: str | Path) -> bool:
    """Takes this process's programs from a folder that `fill` made. Call before anything is compiled.

    Returns False, with one line on stderr, if they are for another machine or other versions, or are damaged; they are
    then compiled as usual. While they are used, a program that is not among them and compiles for more than a second is
    one line.

    Raises:
        InputError: if the folder is not such a folder.
    """
    given, folder = folder, Path(local_copy(folder))
    note = read_json(folder / NOTE)
    reason = _why_not(folder, note, f"{given}/{NOTE}")
    if reason is not None:
        print(f"{given}: not used, programs are compiled: {reason}", file=sys.stderr)
        return False
    _set_cache(folder, at_least=_NEVER)
    _tell_of_misses(str(given))
    return True


def _why_not(folder: Path, note: Any, name: str) -> str | None:
    if not isinstance(note, dict) or not all(isinstance(note.get(key), dict) for key in ("machine", "files")):
        raise InputError(f"{name}: expected what instdiff compile writes: machine and files")
    check_intact(Path(name), note)
    here = this_machine()
    for key in here | note["machine"]:
        made = note["machine"].get(key)
        if made != here.get(key):
            return f"made for {key} {made or 'unknown'}, here it is {here.get(key) or 'none'}"
    try:
        found = file_crcs(folder, note["files"])
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    return next((f"{file} is damaged" for file, crc in note["files"].items() if found[file] != crc), None)


def _set_cache(folder: Path, at_least: float) -> None:
    """Makes a folder jax's cache; programs that compile for so many seconds are added."""
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", at_least)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")  # a second folder, written on GPUs
    compilation_cache.reset_cache()


def _tell_of_misses(name: str) -> None:
    found: list[str] = []

    def hit(event: str, **_: Any) -> None:
        if event == _FOUND:
            found.append(event)

    def compiled(event: str, duration: float, **_: Any) -> None:
        if event != _COMPILED:
            return
        if not found and duration > _LONG:
            text = "a program is not among them and was compiled"
            print(f"{name}: {text} in {duration:.1f} s: other rows, canvas or settings", file=sys.stderr)
        found.clear()

    jax.monitoring.register_event_listener(hit)
    jax.monitoring.register_event_duration_secs_listener(compiled)


def fill(
    folder: str | Path,
    open_pipeline: Callable[[], Pipeline],
    rows: Iterable[int],
    canvas: tuple[int, int] | None,
    settings: Mapping[str, Any],
) -> int:
    """Compiles all programs of some jobs into a new folder, by running each with few steps.

    Args:
        folder: to write; another one is an InputError.
        open_pipeline: opens the checkpoint, once the folder is jax's cache.
        rows: numbers of latents denoised at once. Each is compiled for as many pictures without the multi-instance
            sampler, and for one picture with one instance fewer; the smallest for a layout with a mask too.
        canvas: width and height in pixels; None: the checkpoint's pictures' side.
        settings: sampling settings.

    Returns:
        The number of programs.
    """
    if Path(folder).exists():
        raise InputError(f"--output {folder}: is there already")
    with replace_folder(folder) as temporary:
        _set_cache(temporary, at_least=0)
        pipeline = open_pipeline()
        side = pipeline.config.canvas_side
        for layout, images, changed in _jobs(sorted(set(rows)), canvas or (side, side)):
            _run(pipeline, layout, images, {**settings, **changed})
        names = sorted(path.name for path in temporary.iterdir())
        write_json(temporary / NOTE, signed(dict(machine=this_machine(), files=file_crcs(temporary, names))))
    return len(names)


def _jobs(rows: list[int], canvas: tuple[int, int]) -> Iterable[tuple[Layout, int, dict[str, Any]]]:
    for count in rows:
        yield make_layout(1, canvas), count, dict(mis=0.0)
        if count > 1:
            yield make_layout(count - 1, canvas), 1, {}
    yield make_layout(1, canvas, mask=True), rows[0], dict(mis=0.0)


def make_layout(instances: int, canvas: tuple[int, int], mask: bool = False) -> Layout:
    """A layout of equal boxes side by side."""
    width, height = canvas
    step = width / instances
    mask_array = np.ones((height, width), bool) if mask else None
    found = tuple(
        Instance(f"thing {i}", (i * step, 0, (i + 1) * step, height), mask=mask_array) for i in range(instances)
    )
    return Layout("things", width, height, found)


def _run(pipeline: Pipeline, layout: Layout, images: int, settings: dict[str, Any]) -> None:
    """Samples with the fewest steps that run the same programs as the settings' own number."""
    whole = pipeline.settings(**settings).steps

    def programs(steps: int) -> set[Any]:
        changed = pipeline.settings(**settings | {"steps": steps})
        plan = make_request(pipeline.config, changed, SamplingOptions()).plan
        return {piece._replace(start=0, stop=0) for piece in plan.pieces}

    steps = next((n for n in range(1, whole) if programs(n) == programs(whole)), whole)
    # With progress, as the command has it: that takes programs of its own.
    list(pipeline.stream(layout, range(images), progress=lambda done, total: None, **settings | {"steps": steps}))
