"""Draws a COCO-format split from its layouts and measures how well the pictures obey them.

    python -m instdiff_jax evaluate --checkpoint checkpoints/shapes --coco_dir shapes --split val --output results \
        --detector shapes:checkpoints/shapes_segmenter

OUTPUT then holds images/<image_id>.png, settings.json and report.json, report.md and report.html. A run that was cut
off goes on where it ended. `--real` measures the split's own images: what the detector can see at best.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from instdiff_jax.cli.sampling_flags import add_sampling_flags, read_overrides
from instdiff_jax.config import SamplingConfig
from instdiff_jax.errors import ArgumentParser, InputError
from instdiff_jax.sampling.shards import Shard

# As evaluation/generate.py has them, which is imported late.
FORMATS = ("auto", "box", "point", "scribble", "mask", "mixed")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="python -m instdiff_jax evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--coco_dir", type=Path, required=True, help="folder with annotations/ and folders of images")
    add("--split", required=True, help="name of the split, for example val2017")
    add("--output", type=Path, required=True, help="folder to write to")
    what = parser.add_argument_group("pictures").add_argument
    what("--checkpoint", type=Path, help="a checkpoint folder, or a training workdir; not needed with --real")
    what("--real", action="store_true", help="measure the split's images instead of pictures: the upper bound")
    what("--caption_only", action="store_true", help="draw from captions without instances: the base model")
    what("--format", default="auto", choices=FORMATS, help="what layouts hold")
    what("--count", type=int, help="the first so many images of the split; all by default")
    what("--size", type=int, help="side of the pictures; default: the images' own where all are equal squares, or 512")
    what("--min_area", type=float, default=0.01, help="share of the picture below which an instance is not asked for")
    what("--attributes", choices=("colour", "texture"), help="ask every instance for one drawn for it, as in the paper")
    what("--seed", type=int, default=0, help="a picture's seed follows from this and the image's id")
    what("--batch", type=int, default=128, help="layouts in memory at a time")
    what("--shard", help="i/n: only draw images i, i + n, ...; then run once without it to measure")
    sampling = parser.add_argument_group("sampling, the checkpoint's own by default")
    add_sampling_flags(sampling)
    how = sampling.add_argument
    how("--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32 on a CPU, else bfloat16")
    how("--max_rows", type=int, help="latents denoised at a time on a device; less needs less memory")
    measures = parser.add_argument_group("measures").add_argument
    measures("--detector", help="shapes:FOLDER, predictions:FILE.json or transformers:NAME; none: pictures only")
    measures("--clip", help="a CLIP model of the transformers library on this machine: folder or name")
    measures("--features", help="for FID: detector (default), none, npz:FILE or python:MODULE:FUNCTION")
    measures("--min_score", type=float, default=0.25, help="less sure detections count for AP alone")
    measures("--upper_bound", type=Path, help="the report.json of a --real run with these flags; adds shares of it")
    measures("--html_images", type=int, default=60, help="pictures on the HTML page")
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace) -> None:
    """Raises for flags that make no sense, before anything is read."""
    for name, least in (("count", 1), ("size", 1), ("batch", 1), ("max_rows", 1), ("seed", 0), ("html_images", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise InputError(f"--{name}: expected a whole number of at least {least}, got {value}")
    for name in ("min_area", "min_score"):
        if not 0 <= getattr(args, name) <= 1:
            raise InputError(f"--{name}: expected a number from 0 to 1, got {getattr(args, name)}")
    if args.real and args.caption_only:
        raise InputError("--caption_only: expected without --real, which draws nothing")
    if args.real and args.attributes is not None:
        raise InputError("--attributes: expected without --real, whose instances have their own")
    if not args.real and args.checkpoint is None:
        raise InputError("--checkpoint: expected a checkpoint folder, or --real")
    if args.caption_only and (args.alpha is not None or args.mis is not None):
        raise InputError("--caption_only: expected without --alpha and --mis, which are 0 then")


def picture_settings(args: argparse.Namespace, split, dtype: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """All that decides what the pictures look like: a folder holds pictures of one such set."""
    from instdiff_jax.evaluation.generate import sampling_settings
    from instdiff_jax.sampling.loading import checkpoint_fingerprint

    settings: dict[str, Any] = {"split": args.split, "annotations": split.fingerprint, "size": split.size}
    settings |= {"min_area": args.min_area, "pictures": "real" if args.real else "drawn"}
    if not args.real:
        settings["pictures"] = "drawn from captions" if args.caption_only else "drawn from layouts"
        settings["checkpoint"] = checkpoint_fingerprint(args.checkpoint)
        settings |= {"format": args.format, "seed": args.seed, "dtype": dtype}
        settings["sampling"] = sampling_settings(args.checkpoint, overrides).to_dict()
    return settings


def make_pictures(args, scenes: Sequence, dtype: str, overrides: dict[str, Any], done: Callable[[], None]) -> int:
    """Draws, or copies, what is not there yet; loads the checkpoint only if anything is to be drawn."""
    from instdiff_jax.evaluation import generate

    if args.real:
        return generate.copy_real(scenes, args.output, done)
    import jax

    # Reading a checkpoint takes all processes of a job, also those that have nothing to draw.
    if not generate.unfinished(args.output, scenes) and jax.process_count() == 1:
        return 0
    from instdiff_jax.parallel.mesh import ParallelSettings, make_mesh
    from instdiff_jax.sampling.pipeline import Pipeline

    mesh = make_mesh(ParallelSettings(), jax.local_devices()) if jax.local_device_count() > 1 else None
    pipeline = Pipeline.from_checkpoint(args.checkpoint, dtype=dtype, mesh=mesh, max_rows=args.max_rows)
    return generate.generate(
        pipeline,
        scenes,
        args.output,
        seed=args.seed,
        format=args.format,
        caption_only=args.caption_only,
        batch=args.batch,
        report=done,
        **overrides,
    )


def write_reports(args: argparse.Namespace, split, plugs: dict[str, Any], settings: dict, upper: dict | None) -> None:
    """Measures the pictures and writes report.json, report.md and report.html."""
    import json

    from tqdm import tqdm

    from instdiff_jax.evaluation.files import write_file
    from instdiff_jax.evaluation.measure import fid_of_file, measure
    from instdiff_jax.evaluation.page import make_page
    from instdiff_jax.evaluation.report import make_report, markdown, metrics_line

    with tqdm(total=len(split.scenes), unit="image", desc="measuring", disable=None) as bar:
        outcome = measure(split, args.output, min_score=args.min_score, report=bar.update, **plugs)
    if (args.features or "").startswith("npz:"):
        outcome.metrics["FID"], remarks = fid_of_file(args.features.removeprefix("npz:"))
        outcome.notes.extend(remarks)
    report = make_report(outcome, settings, upper)
    page = make_page(report, outcome.pictures, args.output, args.format, args.min_score, args.html_images)
    write_file(args.output / "report.html", page.encode())
    write_file(args.output / "report.md", markdown(report).encode())
    write_file(args.output / "report.json", json.dumps(report, indent=1).encode())
    print(metrics_line(outcome.metrics))
    print(f"written: {args.output / 'report.html'}")


def main(argv: Sequence[str] | None = None) -> None:
    run(parse_args(argv))


def run(args: argparse.Namespace) -> None:
    check_args(args)
    overrides = read_overrides(args)
    SamplingConfig.from_dict(overrides, "sampling")
    if args.caption_only:
        overrides |= {"alpha": 0.0, "mis": 0.0}

    import jax
    from tqdm import tqdm

    from instdiff_jax.evaluation.detectors import detector_fingerprint, open_detector
    from instdiff_jax.evaluation.files import claim_folder
    from instdiff_jax.evaluation.measure import fid_of_file, open_features
    from instdiff_jax.evaluation.report import check_same_images, check_same_measures, read_report
    from instdiff_jax.evaluation.split import read_split
    from instdiff_jax.parallel.mesh import PATIENCE, initialize_distributed
    from instdiff_jax.parallel.runtime import spare_compiler_memory

    spare_compiler_memory()
    initialize_distributed(PATIENCE)
    several = jax.process_count() > 1
    shard = Shard.of_process() if args.shard is None else Shard.parse(args.shard)
    dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    split = read_split(args.coco_dir, args.split, args.size, args.count, args.min_area, args.attributes)

    # Everything that measuring needs is opened first: a mistake in it should not wait for hours of drawing.
    detector = None if args.detector is None else open_detector(args.detector, split)
    plugs: dict[str, Any] = {"detector": detector, "features": None, "clip": None}
    if (args.features or "").startswith("npz:"):
        fid_of_file(args.features.removeprefix("npz:"))
    elif not (args.features is None and (args.real or not split.folder.is_dir())):
        plugs["features"] = open_features(args.features, detector)
        if plugs["features"] is not None and not split.folder.is_dir():
            raise InputError(f"--features: {split.folder}: expected the split's images there, to compare with")
        lost = [scene.file for scene in split.scenes if not scene.file.is_file()] if plugs["features"] else []
        if lost:
            raise InputError(f"--features: {lost[0]}: expected the split's image there, to compare with")
    if args.clip is not None:
        from instdiff_jax.evaluation.hub import Clip

        plugs["clip"] = Clip.from_name(args.clip)
    settings = picture_settings(args, split, dtype, overrides)
    measured = {"coco_dir": str(args.coco_dir), "checkpoint_folder": str(args.checkpoint or "")}
    measured |= {"detector": args.detector, "detector_fingerprint": detector_fingerprint(detector)}
    measured |= {"clip": args.clip, "features": args.features, "min_score": args.min_score}
    upper = None
    if args.upper_bound is not None:
        upper = read_report(args.upper_bound, split.fingerprint)
        check_same_images(args.upper_bound, upper, [scene.image_id for scene in split.scenes])
        check_same_measures(args.upper_bound, upper, settings | measured)
    claim_folder(args.output, settings)

    mine = shard.of(split.scenes)
    with tqdm(total=len(mine), unit="image", desc="pictures", disable=None) as bar:
        made = make_pictures(args, mine, dtype, overrides, bar.update)
    print(f"{made} pictures made, {len(mine) - made} were there, in {args.output / 'images'}")
    if args.shard is not None:
        return
    if several:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("pictures")
    if jax.process_index() == 0:
        write_reports(args, split, plugs, settings | measured, upper)
