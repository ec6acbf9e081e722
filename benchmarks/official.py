"""The official side of the benchmarks; runs in a worker process."""

import contextlib
import copy
import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from benchmarks.models import Model, make_layout, make_weights, random_grounding
from benchmarks.official_code import (
    alphas,
    build_autoencoder,
    build_text_encoder,
    build_unet,
    official_classes,
    set_alpha,
)
from benchmarks.processes import HostMemory, cores


class Official:
    """The baseline as released: float32 on a CPU, float16 autocast and flash attention on a GPU.

    On a CPU "bfloat16" puts it under autocast, which the released code does not do.

    It has CLIP's text encoder once; the released program has it twice, and the image encoder too.
    """

    def __init__(self, clone: Path, model: Model, compiled: bool, dtype: str):
        self._stack = contextlib.ExitStack()
        self._official = official = self._stack.enter_context(official_classes(clone))
        self.model, self._memory = model, HostMemory()
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._half = torch.float16 if self.device == "cuda" else torch.bfloat16 if dtype == "bfloat16" else None
        torch.set_num_threads(cores())
        torch.manual_seed(0)
        options = dict(use_checkpoint=True, efficient_attention=True)
        self._unet = build_unet(official, model.config, ("boxes", "points"), make_weights, **options).to(self.device)
        self._autoencoder = build_autoencoder(official, model.config.autoencoder, make_weights).to(self.device)
        self._text_encoder = build_text_encoder(model.config.text_encoder).to(self.device)
        schedule = model.config.schedule
        self._diffusion = official.LatentDiffusion(
            "linear", schedule.timesteps, schedule.linear_start, schedule.linear_end
        ).to(self.device)
        if compiled:
            # It compiles once per scale of the fusers, with and without gradients.
            torch._dynamo.config.recompile_limit = 64
        self._called = torch.compile(self._unet) if compiled else self._unet
        self._rng = np.random.default_rng(0)

    # ------------------------------------------------------------ sampling

    def sample(self, images: int, instances: int, mis: float, steps: int, alpha: float) -> float:
        """Seconds from tokens to the pixels of all images of a layout."""
        layout = make_layout(instances, self.model.canvas)
        whole = self._grounding(layout, images)
        groundings = [whole]
        if mis and instances:
            for slot in range(instances):
                single = {key: torch.zeros_like(value) for key, value in whole.items()}
                for key, value in whole.items():
                    single[key][:, 0] = value[:, slot]
                groundings.append(single)
        self._unet.grounding_tokenizer_input.prepare(whole)
        side = self.model.canvas // self.model.config.latent_stride
        shape = (images, self.model.config.unet.in_channels, side, side)
        noise, context = self._normal(*shape), self._normal(images, 77, 768)
        given = [
            dict(x=noise.clone(), timesteps=None, context=context, grounding_input=_renamed(grounding))
            for grounding in groundings
        ]
        options = dict(
            alpha_generator_func=lambda length: alphas(length, (alpha, 0.0, 1.0 - alpha)),
            set_alpha_scale=lambda _, value: set_alpha(self._unet, value),
        )
        if len(given) > 1:
            sampler, batch = self._official.PLMSSamplerInst(self._diffusion, self._called, mis=mis, **options), given
        else:
            sampler, batch = self._official.PLMSSampler(self._diffusion, self._called, **options), given[0]

        # As released: the prompts, the negative prompt of every image, and phrases one at a time.
        texts = [images, images] + [1] * len(layout.instances) + [images, 1] * (len(groundings) - 1)

        def run() -> None:
            with torch.no_grad():
                for count in texts:
                    self._encode(count)
            with self._autocast():
                latents = sampler.sample(steps, shape, batch, uc=context, guidance_scale=7.5)
            with torch.no_grad():
                pixels = torch.clamp(self._autoencoder.decode(latents), -1, 1) * 0.5 + 0.5
                (pixels.cpu().numpy() * 255).astype(np.uint8)

        return self._seconds(run)

    # ------------------------------------------------------------ UNet

    def prepare_forward(self, inputs: dict[str, np.ndarray], grounding: dict[str, np.ndarray]) -> None:
        """Prepares the evaluation that `time_forward` times."""
        given = {key: torch.from_numpy(value).to(self.device) for key, value in grounding.items()}
        self._unet.grounding_tokenizer_input.prepare(given)
        x = torch.from_numpy(np.moveaxis(inputs["latents"], -1, 1).copy()).to(self.device)
        times, context = (torch.from_numpy(inputs[name]).to(self.device) for name in ("timesteps", "context"))
        self._forward = dict(x=x, timesteps=times, context=context, grounding_input=_renamed(given))

    def output(self) -> np.ndarray:
        """The output of the prepared evaluation, with fusers; channels last."""
        set_alpha(self._unet, 1.0)
        with torch.no_grad(), self._autocast():
            return np.moveaxis(self._called(self._forward).float().cpu().numpy(), 1, -1)

    def time_forward(self, fusers: bool = True) -> float:
        """Seconds of the prepared evaluation; without fusers α is 0, but the code still computes them."""
        set_alpha(self._unet, 1.0 if fusers else 0.0)
        with torch.no_grad(), self._autocast():
            return self._seconds(lambda: self._called(self._forward))

    def parts(self) -> dict[str, float]:
        """Seconds of an evaluation by kind of layer, timed with hooks."""
        kinds = {"Conv2d": "convolutions", "Linear": "projections", "GroupNorm": "norms", "LayerNorm": "norms"}
        taken: dict[str, float] = {}
        starts: list[float] = []
        handles = []

        def enter(*_: Any) -> None:
            self._wait()
            starts.append(time.perf_counter())

        def leave(kind: str) -> Callable:
            def hook(*_: Any) -> None:
                self._wait()
                taken[kind] = taken.get(kind, 0.0) + time.perf_counter() - starts.pop()

            return hook

        for name, module in self._unet.named_modules():
            kind = kinds.get(type(module).__name__)
            if name == "position_net":
                kind = "UniFusion"
            elif name.startswith("position_net."):
                kind = None
            if kind is not None:
                handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave(kind))]
        attention = torch.nn.functional.scaled_dot_product_attention

        def timed_attention(*args: Any, **options: Any) -> torch.Tensor:
            enter()
            out = attention(*args, **options)
            leave("attention")()
            return out

        with torch.no_grad(), self._autocast():
            with mock.patch("torch.nn.functional.scaled_dot_product_attention", timed_attention):
                whole = self._seconds(lambda: self._unet(self._forward))
        for handle in handles:
            handle.remove()
        return taken | dict(rest=whole - sum(taken.values()))

    # ------------------------------------------------------------ training

    def prepare_training(self, batch: int) -> None:
        """Prepares optimizer and moving averages as in the official trainer, and a batch of latents and embeddings."""
        # As the official trainer does.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        network, names = self._unet, [name for name, _ in self._unet.named_parameters()]
        with contextlib.redirect_stdout(io.StringIO()):
            params = self._official.get_trainable_params(network, names)
        self._optimizer = torch.optim.AdamW(params, lr=5e-5, weight_decay=0.0)
        self._average = list(copy.deepcopy(network).parameters())
        network.train()
        given = {
            key: value.repeat_interleave(batch, 0).to(self.device)
            for key, value in ((k, torch.from_numpy(v)) for k, v in random_grounding(6, self._rng).items())
        }
        side = self.model.canvas // self.model.config.latent_stride
        self._batch = dict(
            latents=self._normal(batch, self.model.config.unet.in_channels, side, side),
            context=self._normal(batch, 77, 768),
            grounding=network.grounding_tokenizer_input.prepare(given),
        )
        self._scaler = torch.amp.GradScaler(self.device, enabled=self.device == "cuda")

    def train(self) -> float:
        """Seconds of one training step: loss, gradients, AdamW, moving average."""

        def step() -> None:
            latents = self._batch["latents"]
            noise = torch.randn_like(latents)
            times = (torch.rand(len(latents), device=self.device) * 1000).long()
            noisy = self._diffusion.q_sample(x_start=latents, t=times, noise=noise)
            given = dict(
                x=noisy, timesteps=times, context=self._batch["context"], grounding_input=self._batch["grounding"]
            )
            self._optimizer.zero_grad(set_to_none=True)
            with self._autocast():
                loss = torch.nn.functional.mse_loss(self._called(given), noise)
            self._scaler.scale(loss).backward()
            self._scaler.step(self._optimizer)
            self._scaler.update()
            with torch.no_grad():
                self._official.update_ema(self._average, list(self._unet.parameters()), 0.9999)
            loss.item()

        return self._seconds(step)

    # ------------------------------------------------------------ machine

    def reset_peak(self) -> None:
        """Starts a new peak."""
        self._memory.reset()
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> float:
        """Peak bytes of the device's memory, or on a CPU of this process."""
        return float(torch.cuda.max_memory_allocated()) if self.device == "cuda" else self._memory.peak()

    def _autocast(self) -> Any:
        return torch.autocast(self.device, dtype=self._half or torch.bfloat16, enabled=self._half is not None)

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _seconds(self, run: Callable[[], Any]) -> float:
        self._wait()
        start = time.perf_counter()
        run()
        self._wait()
        return time.perf_counter() - start

    def _encode(self, count: int) -> None:
        """Encodes this many random texts; the time does not depend on their content."""
        sizes = self.model.config.text_encoder
        ids = torch.from_numpy(self._rng.integers(sizes.vocab_size, size=(count, sizes.max_length)))
        self._text_encoder(ids.to(self.device))

    def _normal(self, *shape: int) -> torch.Tensor:
        return torch.from_numpy(self._rng.standard_normal(shape, np.float32)).to(self.device)

    def _grounding(self, layout: Any, images: int) -> dict[str, torch.Tensor]:
        data = random_grounding(len(layout.instances), self._rng)
        return {
            key: torch.from_numpy(value).repeat_interleave(images, 0).to(self.device) for key, value in data.items()
        }


def _renamed(data: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renamed = {"text_embeddings": "positive_embeddings"}
    return {renamed.get(key, key): value for key, value in data.items()}
