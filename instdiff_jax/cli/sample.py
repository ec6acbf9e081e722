"""Generate images from layouts.

    instdiff sample                                             # the small model of this project, on its examples
    instdiff sample --checkpoint checkpoints/sd15 --layout scene.json --output images --num_images 4

For every layout x.json this writes OUT/x/<seed>.png and OUT/x/layout.png, and for all of them
OUT/contact_sheet.png and OUT/run.json (all settings, seeds and timings).

A picture as --layout is drawn again: its layout, seed and settings are inside it, and flags change some of them.

For many layouts: `--shard i/n` takes layouts i, i + n, ... and writes OUT/run-i-of-n.json instead; in a job of several
processes each takes its own part without it. `--resume` leaves out layouts whose files are all there
and were made from the same layout and inputs.
"""

import argparse
import itertools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instdiff_jax.cli.box import default_checkpoint
from instdiff_jax.cli.parser import any_path, command_parser
from instdiff_jax.cli.redraw import batch_like, check_inputs, follow_picture
from instdiff_jax.cli.sampling_flags import (
    DTYPE_HELP,
    DTYPES,
    add_addon_flags,
    add_picture_flags,
    add_sampling_flags,
    read_addons,
    read_overrides,
    read_picture_flags,
    strength_of,
)
from instdiff_jax.config import ModelConfig, SamplingConfig
from instdiff_jax.errors import InputError
from instdiff_jax.sampling.shards import Shard

if TYPE_CHECKING:
    from instdiff_jax.layout import Layout
    from instdiff_jax.sampling.outputs import OutputFolder, RunRecord
    from instdiff_jax.sampling.pipeline import Pipeline
    from instdiff_jax.sampling.results import Result


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_parser("sample", __doc__)
    add = parser.add_argument
    add("--checkpoint", type=any_path, default=default_checkpoint(), help="a checkpoint folder, or a training workdir")
    text = "layout files, or folders of them (default: examples/shapes); or a PNG drawn here, to draw it again"
    add("--layout", type=any_path, nargs="+", help=text)
    add("--coco", type=any_path, help="a COCO annotation file, instead of --layout; with --image_id")
    add("--image_id", type=int, nargs="+", help="images of --coco")
    add("--captions", type=any_path, help="COCO captions for --coco")
    add("--keep_largest", action="store_true", help="of more than 30 instances keep the largest, instead of an error")
    add("--output", type=any_path, default=Path("output"), help="folder to write to (default: output)")
    add("--num_images", type=int, default=1, help="images per layout (default: 1)")
    add("--shard", help="i/n: only layouts i, i + n, ...")
    add("--resume", action="store_true", help="only layouts whose files are not all in --output yet")
    add("--seed", type=int, help="image i of every layout has seed SEED + i (default: 0)")
    add("--width", type=int, help="of the images in pixels (default: the layout's)")
    add("--height", type=int, help="of the images in pixels (default: the layout's)")
    add_sampling_flags(parser)
    add_addon_flags(parser)
    add_picture_flags(parser)
    add("--format", choices=("auto", "box", "point", "scribble", "mask"), help="which locations count (default: auto)")
    add("--init_image", type=any_path, help="an image to start from, as large as the canvas")
    add("--inpaint_mask", type=any_path, help="an image that is white where --init_image is to be painted anew")
    add("--strength", type=float, help="fraction of the steps that run on --init_image")
    add("--noise", type=any_path, help="initial noise: a float32 .npy of shape [num_images, h, w, z]")
    add("--save_latents", action="store_true", help="also write OUT/x/latents.npy")
    add("--dtype", choices=DTYPES, help=DTYPE_HELP)
    add("--no_verify", action="store_true", help="do not compare the checkpoint with its checksums")
    add("--compiled", type=any_path, help="a folder of instdiff compile's for this kind of machine; only one you made")
    add("--max_rows", type=int, help="latents denoised at a time per device; fewer need less memory")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    run(parse_args(argv))


