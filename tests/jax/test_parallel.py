"""Meshes, sharding rules, and one training step over several devices and several processes."""

import json
import math
import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from training_common import make_run, tiny_model, tiny_settings

from common import PYTHONPATH, ROOT, SUPPORT, relative_error
from instdiff_jax.errors import InputError
from instdiff_jax.parallel.mesh import ParallelSettings, check_batch, initialize_distributed, make_mesh, parameter_specs


def start_cases(*names: str, devices: int, **env: str) -> subprocess.Popen:
    flags = f"--xla_force_host_platform_device_count={devices}"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": PYTHONPATH} | env
    command = [sys.executable, str(SUPPORT / "parallel_cases.py"), *names]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def results(process: subprocess.Popen) -> dict:
    out, err = process.communicate(timeout=1200)
    assert process.returncode == 0, err[-3000:]
    return json.loads(out.split("RESULT ")[1])


@pytest.mark.slow
def test_meshes_of_eight_devices_compute_what_one_does():
    names = ("1x1", "8x1", "1x8", "2x4", "2x2x2", "2x1x4:sharded", "2x4:sharded")
    cases = results(start_cases(*names, devices=8))
    one = cases["1x1"]
    columns = ("flops", "trainable_bytes", "optimizer_bytes", "frozen_bytes")
    print(f"\n{'mesh':<12} {'loss error':>11}" + "".join(f"{column:>17}" for column in columns))
    for name, case in cases.items():
        error = relative_error(case["losses"], one["losses"])
        print(f"{name:<12} {error:>11.1e}" + "".join(f"{case[column]:>17,.0f}" for column in columns))
        assert error < 1e-5
        assert abs(case["grad_norm"] - one["grad_norm"]) < 1e-4 * one["grad_norm"]
        *data, fsdp = map(int, name.split(":")[0].split("x"))
        # No device computes another's rows: what does not shrink is the optimizer's work on copied parameters.
        assert case["flops"] < 1.25 * one["flops"] / (math.prod(data) * fsdp)
        # Biases and norms are copied to every device: 2% of the tiny model's bytes, a thousandth of the real one's.
        copied = 0.02
        for column in ("trainable_bytes", "optimizer_bytes"):
            assert case[column] < (1 / fsdp + copied) * one[column]
        assert case["frozen_bytes"] < (1 / (fsdp if "sharded" in name else 1) + copied) * one["frozen_bytes"]
    # Fresh parameters are born where they belong.
    assert case["fresh_bytes"] == case["trainable_bytes"] + case["frozen_bytes"]


