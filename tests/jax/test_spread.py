"""Sampling over a mesh: rows split evenly, every device with its own; nothing but parameters is copied to all.

One process of 8 simulated devices runs `mesh_cases.py`; the tests read what it saw.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from mesh_cases import CASES, LAYOUTS
from tiny_checkpoint import make_tiny_checkpoint

from common import PYTHONPATH, SUPPORT, relative_error
from instdiff_jax import Pipeline

DEVICES = 8


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mesh")
    make_tiny_checkpoint(folder / "checkpoint")
    env = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}",
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": PYTHONPATH,
    }
    command = [sys.executable, str(SUPPORT / "mesh_cases.py"), str(folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "seen.json").read_text()) | {"folder": folder}


def test_eight_devices_draw_what_one_does(seen):
    pipeline = Pipeline.from_checkpoint(seen["folder"] / "checkpoint")
    with np.load(seen["folder"] / "latents.npz") as there:
        for name, settings in CASES.items():
            results = pipeline(LAYOUTS, seeds=[0, 1], **settings)
            assert relative_error(there[name], [result.latents for result in results]) <= 1e-4
            pixels = np.stack([result.array for result in results]).astype(int)
            assert np.abs(there[f"{name}_images"] - pixels).max() <= 1


def test_rows_split_evenly(seen):
    """Every array that has rows lies on all devices, with as many rows on each."""
    for name in CASES:
        assert seen[name]
        for call in seen[name]:
            rows = call["pairs"][0]
            assert all(lengths == [rows // DEVICES] * DEVICES for lengths in call["parts"])
            assert call["whole"], "parameters are copied to every device"
        kinds = {tuple(call["pairs"]) for call in seen[name]}
        assert {pair for _, pair in kinds} == ({1, 2} if name == "options" else {2})


def test_a_device_computes_its_rows_alone(seen):
    """The FLOPs of one device follow its rows: eight of them do the work of one, once."""
    for name in CASES:
        each = {}
        for call in seen[name]:
            entries = call["pairs"][0] // DEVICES * call["pairs"][1]
            each.setdefault(len(call["parts"]), set()).add(call["flops_a_device"] / entries)
        for costs in each.values():
            assert max(costs) == pytest.approx(min(costs), rel=1e-6)


def test_nothing_but_parameters_is_copied_to_every_device(seen):
    """The solver's table, numbers of rows and merged latents are small; conditions are what would count."""
    for name in CASES:
        for call in seen[name]:
            copied = sum(call["copied"].values())
            assert copied <= 100e3 and copied <= 0.05 * call["conditions_bytes"], call["copied"]
