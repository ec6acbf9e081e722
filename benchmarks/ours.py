"""Our side of the benchmarks; runs in a worker process."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.kernels import find_kernels
from benchmarks.models import TOKENIZER, Model, make_layout, make_params, random_grounding
from benchmarks.parts import record_layers, time_layers
from benchmarks.processes import HostMemory, seconds
from common import grounding_arrays
from instdiff_jax import grounding as groundings
from instdiff_jax.analysis.flops import count_flops
from instdiff_jax.config import SamplingConfig
from instdiff_jax.diffusion.plan import SamplerSettings, SamplingPlan, make_plan
from instdiff_jax.diffusion.rows import ImageRows
from instdiff_jax.diffusion.solvers import solver_table
from instdiff_jax.models.clip_text import CLIPTextEncoder
from instdiff_jax.models.layers import Dense
from instdiff_jax.models.tokenizer import Tokenizer
from instdiff_jax.models.unet import UNet
from instdiff_jax.models.unifusion import UniFusion
from instdiff_jax.parallel.mesh import ParallelSettings, make_mesh
from instdiff_jax.parallel.runtime import spare_compiler_memory
from instdiff_jax.sampling.loading import DTYPES
from instdiff_jax.sampling.pipeline import Pipeline
from instdiff_jax.sampling.programs import NoisePredictor
from instdiff_jax.sampling.start import initial_noise
from instdiff_jax.training.settings import TrainSettings
from instdiff_jax.training.state import init_state, make_sharding_plan, split_params
from instdiff_jax.training.step import compile_step, make_train_step


class Ours:
    """The pipeline and its UNet in one dtype."""

    def __init__(self, model: Model, dtype: str, cached: bool = False):
        spare_compiler_memory()
        jax.config.update("jax_enable_compilation_cache", cached)  # off where compile time is measured
        jax.config.update("jax_default_matmul_precision", "highest" if dtype == "float32" else "default")
        self.model, self.dtype, self._memory = model, dtype, HostMemory()
        self._unet, self._unifusion = (
            UNet(model.config.unet, DTYPES[dtype]),
            UniFusion(model.config.unifusion, model.config.unet.context_dim, DTYPES[dtype]),
        )
        if model.folder is None:
            text = model.config.text_encoder
            self._params = make_params(model.config, DTYPES[dtype])
            self._tokenizer = Tokenizer(TOKENIZER, text.vocab_size, text.max_length)
            self._pipeline = Pipeline(model.config, SamplingConfig(), self._params, self._tokenizer, dtype)
        else:
            from instdiff_jax.sampling.loading import load_model

            loaded = load_model(model.folder, DTYPES[dtype])
            self._params, self._tokenizer = loaded.params, loaded.tokenizer
            self._pipeline = Pipeline(*loaded, dtype)

    # ------------------------------------------------------------ sampling

    def sample(self, images: int, instances: int, mis: float, steps: int, alpha: float, **others: Any) -> float:
        """Seconds from a layout to the pixels of all its images; a preset comes with its own settings."""
        layout = make_layout(instances, self.model.canvas)
        settings = dict(steps=steps, mis=mis, alpha=alpha, sampler="plms", guidance_scale=7.5)
        settings = others if "preset" in others else settings | others
        return seconds(lambda: self._pipeline([layout], seeds=range(images), **settings))

    def compile_seconds(self, function: str, *args: Any) -> float:
        """Seconds that the first call of a timed method takes longer than the second: tracing and compiling."""
        method = getattr(self, function)
        return max(method(*args) - method(*args), 0.0)

    def warm_up(self, instances: int, mis: float, steps: int, alpha: float) -> int:
        """The smallest number of steps, at least 4, that runs all programs of a job with `steps` steps."""

        def programs(count: int) -> set:
            return {piece._replace(start=0, stop=0) for piece in self._plan(instances, mis, count, alpha).pieces}

        return next((count for count in range(4, steps) if programs(count) == programs(steps)), steps)

    def evaluations(self, instances: int, mis: float, steps: int, alpha: float) -> tuple[int, int]:
        """UNet evaluations of single latents for an image, guidance included: with fusers, and without."""
        plan, image = self._plan(instances, mis, steps, alpha), [ImageRows(0, 0, tuple(range(instances)))]
        with_fusers = tuple(piece for piece in plan.pieces if piece.use_fusers)
        fused = dataclasses.replace(plan, pieces=with_fusers).evaluations(image)
        return fused, plan.evaluations(image) - fused

    def _plan(self, instances: int, mis: float, steps: int, alpha: float) -> SamplingPlan:
        table = solver_table("plms", steps, self.model.config.schedule, (alpha, 0.0, 1.0 - alpha))
        return make_plan(table, SamplerSettings(mis_steps=int(table.steps * mis) if instances else 0))

    # ------------------------------------------------------------ UNet

    def flops(self, fusers: bool) -> int:
        """FLOPs of one UNet evaluation of one latent, given the conditions."""
        alpha = 1.0 if fusers else None
        return count_flops(NoisePredictor(self._unet), self._params["unet"], *self._unet_shapes(1), alpha)

    def prepare_forward(self, inputs: dict[str, np.ndarray], grounding: dict[str, np.ndarray]) -> None:
        """Prepares the evaluation that `time_forward` times."""
        use_maps = bool(grounding["has_map"].any())

        @jax.jit
        def condition(params, grounding, context):
            tokens = self._unifusion.apply({"params": params["unifusion"]}, grounding, use_maps)
            return self._unet.apply({"params": params["unet"]}, context, tokens, method="condition")

        conditions = condition(self._params, grounding, inputs["context"])
        predict = jax.jit(NoisePredictor(self._unet))
        given = jax.device_put((inputs["latents"], inputs["timesteps"]))
        self._forward = functools.partial(predict, self._params["unet"], *given, conditions)

    def output(self) -> np.ndarray:
        """The output of the prepared evaluation, with fusers."""
        return np.asarray(self._forward(1.0))

    def time_forward(self, fusers: bool = True) -> float:
        """Seconds of the prepared evaluation, with or without fusers."""
        alpha = 1.0 if fusers else None
        return seconds(lambda: jax.block_until_ready(self._forward(alpha)))

    def kernels(self, top: int = 15) -> dict[str, Any]:
        """The kernels of the prepared evaluation that take longest; see kernels.py."""
        self.time_forward()
        return find_kernels(self.time_forward, top)

    def parts(self) -> dict[str, float]:
        """Seconds of the prepared evaluation by kind of layer, each timed alone; see parts.py."""
        params, *given = self._forward.args
        bound = NoisePredictor(self._unet)
        taken = time_layers(record_layers(lambda: bound(params, *given, 1.0)))
        whole = min(self.time_forward() for _ in range(3))
        return taken | {"rest, less what fusing saves": whole - sum(taken.values())}

    def image_parts(self, instances: int, steps: int = 50, mis: float = 0.36, alpha: float = 0.8) -> dict[str, float]:
        """Seconds of one image by network; the UNet's is computed from the prepared evaluation's."""
        config, layout = self.model.config, make_layout(instances, self.model.canvas)
        texts = 2 + 2 * instances  # prompts, phrases, the negative prompt
        ids = jnp.zeros((4, config.text_encoder.max_length), jnp.int32)
        encoder = CLIPTextEncoder(config.text_encoder, DTYPES[self.dtype])
        encode = jax.jit(lambda params, ids: encoder.apply({"params": params}, ids))
        context = encode(self._params["text_encoder"], ids)[0]
        grounding = groundings.stack([groundings.make_grounding(layout, config)] * 4)
        grounding.pop("maps")

        @jax.jit
        def condition(params, grounding, context):
            tokens = self._unifusion.apply({"params": params["unifusion"]}, grounding, False)
            return self._unet.apply({"params": params["unet"]}, context, tokens, method="condition")

        def host() -> None:
            self._tokenizer.encode_prompts([layout.caption] * texts)
            groundings.instance_groundings(groundings.make_grounding(layout, config))
            solver_table("plms", steps, config.schedule, (alpha, 0.0, 1.0 - alpha))
            initial_noise(0, (side, side, config.autoencoder.z_channels))

        def best(run: Callable[[], Any]) -> float:
            run()
            return min(seconds(run) for _ in range(3))

        side = self.model.canvas // config.latent_stride
        latents = jnp.zeros((1, side, side, config.autoencoder.z_channels))
        rows = len(self._forward.args[1])
        counts = self.evaluations(instances, mis, steps, alpha)
        chunks = -(-texts // 4), -(-(2 + instances) // 4)  # the pipeline encodes four at a time
        self.time_forward(False)
        return {
            "UNet": sum(n * self.time_forward(on) / rows for n, on in zip(counts, (True, False), strict=True)),
            "autoencoder": best(lambda: self._pipeline.decode(latents)),
            "text encoder": chunks[0] * best(lambda: jax.block_until_ready(encode(self._params["text_encoder"], ids))),
            "UniFusion, keys and values": chunks[1]
            * best(lambda: jax.block_until_ready(condition(self._params, grounding, context))),
            "host": best(host),
        }

    def _unet_shapes(self, rows: int) -> tuple:
        config, side = self.model.config, self.model.canvas // self.model.config.latent_stride
        width, length = config.unet.context_dim, config.text_encoder.max_length

        def condition(params):
            context, tokens = jnp.zeros((rows, length, width)), jnp.zeros((rows, 184, width))
            return self._unet.apply({"params": params}, context, tokens, method="condition")

        latents = jax.ShapeDtypeStruct((rows, side, side, config.unet.in_channels), jnp.float32)
        times = jax.ShapeDtypeStruct((rows,), jnp.int32)
        return latents, times, jax.eval_shape(condition, self._params["unet"])

    # ------------------------------------------------------------ training

    def prepare_training(self, batch: int, remat: str = "none") -> None:
        """Prepares the paper's training step on precomputed latents and text; the first call compiles it."""
        config, rng = self.model.config, np.random.default_rng(0)
        settings = TrainSettings(steps=100, batch_size=batch, dtype=self.dtype, remat=remat)
        mesh = make_mesh(ParallelSettings(), jax.devices()[:1])
        plan = make_sharding_plan(config, settings, ParallelSettings(), mesh)
        trainable, frozen = split_params(self._params, settings)
        state = init_state(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), trainable))
        frozen = jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), frozen, plan.frozen)
        side, width = self.model.canvas // config.latent_stride, config.unet.context_dim
        given = random_grounding(6, rng, width, config.unifusion.map_size)
        grounding = {key: value.repeat(batch, 0) for key, value in grounding_arrays(given).items()}
        arrays = dict(
            latents=rng.standard_normal((batch, side, side, config.unet.in_channels), np.float32),
            context=rng.standard_normal((batch, config.text_encoder.max_length, width), np.float32),
            grounding=grounding,
        )
        self._state = jax.device_put(state, plan.state_shardings())
        self._batch = jax.device_put(frozen, plan.frozen_shardings()), jax.device_put(arrays)
        step = make_train_step(config, settings, plan)
        self._train_flops = count_flops(step, self._state, *self._batch)
        self._step = compile_step(step, plan)

    def train(self) -> float:
        """Seconds of one training step: loss, gradients, AdamW, moving average."""

        def step() -> None:
            self._state, metrics = self._step(self._state, *self._batch)
            jax.block_until_ready((self._state, metrics))

        return seconds(step)

    def train_flops(self) -> int:
        """FLOPs of a step, including recomputation."""
        return self._train_flops

    # ------------------------------------------------------------ machine

    def matmul_rate(self, side: int | None = None) -> float:
        """FLOP/s of square matrix products in this dtype: what the device reaches in practice.

        The best of three runs of ten products each, so that the overhead of a call does not count.
        """
        side = side or (2048 if jax.default_backend() == "cpu" else 8192)
        a = jax.random.normal(jax.random.key(0), (side, side), jnp.float32).astype(DTYPES[self.dtype])
        # This scale keeps the products as large as their operands.
        scale = jnp.asarray(side**-0.5, a.dtype)
        layer = Dense(side, use_bias=False, dtype=a.dtype)
        multiply = lambda x, a: layer.apply({"params": {"kernel": a}}, x)  # noqa: E731
        products = jax.jit(lambda a: jax.lax.fori_loop(0, 10, lambda _, x: multiply(x, a) * scale, a))
        jax.block_until_ready(products(a))
        return 20 * side**3 / min(seconds(lambda: jax.block_until_ready(products(a))) for _ in range(3))

    def reset_peak(self) -> None:
        """Starts a new peak on a CPU; that of an accelerator counts from the start of the process."""
        self._memory.reset()

    def peak(self) -> float:
        """Peak bytes of the device's memory, or on a CPU of this process."""
        stats = jax.devices()[0].memory_stats()
        if jax.default_backend() == "cpu":
            return self._memory.peak()
        return float(stats["peak_bytes_in_use"]) if stats else math.nan
