"""Rows over a mesh of 8 devices, in a process of its own: the same latents, with the work split.

    python row_mesh_cases.py

Devices come from XLA_FLAGS.
"""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from sampler_cases import SCHEDULE, C, H, W, fake_eps, looping_eps, make_images, make_inputs, sample

from common import relative_error
from instdiff_jax.diffusion.loop import Evaluations, denoise, noise_key, start_state
from instdiff_jax.diffusion.solvers import solver_table


def main() -> None:
    assert jax.device_count() == 8
    sharding = NamedSharding(Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "fsdp")), P(("data", "fsdp")))
    replicated = NamedSharding(sharding.mesh, P())
    for sampler, counts, max_rows in (("euler_a", (1, 4, 0, 6), 8), ("plms", (1, 4, 0, 6), 8), ("plms", (2,), None)):
        table = solver_table(sampler, 10, SCHEDULE)
        keys = np.stack([noise_key(seed) for seed in range(len(counts))])
        params, noise, conditions = make_inputs(len(counts))
        images = make_images(counts)
        plain = sample(fake_eps, params, noise, conditions, images, table, mis_steps=4, keys=keys)
        split = sample(
            fake_eps,
            jax.device_put(params, replicated),
            noise,
            conditions,
            images,
            table,
            mis_steps=4,
            keys=keys,
            sharding=sharding,
            max_rows=max_rows,
        )
        assert relative_error(split, plain) <= 1e-5
    state = jax.device_put(start_state(np.zeros((16, H, W, C), np.float32)), sharding)
    given = jax.device_put(jax.tree.map(lambda a: a[np.zeros((16, 2), int)], conditions), sharding)
    params, evaluations = jax.device_put((params, Evaluations(table.coefficients, 0, 3, 7.5)), replicated)
    for eps_fn in (fake_eps, looping_eps):
        lowered = denoise.lower(eps_fn, params, state, given, evaluations, use_fusers=True, sharding=sharding)
        text = lowered.compile().as_text()
        assert "all-" not in text and "collective" not in text, "rows must not talk to each other"
        assert f"f32[32,{H},{W},{C}]" not in text, "the work must be split"
        assert eps_fn is looping_eps or f"f32[4,{H},{W},{C}]" in text


if __name__ == "__main__":
    main()
