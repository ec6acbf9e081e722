"""Settings of a model and of sampling, as frozen dataclasses.

A config file under configs/ states what differs from the defaults here; `cli.config_flags` reads it. The rest of the
package takes these dataclasses and reads no config and no flag.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from ml_collections import ConfigDict

from instdiff_jax.errors import InputError, short

# Groups of every group normalisation.
GROUPS = 32
# UniFusion's tokens for a layout's instance maps.
NUM_MAP_TOKENS = 64
# Bounds on a model's sizes: no network of use is as large, and tracing one that is would take hours.
_MOST_BLOCKS = {"num_res_blocks": 16, "num_layers": 100, "trunk_depths": 100}
_MOST, _MOST_LEVELS = 1 << 20, 8
# The released code's.
NEGATIVE_PROMPT = (
    "longbody, lowres, bad anatomy, bad hands, missing fingers, extra digit, fewer digits, cropped, "
    "worst quality, low quality"
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Base of the settings: strict conversion from and to plain dicts."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "config") -> Self:
        """Builds the settings from a mapping; lists become tuples, missing keys get their defaults.

        Raises:
            InputError: for an unknown key, or a value of the wrong type or out of range.
        """
        hints = typing.get_type_hints(cls)
        names = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in names:
                raise InputError(f"{where}.{key}: nothing reads this key; expected one of {', '.join(names)}")
        return cls(**{key: _convert(value, hints[key], f"{where}.{key}") for key, value in values.items()})

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON-ready values (tuples stay tuples)."""
        return dataclasses.asdict(self)

    def to_config(self) -> dict[str, Any]:
        """As `to_dict`, in the short forms that config files and flags use."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value.to_config() if isinstance(value, Settings) else value for name, value in values.items()}


@dataclasses.dataclass(frozen=True)
class Sizes(Settings):
    """Base of a model's sizes. A checkpoint must state every one of them, but for `NEWER`, which old ones lack."""

    NEWER: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "config") -> Self:
        """As `Settings.from_dict`; a missing size is an InputError."""
        settings = super().from_dict(values, where)
        for field in dataclasses.fields(cls):
            if field.name not in values and field.name not in cls.NEWER:
                raise InputError(f"{where}.{field.name}: missing")
        return settings


