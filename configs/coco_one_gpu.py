"""configs/coco.py on one GPU: the same 512 images a step, in parts of 8, each image encoded once.

    python train.py --config=configs/coco_one_gpu.py --workdir=runs/coco_one_gpu

Before the first step every image is encoded, flipped and not (31 GB for COCO). With less than 40 GB of GPU memory take
smaller parts: --config.train.accumulate=128. For fewer images a step, lower batch_size and accumulate alike.
"""

from ml_collections import ConfigDict

from instdiff_jax.config import NEGATIVE_PROMPT


def get_config() -> ConfigDict:
    sampling = dict(negative_prompt=NEGATIVE_PROMPT)
    data = dict(workers=8, cache_latents=True)
    train = dict(accumulate=64, remat="blocks", keep_every=10_000, sample_every=5000)
    parallel = dict(data=1)
    return ConfigDict(dict(sampling=sampling, data=data, train=train, parallel=parallel))
