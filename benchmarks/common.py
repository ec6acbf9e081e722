"""What the benchmarks share: models by name, clocks, facts about the machine, tables, processes of their own."""

import argparse
import datetime
import functools
import importlib
import json
import math
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from instdiff_jax.analysis.chips import processor_name
from instdiff_jax.config import ModelConfig, SamplingConfig
from instdiff_jax.errors import ArgumentParser, InputError
from instdiff_jax.layout import Layout

# Two sides may share one GPU: neither may take all of it at the start.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TOKENIZER = ROOT / "tests" / "parity" / "tokenizer"
BOX = ROOT / "checkpoints" / "shapes"

# The parity tests' weights and inputs, which the official code can hold too: modules `weights` and `common`.
sys.path += [str(ROOT / "tests" / "support"), str(ROOT / "tests" / "parity")]

from weights import make_array  # noqa: E402

# What a size changes of the released model, and the side of its pictures. The official code fixes the text's width and
# UniFusion's trunk, so even the tiny one has those.
SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "full": {},
    "small": dict(
        unet=dict(model_channels=64, num_heads=4),
        unifusion=dict(mid_dim=256),
        autoencoder=dict(ch=32, num_res_blocks=1),
        text_encoder=dict(vocab_size=1024, intermediate_size=512, num_layers=2),
    ),
    "tiny": dict(
        unet=dict(model_channels=32, num_heads=2, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(1,)),
        unifusion=dict(mid_dim=64),
        autoencoder=dict(ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1),
        text_encoder=dict(vocab_size=1024, intermediate_size=64, num_layers=1),
    ),
}
CANVAS = {"full": 512, "small": 512, "tiny": 64}


class Model(NamedTuple):
    """A model to time: its sizes, the side of its pictures, and its checkpoint folder (None: made-up weights)."""

    name: str
    config: ModelConfig
    canvas: int
    folder: Path | None


def find_model(name: str, canvas: int | None = None) -> Model:
    """A model by the name of a size, `box` for the one in the box, or a checkpoint folder.

    Raises:
        InputError: where there is no such size and no such folder.
    """
    if name in SIZES:
        values = ModelConfig().to_dict()
        for group, sizes in SIZES[name].items():
            values[group].update(sizes)
        values["text_encoder"]["tokenizer"] = str(TOKENIZER)
        return Model(name, ModelConfig.from_dict(values), canvas or CANVAS[name], None)
    from instdiff_jax.checkpoint.folder import read_config

    folder = BOX if name == "box" else Path(name).resolve()
    if not folder.is_dir():
        raise InputError(f"--model {name}: expected one of {', '.join(SIZES)}, or a checkpoint folder; no {folder}")
    config, _, _ = read_config(folder)
    # Of a folder the last part: tables have files of that name.
    return Model(name if name == "box" else folder.name, config, canvas or config.unifusion.map_size, folder)


def make_params(config: ModelConfig, dtype: Any) -> dict[str, Any]:
    """The deterministic parameters of the parity tests, on the device: the official code can hold the same ones.

    In `dtype` where they have two axes or more and are not the autoencoder's, as `loading.load_model` has them.
    """
    import jax.numpy as jnp

    from instdiff_jax.checkpoint.tables import PARTS, rename_table
    from instdiff_jax.tree import unflatten

    leaves = {}
    for part in PARTS:
        for key, entry in rename_table(part, config).items():
            wide = part == "autoencoder" or len(entry.torch_shape) < 2
            leaf = entry.to_ours(make_array(key, entry.torch_shape))
            leaves[entry.path] = jnp.asarray(leaf, jnp.float32 if wide else dtype)
    return unflatten(leaves)


def write_checkpoint(model: Model, folder: Path) -> None:
    """A checkpoint folder with the parameters of `make_params`."""
    from instdiff_jax.checkpoint.folder import save_folder

    params = make_params(model.config, np.float32)
    save_folder(folder, params, model.config, SamplingConfig(), TOKENIZER)


def make_layout(instances: int, side: int) -> Layout:
    """A layout of that many boxes, in rows of six, each with a caption of its own.

    One stands in for none, which a layout must not have: without the multi-instance sampler their number is no matter.
    """
    columns = 6
    step = side / columns
    annos = []
    for i in range(max(instances, 1)):
        row, column = divmod(i, columns)
        box = [column * step, row * step, 0.9 * step, 0.9 * step]
        annos.append({"caption": f"a red thing, number {i}", "bbox": [round(value, 2) for value in box]})
    values = {"caption": "many things on a table", "width": side, "height": side, "annos": annos}
    return Layout.from_dict(values, name=f"boxes_{instances}")


