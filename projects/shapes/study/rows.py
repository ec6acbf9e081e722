"""What the study measures: held-out scenes, and the rows of every table (paper, sections 3 and 4, at small scale)."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from instdiff_jax.config import PRESETS, SamplingConfig
from projects.shapes.worlds import WORLDS, SceneSettings

COUNTS = tuple(range(1, 11))


@dataclasses.dataclass(frozen=True)
class Scenes:
    """A set of held-out scenes, and seeds of its own: no scene here is one that anything was trained on.

    Attributes:
        seed: of the scenes whose layouts are drawn.
        reference_seed: of as similar other scenes, whose pictures the Fréchet distance compares with.
        settings: what scenes look like.
        group: sets of one group are drawn together, in one folder: each alone would need programs of its own sizes.
    """

    seed: int
    reference_seed: int
    settings: SceneSettings
    group: str


def _scenes(least: int, most: int, confusable: bool = False) -> SceneSettings:
    """As configs/shapes.py renders them to train on."""
    return dataclasses.replace(WORLDS["calm"], min_instances=least, max_instances=most, confusable=confusable)


SCENES: dict[str, Scenes] = {
    "main": Scenes(101, 201, _scenes(2, 6), "main"),
    "confusable": Scenes(102, 202, _scenes(2, 6, confusable=True), "confusable"),
} | {f"count_{n}": Scenes(110 + n, 210 + n, _scenes(n, n), "counts") for n in COUNTS}


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a table: how some pictures are made.

    Attributes:
        label: for people.
        scenes: a name in SCENES.
        pictures: drawn from layouts, or the real ones.
        format: what layouts hold, see `generate.make_layout`.
        drop: formats that they hold but the model does not see.
        scaleu: False switches ScaleU off.
        sampling: settings of `SamplingConfig` other than the checkpoint's.
    """

    label: str
    scenes: str = "main"
    pictures: Literal["layouts", "real"] = "layouts"
    format: str = "box"
    drop: tuple[str, ...] = ()
    scaleu: bool = True
    sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def settings(self, own: SamplingConfig) -> SamplingConfig:
        """The row's sampling settings, where the checkpoint's are `own`."""
        changes = dict(self.sampling)
        for name, (off, otherwise) in _ON.items():
            if changes.get(name) == "on":
                value = getattr(own, name)
                changes[name] = otherwise if value == off else value
        return SamplingConfig.from_dict(own.to_dict() | changes, "sampling")

    def slug(self, own: SamplingConfig, scenes: str | None = None) -> str:
        """A name that tells this row from others: its scenes, and what differs from the checkpoint's own way."""
        parts = [scenes or self.scenes, self.pictures if self.pictures != "layouts" else self.format]
        if self.pictures == "real":
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
    """One part of the study.

    Attributes:
        title: of its part of the page.
        text: what is compared.
        rows: in the table's order; one that makes the same pictures as an earlier one is left out.
        columns: names of metrics, see `measure.summarize`.
        large: whether it is of the large count of pictures and seeds.
    """

    title: str
    text: str
    rows: tuple[Row, ...]
    columns: tuple[str, ...]
    large: bool = False


class Task(NamedTuple):
    """The pictures of one row with one seed, of the first `count` of its scenes."""

    row: Row
    seed: int
    count: int


# "on": as the checkpoint has it, or the second where it has none, the first.
_ON = {"mis": (0.0, 0.36), "masked_attention": ("none", "correct")}
PLACES = ("box_AP", "box_AP50", "box_AR", "mask_AP", "mask_AP50", "mask_IoU", "PiM_point", "PiM_scribble")
LOOKS = ("colour_accuracy", "texture_accuracy", "FID")
_SHORT = ("box_AP", "box_AP50", "mask_IoU", *LOOKS)
_LEAKS = tuple(f"{kind}_{what}" for kind in ("colour", "texture") for what in ("accuracy", "accuracy_found", "leak"))

