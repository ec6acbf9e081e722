"""Trains InstanceDiffusion: the same as `instdiff train`.

python train.py --config=configs/coco.py --workdir=runs/coco [--config.train.batch_size=64 ...]
"""

import sys

from instdiff_jax.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
