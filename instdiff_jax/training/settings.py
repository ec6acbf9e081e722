"""The settings of a training run, read from a config's groups `train` and `data`, with strict checks."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, Self

from instdiff_jax.config import ModelConfig, SamplingConfig, Settings
from instdiff_jax.data.examples import DataConfig
from instdiff_jax.errors import InputError
from instdiff_jax.parallel.mesh import ParallelSettings, check_pattern

Rules = tuple[tuple[str, ...], ...]

# Which parameters train: ordered (regex over "/"-joined paths, "train" or "freeze"). The first full match decides.
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
    """AdamW as in the paper's training, or Muon. `warmup_steps` counts updates; the first update has rate 0.

    "muon" moves the kernels of dense layers and convolutions by their momentum, made orthogonal; the rest by AdamW. It
    takes AdamW's learning rates. It is for small models that learn from scratch.


    `clip_norm` is the maximum global gradient norm; 0 disables clipping. "cosine" falls to 0 at the run's last step.
    """

    name: Literal["adamw", "muon"] = "adamw"
    momentum: float = 0.95
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
    """What to train, from which checkpoint, for how long, and what to write.

    Attributes:
        task: "diffusion" trains the noise prediction, "autoencoder" the autoencoder's reconstruction, "text" a text
            encoder whose pooled state contains the words.
        start: checkpoint folder to start from; empty initialises everything.
        switch_prediction: `start` may be a model that predicts ε where this one predicts v, or the other way round; it
            has to learn anew what it predicts, from the features that it has.
        trainable: a name of TRAINABLE, or ordered pairs (regex, "train" or "freeze").
        grounding: False trains on captions alone; the model then has no UniFusion and no fusers.
        masked_attention: separates instances in the fusers of the highest resolution (paper, "Instance-Masked
            Attention"), with the same values as in the sampling settings; "none" as released.
        batch_size: images per step, over all devices.
        accumulate: number of parts of each device's rows, computed one after the other.
        dtype: of the computation and the frozen parameters; trainable parameters are always float32.
        remat: what the backward pass recomputes: nothing, the inside of every block, or all but matrix products.
        loss_weight: the diffusion loss: the error of the noise, as released, or of the velocity, which gives more
            weight to high noise, so that a small model learns layouts much sooner.
        kl_weight: weight of the KL term in the autoencoder's loss.
        equivariance: weight of its loss on latents of half the size, which should decode to the picture at half the
            size (Kouzelis et al. 2025, arXiv 2502.09509): latents that keep to it are smoother.
        gates: value at which fusers begin that the starting checkpoint lacks. 0 as released; they then change nothing,
            which a base that learns with them does not need.
        max_skips: the run stops after this many updates in a row, skipped because loss or gradient is not finite.
        *_every: in steps; 0 switches it off, except `log_every` and `save_every`. `keep_every` keeps the checkpoints
            of steps divisible by it permanently.
        validation_batches: batches of fixed noise and timesteps in one validation.
        sample_layouts: folder of layouts for the sample grids; the averaged parameters generate the images.
        sample_count: layouts in a sample grid.
        wandb: project on Weights & Biases that gets the metrics too; empty for none. Needs the extra `wandb`.
        profile_start: first step of a profiler trace of `profile_steps` steps; -1 for none.
    """

    steps: int = 100_000
    batch_size: int = 512
    task: Literal["diffusion", "autoencoder", "text"] = "diffusion"
    start: str = "checkpoints/sd15_base"
    switch_prediction: bool = False
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
    equivariance: float = 0.0
    gates: float = 0.0
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
    wandb: str = ""
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
        """The config, with the name of `trainable` if it has one."""
        names = [name for name, rules in TRAINABLE.items() if rules == self.trainable]
        return super().to_config() | ({"trainable": names[0]} if names else {})

    def validate(self, where: str = "config.train") -> None:
        """Raises InputError if a value is out of range."""
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
        for name in ("loss_weight_limit", "equivariance"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{where}.{name}: expected 0 or a positive number")
        if not math.isfinite(self.gates):
            raise InputError(f"{where}.gates: expected a finite number")
        optimizer = self.optimizer
        for name in ("learning_rate", "warmup_steps", "eps", "weight_decay", "clip_norm"):
            if not 0 <= getattr(optimizer, name) < math.inf:
                raise InputError(f"{where}.optimizer.{name}: expected 0 or a positive number")
        for name in ("beta1", "beta2", "momentum"):
            if not 0 <= getattr(optimizer, name) < 1:
                raise InputError(f"{where}.optimizer.{name}: expected a number from 0 to below 1")
        if not 0 <= optimizer.ema_decay < 1:
            raise InputError(f"{where}.optimizer.ema_decay: expected a number from 0 to below 1")
        if optimizer.schedule == "cosine" and self.steps <= optimizer.warmup_steps:
            raise InputError(f"{where}.optimizer.warmup_steps: expected fewer than the run's {self.steps} steps")


@dataclasses.dataclass(frozen=True)
class DataSettings(Settings):
    """Which dataset to load, and how.

    Attributes:
        dir: the dataset's folder, made by `python -m instdiff_jax build-coco`.
        validation_split: empty for no validation.
        workers: processes that make batches; 0 uses a thread.
        prefetch: batches made ahead, by each worker and on the devices.
        cache_latents: encode every image once, save the latents beside the dataset, and train on them.
        imported_phrases: use the phrase embeddings that came with the data.
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
