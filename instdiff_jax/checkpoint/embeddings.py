"""Textual inversion: reads learned token embeddings and adds them to a text encoder (Gal et al. 2022, section 4)."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from instdiff_jax.checkpoint.rename import first_few
from instdiff_jax.checkpoint.torch_file import read_file
from instdiff_jax.errors import InputError


class Embedding(NamedTuple):
    """A file of token embeddings, and the word that stands for them; "" for the file's own."""

    path: Path
    token: str = ""

    @classmethod
    def parse(cls, value: "str | Path | tuple[str | Path, str]") -> Self:
        """From FILE, FILE:TOKEN, or a pair of both."""
        if isinstance(value, tuple):
            return cls(Path(value[0]), value[1])
        path, colon, token = str(value).rpartition(":")
        return cls(Path(path), token) if colon and not os.path.exists(value) else cls(Path(value))


def read_embedding(embedding: Embedding, width: int) -> tuple[str, np.ndarray]:
    """The word that stands for an embedding, and its vectors, float32 [count, width].

    Three layouts are read: {word: vectors}, the web UI's .pt with "string_to_param", and "emb_params".

    Raises:
        InputError: for a file that cannot be read, has no embedding or several, or one of another text encoder.
    """
    path = embedding.path
    content = read_file(path)
    word, vectors = path.stem, content.get("emb_params")
    if isinstance(content.get("string_to_param"), dict):
        content = content["string_to_param"]
        vectors = content.get("*")
    elif vectors is None and len(content) == 1:
        ((word, vectors),) = content.items()
    if not isinstance(vectors, np.ndarray) or vectors.ndim not in (1, 2):
        found = first_few([str(key) for key in content]) or "nothing"
        raise InputError(f"{path}: expected one textual inversion embedding, its keys begin with {found}")
    vectors = np.atleast_2d(vectors).astype(np.float32)
    if vectors.shape[1] != width or not np.isfinite(vectors).all():
        raise InputError(f"{path}: expected finite vectors of the text encoder's width {width}, got {vectors.shape[1]}")
    return embedding.token or str(word), vectors


def add_embeddings(
    params: Mapping[str, Any], embeddings: Sequence[Embedding]
) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """A text encoder's parameters with more rows in its token table, and the ids of each new word.

    The ids are negative: they count from the table's end. So the end token still has the highest id, by which the text
    encoder finds the end of a text.

    Raises:
        InputError: as `read_embedding`, and for a word that is given twice.
    """
    table = params["token_embedding"]["embedding"]
    rows: list[np.ndarray] = []
    words: dict[str, list[int]] = {}
    for embedding in embeddings:
        word, vectors = read_embedding(embedding, table.shape[1])
        if word in words:
            raise InputError(f"{embedding.path}: the word {word!r} is given twice; give one as FILE:TOKEN")
        words[word] = list(range(len(rows), len(rows) + len(vectors)))
        rows.extend(vectors)
    words = {word: [index - len(rows) for index in ids] for word, ids in words.items()}
    if rows:
        added = np.concatenate([np.asarray(table), np.stack(rows).astype(table.dtype)])
        table = jax.device_put(added, table.sharding) if isinstance(table, jax.Array) else jnp.asarray(added)
    return dict(params) | {"token_embedding": {"embedding": table}}, words
