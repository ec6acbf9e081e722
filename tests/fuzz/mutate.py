"""Mutations of files: of JSON by its structure, and of any file by its bytes. All chance comes from a given Random."""

import json
import random
from collections.abc import Callable
from typing import Any


class Raw(str):
    """JSON text that is written as it is."""


class Pairs(list):
    """An object as (key, value) pairs, so that a key may occur twice."""


# Values that no field expects, or that some reader may take for something else.
JUNK: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    0.5,
    -0.0,
    1e-320,
    1e308,
    255,
    2**31,
    2**53 + 1,
    2**63,
    2**64,
    -(2**63) - 1,
    10**30,
    Raw("NaN"),
    Raw("Infinity"),
    Raw("-Infinity"),
    Raw("1e999"),
    Raw("9" * 400),
    Raw("-" + "9" * 5000),
    Raw('"\\ud800"'),
    Raw('"\\udc00x"'),
    Raw("[" * 200_000 + "]" * 200_000),
    Raw('{"a":' * 500 + "1" + "}" * 500),
    "",
    " ",
    "0",
    "1",
    "1.0",
    "true",
    "no",
    "nan",
    "../../outside",
    "/dev/zero",
    "/etc/passwd",
    "..",
    ".hidden",
    "a\0b",
    "a\nb\r\x1b[31m",
    "\u202eabc",
    "x" * 100_000,
    "aĀ\U0001f600",
    [],
    {},
    [[]],
    [{}],
    [None],
    [0, 0, 0, 0],
    [1, 2, 3],
    ["1", "2", "3", "4"],
    [0.0] * 3000,
    {"size": [2**31, 2**31], "counts": "0"},
    {"": 0},
)
_KEYS = ("", "id", "ID", "__proto__", "a.b", "../x", "\0", "x" * 1000, "caption ")


def junk(rng: random.Random) -> Any:
    """One of the values above."""
    return rng.choice(JUNK)


def mutate_json(rng: random.Random, value: Any) -> Any:
    """A copy of a JSON value with one to three changes."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        holder = {"": value}
        places = list(_places(holder))
        container, key = rng.choice(places)
        _change(rng, container, key, places)
        value = holder[""]
    return value


def _places(container: Any) -> Any:
    """(container, key) of every value inside."""
    pairs = container.items() if isinstance(container, dict) else enumerate(container)
    for key, value in list(pairs):
        yield container, key
        if isinstance(value, dict) or type(value) is list:
            yield from _places(value)


def _change(rng: random.Random, container: Any, key: Any, places: list) -> None:
    value = container[key]
    choice = rng.random()
    if choice < 0.25:
        container[key] = junk(rng)
    elif choice < 0.4 and key != "":
        del container[key]
    elif choice < 0.5:  # a value of another field
        other, place = rng.choice(places)
        if place in other if isinstance(other, dict) else place < len(other):
            container[key] = json.loads(json.dumps(other[place], default=str))
    elif choice < 0.55:
        container[key] = rng.choice([[value], {"a": value}, [value, value], str(value)])
    elif isinstance(value, bool) or value is None:
        container[key] = junk(rng)
    elif isinstance(value, (int, float)):
        container[key] = _number(rng, value)
    elif isinstance(value, str):
        container[key] = _text(rng, value)
    elif isinstance(value, dict):
        container[key] = _object(rng, value)
    elif type(value) is list:
        container[key] = _list(rng, value)


def _number(rng: random.Random, value: Any) -> Any:
    new = [-value, value + 1, value - 1, value + 0.5, value * 1000, float(value), str(value), bool(value), [value]]
    return rng.choice([*new, 0, 2**31 - 1, 2**62, 1e9, 1e20, 1e-9])


def _text(rng: random.Random, value: str) -> Any:
    at = rng.randint(0, len(value))
    inserted = rng.choice(["\0", "\n", "\u2028", "/", "..", "é", " ", '"', "\U0001f600", "%s", "{}"])
    return rng.choice([value[:at] + inserted + value[at:], value[:at], value.upper(), value * 2, "", list(value[:20])])


def _object(rng: random.Random, value: dict) -> Any:
    keys = list(value)
    choice = rng.randrange(5) if keys else 4
    if choice == 0:  # a key that occurs twice
        key = rng.choice(keys)
        return Pairs([*value.items(), (key, rng.choice([value[key], junk(rng)]))])
    if choice == 1:  # values change their places
        shuffled = rng.sample(list(value.values()), len(value))
        return dict(zip(keys, shuffled, strict=True))
    if choice == 2:  # a key in another spelling
        old = rng.choice(keys)
        new = rng.choice([old.upper(), old + " ", old[:-1], old.capitalize(), *_KEYS])
        return {new if key == old else key: item for key, item in value.items()}
    if choice == 3:
        return list(value.items())
    return value | {rng.choice(_KEYS): junk(rng)}


def _list(rng: random.Random, value: list) -> Any:
    one = rng.choice(value) if value else junk(rng)
    return rng.choice(
        [
            value[: len(value) // 2],
            value[:-1],
            [*value, one],
            [*value, junk(rng)],
            value * rng.choice([2, 7, 40]),
            value[::-1],
            [value],
            [item for item in value for item in (item if type(item) is list else [item])],
            dict(zip(map(str, range(len(value))), value, strict=True)),
        ]
    )


def dump_json(value: Any) -> bytes:
    """The file of a value with `Raw` and `Pairs` in it."""
    return _text_of(value).encode("utf-8", "surrogatepass")


def _text_of(value: Any) -> str:
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, (Pairs, dict)):
        pairs = value.items() if isinstance(value, dict) else value
        return "{" + ", ".join(f"{json.dumps(str(key))}: {_text_of(item)}" for key, item in pairs) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_text_of, value)) + "]"
    return json.dumps(value)


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """A copy of a file's bytes with one to three changes."""
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        data = rng.choice(BYTES)(rng, data)
    return data


