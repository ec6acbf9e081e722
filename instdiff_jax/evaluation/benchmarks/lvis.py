"""InstanceDiffusion's protocol with LVIS's layouts, and LVIS's own average precision (arXiv 1908.03195).

LVIS is federated: its annotators looked for some categories in each image. A detection of a category that nobody
looked for counts neither way, and neither does an unmatched one where not all instances of the category are marked.
The rules are those of https://github.com/lvis-dataset/lvis-api, `lvis/eval.py`; pycocotools does what both share.
"""

import contextlib
import io
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from instdiff_jax.coco import Coco
from instdiff_jax.data.vision import Pixels
from instdiff_jax.errors import InputError, short
from instdiff_jax.evaluation.benchmarks import coco_protocol
from instdiff_jax.evaluation.benchmarks.case import Benchmark, Case, Judges
from instdiff_jax.evaluation.benchmarks.coco_scores import coco_rows
from instdiff_jax.evaluation.metrics import coco_of_rows
from instdiff_jax.geometry.checks import plain_integer
from instdiff_jax.grounding import Format

MAX_DETECTIONS = 300  # in one picture, of all categories together
FREQUENCIES = {"r": "APr", "c": "APc", "f": "APf"}  # in how many images of the training set: 1 to 10, to 100, more


class Federation(NamedTuple):
    """What is known of an image, by names of categories, beyond its annotations.

    Attributes:
        absent: looked for and not there.
        partly: there, but not all instances are marked.
    """

    absent: frozenset[str]
    partly: frozenset[str]


def read(path: Path) -> list[Case]:
    """A case for every image of an LVIS annotation file; phrases have spaces where its names have underscores."""
    coco = Coco(path, coco_protocol.captions_beside(path))
    frequency = {coco.categories[number]: _frequency(coco, number) for number in sorted(coco.categories)}
    cases = []
    for case in coco_protocol.cases_of(coco):
        things = tuple(thing._replace(phrase=thing.phrase.replace("_", " ")) for thing in case.things)
        more = {**case.more, "frequency": frequency, "federation": _federation(coco, case.more["image_id"])}
        cases.append(case._replace(things=things, caption=case.caption.replace("_", " "), more=more))
    return cases


def _frequency(coco: Coco, number: int) -> str:
    value = coco.category_rows[number].get("frequency")
    if not isinstance(value, str) or value not in FREQUENCIES:
        raise InputError(f"{coco.path}: category {number}: frequency: expected r, c or f, got {short(value)}")
    return value


def _federation(coco: Coco, image_id: int) -> Federation:
    row, names = coco.image_row(image_id), []
    for key in ("neg_category_ids", "not_exhaustive_category_ids"):
        values = row.get(key)
        numbers = [plain_integer(value) for value in values] if isinstance(values, list) else [None]
        if not all(number in coco.categories for number in numbers):
            raise InputError(f"{coco.path}: image {image_id}: {key}: expected ids of categories, got {short(values)}")
        names.append(frozenset(coco.categories[number] for number in numbers if number is not None))
    return Federation(*names)


def judge(case: Case, image: Pixels, judges: Judges, format: Format) -> dict[str, Any]:
    """What was asked for and what was found, at most 300 detections of the file's categories."""
    values = coco_protocol.judge_detections(case, image, judges, format)
    known = [row for row in values["found"] if row[0] in case.more["frequency"]]
    found = sorted(known, key=lambda row: row[1], reverse=True)[:MAX_DETECTIONS]
    return {"side": values["side"], "asked": values["asked"], "found": found}


def table(judged: Sequence[tuple[Case, Mapping[str, Any]]], format: Format) -> dict[str, float]:
    """AP, AP50, AP75, and AP of rare, common and frequent categories; those without annotations are left out."""
    frequency = judged[0][0].more["frequency"]
    precision = federated_precision(
        [values for _, values in judged],
        [case.more["federation"] for case, _ in judged],
        {"box": "bbox", "mask": "segm"}[format],
        list(frequency),
    )
    groups = {"AP": precision, "AP50": precision[:1], "AP75": precision[5:6]}
    kinds = np.array(list(frequency.values()))
    groups |= {name: precision[..., kinds == kind] for kind, name in FREQUENCIES.items()}
    kept = {name: values[values > -1] for name, values in groups.items()}
    return {f"{format} {name}": float(values.mean()) for name, values in kept.items() if values.size}


def federated_precision(
    pictures: Sequence[Mapping[str, Any]], known: Sequence[Federation], kind: str, names: Sequence[str]
) -> Float[np.ndarray, "iou recall category"]:
    """Precision at ten IoUs and 101 recalls of each category; -1 for one without annotations.

    Args:
        pictures: verdicts, see `coco_scores.coco_rows`.
        known: of each picture.
        kind: "bbox" or "segm".
        names: of the categories.
    """
    number_of = {name: k for k, name in enumerate(names, 1)}
    looked_for = []
    for one, federation in zip(pictures, known, strict=True):
        counted = federation.absent | {row[0] for row in one["asked"]}
        looked_for.append({**one, "found": [row for row in one["found"] if row[0] in counted]})
    truth, found = coco_rows(looked_for, kind, number_of)
    places: dict[int, set[int]] = {k: set() for k in number_of.values()}  # category -> its pictures
    for row in truth + found:
        places[row["category_id"]].add(row["image_id"])
    partly = {(k, number_of[name]) for k, federation in enumerate(known, 1) for name in federation.partly}
    with contextlib.redirect_stdout(io.StringIO()):
        marked, guessed = (coco_of_rows([one["side"] for one in pictures], rows, names) for rows in (truth, found))
        each = [_Category(marked, guessed, kind, k, sorted(places[k]), partly).measure() for k in places]
    return np.stack(each, -1)


class _Category(COCOeval):
    """One category; of 1,203, only few are looked for in an image."""

    def __init__(
        self, truth: COCO, found: COCO, kind: str, number: int, images: Sequence[int], partly: set[tuple[int, int]]
    ):
        super().__init__(truth, found, kind)
        self._partly = partly
        self.params.catIds, self.params.imgIds = [number], list(images)
        self.params.areaRng, self.params.areaRngLbl, self.params.maxDets = [[0, 1e10]], ["all"], [MAX_DETECTIONS]

    def measure(self) -> Float[np.ndarray, "iou recall"]:
        if not self.params.imgIds:
            return np.full((len(self.params.iouThrs), len(self.params.recThrs)), -1.0)
        self.evaluate()
        self.accumulate()
        return self.eval["precision"][:, :, 0, 0, 0]

    def evaluateImg(self, imgId: int, catId: int, aRng: Sequence[float], maxDet: int) -> dict[str, Any] | None:
        """pycocotools' name and arguments; unmatched detections of a category that is partly marked are ignored."""
        result = super().evaluateImg(imgId, catId, aRng, maxDet)
        if result is not None and (imgId, catId) in self._partly:
            result["dtIgnore"] = np.logical_or(result["dtIgnore"], result["dtMatches"] == 0)
        return result


def _benchmark(format: Format) -> Benchmark:
    return Benchmark(
        name=f"lvis-{format}",
        files="lvis_v1_val.json",
        judges=("detector",),
        read=read,
        judge=partial(judge, format=format),
        table=partial(table, format=format),
        published=(),
        notes="LVIS's own average precision, at most 300 detections in a picture. Captions are lists of names.",
        layout=coco_protocol.layout,
        format=format,
        sampling=coco_protocol.SAMPLING,
    )


BENCHMARKS = (_benchmark("box"), _benchmark("mask"))
