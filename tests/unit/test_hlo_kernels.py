"""Pallas kernels in a compiled program's text: each run counts by the schedule of the kernel that it runs."""

import pytest

from instdiff_jax.analysis.hlo import analyze

CALL = 'custom-call(%x), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"BODY"}}'
PROGRAM = f"""\
HloModule program, entry_computation_layout={{()->f32[8]}}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %p = (s32[], f32[8]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8]{{0}} get-tuple-element(%p), index=1
  %kernel.2 = f32[8]{{0}} {CALL.replace("BODY", "same")}
  ROOT %next = (s32[], f32[8]{{0}}) tuple(%i, %kernel.2)
}}

%condition (q: (s32[], f32[8])) -> pred[] {{
  %q = (s32[], f32[8]{{0}}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %limit = s32[] constant(8)
  ROOT %less = pred[] compare(%j, %limit), direction=LT
}}

ENTRY %main (x: f32[8]) -> f32[8] {{
  %x = f32[8]{{0}} parameter(0)
  %kernel.1 = f32[8]{{0}} {CALL.replace("BODY", "same")}
  %kernel.3 = f32[8]{{0}} {CALL.replace("BODY", "other")}
  %zero = s32[] constant(0)
  %start = (s32[], f32[8]{{0}}) tuple(%zero, %kernel.1)
  %loop = (s32[], f32[8]{{0}}) while(%start), condition=%condition, body=%body
  ROOT %result = f32[8]{{0}} get-tuple-element(%loop), index=1
}}
"""


def test_equal_kernels_have_one_schedule_and_count_as_often_as_they_run():
    costs = analyze(PROGRAM, {"kernel.1": 100.0})
    assert costs.pallas_cycles == 9 * 100, "once by itself, eight times in the loop"
    assert costs.unscheduled_kernels == 1
    assert analyze(PROGRAM, {"kernel.1": 100.0, "kernel.3": 5.0})[4:6] == (905.0, 0)


def test_kernels_without_any_schedule_are_said():
    assert analyze(PROGRAM)[4:6] == (0.0, 10)


@pytest.mark.parametrize("metadata", ["{}", '{\n "name": "kernel"\n}'])
def test_metadata_over_several_lines(metadata):
    attributes = f"frontend_attributes={{kernel_metadata={metadata}}}, backend_config"
    text = PROGRAM.replace("backend_config", attributes)
    assert analyze(text, {"kernel.1": 100.0}) == analyze(PROGRAM, {"kernel.1": 100.0})
