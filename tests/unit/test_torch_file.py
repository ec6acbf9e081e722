"""Files of torch.save and .safetensors: read without torch, never executed, damaged ones refused in one line."""

import collections
import io
import os
import pickle
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from torch_cases import save_bytes

from instdiff_jax.checkpoint import torch_file
from instdiff_jax.checkpoint.unpickle import Global, Inert, read_pickle
from instdiff_jax.errors import InputError

torch = pytest.importorskip("torch")
ROOT = Path(__file__).resolve().parent.parent.parent


def example() -> dict:
    base = torch.arange(24, dtype=torch.float32)
    return {
        "plain": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "turned": base.reshape(4, 6).t(),
        "offset": base[5:17].reshape(3, 4),
        "step": base[1::3],
        "expanded": torch.tensor([1.0, 2.0])[None].expand(5, 2),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        "half": torch.tensor([1.5, -2.0], dtype=torch.float16),
        "double": torch.tensor([1.5], dtype=torch.float64),
        "long": torch.arange(77)[None],
        "flags": torch.tensor([True, False]),
        "parameter": torch.nn.Parameter(torch.ones(2, 2)),
        "ordered": collections.OrderedDict(a=torch.ones(1), b=torch.zeros(1)),
    }


def assert_same(found, expected):
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_same(found[key], expected[key])
    else:
        expected = expected.detach().numpy()
        assert found.dtype == expected.dtype and np.array_equal(found, expected)


def test_reads_what_torch_saves(tmp_path):
    torch.save(example(), tmp_path / "x.pth")
    content = torch_file.read_file(tmp_path / "x.pth")
    assert_same(content, example())
    assert not content["plain"].flags.writeable and not content["plain"].flags.owndata


