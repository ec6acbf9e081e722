"""The released InstanceDiffusion model: Stable Diffusion 1.5 with UniFusion, fusers and ScaleU.

Convert the PyTorch checkpoint, then draw a layout:

    python -m instdiff_jax convert --input instancediffusion_sd15.pth --output checkpoints/sd15
    python sample.py --checkpoint checkpoints/sd15 --layout examples/demo_cat_dog_robin.json
"""

from ml_collections import ConfigDict

NEGATIVE_PROMPT = (
    "longbody, lowres, bad anatomy, bad hands, missing fingers, extra digit, fewer digits, cropped, "
    "worst quality, low quality"
)


def get_config() -> ConfigDict:
    model = dict(
        unet=dict(
            in_channels=4,
            out_channels=4,
            model_channels=320,
            channel_mult=(1, 2, 4, 4),
            num_res_blocks=2,
            attention_resolutions=(1, 2, 4),
            num_heads=8,
            context_dim=768,
            positions=False,
        ),
        unifusion=dict(mid_dim=3072, trunk_depths=(3, 3, 9, 3), trunk_dims=(96, 192, 384, 768), map_size=512),
        autoencoder=dict(ch=128, ch_mult=(1, 2, 4, 4), num_res_blocks=2, z_channels=4, scale_factor=0.18215),
        text_encoder=dict(
            vocab_size=49408,
            hidden_size=768,
            intermediate_size=3072,
            num_layers=12,
            num_heads=12,
            max_length=77,
            tokenizer="openai/clip-vit-large-patch14",
        ),
        schedule=dict(linear_start=0.00085, linear_end=0.012, timesteps=1000),
    )
    sampling = dict(
        steps=50,
        sampler="plms",
        guidance_scale=7.5,
        alpha=0.75,
        mis=0.36,
        merge="mean",
        negative_prompt=NEGATIVE_PROMPT,
        masked_attention="none",
    )
    return ConfigDict(dict(model=model, sampling=sampling))
