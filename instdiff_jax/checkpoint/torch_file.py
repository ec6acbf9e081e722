"""Reads and writes PyTorch checkpoint files: the zip files of `torch.save`, and .safetensors.

Reading needs no torch and executes nothing. Arrays are read-only views of the memory-mapped file, so only what is used
is read from disk.
"""

import json
import os
import re
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from instdiff_jax.checkpoint.unpickle import Global, Inert, add_items, read_pickle
from instdiff_jax.checkpoint.verify import compare_arrays
from instdiff_jax.errors import InputError, short
from instdiff_jax.files import write_file
from instdiff_jax.paths import check_regular

_STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
_SAFETENSORS = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
# Bytes of the tensor list; about 100 per tensor in real files. The limits bound the time and memory of reading it.
_MAX_HEADER = 1 << 24
_MAX_PICKLE = 1 << 26
_MAX_DIRECTORY = 1 << 24
_MAX_EXPANDED = 1 << 16  # a tensor may repeat its storage up to here; steps of 0 make terabytes of one number
_CRC = "crc32"  # in the metadata of our .safetensors: eight hexadecimal digits for each tensor, in the header's order


def read_file(path: str | os.PathLike, verify: bool = True) -> dict[str, Any]:
    """Reads a .pth, .ckpt or .safetensors file; the content determines the format.

    Args:
        path: the file.
        verify: compare the tensors with the checksums in the zip file, or those that we write to .safetensors.

    Returns:
        Nested dicts whose tensors are memory-mapped, read-only numpy arrays (bfloat16 by ml_dtypes), in
        PyTorch's order of axes.

    Raises:
        InputError: for a missing, damaged or unknown file.
    """
    path = Path(path)
    check_regular(path)
    try:
        data = np.memmap(path, np.uint8, mode="r")
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    if bytes(data[:4]) == b"PK\x03\x04":
        return _read_zip(path, data, verify)
    if bytes(data[8:9]) == b"{":
        return _read_safetensors(path, data, verify)
    if bytes(data[:1]) == b"\x80":
        raise InputError(f"{path}: a file of torch.save before 1.6; load it with torch and save it again")
    raise InputError(f"{path}: neither a zip file of torch.save nor a .safetensors file")


class _Storage:
    """The bytes of one stored tensor storage and the type of its elements."""

    def __init__(self, data: np.ndarray, dtype: np.dtype, name: str):
        self.data, self.dtype, self.name = data, dtype, name