def test_reads_bfloat16_and_state_dicts_with_metadata(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    torch.save({"m": module.state_dict(), "b": torch.tensor([1.5, 3.0], dtype=torch.bfloat16)}, tmp_path / "x.pth")
    content = torch_file.read_file(tmp_path / "x.pth")
    assert content["b"].dtype == ml_dtypes.bfloat16 and content["b"].astype(np.float32).tolist() == [1.5, 3.0]
    assert_same(content["m"], dict(module.state_dict()))


def test_optimizer_state_and_unknown_objects_do_no_harm(tmp_path):
    module = types.ModuleType("gone_from_here")

    class ListConfig(list):
        def __reduce__(self):
            return (ListConfig, (), {"_metadata": {"ref": int}, "_content": [1]}, iter([1, 2]), iter([("k", 3)]))

        def append(self, item):
            pass

        def extend(self, items):
            pass

        def __setitem__(self, key, value):
            pass

    class DictConfig:
        def __init__(self):
            self.content = {"a": collections.defaultdict(list), "s": {1, 2}, "f": frozenset({3}), "p": Path("x")}

    for cls in (ListConfig, DictConfig):
        cls.__module__, cls.__qualname__ = module.__name__, cls.__name__
        setattr(module, cls.__name__, cls)
    moments = {"step": torch.tensor(1.0), "exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)}
    optimizer = {"state": {0: moments}, "param_groups": [{"lr": 5e-5, "betas": (0.9, 0.999), "params": [0]}]}
    sys.modules[module.__name__] = module
    try:
        torch.save(
            {"w": torch.ones(3), "opt": optimizer, "config_dict": {"c": DictConfig(), "l": ListConfig()}},
            tmp_path / "x.pth",
        )
    finally:
        del sys.modules[module.__name__]
    content = torch_file.read_file(tmp_path / "x.pth")
    assert content["w"].tolist() == [1, 1, 1]
    assert content["opt"]["state"][0]["exp_avg"].shape == (3,)
    assert isinstance(content["config_dict"]["c"], Inert) and "gone_from_here" in content["config_dict"]["c"].name
    assert "gone_from_here" not in sys.modules


class Bomb:
    def __init__(self, *reduction):
        self.reduction = reduction

    def __reduce__(self):
        return self.reduction


def bombs(target: str) -> list[bytes]:
    write = f"open({target!r}, 'w').write('boom')"
    calls = [
        (os.system, (f"touch {target}",)),
        (eval, (write,)),
        (exec, (write,)),
        (subprocess.check_output, (["touch", target],)),
        (open, (target, "w")),
        (__import__, ("antigravity",)),
    ]
    hand = [
        f"cos\nsystem\n(S'touch {target}'\ntR.".encode(),
        f"(S'touch {target}'\nios\nsystem\n.".encode(),
        f"(cos\nsystem\nS'touch {target}'\no.".encode(),
        b"cbuiltins\ngetattr\n(cos\nS'system'\ntR(S'touch " + target.encode() + b"'\ntR.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c"
        + bytes([len(target) + 6])
        + b"touch "
        + target.encode()
        + b"\x85R.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}U\x08__code__cos\nsystem\ns\x86b.",
    ]
    return [pickle.dumps({"model": Bomb(*call)}, protocol) for call in calls for protocol in (0, 2, 4)] + hand


def test_pickle_bombs_run_nothing(tmp_path):
    target = tmp_path / "ran"
    for number, data in enumerate(bombs(str(target))):
        path = save_bytes(tmp_path / f"{number}.pth", data)
        try:
            content = torch_file.read_file(path)
        except InputError as error:
            assert str(path) in str(error)
        else:
            assert isinstance(content["model"], Inert)
        assert not target.exists(), data
    assert "antigravity" not in sys.modules


def test_globals_are_never_looked_up():
    content = read_pickle(b"\x80\x02cno.such.module\nThing\n.", {}, lambda _: None, "x")
    assert isinstance(content, Global) and content.name == "no.such.module.Thing"


def test_deep_nesting_and_large_claims_are_refused(tmp_path):
    deep_key = b"\x80\x02}" + b")" + b"\x85" * 200_000 + b"Ns."
    assert torch_file.read_file(save_bytes(tmp_path / "deep.pth", deep_key)) == {}
    for data in (b"\x80\x04\x8d" + b"\xff" * 8 + b"x.", b"\x80\x02\x8b\xff\xff\xff\x7f.", b"", b"\x80\x02}", b"N."):
        with pytest.raises(InputError):
            torch_file.read_file(save_bytes(tmp_path / "x.pth", data))


@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [((13,), (1,), 0), ((3, 4), (4, 1), 1), ((2,), (-1,), 3), ((-2,), (1,), 0), ((2, 2), (2**40, 1), 0), ((2,), (), 0)],
)
def test_tensors_cannot_reach_beyond_their_storage(tmp_path, size, stride, offset):
    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            return ("storage", torch.FloatStorage, "0", "cpu", 12) if isinstance(obj, Storage) else None

    buffer = io.BytesIO()
    rebuild = torch._utils._rebuild_tensor_v2
    bad = Bomb(rebuild, (Storage(), offset, size, stride, False, collections.OrderedDict()))
    Pickler(buffer, 2).dump({"w": bad})
    with pytest.raises(InputError):
        torch_file.read_file(save_bytes(tmp_path / "x.pth", buffer.getvalue()))


def damaged_copies(data: bytes, count: int):
    random = np.random.default_rng(0)
    for _ in range(count):
        copy = bytearray(data)
        kind = random.integers(4)
        if kind == 0:
            del copy[random.integers(len(copy)) :]
        elif kind == 1:
            start = random.integers(len(copy))
            del copy[start : start + random.integers(1, 50)]
        else:
            for _ in range(random.integers(1, 8)):
                copy[random.integers(len(copy))] = random.integers(256)
        yield bytes(copy)


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_damaged_files_end_in_one_line_or_read(tmp_path, ending):
    path = tmp_path / f"x.{ending}"
    if ending == "pth":
        torch.save({key: value for key, value in example().items() if key not in ("long", "step")}, path)
    else:
        torch_file.write_safetensors(path, {"a": np.ones((3, 4), np.float32), "b": np.arange(5)})
    refused = 0
    for data in damaged_copies(path.read_bytes(), 600):
        path.write_bytes(data)
        try:
            content = torch_file.read_file(path)
            for value in content.values():
                np.sum(value) if isinstance(value, np.ndarray) and value.size < 1000 else None
        except InputError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
    assert refused > 100


def test_damaged_pickles_end_in_one_line_or_read(tmp_path):
    torch.save(example(), tmp_path / "x.pth")
    with zipfile.ZipFile(tmp_path / "x.pth") as archive:
        original = archive.read("x/data.pkl")
    for data in damaged_copies(original, 1500):
        try:
            torch_file.read_file(save_bytes(tmp_path / "y.pth", data))
        except InputError as error:
            assert "y.pth" in str(error) and "\n" not in str(error)


@pytest.mark.parametrize(
    "content", [b"", b"PK", b"not a checkpoint at all", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."]
)
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(InputError, match=r"x\.pth"):
        torch_file.read_file(tmp_path / "x.pth")
    with pytest.raises(InputError, match="nowhere"):
        torch_file.read_file(tmp_path / "nowhere.pth")


def test_safetensors_agree_with_the_library(tmp_path):
    numpy_io = pytest.importorskip("safetensors.numpy")
    torch_io = pytest.importorskip("safetensors.torch")
    arrays = {
        "turned": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "half": np.ones((2, 1, 3), np.float16),
        "ids": np.arange(4),
        "scalar": np.float32(2).reshape(()),
        "empty": np.zeros((0, 2), np.float32),
    }
    torch_file.write_safetensors(tmp_path / "ours.safetensors", arrays)
    theirs = numpy_io.load_file(tmp_path / "ours.safetensors")
    ours = torch_file.read_file(tmp_path / "ours.safetensors")
    for key, value in arrays.items():
        for found in (theirs[key], ours[key]):
            assert found.dtype == value.dtype and np.array_equal(found, value) and found.shape == value.shape
    torch_io.save_file({"b": torch.tensor([[1.5, 2.0]], dtype=torch.bfloat16)}, tmp_path / "theirs.safetensors")
    found = torch_file.read_file(tmp_path / "theirs.safetensors")["b"]
    assert found.dtype == ml_dtypes.bfloat16 and found.astype(np.float32).tolist() == [[1.5, 2.0]]
    torch_file.write_safetensors(tmp_path / "again.safetensors", {"b": found})
    assert torch_io.load_file(tmp_path / "again.safetensors")["b"].dtype == torch.bfloat16


def test_reading_and_writing_safetensors_need_no_torch(tmp_path):
    torch.save(example(), tmp_path / "x.pth")
    code = f"""
import sys
import time
sys.modules["torch"] = None
from instdiff_jax.checkpoint import torch_file
content = torch_file.read_file({str(tmp_path / "x.pth")!r})
torch_file.write_safetensors({str(tmp_path / "y.safetensors")!r}, {{"turned": content["turned"]}})
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    assert np.array_equal(torch_file.read_file(tmp_path / "y.safetensors")["turned"], example()["turned"].numpy())
    assert not list(tmp_path.glob(".*"))
