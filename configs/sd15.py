"""The released InstanceDiffusion model: Stable Diffusion 1.5 with UniFusion, fusers and ScaleU.

    python -m instdiff_jax convert --config=configs/sd15.py --input instancediffusion_sd15.pth --output checkpoints/sd15
    python sample.py --checkpoint checkpoints/sd15 --layout examples/demo_cat_dog_robin.json

`convert` does the same without --config. The model's sizes are the defaults of `instdiff_jax.config.ModelConfig`.
"""

from ml_collections import ConfigDict

from instdiff_jax.config import NEGATIVE_PROMPT


def get_config() -> ConfigDict:
    return ConfigDict(dict(sampling=dict(negative_prompt=NEGATIVE_PROMPT)))
