"""How many rows and images one program takes: given by the user, or what suits the platform and fits its memory."""

import dataclasses
import sys

import jax

from instdiff_jax.config import ModelConfig
from instdiff_jax.models.unifusion import NUM_TOKENS

# Rows per device denoised at a time at 512×512 with the full model. On a CPU one keeps the cores busy: more only take
# memory, and programs of their own.
_ROWS = {"cpu": 1, "gpu": 64, "tpu": 8}
_FULL_LATENTS = 64 * 64
# Small canvases get up to 16× more: one large program then does the work of several small ones.
_MOST_TIMES = 16
# Bytes of a row of the full model in a 16-bit type at 512×512, and of what lies beside rows and parameters: an upper
# bound from docs/performance.md, "Memory" (the row and 7.22 GB less about 2.7 GB of parameters). Not measured on a GPU.
_ROW_BYTES, _OTHER_BYTES = 0.36e9, 4.5e9
# Images per device decoded at a time at 512×512 with the full model, and the bytes that each takes.
_DECODED = {"cpu": 1, "gpu": 8, "tpu": 2}
_FULL_IMAGE, _IMAGE_BYTES = 512 * 512 * 128, 0.81e9


@dataclasses.dataclass(frozen=True)
class MemoryLimits:
    """Limits for one model, computing in one type.

    Attributes:
        config: the model's sizes.
        itemsize: bytes per number of the type that the networks compute in.
        parameter_bytes: what the parameters take on each device.
        devices: rows are split over so many.
        max_rows: rows per device that the user gave; None for what suits the platform and the canvas.
    """

    config: ModelConfig
    itemsize: int
    parameter_bytes: int
    devices: int = 1
    max_rows: int | None = None

    def row_limit(self, canvas: tuple[int, int], masked: bool = False) -> int:
        """Rows denoised at a time over all devices, at least one per device.

        Args:
            canvas: width and height in pixels.
            masked: whether attention in the fusers is masked, which needs more memory.
        """
        if self.max_rows is not None:
            return self.max_rows * self.devices
        latents = canvas[0] * canvas[1] // self.config.latent_stride**2
        usual = _scale(_ROWS.get(jax.default_backend(), 1), _FULL_LATENTS / latents)
        return min(usual, self.rows_in_memory(latents, masked)) * self.devices

    def rows_in_memory(self, latents: int, masked: bool = False) -> int:
        """Rows of so many latent pixels that one GPU's memory holds, at least one; other platforms have no limit."""
        size = latents / _FULL_LATENTS
        width = self.config.unet.model_channels / 320 * self.itemsize / 2
        # cuDNN takes a mask as a bias for all pairs of tokens: here of the conditional and the negative entry.
        bias = 2 * 2 * latents * (latents + NUM_TOKENS) * (masked and self.itemsize == 2)
        return self._count_in_memory(_OTHER_BYTES * size, _ROW_BYTES * size * width + bias)

    def decode_limit(self, canvas: tuple[int, int]) -> int:
        """Images of this width and height in pixels that one device decodes at a time, at least one."""
        size = canvas[0] * canvas[1] * self.config.autoencoder.ch / _FULL_IMAGE
        usual = _scale(_DECODED.get(jax.default_backend(), 1), 1 / size)
        return min(usual, self._count_in_memory(0, _IMAGE_BYTES * size))

    def _count_in_memory(self, beside: float, each: float) -> int:
        """How many things of `each` bytes a GPU holds beside the parameters and `beside` bytes, at least one."""
        memory = gpu_memory()
        return sys.maxsize if memory is None else max(1, int((memory - self.parameter_bytes - beside) / each))


def gpu_memory() -> int | None:
    """Bytes that jax may use on a GPU; None on other platforms, or if it does not say."""
    stats = jax.local_devices()[0].memory_stats() if jax.default_backend() == "gpu" else None
    return stats.get("bytes_limit") if stats else None


def _scale(usual: int, times: float) -> int:
    """The usual number, scaled where each takes `times` less memory than at full size; at least one."""
    return max(1, int(usual * min(times, _MOST_TIMES)))
