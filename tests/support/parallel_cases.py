"""Runs the train step of the tiny model on meshes, in a process of its own; prints one JSON object.

    python parallel_cases.py [SLICESx]DATAxFSDP[:sharded|:interleaved|:muon] …

"interleaved" takes a device of each process in turn. Devices come from XLA_FLAGS, other processes from
JAX_COORDINATOR_ADDRESS; both are read before jax starts. A mesh of one device is on this process alone.
"""

import dataclasses
import json
import sys

import jax
from training_common import make_run, tiny_batch, tiny_model, tiny_settings

from instdiff_jax.parallel.mesh import initialize_distributed, process_rows, put_batch
from instdiff_jax.training.state import fresh_params
from instdiff_jax.training.step import batch_keys, compile_step, make_train_step
from instdiff_jax.tree import flatten

STEPS, ROWS = 5, 8


def local_bytes(tree) -> int:
    """What one device holds of a tree."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


def run_case(name: str) -> dict:
    """Losses of some steps, and what the first device computes and holds."""
    sizes, _, how = name.partition(":")
    frozen_how = how if how == "sharded" else ""
    slices, data, fsdp = map(int, ("1x" * (sizes.count("x") < 2) + sizes).split("x"))
    model, settings = tiny_model(), tiny_settings(batch_size=ROWS)
    optimizer = dataclasses.replace(settings.optimizer, name="muon" if how == "muon" else "adamw")
    settings = dataclasses.replace(settings, steps=STEPS, optimizer=optimizer)
    devices = jax.devices()[: slices * data * fsdp]
    if how == "interleaved":
        each = jax.local_device_count()
        devices = [device for i in range(each) for device in devices[i::each]]
    run = make_run(model, settings, devices, slices=slices, data=data, fsdp=fsdp, frozen=frozen_how or "replicated")
    mesh = run.plan.mesh
    state, frozen = run.start()
    step = compile_step(make_train_step(model, settings, run.plan), run.plan)
    rows, losses, compiled = process_rows(ROWS, mesh), [], None
    for i in range(STEPS):
        batch = {key: value for key, value in tiny_batch(i, ROWS).items() if key in batch_keys(settings)}
        batch = put_batch(jax.tree.map(lambda leaf: leaf[list(rows)], batch), mesh)
        if compiled is None:
            compiled = step.lower(state, frozen, batch).compile()
        state, metrics = compiled(state, frozen, batch)
        losses.append(float(metrics["loss"]))
    case = {
        "losses": losses,
        "grad_norm": float(metrics["grad_norm"]),
        "flops": compiled.cost_analysis()["flops"],
        "trainable_bytes": local_bytes(state.params),
        "optimizer_bytes": local_bytes(state.optimizer),
        "frozen_bytes": local_bytes(frozen),
        "rows": list(rows),
    }
    if frozen_how:
        case["fresh_bytes"] = local_bytes(fresh_params(run.plan, 0, set(flatten(run.plan.params))))
    return case


if __name__ == "__main__":
    initialize_distributed()
    jax.config.update("jax_default_matmul_precision", "highest")
    print("RESULT " + json.dumps({name: run_case(name) for name in sys.argv[1:]}))