REAL = Row("real images", pictures="real")
BOX = Row("box")
MIS, NO_MIS = {"mis": "on"}, {"mis": 0.0}
MASKED, UNMASKED = {"masked_attention": "on"}, {"masked_attention": "none"}
# ScaleU stays: the UNet was trained with it in place, and draws nothing without ("Each part on and off").
GLIGEN = Row(
    "GLIGEN-like: box tokens alone, no MIS or masked attention",
    drop=("point",),
    sampling=NO_MIS | UNMASKED,
)
CAPTION = Row(
    "caption alone: the grounding of no instances",
    drop=("box", "point", "scribble", "mask"),
    sampling=NO_MIS,
)


def _named(name: str, values: Sequence[float]) -> tuple[Row, ...]:
    return tuple(Row(f"{value:g}", sampling={name: value}) for value in values)


# What the table of options is against, and what its pictures are compared with.
_LONG = {"sampler": "dpm++", "steps": 20, "mis": 0.36}
FIFTY = Row("50 steps", sampling=_LONG | {"steps": 50})

# In the order of importance: a study that is cut off has measured the first ones.
SECTIONS: dict[str, Section] = {
    "formats": Section(
        "Formats",
        "Layouts give each instance its box, mask, scribble (20 points of the mask) or point (one pixel of it) and "
        "nothing else; the sampler adds a mask's box and a box's centre. Mixed: box, mask, scribble and point in turn. "
        "Real images are what the detector can see at best: the upper bound.",
        (REAL, BOX, *(Row(name, format=name) for name in ("mask", "scribble", "point", "mixed"))),
        (*PLACES, *LOOKS),
        large=True,
    ),
    "baselines": Section(
        "Against no grounding and against boxes alone",
        "Both are ablations at inference of this model. Caption alone: no instance is given, as in a tenth of the "
        "training samples. GLIGEN-like: of UniFusion's tokens the boxes' alone know a place, and MIS and masked "
        "attention, with which the model was trained, are off; a trained GLIGEN would do better.",
        (REAL, BOX, GLIGEN, CAPTION),
        (*PLACES, *LOOKS),
        large=True,
    ),
    "leakage": Section(
        "Attributes between confusable neighbours",
        "Neighbours have one shape and swapped colours and textures. Accuracy is over all instances, and over those "
        "found; leaked is the share of wrong attributes that another instance of the picture has.",
        (
            dataclasses.replace(REAL, scenes="confusable"),
            Row("MIS and masked attention", scenes="confusable", sampling=MIS | MASKED),
            Row("MIS alone", scenes="confusable", sampling=MIS | UNMASKED),
            Row("masked attention alone", scenes="confusable", sampling=NO_MIS | MASKED),
            Row("neither", scenes="confusable", sampling=NO_MIS | UNMASKED),
            Row("MIS merged by crop and paste", scenes="confusable", sampling=MIS | MASKED | {"merge": "crop"}),
        ),
        ("box_AP50", "found", *_LEAKS),
        large=True,
    ),
    "ablations": Section(
        "Each part on and off",
        "Parts are switched at inference; nothing is trained again, and the first row is as the checkpoint samples by "
        "itself. What the model was trained with it may not do without: a row says so where its FID is far above the "
        "others'. The first rows give boxes; the last ones give box, scribble and mask of every instance, and leave "
        "out one of UniFusion's formats.",
        (
            BOX,
            Row("box, MIS", sampling=MIS),
            Row("box, no MIS", sampling=NO_MIS),
            Row("box, no ScaleU", scaleu=False),
            Row("box, masked attention", sampling=MASKED),
            Row("box, no masked attention", sampling=UNMASKED),
            Row("box, no MIS, masked attention", sampling=NO_MIS | MASKED),
            Row("box, MIS, no masked attention", sampling=MIS | UNMASKED),
            Row("box, no MIS, no masked attention", sampling=NO_MIS | UNMASKED),
            Row("all formats", format="auto"),
            Row("all but box", format="auto", drop=("box",)),
            Row("all but point", format="auto", drop=("point",)),
            Row("all but scribble", format="auto", drop=("scribble",)),
            Row("all but mask", format="auto", drop=("mask",)),
        ),
        ("box_AP", "box_AP50", "mask_IoU", "PiM_point", "PiM_scribble", *LOOKS),
    ),
    "mis": Section(
        "Fraction of steps of the multi-instance sampler",
        "Boxes. The last row merges by crop and paste instead of the mean.",
        (
            *_named("mis", (0.0, 0.2, 0.36, 0.6, 0.8)),
            Row("0.36, crop and paste", sampling={"mis": 0.36, "merge": "crop"}),
        ),
        _SHORT,
    ),
    "alpha": Section(
        "Fraction of steps that the fusers are on",
        "Boxes.",
        _named("alpha", (0.25, 0.5, 0.75, 1.0)),
        _SHORT,
    ),
    "instances": Section(
        "Number of instances",
        "Scenes of exactly so many instances, boxes; beside each number that of the real images in brackets.",
        tuple(
            Row(f"{n}{', real' * (pictures == 'real')}", scenes=f"count_{n}", pictures=pictures)
            for n in COUNTS
            for pictures in ("layouts", "real")
        ),
        ("box_AP", "box_AP50", "mask_IoU", "PiM_point", *LOOKS),
    ),
    "guidance": Section(
        "Guidance scale",
        "Boxes.",
        _named("guidance_scale", (1.0, 2.0, 3.0, 5.0, 7.5)),
        _SHORT,
    ),
    "solvers": Section(
        "Solver and number of steps",
        "Boxes; PLMS takes one UNet evaluation more than it has steps.",
        tuple(
            Row(f"{sampler}, {steps}", sampling={"sampler": sampler, "steps": steps})
            for steps in (20, 10, 5, 50)
            for sampler in ("dpm++", "ddim", "plms")
        ),
        _SHORT,
    ),
    "fewer": Section(
        "Less work a picture",
        "Boxes; 20 steps of DPM-Solver++ with MIS for 0.36 of them, and what leaves some out (docs/sampling.md). "
        "UNets: evaluations of the UNet on one latent for a picture of four instances, where one that reuses features "
        "counts as its share of the operations; speedup: how many times fewer they are than in 50 steps. Distance: "
        "from the same pictures in 50 steps, the mean difference of pixels (0 to 255).",
        (FIFTY,)
        + tuple(
            Row(label, sampling=_LONG | changes)
            for label, changes in {
                "all of it": {},
                "MIS rows without guidance": {"mis_guidance": False},
                "guidance for the first 0.8": {"guidance_interval": (0.0, 0.8)},
                "guidance for the first 0.6": {"guidance_interval": (0.0, 0.6)},
                "guidance after MIS": {"guidance_interval": (0.36, 1.0)},
                "features reused once": {"reuse": 2},
                "features reused twice": {"reuse": 3},
                "15 steps": {"steps": 15},
                "25 steps": {"steps": 25},
                "no MIS": NO_MIS,
            }.items()
        )
        + (Row("--preset fast, with MIS", sampling=PRESETS["fast"] | {"mis": 0.36}),),
        ("UNets", "speedup", "box_AP50", "mask_IoU", *LOOKS, "distance"),
    ),
}
COST, FEWER = "cost", "fewer"
NAMES = (*SECTIONS, COST)


