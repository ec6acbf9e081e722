"""Measures a folder of pictures: runs detector, CLIP and features over them, and gathers all numbers."""

import dataclasses
import importlib
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Float, UInt8

from instdiff_jax.errors import InputError
from instdiff_jax.evaluation.detect import Detector, Featurizer
from instdiff_jax.evaluation.detectors import Predictions, finds_masks, run_detector
from instdiff_jax.evaluation.fid import Gaussian, fit_gaussian, frechet_distance
from instdiff_jax.evaluation.files import picture_path, read_picture
from instdiff_jax.evaluation.metrics import (
    Found,
    TargetMeasure,
    attribute_accuracy,
    attribute_leakage,
    average_precision,
    mean,
    measure_targets,
)
from instdiff_jax.evaluation.split import Scene, Split, crop_box

Numbers = dict[str, float | None]
Features = Callable[[UInt8[np.ndarray, "b H W 3"]], Float[np.ndarray, "b d"]]
# Groups of the breakdown by the number of instances asked for.
_GROUPS = ((1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (6, 6), (7, 10), (11, 20), (21, 30))


class TextImageModel(Protocol):
    """Pictures and texts as unit vectors: CLIP, or something like it."""

    def embed_images(self, images: list[UInt8[np.ndarray, "h w 3"]]) -> Float[np.ndarray, "n d"]: ...

    def embed_texts(self, texts: list[str]) -> Float[np.ndarray, "n d"]: ...


@dataclasses.dataclass(frozen=True, eq=False)
class Picture:
    """A scene's picture: what was found in it, and how each instance that was asked for came out.

    Attributes:
        clip_global: cosine between picture and caption; None without CLIP.
        clip_local: of each instance that was asked for, between its box's pixels and its caption.
    """

    scene: Scene
    found: list[Found]
    measures: list[TargetMeasure]
    clip_global: float | None = None
    clip_local: tuple[float, ...] = ()

    @property
    def score(self) -> float | None:
        """Mean IoU of the instances (of masks, else of boxes): what pictures are ordered by."""
        return mean(item.box_iou if item.mask_iou is None else item.mask_iou for item in self.measures)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """All that an evaluation found. Numbers are None where there is nothing to measure them with.

    Attributes:
        metrics: of all pictures.
        by_count: (number of instances, metrics of the pictures with so many).
        by_category: category to AP of boxes and masks.
        notes: remarks, a line each.
    """

    pictures: list[Picture]
    metrics: Numbers
    by_count: list[tuple[str, Numbers]]
    by_category: dict[str, Numbers]
    notes: list[str]


class Inspected(NamedTuple):
    """Pictures with what was found in each; the kinds of attributes that can be told, the Fréchet distance where it was
    asked for, and remarks.
    """

    pictures: list[Picture]
    kinds: list[str]
    distance: float | None
    notes: list[str]


def inspect(
    split: Split,
    folder: Path,
    detector: Detector | Predictions | None = None,
    clip: TextImageModel | None = None,
    features: Features | None = None,
    reference: Gaussian | None = None,
    min_score: float = 0.25,
    batch: int = 32,
    report: Callable[[int], None] = lambda count: None,
) -> Inspected:
    """Looks at the pictures of all scenes of a split; they lie in FOLDER/images.

    Args:
        detector: finds instances; without one only CLIP's scores and the Fréchet distance are measured.
        clip: scores pictures and crops against captions, and names attributes where the detector knows none.
        features: describe pictures, for the Fréchet distance to real images; None: it is not measured.
        reference: of the features of other real images than the split's own.
        min_score: less sure detections count for average precision alone.
        batch: pictures in memory at a time.
        report: called with the number of pictures that are done.

    Raises:
        InputError: for missing or broken pictures, and real images if `features` need them.
    """
    pictures, drawn, real = [], [], []
    for first in range(0, len(split.scenes), batch):
        scenes = split.scenes[first : first + batch]
        images = np.stack([read_picture(picture_path(folder, scene), split.size) for scene in scenes])
        found: list[list[Found]] = [[] for _ in scenes]
        if detector is not None:
            has_masks = finds_masks(detector)
            rows = run_detector(detector, [scene.image_id for scene in scenes], images)
            found = [[Found.from_detection(item, has_masks) for item in row] for row in rows]
        for scene, image, row in zip(scenes, images, found, strict=True):
            measures = []
            if detector is not None:
                measures = measure_targets(scene.asked, row, min_score, has_masks)
            scored = (None, ()) if clip is None else _clip_scores(clip, scene, image)
            pictures.append(Picture(scene, row, measures, *scored))
        if features is not None:
            drawn.append(_described(features, images))
            if reference is None:
                real.append(_described(features, np.stack([scene.real_image() for scene in scenes])))
        report(len(scenes))

    notes, kinds = [], []
    if detector is not None:
        kinds = sorted({kind for picture in pictures for target in picture.scene.asked for kind in target.attributes})
        everything = [found for picture in pictures for found in picture.found]
        unknown = _unnamed(pictures, kinds) if everything else []
        if unknown and clip is not None:
            pictures = _name_attributes(pictures, clip, unknown, folder)
        elif unknown:
            kinds = [kind for kind in kinds if kind not in unknown]
            notes.append(f"The detector names no {' and no '.join(unknown)} that the split asks for; --clip would.")
        names = sorted({found.category for found in everything})
        if names and not set(names) & set(split.categories.values()):
            notes.append(
                f"The detector knows none of the split's categories; it found {', '.join(names[:3])} and so on."
            )
        if not finds_masks(detector):
            notes.append("The detector finds boxes only: no number is about masks.")
    distance = None
    if features is not None and len(pictures) > 1:
        described = np.concatenate(drawn)
        reference = reference or fit_gaussian(np.concatenate(real), "features of the real images")
        distance, remarks = _distance(described, reference, len(described))
        notes += remarks
    return Inspected(pictures, kinds, distance, notes)


def measure(split: Split, folder: Path, detector: Detector | Predictions | None = None, **options: Any) -> Outcome:
    """Measures the pictures of all scenes of a split; arguments and errors are those of `inspect`."""
    pictures, kinds, distance, notes = inspect(split, folder, detector, **options)
    metrics = summarize(pictures, split, detector, kinds)
    if distance is not None:
        metrics["FID"] = distance
    by_count = []
    for low, high in _GROUPS:
        group = [picture for picture in pictures if low <= len(picture.scene.asked) <= high]
        if group:
            by_count.append((str(low) if low == high else f"{low}–{high}", summarize(group, split, detector, kinds)))
    if split.left_out:
        notes.append(f"{split.left_out} images of the split have no instance to ask for and are left out.")
    return Outcome(pictures, metrics, by_count, _by_category(pictures, split, detector), notes)


def summarize(
    pictures: Sequence[Picture], split: Split, detector: Detector | Predictions | None, kinds: Sequence[str]
) -> Numbers:
    """The numbers of some pictures, in the order in which reports show them; `images` and `instances` count."""
    targets = [target for picture in pictures for target in picture.scene.asked]
    measures = [item for picture in pictures for item in picture.measures]
    numbers: Numbers = {"images": len(pictures), "instances": len(targets)}
    if detector is not None:
        scenes, found = [picture.scene for picture in pictures], [picture.found for picture in pictures]
        names = list(split.categories.values())
        for name, kind in (("box", "bbox"), ("mask", "segm")):
            if kind == "segm" and not finds_masks(detector):
                continue
            precision = average_precision(scenes, found, kind, names)
            numbers |= {f"{name}_{key}": getattr(precision, key) for key in ("AP", "AP50", "AP75", "AR")}
            numbers[f"{name}_IoU"] = mean(getattr(item, f"{name}_iou") for item in measures)
        numbers["PiM_point"] = mean(item.point_in for item in measures)
        numbers["PiM_scribble"] = mean(item.scribble_in for item in measures)
        numbers["found"] = mean(item.match is not None for item in measures)
        numbers |= attribute_accuracy(targets, measures, kinds)
        numbers |= attribute_leakage([(picture.scene.asked, picture.measures) for picture in pictures], kinds)
    numbers["CLIP_global"] = mean(picture.clip_global for picture in pictures)
    numbers["CLIP_local"] = mean(value for picture in pictures for value in picture.clip_local)
    return {name: value for name, value in numbers.items() if value is not None}


def _by_category(
    pictures: Sequence[Picture], split: Split, detector: Detector | Predictions | None
) -> dict[str, Numbers]:
    if detector is None:
        return {}
    scenes, found = [picture.scene for picture in pictures], [picture.found for picture in pictures]
    rows: dict[str, Numbers] = {}
    for name, kind in (("box", "bbox"), ("mask", "segm")):
        if kind == "bbox" or finds_masks(detector):
            precision = average_precision(scenes, found, kind, list(split.categories.values()))
            for category, value in precision.by_category.items():
                rows.setdefault(category, {})[f"{name}_AP"] = value
    return rows


def _clip_scores(clip: TextImageModel, scene: Scene, image: np.ndarray) -> tuple[float, tuple[float, ...]]:
    """Cosine of the picture with its caption, and of each instance's box with its own."""
    crops = [image, *(crop_box(image, target.box) for target in scene.asked)]
    texts = [scene.caption, *(target.caption for target in scene.asked)]
    cosines = (clip.embed_images(crops) * clip.embed_texts(texts)).sum(axis=1)
    return float(cosines[0]), tuple(float(value) for value in cosines[1:])


def _unnamed(pictures: Sequence[Picture], kinds: Sequence[str]) -> list[str]:
    """The kinds that the detector does not name, or in other words than the split's: several, and none that it asks."""
    asked: dict[str, set[str]] = {kind: set() for kind in kinds}
    named: dict[str, set[str]] = {kind: set() for kind in kinds}
    for picture in pictures:
        for sets, items in ((asked, picture.scene.asked), (named, picture.found)):
            for kind, value in (pair for item in items for pair in item.attributes.items()):
                if kind in sets:
                    sets[kind].add(value)
    return [kind for kind in kinds if len(named[kind]) != 1 and not asked[kind] & named[kind]]


def _name_attributes(
    pictures: Sequence[Picture], clip: TextImageModel, kinds: Sequence[str], folder: Path
) -> list[Picture]:
    """Gives each match the attributes that CLIP sees in its box, among those of the split (as in the paper)."""
    targets = [target for picture in pictures for target in picture.scene.asked]
    values = {kind: sorted({t.attributes[kind] for t in targets if kind in t.attributes}) for kind in kinds}
    texts = {
        (kind, category): clip.embed_texts([f"a {value} {category}" for value in values[kind]])
        for kind in kinds
        for category in sorted({target.category for target in targets})
    }
    named = []
    for picture in pictures:
        image = read_picture(picture_path(folder, picture.scene), picture.scene.size)
        measures = []
        for item in picture.measures:
            if item.match is not None:
                x, y, w, h = item.match.box
                vector = clip.embed_images([crop_box(image, (x, y, x + w, y + h))])[0]
                seen = {k: values[k][int(np.argmax(texts[k, item.match.category] @ vector))] for k in kinds}
                item = item._replace(match=item.match._replace(attributes={**item.match.attributes, **seen}))
            measures.append(item)
        named.append(dataclasses.replace(picture, measures=measures))
    return named


def _described(features: Features, images: UInt8[np.ndarray, "b H W 3"]) -> Float[np.ndarray, "b d"]:
    vectors = np.asarray(features(images), np.float64)
    if vectors.ndim != 2 or len(vectors) != len(images):
        raise InputError(f"--features: expected an array of shape [{len(images)}, d], got {list(vectors.shape)}")
    return vectors


def _distance(drawn: Float[np.ndarray, "n d"], real: Gaussian, fewest: int) -> tuple[float, list[str]]:
    distance = frechet_distance(fit_gaussian(drawn), real)
    few = fewest <= drawn.shape[1]
    remark = f"FID: {fewest} pictures for {drawn.shape[1]} features; it is biased upwards with so few."
    return distance, [remark] if few else []


def fid_of_file(path: str | Path) -> tuple[float, list[str]]:
    """The Fréchet distance of features made elsewhere: an .npz with arrays `generated` and `real`, each [n, d]."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            drawn, real = (np.asarray(arrays[name], np.float64) for name in ("generated", "real"))
            if drawn.ndim != 2:
                raise ValueError(f"generated has shape {drawn.shape}, not [n, d]")
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise InputError(f"--features: {path}: expected an .npz with arrays generated and real ({error})") from error
    gaussian = fit_gaussian(real, f"--features: {path}: real")
    return _distance(drawn, gaussian, min(len(drawn), len(real)))


def open_features(name: str | None, detector: Detector | Predictions | None) -> Features | None:
    """The features that a --features flag names: `detector`, `none`, or `python:MODULE:FUNCTION`.

    Args:
        name: None takes the detector's if it has any.

    Raises:
        InputError: where there are none of that name.
    """
    own = detector.features if isinstance(detector, Featurizer) else None
    if name is None or name == "none":
        return own if name is None else None
    if name == "detector":
        if own is None:
            raise InputError("--features: the detector has none")
        return own
    kind, _, rest = name.partition(":")
    module, _, function = rest.partition(":")
    if kind != "python" or not module or not function:
        raise InputError(f"--features: expected detector, none, npz:FILE or python:MODULE:FUNCTION, got {name!r}")
    try:
        found: Any = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise InputError(f"--features: {name}: cannot be imported: {error}") from error
    if not callable(found):
        raise InputError(f"--features: {name}: expected a function, got {type(found).__name__}")
    return found
