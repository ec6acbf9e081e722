"""Reads `--config=FILE` and `--config.KEY=VALUE` from a command line."""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from absl import flags
from ml_collections import ConfigDict, config_flags

from instdiff_jax.config import NEGATIVE_PROMPT, Settings
from instdiff_jax.errors import InputError

T = TypeVar("T", bound=Settings)


def read_config(argv: Sequence[str], settings: type[Settings]) -> tuple[ConfigDict, list[str]]:
    """Reads a config file, fills in the defaults, and applies the flags that override it.

    Without `--config` the config is the released model's and the paper's recipe. No file is read unless it is named.

    Args:
        argv: arguments without the program's name.
        settings: the class whose defaults are filled in. What it lacks stays in the config.

    Returns:
        The config, and the arguments that are not about it.

    Raises:
        InputError: for a missing or broken file, an override of an unknown key, or a value of the wrong type.
    """
    files, overrides, rest = _split_arguments(argv)
    released = {"sampling": {"negative_prompt": NEGATIVE_PROMPT}}
    given = _load_file(files).to_dict(preserve_field_references=True) if files else released
    config = _merge(settings().to_config(), given)
    values = flags.FlagValues()
    with _config_errors(overrides):
        config_flags.DEFINE_config_dict("config", ConfigDict(config), flag_values=values, sys_argv=["", *overrides])
        values(["", *overrides])
        return values["config"].value, rest


def read_settings(argv: Sequence[str], settings: type[T]) -> tuple[T, list[str]]:
    """As `read_config`, with the config as settings; an unknown key is an InputError too."""
    config, rest = read_config(argv, settings)
    return settings.from_dict(config.to_dict()), rest


def names_config(argv: Sequence[str]) -> bool:
    """Whether a command line names a config file."""
    return bool(_split_arguments(argv)[0])


def _split_arguments(argv: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """The arguments that name a config file, those that override its keys, and the others."""
    files, overrides, rest = [], [], []
    goes_to = None  # where the value of the flag before goes
    for arg in argv:
        name = arg.lstrip("-").split("=")[0] if arg.startswith("-") else ""
        if goes_to is not None:
            goes_to.append(arg)
            goes_to = None
            continue
        target = files if name == "config" else overrides if name.startswith("config.") else rest
        target.append(arg)
        if target is not rest and "=" not in arg:
            goes_to = target
    return files, overrides, rest


def _load_file(arguments: list[str]) -> ConfigDict:
    values = flags.FlagValues()
    arguments = ["", *arguments]
    with _config_errors([]):
        config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=arguments)
        values(arguments)
        config = values["config"].value
    if not isinstance(config, ConfigDict):
        raise InputError(f"{arguments[1]}: expected a config file, for example configs/coco.py")
    return config


def _merge(defaults: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of nested `defaults` with the nested values in their place."""
    merged = dict(defaults)
    for key, value in values.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


@contextlib.contextmanager
def _config_errors(overrides: list[str]) -> Iterator[None]:
    """Turns whatever reading a config raises into an InputError of one line; a config file is a program."""
    try:
        yield
    except InputError:
        raise
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, ImportError, SyntaxError) as error:
        _check_keys(overrides, str(error))
        # absl quotes the whole traceback of what a config file raises; its last line says what happened.
        raise InputError(f"--config: {(str(error).strip().splitlines() or [repr(error)])[-1].strip()}") from error
    except (Exception, SystemExit) as error:
        raise InputError(f"--config: {type(error).__name__}: {error}") from error


def _check_keys(overrides: Sequence[str], message: str) -> None:
    """Raises InputError if ml_collections' message is about a key that an override misspells."""
    # A KeyError quotes its text again: the line break is a backslash and an n.
    quoted = re.match(r"\W*(\w+)\W*(?:n?Did you mean \W*(\w+))?", message)
    for flag in (arg.lstrip("-").split("=")[0] for arg in overrides):
        if quoted and quoted[1] in flag.split(".")[1:] and len(message) < 200:
            meant = f"; did you mean {quoted[2]}?" if quoted[2] else ""
            raise InputError(f"--{flag}: the config has no key {quoted[1]}{meant}")
