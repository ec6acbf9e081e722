"""InstanceDiffusion's own protocol on COCO val2017 (arXiv 2402.03290, section 4), as its scripts do it.

The rules are those of https://github.com/frank-xwang/InstanceDiffusion: `eval_local.py` writes the layouts, the
detector's results are averaged by pycocotools, and `eval/eval_pim.py` and `eval/eval_attribute_binding.py` do the rest.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from instdiff_jax.coco import Coco, CocoAnnotation
from instdiff_jax.config import NEGATIVE_PROMPT
from instdiff_jax.data.vision import Pixels
from instdiff_jax.errors import InputError
from instdiff_jax.evaluation.benchmarks import coco_scores as scores
from instdiff_jax.evaluation.benchmarks.case import Benchmark, Case, Judges, Published, Thing
from instdiff_jax.evaluation.detectors import finds_masks, run_detector
from instdiff_jax.evaluation.metrics import Found
from instdiff_jax.evaluation.split import ATTRIBUTES
from instdiff_jax.geometry.checks import read_numbers
from instdiff_jax.geometry.masks import RLE, decode_mask, resize_map
from instdiff_jax.geometry.points import sample_scribble
from instdiff_jax.grounding import Format
from instdiff_jax.layout import MAX_INSTANCES, Instance, Layout

SAMPLING = {
    "steps": 50,
    "sampler": "plms",
    "guidance_scale": 7.5,
    "alpha": 1.0,
    "mis": 0.36,
    "negative_prompt": f"cartoon style, painting style, {NEGATIVE_PROMPT}",
}
FILES = "instances_val2017.json, with captions_val2017.json beside it"


class Annotations(NamedTuple):
    """What all pictures of a file share, and what a file of predictions refers to.

    Attributes:
        categories: id to name.
        image_ids: of all pictures.
    """

    categories: Mapping[int, str]
    image_ids: frozenset[int]


def read(path: Path, attribute: str | None = None) -> list[Case]:
    """A case for every image of a COCO or LVIS annotation file, in the order of their ids.

    Args:
        path: instances_NAME.json; captions_NAME.json beside it gives the captions.
        attribute: a key of ATTRIBUTES; each instance asks for one of its eight values, by its annotation's id.
    """
    return cases_of(Coco(path, captions_beside(path)), attribute)


def cases_of(coco: Coco, attribute: str | None = None) -> list[Case]:
    """See `read`."""
    shared = Annotations(coco.categories, frozenset(coco.image_ids))
    return [_case(coco, image_id, shared, attribute) for image_id in sorted(coco.image_ids)]


def captions_beside(path: Path) -> Path | None:
    """captions_NAME.json beside instances_NAME.json; None if there is none."""
    captions = path.with_name(path.name.replace("instances", "captions"))
    return captions if captions != path and captions.is_file() else None


def _case(coco: Coco, image_id: int, shared: Annotations, attribute: str | None) -> Case:
    image = coco.image(image_id)
    if not image.file_name:
        raise InputError(f"{coco.path}: image {image_id}: file_name: expected text, got nothing")
    rows = coco.annotations(image_id)
    things = []
    for row in rows:
        x, y, w, h = row.box
        box = x / image.width, y / image.height, (x + w) / image.width, (y + h) / image.height
        value = "" if attribute is None else ATTRIBUTES[attribute][row.number % len(ATTRIBUTES[attribute])]
        things.append(Thing(f"{value} {row.category}".strip(), box, row.category, value))
    # The script puts its list of names right behind the caption, without a space.
    caption = coco.captions.get(image_id, [""])[0] + ", ".join(thing.phrase for thing in things)
    more = {"image_id": image_id, "size": (image.width, image.height), "rows": rows, "shared": shared}
    name = Path(image.file_name).name
    return Case(str(image_id), caption, tuple(things), "all", name, more)


def _mask(row: CocoAnnotation, size: tuple[int, int], side: int) -> np.ndarray | None:
    """An annotation's mask on the canvas, into which the whole image is squeezed; None without one."""
    segmentation = row.values.get("segmentation")
    if not segmentation:
        return None
    return resize_map(decode_mask(segmentation, size[1], size[0], f"{row.where}.segmentation"), side)


