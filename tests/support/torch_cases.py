"""Files like those of torch.save."""

import zipfile
from pathlib import Path

import numpy as np


def save_bytes(path: Path, pickle_bytes: bytes) -> Path:
    """A zip like torch.save's around a given pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickle_bytes)
        archive.writestr("x/data/0", np.arange(12, dtype=np.float32).tobytes())
    return path