def _convert(value: Any, hint: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, type) and issubclass(hint, Settings):
        if not isinstance(value, (Mapping, ConfigDict)):
            raise InputError(f"{where}: expected a group of settings, got {short(value)}")
        return hint.from_dict(value, where)
    if origin is Literal:
        if value not in args:
            raise InputError(f"{where}: expected one of {', '.join(map(str, args))}, got {short(value)}")
        return value
    if origin is types.UnionType:
        if value is None and type(None) in args:
            return None
        return _convert(value, next(arg for arg in args if arg is not type(None)), where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise InputError(f"{where}: expected a list of {args[0].__name__}, got {short(value)}")
        return tuple(_convert(item, args[0], f"{where}[{i}]") for i, item in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError as error:
            raise InputError(f"{where}: expected a number, got one of {len(str(abs(value)))} digits") from error
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise InputError(f"{where}: expected {hint.__name__}, got {short(value)}")
    return value


@dataclasses.dataclass(frozen=True)
class UNetConfig(Sizes):
    """Sizes of the UNet. `attention_resolutions` are downsampling factors; 1 is the latent grid itself.

    Stable Diffusion's UNet knows a latent's position only from its convolutions' zero padding. With `positions`, every
    latent gets the Fourier features of its position, as UniFusion encodes a point. `sample_size` is the side of the
    latents that it was trained on, diffusers' word; 0 is that of pictures as large as the instance maps.
    """

    NEWER: ClassVar[tuple[str, ...]] = ("positions", "sample_size")

    in_channels: int = 4
    out_channels: int = 4
    model_channels: int = 320
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (1, 2, 4)
    num_heads: int = 8
    context_dim: int = 768
    positions: bool = False
    sample_size: int = 0


@dataclasses.dataclass(frozen=True)
class UniFusionConfig(Sizes):
    """Sizes of UniFusion; `map_size` is the side in pixels to which instance maps are resized."""

    mid_dim: int = 3072
    trunk_depths: tuple[int, ...] = (3, 3, 9, 3)
    trunk_dims: tuple[int, ...] = (96, 192, 384, 768)
    map_size: int = 512

    @property
    def trunk_stride(self) -> int:
        """Pixels per side of a feature of the trunk: its stem divides by 4, every further stage by 2."""
        return 4 * 2 ** (len(self.trunk_dims) - 1)

    @property
    def map_features(self) -> int:
        """Number of the trunk's features, which are split among the map tokens."""
        return self.trunk_dims[-1] * (self.map_size // self.trunk_stride) ** 2

    @property
    def map_token_dim(self) -> int:
        """Width of a map token before its MLP."""
        return self.map_features // NUM_MAP_TOKENS


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig(Sizes):
    """Sizes of the KL autoencoder; latents are posterior samples times `scale_factor`."""

    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 4
    scale_factor: float = 0.18215


@dataclasses.dataclass(frozen=True)
class TextEncoderConfig(Sizes):
    """Sizes of the CLIP text encoder; `tokenizer` is a folder or a name on the Hugging Face hub."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    max_length: int = 77
    tokenizer: str = "openai/clip-vit-large-patch14"


@dataclasses.dataclass(frozen=True)
class ScheduleConfig(Sizes):
    """Noise schedule: betas = linspace(√linear_start, √linear_end, timesteps)²; and what the UNet predicts."""

    NEWER: ClassVar[tuple[str, ...]] = ("prediction",)

    linear_start: float = 0.00085
    linear_end: float = 0.012
    timesteps: int = 1000
    prediction: Literal["epsilon", "v"] = "epsilon"


@dataclasses.dataclass(frozen=True)
class ModelConfig(Sizes):
    """All sizes of a model; the defaults are the released one's, on Stable Diffusion 1.5."""

    unet: UNetConfig = UNetConfig()
    unifusion: UniFusionConfig = UniFusionConfig()
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    text_encoder: TextEncoderConfig = TextEncoderConfig()
    schedule: ScheduleConfig = ScheduleConfig()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "config") -> Self:
        config = super().from_dict(values, where)
        config.validate(where)
        return config

    def validate(self, where: str = "config") -> None:
        """Raises InputError for sizes that no network can have; `from_dict` checks the types."""
        for group, settings in dataclasses.asdict(self).items():
            for name, value in settings.items():
                sizes = value if isinstance(value, tuple) else (value,)
                if isinstance(value, tuple) and not value and name != "attention_resolutions":
                    raise InputError(f"{where}.{group}.{name}: expected at least one number")
                # Numbers of blocks may be 0, and a side that is not given.
                least = 0 if name in _MOST_BLOCKS or name == "sample_size" else 1
                if any(type(size) is int and size < least for size in sizes):
                    raise InputError(f"{where}.{group}.{name}: expected at least {least}, got {short(value)}")
                most = _MOST_BLOCKS.get(name, _MOST)
                if len(sizes) > _MOST_LEVELS or any(type(size) is int and size > most for size in sizes):
                    limit = f"at most {_MOST_LEVELS} numbers" if len(sizes) > _MOST_LEVELS else f"at most {most}"
                    raise InputError(f"{where}.{group}.{name}: expected {limit}, got {short(value)}")
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
        features = self.unifusion.map_features
        if features % NUM_MAP_TOKENS or not features:
            raise InputError(
                f"{where}.unifusion.trunk_dims, map_size: expected the last number times "
                f"(map_size // {self.unifusion.trunk_stride})² to be a multiple of {NUM_MAP_TOKENS}, got {features}"
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
    def canvas_side(self) -> int:
        """Side in pixels of the pictures that the model was made for."""
        return self.latent_stride * self.unet.sample_size if self.unet.sample_size else self.unifusion.map_size

    @property
    def canvas_stride(self) -> int:
        """Both sides of a canvas must be multiples of this many pixels."""
        return self.latent_stride * 2 ** (len(self.unet.channel_mult) - 1)


Sampler = Literal["plms", "ddim", "dpm++", "dpm++sde", "unipc", "euler", "euler_a", "heun", "lcm", "tcd"]
Sigmas = Literal["auto", "leading", "trailing", "uniform", "karras", "exponential"]


@dataclasses.dataclass(frozen=True)
class SamplingConfig(Settings):
    """How images are sampled. The defaults are the released code's, with an empty negative prompt.

    `alpha` is the fraction of steps on which the fusers are on, or three fractions (on, linear decay, off) that sum to
    1. `mis` is the fraction of steps that the multi-instance sampler takes. `sigmas` are the noise levels of the steps;
    `auto` keeps the solver's own.

    `prompt_weights` and `long_prompts`: see sampling/prompts.py. Three options save work: `guidance_interval` gives the
    fractions of the steps between which guidance is on; `mis_guidance=False` switches it off for the multi-instance
    sampler's instance rows; `reuse=n` computes the UNet's deep features at every n-th evaluation only.
    """

    steps: int = 50
    sampler: Sampler = "plms"
    sigmas: Sigmas = "auto"
    guidance_scale: float = 7.5
    guidance_interval: tuple[float, ...] = (0.0, 1.0)
    alpha: tuple[float, ...] = (0.75, 0.0, 0.25)
    mis: float = 0.36
    mis_guidance: bool = True
    merge: Literal["mean", "crop"] = "mean"
    negative_prompt: str = ""
    prompt_weights: bool = False
    long_prompts: bool = False
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

    def to_config(self) -> dict[str, Any]:
        """`alpha` as one number where it has no decay, so that a flag can set it to another."""
        values = super().to_config()
        return values if self.alpha[1] else values | {"alpha": self.alpha[0]}

    def validate(self, where: str = "sampling") -> None:
        """Raises InputError for a value out of range; `from_dict` checks the types."""
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


@dataclasses.dataclass(frozen=True)
class CheckpointSettings(Settings):
    """What a checkpoint folder's config.json holds."""

    model: ModelConfig = ModelConfig()
    sampling: SamplingConfig = SamplingConfig()