def _flip(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8]) if data else 0):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.choice([0, 1, len(data) // 2, max(len(data) - 1, 0), rng.randint(0, len(data))])]


def _span(rng: random.Random, data: bytes) -> tuple[int, int]:
    start = rng.randint(0, len(data))
    return start, min(start + rng.choice([1, 4, 16, 256]), len(data))


def _zero(rng: random.Random, data: bytes) -> bytes:
    start, end = _span(rng, data)
    return data[:start] + bytes([rng.choice([0, 0, 255])]) * (end - start) + data[end:]


def _splice(rng: random.Random, data: bytes) -> bytes:
    start, end = _span(rng, data)
    at = rng.randint(0, len(data))
    return data[:at] + data[start:end] + data[rng.choice([at, min(at + end - start, len(data))]) :]


def _remove(rng: random.Random, data: bytes) -> bytes:
    start, end = _span(rng, data)
    return data[:start] + data[end:]


def _insert(rng: random.Random, data: bytes) -> bytes:
    at = rng.choice([0, len(data), rng.randint(0, len(data))])
    return data[:at] + rng.choice([b"\0", b"\xff", b"\xef\xbb\xbf", b"\x80", b"9" * 50, rng.randbytes(8)]) + data[at:]


BYTES: tuple[Callable[[random.Random, bytes], bytes], ...] = (_flip, _flip, _cut, _zero, _splice, _remove, _insert)


def json_file(rng: random.Random | None, value: Any) -> bytes:
    """The JSON file of a value: as it is without a Random, else with changes of its structure, its bytes, or both."""
    if rng is None:
        return dump_json(value)
    choice = rng.random()
    data = dump_json(mutate_json(rng, value) if choice < 0.9 else value)
    if choice > 0.85:
        data = mutate_bytes(rng, data)
    return data.decode("utf-8", "replace").encode("utf-16") if choice > 0.995 else data


def any_file(rng: random.Random | None, data: bytes) -> bytes:
    """A file's bytes, with changes if there is a Random."""
    return data if rng is None else mutate_bytes(rng, data)
