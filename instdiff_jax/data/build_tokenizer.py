"""A tokenizer in CLIP's format, learned from a dataset's own words.

    python -m instdiff_jax build-tokenizer --data_dir datasets/shapes --output datasets/shapes_tokenizer

For text encoders that are trained from scratch: where every caption is about coloured shapes, CLIP's 49,408 entries
would be most of the model. Writes vocab.json, merges.txt and tokenizer_config.json, as transformers' CLIPTokenizer
reads them: byte-level, lower case, so that no text is unknown; the end token has the highest id.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from instdiff_jax.data.dataset import InstanceDataset, read_meta
from instdiff_jax.errors import ArgumentParser, InputError, exit_on_input_error

START, END = "<|startoftext|>", "<|endoftext|>"
# What ends a word, as CLIP writes it.
_SUFFIX = "</w>"
# CLIP's rule for where words begin and end; digits stand alone.
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def learn_merges(texts: Iterable[str], most: int) -> list[tuple[str, str]]:
    """The merges of byte-pair encoding, the most frequent pair first; fewer than `most` where words run out."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=_SUFFIX))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        # The trainer counts the alphabet, of which it adds ends of words only where it meets them.
        vocab_size=most + 2 * len(alphabet),
        min_frequency=2,
        initial_alphabet=alphabet,
        end_of_word_suffix=_SUFFIX,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [tuple(pair) for pair in merges[:most]]


def write_tokenizer(texts: Iterable[str], output: str | Path, vocab_size: int = 1024, max_length: int = 77) -> int:
    """Learns a tokenizer and writes its folder, whole or not at all.

    Args:
        texts: the words to learn.
        output: the folder; nothing may be there.
        vocab_size: the most entries.
        max_length: ids in a row, begin and end included.

    Returns:
        How many entries it has.

    Raises:
        InputError: for a vocabulary too small to spell every byte, or a folder that is there or cannot be written.
    """
    from tokenizers import pre_tokenizers

    output = Path(output)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    spelled = [*alphabet, *(letter + _SUFFIX for letter in alphabet)]
    if vocab_size < len(spelled) + 2:
        raise InputError(f"vocab_size: expected at least {len(spelled) + 2}, which spell every byte, got {vocab_size}")
    if output.exists():
        raise InputError(f"{output}: expected nothing there")
    merges = learn_merges(texts, vocab_size - len(spelled) - 2)
    tokens = [*spelled, *("".join(pair) for pair in merges), START, END]
    # Two merges may make the same token.
    tokens = list(dict.fromkeys(tokens))
    settings = dict(
        tokenizer_class="CLIPTokenizer",
        model_max_length=max_length,
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=END,
        do_lower_case=True,
    )
    partial = output.with_name(output.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        vocabulary = {token: i for i, token in enumerate(tokens)}
        (partial / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
        lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
        (partial / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (partial / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, output)
    except OSError as error:
        raise InputError(f"{output}: cannot be written: {error.strerror or error}") from error
    return len(tokens)


def dataset_texts(data_dir: str | Path, records: int = 5000) -> Iterator[str]:
    """Every phrase of a dataset, and the captions of the first images of each split."""
    meta = read_meta(Path(data_dir))
    yield from json.loads((Path(data_dir) / "phrases.json").read_text(encoding="utf-8"))
    for split in meta["splits"]:
        dataset = InstanceDataset(data_dir, split)
        for index in range(min(records, len(dataset))):
            yield from dataset[index].captions


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: see the top of this file."""
    parser = ArgumentParser(
        prog="python -m instdiff_jax build-tokenizer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--data_dir", type=Path, required=True, help="the dataset whose words it learns")
    parser.add_argument("--output", type=Path, required=True, help="the tokenizer's folder")
    parser.add_argument("--vocab_size", type=int, default=1024, help="the most entries (default 1024)")
    parser.add_argument("--max_length", type=int, default=77, help="ids in a row (default 77)")
    with exit_on_input_error():
        args = parser.parse_args(sys.argv[1:] if argv is None else argv)
        entries = write_tokenizer(dataset_texts(args.data_dir), args.output, args.vocab_size, args.max_length)
        print(f"wrote {args.output}: {entries} entries")
