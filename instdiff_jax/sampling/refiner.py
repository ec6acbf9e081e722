"""The cascade: an image goes through Stable Diffusion XL's refiner (the official code's `cascade_strength`)."""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from instdiff_jax.checkpoint.refiner import read_refiner
from instdiff_jax.checkpoint.tokenizer_files import find_tokenizer
from instdiff_jax.diffusion.loop import noise_key
from instdiff_jax.diffusion.multi_instance import SamplerInputs, sample_rows
from instdiff_jax.diffusion.plan import SamplerSettings, make_plan
from instdiff_jax.diffusion.rows import ImageRows
from instdiff_jax.diffusion.solvers import solver_table
from instdiff_jax.errors import InputError
from instdiff_jax.models.autoencoder import Autoencoder
from instdiff_jax.models.refiner import RefinerConditions, RefinerConfig, RefinerText, RefinerUNet
from instdiff_jax.models.tokenizer import Tokenizer
from instdiff_jax.sampling import programs
from instdiff_jax.sampling.loading import DTYPES, choose_dtype
from instdiff_jax.sampling.results import Result
from instdiff_jax.sampling.start import initial_noise

# As in diffusers: what the picture should be, and what guidance leads away from.
AESTHETIC_SCORE, NEGATIVE_SCORE = 6.0, 2.5


@dataclasses.dataclass(frozen=True)
class RefinerSettings:
    """How images are refined; the defaults are those of the official code and of diffusers.

    `strength` is the fraction of the steps that run on the noised image.
    """

    strength: float = 0.35
    steps: int = 20
    guidance_scale: float = 5.0
    negative_prompt: str = ""


class Refiner:
    """Refines images, one after the other.

    Attributes:
        config: its sizes.
        params: trees of unet, autoencoder and text_encoder, on one device.
        dtype: what the networks compute in; the autoencoder always in float32.
    """

    def __init__(
        self, params: dict[str, Any], config: RefinerConfig = RefinerConfig(), dtype: str | None = None
    ) -> None:
        self.config, self.dtype = config, choose_dtype(dtype)
        kind = DTYPES[self.dtype]
        parts = {part: jnp.float32 if part == "autoencoder" else kind for part in params}
        self.params = {part: jax.tree.map(lambda x: jnp.asarray(x, parts[part]), params[part]) for part in params}
        self._unet, self._text = RefinerUNet(config, kind), RefinerText(config.text_encoder, kind)
        self._autoencoder = Autoencoder(config.autoencoder)
        text = config.text_encoder
        self._tokenizer = Tokenizer(find_tokenizer(text.tokenizer, text.vocab_size), text.vocab_size, text.max_length)

    @classmethod
    def from_file(cls, path: str | Path, dtype: str | None = None, verify: bool = True) -> Self:
        """The released refiner, sd_xl_refiner_1.0.safetensors; InputError for another file."""
        return cls(read_refiner(Path(path), verify=verify), dtype=dtype)

    def __call__(
        self,
        image: UInt8[np.ndarray, "H W 3"],
        caption: str,
        seed: int = 0,
        settings: RefinerSettings = RefinerSettings(),
        noise: Float[np.ndarray, "h w z"] | None = None,
    ) -> UInt8[np.ndarray, "H W 3"]:
        """Refines an image of this caption.

        Args:
            image: its sides are multiples of the config's `canvas_stride`.
            caption: what it shows.
            seed: of the noise.
            settings: how.
            noise: instead of the seed's.

        Raises:
            InputError: for another size, or a setting out of range.
        """
        latents = self.refine(image, caption, seed, settings, noise)
        with jax.default_matmul_precision(self.matmul_precision):
            ((pixels, finite),) = programs.decode(self._autoencoder, self.params["autoencoder"], latents, 1, None)
        if not np.asarray(finite).all():
            raise InputError("refiner: the image is not finite: a weight is not, or float16 overflowed")
        return np.asarray(pixels)[0]

    def refine(
        self,
        image: UInt8[np.ndarray, "H W 3"],
        caption: str,
        seed: int = 0,
        settings: RefinerSettings = RefinerSettings(),
        noise: Float[np.ndarray, "h w z"] | None = None,
    ) -> Float[Array, "1 h w z"]:
        """The latents of `__call__`'s image."""
        multiple = self.config.canvas_stride
        if any(side % multiple for side in image.shape[:2]):
            found = "×".join(map(str, image.shape[1::-1]))
            raise InputError(f"refiner: expected sides of multiples of {multiple} pixels, got {found}")
        table = solver_table(
            "euler", settings.steps, self.config.schedule, (0.0, 0.0, 1.0), settings.strength, "leading"
        )
        plan = make_plan(table, SamplerSettings(guidance_scale=settings.guidance_scale))
        with jax.default_matmul_precision(self.matmul_precision):
            pixels = jnp.asarray(image, jnp.float32)[None] / 127.5 - 1
            known = programs.encode(self._autoencoder, self.params["autoencoder"], pixels)
            noise = initial_noise(seed, known.shape[1:]) if noise is None else noise
            signal, sigma = table.first_roots
            conditions = self._conditions([caption, settings.negative_prompt], image.shape[:2])
            return sample_rows(
                programs.NoisePredictor(self._unet),
                self.params["unet"],
                SamplerInputs(
                    signal * known + sigma * noise[None], conditions, [ImageRows(0, 1)], None, noise_key(seed)[None]
                ),
                plan,
            )

    @property
    def matmul_precision(self) -> str:
        """As `Pipeline.matmul_precision`."""
        return "highest" if self.dtype == "float32" else "default"

    def _conditions(self, texts: Sequence[str], sides: tuple[int, int]) -> RefinerConditions:
        ids = self._tokenizer.encode_prompts(texts)
        ends = np.argmax(ids, axis=1)
        # Unlike CLIP's, OpenCLIP's rows are padded with 0.
        ids = np.where(np.arange(ids.shape[1]) > ends[:, None], 0, ids)
        numbers = [(*sides, 0, 0, score) for score in (AESTHETIC_SCORE, NEGATIVE_SCORE)]
        params = self.params["text_encoder"], self.params["unet"]
        return _condition(self._text, self._unet, params, jnp.asarray(ids), jnp.asarray(numbers, jnp.float32))


def refine_results(results: Iterable[Result], refiner: Refiner, settings: RefinerSettings) -> Iterator[Result]:
    """Results with their images refined; their latents are those before."""
    for result in results:
        image = refiner(result.array, result.layout.caption, result.seed, settings)
        yield dataclasses.replace(result, array=image)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _condition(
    text: RefinerText, unet: RefinerUNet, params: tuple[Any, Any], ids: Int[Array, "b m"], numbers: Float[Array, "b k"]
) -> RefinerConditions:
    hidden, pooled = text.apply({"params": params[0]}, ids)
    return unet.apply({"params": params[1]}, hidden, pooled, numbers, method="condition")
