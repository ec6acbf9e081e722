"""What a study is about, and what a row of its tables is: held-out scenes, and how images of them are made."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from instdiff_jax.config import SamplingConfig, Settings
from projects.common.coco_folder import World


@dataclasses.dataclass(frozen=True)
class Scenes:
    """A set of held-out scenes. Its seeds differ from those of all training scenes.

    Attributes:
        seed: of the scenes whose layouts are sampled.
        reference_seed: of similar scenes, whose images are the reference of the Fréchet distance.
        settings: what scenes look like.
        group: sets of one group are sampled together, into one folder, so that they share compiled programs.
    """

    seed: int
    reference_seed: int
    settings: Settings
    group: str


class Goals(NamedTuple):
    """What a model should reach on the main scenes, as fractions. None: no goal.

    Attributes:
        box_AP50: of the real images' (boxes).
        colour: of the real images' accuracy (boxes).
        found: things in the right place (boxes).
        point: points in masks.
        scribble: scribble points in masks.
        mask_IoU: of masks.
    """

    box_AP50: float
    colour: float
    found: float | None
    point: float
    scribble: float
    mask_IoU: float


@dataclasses.dataclass(frozen=True)
class Subject:
    """The world that a study is about.

    Attributes:
        world: renders the scenes.
        settings: of the scenes that the model was trained with; min_instances, max_instances and confusable change.
        attributes: their kinds, such as ("colour", "texture").
        most: the table by number of instances goes from 1 to this.
        confusable: a sentence that says what confusable neighbours are.
        goals: what the model should reach.
        page: name of the page and its results, without .md and .json.
    """

    world: World
    settings: Settings
    attributes: tuple[str, ...]
    most: int
    confusable: str
    goals: Goals
    page: str = "results"

    @property
    def counts(self) -> tuple[int, ...]:
        """Numbers of instances that have scenes of their own."""
        return tuple(range(1, self.most + 1))

    @property
    def scenes(self) -> dict[str, Scenes]:
        """The sets of scenes by name."""
        main, confusable = self._scenes(2, 6), self._scenes(2, 6, confusable=True)
        sets = {"main": Scenes(101, 201, main, "main"), "confusable": Scenes(102, 202, confusable, "confusable")}
        return sets | {f"count_{n}": Scenes(110 + n, 210 + n, self._scenes(n, n), "counts") for n in self.counts}

    def _scenes(self, least: int, most: int, confusable: bool = False) -> Settings:
        changes: dict[str, Any] = {"min_instances": least, "max_instances": most, "confusable": confusable}
        return dataclasses.replace(self.settings, **changes)


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a table: how its images are made.

    Attributes:
        label: its name in the table.
        scenes: a name in `Subject.scenes`.
        source: generated from layouts, or the real (rendered) images.
        format: what layouts contain, see `generate.make_layout`.
        drop: formats that layouts contain but the model does not see.
        scaleu: False switches ScaleU off.
        sampling: settings of `SamplingConfig` that differ from the checkpoint's; "on" is explained at `_ON`.
    """

    label: str
    scenes: str = "main"
    source: Literal["layouts", "real"] = "layouts"
    format: str = "box"
    drop: tuple[str, ...] = ()
    scaleu: bool = True
    sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def settings(self, own: SamplingConfig) -> SamplingConfig:
        """The row's sampling settings, given those of the checkpoint."""
        changes = dict(self.sampling)
        for name, (off, otherwise) in _ON.items():
            if changes.get(name) == "on":
                value = getattr(own, name)
                changes[name] = otherwise if value == off else value
        return SamplingConfig.from_dict(own.to_dict() | changes, "sampling")

    def slug(self, own: SamplingConfig, scenes: str | None = None) -> str:
        """A name for the row's images: its scenes, and every setting that differs from the checkpoint's."""
        parts = [scenes or self.scenes, self.format if self.source == "layouts" else self.source]
        if self.source == "real":
            return "-".join(parts)
        parts += [f"no_{name}" for name in self.drop]
        if not self.scaleu:
            parts.append("no_scaleu")
        settings = self.settings(own)
        for name in sorted(self.sampling):
            if getattr(settings, name) != getattr(own, name):
                value = getattr(settings, name) if name in _ON else self.sampling[name]
                values = value if isinstance(value, tuple) else (value,)
                parts += [name + "".join(f"_{x:g}" if isinstance(x, float) else f"_{x}" for x in values)]
        return "-".join(parts)


@dataclasses.dataclass(frozen=True)
class Section:
    """One table of the study.

    Attributes:
        title: heading on the page.
        text: what is compared.
        rows: in the table's order; a row with the same images as an earlier one is left out.
        columns: names of metrics, see `measure.summarize`.
        large: whether it has the larger number of images and seeds.
    """

    title: str
    text: str
    rows: tuple[Row, ...]
    columns: tuple[str, ...]
    large: bool = False


class Task(NamedTuple):
    """The images of one row with one seed, for the first `count` of its scenes."""

    row: Row
    seed: int
    count: int


# For each setting: the value that means off, and the value of "on" if the checkpoint has it off. If the checkpoint has
# it on, "on" is the checkpoint's value.
_ON = {"mis": (0.0, 0.36), "masked_attention": ("none", "correct")}
