"""InstanceDiffusion trained on COCO from Stable Diffusion 1.5, on a TPU pod or many GPUs, as in the paper.

Make the start and the dataset, then run this on every host:

    python -m instdiff_jax convert --input v1-5-pruned.safetensors --convnext convnext_tiny.pth \
        --output checkpoints/sd15_base
    python -m instdiff_jax build-coco --coco_dir coco --data_dir datasets/coco
    python train.py --config=configs/coco.py --workdir=runs/coco

The model, the data and the optimizer are the defaults of `ModelConfig`, `DataSettings` and `TrainSettings`: the fusers,
UniFusion and ScaleU learn, Stable Diffusion is frozen; 512 images a step, AdamW at 5e-5 after 5,000 steps of warm-up,
as released. The noise prediction's loss falls little and is noisy. Watch validation_loss, which always draws the same
noise, and the sample grids.
"""

from ml_collections import ConfigDict

from instdiff_jax.config import NEGATIVE_PROMPT


def get_config() -> ConfigDict:
    sampling = dict(negative_prompt=NEGATIVE_PROMPT)
    data = dict(workers=16)
    train = dict(remat="blocks", keep_every=10_000, sample_every=5000)
    parallel = dict(fsdp=16)
    return ConfigDict(dict(sampling=sampling, data=data, train=train, parallel=parallel))
