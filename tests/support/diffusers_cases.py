"""Random tiny pipelines as diffusers saves them, and our networks with weights of the same."""

from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_checkpoint import TOKENIZER, tiny_config

from instdiff_jax.config import ModelConfig

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

TINY = tiny_config()


def random_weights(module: "torch.nn.Module", seed: int) -> "torch.nn.Module":
    """Gives every parameter random values that keep features at about their size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, leaf in module.named_parameters():
            scale = 0.1 if leaf.ndim < 2 else (leaf[0].numel()) ** -0.5
            leaf.copy_(torch.randn(leaf.shape, generator=generator) * scale + ("norm" in name and leaf.ndim == 1))
    return module.eval()


def tiny_pipeline(seed: int = 0, config: ModelConfig = TINY) -> "diffusers.StableDiffusionPipeline":
    """A pipeline of the tiny model's sizes."""
    unet, vae, text = config.unet, config.autoencoder, config.text_encoder
    attends = [2**level in unet.attention_resolutions for level in range(len(unet.channel_mult))]
    tokenizer = transformers.CLIPTokenizer.from_pretrained(TOKENIZER)
    parts = {
        "unet": diffusers.UNet2DConditionModel(
            block_out_channels=[mult * unet.model_channels for mult in unet.channel_mult],
            layers_per_block=unet.num_res_blocks,
            down_block_types=["CrossAttnDownBlock2D" if attend else "DownBlock2D" for attend in attends],
            up_block_types=["CrossAttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)],
            cross_attention_dim=unet.context_dim,
            attention_head_dim=unet.num_heads,
        ),
        "vae": diffusers.AutoencoderKL(
            block_out_channels=[mult * vae.ch for mult in vae.ch_mult],
            layers_per_block=vae.num_res_blocks,
            down_block_types=["DownEncoderBlock2D"] * len(vae.ch_mult),
            up_block_types=["UpDecoderBlock2D"] * len(vae.ch_mult),
            latent_channels=vae.z_channels,
        ),
        "text_encoder": transformers.CLIPTextModel(
            transformers.CLIPTextConfig(
                vocab_size=text.vocab_size,
                hidden_size=text.hidden_size,
                intermediate_size=text.intermediate_size,
                num_hidden_layers=text.num_layers,
                num_attention_heads=text.num_heads,
                projection_dim=text.hidden_size,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        ),
    }
    scheduler = diffusers.PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )
    return diffusers.StableDiffusionPipeline(
        **{name: random_weights(module, seed + i) for i, (name, module) in enumerate(parts.items())},
        tokenizer=tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save_pipeline(pipeline: "diffusers.StableDiffusionPipeline", folder: Path, **options) -> Path:
    pipeline.save_pretrained(folder, **options)
    return folder


INPUTS = np.random.default_rng(0)
LATENTS = INPUTS.standard_normal((2, 4, 8, 8), dtype=np.float32)
IMAGES = INPUTS.uniform(-1, 1, (1, 3, 16, 16)).astype(np.float32)
CONTEXT = INPUTS.standard_normal((2, 77, TINY.unet.context_dim), dtype=np.float32)
IDS = np.concatenate([INPUTS.integers(0, 1000, (2, 20)), np.full((2, 57), 1023)], axis=1)
TIMES = np.array([981, 1])


def their_outputs(pipeline: "diffusers.StableDiffusionPipeline") -> dict[str, np.ndarray]:
    """What each network of a pipeline makes of the inputs above."""
    with torch.no_grad():
        latents, images, context = (torch.from_numpy(array) for array in (LATENTS, IMAGES, CONTEXT))
        text = pipeline.text_encoder(torch.from_numpy(IDS))
        outputs = {
            "unet": pipeline.unet(latents, torch.from_numpy(TIMES), context).sample,
            "encoder": pipeline.vae.encode(images).latent_dist.mean,
            "decoder": pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample,
            "text": text.last_hidden_state,
            "pooled": text.pooler_output,
        }
    return {name: output.numpy() for name, output in outputs.items()}


def our_outputs(params: dict, config: ModelConfig = TINY) -> dict[str, np.ndarray]:
    """What our networks make of the same inputs, without adapters; images and latents channels first."""
    from instdiff_jax.models.networks import make_networks

    networks = make_networks(config)

    @jax.jit
    def run(params, latents, images, context):
        unet, vae = {"params": params["unet"]}, {"params": params["autoencoder"]}
        conditions = networks.unet.apply(unet, context, None, method="condition")
        hidden, pooled = networks.text_encoder.apply({"params": params["text_encoder"]}, IDS)
        return {
            "unet": networks.unet.apply(unet, latents, TIMES, conditions, None).transpose(0, 3, 1, 2),
            "encoder": networks.autoencoder.apply(vae, images, method="encode")[0].transpose(0, 3, 1, 2),
            "decoder": networks.autoencoder.apply(vae, latents, method="decode").transpose(0, 3, 1, 2),
            "text": hidden,
            "pooled": pooled,
        }

    params = dict(params)
    params["unet"] = with_zero_scaleu(params["unet"], config)
    latents, images = LATENTS.transpose(0, 2, 3, 1), IMAGES.transpose(0, 2, 3, 1)
    return jax.tree.map(np.asarray, run(params, latents, images, CONTEXT))


def with_zero_scaleu(unet: dict, config: ModelConfig = TINY) -> dict:
    """A UNet's parameters with ScaleU that changes nothing."""
    from instdiff_jax.checkpoint.shapes import parameter_shapes

    shapes = parameter_shapes(config, parts=("unet",))["unet"]
    zeros = {
        name: {leaf: np.zeros(shape, np.float32) for leaf, shape in leaves.items()}
        for name, leaves in shapes.items()
        if name.startswith("scaleu_")
    }
    return dict(unet) | zeros
