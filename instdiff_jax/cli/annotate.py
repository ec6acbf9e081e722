"""Makes a COCO folder of pictures without labels, with models of the transformers library or your own functions.

    instdiff annotate --images photos --output annotated --tags tags.txt \\
        --detector transformers:IDEA-Research/grounding-dino-tiny --segmenter transformers:facebook/sam-vit-base \\
        --captioner transformers:Salesforce/blip-image-captioning-base
    instdiff build-coco --coco_dir annotated/coco --data_dir datasets/photos

With boxes of your own, in another tool's form, it adds masks and captions to them:

    instdiff annotate --from yolo --input my_dataset --output annotated --segmenter transformers:facebook/sam-vit-base

The same command continues an interrupted run; --shard i/n does a part. OUTPUT/page.html shows some pictures.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from instdiff_jax.cli.parser import command_parser, local_path
from instdiff_jax.errors import InputError
from instdiff_jax.sampling.shards import Shard

if TYPE_CHECKING:
    from instdiff_jax.data.annotate import AnnotateSettings, Models, Picture
    from instdiff_jax.data.report import Report


OWN = ("coco", "yolo", "labelme", "voc", "labelstudio")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser("annotate", __doc__)
    add = parser.add_argument
    add("--images", type=local_path, help="a folder of pictures; with --from, where they are not in --input")
    add("--output", type=local_path, required=True, help="folder to write to: records/, coco/, page.html")
    add("--split", default="train", help="the split's name (default train)")
    add("--tags", help="what to look for: a text file, one phrase a line, or phrases separated by commas")
    own = parser.add_argument_group("boxes of your own: masks and captions are added to them").add_argument
    own("--from", dest="kind", choices=OWN, help="the form of the dataset, as in import-data")
    own("--input", type=local_path, help="the dataset's folder, or a file of it")
    own("--names", type=local_path, help="a text file with the categories' names in order, one a line")
    add("--shard", help="i/n: annotate pictures i, i + n, ... only; then run once without it")
    add("--batch", type=int, default=1, help="pictures that the models see at a time (default 1)")
    models = parser.add_argument_group("models: transformers:NAME or python:MODULE:FUNCTION").add_argument
    models("--detector", help="finds what a phrase names: Grounding DINO")
    models("--segmenter", help="masks what a box is around: SAM or SAM 2; without it, boxes only")
    models("--captioner", help="describes pictures and crops: BLIP or Florence-2; without it, captions are tags")
    models("--vlm", help="names what is in a picture, where there are no --tags: a model that chats, or Florence-2")
    keep = parser.add_argument_group("what is kept").add_argument
    keep("--min_score", type=float, default=0.3, help="of a box (0.3)")
    keep("--min_area", type=float, default=0.005, help="of a box, in parts of the picture (0.005)")
    keep("--max_overlap", type=float, default=0.7, help="of two boxes as IoU (0.7)")
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace) -> None:
    """InputError for flags out of range, missing ones, and those that contradict each other."""
    for name in ("min_score", "min_area", "max_overlap"):
        if not 0 <= getattr(args, name) <= 1:
            raise InputError(f"--{name}: expected a number from 0 to 1, got {getattr(args, name)}")
    if args.batch < 1:
        raise InputError(f"--batch: expected a whole number of at least 1, got {args.batch}")
    if args.kind is not None:
        if args.input is None:
            raise InputError("--input: expected the dataset that --from names")
        for name in ("detector", "tags", "vlm"):
            if getattr(args, name) is not None:
                raise InputError(f"--{name}: cannot be used with --from, whose boxes are used")
        return
    for name in ("input", "names"):
        if getattr(args, name) is not None:
            raise InputError(f"--{name}: only means something with --from")
    for name, what in (("images", "a folder of pictures"), ("detector", "a model that finds what a phrase names")):
        if getattr(args, name) is None:
            raise InputError(f"--{name}: expected {what}, or --from with boxes of your own")
    if args.tags is None and args.vlm is None:
        raise InputError("--tags: expected phrases to look for, or --vlm to name them")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    check_args(args)
    shard = Shard() if args.shard is None else Shard.parse(args.shard)
    from tqdm import tqdm

    from instdiff_jax.cli.import_data import next_command
    from instdiff_jax.data.annotate import annotate_all, record_path
    from instdiff_jax.data.annotated import write_coco, write_page
    from instdiff_jax.evaluation.files import claim_folder

    pictures, report = read_pictures(args)
    settings, models = read_settings(args), open_models(args)
    args.output.mkdir(parents=True, exist_ok=True)
    made_by = {name: getattr(args, name) for name in ("detector", "segmenter", "captioner", "vlm")}
    source = args.images if args.kind is None else args.input
    facts = {"images": str(source.absolute()), **vars(settings), **made_by}
    claim_folder(args.output, facts | ({"from": args.kind} if args.kind else {}))
    mine = list(shard.of(pictures))
    with tqdm(total=len(mine), unit="picture", desc="annotated", disable=None) as bar:
        made = annotate_all(mine, args.output, models, settings, bar.update, args.batch)
    print(f"{made} pictures annotated, {len(mine) - made} were before")
    if not all(record_path(args.output, picture).exists() for picture in pictures):
        print("other shards have not annotated all pictures yet; run once more without --shard for the COCO folder")
        return
    facts = {"kind": "annotate", "source": str(source.absolute())}
    counts, report = write_coco(pictures, args.output, facts, report)
    write_page(pictures, args.output)
    for name, (images, instances) in counts.items():
        print(f"{name}: {images} images, {instances} instances")
    print(report.summary())
    print(f"look: {args.output / 'page.html'}")
    print(f"next: {next_command(args.output / 'coco', False)}")


def read_pictures(args: argparse.Namespace) -> "tuple[list[Picture], Report]":
    """The pictures of --images, or those of --input with their boxes; and what of it was left out."""
    from instdiff_jax.data.annotate import find_pictures, find_scenes
    from instdiff_jax.data.importers.scene import Options
    from instdiff_jax.data.importers.write import read_names
    from instdiff_jax.data.report import Report

    if args.kind is None:
        return find_pictures(args.images, args.split), Report()
    options = Options(args.images, args.split, read_names(args.names) if args.names else ())
    return find_scenes(args.kind, args.input, options)


def read_settings(args: argparse.Namespace) -> "AnnotateSettings":
    """The settings, with the phrases of --tags."""
    from instdiff_jax.data.annotate import AnnotateSettings
    from instdiff_jax.data.importers.write import read_names

    tags: tuple[str, ...] = ()
    if args.tags is not None:
        listed = Path(args.tags).is_file()
        words = read_names(Path(args.tags)) if listed else [word.strip() for word in args.tags.split(",")]
        tags = tuple(dict.fromkeys(word for word in words if word))
        if not tags:
            raise InputError(f"--tags: expected phrases, got {args.tags!r}")
    return AnnotateSettings(tags, args.min_score, args.min_area, args.max_overlap)


def open_models(args: argparse.Namespace) -> "Models":
    """The models that the flags name; InputError for one that cannot be opened."""
    from instdiff_jax.data.annotate import Models
    from instdiff_jax.data.vision_hub import open_model

    named = {field: (f"--{flag}", getattr(args, flag)) for field, flag in _FLAGS.items()}
    return Models(**{field: open_model(flag, name) for field, (flag, name) in named.items() if name is not None})


_FLAGS = {"grounder": "detector", "segmenter": "segmenter", "captioner": "captioner", "answerer": "vlm"}
