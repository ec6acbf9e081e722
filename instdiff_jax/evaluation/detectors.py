"""Opens what the flags --detector and --features name."""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from instdiff_jax.data.plugs import import_plug
from instdiff_jax.errors import InputError
from instdiff_jax.evaluation.detect import Detection, Detector, Featurizer
from instdiff_jax.evaluation.predictions import Annotated, Predictions

Features = Callable[[UInt8[np.ndarray, "b H W 3"]], Float[np.ndarray, "b d"]]
NAMES = "predictions:FILE.json, transformers:NAME, segmenter:FOLDER or python:MODULE:FUNCTION"
# Kind -> (module, class, constructor). Imported on use: each needs a library, or a folder, that others do without.
_PLUGS = {
    "transformers": ("instdiff_jax.evaluation.hub", "HubDetector", "from_name"),
    "segmenter": ("projects.common.segmenter", "Segmenter", "from_folder"),
    # Its name when shapes were all that it could find.
    "shapes": ("projects.common.segmenter", "Segmenter", "from_folder"),
}


class FunctionDetector:
    """A detector made of a function of images."""

    def __init__(self, detect: Callable[[UInt8[np.ndarray, "b H W 3"]], list[list[Detection]]]):
        self.detect = detect
        self.has_masks = bool(getattr(detect, "has_masks", True))


def open_detector(name: str, split: Annotated) -> Detector | Predictions:
    """The detector that --detector names.

    Args:
        name: `predictions:FILE.json`, `transformers:NAME`, `segmenter:FOLDER`, or `python:MODULE:FUNCTION`, where the
            function maps images to detections, or is a `Detector` or its class.
        split: what predictions refer to.

    Raises:
        InputError: if there is no such detector.
    """
    kind, _, rest = name.partition(":")
    if not rest or kind not in ("predictions", "python", *_PLUGS):
        raise InputError(f"--detector: expected {NAMES}, got {name!r}")
    if kind == "predictions":
        return Predictions(rest, split)
    if kind == "python":
        found = _import_plug("--detector", name)
        found = found() if isinstance(found, type) else found
        return found if isinstance(found, Detector) else FunctionDetector(found)
    module, cls, constructor = _PLUGS[kind]
    try:
        imported = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not module.startswith(f"{error.name}"):
            raise
        raise InputError(f"--detector: {kind}: {module} is not installed; it is part of the repository") from error
    return getattr(getattr(imported, cls), constructor)(rest)


def open_features(name: str | None, detector: Detector | Predictions | None) -> Features | None:
    """The features that --features names.

    Args:
        name: `detector`, `none`, `inception:FILE`, the weights of FID's network, or `python:MODULE:FUNCTION`, a
            function of images; None uses the detector's if it has any.
        detector: the detector in use.

    Raises:
        InputError: if there are no such features.
    """
    own = detector.features if isinstance(detector, Featurizer) else None
    if name is None or name == "none":
        return own if name is None else None
    if name == "detector":
        if own is None:
            raise InputError("--features: the detector has none")
        return own
    if name.startswith("inception:"):
        from instdiff_jax.evaluation.hub import Inception

        return Inception.from_file(name.removeprefix("inception:"))
    if not name.startswith("python:"):
        known = "detector, none, inception:FILE, npz:FILE or python:MODULE:FUNCTION"
        raise InputError(f"--features: expected {known}, got {name!r}")
    return _import_plug("--features", name)


def _import_plug(flag: str, name: str) -> Any:
    """What `python:MODULE:FUNCTION` names; InputError unless it can be called or is a detector."""
    found = import_plug(flag, name)
    if not callable(found) and not isinstance(found, Detector):
        raise InputError(f"{flag}: {name}: expected a function, got {type(found).__name__}")
    return found


def finds_masks(detector: Detector | Predictions) -> bool:
    """Whether a detector's masks mean anything: its attribute `has_masks`, True by default."""
    return bool(getattr(detector, "has_masks", True))


def detector_fingerprint(detector: Detector | Predictions | None) -> str | None:
    """Identifies a detector by content, not by name: its attribute `fingerprint`.

    For predictions only their kind: one detector writes another file for each folder of images.
    """
    if isinstance(detector, Predictions):
        return f"predictions of {'masks' if detector.has_masks else 'boxes'}"
    return getattr(detector, "fingerprint", None)


def run_detector(
    detector: Detector | Predictions, image_ids: Sequence[int], images: UInt8[np.ndarray, "b H W 3"]
) -> list[list[Detection]]:
    """The detections in some images."""
    if isinstance(detector, Predictions):
        return [detector.of_image(image_id) for image_id in image_ids]
    found = detector.detect(images)
    if len(found) != len(images):
        raise ValueError(f"expected detections for {len(images)} images, got {len(found)}")
    return found
