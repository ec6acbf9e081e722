"""Reports on compiled programs: how their text is read, the predicted time, and the command on devices at hand."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from training_common import tiny_model

from instdiff_jax.analysis.chips import CHIPS, predict, scaling
from instdiff_jax.analysis.hlo import Collective, ProgramCosts, analyze, ring_bytes
from instdiff_jax.aot import blocks, programs
from instdiff_jax.aot.report import memory_table
from instdiff_jax.cli import aot
from instdiff_jax.errors import InputError, exit_on_input_error
from instdiff_jax.models import layers
from instdiff_jax.parallel.mesh import ParallelSettings, make_mesh
from instdiff_jax.training.settings import TrainSettings

# In the form that the TPU compiler prints; S(1) is memory on the chip, T(…) the tiles that pad an array.
HLO = """\
HloModule jit_step, is_scheduled=true, num_partitions=16

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  %y = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%x, %y)
}

%sliced (p0: bf16[8,1024,1024], p1: s32[]) -> bf16[1024,1024] {
  %p0 = bf16[8,1024,1024]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p1 = s32[]{:T(128)S(6)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %one = bf16[1,1024,1024]{2,1,0:T(8,128)(2,1)} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,1024,1024}
  ROOT %flat = bf16[1024,1024]{1,0:T(8,128)(2,1)} bitcast(%one)
}

%started (p2: bf16[64,256]) -> bf16[1024,256] {
  %p2 = bf16[64,256]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %gathered = bf16[1024,256]{1,0:T(8,128)(2,1)} all-gather(%p2), channel_id=1, replica_groups=[1,16]<=[16], \
dimensions={0}, frontend_attributes={chain_id="0"}
}

%ended (p3: bf16[64,256]) -> bf16[1024,256] {
  %p3 = bf16[64,256]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %gathered.1 = bf16[1024,256]{1,0:T(8,128)(2,1)} all-gather(%p3), channel_id=1, replica_groups=[1,16]<=[16], \
dimensions={0}, frontend_attributes={chain_id="0"}
}

