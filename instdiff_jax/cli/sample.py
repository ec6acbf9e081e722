"""Draws pictures that obey layouts.

    python sample.py                                                          # the model in the box on the examples
    python sample.py --checkpoint checkpoints/sd15 --layout scene.json --output pictures --num_images 4

For every layout x.json this writes OUT/x/<seed>.png and OUT/x/layout.png, and for all of them
OUT/contact_sheet.png and OUT/run.json (every setting, seed and timing).

Many layouts: `--shard i/n` draws layouts i, i + n, ... and writes OUT/run-i-of-n.json instead; in a job of several
processes each takes its own part without it. `--resume` leaves out layouts whose files are all there.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import re
import tempfile
import time
import uuid
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from tokenize import TokenError
from typing import Any

from instdiff_jax.cli.sampling_flags import add_sampling_flags, read_overrides
from instdiff_jax.config import SamplingConfig
from instdiff_jax.errors import ArgumentParser, InputError
from instdiff_jax.sampling.shards import Shard

ROOT = Path(__file__).resolve().parent.parent.parent
DEFAULT_CHECKPOINT = ROOT / "checkpoints" / "shapes"
DEFAULT_LAYOUTS = ROOT / "examples" / "shapes"
SHEET_LAYOUTS, SHEET_SEEDS = 64, 16  # the most that the contact sheet shows
# What all pictures of an output folder have in common.
COMMON = ("checkpoint", "fingerprint", "model", "sampling", "format", "width", "height", "strength", "inputs", "dtype")


# ---------------------------------------------------------------- flags


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT, help="a checkpoint folder, or a training workdir")
    add("--layout", type=Path, nargs="+", help="layout files, or folders of them; default: examples/shapes")
    add("--coco", type=Path, help="a COCO annotation file, instead of --layout; with --image_id")
    add("--image_id", type=int, nargs="+", help="which images of --coco")
    add("--captions", type=Path, help="COCO captions for --coco")
    add("--keep_largest", action="store_true", help="of more than 30 instances keep the largest, instead of an error")
    add("--output", type=Path, default=Path("output"), help="folder to write to")
    add("--num_images", type=int, default=1, help="pictures of each layout")
    add("--shard", help="i/n: only draw layouts i, i + n, ...")
    add("--resume", action="store_true", help="draw only layouts that have not all their files in --output yet")
    add("--seed", type=int, default=0, help="image i of every layout has seed SEED + i")
    add("--width", type=int, help="of the pictures in pixels; the layout's own by default")
    add("--height", type=int)
    add_sampling_flags(parser)
    add("--format", default="auto", choices=("auto", "box", "point", "scribble", "mask"), help="which places count")
    add("--init_image", type=Path, help="a picture to start from, of the canvas's size")
    add("--inpaint_mask", type=Path, help="a picture that is white where --init_image is to be painted anew")
    add("--strength", type=float, help="share of the steps that run on --init_image")
    add("--noise", type=Path, help="initial noise: a float32 .npy of shape [num_images, h, w, z]")
    add("--save_latents", action="store_true", help="also write OUT/x/latents.npy")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32 on a CPU, else bfloat16")
    add("--max_rows", type=int, help="latents denoised at a time on a device; less needs less memory")
    return parser.parse_args(argv)


# ---------------------------------------------------------------- input


class Layouts:
    """Layouts that are read whenever they are gone through: the masks of many do not fit in memory."""

    def __init__(self, read: dict[str, Callable]):
        self.read = read  # by name

    def __iter__(self) -> Iterator:
        return (read() for read in self.read.values())

    def __len__(self) -> int:
        return len(self.read)

    def only(self, names: Sequence[str]) -> "Layouts":
        return Layouts({name: self.read[name] for name in names})


def find_layouts(args: argparse.Namespace) -> Layouts:
    """The layouts asked for; InputError where there are none, or two would write to one place."""
    from instdiff_jax.coco import Coco
    from instdiff_jax.layout import Layout

    too_many = "largest" if args.keep_largest else "error"
    if args.coco is not None:
        if args.layout is not None:
            raise InputError("--layout: expected none beside --coco")
        if not args.image_id:
            raise InputError("--image_id: expected the ids of images of --coco")
        coco = Coco(args.coco, args.captions)
        found = [Layout.from_coco(coco, number, max_instances=too_many) for number in args.image_id]
        pairs = [(layout.name, lambda layout=layout: layout) for layout in found]
    else:
        for name in ("image_id", "captions"):
            if getattr(args, name) is not None:
                raise InputError(f"--{name}: only means something with --coco")
        files = []
        for path in args.layout or [DEFAULT_LAYOUTS]:
            if os.path.isdir(path):  # Path's own raises for what cannot be a name
                records = [file for file in find_records(path) if is_record(file)]
                found = sorted(set(path.glob("*.json")) - set(records))
                if not found:
                    raise InputError(f"--layout: {path}: no .json file in this folder")
                files += found
            else:
                files.append(path)
        pairs = [(path.stem, lambda path=path: Layout.from_json(path, max_instances=too_many)) for path in files]
    twice = [name for name, times in Counter(name for name, _ in pairs).items() if times > 1]
    if twice:
        raise InputError(f"--layout: two layouts would write to {args.output / twice[0]}; expected different names")
    return Layouts(dict(pairs))


def read_arrays(args: argparse.Namespace) -> dict:
    """--init_image, --inpaint_mask and --noise as arrays."""
    import numpy as np
    from PIL import Image

    def picture(flag: str, path: Path, mode: str):
        try:
            with Image.open(path) as image:
                return np.asarray(image.convert(mode))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise InputError(f"--{flag}: {path}: expected a picture ({error})") from error

    arrays = {}
    if args.init_image is not None:
        arrays["init_image"] = picture("init_image", args.init_image, "RGB")
    if args.inpaint_mask is not None:
        arrays["inpaint_mask"] = picture("inpaint_mask", args.inpaint_mask, "L") >= 128
    if args.noise is not None:
        try:
            arrays["noise"] = np.load(args.noise, allow_pickle=False)
        except (OSError, ValueError, EOFError, SyntaxError, MemoryError, zipfile.BadZipFile, TokenError) as error:
            raise InputError(f"--noise: {args.noise}: expected a float32 .npy file ({error})") from error
        if not isinstance(arrays["noise"], np.ndarray):
            raise InputError(f"--noise: {args.noise}: expected a float32 .npy file, got several arrays")
        if arrays["noise"].dtype != np.float32:
            raise InputError(f"--noise: {args.noise}: expected float32, got {arrays['noise'].dtype}")
    return arrays


@contextlib.contextmanager
def open_output(folder: Path, names: Iterable[str]) -> Iterator[None]:
    """Raises where nothing can be written, before minutes of work are lost to it; leaves no new empty folder behind."""
    there = os.path.exists(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # A file of its own: shards on several machines look at once.
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"--output: {folder}: expected a folder to write to ({error.strerror})") from error
    try:
        for path in (folder / name for name in names):
            if path.exists() and not path.is_dir():
                raise InputError(f"--output: {path}: expected a folder to write to, found a file")
        yield
    except OSError as error:
        raise InputError(f"--output: {error.filename or folder}: {error.strerror or error}") from error
    finally:
        if not there:
            with contextlib.suppress(OSError):  # pictures are there
                folder.rmdir()


# ---------------------------------------------------------------- output


def write_file(path: Path, write: Callable) -> None:
    """Writes beside and moves into place: a file is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(beside, "wb") as file:
            write(file)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_picture(path: Path, pixels) -> None:
    from PIL import Image

    write_file(path, lambda file: Image.fromarray(pixels).save(file, format="PNG"))


