"""What several tests share: the parity data, deterministic weights and the error measure."""

import json
import sys
from pathlib import Path

import numpy as np

PARITY = Path(__file__).parent / "parity"
sys.path.insert(0, str(PARITY))

from weights import make_array  # noqa: E402  (lives beside the parity data)


def relative_error(a, b) -> float:
    """max|a − b| / max|b|: the measure of every parity number in this project."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape, (a.shape, b.shape)
    return float(np.abs(a - b).max() / np.abs(b).max())


def parity(name: str) -> dict[str, np.ndarray]:
    """The arrays of tests/parity/NAME.npz."""
    with np.load(PARITY / f"{name}.npz", allow_pickle=False) as data:
        return dict(data)


def state_dict(spec: str, seed: int = 0) -> dict[str, np.ndarray]:
    """The deterministic PyTorch state dict whose shapes tests/parity/spec_SPEC.json lists."""
    shapes = json.loads((PARITY / f"spec_{spec}.json").read_text())
    return {key: make_array(key, shape, seed) for key, shape in shapes.items()}
