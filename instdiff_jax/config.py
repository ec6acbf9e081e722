"""Typed settings, and how a command line reads a config file with overrides.

A config file under configs/ holds a `get_config()` that returns an `ml_collections.ConfigDict`. At
the edge of the program its groups become the frozen dataclasses below; nothing further in reads a
config or a flag.
"""

import dataclasses
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from absl import flags
from ml_collections import ConfigDict, config_flags

from instdiff_jax.errors import InputError

# Of every group normalisation.
GROUPS = 32
# UniFusion's, of a layout's instance maps.
NUM_MAP_TOKENS = 64


@dataclasses.dataclass(frozen=True)
class Settings:
    """Base of the dataclasses below: strict conversion from and to plain dicts."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "config") -> Self:
        """Builds the settings from a mapping; lists become tuples.

        Raises:
            InputError: for a key that nothing reads, a missing one, or a value of another type.
        """
        hints = typing.get_type_hints(cls)
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for key in values:
            if key not in fields:
                raise InputError(f"{where}.{key}: nothing reads this key; expected one of {', '.join(fields)}")
        kwargs = {}
        for name, field in fields.items():
            if name in values:
                kwargs[name] = _convert(values[name], hints[name], f"{where}.{name}")
            elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                raise InputError(f"{where}.{name}: missing")
        return cls(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON-ready values (tuples stay tuples)."""
        return dataclasses.asdict(self)


