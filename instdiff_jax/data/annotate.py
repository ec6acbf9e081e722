"""Pictures without labels become a COCO folder: boxes by phrases or your own, masks by boxes, captions by crops.

The paper's training data were made so (section 4: tags, Grounding DINO's boxes, SAM's masks, BLIP-2's captions). A
picture's annotations are one JSON file in OUTPUT/records, so a run goes on where it was left, and processes share it.
"""

import dataclasses
import html
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from instdiff_jax.data.build_coco import make_instance
from instdiff_jax.data.importers.records import scene_of_values
from instdiff_jax.data.importers.scene import Item, Options, Scene, is_image
from instdiff_jax.data.importers.write import IMPORTERS, mask_box, write_scenes
from instdiff_jax.data.report import Report
from instdiff_jax.data.vision import Answerer, BoxSegmenter, Captioner, Found, Grounder, Pixels, keep_best
from instdiff_jax.errors import InputError
from instdiff_jax.files import read_json, write_file, write_json, write_text
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
        answerer: names what is in a picture, where no tags are given.
    """

    grounder: Grounder | None = None
    segmenter: BoxSegmenter | None = None
    captioner: Captioner | None = None
    answerer: Answerer | None = None


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
) -> int:
    """Annotates the pictures that have no record yet; returns their number."""
    made = 0
    for picture in pictures:
        path = record_path(output, picture)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, annotate(picture, models, settings), None)
            made += 1
        report()
    return made


def annotate(picture: Picture, models: Models, settings: AnnotateSettings) -> dict[str, Any]:
    """One picture's annotations as COCO's rows, its captions, and what was dropped and why."""
    try:
        image = open_picture(picture)
    except ValueError as error:  # an InputError is one too
        return {"error": str(error)}
    height, width = image.shape[:2]
    captions: Sequence[str] = ()
    if picture.scene is None:
        tags = list(settings.tags) or ask_tags(image, models)
        rows, dropped = find_instances(image, tags, models.grounder, settings)
    else:
        rows, dropped = own_instances(picture.scene, width, height)
        captions, tags = picture.scene.captions, [row["category"] for row in rows]
    for row in rows:
        if not row.get("iscrowd"):
            complete(row, image, models, dropped)
    if not captions:
        own = models.captioner.caption(image) if models.captioner is not None else ", ".join(dict.fromkeys(tags))
        captions = [own] if own else []
    return {"width": width, "height": height, "captions": captions, "annotations": rows, "dropped": dropped}


def open_picture(picture: Picture) -> Pixels:
    """A picture upright, or as its boxes expect it; ValueError for one that cannot be read or has another size."""
    data = picture.image if isinstance(picture.image, bytes) else read_file(picture.image)
    size = picture.scene.size if picture.scene else None
    image = open_image(data, size)
    if size and image.size != size:
        raise InputError(f"expected {size[0]}x{size[1]} pixels as annotated, got {image.width}x{image.height}")
    return np.asarray(image)


def complete(row: dict[str, Any], image: Pixels, models: Models, dropped: list[dict[str, str]]) -> None:
    """Adds a mask and a caption to a row that has none, where there are models for them."""
    x, y, w, h = row["bbox"]
    box = [x, y, x + w, y + h]
    if models.segmenter is not None and not row.get("segmentation"):
        mask = np.asarray(models.segmenter.segment(image, box), bool)
        if mask.any():
            row["segmentation"] = encode_mask(mask)
        else:
            dropped.append({"what": f"the mask of {row['category']}", "reason": "no pixel"})
    if models.captioner is not None and not row.get("caption"):
        row["caption"] = models.captioner.caption(crop(image, box))


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
    words = models.answerer.answer(image, TAGS_QUESTION).replace("\n", ",").split(",")
    return list(dict.fromkeys(tag for word in words if (tag := " ".join(word.strip(" .-*").lower().split()))))


def find_instances(
    image: Pixels, tags: Sequence[str], grounder: Grounder | None, settings: AnnotateSettings
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Category, score and bbox of what stays, highest score first; what was dropped, with the reason."""
    assert grounder is not None
    height, width = image.shape[:2]
    names, boxes, scores, dropped = [], [], [], []
    for tag in tags:
        found = grounder.ground(image, tag)
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


def write_coco(
    pictures: Sequence[Picture], output: Path, source: Mapping[str, str], report: Report | None = None
) -> tuple[dict, Report]:
    """Makes OUTPUT/coco of all records, with a report of what was left out, added to one that there is.

    Args:
        pictures: all pictures; InputError if one has no record yet.
        output: the annotations' folder.
        source: what report.json says of the pictures.
        report: what was left out before.
    """
    report = report or Report()

    def scenes() -> Iterator[tuple[str, Scene]]:
        for picture in pictures:
            path = record_path(output, picture)
            values = read_json(path)
            if "error" in values:
                report.skip("image", picture.split, picture.name, str(values["error"]))
                continue
            for entry in values.get("dropped", []):
                report.note("instance", picture.split, picture.name, f"{entry['what']}: {entry['reason']}")
            captions = tuple(values.get("captions", ()))
            yield picture.split, scene_of_values(picture.image, picture.name, values, captions, str(path), Options())

    return write_scenes(scenes(), output / "coco", report, source, overwrite=True), report


def write_page(pictures: Sequence[Picture], output: Path, count: int = 48) -> None:
    """OUTPUT/page.html with some pictures, their boxes and captions, to look at."""
    step = max(1, len(pictures) // count)
    parts = ["<!doctype html><meta charset='utf-8'><title>Annotations</title>"]
    parts.append("<style>body{font:14px sans-serif}figure{display:inline-block;width:320px;vertical-align:top}</style>")
    (output / "page").mkdir(exist_ok=True)
    for number, picture in enumerate(list(pictures)[::step][:count]):
        values = read_json(record_path(output, picture))
        if "error" in values:
            continue
        image = Image.fromarray(open_picture(picture))
        draw = ImageDraw.Draw(image)
        lines = []
        for row in values["annotations"]:
            x, y, w, h = row["bbox"]
            draw.rectangle((x, y, x + w, y + h), outline=(255, 0, 90), width=max(1, image.width // 200))
            score = f" {row['score']:.2f}" if "score" in row else ""
            lines.append(f"{row['category']}{score}: {row.get('caption', '')}")
        image.thumbnail((320, 320))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG")
        write_file(output / "page" / f"{number}.jpg", lambda file, data=buffer.getvalue(): file.write(data), sync=False)
        text = "<br>".join(html.escape(line) for line in [*values["captions"][:1], *lines])
        parts.append(f"<figure><img src='page/{number}.jpg' alt=''><figcaption>{text}</figcaption></figure>")
    write_text(output / "page.html", "\n".join(parts))
