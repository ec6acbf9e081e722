"""Draws and measures the study's rows: pictures and numbers stay in its workdir, and are not made again."""

import itertools
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from instdiff_jax.analysis.chips import processor_name
from instdiff_jax.errors import InputError
from instdiff_jax.evaluation.fid import Gaussian, fit_gaussian
from instdiff_jax.evaluation.files import claim_folder, write_file
from instdiff_jax.evaluation.generate import copy_real, generate, read_settings, sampling_settings
from instdiff_jax.evaluation.measure import Picture, inspect, summarize
from instdiff_jax.evaluation.split import Split, read_split
from instdiff_jax.sampling.loading import checkpoint_fingerprint
from instdiff_jax.sampling.pipeline import Pipeline
from projects.shapes.render import write_coco
from projects.shapes.scenes import render_scene
from projects.shapes.segmenter import Segmenter
from projects.shapes.study.rows import SCENES, Row, Task

# Another one when what numbers mean changes: older ones are measured again.
_VERSION = 1
# Layouts in memory at a time; the fewer batches are cut short, the fewer programs are compiled.
_BATCH = 1024

Numbers = dict[str, Any]


class TimeUp(Exception):
    """Raised from the report of a picture: no more are to be drawn."""


class Study:
    """Draws and measures rows; all of them share one pipeline, loaded when the first picture is to be drawn.

    Attributes:
        config: the checkpoint's sizes.
        sampling: the checkpoint's settings, with the steps that were asked for.
        size: side of the pictures in pixels.
        dtype: of the pipeline.
        fingerprint: of the checkpoint.
        workdir: where all is kept.
    """

    def __init__(
        self,
        checkpoint: Path,
        segmenter: Path,
        workdir: Path,
        size: int,
        reference_count: int,
        dtype: str,
        steps: int | None = None,
        max_rows: int | None = None,
    ):
        """Opens the checkpoint's config and the segmenter; InputError where either is none."""
        self.sampling = sampling_settings(checkpoint, {} if steps is None else {"steps": steps})
        self.size, self.dtype, self.checkpoint = size, dtype, checkpoint
        self.fingerprint = checkpoint_fingerprint(checkpoint)
        self.config = read_settings(checkpoint)[0]
        self._detector = Segmenter.from_folder(segmenter)
        self.segmenter = self._detector.fingerprint
        self.workdir, self.reference_count, self.max_rows = workdir, reference_count, max_rows
        self._pipelines: dict[bool, Pipeline] = {}
        self._splits: dict[tuple[str, int], Split] = {}
        self._references: dict[str, Gaussian] = {}

    def pipeline(self, scaleu: bool = True) -> Pipeline:
        """The pipeline, with or without ScaleU."""
        if True not in self._pipelines:
            self._pipelines[True] = Pipeline.from_checkpoint(self.checkpoint, self.dtype, max_rows=self.max_rows)
            if checkpoint_fingerprint(self.checkpoint) != self.fingerprint:
                raise InputError(f"--checkpoint: {self.checkpoint}: has changed since the study began")
            self._pipelines[False] = self._pipelines[True].without_scaleu()
        return self._pipelines[scaleu]

    def split(self, scenes: str, count: int) -> Split:
        """The first scenes of a set, rendered if they are not there yet."""
        if (scenes, count) not in self._splits:
            folder, kind = self.workdir / "scenes" / f"{scenes}_{count}_{self.size}", SCENES[scenes]
            write_coco(folder, "held_out", count, kind.seed, self.size, kind.settings)
            self._splits[scenes, count] = read_split(folder, "held_out")
        return self._splits[scenes, count]

    def done(self, task: Task) -> Numbers | None:
        """A task's numbers from an earlier run; None where it is to be done."""
        path, key = self._numbers_file(task)
        try:
            numbers = json.loads(path.read_text())
            return numbers if numbers["key"] == key else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def run(self, task: Task, drawn: Callable[[], None]) -> Numbers:
        """Draws what pictures are missing, measures all of the task's, and keeps the numbers.

        Args:
            task: what to do.
            drawn: called after every picture; what it raises ends the drawing, and pictures made so far stay.

        Returns:
            `metrics` by name, and `of_picture`: sums over each picture's instances.
        """
        row, group = task.row, SCENES[task.row.scenes].group
        folder = self.folder(task)
        claim_folder(folder, self._settings(task), "--workdir")
        together = [self.split(name, task.count).scenes for name, kind in SCENES.items() if kind.group == group]
        # One scene of each set after another: batches are alike.
        scenes = [scene for some in itertools.zip_longest(*together) for scene in some if scene is not None]
        if row.pictures == "real":
            copy_real(scenes, folder, drawn)
        else:
            generate(
                self.pipeline(row.scaleu),
                scenes,
                folder,
                seed=task.seed,
                format=row.format,
                drop=row.drop,
                batch=_BATCH,
                report=drawn,
                **row.settings(self.sampling).to_dict(),
            )
        path, key = self._numbers_file(task)
        numbers = {"key": key} | self._measured(self.split(row.scenes, task.count), folder, row)
        write_file(path, json.dumps(numbers).encode())
        return numbers

    def folder(self, task: Task) -> Path:
        """Where a task's pictures are."""
        slug = task.row.slug(self.sampling, SCENES[task.row.scenes].group)
        return self.workdir / "pictures" / f"{slug}-seed_{task.seed}"

    def _measured(self, split: Split, folder: Path, row: Row) -> Numbers:
        features, reference = self._detector.features, self._reference(row.scenes)
        seen = inspect(split, folder, self._detector, features=features, reference=reference)
        metrics = summarize(seen.pictures, split, self._detector, seen.kinds) | {"FID": seen.distance}
        return {"metrics": metrics, "of_picture": [_sums(picture, seen.kinds) for picture in seen.pictures]}

    def _reference(self, scenes: str) -> Gaussian:
        """The features' Gaussian of other scenes like those of a set."""
        if scenes not in self._references:
            kind = SCENES[scenes]
            numbers = range(self.reference_count)
            images = [render_scene(kind.reference_seed, i, self.size, kind.settings).image for i in numbers]
            self._references[scenes] = fit_gaussian(self._detector.features(np.stack(images)))
        return self._references[scenes]

    def _numbers_file(self, task: Task) -> tuple[Path, Mapping[str, Any]]:
        """Where a task's numbers are kept, and what they depend on."""
        key = {"version": _VERSION, "pictures": self._settings(task), "segmenter": self._detector.fingerprint}
        key |= {"scenes": task.row.scenes, "count": task.count, "reference_count": self.reference_count}
        path = self.workdir / "numbers" / f"{task.row.slug(self.sampling)}-seed_{task.seed}-{task.count}.json"
        return path, json.loads(json.dumps(key))

    def _settings(self, task: Task) -> dict[str, Any]:
        """All that decides what a task's pictures look like."""
        row, group = task.row, SCENES[task.row.scenes].group
        kinds = {name: kind for name, kind in SCENES.items() if kind.group == group}
        settings: dict[str, Any] = {"pictures": row.pictures, "size": self.size}
        settings["scenes"] = {name: {"seed": kind.seed} | kind.settings.to_dict() for name, kind in kinds.items()}
        if row.pictures != "real":
            settings |= {"checkpoint": self.fingerprint, "dtype": self.dtype, "seed": task.seed, "format": row.format}
            settings |= {"drop": row.drop, "scaleu": row.scaleu}
            settings["sampling"] = row.settings(self.sampling).to_dict()
        return settings


def machine() -> dict[str, Any]:
    """What numbers are made on here."""
    device = jax.devices()[0]
    name = f"{os.cpu_count()} cores of {processor_name()}" if device.platform == "cpu" else device.device_kind
    return {"device": f"{name} ({platform.machine()})", "jax": jax.__version__, "python": platform.python_version()}


def _sums(picture: Picture, kinds: Sequence[str]) -> dict[str, float]:
    """One picture's numbers as sums over its instances: what paired comparisons of two rows are made of."""
    measures, targets = picture.measures, picture.scene.asked
    sums: dict[str, float] = {"instances": len(targets), "found": sum(item.match is not None for item in measures)}
    for name, field in (("mask_IoU", "mask_iou"), ("PiM_point", "point_in"), ("PiM_scribble", "scribble_in")):
        sums[name] = sum(getattr(item, field) or 0.0 for item in measures)
    for kind in kinds:
        right = [
            item.match is not None and item.match.attributes.get(kind) == target.attributes.get(kind)
            for target, item in zip(targets, measures, strict=True)
        ]
        sums[f"{kind}_accuracy"] = sum(right)
    return sums
