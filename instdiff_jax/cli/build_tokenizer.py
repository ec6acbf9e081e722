"""Builds a tokenizer in CLIP's format from a dataset's captions and phrases.

instdiff build-tokenizer --data_dir datasets/shapes --output datasets/shapes_tokenizer
"""

import argparse
from collections.abc import Sequence

from instdiff_jax.cli.parser import command_parser, local_path
from instdiff_jax.errors import exit_on_input_error


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser("build-tokenizer", __doc__)
    parser.add_argument("--data_dir", type=local_path, required=True, help="the dataset")
    parser.add_argument("--output", type=local_path, required=True, help="the tokenizer's folder")
    parser.add_argument("--vocab_size", type=int, default=1024, help="the largest number of entries (default 1024)")
    parser.add_argument("--max_length", type=int, default=77, help="token ids per text (default 77)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    with exit_on_input_error():
        args = parse_args(argv)
        from instdiff_jax.data.build_tokenizer import dataset_texts, write_tokenizer

        entries = write_tokenizer(dataset_texts(args.data_dir), args.output, args.vocab_size, args.max_length)
        print(f"wrote {args.output}: {entries} entries")
