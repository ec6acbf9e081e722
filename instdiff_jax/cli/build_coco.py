"""Builds a training dataset from a COCO folder.

    instdiff build-coco --coco_dir coco --data_dir datasets/coco

The folder has annotations/instances_NAME.json, annotations/captions_NAME.json and the images in NAME/ (or
images/NAME/) for each split NAME, for example train2017. Broken images and annotations are skipped and listed in
DATA_DIR/report.json.
"""

import argparse
from collections.abc import Sequence

from instdiff_jax.cli.parser import OUTSIDE, command_parser, local_path


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser("build-coco", __doc__)
    parser.add_argument("--coco_dir", type=local_path, required=True, help="folder with annotations/ and image folders")
    parser.add_argument("--data_dir", type=local_path, required=True, help="folder of the new dataset")
    parser.add_argument("--splits", default="", help="names separated by commas; default: all that have images")
    parser.add_argument("--instance_captions", type=local_path, help="JSON file {annotation id: caption}")
    parser.add_argument("--no_captions", action="store_true", help="do without captions_*.json")
    parser.add_argument("--overwrite", action="store_true", help="replace the dataset in --data_dir")
    parser.add_argument("--images_outside", action="store_true", help=OUTSIDE)
    parser.add_argument("--workers", type=int, help="threads that decode images; default: one per CPU")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    from instdiff_jax.data.build_coco import build

    splits = [name for name in args.splits.split(",") if name]
    meta, report = build(
        args.coco_dir,
        args.data_dir,
        splits,
        not args.no_captions,
        args.instance_captions,
        args.overwrite,
        args.workers,
        args.images_outside,
    )
    for name, facts in meta["splits"].items():
        print(f"{name}: {facts['images']} images, {facts['instances']} instances")
    print(f"{meta['phrases']} phrases, fingerprint {meta['fingerprint']}")
    print(report.summary())
    print(f"written: {args.data_dir}")