class Sizes(NamedTuple):
    """How many pictures a row has, and with how many seeds: those of large sections, and of the others."""

    count: int
    seeds: int
    small_count: int
    small_seeds: int

    def of(self, section: Section) -> tuple[int, int]:
        """Pictures of a seed, and seeds."""
        return (self.count, self.seeds) if section.large else (self.small_count, self.small_seeds)


Key = tuple[str, int, int]


def row_keys(row: Row, section: Section, sizes: Sizes, own: SamplingConfig) -> list[Key]:
    """Slug, seed and count of a row's tasks; real images have no seeds."""
    count, seeds = sizes.of(section)
    return [(row.slug(own), seed, count) for seed in range(1 if row.pictures == "real" else seeds)]


def make_tasks(names: Sequence[str], sizes: Sizes, own: SamplingConfig) -> dict[Key, Task]:
    """What is to be done for some sections, in order: the first seed of all comes before the second of any.

    What two sections share is there once.
    """
    sections = [SECTIONS[name] for name in SECTIONS if name in names]
    tasks: dict[Key, Task] = {}
    for number in range(max(sizes.seeds, sizes.small_seeds)):
        for section in sections:
            for row in section.rows:
                for key in row_keys(row, section, sizes, own)[number : number + 1]:
                    tasks.setdefault(key, Task(row, *key[1:]))
    return tasks