def _read_zip(path: Path, data: np.ndarray, verify: bool) -> dict[str, Any]:
    try:
        _check_directory(data)
        with zipfile.ZipFile(path) as archive:
            entries = _no_duplicates([(info.filename, info) for info in archive.infolist()])
            pickles = [name for name in entries if name == "data.pkl" or name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise InputError(f"{path}: not a file of torch.save: it holds {len(pickles)} data.pkl, expected one")
            info = entries[pickles[0]]
            if info.file_size > min(_MAX_PICKLE, data.size) or info.compress_type != zipfile.ZIP_STORED:
                raise InputError(f"{path}: {pickles[0]} is compressed or too large")
            pickle_bytes = archive.read(info)
    except InputError:
        raise
    except (zipfile.BadZipFile, struct.error, OSError, ValueError, NotImplementedError, OverflowError, EOFError,
            RuntimeError) as error:  # fmt: skip
        raise InputError(f"{path}: damaged or cut off ({error})") from error
    if verify:
        stored = [info for info in entries.values() if not info.is_dir()]
        compare_arrays(path, ((info.filename, _record(path, data, info), 0, info.CRC) for info in stored))
    prefix = pickles[0].removesuffix("data.pkl")
    order = entries.get(f"{prefix}byteorder")
    if order is not None and bytes(_record(path, data, order)) != b"little":
        raise InputError(f"{path}: its byte order is not little-endian")

    def persistent_load(identifier: Any) -> Any:
        kind, storage_type, key = identifier[:3]
        # Text only: nested tuples of a few hundred bytes can become terabytes as text.
        if kind != "storage" or not isinstance(storage_type, Global) or not isinstance(key, str):
            raise ValueError("a storage of unknown kind")
        dtype = _STORAGES.get(storage_type.name.removeprefix("torch."))
        if dtype is None:
            return Inert(storage_type.name)
        name = f"{prefix}data/{key}"
        if name not in entries:
            raise InputError(f"{path}: {short(name)} is missing")
        return _Storage(_record(path, data, entries[name]), np.dtype(dtype), f"{path}: {name}")

    functions = {
        "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
        "torch._utils._rebuild_tensor": _rebuild_tensor,
        "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
        "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
        "torch.nn.parameter.Parameter": lambda tensor, *_: tensor,
        "collections.OrderedDict": _ordered_dict,
        "torch.Size": lambda sizes=(): sizes,
    }
    content = read_pickle(pickle_bytes, functions, persistent_load, str(path))
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a dict of weights, got {type(content).__name__}")
    return content


def _check_directory(data: np.ndarray) -> None:
    """Raises ValueError if a zip file's list of entries is too long."""
    tail = bytes(data[-(1 << 16) - 22 :])
    end, end64 = tail.rfind(b"PK\x05\x06"), tail.rfind(b"PK\x06\x06")
    size = int.from_bytes(tail[end + 12 : end + 16], "little") if end >= 0 else 0
    if size == 0xFFFFFFFF:
        size = int.from_bytes(tail[end64 + 40 : end64 + 48], "little") if end64 >= 0 else 0
    if size > _MAX_DIRECTORY:
        raise ValueError(f"a list of entries of {size} bytes")


def _record(path: Path, data: np.ndarray, info: zipfile.ZipInfo) -> np.ndarray:
    """The bytes of one uncompressed zip entry."""
    start = info.header_offset
    header = bytes(data[start : start + 30])
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise InputError(f"{path}: {info.filename} is compressed, expected it stored as torch.save does")
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise InputError(f"{path}: damaged or cut off at {info.filename}")
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    start += 30 + name_length + extra_length
    if start + info.file_size > data.size:
        raise InputError(f"{path}: cut off inside {info.filename}")
    return data[start : start + info.file_size]


def _rebuild_tensor(storage: Any, offset: int, size: tuple, stride: tuple, *_: Any) -> Any:
    """A tensor as a view of its storage. PyTorch counts offset and strides in elements."""
    if isinstance(storage, Inert):
        return storage
    if not isinstance(storage, _Storage) or len(size) != len(stride) or len(size) > 32:
        raise ValueError("a tensor of unknown form")
    numbers = (offset, *size, *stride)
    if not all(type(number) is int and 0 <= number < 2**48 for number in numbers):
        raise InputError(f"{storage.name}: a tensor with a negative or huge size")
    itemsize, count = storage.dtype.itemsize, 1
    for n in size:
        count *= n
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if count else offset - 1
    if (last + 1) * itemsize > storage.data.size or count * itemsize > max(storage.data.size, _MAX_EXPANDED):
        raise InputError(f"{storage.name}: a tensor of shape {list(size)} claims more than its storage holds")
    if not count:
        return np.zeros(size, storage.dtype)
    strides = tuple(step * itemsize for step in stride)
    return np.ndarray(size, storage.dtype, buffer=storage.data, offset=offset * itemsize, strides=strides)


def _ordered_dict(items: Any = ()) -> dict:
    result: dict = {}
    add_items(result, items)
    return result


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"the name {short(twice)} occurs twice")
    return result


