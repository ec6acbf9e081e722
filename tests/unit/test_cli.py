"""The dispatch of commands: help, one line for every error, exit codes."""

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
