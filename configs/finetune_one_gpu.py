"""A fine-tune on about 200 pictures of your own, on one GPU with 16 GB.

Make the dataset (docs/own_data.md) and take a trained checkpoint, for example the converted release:

    python -m instdiff_jax convert --input instancediffusion_sd15.pth --output checkpoints/instdiff
    python train.py --config=configs/finetune_one_gpu.py --workdir=runs/mine \
        --config.data.dir=datasets/mine --config.train.start=checkpoints/instdiff
    python -m instdiff_jax export --workdir runs/mine --output checkpoints/mine --dtype bfloat16

Only the fusers' attention and ScaleU train, 59 of 1,435 million parameters: what is drawn well stays. One picture is
computed at a time and eight make a step; 2,000 steps see each of 200 pictures 80 times. What a step needs is printed
before the first one. Without a validation split watch the grids of samples: stop when they repeat the pictures.
"""

from ml_collections import ConfigDict

from instdiff_jax.config import NEGATIVE_PROMPT

TRAINABLE = (
    (r"unet/.*/fuser/(proj|norm1|attn|gate_attn)(/.*)?", "train"),
    (r"unet/scaleu_.*", "train"),
    (r".*", "freeze"),
)


def get_config() -> ConfigDict:
    sampling = dict(negative_prompt=NEGATIVE_PROMPT)
    data = dict(dir="datasets/mine", validation_split="", workers=2, cache_latents=True)
    train = dict(
        start="checkpoints/instdiff",
        trainable=TRAINABLE,
        steps=2000,
        batch_size=8,
        accumulate=8,
        remat="blocks",
        save_every=250,
        validate_every=0,
        sample_every=250,
        optimizer=dict(learning_rate=1e-4, warmup_steps=50, clip_norm=1.0, ema_decay=0.99),
    )
    return ConfigDict(dict(sampling=sampling, data=data, train=train, parallel=dict(data=1)))
