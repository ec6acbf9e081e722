"""Samples the tiny model over a mesh of 8 devices, in a process of its own, and writes what was seen to a folder.

    python mesh_cases.py FOLDER

FOLDER holds `checkpoint`; `latents.npz` and `seen.json` are added. Devices come from XLA_FLAGS.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from tiny_checkpoint import make_layout

from instdiff_jax import Pipeline
from instdiff_jax.analysis.flops import count_flops
from instdiff_jax.diffusion import multi_instance
from instdiff_jax.parallel.mesh import ParallelSettings, make_mesh
from instdiff_jax.parallel.runtime import enable_compilation_cache

LAYOUTS = [make_layout(count, f"scene{i}", seed=i, mask=i == 1) for i, count in enumerate((3, 5, 2, 3, 4))]
CASES = {
    "plain": dict(steps=4),
    "options": dict(
        steps=6, reuse=2, guidance_interval=(0.0, 0.7), mis_guidance=False, masked_attention="correct", alpha=1.0
    ),
}


def parts(tree) -> list[list[int]]:
    """First-axis lengths of a tree's arrays on each device."""
    return [[shard.data.shape[0] for shard in leaf.addressable_shards] for leaf in jax.tree.leaves(tree)]


def copied_bytes(params) -> dict[str, int]:
    """Bytes of the arrays, parameters aside, of which every device holds the whole; by shape."""
    own = {id(leaf) for leaf in jax.tree.leaves(params)}
    copied = {}
    for array in jax.live_arrays():
        if len(array.devices()) > 1 and array.is_fully_replicated and id(array) not in own:
            copied[str(array.shape)] = copied.get(str(array.shape), 0) + array.nbytes
    return copied


def watch(pipeline, calls: list) -> None:
    """Notes every call of the denoising loop, and of the networks around it."""
    original = multi_instance.denoise

    def record(eps_fn, *args, **settings):
        params, state, conditions, _ = args
        inside = count_flops(lambda *args: original.__wrapped__(eps_fn, *args, **settings), *args)
        calls.append(
            dict(
                whole=all(leaf.is_fully_replicated for leaf in jax.tree.leaves(params)),
                parts=parts((state, conditions)),
                pairs=jax.tree.leaves(conditions)[0].shape[:2],
                conditions_bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(conditions)),
                flops_a_device=inside,
                copied=copied_bytes(pipeline.params),
            )
        )
        return original(eps_fn, *args, **settings)

    multi_instance.denoise = record


def main(folder: Path) -> None:
    enable_compilation_cache()
    mesh = make_mesh(ParallelSettings(fsdp=2), jax.devices())
    pipeline = Pipeline.from_checkpoint(folder / "checkpoint", mesh=mesh, max_rows=2)
    seen, latents, calls = {"devices": jax.device_count()}, {}, []
    watch(pipeline, calls)
    for name, settings in CASES.items():
        results = pipeline(LAYOUTS, seeds=[0, 1], **settings)
        latents[name] = np.stack([result.latents for result in results])
        latents[f"{name}_images"] = np.stack([result.array for result in results])
        seen[name] = list(calls)
        calls.clear()
    np.savez(folder / "latents.npz", **latents)
    (folder / "seen.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
