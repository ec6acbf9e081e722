"""CLIP's own tokenizer, unpacked from the merges in the package.

`clip/bpe_simple_vocab_16e6.txt.gz` is a file of OpenAI's CLIP (https://github.com/openai/CLIP) under the MIT licence in
`clip/LICENSE`. The vocabulary follows from it: the 256 bytes inside a word, the same at a word's end, one entry per
merge, start and end.
"""

import functools
import gzip
import tempfile
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path

from instdiff_jax.files import write_json, write_text

START, END = "<|startoftext|>", "<|endoftext|>"
# CLIP's mark of the end of a word.
SUFFIX = "</w>"
_ENTRIES = 49408


def write_tokenizer_files(
    folder: Path, tokens: Iterable[str], merges: Iterable[Sequence[str]], max_length: int = 77
) -> None:
    """Writes vocab.json, merges.txt and tokenizer_config.json for transformers' CLIPTokenizer.

    Args:
        folder: an existing folder.
        tokens: the vocabulary in the order of its ids.
        merges: pairs of tokens, the first to merge first.
        max_length: ids of a text, start and end included.
    """
    settings = dict(
        tokenizer_class="CLIPTokenizer",
        model_max_length=max_length,
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=END,
        do_lower_case=True,
    )
    write_json(folder / "vocab.json", {token: i for i, token in enumerate(tokens)}, indent=None)
    write_text(folder / "merges.txt", "\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]) + "\n")
    write_json(folder / "tokenizer_config.json", settings)


def clip_tokenizer() -> Path:
    """A folder with CLIP's tokenizer; it is removed when the process ends."""
    return Path(_unpacked().name)


@functools.cache
def _unpacked() -> tempfile.TemporaryDirectory:
    packed = resources.files("instdiff_jax").joinpath("checkpoint", "clip", "bpe_simple_vocab_16e6.txt.gz")
    lines = gzip.decompress(packed.read_bytes()).decode("utf-8").splitlines()
    letters = _byte_letters()
    # The file has more merges than CLIP uses; the first line is its version.
    merges = [line.split() for line in lines[1 : _ENTRIES - 2 * len(letters) - 2 + 1]]
    words = [letter + SUFFIX for letter in letters]
    folder = tempfile.TemporaryDirectory(prefix="instdiff-clip-")
    write_tokenizer_files(Path(folder.name), [*letters, *words, *map("".join, merges), START, END], merges)
    return folder


def _byte_letters() -> list[str]:
    """A visible letter for each byte, in CLIP's order: those that are visible in Latin-1, then substitutes."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [*map(chr, visible), *(chr(256 + i) for i in range(256 - len(visible)))]
