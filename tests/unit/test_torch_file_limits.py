"""Files of weights that ask for too much, name something twice or have changed: refused in one line, in time."""

import time
import zipfile

import numpy as np
import pytest
from torch_cases import save_bytes

from instdiff_jax.checkpoint import torch_file
from instdiff_jax.errors import InputError

torch = pytest.importorskip("torch")


def grown(key: bytes) -> bytes:
    """A small pickle of one tensor whose storage's key is `key`, and nested tuples of 2^200 items around it."""
    nested = key + b"".join(b"q" + bytes([n]) + b"h" + bytes([n]) + b"\x86" for n in range(200))
    head = b"\x80\x02}U\x01wctorch._utils\n_rebuild_tensor_v2\n((U\x07storagectorch\nFloatStorage\n"
    return head + nested + b"U\x03cpuK\x0ctQK\x00K\x0c\x85K\x01\x85\x89}tRs."


def test_a_storage_is_named_by_text_alone(tmp_path):
    with pytest.raises(InputError, match="storage of unknown kind"):
        torch_file.read_file(save_bytes(tmp_path / "x.pth", grown(b"U\x010")))


GIVE = b"ctorch\nSize\nh\x00\x85R0"  # the list of the memo's place 0 to a function
HUNGRY = {
    "a long list, given again and again": b"\x80\x02("
    + b"N" * 900_000
    + b"lq\x000"
    + b"ctorch\nSize\nh\x00\x85R0" * 900,
    "more instructions than any checkpoint": b"\x80\x02" + b"N0" * 3_000_000 + b"}.",
    "a deep stack": b"\x80\x02" + b"N" * 2_000_000 + b"}.",
    "a large memo": b"\x80\x04N" + b"\x94" * 2_000_000 + b"}.",
    "many arguments": b"\x80\x02ctorch\nSize\n(" + b"N" * 900_000 + b"tR.",
}


@pytest.mark.parametrize("kind", HUNGRY)
def test_pickles_that_ask_for_too_much_are_refused(tmp_path, kind):
    start = time.monotonic()
    with pytest.raises(InputError, match="more entries than any checkpoint|with 900000 arguments"):
        torch_file.read_file(save_bytes(tmp_path / "x.pth", HUNGRY[kind]))
    assert time.monotonic() - start < 60


def test_headers_that_ask_for_too_much_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    body = b'{"a":[' + b"[]," * 10_000_000 + b"0]}"
    path.write_bytes(len(body).to_bytes(8, "little") + body)
    with pytest.raises(InputError, match="its header claims"):
        torch_file.read_file(path)
    body = b'{"a":{"dtype":"F32","shape":"' + b"x" * 100_000 + b'","data_offsets":[0,0]}}'
    path.write_bytes(len(body).to_bytes(8, "little") + body)
    with pytest.raises(InputError) as error:
        torch_file.read_file(path)
    assert len(str(error.value)) < 1000


def test_one_number_is_no_tensor_of_terabytes(tmp_path):
    torch.save({"w": torch.ones(()).expand(2**40)}, tmp_path / "x.pth")
    with pytest.raises(InputError, match="claims more than its storage holds"):
        torch_file.read_file(tmp_path / "x.pth")


def test_a_name_that_occurs_twice_is_named(tmp_path):
    with pytest.raises(InputError, match="the key 'w' occurs twice"):
        torch_file.read_file(save_bytes(tmp_path / "x.pth", b"\x80\x02}(U\x01wK\x01U\x01wK\x02u."))
    with zipfile.ZipFile(save_bytes(tmp_path / "y.pth", b"\x80\x02}."), "a") as archive:
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("x/data/0", b"other")
    with pytest.raises(InputError, match="the name 'x/data/0' occurs twice"):
        torch_file.read_file(tmp_path / "y.pth")


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_a_flipped_bit_of_a_tensor_is_noticed(tmp_path, ending):
    path = tmp_path / f"x.{ending}"
    value = np.arange(300, dtype=np.float32)
    if ending == "pth":
        torch.save({"a": torch.ones(3), "b": torch.from_numpy(value)}, path)
    else:
        torch_file.write_safetensors(path, {"a": np.ones(3, np.float32), "b": value})
    content = bytearray(path.read_bytes())
    content[content.index(value.tobytes()) + 600] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"(data/1|b): damaged: its checksum"):
        torch_file.read_file(path)
    assert (torch_file.read_file(path, verify=False)["b"] != value).sum() == 1