def _read_safetensors(path: Path, data: np.ndarray, verify: bool) -> dict[str, np.ndarray]:
    length = int.from_bytes(bytes(data[:8]), "little")
    if not 2 <= length <= min(_MAX_HEADER, data.size - 8):
        raise InputError(f"{path}: damaged or cut off: its header claims {length} bytes")
    try:
        header = json.loads(bytes(data[8 : 8 + length]).decode(), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: its header is damaged ({error})") from error
    tensors, body = {}, data[8 + length :]
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape = np.dtype(_SAFETENSORS[entry["dtype"]]), entry["shape"]
            begin, end = entry["data_offsets"]
            if not isinstance(shape, list):
                raise ValueError(f"a shape of {short(shape)}")
            if not all(type(n) is int and 0 <= n < 2**48 for n in (begin, end, *shape)) or len(shape) > 32:
                raise ValueError("a negative or huge number")
            count = 1
            for n in shape:
                count *= n
            if not begin <= end <= body.size or end - begin != count * dtype.itemsize:
                raise ValueError(f"bytes {begin} to {end} of {body.size} for a shape of {shape}")
            tensors[name] = body[begin:end].view(dtype).reshape(shape)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            problem = f"damaged, cut off or of unknown type ({str(error)[:200]})"
            raise InputError(f"{path}: {short(name)}: {problem}") from error
    metadata = header.get("__metadata__")
    crcs = metadata.get(_CRC) if isinstance(metadata, dict) and verify else None
    if crcs is not None:
        if not re.fullmatch(r"[0-9a-f]*", str(crcs)) or len(str(crcs)) != 8 * len(tensors):
            raise InputError(f"{path}: its header is damaged (checksums)")
        expected = (int(crcs[8 * n : 8 * n + 8], 16) for n in range(len(tensors)))
        parts = zip(tensors.items(), expected, strict=True)
        compare_arrays(path, ((name, _bytes(array), _entry_crc(name, array), crc) for (name, array), crc in parts))
    return tensors


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
    """The text that a .safetensors file holds beside its tensors; {} for another file, or a damaged one."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if length <= _MAX_HEADER else b""
    try:
        metadata = json.loads(header.decode())["__metadata__"]
    except (ValueError, RecursionError, KeyError, TypeError):
        return {}
    return metadata if isinstance(metadata, dict) else {}


def _entry_crc(name: str, array: np.ndarray) -> int:
    """Checksum of a tensor's header entry. The checksum of its bytes continues from it."""
    return zlib.crc32(f"{name} {array.dtype} {array.shape}".encode())


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def write_safetensors(path: str | os.PathLike, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a .safetensors file, completely or not at all, with one array in memory at a time."""
    names = {np.dtype(dtype): name for name, dtype in _SAFETENSORS.items()}
    crcs = "".join(f"{zlib.crc32(_bytes(array).data, _entry_crc(name, array)):08x}" for name, array in tensors.items())
    header: dict[str, Any] = {"__metadata__": {"format": "pt", _CRC: crcs}}
    offset = 0
    for name, array in tensors.items():
        end = offset + array.size * array.dtype.itemsize
        header[name] = {"dtype": names[array.dtype], "shape": list(array.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)

    def write(file: BinaryIO) -> None:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for array in tensors.values():
            file.write(_bytes(array).data)

    write_file(path, write)


def write_torch(path: str | os.PathLike, content: dict[str, dict[str, Any]]) -> None:
    """Writes dicts of arrays with `torch.save`, completely or not at all.

    Replaces the arrays in `content` by tensors one by one, to avoid a second copy of the model.

    Raises:
        InputError: if torch is not installed or the file cannot be written.
    """
    path = Path(path)
    try:
        import torch
    except ImportError as error:
        raise InputError(f"{path}: writing .pth needs torch; write .safetensors, or install torch") from error

    def tensor(array: np.ndarray) -> "torch.Tensor":
        array = np.require(array, requirements=["C", "W"])
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    def save(file: BinaryIO) -> None:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # raised while torch closes the file after a failed write
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise

    for group in content.values():
        for key in group:
            group[key] = tensor(group[key])
    try:
        write_file(path, save)
    except RuntimeError as error:  # torch raises this for a full disk
        raise InputError(f"{path}: cannot be written ({str(error).strip().splitlines()[0]})") from error
