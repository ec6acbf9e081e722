"""The settings of a training run, read strictly from a config's groups `train` and `data`."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, Self

from instdiff_jax.config import ModelConfig, SamplingConfig, Settings
from instdiff_jax.data.examples import DataConfig
from instdiff_jax.errors import InputError
from instdiff_jax.parallel.mesh import ParallelSettings, check_pattern

Rules = tuple[tuple[str, ...], ...]

# Which parameters train: ordered (regex over "/"-joined paths, "train" or "freeze"), the first full match decides.
TRAINABLE: dict[str, Rules] = {
    "paper": (
        (r"unet/.*/fuser/.*", "train"),
        (r"unet/scaleu_.*", "train"),
        (r"unifusion/.*", "train"),
        (r"(unet|autoencoder|text_encoder)/.*", "freeze"),
    ),
    "all": (
        (r"(unet|unifusion)/.*", "train"),
        (r"(autoencoder|text_encoder)/.*", "freeze"),
    ),
}


@dataclasses.dataclass(frozen=True)
class OptimizerSettings(Settings):
    """AdamW as in the paper's training; `warmup_steps` counts updates, and the first has rate 0.

    `clip_norm` bounds the global gradient norm; 0 leaves gradients alone. "cosine" falls to 0 at the run's last step.
    """

    learning_rate: float = 5e-5
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 5000
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 0.0
    ema_decay: float = 0.9999


@dataclasses.dataclass(frozen=True)
class TrainSettings(Settings):
    """What to train, from where, for how long, and what to write on the way.

    Attributes:
        task: "diffusion" trains the noise prediction, "autoencoder" the autoencoder's reconstruction, "text" a text
            encoder whose pooled state holds the words.
        start: checkpoint folder to start from; empty initialises everything.
        trainable: a name of TRAINABLE, or ordered pairs (regex, "train" or "freeze").
        grounding: False trains on captions alone; UniFusion and the fusers are then not part of the model.
        masked_attention: separates instances inside the fusers of the highest resolution (paper, "Instance-Masked
            Attention"), with the same values as in the sampling settings; "none" as released.
        batch_size: images a step, over all devices.
        accumulate: parts that each device's share of a batch is taken in, one after the other.
        dtype: of the computation and of what is frozen; what trains is always kept in float32.
        remat: what the backward pass computes again: nothing, every block's inside, or all but matrix products.
        loss_weight: whose error the diffusion loss is: the noise's, as released, or the velocity's, which gives high
            noise its share and lets a small model learn layouts much sooner.
        kl_weight: weight of the KL term in the autoencoder's loss.
        max_skips: updates in a row skipped for a loss or gradient that is not finite, before the run stops.
        *_every: in steps; 0 switches it off, but for `log_every` and `save_every`. `keep_every` keeps the checkpoints
            of steps divisible by it for ever.
        validation_batches: batches of fixed noise and timesteps in one validation.
        sample_layouts: folder of layouts for the sample grids; their pictures are of the averaged parameters.
        sample_count: layouts in a sample grid.
        profile_start: first step of a profiler window of `profile_steps` steps; -1 for none.
    """

    steps: int = 100_000
    batch_size: int = 512
    task: Literal["diffusion", "autoencoder", "text"] = "diffusion"
    start: str = "checkpoints/sd15_base"
    trainable: Rules = TRAINABLE["paper"]
    grounding: bool = True
    masked_attention: Literal["none", "correct", "strict", "official"] = "none"
    accumulate: int = 1
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    remat: Literal["none", "blocks", "dots"] = "none"
    loss_weight: Literal["epsilon", "velocity"] = "epsilon"
    loss_weight_limit: float = 0.0
    kl_weight: float = 1e-6
    max_skips: int = 20
    log_every: int = 50
    save_every: int = 1000
    keep_newest: int = 3
    keep_every: int = 0
    validate_every: int = 1000
    validation_batches: int = 4
    sample_every: int = 0
    sample_layouts: str = "examples"
    sample_count: int = 4
    profile_start: int = -1
    profile_steps: int = 5
    optimizer: OptimizerSettings = OptimizerSettings()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "config.train") -> Self:
        values = dict(values)
        trainable = values.get("trainable")
        if isinstance(trainable, str):
            if trainable not in TRAINABLE:
                names = ", ".join(TRAINABLE)
                raise InputError(f"{where}.trainable: expected {names} or pairs of regex and train, got {trainable!r}")
            values["trainable"] = TRAINABLE[trainable]
        settings = super().from_dict(values, where)
        settings.validate(where)
        return settings

    def to_config(self) -> dict[str, Any]:
        """`trainable` by its name, where it has one."""
        names = [name for name, rules in TRAINABLE.items() if rules == self.trainable]
        return super().to_config() | ({"trainable": names[0]} if names else {})

    def validate(self, where: str = "config.train") -> None:
        """Raises InputError for a value out of its range."""
        for name in ("steps", "batch_size", "accumulate", "max_skips", "save_every", "keep_newest", "log_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{where}.{name}: expected a whole number of at least 1, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"{where}.seed: expected a whole number from 0 to 2^32 - 1, got {self.seed}")
        if self.validate_every and self.validation_batches < 1:
            raise InputError(f"{where}.validation_batches: expected at least 1, got {self.validation_batches}")
        for name in ("keep_every", "validate_every", "sample_every"):
            if getattr(self, name) < 0:
                raise InputError(f"{where}.{name}: expected 0 or a number of steps, got {getattr(self, name)}")
        for rule in self.trainable:
            if len(rule) != 2 or rule[1] not in ("train", "freeze"):
                raise InputError(f"{where}.trainable: expected pairs (regex, train or freeze), got {rule!r}")
            check_pattern(rule[0], f"{where}.trainable")
        if self.masked_attention != "none" and not self.grounding:
            raise InputError(f"{where}.masked_attention: expected none where {where}.grounding is False")
        if self.loss_weight_limit < 0:
            raise InputError(f"{where}.loss_weight_limit: expected 0 or a positive number")
        optimizer = self.optimizer
        for name in ("learning_rate", "warmup_steps", "eps", "weight_decay", "clip_norm"):
            if not 0 <= getattr(optimizer, name) < math.inf:
                raise InputError(f"{where}.optimizer.{name}: expected 0 or a positive number")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(optimizer, name) < 1:
                raise InputError(f"{where}.optimizer.{name}: expected a number from 0 to below 1")
        if not 0 <= optimizer.ema_decay < 1:
            raise InputError(f"{where}.optimizer.ema_decay: expected a number from 0 to below 1")
        if optimizer.schedule == "cosine" and self.steps <= optimizer.warmup_steps:
            raise InputError(f"{where}.optimizer.warmup_steps: expected fewer than the run's {self.steps} steps")


@dataclasses.dataclass(frozen=True)
class DataSettings(Settings):
    """Which dataset, and how it is loaded.

    Attributes:
        dir: the dataset's folder, as `python -m instdiff_jax build-coco` makes it.
        validation_split: empty for no validation.
        workers: processes that make batches; 0 makes them in a thread.
        prefetch: batches made ahead, by each worker and on the devices.
        cache_latents: encode every image once, beside the dataset, and train on that.
        imported_phrases: take the phrase embeddings that came with the data.
        examples: how records become examples.
    """

    dir: str = "datasets/coco"
    train_split: str = "train"
    validation_split: str = "val"
    workers: int = 0
    prefetch: int = 2
    cache_latents: bool = False
    imported_phrases: bool = False
    examples: DataConfig = DataConfig()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "config.data") -> Self:
        settings = super().from_dict(values, where)
        for name, least in (("workers", 0), ("prefetch", 1)):
            if getattr(settings, name) < least:
                raise InputError(f"{where}.{name}: expected at least {least}, got {getattr(settings, name)}")
        settings.examples.validate(f"{where}.examples")
        return settings


@dataclasses.dataclass(frozen=True)
class RunSettings(Settings):
    """All settings of a run: the groups of its config."""

    model: ModelConfig = ModelConfig()
    sampling: SamplingConfig = SamplingConfig()
    data: DataSettings = DataSettings()
    train: TrainSettings = TrainSettings()
    parallel: ParallelSettings = ParallelSettings()
