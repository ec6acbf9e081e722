"""Pictures without labels become a COCO folder: boxes by phrases, masks by boxes, captions by crops.

The paper's training data were made so (section 4: tags, Grounding DINO's boxes, SAM's masks, BLIP-2's captions). A
picture's annotations are one JSON file in OUTPUT/records, so a run goes on where it was left, and processes share it.
"""

import dataclasses
import html
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import ImageDraw

from instdiff_jax.data.importers.records import scene_of_values
from instdiff_jax.data.importers.scene import Options, Scene, is_image
from instdiff_jax.data.importers.write import write_scenes
from instdiff_jax.data.report import Report
from instdiff_jax.data.vision import Answerer, BoxSegmenter, Captioner, Found, Grounder, Pixels, keep_best
from instdiff_jax.errors import InputError
from instdiff_jax.files import read_json, write_file, write_json, write_text
from instdiff_jax.geometry.masks import encode_mask
from instdiff_jax.images import open_image
from instdiff_jax.paths import output_path, read_file

MAX_INSTANCES = 30
TAGS_QUESTION = (
    "List the kinds of objects in this picture: one or two words each, singular, separated by commas, nothing else."
)
_MARGIN = 0.05  # around a crop, in parts of the box's sides


class Models(NamedTuple):
    """What annotates; only a grounder is needed where tags are given.

    Attributes:
        grounder: finds boxes.
        segmenter: masks them; without one, instances have boxes alone.
        captioner: describes pictures and crops; without one, an instance's caption is its tag.
        answerer: names what is in a picture, where no tags are given.
    """

    grounder: Grounder
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


def find_pictures(folder: Path) -> list[Path]:
    """The pictures of a folder and below it, in order."""
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and is_image(path)]
    if not found:
        raise InputError(f"{folder}: expected pictures, found none")
    return found


def record_path(output: Path, folder: Path, picture: Path) -> Path:
    """The file of a picture's annotations."""
    *parents, name = picture.relative_to(folder).parts
    return output_path(output / "records", *parents, f"{name}.json")


def annotate_all(
    folder: Path,
    pictures: Sequence[Path],
    output: Path,
    models: Models,
    settings: AnnotateSettings,
    report: Callable[[], object] = lambda: None,
) -> int:
    """Annotates the pictures that have no record yet; returns their number."""
    made = 0
    for picture in pictures:
        path = record_path(output, folder, picture)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, annotate(picture, models, settings), None)
            made += 1
        report()
    return made


def annotate(picture: Path, models: Models, settings: AnnotateSettings) -> dict[str, Any]:
    """One picture's annotations as COCO's rows, its caption, and what was dropped and why."""
    try:
        image = np.asarray(open_image(read_file(picture)))
    except ValueError as error:  # an InputError is one too
        return {"error": str(error)}
    height, width = image.shape[:2]
    tags = list(settings.tags) or ask_tags(image, models)
    rows, dropped = find_instances(image, tags, models.grounder, settings)
    annotations = []
    for tag, score, box in rows:
        x0, y0, x1, y1 = box
        row: dict[str, Any] = {"category": tag, "score": score, "bbox": [x0, y0, x1 - x0, y1 - y0]}
        if models.segmenter is not None:
            mask = np.asarray(models.segmenter.segment(image, box), bool)
            if mask.any():
                row["segmentation"] = encode_mask(mask)
            else:
                dropped.append({"what": f"the mask of {tag}", "reason": "no pixel"})
        if models.captioner is not None:
            row["caption"] = models.captioner.caption(crop(image, box))
        annotations.append(row)
    caption = models.captioner.caption(image) if models.captioner is not None else ", ".join(dict.fromkeys(tags))
    return {"width": width, "height": height, "caption": caption, "annotations": annotations, "dropped": dropped}


def ask_tags(image: Pixels, models: Models) -> list[str]:
    """What the answerer says is in the picture, each once."""
    assert models.answerer is not None
    words = models.answerer.answer(image, TAGS_QUESTION).replace("\n", ",").split(",")
    return list(dict.fromkeys(tag for word in words if (tag := " ".join(word.strip(" .-*").lower().split()))))


def find_instances(
    image: Pixels, tags: Sequence[str], grounder: Grounder, settings: AnnotateSettings
) -> tuple[list[tuple[str, float, list[float]]], list[dict[str, str]]]:
    """Tag, score and box x0, y0, x1, y1 of what stays, highest score first; what was dropped, with the reason."""
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
    chosen = kept[:MAX_INSTANCES]
    return [(names[i], round(scores[i], 4), [round(float(edge), 2) for edge in boxes[i]]) for i in chosen], dropped


def crop(image: Pixels, box: Sequence[float]) -> UInt8[np.ndarray, "h w 3"]:
    """The part of a picture in a box and a little around it."""
    height, width = image.shape[:2]
    x0, y0, x1, y1 = box
    dx, dy = _MARGIN * (x1 - x0), _MARGIN * (y1 - y0)
    left, top = int(max(x0 - dx, 0)), int(max(y0 - dy, 0))
    return image[top : max(int(min(y1 + dy, height)), top + 1), left : max(int(min(x1 + dx, width)), left + 1)]


def write_coco(folder: Path, pictures: Sequence[Path], output: Path, split: str) -> tuple[dict, Report]:
    """Makes OUTPUT/coco of all records; InputError if a picture has none yet."""
    report = Report()

    def scenes() -> Iterator[tuple[str, Scene]]:
        for picture in pictures:
            path, name = record_path(output, folder, picture), picture.relative_to(folder).as_posix()
            values = read_json(path)
            if "error" in values:
                report.skip("image", split, name, str(values["error"]))
                continue
            for entry in values.get("dropped", []):
                report.note("instance", split, name, f"{entry['what']}: {entry['reason']}")
            captions = (values["caption"],) if values.get("caption") else ()
            yield split, scene_of_values(picture, name, values, captions, str(path), Options())

    source = {"kind": "annotate", "source": str(folder.absolute())}
    return write_scenes(scenes(), output / "coco", report, source, overwrite=True), report


def write_page(folder: Path, pictures: Sequence[Path], output: Path, count: int = 48) -> None:
    """OUTPUT/page.html with some pictures, their boxes and captions, to look at."""
    step = max(1, len(pictures) // count)
    parts = ["<!doctype html><meta charset='utf-8'><title>Annotations</title>"]
    parts.append("<style>body{font:14px sans-serif}figure{display:inline-block;width:320px;vertical-align:top}</style>")
    (output / "page").mkdir(exist_ok=True)
    for number, picture in enumerate(list(pictures)[::step][:count]):
        values = read_json(record_path(output, folder, picture))
        if "error" in values:
            continue
        image = open_image(read_file(picture))
        draw = ImageDraw.Draw(image)
        lines = []
        for row in values["annotations"]:
            x, y, w, h = row["bbox"]
            draw.rectangle((x, y, x + w, y + h), outline=(255, 0, 90), width=max(1, image.width // 200))
            lines.append(f"{row['category']} {row['score']:.2f}: {row.get('caption', '')}")
        image.thumbnail((320, 320))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG")
        write_file(output / "page" / f"{number}.jpg", lambda file, data=buffer.getvalue(): file.write(data), sync=False)
        text = "<br>".join(html.escape(line) for line in [values["caption"], *lines])
        parts.append(f"<figure><img src='page/{number}.jpg' alt=''><figcaption>{text}</figcaption></figure>")
    write_text(output / "page.html", "\n".join(parts))