def layout_files(args: argparse.Namespace, name: str, seeds: Sequence[int]) -> list[Path]:
    """All that is written for a layout."""
    names = [*(f"{seed}.png" for seed in seeds), "layout.png", *(["latents.npy"] if args.save_latents else [])]
    return [args.output / name / file for file in names]


def write_results(args: argparse.Namespace, results: Iterable) -> str:
    """Writes one layout's files, each picture as it comes; returns the layout's name."""
    import numpy as np

    from instdiff_jax.sampling.visualize import draw_layout

    latents: list = []
    for result in results:
        folder = args.output / result.layout.name
        write_picture(folder / f"{result.seed}.png", result.image)
        latents += [result.latents] if args.save_latents else []
    write_picture(folder / "layout.png", draw_layout(result.layout, np.full_like(result.image, 255)))
    if args.save_latents:
        stacked = np.stack(latents).astype(np.float32)
        write_file(folder / "latents.npy", lambda file: np.save(file, stacked))
    return result.layout.name


def write_contact_sheet(args: argparse.Namespace, layouts: Layouts, seeds: Sequence[int]) -> None:
    """The first layouts and their first pictures in a grid."""
    import numpy as np
    from PIL import Image

    from instdiff_jax.sampling.visualize import contact_sheet, draw_layout, enlarge

    cells = []
    for layout in layouts.only(list(layouts.read)[:SHEET_LAYOUTS]):
        pictures = []
        for seed in seeds[:SHEET_SEEDS]:
            with Image.open(args.output / layout.name / f"{seed}.png") as image:
                pictures.append(np.asarray(image.convert("RGB")))
        # On a small canvas captions cannot be read; the pictures' own files keep their size.
        blank = enlarge(np.full_like(pictures[0], 255))
        cells += [draw_layout(layout, blank), *map(enlarge, pictures)]
    write_picture(args.output / "contact_sheet.png", contact_sheet(cells, columns=1 + len(pictures)))


