"""Writes a dataset in another tool's form as a COCO folder, for build-coco and evaluate.

    instdiff import-data --from yolo --input my_dataset --output coco
    instdiff build-coco --coco_dir coco --data_dir datasets/mine --no_captions

What cannot be used is left out and listed in OUTPUT/report.json with its file and field.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from instdiff_jax.cli.parser import command_parser, local_path

# The importers' names; the module that has them reads images, so it is imported only when the command runs.
KINDS = ("coco", "lvis", "yolo", "voc", "labelme", "labelstudio", "openimages", "webdataset", "imagefolder")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser("import-data", __doc__)
    parser.add_argument("--from", dest="kind", required=True, choices=KINDS, help="the form of the dataset")
    parser.add_argument("--input", type=local_path, required=True, help="its folder, or a file of it")
    parser.add_argument("--output", type=local_path, required=True, help="the new COCO folder")
    parser.add_argument("--images", type=local_path, help="folder of the images, where they are not in --input")
    parser.add_argument("--split", default="train", help="the split's name, where the dataset has none (default train)")
    parser.add_argument("--names", type=local_path, help="a text file with the categories' names in order, one a line")
    parser.add_argument("--in_place", action="store_true", help="refer to the images where they are; do not copy them")
    parser.add_argument("--overwrite", action="store_true", help="replace an imported dataset in --output")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    from instdiff_jax.data.importers.scene import Options
    from instdiff_jax.data.importers.write import import_data, read_names

    options = Options(args.images, args.split, read_names(args.names) if args.names else ())
    counts, report = import_data(args.kind, args.input, args.output, options, args.in_place, args.overwrite)
    for name, (images, instances) in counts.items():
        print(f"{name}: {images} images, {instances} instances")
    print(report.summary())
    print(f"written: {args.output}")
    print(f"next: {next_command(args.output, args.in_place)}")


def next_command(output: Path, in_place: bool) -> str:
    """The command that makes training data of the folder."""
    flags = "" if any((output / "annotations").glob("captions_*.json")) else " --no_captions"
    captions = output / "instance_captions.json"
    flags += f" --instance_captions {captions}" if captions.exists() else ""
    flags += " --images_outside" if in_place else ""
    return f"instdiff build-coco --coco_dir {output} --data_dir DATASET{flags}"
