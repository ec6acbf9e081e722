"""Learns a tokenizer in CLIP's format from a dataset's captions and phrases.

For text encoders trained from scratch on a small world, where CLIP's 49,408 embeddings would be most of the model.
Writes vocab.json, merges.txt and tokenizer_config.json for transformers' CLIPTokenizer: byte-level and lower case, so
that no text is unknown. The end token has the highest id.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from instdiff_jax.checkpoint.clip_tokenizer import END, START, SUFFIX, write_tokenizer_files
from instdiff_jax.data.dataset import InstanceDataset, read_meta
from instdiff_jax.data.phrases import read_phrases
from instdiff_jax.errors import InputError
from instdiff_jax.files import replace_folder

# CLIP's word pattern; each digit is a word.
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def learn_merges(texts: Iterable[str], most: int) -> list[tuple[str, str]]:
    """The merges of byte-pair encoding, the most frequent pair first; at most `most`."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=SUFFIX))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        # The trainer counts the alphabet too, and adds word-final letters only if it meets them.
        vocab_size=most + 2 * len(alphabet),
        min_frequency=2,
        initial_alphabet=alphabet,
        end_of_word_suffix=SUFFIX,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [tuple(pair) for pair in merges[:most]]


def write_tokenizer(texts: Iterable[str], output: str | Path, vocab_size: int = 1024, max_length: int = 77) -> int:
    """Learns a tokenizer and writes its folder.

    Args:
        texts: what it learns from.
        output: the folder, which must not exist.
        vocab_size: the largest number of entries.
        max_length: token ids per text, start and end included.

    Returns:
        The number of entries.

    Raises:
        InputError: if the vocabulary is too small to spell every byte, or the folder exists or cannot be written.
    """
    from tokenizers import pre_tokenizers

    output = Path(output)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    spelled = [*alphabet, *(letter + SUFFIX for letter in alphabet)]
    if vocab_size < len(spelled) + 2:
        raise InputError(f"vocab_size: expected at least {len(spelled) + 2}, which spell every byte, got {vocab_size}")
    if output.exists():
        raise InputError(f"{output}: expected nothing there")
    merges = learn_merges(texts, vocab_size - len(spelled) - 2)
    tokens = [*spelled, *("".join(pair) for pair in merges), START, END]
    # Two merges can give the same token.
    tokens = list(dict.fromkeys(tokens))
    with replace_folder(output) as folder:
        write_tokenizer_files(folder, tokens, merges, max_length)
    return len(tokens)


def dataset_texts(data_dir: str | Path, records: int = 5000) -> Iterator[str]:
    """All phrases of a dataset, and the captions of each split's first images."""
    meta = read_meta(Path(data_dir))
    yield from read_phrases(data_dir)
    for split in meta["splits"]:
        dataset = InstanceDataset(data_dir, split)
        for index in range(min(records, len(dataset))):
            yield from dataset[index].captions
