"""Reading a TPU kernel's time from the compiler's schedule.

`kernel_bundles.txt` is libtpu 0.0.52's schedule of a small kernel for a v5e, without the instructions that the reader
does not look at. Its grid has 4 steps. A loop of 6 turns runs in every second step, and then another in each.
"""

from pathlib import Path

from instdiff_jax.analysis.kernel_schedule import Loop, read_dump, read_schedule

TEXT = (Path(__file__).parent / "kernel_bundles.txt").read_text()
# From the text: bundles outside the grid, in one step of it but outside loops, and in a turn of each loop.
OUTSIDE, STEP, GUARDED, ALWAYS = 11, 69, 9, 14


def test_loops_and_their_turns():
    schedule = read_schedule(TEXT)
    assert (schedule.bundles, schedule.grid, schedule.open_loops) == (103, 4, 0)
    assert schedule.loops == (Loop(7, 98, 4, False), Loop(59, 67, 6, True), Loop(69, 82, 6, False))
    assert OUTSIDE + STEP + GUARDED + ALWAYS == schedule.bundles


def test_cycles():
    schedule = read_schedule(TEXT)
    always = OUTSIDE + 4 * (STEP + 6 * ALWAYS)
    assert schedule.cycles() == always + 4 * 6 * GUARDED
    assert schedule.cycles(guarded=1 / 2) == always + 2 * 6 * GUARDED


def test_a_loop_of_unknown_length_is_counted_once():
    test = "%p172_p2 = scmp.ge.s32.totalorder %s175_s2, 6 /* loop exit test */"
    assert TEXT.count(test) == 1
    schedule = read_schedule(TEXT.replace(test, ""))
    assert schedule.open_loops == 1
    assert schedule.cycles() == OUTSIDE + 4 * (STEP + 6 * GUARDED + ALWAYS)


def test_a_dump_has_other_programs_than_kernels(tmp_path):
    for name, opcode in (("1-tiny.1", "tpu_custom_call"), ("2-fusion", "fusion"), ("3-TLP", "tpu_custom_call")):
        (tmp_path / f"{name}-02-schedule-analysis_final_bundles.txt").write_text(opcode)
        (tmp_path / f"{name}-03-final_bundles.txt").write_text(TEXT)
    assert [(name, schedule.grid) for name, schedule in read_dump(tmp_path)] == [("tiny.1", 4)]
