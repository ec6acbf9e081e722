"""Finds the files of a CLIP tokenizer on this machine; the network is not used."""

import operator
from pathlib import Path
from typing import Any

from instdiff_jax.checkpoint.clip_tokenizer import clip_tokenizer
from instdiff_jax.config import TextEncoderConfig
from instdiff_jax.copies import local_copy
from instdiff_jax.errors import InputError
from instdiff_jax.files import read_json
from instdiff_jax.paths import check_regular, read_file

TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json")


def find_tokenizer(name: str, vocab_size: int | None = None) -> Path:
    """The folder of a CLIP tokenizer.

    Args:
        name: a folder (one in a bucket is copied), or a name on the hub whose files are in the hub's local cache.
            CLIP's own comes from the package if the cache does not have it.
        vocab_size: of the text encoder; the tokenizer's ids must be below it.

    Raises:
        InputError: if it is not there, is damaged, or has too many tokens for the text encoder.
    """
    where = "config.model.text_encoder.tokenizer"
    folder = local_copy(name)
    if not folder.is_dir():
        folder = _cached_tokenizer(name)
    check_regular(folder)
    vocabulary, merges, file = _read_files(folder, where)
    try:
        largest = max(map(operator.index, vocabulary.values()))
    except (ValueError, AttributeError, TypeError) as error:
        raise InputError(f"{where}: {file}: expected ids by token ({error})") from error
    if len(set(vocabulary.values())) < len(vocabulary) or min(vocabulary.values()) < 0:
        raise InputError(f"{where}: {file}: expected ids from 0 on, each for one token")
    # Without merges, every word would silently become its letters.
    if not merges and len(vocabulary) > 2 * 256 + 2:
        raise InputError(f"{where}: {file}: no merges there for {len(vocabulary)} tokens")
    if vocab_size is not None and largest >= vocab_size:
        raise InputError(f"{where}: {folder}: ids up to {largest}, but the text encoder has {vocab_size}")
    return folder


def _read_files(folder: Path, where: str) -> tuple[Any, list[Any], Path]:
    """The vocabulary, the merges, and the file that they should be in: two files, or newer transformers' single one."""
    whole = folder / TOKENIZER_FILES[4]
    missing = [file for file in TOKENIZER_FILES[:2] if not (folder / file).is_file()]
    if missing and not whole.is_file():
        raise InputError(f"{where}: {folder}: no {' and no '.join(missing)} there")
    file = whole if missing else folder / TOKENIZER_FILES[0]
    try:
        content = read_json(file)
        if missing:
            return content["model"]["vocab"], content["model"]["merges"], file
        lines = read_file(folder / TOKENIZER_FILES[1]).splitlines()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{where}: {file}: expected ids by token ({error})") from error
    merges = [line for line in lines if line and not line.startswith(b"#version")]
    return content, merges, file if merges else folder / TOKENIZER_FILES[1]


def _cached_tokenizer(name: str) -> Path:
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(name, TOKENIZER_FILES[0])
    except ValueError:  # not a possible name on the hub
        found = None
    if not isinstance(found, str):
        if name == TextEncoderConfig.tokenizer:
            return clip_tokenizer()
        raise InputError(
            f"config.model.text_encoder.tokenizer: {name}: neither a folder here nor in the hub's cache; "
            "give a folder with --config.model.text_encoder.tokenizer=DIR"
        )
    return Path(found).parent
