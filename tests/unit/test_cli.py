"""The dispatch of commands: help, one line for every error, exit codes."""

import os
import subprocess
import sys
import tomllib
from types import SimpleNamespace

import pytest

from common import ROOT
from instdiff_jax import InputError, __version__, cli


@pytest.fixture
def command(monkeypatch):
    """Registers a command `fake` that raises what it is given."""

    def register(error):
        def main(argv):
            assert argv == ["--flag"]
            raise error

        monkeypatch.setitem(sys.modules, "fake_command", SimpleNamespace(main=main))
        monkeypatch.setitem(cli.COMMANDS, "fake", ("fake_command", "a test's"))

    return register


def ended(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return stop.value.code, lines[0]


def test_help_lists_every_command(capsys):
    for argv in (["--help"], ["-h"], []):
        cli.main(argv)
        out = capsys.readouterr().out
        assert out.startswith("usage: instdiff COMMAND") and all(f"  {name} " in out for name in cli.COMMANDS)


def test_version(capsys):
    cli.main(["--version"])
    assert capsys.readouterr().out == f"instdiff {__version__}\n"


def test_bad_input(capsys, command):
    assert ended(capsys, "paint")[0] == 2
    command(InputError("a.json: caption:\nexpected a string"))
    assert ended(capsys, "fake", "--flag") == (2, "error: a.json: caption: expected a string")


def test_interrupt(capsys, command):
    command(KeyboardInterrupt())
    assert ended(capsys, "fake", "--flag") == (130, "interrupted")


def test_package_of_an_extra_is_not_installed(capsys, command):
    command(ModuleNotFoundError("no", name="grain.python"))
    assert ended(capsys, "fake", "--flag") == (2, "error: fake needs grain.python; pip install 'instdiff_jax[train]'")
    command(ModuleNotFoundError("no", name="mistake"))
    with pytest.raises(ModuleNotFoundError):
        cli.main(["fake", "--flag"])


def test_extras_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {line.partition(">")[0].replace("-", "_") for line in project["optional-dependencies"]["train"]}
    assert names == {name for name, extra in cli.EXTRAS.items() if extra == "train"}


@pytest.mark.parametrize(
    "env", [{"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, {"PYTHONIOENCODING": "ascii"}]
)
@pytest.mark.parametrize("command", ["sample", "convert", "evaluate", "build-coco"])
def test_any_terminal(env, command):
    script = "from instdiff_jax import cli; cli.survive_any_terminal(); print('\\u2026 \\u03b1'); "
    script += f"cli.main([{command!r}, '--help'])"
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | env, capture_output=True, check=False)
    assert done.returncode == 0 and done.stdout.startswith(b"\\u2026 \\u03b1\n"), done.stderr


def test_reader_that_has_gone():
    script = "from instdiff_jax import cli; cli.main(['--help']); cli.main(['--version'])"
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-c", script], stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert done.returncode == 0 and done.stderr == b""


def test_errors_shorten_what_they_quote(capsys, command):
    command(InputError("a.json: " + 100_000 * "k" + ": unknown"))
    code, line = ended(capsys, "fake", "--flag")
    assert code == 2 and len(line) < 200 and line.endswith("unknown")