%body (state: (s32[], bf16[8,1024,1024], f32[256])) -> (s32[], bf16[8,1024,1024], f32[256]) {
  %state = (s32[]{:T(128)}, bf16[8,1024,1024]{2,1,0:T(8,128)(2,1)}, f32[256]{0:T(256)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %stack = bf16[8,1024,1024]{2,1,0:T(8,128)(2,1)} get-tuple-element(%state), index=1
  %vector = f32[256]{0:T(256)S(1)} get-tuple-element(%state), index=2
  %row = bf16[1024,1024]{1,0:T(8,128)(2,1)} fusion(%stack, %i), kind=kLoop, calls=%sliced, \
backend_config={"window_config":{"estimated_cycles":"100"}}
  %reduced = f32[256]{0:T(256)S(1)} all-reduce(%vector), channel_id=2, replica_groups={{0,4},{1,5}}, to_apply=%add
  ROOT %next = (s32[]{:T(128)}, bf16[8,1024,1024]{2,1,0:T(8,128)(2,1)}, f32[256]{0:T(256)S(1)}) \
tuple(%i, %stack, %reduced)
}

%condition (state.1: (s32[], bf16[8,1024,1024], f32[256])) -> pred[] {
  %state.1 = (s32[]{:T(128)}, bf16[8,1024,1024]{2,1,0:T(8,128)(2,1)}, f32[256]{0:T(256)S(1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  %turns = s32[]{:T(128)} constant(8)
  ROOT %less = pred[]{:T(512)} compare(%i.1, %turns), direction=LT
}

ENTRY %main (a: bf16[64,256], b: bf16[8,1024,1024], c: f32[1000,40]) -> f32[1000,40] {
  %a = bf16[64,256]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[8,1024,1024]{2,1,0:T(8,128)(2,1)} parameter(1)
  %c = f32[1000,40]{1,0:T(8,128)} parameter(2)
  %start = bf16[1024,256]{1,0:T(8,128)(2,1)S(1)} fusion(%a), kind=kCustom, calls=%started
  %end = bf16[1024,256]{1,0:T(8,128)(2,1)S(1)} fusion(%a), kind=kCustom, calls=%ended
  %first = s32[]{:T(128)} constant(0)
  %zeros = f32[256]{0:T(256)S(1)} constant({...})
  %init = (s32[]{:T(128)}, bf16[8,1024,1024]{2,1,0:T(8,128)(2,1)}, f32[256]{0:T(256)S(1)}) tuple(%first, %b, %zeros)
  %loop = (s32[]{:T(128)}, bf16[8,1024,1024]{2,1,0:T(8,128)(2,1)}, f32[256]{0:T(256)S(1)}) while(%init), \
condition=%condition, body=%body
  %sent = (bf16[64,256]{1,0:T(8,128)(2,1)}, bf16[64,256]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) \
collective-permute-start(%a), channel_id=3, source_target_pairs={{0,8},{8,0}}
  %arrived = bf16[64,256]{1,0:T(8,128)(2,1)} collective-permute-done(%sent)
  %part = f32[250,40]{1,0:T(8,128)S(1)} reduce-scatter(%c), channel_id=4, \
replica_groups=mesh['axis_0'=4,'axis_1'=4] {'axis_1'}, dimensions={0}, to_apply=%add
  ROOT %doubled = f32[1000,40]{1,0:T(8,128)} add(%c, %c), backend_config={"window_config":{"estimated_cycles":"7"}}
}
"""


def test_collectives_are_counted_once_each_and_in_loops_as_often_as_they_run():
    found = {(one.kind, one.group, one.stride): one for one in analyze(HLO).collectives}
    assert found == {
        key: Collective(*key, count, looped, payload, sent)
        for key, count, looped, payload, sent in [
            # Two kernels run beside one gather: one chain.
            (("all-gather", 16, 1), 1, 0, 1024 * 256 * 2, 1024 * 256 * 2 * 15 / 16),
            (("all-reduce", 2, 4), 8, 8, 8 * 1024, 8 * 1024),
            (("collective-permute", 2, 8), 1, 0, 64 * 256 * 2, 64 * 256 * 2),
            (("reduce-scatter", 4, 1), 1, 0, 160_000, 120_000),
        ]
    }


def test_memory_traffic_counts_slices_padding_and_loops_but_not_memory_on_the_chip():
    costs = analyze(HLO)
    # Forty columns lie in memory as 128: read twice and written, and read once more by the reduce-scatter.
    padded = 4 * 1000 * 128 * 4
    slices = 8 * 2 * 1024 * 1024 * 2
    gathers, permute = 2 * 64 * 256 * 2, 2 * 64 * 256 * 2
    # Scalars are a few bytes more.
    assert costs.memory_bytes == pytest.approx(padded + slices + gathers + permute, rel=1e-5)
    assert costs.cycles == 8 * 100 + 7
    assert costs.open_loops == 0


def test_a_loop_whose_turns_the_text_does_not_tell_counts_once_and_is_reported():
    costs = analyze(HLO.replace("constant(8)", "parameter(1)"))
    assert costs.open_loops == 1
    assert costs.cycles == 100 + 7


def test_text_of_a_program_compiled_here():
    def function(x):
        return jax.lax.fori_loop(0, 5, lambda i, y: jnp.sin(y @ y), x)

    text = jax.jit(function).lower(jax.ShapeDtypeStruct((64, 64), jnp.float32)).compile().as_text()
    costs = analyze(text)
    assert costs.collectives == () and costs.open_loops == 0
    # Each turn reads and writes the matrix at least once.
    assert 5 * 2 * 64 * 64 * 4 <= costs.memory_bytes <= 5 * 10 * 64 * 64 * 4


@pytest.mark.parametrize(
    ("kind", "sent"),
    [("all-gather", 75), ("reduce-scatter", 75), ("all-to-all", 75), ("all-reduce", 150), ("collective-permute", 100)],
)
def test_ring(kind, sent):
    assert ring_bytes(kind, 100, 4) == sent
    assert kind == "collective-permute" or ring_bytes(kind, 100, 1) == 0


def test_predicted_time_and_efficiency():
    chip = CHIPS["v5e"]
    gather = Collective("all-gather", 4, 1, 1, 0, 400e6, 300e6)
    split = Collective("all-reduce", 4, 4, 1, 0, 100e6, 150e6)
    whole = Collective("all-reduce", 16, 1, 1, 0, 160e6, 300e6)
    costs = ProgramCosts((gather, split, whole), memory_bytes=819e8, cycles=300_000_000, open_loops=0)
    prediction = predict(chip, 98.5e12, costs)
    assert prediction.compute == pytest.approx(0.5)
    assert prediction.memory == pytest.approx(0.1)
    assert prediction.kernels == pytest.approx(0.2)
    assert prediction.interconnect == pytest.approx(750e6 / 100e9)
    assert prediction.best == prediction.compute
    assert prediction.step == prediction.compute + prediction.interconnect

    rows = scaling(chip, prediction, costs.collectives, {"data": 4, "fsdp": 4}, 128)
    assert [row["chips"] for row in rows] == [1, 4, 16]
    assert rows[0]["interconnect"] == 0 and rows[0]["efficiency"] == 1
    # Four chips: the gather as it is, no sum over data, and the last one over 4.
    assert rows[1]["interconnect"] == pytest.approx((300e6 + 2 * 160e6 * 3 / 4) / 100e9)
    assert rows[2]["step"] == pytest.approx(prediction.step)
    assert rows[2]["images_per_second"] == pytest.approx(128 / prediction.step)
    assert rows[0]["images_per_second"] == pytest.approx(8 / 0.5)
    assert rows[2]["efficiency_hidden"] == 1


def test_a_sum_over_an_axis_of_one_chip_costs_nothing_where_that_axis_stays_one():
    alone = Collective("all-reduce", 1, 1, 1, 0, 100e6, 0.0)
    costs = ProgramCosts((alone,), memory_bytes=0.0, cycles=0, open_loops=0)
    prediction = predict(CHIPS["v5e"], 1e12, costs)
    rows = scaling(CHIPS["v5e"], prediction, costs.collectives, {"data": 1, "fsdp": 16}, 128)
    assert [row["interconnect"] for row in rows] == [0, 0, 0]


def test_memory_table_counts_donated_arguments_once():
    stats = SimpleNamespace(
        argument_size_in_bytes=10,
        output_size_in_bytes=6,
        alias_size_in_bytes=5,
        temp_size_in_bytes=3,
        generated_code_size_in_bytes=1,
    )
    assert memory_table(stats) == dict(arguments=10, outputs=6, aliased=5, temporary=3, code=1, total=15)


@pytest.mark.parametrize(
    "message",
    [
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (19.60G) exceeds available HBM (15.75G). HLO module: jit_step.\nSee more.",
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 19.60G of 15.75G hbm. Exceeded by 3.85G.",
    ],
)
def test_refusal_for_memory_says_what_is_needed_and_what_there_is(message):
    assert programs.does_not_fit(message).startswith("does not fit a chip: needs 19.60G, has 15.75G")


def test_program_that_does_not_fit_is_one_line():
    class Refused:
        def lower(self):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Used 19.60G of 15.75G hbm.")

    mesh = jax.make_mesh((1, 1), ("data", "fsdp"))
    with pytest.raises(InputError, match="train on v5e:4x4: does not fit"):
        programs.compile_program(programs.Program("train", Refused(), (), {}, mesh, 8, {}), "v5e:4x4")


def test_topology_that_cannot_be_had_is_one_line_and_exit_code_2(monkeypatch, capsys):
    def exit_code(*argv):
        with pytest.raises(SystemExit) as error, exit_on_input_error():
            aot.main(["--config", "configs/coco.py", *argv])
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: ")
        return error.value.code, lines[0]

    monkeypatch.setattr(programs.importlib.util, "find_spec", lambda name: None)
    code, line = exit_code("--topology", "v5e:4x4")
    assert code == 2 and "pip install libtpu" in line

    monkeypatch.setattr(programs.importlib.util, "find_spec", lambda name: object())
    code, line = exit_code("--topology", "v9:4x4")
    assert code == 2 and "v5e, v5p, v6e" in line

    def unknown(platform, topology_name):
        raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: no such shape\nstack")

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", unknown)
    code, line = exit_code("--topology", "v5e:3x3")
    assert code == 2 and "no such shape" in line and "stack" not in line


def run(monkeypatch, tmp_path, *argv):
    """The command on this process's device, with the really small model; its reports."""
    monkeypatch.setattr(programs, "topology_devices", lambda name, slices: jax.devices()[:1])
    output = tmp_path / "aot.json"
    size = ("--image_size", "16", "--images_per_chip", "2", "--rows", "2")
    aot.main(
        ["--topology", "v5e:1x1", "--config", "tests/support/tiny_config.py", *size, "--output", str(output), *argv]
    )
    return json.loads(output.read_text())


def test_sampler_through_the_command(monkeypatch, tmp_path, capsys):
    # The sampler has no fsdp: a config's does not matter.
    flags = ("--what", "sample", "--config.parallel.fsdp=16", "--hlo", str(tmp_path))
    (report,) = run(monkeypatch, tmp_path, *flags)
    modules = [row["path"] for row in report["modules"]]
    assert not modules or modules[0] == "UNet"  # a CPU's compiler estimates nothing
    assert report["batch"] == 2 and report["flops"] > 1e6
    # The number of steps is an argument of the program.
    assert report["open_loops"] == 1
    assert report["memory"]["arguments"] > 0 and report["prediction"]["step"] > 0
    assert (tmp_path / "v5e_1x1_sample.hlo").read_text().startswith("HloModule")
    assert "sample on v5e:1x1" in capsys.readouterr().out


def test_blocks_through_the_command(monkeypatch, tmp_path, capsys):
    report = run(monkeypatch, tmp_path, "--what", "blocks", "--blocks", "mid_.*", "--hlo", str(tmp_path))
    # Equal blocks are one kind.
    assert [row["names"] for row in report[::2]] == [["mid_res_0", "mid_res_1"], ["mid_attn"]]
    assert [row["pass"] for row in report] == ["forward", "gradient"] * 2 and report[0]["number"] == 2
    assert report[3]["compute"] > 2 * report[2]["compute"] > 0
    assert (tmp_path / "v5e_1x1_mid_attn_gradient.hlo").is_file()
    assert "| all, times their number | 3 | forward |" in capsys.readouterr().out


def test_blocks_that_do_not_exist(monkeypatch, tmp_path):
    with pytest.raises(InputError, match="--blocks nothing: expected a regular expression that matches a block"):
        run(monkeypatch, tmp_path, "--what", "blocks", "--blocks", "nothing")


def test_kinds_of_blocks_are_all_blocks_of_the_unet():
    """With their arithmetic, they are an evaluation but for the time embedding."""
    model = tiny_model()
    mesh = make_mesh(ParallelSettings(), jax.devices()[:1])
    kinds = blocks.block_kinds(model, jnp.float32, 2, 16)
    names = [name for kind in kinds for name in kind.names]
    assert len(names) == len(set(names)) and {"conv_in", "mid_attn", "conv_out"} < set(names)
    found = blocks.block_programs(model, TrainSettings(steps=10, dtype="float32"), mesh, 2, 16, ".*")
    total = sum(len(kind.names) * program.flops for kind, program in found if program.name == "forward")
    whole = programs.sample_program(model, TrainSettings(steps=10, dtype="float32"), mesh, 1, 16)
    inside = {path: flops for path, flops in whole.module_flops.items() if "/time_" not in path or "res" in path}
    assert total == sum(inside.values())


@pytest.mark.slow
def test_training_step_through_the_command(monkeypatch, tmp_path):
    (report,) = run(monkeypatch, tmp_path, "--what", "train")
    assert report["batch"] == 2 and report["mesh"] == {"slice": 1, "data": 1, "fsdp": 1}
    # The state is donated: what comes out lies where it went in.
    assert report["memory"]["aliased"] > 0.9 * report["memory"]["outputs"]
    assert report["prediction"]["interconnect"] == 0
    assert [row["chips"] for row in report["scaling"]] == [1]


@pytest.mark.parametrize("masked", ["none", "strict"])
def test_training_step_with_masked_attention(masked):
    """Traced alone: region bits are among its arguments only if they are read."""
    settings = TrainSettings(steps=10, batch_size=2, masked_attention=masked)
    mesh = make_mesh(ParallelSettings(), jax.devices()[:1])
    program = programs.train_program(tiny_model(), settings, ParallelSettings(), mesh, 16)
    assert program.flops > 0 and ("regions" in program.args[-1]) == (masked == "strict")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--what", "sample", "--image_size", "15"), "--image_size: expected a multiple of"),
        (("--output", "nowhere/aot.json"), "nowhere: expected an existing folder"),
        (("--what", "train", "--config.parallel.fsdp=3"), "devices; change --config.parallel.data"),
        (("--slices", "0"), "--slices: expected a whole number of at least 1, got 0"),
        (("--config.parallel.slices=2",), "config.parallel.slices: expected a divisor of the 1 devices, got 2"),
    ],
)
def test_bad_flags(monkeypatch, tmp_path, argv, message):
    with pytest.raises(InputError, match=message):
        run(monkeypatch, tmp_path, *argv)


def test_rows_must_be_shared_evenly(monkeypatch):
    mesh = SimpleNamespace(size=16)
    with pytest.raises(InputError, match="--rows: expected a multiple of the topology's 16 chips, got 24"):
        programs.sample_program(None, None, mesh, 24, 512)


def test_attention_chooses_its_chunks_for_the_devices_it_is_traced_for(monkeypatch):
    abstract = SimpleNamespace(abstract_device=SimpleNamespace(platform="tpu"))
    monkeypatch.setattr(jax.sharding, "get_abstract_mesh", lambda: abstract)
    assert layers.platform() == "tpu"
    monkeypatch.undo()
    assert layers.platform() == jax.default_backend()
