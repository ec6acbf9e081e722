"""What the training tests share: a really small model, batches for it, and a run on this process's devices."""

import dataclasses
import io
from typing import NamedTuple

import jax
import numpy as np
from PIL import Image

from common import PARITY, make_array
from instdiff_jax.checkpoint.folder import save_folder
from instdiff_jax.checkpoint.shapes import parameter_shapes
from instdiff_jax.config import ModelConfig, SamplingConfig
from instdiff_jax.data.dataset import AnnotatedInstance, Record
from instdiff_jax.data.report import Report
from instdiff_jax.data.write import write_dataset
from instdiff_jax.parallel.mesh import ParallelSettings, make_mesh
from instdiff_jax.training.settings import OptimizerSettings, TrainSettings
from instdiff_jax.training.state import ShardingPlan, init_state, make_sharding_plan
from instdiff_jax.tree import flatten, unflatten


def resized(**groups) -> ModelConfig:
    """The released model with some sizes replaced."""
    config = ModelConfig()
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
    """Sizes with which a step takes milliseconds and its compilation seconds: one transformer block, in the middle."""
    return resized(
        unet=dict(
            model_channels=32,
            channel_mult=(1, 2),
            num_res_blocks=1,
            attention_resolutions=(),
            num_heads=2,
            context_dim=64,
        ),
        unifusion=dict(mid_dim=64, trunk_depths=(1, 1, 1, 1), trunk_dims=(8, 8, 16, 16), map_size=64),
        autoencoder=dict(ch=32, ch_mult=(1, 1), num_res_blocks=1),
        text_encoder=dict(
            vocab_size=1024,
            hidden_size=64,
            intermediate_size=64,
            num_layers=1,
            num_heads=2,
            max_length=16,
            tokenizer=str(PARITY / "tokenizer"),
        ),
    )


def tiny_settings(**changes) -> TrainSettings:
    """Settings for the tiny model: float32, an update in every step."""
    optimizer = OptimizerSettings(learning_rate=1e-3, warmup_steps=2, ema_decay=0.9)
    return TrainSettings(**(dict(steps=10, batch_size=8, start="", dtype="float32", optimizer=optimizer) | changes))


def tiny_batch(step: int, size: int = 8, pictures: bool = False) -> dict:
    """Encoded 16×16 pictures (or the pictures), captions and groundings, a function of the step."""
    model, rng = tiny_model(), np.random.default_rng(step)
    side, width = model.unifusion.map_size, model.unet.context_dim
    valid = (np.arange(30) < rng.integers(1, 5, (size, 1))).astype(np.float32)
    counts = {"boxes": 4, "points": 2, "scribbles": 40, "mask_points": 512}
    ids = rng.integers(0, 1022, (size, 16)).astype(np.int32)
    ids[:, -1] = 1023
    mean, logvar = rng.standard_normal((2, size, 8, 8, 4), np.float32)
    encoded = dict(latent_mean=4 * mean, latent_logvar=logvar - 6)
    image = dict(image=rng.integers(0, 256, (size, 16, 16, 3)).astype(np.uint8))
    return (image if pictures else encoded) | dict(
        caption_ids=ids,
        grounding=dict(
            {name: rng.random((size, 30, n), np.float32) for name, n in counts.items()},
            maps=rng.integers(0, 1 << 30, (size, side, side)).astype(np.uint32),
            phrase_embeddings=rng.standard_normal((size, 30, width), np.float32),
            **{name: valid for name in ("valid", "has_box", "has_point", "has_scribble", "has_mask")},
            has_map=np.ones(size, np.float32),
        ),
    )


def numpy_params(shapes: dict) -> dict:
    """Deterministic float32 parameters made on the host: nothing to compile, the same on any mesh."""
    leaves = {}
    for path, leaf in flatten(shapes).items():
        shape = leaf if isinstance(leaf, tuple) else leaf.shape
        # Gates and ScaleU are scalars and vectors: away from zero, so that every gradient is.
        leaves[path] = make_array("/".join(path).replace("/scale", "/weight"), shape)
        if len(shape) >= 2:
            leaves[path] *= np.sqrt(np.prod(shape[1:]) / np.prod(shape[:-1]))
    return unflatten(leaves)


def save_start(folder, absent: tuple[str, ...] = ()) -> None:
    """Writes a checkpoint folder with the tiny model."""
    model = tiny_model()
    params = numpy_params(parameter_shapes(model, absent))
    save_folder(folder, params, model, SamplingConfig(), PARITY / "tokenizer", absent)


def save_dataset(folder, images: int = 12) -> None:
    """Writes a dataset of noise with one or two instances an image; the split val has four images."""

    def record(i: int) -> Record:
        rng, file = np.random.default_rng(i), io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (20, 24, 3)).astype(np.uint8)).save(file, "PNG")
        instances = tuple(
            AnnotatedInstance(box=(2.0 + 3 * k, 2.0, 12.0, 14.0), category=("cat", "dog")[k], annotation_id=10 * i + k)
            for k in range(1 + i % 2)
        )
        return Record(file.getvalue(), 24, 20, i, f"{i}.png", (f"a scene {i}",), instances)

    sizes = {"train": images, "val": 4}
    splits = {name: (count, [record(i) for i in range(count)]) for name, count in sizes.items()}
    write_dataset(folder, splits, Report(), source="tests")


class Run(NamedTuple):
    """A plan on a mesh."""

    plan: ShardingPlan

    def start(self):
        """A state and the frozen parameters, made on the host."""
        params = flatten(numpy_params(self.plan.params))
        places = self.plan.state_shardings()
        halves = []
        for half, where in (
            (self.plan.trainable, places.params),
            (self.plan.frozen, self.plan.frozen_shardings()),
        ):
            where = flatten(where)
            leaves = {path: put(params[path].astype(leaf.dtype), where[path]) for path, leaf in flatten(half).items()}
            halves.append(unflatten(leaves))
        return jax.jit(init_state, out_shardings=places)(halves[0]), halves[1]


def put(array: np.ndarray, sharding) -> jax.Array:
    """A global array of which every process holds its part."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def make_run(model: ModelConfig, settings: TrainSettings, devices=None, **parallel) -> Run:
    """Lays a model out; on one device unless told otherwise."""
    parallel = ParallelSettings(**parallel)
    mesh = make_mesh(parallel, jax.devices()[:1] if devices is None else devices)
    return Run(make_sharding_plan(model, settings, parallel, mesh))