def run(args: argparse.Namespace) -> None:
    began = time.time()
    check_flags(args)
    origin = args.origin = follow_picture(args)
    overrides = read_overrides(args)
    SamplingConfig.from_dict(overrides, "sampling")  # checked before a checkpoint is loaded

    from instdiff_jax.cli.sample_inputs import find_layouts, read_arrays
    from instdiff_jax.sampling.outputs import SHEET_LAYOUTS, OutputFolder, fingerprint_inputs

    layouts, arrays, addons = find_layouts(args), read_arrays(args), read_additions(args)
    check_inputs(origin, args, fingerprint_inputs(arrays, addons))
    seeds = [args.seed + i for i in range(args.num_images)]
    output = OutputFolder(args.output, seeds, args.save_latents, fingerprint_inputs(arrays, addons))
    shard, processes = start_process(args.shard)
    if args.compiled is not None:
        from instdiff_jax.sampling.compiled import use_compiled

        use_compiled(args.compiled)
    mine = list(shard.of(list(layouts)))
    finished, changed = output.finished(mine, layouts) if args.resume else (set(), set())
    if changed:
        flags = "init_image inpaint_mask noise lora embedding taesd tile upscale".split()
        inputs = ", ".join(["layout", *(f"--{flag}" for flag in flags)]) + " or --refiner"
        print(f"made again, as their {inputs} changed: {', '.join(sorted(changed)[:5])}{', ...' * (len(changed) > 5)}")
    waiting = {name: layouts[name] for name in mine if name not in finished}
    with output.opened(mine):
        # Images of other settings are an error even if none is missing. Reading a checkpoint takes all processes.
        if waiting or args.resume or processes > 1:
            generate(args, output, waiting, shard, arrays, overrides, changed)
        if shard.count == 1:
            output.write_contact_sheet(layouts[name] for name in list(layouts)[:SHEET_LAYOUTS])
    there = f", {(len(mine) - len(waiting)) * args.num_images} were there" if args.resume else ""
    print(f"{len(waiting) * args.num_images} images in {args.output} ({time.time() - began:.1f} s){there}")


