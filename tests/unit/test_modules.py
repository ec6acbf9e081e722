"""Time and arithmetic by module: the scopes that jax and the TPU compiler write, and the table made from them."""

import pytest

from instdiff_jax.analysis.hlo import analyze
from instdiff_jax.analysis.modules import format_modules, module_path, module_rows, operation_module


# As the compiler and jax's traced programs print them.
@pytest.mark.parametrize(
    ("scopes", "path"),
    [
        (
            "jit(denoise)/shard_map/while/body/UNet/UNet._deep/down_0_attn_0/fuser/ff/in",
            "UNet/down_0_attn_0/fuser/ff/in",
        ),
        ("jit(run)/transpose(jvp(jvp()))/checkpoint/rematted_computation/Transformer/norm1", "Transformer/norm1"),
        ("transpose(jvp(UNet))/jvp(UNet)/checkpoint/mid_attn/self_attn.key_value/v", "UNet/mid_attn/self_attn/v"),
        ("jit(denoise)/while/body/UNet/UNet._deep/up_0_res_0/jit(silu)", "UNet/up_0_res_0"),
        ("jit(denoise)/UNet/scaleu_1/kn,bkc->bnc", "UNet/scaleu_1"),
        ("jit(denoise)/shard_map/while/body", ""),
    ],
)
def test_path_is_that_of_the_modules(scopes, path):
    assert module_path(scopes) == path
    assert operation_module(f"{scopes}/dot_general") == path


PROGRAM = """\
HloModule program

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %a = f32[8]{0} add(%x, %x), metadata={op_name="jit(f)/Net/one/norm/add"}, backend_config={"estimated_cycles":"30"}
  %k = f32[8]{0} custom-call(%a), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/Net/one/attn/flash"}
  %b = f32[8]{0} add(%k, %k), metadata={op_name="jit(f)/Net/two/add"}, backend_config={"estimated_cycles":"10"}
  ROOT %c = f32[8]{0} copy(%b), backend_config={"estimated_cycles":"2"}
}
"""


def test_cycles_of_compiled_operations_and_kernels_by_module():
    modules = analyze(PROGRAM, {"k": 58.0}).modules
    assert modules == {"Net/one/norm": 30, "Net/one/attn": 58, "Net/two": 10, "": 2}


def test_rows_are_a_tree_with_sums_shares_and_ratios():
    seconds = {"Net/two": 10.0, "Net/one/norm": 30.0, "Net/one/attn": 58.0, "": 2.0}
    rows = module_rows(seconds, {"Net/one/attn": 2900.0, "Net/two": 200.0}, peak=100.0, least=0.05)
    assert [row["path"] for row in rows] == ["Net", "Net/one", "Net/one/attn", "Net/one/norm", "Net/two"]
    assert [row["seconds"] for row in rows] == [98, 88, 58, 30, 10]
    assert [row["compute"] for row in rows] == [31, 29, 29, 0, 2]
    assert rows[1]["share"] == 0.88 and rows[2]["ratio"] == 2 and rows[3]["ratio"] is None
    lines = format_modules(rows, least=0.2).splitlines()
    assert lines[2] == "| Net | 98000.00 | 98.0% | 31000.00 | 3.2 |"
    assert lines[4] == "| · · attn | 58000.00 | 58.0% | 29000.00 | 2.0 |" and len(lines) == 6