def earlier_layouts(args: argparse.Namespace, path: Path, record: dict[str, Any]) -> list[dict]:
    """What the run at `path` notes of its layouts, for one that goes on.

    Raises:
        InputError: where the pictures there were made with other settings.
    """
    from instdiff_jax.errors import short
    from instdiff_jax.files import read_json

    record, layouts = json.loads(json.dumps(record)), []
    for there in find_records(args.output):
        old = read_json(there)
        for name in COMMON:
            if not isinstance(old, dict) or old.get(name) != record[name]:
                found = short(old.get(name) if isinstance(old, dict) else old)
                raise InputError(
                    f"{there}: {name}: the pictures there were made with {found}, got {short(record[name])}; "
                    "use another --output, or go without --resume"
                )
        if there == path:
            layouts = old.get("layouts", [])
    return layouts


def is_record(path: Path) -> bool:
    """Whether a file named as one is a run's record, and no layout."""
    try:
        return b'"fingerprint"' in path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error


def seeds_of_latents(args: argparse.Namespace) -> dict[str, list[int]]:
    """The seeds of each layout's latents.npy in the output folder: a file says how many, but not which.

    A run without --save_latents leaves an earlier run's file where it is, and is not what made it.
    """
    from instdiff_jax.files import read_json

    records = [read_json(path) for path in find_records(args.output)]
    entries = [entry for record in records if isinstance(record, dict) for entry in record.get("layouts", [])]
    return {entry["layout"]: entry["seeds"] for entry in entries if isinstance(entry, dict) and entry.get("latents")}


def find_records(folder: Path) -> list[Path]:
    """The run.json of a run and the run-i-of-n.json of shards in an output folder."""
    return [path for path in sorted(folder.glob("run*.json")) if re.fullmatch(r"run(-\d+-of-\d+)?\.json", path.name)]


def write_record(path: Path, record: dict[str, Any]) -> None:
    write_file(path, lambda file: file.write(json.dumps(record, indent=2).encode()))


# ---------------------------------------------------------------- main


def main(argv: Sequence[str] | None = None) -> None:
    run(parse_args(argv))


