"""configs/coco.py on one GPU: the same batch of 512 images, in parts of 8, encoded once.

    python train.py --config=configs/coco_one_gpu.py --workdir=runs/coco_one_gpu

Before the first step every image is encoded, flipped and not (31 GB for COCO). With less than 40 GB of GPU memory take
smaller parts: --config.train.accumulate=128. For fewer images a step lower batch_size and accumulate alike.
"""

from ml_collections import ConfigDict

from configs import coco


def get_config() -> ConfigDict:
    config = coco.get_config()
    config.data.cache_latents = True
    config.data.workers = 8
    config.train.accumulate = 64
    config.parallel.data = 1
    config.parallel.fsdp = 1
    return config
