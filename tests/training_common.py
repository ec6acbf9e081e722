"""What the training tests share: a really small model, batches for it, and a run on this process's devices."""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np

from configs import sd15
from instdiff_jax.checkpoint.rename import flatten
from instdiff_jax.config import ModelConfig
from instdiff_jax.parallel import ParallelSettings, make_mesh
from instdiff_jax.training.settings import OptimizerSettings, TrainSettings
from instdiff_jax.training.state import RunLayout, fresh_params, init_state, make_layout


def resized(**groups) -> ModelConfig:
    """The released model with some sizes replaced."""
    config = ModelConfig.from_dict(sd15.get_config().model.to_dict())
    return dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **sizes) for name, sizes in groups.items()}
    )


def small_model() -> ModelConfig:
    """The "small" sizes of the parity data."""
    return resized(
        unet=dict(model_channels=64, num_heads=4),
        unifusion=dict(mid_dim=256),
        autoencoder=dict(ch=32, num_res_blocks=1),
        text_encoder=dict(vocab_size=1024, intermediate_size=512, num_layers=2),
    )


def tiny_model() -> ModelConfig:
    """Sizes with which a step takes milliseconds and its compilation seconds."""
    return resized(
        unet=dict(
            model_channels=32,
            channel_mult=(1, 2),
            num_res_blocks=1,
            attention_resolutions=(1,),
            num_heads=2,
            context_dim=64,
        ),
        unifusion=dict(mid_dim=64, trunk_depths=(1, 1, 1, 1), trunk_dims=(8, 8, 16, 16), map_size=64),
        autoencoder=dict(ch=32, ch_mult=(1, 1), num_res_blocks=1),
        text_encoder=dict(
            vocab_size=64, hidden_size=64, intermediate_size=64, num_layers=1, num_heads=2, max_length=8
        ),
    )


def tiny_settings(**changes) -> TrainSettings:
    """Settings for the tiny model: float32, an update in every step."""
    optimizer = OptimizerSettings(learning_rate=1e-3, warmup_steps=2, ema_decay=0.9)
    return TrainSettings(**(dict(steps=10, batch_size=8, dtype="float32", optimizer=optimizer) | changes))


def tiny_batch(step: int, size: int = 8) -> dict:
    """Pictures of 16×16, captions and groundings, a function of the step."""
    model, rng = tiny_model(), np.random.default_rng(step)
    side, width = model.unifusion.map_size, model.unet.context_dim
    valid = (np.arange(30) < rng.integers(1, 5, (size, 1))).astype(np.float32)
    counts = {"boxes": 4, "points": 2, "scribbles": 40, "mask_points": 512}
    ids = rng.integers(0, 63, (size, 8)).astype(np.int32)
    ids[:, -1] = 63
    return dict(
        image=rng.integers(0, 256, (size, 16, 16, 3)).astype(np.uint8),
        caption_ids=ids,
        grounding=dict(
            {name: rng.random((size, 30, n), np.float32) for name, n in counts.items()},
            maps=rng.integers(0, 1 << 30, (size, side, side)).astype(np.uint32),
            phrase_embeddings=rng.standard_normal((size, 30, width), np.float32),
            **{name: valid for name in ("valid", "has_box", "has_point", "has_scribble", "has_mask")},
            has_map=np.ones(size, np.float32),
        ),
    )


class Run(NamedTuple):
    """A layout on a mesh."""

    layout: RunLayout

    def start(self, seed: int = 0):
        """A fresh state and the frozen parameters."""
        trainable, frozen = fresh_params(self.layout, seed, set(flatten(self.layout.params)))
        places = self.layout.state_shardings()
        return jax.jit(init_state, out_shardings=places)(trainable), frozen


def make_run(model: ModelConfig, settings: TrainSettings, devices=None, **parallel) -> Run:
    """Lays a model out; on one device unless told otherwise."""
    parallel = ParallelSettings(**parallel)
    mesh = make_mesh(parallel, jax.devices()[:1] if devices is None else devices)
    return Run(make_layout(model, settings, parallel, mesh))
