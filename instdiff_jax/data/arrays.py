"""Arrays on disk that are filled bit by bit."""

import os
import zipfile
import zlib
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np

from instdiff_jax.errors import FULL_DISK

# What numpy raises for a damaged .npy file; parsing the text of its header may raise the last three.
DAMAGED = (OSError, ValueError, EOFError, MemoryError, OverflowError, SyntaxError, TypeError, TokenError)
# And reading an .npz: a zip may also lack a member, be encrypted, or be packed in a way that is not supported.
DAMAGED_ZIP = (*DAMAGED, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error)


def new_array(file: str | Path, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    """A new memory-mapped .npy file of zeros that has all its room on the disk.

    Without, writing to it where the disk is full would end the process by a signal.

    Raises:
        OSError: where there is no room for it.
    """
    array = np.lib.format.open_memmap(file, "w+", np.dtype(dtype), shape)
    if hasattr(os, "posix_fallocate"):
        with open(file, "r+b") as opened:
            try:
                os.posix_fallocate(opened.fileno(), 0, os.path.getsize(file))
            except OSError as error:
                if error.errno in FULL_DISK:  # anything else: a file system that cannot say
                    raise
    return array