def run(args: argparse.Namespace) -> None:
    began = time.time()
    for name in ("num_images", "max_rows"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InputError(f"--{name}: expected a whole number of at least 1, got {getattr(args, name)}")
    shard = None if args.shard is None else Shard.parse(args.shard)
    overrides = read_overrides(args)
    # Checked before minutes go into loading a checkpoint.
    SamplingConfig.from_dict(overrides, "sampling")
    if args.checkpoint == DEFAULT_CHECKPOINT and not args.checkpoint.is_dir():
        raise InputError("--checkpoint: expected a checkpoint folder; python -m instdiff_jax convert makes one")
    layouts, arrays = find_layouts(args), read_arrays(args)
    seeds = [args.seed + i for i in range(args.num_images)]

    import jax

    from instdiff_jax.parallel.mesh import PATIENCE, initialize_distributed
    from instdiff_jax.parallel.runtime import spare_compiler_memory

    spare_compiler_memory()
    initialize_distributed(PATIENCE)
    shard = shard or Shard.of_process()
    mine = list(shard.of(list(layouts.read)))
    finished = {name for name in mine if all(map(os.path.exists, layout_files(args, name, seeds)))}
    if args.resume and args.save_latents:
        latents = seeds_of_latents(args)
        finished = {name for name in finished if latents.get(name) == seeds}
    waiting = layouts.only([name for name in mine if not (args.resume and name in finished)])
    for _ in waiting:  # what is wrong with a file is an error now
        pass
    with open_output(args.output, mine):
        # Pictures of other settings are an error though none is missing. Reading a checkpoint takes all processes.
        if waiting or args.resume or jax.process_count() > 1:
            draw(args, waiting, seeds, arrays, overrides, shard)
        if shard.count == 1:
            write_contact_sheet(args, layouts, seeds)
    there = f", {(len(mine) - len(waiting)) * len(seeds)} were there" if args.resume else ""
    print(f"{len(waiting) * len(seeds)} pictures in {args.output} ({time.time() - began:.1f} s){there}")


def draw(
    args: argparse.Namespace,
    layouts: Layouts,
    seeds: Sequence[int],
    arrays: dict[str, Any],
    overrides: dict[str, Any],
    shard: Shard,
) -> None:
    """Draws layouts and writes each one's files as soon as its pictures are there."""
    import jax
    from tqdm import tqdm

    from instdiff_jax.parallel.mesh import ParallelSettings, make_mesh
    from instdiff_jax.sampling.loading import checkpoint_fingerprint
    from instdiff_jax.sampling.pipeline import Pipeline

    began = time.time()
    dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    mesh = make_mesh(ParallelSettings(), jax.local_devices()) if jax.local_device_count() > 1 else None
    try:
        pipeline = Pipeline.from_checkpoint(args.checkpoint, dtype=dtype, mesh=mesh, max_rows=args.max_rows)
    except OSError as error:
        raise InputError(f"--checkpoint: {args.checkpoint}: {error.strerror or error}") from error
    loaded = time.time()
    record = dict(
        checkpoint=str(args.checkpoint),
        fingerprint=checkpoint_fingerprint(args.checkpoint),
        model=pipeline.config.to_dict(),
        sampling=dataclasses.asdict(pipeline.settings(**overrides)),
        format=args.format,
        width=args.width,
        height=args.height,
        strength=args.strength,
        inputs={name: str(getattr(args, name)) for name in arrays},
        dtype=dtype,
        devices=[device.device_kind for device in jax.local_devices()],
        jax=jax.__version__,
    )
    path = args.output / ("run.json" if shard.count == 1 else f"run-{shard.index}-of-{shard.count}.json")
    earlier = earlier_layouts(args, path, record) if args.resume else []
    if not layouts:
        return
    record["layouts"] = [entry for entry in earlier if entry["layout"] not in layouts.read]
    with tqdm(total=1, unit="eval", desc="sampling", disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        options = dict(format=args.format, width=args.width, height=args.height, strength=args.strength)
        results = pipeline.stream(layouts, seeds, progress=progress, **options, **arrays, **overrides)
        results = itertools.chain([next(results)], results)  # all input is checked by now
        if not args.resume:
            # Of other settings perhaps: a run that ends early and goes on must not take them for its own.
            for name in layouts.read:
                for file in (*layout_files(args, name, seeds), args.output / name / "latents.npy"):
                    file.unlink(missing_ok=True)
        write_record(path, record)
        try:
            for _ in range(len(layouts)):
                name = write_results(args, itertools.islice(results, len(seeds)))
                seconds = round(time.time() - began, 2)
                record["layouts"].append(dict(layout=name, seeds=seeds, latents=args.save_latents, seconds=seconds))
            record["seconds"] = dict(loading=round(loaded - began, 2), sampling=round(time.time() - loaded, 2))
        finally:
            write_record(path, record)