def _convert(value: Any, hint: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, type) and issubclass(hint, Settings):
        if not isinstance(value, (Mapping, ConfigDict)):
            raise InputError(f"{where}: expected a group of settings, got {value!r}")
        return hint.from_dict(value, where)
    if origin is Literal:
        if value not in args:
            raise InputError(f"{where}: expected one of {', '.join(map(str, args))}, got {value!r}")
        return value
    if origin is types.UnionType:
        if value is None and type(None) in args:
            return None
        return _convert(value, next(arg for arg in args if arg is not type(None)), where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise InputError(f"{where}: expected a list of {args[0].__name__}, got {value!r}")
        return tuple(_convert(item, args[0], f"{where}[{i}]") for i, item in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError as error:
            raise InputError(f"{where}: expected a number, got one of {len(str(abs(value)))} digits") from error
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise InputError(f"{where}: expected {hint.__name__}, got {value!r}")
    return value


@dataclasses.dataclass(frozen=True)
class UNetConfig(Settings):
    """Sizes of the UNet; attention resolutions are downsampling factors (1 is the latent grid itself).

    Stable Diffusion's UNet knows where a latent lies from the zero padding of its convolutions alone. With
    `positions` every latent is told, by the features that UniFusion makes of a point.
    """

    in_channels: int
    out_channels: int
    model_channels: int
    channel_mult: tuple[int, ...]
    num_res_blocks: int
    attention_resolutions: tuple[int, ...]
    num_heads: int
    context_dim: int
    positions: bool = False


@dataclasses.dataclass(frozen=True)
class UniFusionConfig(Settings):
    """Sizes of UniFusion; `map_size` is the side in pixels to which instance maps are resized."""

    mid_dim: int
    trunk_depths: tuple[int, ...]
    trunk_dims: tuple[int, ...]
    map_size: int


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig(Settings):
    """Sizes of the KL autoencoder; latents are posterior samples times `scale_factor`."""

    ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    z_channels: int
    scale_factor: float


@dataclasses.dataclass(frozen=True)
class TextEncoderConfig(Settings):
    """Sizes of the CLIP text encoder; `tokenizer` is a folder or a hub name."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    max_length: int
    tokenizer: str


@dataclasses.dataclass(frozen=True)
class ScheduleConfig(Settings):
    """Noise schedule: betas = linspace(√linear_start, √linear_end, timesteps)²."""

    linear_start: float
    linear_end: float
    timesteps: int


@dataclasses.dataclass(frozen=True)
class ModelConfig(Settings):
    """Every size of one model: what a checkpoint folder's config.json describes."""

    unet: UNetConfig
    unifusion: UniFusionConfig
    autoencoder: AutoencoderConfig
    text_encoder: TextEncoderConfig
    schedule: ScheduleConfig

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "config") -> Self:
        config = super().from_dict(values, where)
        config.validate(where)
        return config

    def validate(self, where: str = "config") -> None:
        """Raises InputError for sizes that no network can have (types are checked by `from_dict`)."""
        for group, settings in dataclasses.asdict(self).items():
            for name, value in settings.items():
                sizes = value if isinstance(value, tuple) else (value,)
                if isinstance(value, tuple) and not value and name != "attention_resolutions":
                    raise InputError(f"{where}.{group}.{name}: expected at least one number")
                # Numbers of blocks may be 0.
                least = 0 if name in ("num_res_blocks", "num_layers", "trunk_depths") else 1
                if any(type(size) is int and size < least for size in sizes):
                    raise InputError(f"{where}.{group}.{name}: expected at least {least}, got {value}")
        unet, text = self.unet, self.text_encoder
        levels = [mult for i, mult in enumerate(unet.channel_mult) if 2**i in unet.attention_resolutions]
        widths = {unet.model_channels * mult for mult in (*levels, unet.channel_mult[-1])}
        for group, heads, width in [("unet", unet.num_heads, width) for width in sorted(widths)] + [
            ("text_encoder", text.num_heads, text.hidden_size)
        ]:
            if width % heads:
                raise InputError(f"{where}.{group}.num_heads: expected a divisor of its {width} channels, got {heads}")
        for group, width in [("unet.model_channels", unet.model_channels), ("autoencoder.ch", self.autoencoder.ch)]:
            if width % GROUPS:
                raise InputError(f"{where}.{group}: expected a multiple of the norms' {GROUPS} groups, got {width}")
        if len(self.unifusion.trunk_depths) != len(self.unifusion.trunk_dims):
            raise InputError(f"{where}.unifusion.trunk_depths: expected as many numbers as in trunk_dims")
        features = self.unifusion.trunk_dims[-1] * (self.unifusion.map_size // 32) ** 2
        if features % NUM_MAP_TOKENS or not features:
            raise InputError(
                f"{where}.unifusion.trunk_dims, map_size: expected the last number times (map_size // 32)² to be a "
                f"multiple of {NUM_MAP_TOKENS}, got {features}"
            )
        schedule = self.schedule
        if schedule.timesteps < 2:
            raise InputError(f"{where}.schedule.timesteps: expected at least 2, got {schedule.timesteps}")
        if not 0 < schedule.linear_start <= schedule.linear_end < 1:
            raise InputError(
                f"{where}.schedule.linear_start, linear_end: expected 0 < linear_start <= linear_end < 1, got "
                f"{schedule.linear_start} and {schedule.linear_end}"
            )
        if not 0 < self.autoencoder.scale_factor < math.inf:
            raise InputError(
                f"{where}.autoencoder.scale_factor: expected a number above 0, got {self.autoencoder.scale_factor}"
            )

    @property
    def latent_stride(self) -> int:
        """Pixels per latent pixel: the autoencoder's downsampling."""
        return 2 ** (len(self.autoencoder.ch_mult) - 1)

    @property
    def canvas_stride(self) -> int:
        """Both sides of a canvas must be multiples of this many pixels."""
        return self.latent_stride * 2 ** (len(self.unet.channel_mult) - 1)


@dataclasses.dataclass(frozen=True)
class SamplingConfig(Settings):
    """How pictures are sampled; defaults are the released ones, without their negative prompt.

    `alpha` is the fraction of steps the fusers are on, or three fractions (ones, linear decay, zeros)
    that sum to 1. `mis` is the fraction of steps of the multi-instance sampler.

    Three options save work and are off by default: `guidance_interval`, the fractions of the steps between which
    there is guidance; `mis_guidance`, whether the instances' rows of the multi-instance sampler have any; and `reuse`,
    n where only every n-th evaluation computes the UNet's deep features.
    """

    steps: int = 50
    sampler: Literal["plms", "ddim", "dpm++"] = "plms"
    guidance_scale: float = 7.5
    guidance_interval: tuple[float, ...] = (0.0, 1.0)
    alpha: tuple[float, ...] = (0.75, 0.0, 0.25)
    mis: float = 0.36
    mis_guidance: bool = True
    merge: Literal["mean", "crop"] = "mean"
    negative_prompt: str = ""
    masked_attention: Literal["none", "correct", "strict", "official"] = "none"
    reuse: int = 1

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "config.sampling") -> Self:
        values = dict(values)
        alpha = values.get("alpha")
        if isinstance(alpha, (int, float)) and not isinstance(alpha, bool):
            values["alpha"] = (float(alpha), 0.0, 1.0 - float(alpha))
        settings = super().from_dict(values, where)
        settings.validate(where)
        return settings

    def validate(self, where: str = "sampling") -> None:
        """Raises InputError for a value out of its range (types are checked by `from_dict`)."""
        checks = {
            "steps": (1 <= self.steps <= 1000, "a whole number from 1 to 1000"),
            "guidance_scale": (0 <= self.guidance_scale < 1e4, "a number that is not negative"),
            "guidance_interval": (
                len(self.guidance_interval) == 2 and 0 <= self.guidance_interval[0] <= self.guidance_interval[1] <= 1,
                "two fractions of the steps from 0 to 1, the first one not above the second",
            ),
            "alpha": (
                len(self.alpha) == 3 and min(self.alpha) >= 0 and abs(sum(self.alpha) - 1) < 1e-6,
                "a fraction from 0 to 1, or three fractions that sum to 1",
            ),
            "mis": (0 <= self.mis <= 1, "a fraction from 0 to 1"),
            "reuse": (1 <= self.reuse <= 1000, "a whole number from 1 to 1000"),
        }
        for name, (ok, expected) in checks.items():
            if not ok:
                raise InputError(f"{where}.{name}: expected {expected}, got {getattr(self, name)!r}")


# Named sets of overrides for a checkpoint's sampling settings. "fast" takes about a quarter of the evaluations that the
# released settings take with instances; docs/sampling.md has the table.
PRESETS: dict[str, dict[str, Any]] = {
    "quality": {},
    "fast": dict(sampler="dpm++", steps=20, guidance_interval=(0.0, 0.8), mis_guidance=False),
}


def with_preset(preset: str | None, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A preset's settings with the overrides over them; InputError for a preset that does not exist."""
    if preset is not None and preset not in PRESETS:
        raise InputError(f"preset: expected one of {', '.join(PRESETS)}, got {preset!r}")
    return PRESETS.get(preset or "", {}) | dict(overrides)


def _check_keys(config_args: Sequence[str], message: str) -> None:
    """Raises InputError, in words, where ml_collections' message is about a key that one of the flags misspells."""
    # A KeyError's text is quoted once more, and its line break is a backslash and an n.
    quoted = re.match(r"\W*(\w+)\W*(?:n?Did you mean \W*(\w+))?", message)
    for flag in (arg.lstrip("-").split("=")[0] for arg in config_args):
        if quoted and quoted[1] in flag.split(".")[1:] and len(message) < 200:
            meant = f"; did you mean {quoted[2]}?" if quoted[2] else ""
            raise InputError(f"--{flag}: the config has no key {quoted[1]}{meant}")


def read_config(argv: Sequence[str], default: str | None) -> tuple[ConfigDict, list[str]]:
    """Reads `--config=FILE` and `--config.key=value` overrides from a command line.

    Args:
        argv: arguments without the program's name.
        default: the config file when --config is not given; looked up from the working folder, then
            beside the package.

    Returns:
        The config, and the arguments that are not about it.

    Raises:
        InputError: for a missing file, a key that the config does not have, or a value of another type.
    """
    if default is not None and not Path(default).exists():
        default = str(Path(__file__).resolve().parent.parent / default)
    values = flags.FlagValues()
    config_args, rest = [], []
    take_value = False
    for arg in argv:
        is_config = take_value or arg.lstrip("-").split("=")[0].split(".")[0] == "config" and arg.startswith("-")
        take_value = is_config and not take_value and "=" not in arg
        (config_args if is_config else rest).append(arg)
    try:
        # ml_collections looks for overrides in the arguments before absl parses them.
        config_args = ["", *config_args]
        config_flags.DEFINE_config_file("config", default=default, flag_values=values, sys_argv=config_args)
        values(config_args)
        config = values["config"].value
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, ImportError, SyntaxError) as error:
        _check_keys(config_args[1:], str(error))
        # absl quotes the whole traceback of what a config file raises: its last line is what happened.
        raise InputError(f"--config: {(str(error).strip().splitlines() or [repr(error)])[-1].strip()}") from error
    except Exception as error:  # a config file is a program, and may raise anything
        raise InputError(f"--config: {type(error).__name__}: {error}") from error
    if not isinstance(config, ConfigDict):
        named = " ".join(config_args[1:2]) or "--config"
        raise InputError(f"{named}: expected a config file, for example configs/sd15.py")
    return config, rest
