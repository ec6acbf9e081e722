"""Reads LoRA files and merges them into weights: W' = W + scale · α/r · up·down (Hu et al. 2021, section 4.1).

Three namings are read: kohya's (`lora_unet_…`, `lora_te_…`, linear layers and convolutions), diffusers' and PEFT's.
A key that belongs to no layer of the model is an error that lists it.
"""

import functools
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import numpy as np

from instdiff_jax.checkpoint.diffusers import diffusers_table
from instdiff_jax.checkpoint.rename import first_few
from instdiff_jax.checkpoint.tables import Entry, rename_table
from instdiff_jax.checkpoint.torch_file import read_file, read_metadata
from instdiff_jax.config import ModelConfig
from instdiff_jax.errors import InputError, short
from instdiff_jax.files import read_json
from instdiff_jax.tree import flatten, unflatten

# The ends of keys -> which factor it is.
_FACTOR = re.compile(
    r"(?P<module>.+?)(?:[._]lora)?[._](?:lora_)?(?:linear_layer\.)?(?P<factor>down|up|A|B)(?:\.default\w*)?\.weight"
)
_FACTORS = {"A": "down", "B": "up"}
_PREFIX = r"(base_model\.model\.|unet\.|text_encoder\.|diffusion_model\.|lora_unet_|lora_te1?_)+"
_UNSUPPORTED = (
    (r".*(dora_scale|lora_magnitude_vector).*", "DoRA"),
    (r".*\.hada_w.*", "LoHa"),
    (r".*\.lokr_w.*", "LoKr"),
    (r".*\.lora_mid\..*", "a LoCon with a third factor (lora_mid)"),
    (r".*\.(diff|diff_b)", "a file with whole differences of weights"),
)
# The last names of modules as older files of diffusers have them -> those of today.
_OLD_NAMES = (
    (r"_processor_", "_"),
    (r"(?<=attn[12]_)to_out$", "to_out_0"),
    (r"(?<=self_attn_)to_(q|k|v|out)$", r"\1_proj"),
)
_FILES = (
    "pytorch_lora_weights.safetensors",
    "adapter_model.safetensors",
    "pytorch_lora_weights.bin",
    "adapter_model.bin",
)


class Lora(NamedTuple):
    """A LoRA: its file, or the folder of one, and the factor of what it adds."""

    path: Path
    scale: float = 1.0

    @classmethod
    def parse(cls, value: "str | Path | tuple[str | Path, float]") -> Self:
        """From FILE, FILE:SCALE, or a pair of both; InputError for a scale that is no number."""
        if isinstance(value, tuple):
            path, scale = value
        else:
            path, colon, text = str(value).rpartition(":")
            if not colon or os.path.exists(value):
                path, text = str(value), "1"
            try:
                scale = float(text)
            except ValueError as error:
                raise InputError(f"lora: {value}: expected FILE or FILE:SCALE, with a number as SCALE") from error
        if not isinstance(scale, int | float) or not abs(scale) < 1e4:
            raise InputError(f"lora: {path}: expected a number as its scale, got {short(scale)}")
        return cls(Path(path), float(scale))

    @property
    def file(self) -> Path:
        """The file with the weights; InputError if there is none."""
        if not self.path.is_dir():
            return self.path
        found = next((self.path / name for name in _FILES if (self.path / name).is_file()), None)
        if found is None:
            raise InputError(f"{self.path}: no LoRA in this folder; expected one of {', '.join(_FILES)}")
        return found


def merge_loras(params: Mapping[str, Any], loras: Iterable[Lora], config: ModelConfig) -> dict[str, Any]:
    """A parameter tree with LoRAs merged into it; arrays keep their type and their place.

    Args:
        params: the tree; arrays of numpy or jax.
        loras: what to merge, all onto the same weights.
        config: the model's sizes.

    Raises:
        InputError: for a file that cannot be read, is no LoRA of this model, or is of an unsupported kind.
    """
    deltas: dict[tuple[str, ...], np.ndarray] = {}
    for lora in loras:
        for path, delta in read_lora(lora, config).items():
            deltas[path] = deltas[path] + delta if path in deltas else delta
    leaves = flatten(dict(params))
    for path, delta in deltas.items():
        leaf = leaves[path]
        merged = (np.asarray(leaf).astype(np.float32) + delta).astype(leaf.dtype)
        leaves[path] = jax.device_put(merged, leaf.sharding) if isinstance(leaf, jax.Array) else merged
    return unflatten(leaves)


def read_lora(lora: Lora, config: ModelConfig) -> dict[tuple[str, ...], np.ndarray]:
    """What a LoRA adds to each parameter, in our order of axes and float32, times its scale.

    Raises:
        InputError: as `merge_loras`.
    """
    file = lora.file
    content = read_file(file)
    content = content["state_dict"] if isinstance(content.get("state_dict"), dict) else content
    factors, alphas = _split(file, content)
    layers, unknown, deltas = _layers(config), [], {}
    default = _default_alphas(lora)
    for module, pair in factors.items():
        entry = layers.get(_plain(module))
        if entry is None:
            unknown.append(module)
            continue
        down, up = (_factor(file, module, pair, name) for name in ("down", "up"))
        rank = down.shape[0]
        alpha = alphas.get(module, default(module, rank))
        if up.ndim < 2 or down.ndim < 2 or up.shape[1] != rank or up.size != up.shape[0] * rank:
            raise InputError(f"{file}: {module}: factors of shapes {list(up.shape)} and {list(down.shape)}")
        wanted = entry.torch_shape
        delta = up.reshape(-1, rank) @ down.reshape(rank, -1)
        if (up.shape[0], down.shape[1]) != wanted[:2] or delta.size != np.prod(wanted):
            shape = [up.shape[0], *down.shape[1:]]
            raise InputError(f"{file}: {module}: a layer of shape {shape}, the model's is {list(wanted)}")
        if entry.path in deltas:
            raise InputError(f"{file}: {module}: given twice, under two names")
        deltas[entry.path] = entry.to_ours(delta.reshape(wanted)) * np.float32(lora.scale * alpha / rank)
    unknown += sorted(alphas.keys() - factors.keys())
    if unknown:
        raise InputError(f"{file}: {len(unknown)} layers that this model does not have: {first_few(unknown)}")
    return deltas