@pytest.mark.slow
def test_muon_on_a_mesh_moves_what_it_does_on_one_device():
    """A matrix that is split over devices is made orthogonal as a whole."""
    cases = results(start_cases("1x1:muon", "2x4:muon", "1x1", "2x4", devices=8))
    one, mesh = cases["1x1:muon"], cases["2x4:muon"]
    print(f"loss error {relative_error(mesh['losses'], one['losses']):.1e}")
    assert relative_error(mesh["losses"], one["losses"]) < 1e-5
    assert relative_error(one["losses"], cases["1x1"]["losses"]) > 1e-3
    # The devices share the work: 15 matrices of the most common shape on 8 devices are two for each.
    extra = [cases[f"{name}:muon"]["flops"] - cases[name]["flops"] for name in ("1x1", "2x4")]
    print(f"of Muon's {extra[0]:.3g} operations {extra[1]:.3g} on each device")
    assert extra[1] < 0.25 * extra[0]
    for column in ("trainable_bytes", "optimizer_bytes"):
        assert mesh[column] < 0.27 * one[column]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_compute_what_one_does(processes):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    one = results(start_cases("1x1", devices=1))["1x1"]
    mesh = f"{processes // 2}x2"
    job = dict(JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES=str(processes))
    started = [start_cases(mesh, devices=1, JAX_PROCESS_ID=str(i), **job) for i in range(processes)]
    cases = [results(process)[mesh] for process in started]
    assert sorted(case["rows"][0] for case in cases) == [8 // processes * i for i in range(processes)]
    for case in cases:
        error = relative_error(case["losses"], one["losses"])
        print(f"{processes} processes: loss error {error:.1e}")
        assert error < 1e-5


@pytest.mark.slow
def test_a_process_may_hold_rows_that_are_not_neighbours():
    """As on TPU slices, where a host holds a square of the chips and the mesh follows their links."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    one = results(start_cases("1x1", devices=1))["1x1"]
    job = dict(JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES="2")
    started = [start_cases("2x2:interleaved", devices=2, JAX_PROCESS_ID=str(i), **job) for i in range(2)]
    cases = [results(process)["2x2:interleaved"] for process in started]
    assert [case["rows"] for case in cases] == [[0, 1, 4, 5], [2, 3, 6, 7]]
    for case in cases:
        assert relative_error(case["losses"], one["losses"]) < 1e-5


@pytest.mark.parametrize(("data", "fsdp"), [(2, 1), (-1, 2), (-1, -1), (0, 1), (-2, 1), (1, 3)])
def test_a_mesh_that_does_not_match_the_devices_is_an_error(data, fsdp):
    with pytest.raises(InputError, match="does not match the 1 devices"):
        make_mesh(ParallelSettings(data=data, fsdp=fsdp), jax.devices()[:1])


def test_minus_one_fills_the_mesh():
    assert dict(make_mesh(ParallelSettings(), jax.devices()[:1]).shape) == {"slice": 1, "data": 1, "fsdp": 1}


def test_batches_that_devices_cannot_share_are_an_error():
    mesh = make_mesh(ParallelSettings(), jax.devices()[:1])
    check_batch(6, 3, mesh)
    with pytest.raises(InputError, match="multiple of 4"):
        check_batch(6, 4, mesh)


class FakeMesh:
    shape = {"data": 2, "fsdp": 4}


def test_rules_place_the_longest_axis_that_divides():
    leaf = jax.ShapeDtypeStruct
    shapes = {
        "a": {"kernel": leaf((3, 3, 8, 16), np.float32), "bias": leaf((16,), np.float32)},
        "b": {"kernel": leaf((12, 6), np.float32)},
        "c": {"kernel": leaf((5, 7), np.float32)},
    }
    specs = parameter_specs(shapes, ParallelSettings().rules, FakeMesh())
    assert specs["a"] == {"kernel": PartitionSpec(None, None, None, "fsdp"), "bias": PartitionSpec()}
    assert specs["b"]["kernel"] == PartitionSpec("fsdp")
    assert specs["c"]["kernel"] == PartitionSpec()
    with pytest.raises(InputError, match="no rule covers the parameter a/bias"):
        parameter_specs(shapes, ((r".*/kernel", "fsdp"),), FakeMesh())


def test_an_uncovered_parameter_stops_a_run():
    with pytest.raises(InputError, match="config.parallel.rules: no rule covers the parameter"):
        make_run(tiny_model(), tiny_settings(), rules=((r".*/kernel", "fsdp"),))


@pytest.mark.parametrize(
    "change",
    [
        dict(rules=((r".*", "shard"),)),
        dict(rules=(("unet",),)),
        dict(rules=(("(unet", "fsdp"),)),
        dict(frozen="half"),
        dict(modle=2),
    ],
    ids=str,
)
def test_settings_say_what_they_expect(change):
    with pytest.raises(InputError, match=f"config.parallel.{next(iter(change))}"):
        ParallelSettings.from_dict(change)


def test_a_job_without_its_numbers_is_an_error(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    monkeypatch.delenv("JAX_NUM_PROCESSES", raising=False)
    with pytest.raises(InputError, match="JAX_NUM_PROCESSES"):
        initialize_distributed()


def test_importing_train_starts_no_device():
    # On several hosts devices must not be asked for before the processes have joined.
    check = "import train; from jax._src import xla_bridge; print(xla_bridge.backends_are_initialized())"
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    result = subprocess.run([sys.executable, "-c", check], cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.stdout.strip() == "False", result.stderr[-2000:]
