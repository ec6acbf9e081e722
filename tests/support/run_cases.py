"""A training state of a few arrays, and a process that saves it step after step until it is killed.

python run_cases.py WORKDIR FIRST_STEP
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from instdiff_jax.buckets import as_path
from instdiff_jax.training.checkpoints import Checkpoints
from instdiff_jax.training.state import init_state

FACTS = dict(seed=0, batch_size=4, base="start", base_fingerprint="b", dataset_fingerprint="d", model={"sizes": [1, 2]})


def small_state(step: int):
    """A training state of a few arrays."""
    rng = np.random.default_rng(step)
    params = {"unet": {"kernel": rng.standard_normal((64, 48), np.float32), "bias": np.ones(48, np.float32)}}
    return init_state(jax.tree.map(jnp.asarray, params))._replace(step=jnp.int32(step))


def main(workdir: Path, first: int) -> None:
    checkpoints = Checkpoints(workdir, FACTS, keep_newest=2)
    for step in range(first, 10_000):
        checkpoints.save(step, small_state(step))
        checkpoints.wait()
        print(step, flush=True)


if __name__ == "__main__":
    main(as_path(sys.argv[1]), int(sys.argv[2]))