def random_grounding(
    valid: int, rng: np.random.Generator, width: int = 768, map_size: int = 512
) -> dict[str, np.ndarray]:
    """One grounding of boxes under the official names, with a leading axis of 1.

    Args:
        valid: instances; the slots above are empty.
        width: of the phrases' embeddings.
        map_size: side of the empty instance maps.
    """
    masks = (np.arange(30) < valid).astype(np.float32)
    corners = np.sort(rng.random((30, 2, 2)), axis=1).reshape(30, 4)
    data = dict(
        boxes=corners,
        points=(corners[:, :2] + corners[:, 2:]) / 2,
        scribbles=np.zeros((30, 40)),
        polygons=np.zeros((30, 512)),
        text_embeddings=rng.standard_normal((30, width)),
    )
    data = {key: (value * masks[:, None]).astype(np.float32) for key, value in data.items()}
    data |= dict(masks=masks, segs=np.zeros((30, map_size, map_size), np.float32))
    return {key: value[None] for key, value in data.items()}


# ---------------------------------------------------------------- processes


class Worker:
    """An object that lives in a process of its own: its memory is its own, and it stands still between calls."""

    def __init__(self, target: str, *args: Any, cores: int | None = None):
        """`target` is a class, as "module:name"; `cores` binds the process to that many."""
        self._pool = ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), _start, initargs=(target, args, cores)
        )

    def __getattr__(self, method: str) -> Callable[..., Any]:
        return lambda *args, **options: self._pool.submit(_call, method, args, options).result()

    def close(self) -> None:
        """Ends the process."""
        self._pool.shutdown()


_object: Any = None


def _start(target: str, args: tuple, cores: int | None) -> None:
    global _object
    if cores is not None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    module, name = target.split(":")
    _object = getattr(importlib.import_module(module), name)(*args)


def _call(method: str, args: tuple, options: dict) -> Any:
    return getattr(_object, method)(*args, **options)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def seconds(function: Callable[[], Any]) -> float:
    """How long a call takes; the call must block until its result is ready."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def alternate(
    sides: Mapping[str, Callable[[], float]],
    repeats: int,
    budget: float = math.inf,
    failed: dict[str, str] | None = None,
) -> dict[str, float]:
    """Median seconds of each side, timed in turn (A B A B …), so that a slow spell of the machine meets all alike.

    Stops early after `budget` seconds, but not before every side has had one turn. Warm up before. A side that fails
    is left out, and `failed` says why; without that, it raises.
    """
    taken: dict[str, list[float]] = {name: [] for name in sides}
    start = time.perf_counter()
    for turn in range(repeats):
        if turn and time.perf_counter() - start > budget:
            break
        for name in list(taken):
            try:
                taken[name].append(sides[name]())
            except RuntimeError as error:
                if failed is None:
                    raise
                failed[f"{name}_failed"] = failure(error)
                del taken[name]
    return {name: statistics.median(times) for name, times in taken.items()}


class HostMemory:
    """Peak resident memory of this process, from Linux's counters; NaN elsewhere."""

    def reset(self) -> None:
        """Begins a new peak."""
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            pass

    def peak(self) -> float:
        """Bytes, since the last reset."""
        try:
            status = Path("/proc/self/status").read_text()
        except OSError:
            return math.nan
        return 1024.0 * int(status.split("VmHWM:")[1].split()[0])


# ---------------------------------------------------------------- machine and tables


def machine_facts() -> dict[str, Any]:
    """What a number depends on: processor, device, versions, commit, and what else the machine was doing."""
    import jax

    device = jax.devices()[0]
    versions = {name: _version(name) for name in ("jax", "jaxlib", "flax", "torch", "numpy")}
    return dict(
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
        platform=device.platform,
        device=processor_name() if device.platform == "cpu" else device.device_kind,
        cores=cores(),
        load=round(os.getloadavg()[0], 2),
        python=platform.python_version(),
        commit=_commit(),
        **versions,
    )


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "none"


def _commit() -> str:
    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "--short", "HEAD") + ("+changes" if changed else "")


class Column(NamedTuple):
    """A column of a table: the key of its value in a row, its heading, and how a number is written."""

    key: str
    heading: str
    format: str = ""


