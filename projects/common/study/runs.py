"""Generates and measures the rows of the study. Images and numbers stay in the workdir and are not made twice."""

import dataclasses
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
from instdiff_jax.evaluation.files import claim_folder
from instdiff_jax.evaluation.generate import GenerateSettings, copy_real, generate, read_settings, sampling_settings
from instdiff_jax.evaluation.image import EvaluatedImage
from instdiff_jax.evaluation.measure import Measures, inspect, summarize
from instdiff_jax.evaluation.split import Split, read_split
from instdiff_jax.files import write_json
from instdiff_jax.sampling.loading import checkpoint_fingerprint
from instdiff_jax.sampling.pipeline import Pipeline
from projects.common.coco_folder import write_split
from projects.common.segmenter import Segmenter
from projects.common.study.rows import Row, Subject, Task

# Increased when the meaning of the numbers changes, so that older ones are measured again.
_VERSION = 1
# Layouts in memory at a time. Many, as a shorter last batch compiles a program of its own.
_BATCH = 1024

Numbers = dict[str, Any]


class TimeUp(Exception):
    """Raised after an image is generated, to stop there."""


@dataclasses.dataclass(frozen=True)
class StudySettings:
    """What a study measures.

    Attributes:
        checkpoint: a checkpoint folder or a training workdir.
        segmenter: folder of the detector.
        workdir: folder for scenes, images and numbers.
        size: side of the images in pixels.
        reference_count: number of real images that FID compares with.
        dtype: of the pipeline.
        steps: solver steps; None: the checkpoint's.
        max_rows: latents denoised at a time; None: what suits the device.
    """

    checkpoint: Path
    segmenter: Path
    workdir: Path
    size: int
    reference_count: int
    dtype: str
    steps: int | None = None
    max_rows: int | None = None


