"""Pictures without labels become a COCO folder: boxes by phrases or your own, masks by boxes, captions by crops.

The paper's training data were made so (section 4: tags, Grounding DINO's boxes, SAM's masks, BLIP-2's captions). A
picture's annotations are one JSON file in OUTPUT/records, so a run goes on where it was left, and processes share it.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from instdiff_jax.data.build_coco import make_instance
from instdiff_jax.data.importers.scene import Item, Options, Scene, is_image
from instdiff_jax.data.importers.write import IMPORTERS, mask_box
from instdiff_jax.data.report import Report
from instdiff_jax.data.vision import (
    Answerer,
    BoxSegmenter,
    Captioner,
    Found,
    Grounder,
    Pixels,
    Tagger,
    caption_all,
    ground_all,
    keep_best,
    segment_all,
)
from instdiff_jax.errors import InputError
from instdiff_jax.files import write_json
from instdiff_jax.geometry.checks import read_text
from instdiff_jax.geometry.masks import RLE, encode_mask
from instdiff_jax.images import open_image
from instdiff_jax.paths import output_path, read_file

MAX_INSTANCES = 30
TAGS_QUESTION = (
    "List the kinds of objects in this picture: one or two words each, singular, separated by commas, nothing else."
)
_MARGIN = 0.05  # around a crop, in parts of the box's sides


class Picture(NamedTuple):
    """A picture to annotate.

    Attributes:
        image: its file, or the file's content.
        name: its path in the folder of its split's images.
        split: the split's name.
        scene: with boxes of its own; None to look for some.
    """

    image: Path | bytes
    name: str
    split: str
    scene: Scene | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """The path of its record without the suffix; two splits may have pictures of one name."""
        return (*((self.split,) if self.scene else ()), *PurePosixPath(self.name).parts)


class Models(NamedTuple):
    """What annotates; only a grounder is needed where tags are given, and none where pictures have boxes.

    Attributes:
        grounder: finds boxes.
        segmenter: masks them; without one, instances have boxes alone.
        captioner: describes pictures and crops; without one, an instance's caption is its tag.
        answerer: names what is in a picture, where no tags are given: by an answer, or as a `Tagger`.
    """

    grounder: Grounder | None = None
    segmenter: BoxSegmenter | None = None
    captioner: Captioner | None = None
    answerer: Answerer | Tagger | None = None


@dataclasses.dataclass(frozen=True)
class AnnotateSettings:
    """What is kept.

    Attributes:
        tags: phrases to look for in every picture; empty to ask the answerer for each one's.
        min_score: of a box.
        min_area: of a box, in parts of the picture.
        max_overlap: of two boxes as IoU; of those above it the higher score stays.
    """

    tags: tuple[str, ...] = ()
    min_score: float = 0.3
    min_area: float = 0.005
    max_overlap: float = 0.7


def find_pictures(folder: Path, split: str = "train") -> list[Picture]:
    """The pictures of a folder and below it, in order."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and is_image(path)]
    if not paths:
        raise InputError(f"{folder}: expected pictures, found none")
    return [Picture(path, path.relative_to(folder).as_posix(), split) for path in paths]


def find_scenes(kind: str, source: Path, options: Options) -> tuple[list[Picture], Report]:
    """The pictures of a dataset of another tool, which have boxes; and what of it was left out."""
    if not source.exists():
        raise InputError(f"{source}: missing")
    report = Report()
    found = [
        Picture(scene.image, scene.name, split, scene) for split, scene in IMPORTERS[kind](source, options, report)
    ]
    if not found:
        raise InputError(f"{source}: expected pictures of a {kind} dataset, found none")
    return found, report


def record_path(output: Path, picture: Picture) -> Path:
    """The file of a picture's annotations."""
    *parents, name = picture.parts
    return output_path(output / "records", *parents, f"{name}.json")


def annotate_all(
    pictures: Sequence[Picture],
    output: Path,
    models: Models,
    settings: AnnotateSettings,
    report: Callable[[], object] = lambda: None,
    batch: int = 1,
) -> int:
    """Annotates the pictures that have no record yet, `batch` at a time; returns their number."""
    waiting = [picture for picture in pictures if not record_path(output, picture).exists()]
    for _ in range(len(pictures) - len(waiting)):
        report()
    for first in range(0, len(waiting), batch):
        part = waiting[first : first + batch]
        for picture, values in zip(part, annotate(part, models, settings), strict=True):
            path = record_path(output, picture)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, values, None)
            report()
    return len(waiting)