def write_table(
    folder: Path,
    name: str,
    title: str,
    columns: Sequence[Column],
    rows: Sequence[Mapping[str, Any]],
    notes: Sequence[str] = (),
    show: bool = True,
) -> None:
    """Prints a table, and writes it to the folder as JSON and Markdown; the device is in the files' name.

    What failed in a row is added to the notes. `show` False: one that is not complete yet; only written.
    """
    notes = [*notes, *sorted({f"{k}: {v}" for row in rows for k, v in row.items() if k.endswith("_failed")})]
    machine = machine_facts()
    report = dict(title=title, machine=machine, notes=list(notes), columns=[list(c) for c in columns], rows=list(rows))
    device = "cpu" if machine["platform"] == "cpu" else re.sub(r"\W+", "_", machine["device"]).lower()
    text = render(report)
    if show:
        print(text, flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}_{device}.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / f"{name}_{device}.md").write_text(text)


def render(report: Mapping[str, Any]) -> str:
    """A written table as Markdown: heading, machine, notes, rows."""
    machine = report["machine"]
    lines = [
        f"**{report['title']}**: {machine['device']}, {machine['cores']} cores, load {machine['load']} at the end; "
        f"jax {machine['jax']}, torch {machine['torch']}; commit {machine['commit']}, {machine['date']}.",
        *report["notes"],
    ]
    columns = [Column(*column) for column in report["columns"]]
    table = [[c.heading for c in columns], ["---" for _ in columns]]
    table += [[_cell(row.get(c.key), c.format) for c in columns] for row in report["rows"]]
    return "\n\n".join([" ".join(lines), "\n".join("| " + " | ".join(row) + " |" for row in table)]) + "\n"


def _cell(value: Any, form: str) -> str:
    if value is None or isinstance(value, float) and math.isnan(value):
        return "–"
    return value if isinstance(value, str) else format(value, form)


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the flags that every benchmark has."""
    made = ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", help="full, small, tiny, box, or a checkpoint folder; on a CPU small by default")
    made.add_argument("--canvas", type=int, help="side of the pictures in pixels")
    made.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on a CPU, else bfloat16")
    made.add_argument("--reference", type=Path, help="a clone of the official repository: the baseline in the same run")
    made.add_argument("--compile", action="store_true", help="also the baseline under torch.compile")
    made.add_argument("--repeats", type=int, default=5, help="runs of which the median counts")
    made.add_argument("--cores", type=int, help="bind each side to that many cores")
    made.add_argument("--output", type=Path, default=RESULTS, help="folder for the tables")
    return made


def parse_alone(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the flags of a benchmark that has no baseline and runs once; those that would do nothing are errors."""
    args = parser.parse_args(argv)
    for name in ("reference", "compile", "repeats", "cores"):
        if getattr(args, name) != parser.get_default(name):
            raise InputError(f"--{name}: this benchmark has no baseline and runs once")
    return args


def failure(error: RuntimeError) -> str:
    """What a table says of a side that could not: errors of memory and of compilers."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"


def check_clone(clone: str | Path) -> None:
    """Raises InputError for a folder that is not a clone of the official repository."""
    if not (Path(clone) / "ldm" / "models" / "diffusion" / "plms_instance.py").is_file():
        raise InputError(f"--reference {clone}: expected a clone of github.com/frank-xwang/InstanceDiffusion")


def sides(args: argparse.Namespace, model: Model, dtype: str) -> dict[str, Worker]:
    """Ours, and the official code as released and compiled, each in a process of its own."""
    if args.reference is not None:
        # Here: in a worker's start it would be a broken pool.
        check_clone(args.reference)
        if model.folder is not None:
            raise InputError("--reference: the official code fixes UniFusion's sizes; expected --model full or small")
        wanted = "float32" if on_cpu() else "bfloat16"
        if dtype != wanted:
            raise InputError(f"--dtype {dtype}: beside the official code expected {wanted}, as it is released here")
    found = {"ours": Worker("benchmarks.ours:Ours", model, dtype, cores=args.cores)}
    if args.reference is not None:
        for name, compiled in (("official", False), ("compiled", True))[: 1 + args.compile]:
            found[name] = Worker("benchmarks.official:Official", args.reference, model, compiled, cores=args.cores)
    return found


@functools.cache
def on_cpu() -> bool:
    """Whether jax has nothing but a CPU here."""
    import jax

    return jax.default_backend() == "cpu"


def choose(args: argparse.Namespace) -> tuple[Model, str]:
    """The model and dtype asked for, or the platform's."""
    model = find_model(args.model or ("small" if on_cpu() else "full"), args.canvas)
    return model, args.dtype or ("float32" if on_cpu() else "bfloat16")
