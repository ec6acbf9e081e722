"""Generates images from layouts: the same as `instdiff sample`. All flags: `python sample.py --help`.

python sample.py                                    # the small model in this repository, on examples/shapes
python sample.py --checkpoint checkpoints/sd15 --layout scene.json --output images --num_images 4
"""

import sys

from instdiff_jax.cli import main

if __name__ == "__main__":
    main(["sample", *sys.argv[1:]])
