"""SDXL's refiner against diffusers with the same random weights: read from the released file's names, which diffusers'
own converter turns into its models."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from common import PARITY, channels_last, make_array, relative_error
from instdiff_jax.checkpoint.refiner import read_refiner, refiner_table
from instdiff_jax.checkpoint.torch_file import write_safetensors
from instdiff_jax.config import AutoencoderConfig, TextEncoderConfig
from instdiff_jax.errors import InputError
from instdiff_jax.models.refiner import RefinerConfig
from instdiff_jax.sampling.refiner import Refiner, RefinerSettings

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

WIDTH, LAYERS = 64, 3
CONFIG = RefinerConfig(
    model_channels=32,
    channel_mult=(1, 2, 2),
    num_res_blocks=1,
    attention_levels=(1,),
    depth=2,
    head_dim=16,
    text_encoder=TextEncoderConfig(
        vocab_size=1024,
        hidden_size=WIDTH,
        intermediate_size=96,
        num_layers=LAYERS,
        num_heads=4,
        tokenizer=str(PARITY / "tokenizer"),
    ),
    autoencoder=AutoencoderConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1, scale_factor=0.13025),
)
SIDE = 32  # pixels; latents are half of it
TEXT = "conditioner.embedders.0.model."


@pytest.fixture(scope="module")
def tensors():
    """A file's content, with OpenCLIP's joint q, k and v, and a posterior so narrow that its sample is its mean."""
    made = {key: make_array(key, entry.torch_shape) for key, entry in refiner_table(CONFIG).items()}
    for i in range(LAYERS):
        key = f"{TEXT}transformer.resblocks.{i}.attn."
        for leaf in ("weight", "bias"):
            made[f"{key}in_proj_{leaf}"] = np.concatenate([made.pop(f"{key}{name}.{leaf}") for name in "qkv"])
    half = CONFIG.autoencoder.z_channels
    made["first_stage_model.quant_conv.weight"][half:] = 0
    made["first_stage_model.quant_conv.bias"][half:] = -30
    return made | {f"{TEXT}logit_scale": np.float32(1)}


@pytest.fixture(scope="module")
def refiner(tensors, tmp_path_factory):
    path = tmp_path_factory.mktemp("refiner") / "refiner.safetensors"
    write_safetensors(path, {key: np.atleast_1d(value) for key, value in tensors.items()})
    return Refiner(read_refiner(path, CONFIG), CONFIG)


@pytest.fixture(scope="module")
def theirs(tensors):
    from diffusers.loaders import single_file_utils as utils

    state = {key: torch.from_numpy(np.array(value)) for key, value in tensors.items()}
    unet = diffusers.UNet2DConditionModel(
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=2,
        attention_head_dim=(2, 4, 4),  # as its name does not say: the number of heads
        cross_attention_dim=WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=WIDTH + 5 * 256,
    )
    unet.load_state_dict(utils.convert_ldm_unet_checkpoint(dict(state), dict(unet.config)), strict=True)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        layers_per_block=1,
        scaling_factor=0.13025,
        force_upcast=False,
    )
    vae.load_state_dict(utils.convert_ldm_vae_checkpoint(dict(state), dict(vae.config)), strict=True)
    sizes = dict(hidden_size=WIDTH, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=4)
    ids = dict(bos_token_id=1022, eos_token_id=1023, pad_token_id=0)
    text = transformers.CLIPTextModelWithProjection(
        transformers.CLIPTextConfig(vocab_size=1024, hidden_act="gelu", projection_dim=WIDTH, **sizes, **ids)
    )
    found = utils.convert_open_clip_checkpoint(text, dict(state), prefix=TEXT)
    missing, extra = text.load_state_dict(found, strict=False)
    assert not [key for key in (*missing, *extra) if "position_ids" not in key]
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="leading",
        steps_offset=1,
    )
    pipe = diffusers.StableDiffusionXLImg2ImgPipeline(
        vae=vae.eval(),
        text_encoder=None,
        text_encoder_2=text.eval(),
        tokenizer=None,
        tokenizer_2=transformers.CLIPTokenizer.from_pretrained(PARITY / "tokenizer", pad_token="!"),
        unet=unet.eval(),
        scheduler=scheduler,
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(("strength", "steps"), [pytest.param(0.35, 20, marks=pytest.mark.slow), (0.5, 6)])
def test_the_cascade_equals_diffusers(refiner, theirs, strength, steps):
    image = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    shape = (1, 4, SIDE // 2, SIDE // 2)
    generator = torch.Generator().manual_seed(3)
    options = dict(strength=strength, num_inference_steps=steps, generator=generator)
    prompt = "a red bird on a small house"
    expected = theirs(prompt, image=Image.fromarray(image), output_type="latent", **options).images.numpy()
    generator.manual_seed(3)
    torch.randn(shape, generator=generator)  # the posterior's
    noise = channels_last(torch.randn(shape, generator=generator).numpy())[0]
    settings = RefinerSettings(strength=strength, steps=steps)
    found = refiner.refine(image, prompt, settings=settings, noise=noise)
    assert relative_error(found, channels_last(expected)) <= 1e-4
    generator.manual_seed(3)
    pixels = theirs(prompt, image=Image.fromarray(image), output_type="np", **options).images[0] * 255
    assert np.abs(refiner(image, prompt, settings=settings, noise=noise) - pixels).max() <= 1.01  # ours are truncated
    other = refiner.refine(image, "a dog", settings=settings, noise=noise)
    assert relative_error(other, found) > 1e-3


def test_wrong_files_and_sizes_are_named(refiner, tensors, tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": np.zeros(3, np.float32)})
    with pytest.raises(InputError, match="x.safetensors: expected the SDXL refiner"):
        read_refiner(path, CONFIG)
    write_safetensors(path, {key: np.atleast_1d(value) for key, value in tensors.items() if "ln_final" not in key})
    with pytest.raises(InputError, match=r"2 missing: conditioner.embedders.0.model.ln_final"):
        read_refiner(path, CONFIG)
    with pytest.raises(InputError, match="expected sides of multiples of 8 pixels, got 20×32"):
        refiner(np.zeros((32, 20, 3), np.uint8), "a dog")
    settings = dataclasses.replace(RefinerSettings(), strength=0.0)
    with pytest.raises(InputError, match="strength: expected a number above 0"):
        refiner(np.zeros((32, 32, 3), np.uint8), "a dog", settings=settings)


@pytest.mark.slow
def test_the_released_sizes():
    """Numbers of the released UNet and text encoder, from their published sizes."""
    table = refiner_table(RefinerConfig())
    sizes = {
        part: sum(int(np.prod(e.shape)) for e in table.values() if e.path[0] == part)
        for part in ("unet", "text_encoder", "autoencoder")
    }
    assert 2.2e9 < sizes["unet"] < 2.4e9 and 0.69e9 < sizes["text_encoder"] < 0.7e9
    assert sizes["autoencoder"] == 83653863
    assert table["model.diffusion_model.label_emb.0.0.weight"].torch_shape == (1536, 2560)
