"""Generates images for a split in COCO format and measures how well they follow their layouts.

    instdiff evaluate --checkpoint checkpoints/shapes --coco_dir shapes --split val --output results \
        --detector shapes:checkpoints/shapes_segmenter

Writes images/<image_id>.png, settings.json, report.json, report.md and report.html to OUTPUT. The same command
continues an interrupted run. `--real` measures the split's own images: an upper bound for the detector.
"""

import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instdiff_jax.cli.parser import OUTSIDE, any_path, command_parser, local_path
from instdiff_jax.cli.sampling_flags import (
    DTYPE_HELP,
    DTYPES,
    add_addon_flags,
    add_sampling_flags,
    read_addons,
    read_overrides,
)
from instdiff_jax.config import SamplingConfig
from instdiff_jax.errors import InputError
from instdiff_jax.evaluation.layouts import FORMATS
from instdiff_jax.files import remove_leftovers, write_json, write_text
from instdiff_jax.paths import output_path
from instdiff_jax.sampling.shards import Shard

if TYPE_CHECKING:
    from instdiff_jax.evaluation.measure import Measures
    from instdiff_jax.evaluation.split import Scene, Split


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_parser("evaluate", __doc__)
    add = parser.add_argument
    add("--coco_dir", type=local_path, required=True, help="folder with annotations/ and folders of images")
    add("--split", required=True, help="name of the split, for example val2017")
    add("--output", type=local_path, required=True, help="folder to write to")
    add("--images_outside", action="store_true", help=OUTSIDE)
    what = parser.add_argument_group("images").add_argument
    what("--checkpoint", type=any_path, help="a checkpoint folder, or a training workdir; not needed with --real")
    what("--real", action="store_true", help="measure the split's own images: the upper bound")
    what("--caption_only", action="store_true", help="generate from captions without instances: the base model")
    what("--format", default="auto", choices=FORMATS, help="locations in the layouts (default auto)")
    what("--count", type=int, help="use the first COUNT images of the split; default: all")
    what("--size", type=int, help="side of the images in pixels; default: that of the split if all are equal, or 512")
    what("--min_area", type=float, default=0.01, help="leave out instances below this fraction of the image (0.01)")
    what("--attributes", choices=("colour", "texture"), help="request a random one for each instance, as in the paper")
    what("--seed", type=int, default=0, help="an image's seed follows from this and its id (default 0)")
    what("--batch", type=int, default=128, help="layouts in memory at a time (default 128)")
    what("--shard", help="i/n: only generate images i, i + n, ...; then run once without it to measure")
    sampling = parser.add_argument_group("sampling; default: the checkpoint's settings")
    add_sampling_flags(sampling)
    add_addon_flags(sampling)
    how = sampling.add_argument
    how("--dtype", choices=DTYPES, help=DTYPE_HELP)
    how("--no_verify", action="store_true", help="do not compare the checkpoint with its checksums")
    how("--max_rows", type=int, help="latents denoised at a time on one device; fewer need less memory")
    measures = parser.add_argument_group("measures").add_argument
    measures("--detector", help="predictions:FILE.json, transformers:NAME, segmenter:FOLDER or python:MODULE:FUNCTION")
    measures("--clip", help="a CLIP model of the transformers library on this machine: a folder or a name")
    measures("--features", help="for FID: detector (default), none, inception:FILE, npz:FILE or python:MODULE:FUNCTION")
    measures("--min_score", type=float, default=0.25, help="detections below this score count for AP only (0.25)")
    measures("--upper_bound", type=local_path, help="report.json of a --real run with the same flags, to compare with")
    measures("--html_images", type=int, default=60, help="images on the HTML page (default 60)")
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace) -> None:
    """Raises for flags that are out of range or contradict each other."""
    for name, least in (("count", 1), ("size", 1), ("batch", 1), ("max_rows", 1), ("seed", 0), ("html_images", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise InputError(f"--{name}: expected a whole number of at least {least}, got {value}")
    for name in ("min_area", "min_score"):
        if not 0 <= getattr(args, name) <= 1:
            raise InputError(f"--{name}: expected a number from 0 to 1, got {getattr(args, name)}")
    if args.real and args.caption_only:
        raise InputError("--caption_only: cannot be used with --real, which generates nothing")
    if args.real and args.attributes is not None:
        raise InputError("--attributes: cannot be used with --real, whose instances have their own")
    if not args.real and args.checkpoint is None:
        raise InputError("--checkpoint: expected a checkpoint folder, or --real")
    if args.caption_only and (args.alpha is not None or args.mis is not None):
        raise InputError("--caption_only: cannot be used with --alpha or --mis, which it sets to 0")


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

    from instdiff_jax.evaluation.files import claim_folder
    from instdiff_jax.evaluation.split import read_split
    from instdiff_jax.parallel.mesh import PATIENCE, initialize_distributed
    from instdiff_jax.parallel.runtime import set_up_compilation
    from instdiff_jax.sampling.loading import choose_dtype

    set_up_compilation()
    initialize_distributed(PATIENCE)
    shard = Shard.of_process() if args.shard is None else Shard.parse(args.shard)
    dtype = choose_dtype(args.dtype)
    chosen = args.size, args.count, args.min_area, args.attributes, args.images_outside
    split = read_split(args.coco_dir, args.split, *chosen)
    # A mistake in what measures the images should be found before hours of generating them.
    measures = open_measures(args, split)
    settings = image_settings(args, split, dtype, overrides)
    measured = settings | measure_settings(args, measures)
    upper = None if args.upper_bound is None else read_upper_bound(args.upper_bound, split, measured)
    claim_folder(args.output, settings)
    remove_leftovers(args.output)
    remove_leftovers(args.output / "images")

    mine = shard.of(split.scenes)
    with tqdm(total=len(mine), unit="image", desc="images", disable=None) as bar:
        made = make_images(args, mine, dtype, overrides, bar.update)
    print(f"{made} images made, {len(mine) - made} were there, in {args.output / 'images'}")
    if args.shard is not None:
        return
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("images")
    if jax.process_index() == 0:
        write_reports(args, split, measures, measured, upper)


def open_measures(args: argparse.Namespace, split: "Split") -> "Measures":
    """Opens detector, CLIP and features; InputError if one of them, or what it needs, is missing."""
    from instdiff_jax.evaluation.detectors import open_detector, open_features
    from instdiff_jax.evaluation.fid import fid_of_file
    from instdiff_jax.evaluation.measure import Measures

    detector = None if args.detector is None else open_detector(args.detector, split)
    features = clip = None
    if (args.features or "").startswith("npz:"):
        fid_of_file(args.features.removeprefix("npz:"))
    elif args.features is not None or (not args.real and split.folder.is_dir()):
        features = open_features(args.features, detector)
    if features is not None:
        if not split.folder.is_dir():
            raise InputError(f"--features: {split.folder}: expected the images of the split, to compare with")
        for scene in split.scenes:
            if not scene.file.is_file():
                raise InputError(f"--features: {scene.file}: expected this image of the split, to compare with")
    if args.clip is not None:
        from instdiff_jax.evaluation.hub import Clip

        clip = Clip.from_name(args.clip)
    return Measures(detector, clip, features, min_score=args.min_score)


def image_settings(
    args: argparse.Namespace, split: "Split", dtype: str, overrides: Mapping[str, Any]
) -> dict[str, Any]:
    """All that decides what the images look like; a folder holds images of one such set."""
    from instdiff_jax.evaluation.generate import sampling_settings
    from instdiff_jax.sampling.loading import checkpoint_fingerprint

    settings: dict[str, Any] = {"split": args.split, "annotations": split.fingerprint, "size": split.size}
    settings |= {"min_area": args.min_area, "pictures": "real" if args.real else "drawn"}
    if not args.real:
        settings["pictures"] = "drawn from captions" if args.caption_only else "drawn from layouts"
        settings["checkpoint"] = checkpoint_fingerprint(args.checkpoint, not args.no_verify)
        settings |= read_addons(args)
        settings |= {"format": args.format, "seed": args.seed, "dtype": dtype}
        settings["sampling"] = sampling_settings(args.checkpoint, overrides).to_dict()
    return settings


def measure_settings(args: argparse.Namespace, measures: "Measures") -> dict[str, Any]:
    """What the images are measured with, for the report."""
    from instdiff_jax.evaluation.detectors import detector_fingerprint

    settings = {"coco_dir": str(args.coco_dir), "checkpoint_folder": str(args.checkpoint or "")}
    settings |= {"detector": args.detector, "detector_fingerprint": detector_fingerprint(measures.detector)}
    return settings | {"clip": args.clip, "features": args.features, "min_score": args.min_score}


def read_upper_bound(path: Path, split: "Split", settings: Mapping[str, Any]) -> dict[str, Any]:
    """The report of an upper bound; InputError if it is of other images or was measured differently."""
    from instdiff_jax.evaluation.report import check_same_images, check_same_measures, read_report

    upper = read_report(path, split.fingerprint)
    check_same_images(path, upper, [scene.image_id for scene in split.scenes])
    check_same_measures(path, upper, settings)
    return upper


def make_images(
    args: argparse.Namespace,
    scenes: Sequence["Scene"],
    dtype: str,
    overrides: Mapping[str, Any],
    report: Callable[[], object],
) -> int:
    """Generates or copies the missing images; loads the checkpoint only if it is needed."""
    from instdiff_jax.evaluation import generate

    if args.real:
        return generate.copy_real(scenes, args.output, report)
    import jax

    # Reading a checkpoint takes all processes of a job, even those with nothing to generate.
    if not generate.unfinished(args.output, scenes) and jax.process_count() == 1:
        return 0
    from instdiff_jax.parallel.mesh import ParallelSettings, make_mesh
    from instdiff_jax.sampling.pipeline import Pipeline

    mesh = make_mesh(ParallelSettings(), jax.local_devices()) if jax.local_device_count() > 1 else None
    pipeline = Pipeline.from_checkpoint(
        args.checkpoint, dtype, mesh, args.max_rows, not args.no_verify, args.lora, args.embedding
    )
    settings = generate.GenerateSettings(
        args.seed, args.format, args.caption_only, batch=args.batch, sampling=overrides
    )
    return generate.generate(pipeline, scenes, args.output, settings, report)


def write_reports(
    args: argparse.Namespace,
    split: "Split",
    measures: "Measures",
    settings: Mapping[str, Any],
    upper: Mapping[str, Any] | None,
) -> None:
    """Measures the images and writes report.json, report.md and report.html."""
    from tqdm import tqdm

    from instdiff_jax.evaluation.fid import fid_of_file
    from instdiff_jax.evaluation.measure import measure
    from instdiff_jax.evaluation.page import make_page
    from instdiff_jax.evaluation.report import make_report, markdown, metrics_line

    with tqdm(total=len(split.scenes), unit="image", desc="measuring", disable=None) as bar:
        outcome = measure(split, args.output, measures, bar.update)
    if (args.features or "").startswith("npz:"):
        distance, remarks = fid_of_file(args.features.removeprefix("npz:"))
        metrics = outcome.metrics | {"FID": distance}
        outcome = dataclasses.replace(outcome, metrics=metrics, notes=outcome.notes + remarks)
    report = make_report(outcome, settings, upper)
    page = make_page(report, outcome.images, args.output, args.format, args.min_score, args.html_images)
    write_text(output_path(args.output, "report.html"), page)
    write_text(output_path(args.output, "report.md"), markdown(report))
    write_json(output_path(args.output, "report.json"), report)
    print(metrics_line(outcome.metrics))
    print(f"written: {args.output / 'report.html'}")