def check_flags(args: argparse.Namespace) -> None:
    for name in ("num_images", "max_rows"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InputError(f"--{name}: expected a whole number of at least 1, got {getattr(args, name)}")
    if args.shard is not None:
        Shard.parse(args.shard)
    if args.checkpoint == default_checkpoint() and not args.checkpoint.is_dir():
        raise InputError("--checkpoint: expected a checkpoint folder; instdiff convert makes one")


def start_process(shard: str | None) -> tuple[Shard, int]:
    """Sets up jax, and joins the other processes of a job; returns this one's part, and their number."""
    import jax

    from instdiff_jax.parallel.mesh import PATIENCE, initialize_distributed
    from instdiff_jax.parallel.runtime import set_up_compilation

    set_up_compilation()
    initialize_distributed(PATIENCE)
    return Shard.of_process() if shard is None else Shard.parse(shard), jax.process_count()


def generate(
    args: argparse.Namespace,
    output: "OutputFolder",
    layouts: Mapping[str, "Layout"],
    shard: Shard,
    arrays: dict[str, Any],
    overrides: dict[str, Any],
    changed: Iterable[str] = (),
) -> None:
    """Samples layouts and writes each one's files as soon as its images are there.

    Files of an earlier run are removed first; with --resume, those of `changed` layouts.
    """
    from tqdm import tqdm

    from instdiff_jax.sampling.outputs import RunRecord

    began = time.time()
    pipeline = open_pipeline(args)
    loaded = time.time()
    record = RunRecord(output.path, shard, describe_run(args, pipeline, arrays, overrides))
    if args.resume:
        record.resume(list(layouts))
    if not layouts:
        return
    with record.lock(), tqdm(total=1, unit="eval", desc="sampling", disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        options = dict(format=args.format, width=args.width, height=args.height, strength=args.strength)
        options |= dict(upscale=args.upscale, upscale_strength=strength_of(args, "upscale"))
        drawn, place = batch_like(args.origin if len(output.seeds) == 1 else None, list(layouts.values()))
        results = pipeline.stream(drawn, output.seeds, progress=progress, **options, **arrays, **overrides)
        results = itertools.islice(results, place, None)
        if args.refiner is not None:
            results = refined(results, args)
        results = itertools.chain([next(results)], results)  # all input is checked by now
        # Perhaps of other settings: a run that goes on must not take them for its own.
        output.remove(changed if args.resume else layouts)
        write_results(results, output, record, began, loaded, len(layouts))


def refined(results: Iterator["Result"], args: argparse.Namespace) -> Iterator["Result"]:
    """The results after SDXL's refiner."""
    from instdiff_jax.sampling.refiner import Refiner, RefinerSettings, refine_results

    refiner = Refiner.from_file(args.refiner, args.dtype, not args.no_verify)
    return refine_results(results, refiner, RefinerSettings(strength=strength_of(args, "cascade")))


def open_pipeline(args: argparse.Namespace) -> "Pipeline":
    """The checkpoint, over all devices of this process."""
    import jax

    from instdiff_jax.parallel.mesh import ParallelSettings, make_mesh
    from instdiff_jax.sampling.pipeline import Pipeline

    mesh = make_mesh(ParallelSettings(), jax.local_devices()) if jax.local_device_count() > 1 else None
    try:
        pipeline = Pipeline.from_checkpoint(
            args.checkpoint, args.dtype, mesh, args.max_rows, not args.no_verify, args.lora, args.embedding
        )
        return pipeline.with_decoder(args.taesd, args.tile)
    except OSError as error:
        raise InputError(f"--checkpoint: {args.checkpoint}: {error.strerror or error}") from error


def read_additions(args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """What changes images beside layouts, checkpoint and settings, as a record has it."""
    return read_addons(args) | read_picture_flags(args)


def describe_run(
    args: argparse.Namespace, pipeline: "Pipeline", arrays: dict[str, Any], overrides: dict[str, Any]
) -> dict[str, Any]:
    """All that the images depend on, and where they were made."""
    import jax

    from instdiff_jax.sampling.loading import checkpoint_fingerprint
    from instdiff_jax.sampling.outputs import fingerprint_arrays

    return dict(
        checkpoint=str(args.checkpoint),
        fingerprint=checkpoint_fingerprint(args.checkpoint, not args.no_verify),
        model=sizes_without(pipeline.config, args.embedding),
        sampling=pipeline.settings(**overrides).to_dict(),
        format=args.format,
        width=args.width,
        height=args.height,
        strength=args.strength,
        inputs={
            name: {"file": str(getattr(args, name)), "fingerprint": fingerprint}
            for name, fingerprint in fingerprint_arrays(arrays).items()
        },
        **read_additions(args),
        dtype=pipeline.dtype,
        devices=[device.device_kind for device in jax.local_devices()],
        jax=jax.__version__,
    )


def sizes_without(config: ModelConfig, embeddings: Sequence[str]) -> dict[str, Any]:
    """The checkpoint's own sizes: without the tokens of --embedding, so that --resume can draw with others."""
    from instdiff_jax.checkpoint.embeddings import Embedding, read_embedding

    sizes = config.to_dict()
    width = config.text_encoder.hidden_size
    for value in embeddings:
        sizes["text_encoder"]["vocab_size"] -= len(read_embedding(Embedding.parse(value), width)[1])
    return sizes


def write_results(
    results: Iterator["Result"], output: "OutputFolder", record: "RunRecord", began: float, loaded: float, count: int
) -> None:
    """Writes the results of `count` layouts; the record is written first, and whenever the run ends."""
    record.write()
    try:
        for _ in range(count):
            name = output.write(itertools.islice(results, len(output.seeds)), record.values)
            seconds = round(time.time() - began, 2)
            record.add(layout=name, seeds=output.seeds, latents=output.save_latents, seconds=seconds)
        record.values["seconds"] = dict(loading=round(loaded - began, 2), sampling=round(time.time() - loaded, 2))
    finally:
        record.write()
