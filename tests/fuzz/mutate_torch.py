"""Mutations of what `torch.save` writes: of its content, the pickle in it, the zip file and its bytes."""

import io
import os
import pickle
import pickletools
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.fuzz.cases import BOMB
from tests.fuzz.mutate import junk, mutate_bytes


class Bomb:
    """Unpickling it would make a folder."""

    def __reduce__(self):
        return (os.mkdir, (BOMB,))


def _change_tensors(rng: random.Random, content: dict[Any, Any]) -> None:
    """Changes an entry of nested dicts of tensors."""
    inner = [value for value in content.values() if isinstance(value, dict) and value]
    place = rng.choice([content, *inner, *inner])
    key = rng.choice(list(place))
    value = place[key]
    if not isinstance(value, torch.Tensor):
        place[key] = rng.choice([junk(rng), torch.ones(2), Bomb(), {}, value])
        return
    changes: list[Any] = [
        lambda: value.double(),
        lambda: value.long(),
        lambda: value.to(torch.complex64),
        lambda: value.reshape(-1),
        lambda: value[None],
        lambda: value.T if value.ndim == 2 else value,
        lambda: torch.full_like(value.float(), rng.choice([np.nan, np.inf, 3e38])),
        lambda: torch.zeros(()).expand(rng.choice([3, 10**6, 2**40])),
        lambda: torch.zeros(0, 2**40),
        lambda: value.to_sparse(),
        lambda: torch.quantize_per_tensor(value.float(), 0.1, 0, torch.qint8),
        lambda: np.asarray(value.detach().float()),
        lambda: value.tolist(),
        lambda: Bomb(),
        lambda: None,
    ]
    choice = rng.random()
    if choice < 0.6:
        place[key] = rng.choice(changes)()
    elif choice < 0.8:
        del place[key]
    else:
        new = rng.choice([f"{key}x", f"model.{key}", 7, 2**70, (key, (key,)), None, "", "\udcff", "x" * 10_000])
        place[new] = place[key] if rng.random() < 0.5 else place.pop(key)


def save_changed(rng: random.Random | None, content: dict[str, Any], path: Path, legacy: bool = False) -> None:
    """Writes what torch.save would, changed in its content, its pickle, its zip file or its bytes."""
    choice = 1.0 if rng is None else rng.random()
    if choice < 0.35:
        for _ in range(rng.choice([1, 1, 2])):
            _change_tensors(rng, content)
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=not legacy)
    data = buffer.getvalue()
    if 0.35 <= choice < 0.8 and not legacy:
        data = _change_zip(rng, data)
    elif 0.8 <= choice < 1 or choice < 0.8 and legacy:
        data = mutate_bytes(rng, data)
    path.write_bytes(data)


def _change_zip(rng: random.Random, data: bytes) -> bytes:
    """Another zip file of the same entries, with right checksums, but for one change."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    buffer, what = io.BytesIO(), rng.choice(["pickle", "pickle", "ops", "ops", "ops", "entry", "name", "packed"])
    chosen = rng.randrange(len(entries))
    with zipfile.ZipFile(buffer, "w") as archive:
        for i, (name, content) in enumerate(entries):
            if name.endswith("data.pkl") and what in ("pickle", "ops"):
                content = _change_pickle(rng, content) if what == "ops" else mutate_bytes(rng, content)
            packing = zipfile.ZIP_STORED
            if i == chosen and what == "entry":
                content = mutate_bytes(rng, content)
            elif i == chosen and what == "name":
                name = rng.choice(
                    ["../x", "/etc/x", "x/data/0", name.upper(), name + "\0", "x/data.pkl", entries[0][0]]
                )
            elif i == chosen and what == "packed":
                packing = zipfile.ZIP_DEFLATED
            archive.writestr(name, content, packing)
    return buffer.getvalue()


_INSTRUCTIONS = (
    b"K\x01",
    b"\x8a\x09\0\0\0\0\0\0\0\0\x01",
    b"N",
    b"]",
    b"}",
    b")",
    b"(",
    b"0",
    b"2",
    b"\x85",
    b"\x86",
    b"R",
    b"\x81",
    b"b",
    b"u",
    b"e",
    b"Q",
    b"q\x00",
    b"h\x00",
    b"h\x05",
    b"cbuiltins\neval\n",
    b"cos\nsystem\n",
    b"X\x01\0\0\0x",
    b"G\x7f\xf8\0\0\0\0\0\0",
    b".",
    b"\x93",
    b"\x94",
)


def _change_pickle(rng: random.Random, data: bytes) -> bytes:
    """Instructions left out, given twice, replaced, or in another order; or a call added."""
    places = [position for _, _, position in pickletools.genops(data)] + [len(data)]
    parts = [data[a:b] for a, b in zip(places, places[1:], strict=False)]
    for _ in range(rng.choice([1, 1, 2, 4])):
        at, other = rng.randrange(len(parts)), rng.randrange(len(parts))
        change = rng.randrange(6)
        if change == 0 and len(parts) > 1:
            del parts[at]
        elif change == 1:
            parts.insert(at, parts[other])
        elif change == 2:
            parts[at] = rng.choice(_INSTRUCTIONS)
        elif change == 3:
            parts[at], parts[other] = parts[other], parts[at]
        elif change == 4:
            parts.insert(at, rng.choice(_INSTRUCTIONS) * rng.choice([1, 1, 3, 100]))
        else:
            parts.insert(at, pickle.dumps(Bomb(), 2)[2:-1])
    return b"".join(parts)
