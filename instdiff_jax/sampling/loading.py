"""Opens a checkpoint folder or a training run for sampling; the type that networks compute in."""

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from instdiff_jax.buckets import as_path, files_below
from instdiff_jax.checkpoint.embeddings import Embedding, add_embeddings
from instdiff_jax.checkpoint.folder import has_checksums, read_config, restore_params
from instdiff_jax.checkpoint.lora import Lora, merge_loras
from instdiff_jax.checkpoint.run import absent_groups, intact_step, load_run, run_tokenizer
from instdiff_jax.checkpoint.verify import file_crcs
from instdiff_jax.config import ModelConfig, SamplingConfig
from instdiff_jax.copies import local_copy
from instdiff_jax.errors import InputError
from instdiff_jax.models.tokenizer import Tokenizer

# What networks compute in, by name. With int8 and fp8 the UNet's products are in 8 bits, and the rest is bfloat16.
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
DTYPES |= dict.fromkeys(("int8", "fp8"), jnp.bfloat16)


class Model(NamedTuple):
    """A model ready to sample: sizes, sampling settings, parameter trees of all four networks, tokenizer."""

    config: ModelConfig
    sampling: SamplingConfig
    params: dict[str, Any]
    tokenizer: Tokenizer


class Process:
    """The process that made it: one forked from it lacks jax's threads, and would wait for them forever."""

    def __init__(self):
        self._number = os.getpid()

    def check(self) -> None:
        """Raises InputError in another process."""
        if os.getpid() != self._number:
            raise InputError("Pipeline: made before a fork; make it in the process that uses it, or spawn processes")


def choose_dtype(dtype: str | None = None) -> str:
    """The name of the type that the networks compute in: the given one, or the platform's default.

    The default is float32 on CPUs and bfloat16 on GPUs and TPUs.

    Raises:
        InputError: for a type that is not supported.
    """
    if dtype is None:
        return "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if dtype not in DTYPES:
        raise InputError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    return dtype


def load_model(
    directory: str | Path,
    dtype: Any,
    sharding: jax.sharding.Sharding | None = None,
    verify: bool = True,
    loras: Sequence[Lora] = (),
    embeddings: Sequence[Embedding] = (),
) -> Model:
    """Loads a checkpoint folder, or the averaged parameters of a training run's newest checkpoint.

    Args:
        directory: the folder.
        dtype: of leaves with two axes or more; vectors, scalars and the autoencoder are float32.
        sharding: where the parameters go; None for the default device.
        verify: compare what is read with its checksums.
        loras: merged into the weights.
        embeddings: of words that the tokenizer gets to know.

    Raises:
        InputError: if the folder is neither, is damaged, or has no adapters to sample with, and for a LoRA or an
            embedding that is not this model's.
    """
    directory = as_path(directory)
    if (directory / "checkpoints").is_dir():
        model = _load_run(directory, dtype, sharding, verify)
    else:
        model = _load_folder(directory, dtype, sharding, verify)
    if loras:
        model = model._replace(params=merge_loras(model.params, loras, model.config))
    return with_embeddings(model, embeddings) if embeddings else model


def with_embeddings(model: Model, embeddings: Sequence[Embedding]) -> Model:
    """The model with more words, see `add_embeddings`."""
    encoder, words = add_embeddings(model.params["text_encoder"], embeddings)
    rows = encoder["token_embedding"]["embedding"].shape[0]
    text = dataclasses.replace(model.config.text_encoder, vocab_size=rows)
    return Model(
        dataclasses.replace(model.config, text_encoder=text),
        model.sampling,
        model.params | {"text_encoder": encoder},
        model.tokenizer.with_words(words),
    )


def _load_folder(directory: Path, dtype: Any, sharding: jax.sharding.Sharding | None, verify: bool) -> Model:
    config, sampling, absent = read_config(directory)
    _check_complete(directory, absent)
    tokenizer = _open_tokenizer(config, config.text_encoder.tokenizer)
    params = restore_params(directory, ("unet", "unifusion", "text_encoder"), dtype, sharding, verify=verify)
    params |= restore_params(directory, ("autoencoder",), jnp.float32, sharding, verify=verify)
    return Model(config, sampling, params, tokenizer)


def _load_run(workdir: Path, dtype: Any, sharding: jax.sharding.Sharding | None, verify: bool) -> Model:
    name = run_tokenizer(workdir)
    config, sampling, params, _ = load_run(workdir, verify=verify)
    _check_complete(workdir, absent_groups(params))
    for part, tree in params.items():
        if part != "autoencoder":
            params[part] = jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.ndim >= 2 else leaf, tree)
    if sharding is not None:
        params = jax.device_put(params, sharding)
    return Model(config, sampling, params, _open_tokenizer(config, name))


def _check_complete(directory: Path, absent: tuple[str, ...]) -> None:
    if absent:
        raise InputError(f"{directory}: cannot sample: {', '.join(absent)} absent; train or convert with them")


def _open_tokenizer(config: ModelConfig, name: str | Path) -> Tokenizer:
    return Tokenizer(local_copy(name), config.text_encoder.vocab_size, config.text_encoder.max_length)


def checkpoint_fingerprint(directory: Path, verify: bool = True) -> str:
    """A hash that tells a checkpoint, or a training run's newest intact step, from another one in the same folder.

    With `verify`, config.json's checksums stand for the files, which loading compares with them. Without it, and where
    there are none, the files are read as a whole.

    Raises:
        InputError: if the folder is neither.
    """
    try:
        digest = hashlib.sha256((directory / "config.json").read_bytes())
        names: list[Any] = []
        if (directory / "checkpoints").is_dir():
            # The step's facts hold a checksum of every array: a run trained again is another model.
            step = intact_step(directory, verify)
            names = [step, *_crcs(directory / "checkpoints" / str(step) / "facts")]
        elif not (verify and has_checksums(directory)):
            names = [*_crcs(directory / "params"), *_crcs(directory / "tokenizer")]
    except OSError as error:
        raise InputError(f"{directory}: not a checkpoint folder: {error.strerror or error}") from error
    digest.update("\n".join(map(str, names)).encode())
    return digest.hexdigest()[:32]


def _crcs(folder: Path) -> list[tuple[str, int]]:
    """Names and checksums of a folder's files; orbax's own notes, which start with "_", say when they were written."""
    names = files_below(folder)
    return sorted(file_crcs(folder, [name for name in names if not Path(name).name.startswith("_")]).items())


def addon_fingerprints(
    loras: Sequence[Lora] = (), embeddings: Sequence[Embedding] = ()
) -> dict[str, list[dict[str, Any]]]:
    """What was added to a checkpoint, for a record: files, scales, words, and a hash of each file; {} without any.

    Raises:
        InputError: for a file that is not there.
    """
    try:
        found: dict[str, list[dict[str, Any]]] = {
            "loras": [{"file": str(lora.path), "scale": lora.scale, "fingerprint": _hash(lora.file)} for lora in loras],
            "embeddings": [
                {"file": str(entry.path), "token": entry.token, "fingerprint": _hash(entry.path)}
                for entry in embeddings
            ],
        }
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read: {error.strerror or error}") from error
    return {name: entries for name, entries in found.items() if entries}


def file_fingerprint(path: Path) -> str:
    """A hash of a file, or of the weights in a folder; InputError if it cannot be read."""
    files = sorted(path.glob("*.safetensors")) + sorted(path.glob("*.bin")) if path.is_dir() else [path]
    try:
        hashes = [_hash(file) for file in files]
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read: {error.strerror or error}") from error
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()[:32]


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]
