"""What the compiler writes beside a program, and what is read of it."""

import jax
import jax.numpy as jnp

from instdiff_jax.aot import programs
from instdiff_jax.aot.report import xla_counts
from instdiff_jax.cli import aot


def test_text_that_jax_cannot_read_is_the_compilers_own(tmp_path):
    """As with v6e's programs: the largest module of the dump is the program."""

    class Unreadable:
        def as_text(self):
            raise jax.errors.JaxRuntimeError("INTERNAL: Async done requires its operand to be an asynchronous op")

        def cost_analysis(self):
            return self.as_text()

    compiled = jax.jit(lambda x: x @ x).lower(jnp.ones((4, 4))).compile()
    (tmp_path / "module_0001.f.after_codegen.txt").write_text(compiled.as_text())
    (tmp_path / "module_0002.f.after_codegen.txt").write_text("HloModule")
    assert programs.program_text(Unreadable(), tmp_path) == programs.program_text(compiled, tmp_path)
    assert xla_counts(Unreadable()) == {} and xla_counts(compiled)["flops"] == 2 * 4**3


def test_the_dump_of_a_program_is_removed_with_its_folders(tmp_path):
    """The compiler gives a large program a folder of its own there."""
    inside = tmp_path / "dump" / "module_0000.jit_denoise.cl_1" / "fusion.1.txt"
    inside.parent.mkdir(parents=True)
    for path in (inside, tmp_path / "dump" / "1-copy.txt"):
        path.touch()
    aot.empty(tmp_path / "dump")
    assert not list((tmp_path / "dump").iterdir())