class Study:
    """Generates and measures rows with one pipeline, which is loaded for the first image.

    Attributes:
        settings: as given.
        subject: as given.
        scenes: its sets of scenes.
        config: the checkpoint's model sizes.
        sampling: the checkpoint's sampling settings, with the steps of `settings`.
        fingerprint: of the checkpoint.
        segmenter: fingerprint of the detector.
    """

    def __init__(self, settings: StudySettings, subject: Subject):
        """Reads the checkpoint's config and the detector; InputError if either is missing or invalid."""
        self.settings, self.subject, self.scenes = settings, subject, subject.scenes
        changes = {} if settings.steps is None else {"steps": settings.steps}
        self.sampling = sampling_settings(settings.checkpoint, changes)
        self.fingerprint = checkpoint_fingerprint(settings.checkpoint)
        self.config = read_settings(settings.checkpoint)[0]
        self._detector = Segmenter.from_folder(settings.segmenter)
        self.segmenter = self._detector.fingerprint
        self._pipelines: dict[bool, Pipeline] = {}
        self._splits: dict[tuple[str, int], Split] = {}
        self._references: dict[str, Gaussian] = {}

    def pipeline(self, scaleu: bool = True) -> Pipeline:
        """The pipeline, with or without ScaleU."""
        if True not in self._pipelines:
            checkpoint, dtype = self.settings.checkpoint, self.settings.dtype
            self._pipelines[True] = Pipeline.from_checkpoint(checkpoint, dtype, max_rows=self.settings.max_rows)
            if checkpoint_fingerprint(checkpoint) != self.fingerprint:
                raise InputError(f"--checkpoint: {checkpoint}: has changed since the study began")
            self._pipelines[False] = self._pipelines[True].without_scaleu()
        return self._pipelines[scaleu]

    def split(self, scenes: str, count: int) -> Split:
        """The first scenes of a set, rendered if necessary."""
        if (scenes, count) not in self._splits:
            size, kind = self.settings.size, self.scenes[scenes]
            folder = self.settings.workdir / "scenes" / f"{scenes}_{count}_{size}"
            write_split(folder, "held_out", self.subject.world, (count, kind.seed, size), kind.settings)
            self._splits[scenes, count] = read_split(folder, "held_out")
        return self._splits[scenes, count]

    def done(self, task: Task) -> Numbers | None:
        """A task's numbers from an earlier run; None if there are none."""
        path, key = self._numbers_file(task)
        try:
            numbers = json.loads(path.read_text())
            return numbers if numbers["key"] == key else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def run(self, task: Task, report: Callable[[], None]) -> Numbers:
        """Generates the missing images, measures all images of the task, and saves the numbers.

        Args:
            task: what to measure.
            report: called after every image. If it raises, the images made so far stay.

        Returns:
            `metrics` by name, and `of_picture`: sums over the instances of each image.
        """
        row, group = task.row, self.scenes[task.row.scenes].group
        folder = self.folder(task)
        claim_folder(folder, self._image_settings(task), "--workdir")
        together = [self.split(name, task.count).scenes for name, kind in self.scenes.items() if kind.group == group]
        # The sets alternate, so that batches have similar sizes.
        scenes = [scene for some in itertools.zip_longest(*together) for scene in some if scene is not None]
        if row.source == "real":
            copy_real(scenes, folder, report)
        else:
            sampling = row.settings(self.sampling).to_dict()
            settings = GenerateSettings(task.seed, row.format, drop=row.drop, batch=_BATCH, sampling=sampling)
            generate(self.pipeline(row.scaleu), scenes, folder, settings, report)
        path, key = self._numbers_file(task)
        numbers = {"key": key} | self._measured(self.split(row.scenes, task.count), folder, row)
        write_json(path, numbers, indent=None)
        return numbers

    def folder(self, task: Task) -> Path:
        """Folder of a task's images."""
        slug = task.row.slug(self.sampling, self.scenes[task.row.scenes].group)
        return self.settings.workdir / "pictures" / f"{slug}-seed_{task.seed}"

    def _measured(self, split: Split, folder: Path, row: Row) -> Numbers:
        measures = Measures(self._detector, features=self._detector.features, reference=self._reference(row.scenes))
        seen = inspect(split, folder, measures)
        metrics = summarize(seen.images, split, self._detector, seen.kinds) | {"FID": seen.distance}
        return {"metrics": metrics, "of_picture": [_sums(image, seen.kinds) for image in seen.images]}

    def _reference(self, scenes: str) -> Gaussian:
        """Gaussian of the features of other scenes with the settings of a set."""
        if scenes not in self._references:
            kind, render = self.scenes[scenes], self.subject.world.render
            numbers = range(self.settings.reference_count)
            images = [render(kind.reference_seed, i, self.settings.size, kind.settings).image for i in numbers]
            self._references[scenes] = fit_gaussian(self._detector.features(np.stack(images)))
        return self._references[scenes]

    def _numbers_file(self, task: Task) -> tuple[Path, Mapping[str, Any]]:
        """The file of a task's numbers, and all that they depend on."""
        key = {"version": _VERSION, "pictures": self._image_settings(task), "segmenter": self._detector.fingerprint}
        key |= {"scenes": task.row.scenes, "count": task.count, "reference_count": self.settings.reference_count}
        path = self.settings.workdir / "numbers" / f"{task.row.slug(self.sampling)}-seed_{task.seed}-{task.count}.json"
        return path, json.loads(json.dumps(key))

    def _image_settings(self, task: Task) -> dict[str, Any]:
        """All settings that a task's images depend on."""
        row, group = task.row, self.scenes[task.row.scenes].group
        kinds = {name: kind for name, kind in self.scenes.items() if kind.group == group}
        settings: dict[str, Any] = {"pictures": row.source, "size": self.settings.size}
        settings["scenes"] = {name: {"seed": kind.seed} | kind.settings.to_dict() for name, kind in kinds.items()}
        if row.source != "real":
            settings |= {
                "checkpoint": self.fingerprint,
                "dtype": self.settings.dtype,
                "seed": task.seed,
                "format": row.format,
            }
            settings |= {"drop": row.drop, "scaleu": row.scaleu}
            settings["sampling"] = row.settings(self.sampling).to_dict()
        return settings


def machine() -> dict[str, Any]:
    """The device and versions that numbers are measured with."""
    device = jax.devices()[0]
    name = f"{os.cpu_count()} cores of {processor_name()}" if device.platform == "cpu" else device.device_kind
    return {"device": f"{name} ({platform.machine()})", "jax": jax.__version__, "python": platform.python_version()}


def _sums(image: EvaluatedImage, kinds: Sequence[str]) -> dict[str, float]:
    """An image's numbers as sums over its instances, for paired comparisons of two rows.

    KIND_accuracy_of is the number of instances that have the attribute.
    """
    measures, targets = image.measures, image.scene.asked
    sums: dict[str, float] = {"instances": len(targets), "found": sum(item.match is not None for item in measures)}
    for name, field in (("mask_IoU", "mask_iou"), ("PiM_point", "point_in"), ("PiM_scribble", "scribble_in")):
        sums[name] = sum(getattr(item, field) or 0.0 for item in measures)
    for kind in kinds:
        right = [
            item.match is not None and item.match.attributes.get(kind) == target.attributes[kind]
            for target, item in zip(targets, measures, strict=True)
            if kind in target.attributes
        ]
        sums |= {f"{kind}_accuracy": sum(right), f"{kind}_accuracy_of": len(right)}
    return sums
