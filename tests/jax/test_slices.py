"""Several TPU slices: the mesh, what crosses the network between them, and the step compiled for two."""

import itertools
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from training_common import tiny_model

from common import PYTHONPATH, ROOT, SUPPORT
from instdiff_jax.analysis.chips import CHIPS, predict, scaling
from instdiff_jax.analysis.hlo import Collective, analyze
from instdiff_jax.errors import InputError
from instdiff_jax.parallel.mesh import ParallelSettings, make_mesh
from instdiff_jax.training.settings import TrainSettings
from instdiff_jax.training.state import make_sharding_plan

# A sum over two slices and their chips: the compiler sums within a slice, and each chip gives its part to its host.
BETWEEN = """\
HloModule jit_step, is_scheduled=true, num_partitions=4

ENTRY %main (a: f32[3200,8,128]) -> f32[3200,8,128] {
  %a = f32[3200,8,128]{2,1,0:T(8,128)} parameter(0)
  %token = token[] after-all()
  %send = (f32[3200,8,128]{2,1,0:T(8,128)}, u32[], token[]) send(%a, %token), channel_id=2, is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_reduce_operation="SUM",\
_xla_megascale_target="{1:3,7}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv = (f32[3200,8,128]{2,1,0:T(8,128)}, u32[], token[]) recv(%token), channel_id=1, is_host_transfer=true, \
frontend_attributes={_xla_megascale_target="{1:3,7}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %sent = token[] send-done(%send), channel_id=2, is_host_transfer=true
  %received = (f32[3200,8,128]{2,1,0:T(8,128)}, token[]) recv-done(%recv), channel_id=1, is_host_transfer=true
  ROOT %sum = f32[3200,8,128]{2,1,0:T(8,128)} get-tuple-element(%received), index=0
}
"""


def test_traffic_between_slices_is_counted_apart_and_only_all_slices_have_it():
    costs = analyze(BETWEEN)
    size = 3200 * 8 * 128 * 4
    assert costs.collectives == (Collective("all-reduce", 4, 1, 1, 0, size, 2 * size * 3 / 4, dcn=True),)
    inside = Collective("all-gather", 4, 1, 1, 0, 400e6, 300e6)
    chip, costs = CHIPS["v5e"], costs._replace(collectives=(inside, *costs.collectives))
    prediction = predict(chip, 98.5e12, costs)
    assert prediction.interconnect == pytest.approx(300e6 / 100e9)
    # A host of 8 chips has two links of 100 Gbit/s.
    assert prediction.dcn == pytest.approx(1.5 * size / (2 * 100e9 / 8 / 8))
    assert prediction.step == pytest.approx(0.5 + prediction.interconnect + prediction.dcn)
    rows = scaling(chip, prediction, costs.collectives, {"slice": 4, "data": 1, "fsdp": 4}, 128)
    assert [row["chips"] for row in rows] == [1, 4, 16]
    assert rows[1]["step"] == pytest.approx(0.5 + prediction.interconnect)
    assert rows[1]["images_per_second"] == pytest.approx(32 / rows[1]["step"])
    assert rows[2]["step"] == pytest.approx(prediction.step)
    assert rows[2]["images_per_second"] == pytest.approx(128 / prediction.step)


class StandIn(SimpleNamespace):
    """A chip that is not there."""

    __hash__ = object.__hash__


def test_two_slices_are_an_axis_of_the_mesh_and_rows_lie_side_by_side():
    """On a TPU slices come from the devices, in any order; elsewhere they are as the config says."""
    chips = [
        StandIn(platform="tpu", device_kind="TPU v5 lite", coords=(x, y, 0), core_on_chip=0, slice_index=part)
        for x, y, part in itertools.product(range(4), range(4), range(2))
    ]
    for index, chip in enumerate(chips):
        chip.id, chip.process_index = index, chip.slice_index
    mesh = make_mesh(ParallelSettings(fsdp=4), chips)
    assert dict(mesh.shape) == {"slice": 2, "data": 4, "fsdp": 4}
    for part, devices in enumerate(mesh.devices):
        assert {chip.slice_index for chip in devices.flat} == {part}
        # Parameters are gathered between neighbours.
        steps = [np.subtract(a.coords, b.coords) for row in devices for a, b in itertools.pairwise(row)]
        assert all(np.abs(step).sum() == 1 for step in steps)
    for change in (dict(slices=4), dict(slices=1)):
        with pytest.raises(InputError, match="config.parallel.slices: expected -1 or 2, the TPU's slices"):
            make_mesh(ParallelSettings(**change), chips)
    with pytest.raises(InputError, match="does not match the 16 devices of a slice"):
        make_mesh(ParallelSettings(fsdp=32), chips)
    # No arrangement of 3 x 5 chips is a mesh of 5 x 3: any order, but each slice stays whole.
    odd = [
        StandIn(**vars(chips[0]) | dict(coords=(x, y, 0), slice_index=part, id=100 * part + 5 * x + y))
        for y, part, x in itertools.product(range(5), range(2), range(3))
    ]
    mesh = make_mesh(ParallelSettings(data=5, fsdp=3), odd)
    assert [{chip.slice_index for chip in part.flat} for part in mesh.devices] == [{0}, {1}]
    with pytest.raises(InputError, match="slices: expected a divisor of the 1 devices, got 3"):
        make_mesh(ParallelSettings(slices=3), jax.devices()[:1])


@pytest.mark.slow
def test_training_step_for_two_slices(tmp_path):
    """With the TPU's compiler, in a process of its own: gradients alone cross the network."""
    pytest.importorskip("libtpu", reason="compiling for a TPU needs its compiler: pip install libtpu")
    output = tmp_path / "aot.json"
    flags = f"--what train --image_size 16 --images_per_chip 2 --config.parallel.fsdp=2 --output {output}"
    command = [sys.executable, "-m", "instdiff_jax", "aot", "--topology", "v5e:2x2", "--slices", "2"]
    config = ["--config", str(SUPPORT / "tiny_config.py")]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": PYTHONPATH}
    said = subprocess.run([*command, *config, *flags.split()], cwd=ROOT, env=env, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr[-3000:]
    (report,) = json.loads(output.read_text())
    assert report["mesh"] == {"slice": 2, "data": 2, "fsdp": 2} and report["batch"] == 16
    between = [one for one in report["collectives"] if one["dcn"]]
    assert {(one["kind"], one["group"]) for one in between} == {("all-reduce", 2)}
    # Every gradient crosses, float32, of most a chip's part only; nothing else does but the loss.
    model, settings = tiny_model(), TrainSettings(steps=10, batch_size=16)
    mesh = make_mesh(ParallelSettings(), jax.devices()[:1])
    trainable = jax.tree.leaves(make_sharding_plan(model, settings, ParallelSettings(), mesh).trainable)
    gradients = 4 * sum(leaf.size for leaf in trainable)
    assert gradients / 4 <= sum(one["payload"] for one in between) < gradients
    assert "over 2 slices (DCN)" in said.stdout
    assert [row["chips"] for row in report["scaling"]] == [1, 4, 8]
