"""Draws and judges one of the field's benchmarks, and writes its table beside the printed rows of others.

    instdiff benchmark coco-mig --data mig_bench_anno.yaml --checkpoint checkpoints/instdiff --output results/mig \\
        --detector transformers:IDEA-Research/grounding-dino-tiny --segmenter transformers:facebook/sam-vit-huge

The same command continues an interrupted run. OUTPUT/images has the names that the benchmark's own scorer reads.
"""

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instdiff_jax.cli.parser import any_path, command_parser, local_path
from instdiff_jax.cli.sampling_flags import add_addon_flags, add_sampling_flags, read_addons, read_overrides
from instdiff_jax.config import SamplingConfig
from instdiff_jax.errors import InputError
from instdiff_jax.sampling.shards import Shard

if TYPE_CHECKING:
    from instdiff_jax.evaluation.benchmarks.case import Benchmark, Case
    from instdiff_jax.evaluation.benchmarks.fid import Reference

KINDS = ("box", "mask", "point", "scribble", "colour", "texture")  # of InstanceDiffusion's own protocol
NAMES = (
    "coco-mig",
    "coco-position",
    "layoutsam",
    "overlaybench",
    *(f"coco-{kind}" for kind in KINDS),
    "lvis-box",
    "lvis-mask",
)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_parser("benchmark", __doc__)
    add = parser.add_argument
    add("name", choices=NAMES, help="the benchmark")
    add(
        "--data",
        type=local_path,
        required=True,
        help="its annotations as its authors publish them (docs/evaluation.md)",
    )
    add("--checkpoint", type=any_path, help="a checkpoint folder, or a training workdir; not needed for drawn pictures")
    add("--output", type=local_path, required=True, help="folder to write to")
    add("--count", type=int, help="use the first COUNT pictures; default: all")
    add("--size", type=int, default=512, help="side of the pictures in pixels (default 512)")
    add("--seed", type=int, default=0, help="a picture's seed follows from this and its id (default 0)")
    add("--shard", help="i/n: draw and judge pictures i, i + n, ... only")
    add("--draw_only", action="store_true", help="draw, for the benchmark's own scorer")
    judges = parser.add_argument_group("judges: transformers:NAME or python:MODULE:FUNCTION").add_argument
    judges(
        "--detector",
        help="finds what a phrase names: Grounding DINO; for coco-box to coco-scribble and lvis-* as in evaluate",
    )
    judges("--segmenter", help="masks what a box is around: SAM")
    judges("--vlm", help="answers questions about a picture: a vision language model")
    judges("--clip", help="a CLIP model of the transformers library, a folder or a name; or python:MODULE:FUNCTION")
    judges("--features", help="for FID: inception:FILE or python:MODULE:FUNCTION")
    judges("--real", type=local_path, help="for FID: a folder of real pictures to compare with")
    sampling = parser.add_argument_group("sampling; default: the checkpoint's settings")
    add_sampling_flags(sampling)
    add_addon_flags(sampling)
    sampling.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    sampling.add_argument("--no_verify", action="store_true", help="do not compare the checkpoint with its checksums")
    sampling.add_argument("--max_rows", type=int, help="latents denoised at a time on one device")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    for name, least in (("count", 1), ("size", 1), ("max_rows", 1), ("seed", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise InputError(f"--{name}: expected a whole number of at least {least}, got {value}")
    SamplingConfig.from_dict(read_overrides(args), "sampling")
    shard = Shard() if args.shard is None else Shard.parse(args.shard)

    from instdiff_jax.evaluation.benchmarks.fid import open_reference
    from instdiff_jax.evaluation.benchmarks.run import BENCHMARKS, open_judges, read_cases, undrawn

    benchmark = BENCHMARKS[args.name]
    cases = read_cases(benchmark, args.data, args.count)
    names = {"grounder": args.detector, "segmenter": args.segmenter, "answerer": args.vlm}
    names |= {"detector": args.detector, "clip": args.clip}
    # A judge that is missing should be found before hours of drawing.
    judges = None if args.draw_only else open_judges(benchmark.judges, names, cases, args.size)
    reference = open_reference(args.features, args.real)
    mine = list(shard.of(cases))
    if undrawn(args.output, mine):
        draw_pictures(args, benchmark, mine)
    if judges is not None:
        judge_pictures(args, benchmark, mine, judges)
        write_table(args, benchmark, cases, reference)


def draw_pictures(args: argparse.Namespace, benchmark: "Benchmark", cases: Sequence["Case"]) -> None:
    """Draws the pictures that are missing; a folder holds pictures of one set of settings."""
    if args.checkpoint is None:
        raise InputError("--checkpoint: expected a checkpoint folder; pictures are missing in --output")
    import jax
    from tqdm import tqdm

    from instdiff_jax.evaluation.benchmarks.run import draw
    from instdiff_jax.evaluation.files import claim_folder
    from instdiff_jax.evaluation.generate import sampling_settings
    from instdiff_jax.parallel.mesh import ParallelSettings, make_mesh
    from instdiff_jax.parallel.runtime import set_up_compilation
    from instdiff_jax.sampling.loading import checkpoint_fingerprint, choose_dtype
    from instdiff_jax.sampling.pipeline import Pipeline

    set_up_compilation()
    overrides = dict(benchmark.sampling) | read_overrides(args)
    dtype = choose_dtype(args.dtype)
    settings = {"benchmark": args.name, "size": args.size, "seed": args.seed, "dtype": dtype}
    settings["checkpoint"] = checkpoint_fingerprint(args.checkpoint, not args.no_verify)
    settings |= read_addons(args) | {"sampling": sampling_settings(args.checkpoint, overrides).to_dict()}
    settings["data"] = data_fingerprint(args.data)
    args.output.mkdir(parents=True, exist_ok=True)
    claim_folder(args.output, settings)
    mesh = make_mesh(ParallelSettings(), jax.local_devices()) if jax.local_device_count() > 1 else None
    pipeline = Pipeline.from_checkpoint(
        args.checkpoint, dtype, mesh, args.max_rows, not args.no_verify, args.lora, args.embedding
    )
    with tqdm(total=len(cases), unit="picture", desc="drawn", disable=None) as bar:
        made = draw(benchmark, pipeline, cases, args.output, args.size, args.seed, overrides, bar.update)
    print(f"{made} pictures drawn, {len(cases) - made} were there, in {args.output / 'images'}")


def judge_pictures(args: argparse.Namespace, benchmark: "Benchmark", mine: Sequence["Case"], judges: Any) -> None:
    """Judges what has no verdict yet."""
    from tqdm import tqdm

    from instdiff_jax.evaluation.benchmarks.run import judge
    from instdiff_jax.evaluation.files import claim_folder

    (args.output / "judged").mkdir(parents=True, exist_ok=True)
    judged_by = {"detector": args.detector, "segmenter": args.segmenter, "vlm": args.vlm}
    judged_by |= {"clip": args.clip} if args.clip else {}
    claim_folder(args.output / "judged", {"benchmark": benchmark.name, "data": data_fingerprint(args.data)} | judged_by)
    with tqdm(total=len(mine), unit="picture", desc="judged", disable=None) as bar:
        made = judge(benchmark, mine, args.output, judges, bar.update)
    print(f"{made} pictures judged, {len(mine) - made} were judged before")


def write_table(
    args: argparse.Namespace, benchmark: "Benchmark", cases: Sequence["Case"], reference: "Reference | None"
) -> None:
    """Writes the table when all pictures have a verdict, with FID where there is something to compare with."""
    from tqdm import tqdm

    from instdiff_jax.evaluation.benchmarks.fid import measure_fid
    from instdiff_jax.evaluation.benchmarks.run import all_judged, picture_path, summarise

    if not all_judged(cases, args.output):
        print("other shards have not judged all pictures yet; run once more without --shard for the table")
        return
    fid = None
    if reference is not None:
        drawn = [picture_path(args.output, case) for case in cases]
        with tqdm(total=len(drawn) + len(reference.pictures), unit="picture", desc="FID", disable=None) as bar:
            fid = measure_fid(drawn, reference, args.output, bar.update)
    print(summarise(benchmark, cases, args.output, fid))
    print(f"written: {args.output / 'results.md'}")


def data_fingerprint(path: Path) -> str:
    """Hash of the benchmark's files."""
    from instdiff_jax.evaluation.benchmarks.coco_protocol import captions_beside

    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file())
    else:
        captions = captions_beside(path)
        files = [path] if captions is None else [path, captions]
    digest = hashlib.sha256()
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:32]