@dataclasses.dataclass
class _Work:
    """A picture on its way: its pixels, and what is known of it so far."""

    image: Pixels
    tags: list[str]
    captions: list[str] = dataclasses.field(default_factory=list)
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    dropped: list[dict[str, str]] = dataclasses.field(default_factory=list)

    def record(self) -> dict[str, Any]:
        height, width = self.image.shape[:2]
        values = {"width": width, "height": height, "captions": self.captions}
        return values | {"annotations": self.rows, "dropped": self.dropped}


def annotate(pictures: Sequence[Picture], models: Models, settings: AnnotateSettings) -> list[dict[str, Any]]:
    """Annotations of some pictures as COCO's rows, their captions, and what was dropped and why.

    Models that can take several pictures in one call get them so. A picture that cannot be read has an `error`.
    """
    works: list[_Work | dict[str, Any]] = []
    for picture in pictures:
        try:
            image = open_picture(picture)
        except ValueError as error:  # an InputError is one too
            works.append({"error": str(error)})
            continue
        if picture.scene is None:
            works.append(_Work(image, list(settings.tags) or ask_tags(image, models)))
        else:
            rows, dropped = own_instances(picture.scene, image.shape[1], image.shape[0])
            tags = [row["category"] for row in rows]
            works.append(_Work(image, tags, list(picture.scene.captions), rows, dropped))
    opened = [(picture, work) for picture, work in zip(pictures, works, strict=True) if isinstance(work, _Work)]
    look([work for picture, work in opened if picture.scene is None], models, settings)
    for _, work in opened:
        add_masks(work.image, work.rows, models, work.dropped)
    describe([work for _, work in opened], models, len(pictures))
    return [work.record() if isinstance(work, _Work) else work for work in works]


def look(works: Sequence[_Work], models: Models, settings: AnnotateSettings) -> None:
    """Finds instances by tags, of all pictures that have a tag together."""
    if not works:
        return
    assert models.grounder is not None
    found: list[dict[str, Found]] = [{} for _ in works]
    for tag in dict.fromkeys(tag for work in works for tag in work.tags):
        those = [k for k, work in enumerate(works) if tag in work.tags]
        answers = ground_all(models.grounder, [works[k].image for k in those], [tag] * len(those))
        for k, answer in zip(those, answers, strict=True):
            found[k][tag] = answer
    for work, by_tag in zip(works, found, strict=True):
        height, width = work.image.shape[:2]
        work.rows, work.dropped = choose(width, height, {tag: by_tag[tag] for tag in work.tags}, settings)


def describe(works: Sequence[_Work], models: Models, batch: int) -> None:
    """Adds captions to the instances and pictures that have none, `batch` descriptions in a call."""
    if models.captioner is None:
        for work in works:
            if not work.captions and work.tags:
                work.captions = [", ".join(dict.fromkeys(work.tags))]
        return
    waiting: list[tuple[Pixels, Callable[[str], object]]] = []
    for work in works:
        for row in work.rows:
            if not row.get("iscrowd") and not row.get("caption"):
                waiting.append((crop(work.image, corners(row)), partial(row.__setitem__, "caption")))
        if not work.captions:
            waiting.append((work.image, work.captions.append))
    for first in range(0, len(waiting), batch):
        part = waiting[first : first + batch]
        for (_, keep), said in zip(part, caption_all(models.captioner, [image for image, _ in part]), strict=True):
            keep(said)
    for work in works:
        work.captions = [caption for caption in work.captions if caption]


def open_picture(picture: Picture) -> Pixels:
    """A picture upright, or as its boxes expect it; ValueError for one that cannot be read or has another size."""
    data = picture.image if isinstance(picture.image, bytes) else read_file(picture.image)
    size = picture.scene.size if picture.scene else None
    image = open_image(data, size)
    if size and image.size != size:
        raise InputError(f"expected {size[0]}x{size[1]} pixels as annotated, got {image.width}x{image.height}")
    return np.asarray(image)


def corners(row: Mapping[str, Any]) -> list[float]:
    """A row's box as x0, y0, x1, y1."""
    x, y, w, h = row["bbox"]
    return [x, y, x + w, y + h]


def add_masks(image: Pixels, rows: Sequence[dict[str, Any]], models: Models, dropped: list[dict[str, str]]) -> None:
    """Adds masks to the rows of a picture that have none, where there is a model for them."""
    if models.segmenter is None:
        return
    waiting = [row for row in rows if not row.get("iscrowd") and not row.get("segmentation")]
    masks = segment_all(models.segmenter, image, [corners(row) for row in waiting])
    for row, mask in zip(waiting, masks, strict=True):
        if np.asarray(mask, bool).any():
            row["segmentation"] = encode_mask(np.asarray(mask, bool))
        else:
            dropped.append({"what": f"the mask of {row['category']}", "reason": "no pixel"})