def layout(case: Case, side: int) -> Layout:
    """The first 30 instances with box, point (the annotation's, else the box's centre), mask and scribble.

    The sampler's `format` says which of them the model sees. A picture without instances has one that is dropped.
    """
    size, instances = case.more["size"], []
    rng = np.random.default_rng(case.more["image_id"])
    for thing, row in zip(case.things, case.more["rows"][:MAX_INSTANCES], strict=False):
        mask = _mask(row, size, side)
        mask = mask if mask is not None and mask.any() else None
        x0, y0, x1, y1 = (min(max(edge, 0.0), 1.0) * side for edge in thing.box)
        if x1 - x0 < 1e-2 or y1 - y0 < 1e-2:
            continue
        point = (x0 + x1) / 2, (y0 + y1) / 2
        if row.values.get("point") is not None:
            x, y = read_numbers(row.values["point"], 2, f"{row.where}.point", "[x, y]")
            point = x / size[0] * side, y / size[1] * side
        scribble = None if mask is None else sample_scribble(mask, rng).astype(float)
        instances.append(Instance(thing.phrase, (x0, y0, x1, y1), point, scribble, mask, thing.category))
    if not instances:
        instances = [Instance("nothing", (0.0, 0.0, float(side), float(side)))]
    return Layout(case.caption, side, side, tuple(instances), name=case.key)


def judge_detections(case: Case, image: Pixels, judges: Judges, format: Format) -> dict[str, Any]:
    """What was asked for and what was found, on the picture's canvas; for masks the IoUs of pairs, and PiM."""
    side, size, detector = len(image), case.more["size"], judges.detector
    masks_needed = format != "box"
    if masks_needed and not finds_masks(detector):
        raise InputError("--detector: expected a detector that finds masks, or predictions with a segmentation each")
    detections = run_detector(detector, [case.more["image_id"]], image[None])[0]
    found = [Found.from_detection(one, masks_needed) for one in detections]
    asked = []
    for thing, row in zip(case.things, case.more["rows"], strict=True):
        mask = _mask(row, size, side) if masks_needed else None
        x0, y0, x1, y1 = (edge * side for edge in thing.box)
        rle = None if mask is None else RLE.from_mask(mask).to_dict()
        asked.append([thing.category, [x0, y0, x1 - x0, y1 - y0], rle, row.is_crowd])
    values = {"side": side, "asked": asked, "found": [[one.category, one.score, one.box, one.rle] for one in found]}
    if masks_needed:
        rles = [row[2] for row in asked if row[2] is not None], [one.rle for one in found if one.rle is not None]
        ious = scores.mask_ious(*rles)
        pairs = scores.match_masks(ious)
        rng = np.random.RandomState(case.more["image_id"] % 2**32) if format == "scribble" else None
        values["IoU"] = [float(ious[pair]) for pair in pairs] + [0.0] * (len(rles[0]) - len(pairs))
        values["PiM"] = scores.points_in_masks(*rles, pairs, rng)
    return values


def table_of_detections(judged: Sequence[tuple[Case, Mapping[str, Any]]], format: Format) -> dict[str, float]:
    """Box: AP, AP50 and AR of boxes. Mask: of masks, and mean IoU of matched masks. Points and scribbles: PiM."""
    pictures = [values for _, values in judged]
    if format in ("point", "scribble"):
        return {"PiM": scores.mean_of_means([[one["PiM"]] for one in pictures if one["PiM"] is not None])}
    kind = {"box": "bbox", "mask": "segm"}[format]
    precision = scores.coco_precision(pictures, kind)
    numbers = {f"{format} {name}": getattr(precision, name) or 0.0 for name in ("AP", "AP50", "AR")}
    if format == "mask":
        ious = [iou for one in pictures for iou in one["IoU"]]
        numbers["mask mIoU"] = float(np.mean(ious)) if ious else 0.0
    return numbers


