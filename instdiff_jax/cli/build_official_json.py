"""Builds a training dataset from the official training JSON files.

    instdiff build-official-json --input FOLDER_OR_FILES --data_dir datasets/official

Each file holds one image with its captions, boxes, masks and embeddings. A .txt file lists such files, one per line,
like the official --train_file.
"""

import argparse
from collections.abc import Sequence

from instdiff_jax.cli.parser import command_parser, local_path


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser("build-official-json", __doc__)
    parser.add_argument("--input", type=local_path, nargs="+", required=True, help="folders, .json files or .txt lists")
    parser.add_argument("--data_dir", type=local_path, required=True, help="folder of the new dataset")
    parser.add_argument("--split", default="train", help="name of the split (default train)")
    parser.add_argument("--overwrite", action="store_true", help="replace the dataset in --data_dir")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    from instdiff_jax.data.official_json import build

    meta, report = build(args.input, args.data_dir, args.split, args.overwrite)
    facts = meta["splits"][args.split]
    print(f"{args.split}: {facts['images']} images, {facts['instances']} instances, {meta['phrases']} phrases")
    print(report.summary())
    print(f"written: {args.data_dir}")