def own_instances(scene: Scene, width: int, height: int) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """The instances that a picture comes with as COCO's rows; what cannot be used, with the reason."""
    rows, dropped = [], []
    try:
        items = scene.items(width, height)
    except InputError as error:
        return [], [{"what": "annotations", "reason": str(error)}]
    for item in items:
        try:
            row, remark = own_row(item, width, height)
        except InputError as error:
            dropped.append({"what": "annotation", "reason": str(error)})
            continue
        rows.append(row)
        dropped += [{"what": "mask", "reason": remark}] if remark else []
    return rows, dropped


def own_row(item: Item | InputError, width: int, height: int) -> tuple[dict[str, Any], str]:
    """One instance that a picture comes with, and a remark on a mask that cannot be used; InputError for a bad one."""
    if isinstance(item, InputError):
        raise item
    category = " ".join(read_text(item.category, f"{item.where}: category").split())
    box = item.box if item.box is not None else mask_box(item.mask, width, height, f"{item.where}.mask")
    instance, remark = make_instance(box, item.mask, (width, height), category, item.where, "mask")
    row: dict[str, Any] = {"category": category, "bbox": [round(float(edge), 3) for edge in instance.box]}
    if instance.mask:
        row["segmentation"] = RLE((height, width), instance.mask.decode("ascii")).to_dict()
    if item.caption.strip():
        row["caption"] = " ".join(item.caption.split())
    return row | ({"iscrowd": 1} if item.crowd else {}), remark


def ask_tags(image: Pixels, models: Models) -> list[str]:
    """What the answerer says is in the picture, each once."""
    assert models.answerer is not None
    if isinstance(models.answerer, Tagger):
        words = models.answerer.tags(image)
    else:
        words = models.answerer.answer(image, TAGS_QUESTION).replace("\n", ",").split(",")
    return list(dict.fromkeys(tag for word in words if (tag := " ".join(word.strip(" .-*").lower().split()))))


def choose(
    width: int, height: int, found_by_tag: Mapping[str, Found], settings: AnnotateSettings
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Category, score and bbox of what stays, highest score first; what was dropped, with the reason."""
    names, boxes, scores, dropped = [], [], [], []
    for tag, found in found_by_tag.items():
        for box, score in zip(np.asarray(found.boxes, float).reshape(-1, 4), found.scores, strict=True):
            box = np.clip(box, 0, [width, height, width, height])
            area = max(box[2] - box[0], 0) * max(box[3] - box[1], 0) / (width * height)
            if score < settings.min_score:
                dropped.append({"what": tag, "reason": f"score {score:.2f} below {settings.min_score}"})
            elif area < max(settings.min_area, 1e-9):
                dropped.append({"what": tag, "reason": f"area {area:.4f} of the picture, below {settings.min_area}"})
            else:
                names.append(tag)
                boxes.append(box)
                scores.append(float(score))
    if not boxes:
        return [], dropped
    kept = keep_best(Found(np.array(boxes), np.array(scores)), settings.max_overlap)
    for i in sorted(set(range(len(boxes))) - set(kept)):
        dropped.append({"what": names[i], "reason": f"overlaps a better box by more than {settings.max_overlap}"})
    dropped += [{"what": names[i], "reason": f"more than {MAX_INSTANCES} instances"} for i in kept[MAX_INSTANCES:]]
    rows = []
    for i in kept[:MAX_INSTANCES]:
        x0, y0, x1, y1 = (round(float(edge), 2) for edge in boxes[i])
        rows.append({"category": names[i], "score": round(scores[i], 4), "bbox": [x0, y0, x1 - x0, y1 - y0]})
    return rows, dropped


def crop(image: Pixels, box: Sequence[float]) -> UInt8[np.ndarray, "h w 3"]:
    """The part of a picture in a box and a little around it."""
    height, width = image.shape[:2]
    x0, y0, x1, y1 = box
    dx, dy = _MARGIN * (x1 - x0), _MARGIN * (y1 - y0)
    left, top = int(max(x0 - dx, 0)), int(max(y0 - dy, 0))
    return image[top : max(int(min(y1 + dy, height)), top + 1), left : max(int(min(x1 + dx, width)), left + 1)]