def _split(file: Path, content: Mapping[Any, Any]) -> tuple[dict[str, dict[str, Any]], dict[str, float]]:
    """The factors and the α of each module, by the module's name in the file."""
    factors: dict[str, dict[str, Any]] = {}
    alphas, strange = {}, []
    for key, value in content.items():
        for pattern, kind in _UNSUPPORTED:
            if re.fullmatch(pattern, str(key)):
                raise InputError(f"{file}: {kind} is not supported, expected a LoRA ({short(key)})")
        if str(key).endswith(".alpha"):
            module = re.sub(r"\.lora$", "", str(key).removesuffix(".alpha"))
            alphas[module] = _number(file, key, value)
        elif found := _FACTOR.fullmatch(str(key)):
            factor = found["factor"]
            factors.setdefault(found["module"], {})[_FACTORS.get(factor, factor)] = value
        else:
            strange.append(str(key))
    if not factors:
        raise InputError(f"{file}: not a LoRA; its keys begin with {first_few(strange) or 'nothing'}")
    if strange:
        raise InputError(f"{file}: {len(strange)} keys of no LoRA: {first_few(strange)}")
    return factors, alphas


def _number(file: Path, key: str, value: Any) -> float:
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind not in "fiuV" or not np.isfinite(float(array.reshape(())[()])):
        raise InputError(f"{file}: {key}: expected a number, got {short(value)}")
    return float(array.reshape(())[()])


def _factor(file: Path, module: str, pair: Mapping[str, Any], name: str) -> np.ndarray:
    if not isinstance(pair.get(name), np.ndarray):
        raise InputError(f"{file}: {module}: no {name} factor")
    array = pair[name].astype(np.float32)
    if not np.isfinite(array).all() or array.ndim < 2 or not array.size:
        raise InputError(f"{file}: {module}: {name}: expected a matrix of finite numbers, got {list(array.shape)}")
    return array


def _default_alphas(lora: Lora) -> Any:
    """A function of a module and its rank: α where no key says it, from PEFT's settings, or else the rank.

    PEFT's settings are in adapter_config.json beside the file, or in the header of diffusers' file.
    """
    groups: dict[str, Any] = {}
    beside = lora.file.parent / "adapter_config.json"
    if lora.file.stem == "adapter_model" and beside.is_file():
        groups = {"": read_json(beside)}
    elif text := read_metadata(lora.file).get("lora_adapter_metadata"):
        try:
            flat = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{lora.file}: lora_adapter_metadata: not valid JSON") from error
        for key, value in flat.items() if isinstance(flat, dict) else ():
            group, _, name = key.partition(".")
            groups.setdefault(f"{group}.", {})[name] = value

    def alpha(module: str, rank: int) -> float:
        settings = next((found for start, found in groups.items() if module.startswith(start)), {})
        inner = re.sub(f"^{_PREFIX}", "", module)
        try:
            pattern = settings.get("alpha_pattern") or {}
            value = next((a for name, a in pattern.items() if re.search(rf"(^|\.){name}$", inner)), None)
            value = settings.get("lora_alpha", rank) if value is None else value
            found = float(value) * (rank**0.5 if settings.get("use_rslora") else 1)
        except (AttributeError, TypeError, ValueError, OverflowError, re.error) as error:
            raise InputError(f"{lora.path}: lora_alpha, alpha_pattern: expected PEFT's settings ({error})") from error
        if not np.isfinite(found):
            raise InputError(f"{lora.path}: lora_alpha: expected a finite number, got {short(value)}")
        return found

    return alpha


def _plain(module: str) -> str:
    """A module's name as the layers are listed: without its network, with underscores, and up to date."""
    name = re.sub(f"^{_PREFIX}", "", module).replace(".", "_")
    for pattern, new in _OLD_NAMES:
        name = re.sub(pattern, new, name)
    return name


@functools.lru_cache(maxsize=4)
def _layers(config: ModelConfig) -> dict[str, Entry]:
    """Layers by the names that LoRA files have for them: diffusers' and the released ones, with underscores."""
    found = {}
    for part in ("model", "text_encoder"):
        released = rename_table(part, config)
        names = [(key, entry) for key, entry in released.items()]
        names += [(theirs, entry) for theirs, (_, entry) in diffusers_table(part, config).items()]
        for key, entry in names:
            if key.endswith(".weight") and entry.kind in ("linear", "conv", "pointwise"):
                name = key.removesuffix(".weight").removeprefix("transformer.")
                found[name.replace(".", "_")] = entry
                found[name.removeprefix("text_model.").replace(".", "_")] = entry
    return found