def judge_attributes(case: Case, image: Pixels, judges: Judges, attribute: str) -> dict[str, Any]:
    """CLIP's cosine of each box with its caption, and whether it sees the right attribute there."""
    assert judges.clip is not None
    rows = [
        scores.attribute_score(judges.clip, image, one.box, one.phrase, ATTRIBUTES[attribute], one.detail)
        for one in case.things[:MAX_INSTANCES]
    ]
    return {"CLIP": [row[0] for row in rows if row], "right": [row[1] for row in rows if row]}


def table_of_attributes(judged: Sequence[tuple[Case, Mapping[str, Any]]]) -> dict[str, float]:
    """Means over pictures of their instances' mean."""
    names = {"accuracy": "right", "CLIP": "CLIP"}
    return {name: scores.mean_of_means([values[key] for _, values in judged]) for name, key in names.items()}


PAPER = "arXiv 2402.03290, section 4 (YOLOv8m-seg; CLIP ViT-L/14)"
ROICTRL = "arXiv 2411.17949, InstDiff-Bench"


def _published(columns: Sequence[str], *rows: tuple[str, tuple[float, ...], str]) -> tuple[Published, ...]:
    # Rows may end before the last column, FID.
    return tuple(Published(method, dict(zip(columns, values, strict=False)), source) for method, values, source in rows)


_benchmark = partial(Benchmark, files=FILES, layout=layout, sampling=SAMPLING)


def _of_detections(format: Format, note: str, published: tuple[Published, ...]) -> Benchmark:
    return _benchmark(
        name=f"coco-{format}",
        judges=("detector",),
        read=read,
        judge=partial(judge_detections, format=format),
        table=partial(table_of_detections, format=format),
        published=published,
        notes=note,
        format=format,
    )


def _of_attributes(attribute: str, published: tuple[Published, ...]) -> Benchmark:
    reader: Callable[[Path], list[Case]] = partial(read, attribute=attribute)
    return _benchmark(
        name=f"coco-{attribute}",
        judges=("clip",),
        read=reader,
        judge=partial(judge_attributes, attribute=attribute),
        table=table_of_attributes,
        published=published,
        notes="CLIP looks at the box of the layout, whatever is in it; means over instances, then over pictures.",
        format="mask",
    )


_AP = "COCO's averages over all pictures and annotations, by pycocotools."
_PIM = "Masks are matched one to one by IoU whatever their category; means over pairs, then over pictures."
BENCHMARKS = (
    _of_detections(
        "box",
        _AP,
        _published(
            ("box AP", "box AP50", "box AR", "FID"),
            ("InstanceDiffusion", (0.388, 0.554, 0.529, 23.9), PAPER),
            ("real images", (0.484, 0.652, 0.678), PAPER),
            ("GLIGEN", (0.241, 0.426, 0.359), ROICTRL),
        ),
    ),
    _of_detections(
        "mask",
        f"{_AP} mIoU is of the pairs that PiM takes (0 without one), which the official scripts do not print.",
        _published(
            ("mask AP", "mask AP50", "mask AR", "FID"), ("InstanceDiffusion", (0.271, 0.500, 0.381, 25.5), PAPER)
        ),
    ),
    _of_detections("point", _PIM, _published(("PiM", "FID"), ("InstanceDiffusion", (0.811, 27.5), PAPER))),
    _of_detections("scribble", _PIM, _published(("PiM", "FID"), ("InstanceDiffusion", (0.724, 27.3), PAPER))),
    _of_attributes(
        "colour",
        _published(
            ("accuracy", "CLIP"),
            ("InstanceDiffusion", (0.544, 0.250), PAPER),
            ("GLIGEN", (0.263, 0.212), ROICTRL),
        ),
    ),
    _of_attributes(
        "texture",
        _published(
            ("accuracy", "CLIP"),
            ("InstanceDiffusion", (0.268, 0.225), PAPER),
            ("GLIGEN", (0.177, 0.208), ROICTRL),
        ),
    ),
)
