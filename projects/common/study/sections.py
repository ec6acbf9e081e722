"""The study's tables: which rows each section has, and the order in which they are measured."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from instdiff_jax.config import SamplingConfig
from instdiff_jax.sampling.presets import PRESETS
from projects.common.study.rows import Row, Section, Subject, Task

# Groups of metrics.
PLACES = ("box_AP", "box_AP50", "box_AR", "mask_AP", "mask_AP50", "mask_IoU", "PiM_point", "PiM_scribble")
LOOKS, LEAKS = "accuracy", "accuracy, accuracy_found, leak"
_SHORT = ("box_AP", "box_AP50", "mask_IoU", LOOKS, "FID")

REAL = Row("real images", source="real")
BOX = Row("box")
MIS, NO_MIS = {"mis": "on"}, {"mis": 0.0}
MASKED, UNMASKED = {"masked_attention": "on"}, {"masked_attention": "none"}
# ScaleU stays on: the UNet was trained with it and generates nothing without ("Each part on and off").
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


# The settings of the table of cheaper options, and the row that its images are compared with.
_LONG = {"sampler": "dpm++", "steps": 20, "mis": 0.36}
FIFTY = Row("50 steps", sampling=_LONG | {"steps": 50})

# Most important first: an interrupted study has measured the first ones.
# LOOKS and LEAKS stand for those of each kind of attribute. `make_sections` puts in what depends on the subject.
SECTIONS: dict[str, Section] = {
    "formats": Section(
        "Formats",
        "Each instance has only its box, mask, scribble (20 points of the mask) or point (one pixel of the mask); the "
        "sampler adds the box of a mask and the centre of a box. Mixed: box, mask, scribble and point in turn. "
        "Real images show what the detector can reach: the upper bound.",
        (REAL, BOX, *(Row(name, format=name) for name in ("mask", "scribble", "point", "mixed"))),
        (*PLACES, LOOKS, "FID"),
        large=True,
    ),
    "baselines": Section(
        "Against no grounding and against boxes alone",
        "Both are ablations of this model at inference. Caption alone: no instances, as in a tenth of the training "
        "samples. GLIGEN-like: only UniFusion's box tokens have a location, and MIS and masked attention (with which "
        "the model was trained) are off; a trained GLIGEN would do better.",
        (REAL, BOX, GLIGEN, CAPTION),
        (*PLACES, LOOKS, "FID"),
        large=True,
    ),
    "leakage": Section(
        "Attributes between confusable neighbours",
        "Accuracy is over all instances, then over those found. Leak: the share of wrong attributes that belong to "
        "another instance of the image.",
        (
            dataclasses.replace(REAL, scenes="confusable"),
            Row("MIS and masked attention", scenes="confusable", sampling=MIS | MASKED),
            Row("MIS alone", scenes="confusable", sampling=MIS | UNMASKED),
            Row("masked attention alone", scenes="confusable", sampling=NO_MIS | MASKED),
            Row("neither", scenes="confusable", sampling=NO_MIS | UNMASKED),
            Row("MIS merged by crop and paste", scenes="confusable", sampling=MIS | MASKED | {"merge": "crop"}),
        ),
        ("box_AP50", "found", LEAKS),
        large=True,
    ),
    "ablations": Section(
        "Each part on and off",
        "Parts are switched at inference, without retraining; the first row has the checkpoint's own settings. The "
        "model may fail without a part that it was trained with: then FID is far above that of the other rows. The "
        "first rows give boxes; the last ones give box, scribble and mask of every instance, and drop one of "
        "UniFusion's formats.",
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
        ("box_AP", "box_AP50", "mask_IoU", "PiM_point", "PiM_scribble", LOOKS, "FID"),
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
        "Scenes with exactly this many instances, boxes. In brackets: the real images.",
        (),
        ("box_AP", "box_AP50", "mask_IoU", "PiM_point", LOOKS, "FID"),
    ),
    "guidance": Section(
        "Guidance scale",
        "Boxes.",
        _named("guidance_scale", (1.0, 2.0, 3.0, 5.0, 7.5)),
        _SHORT,
    ),
    "solvers": Section(
        "Solver and number of steps",
        "Boxes. PLMS takes one UNet evaluation more than its number of steps, and Heun nearly two per step. LCM and "
        "TCD are left out: they are for distilled models.",
        tuple(
            Row(f"{sampler}, {steps}", sampling={"sampler": sampler, "steps": steps})
            for steps in (4, 8, 10, 20, 50)
            for sampler in ("ddim", "dpm++", "dpm++sde", "unipc", "euler", "euler_a", "heun", "plms")
        ),
        _SHORT,
    ),
    "fewer": Section(
        "Less work per image",
        "Boxes. 20 steps of DPM-Solver++ with MIS in 0.36 of them, and options that save work (docs/sampling.md). "
        "UNets: UNet evaluations of one latent for an image of four instances; an evaluation that reuses features "
        "counts as its fraction of the FLOPs. Speedup: relative to 50 steps. Distance: mean absolute difference of "
        "pixels (0 to 255) to the same images with 50 steps.",
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
        ("UNets", "speedup", "box_AP50", "mask_IoU", LOOKS, "FID", "distance"),
    ),
}
COST, FEWER = "cost", "fewer"
NAMES = (*SECTIONS, COST)


def make_sections(subject: Subject, names: Sequence[str] = tuple(SECTIONS)) -> dict[str, Section]:
    """The tables of a subject, most important first, without those that are not among the names."""

    def columns(section: Section) -> tuple[str, ...]:
        made: list[str] = []
        for column in section.columns:
            each = column in (LOOKS, LEAKS)
            made += (
                [f"{kind}_{what}" for kind in subject.attributes for what in column.split(", ")] if each else [column]
            )
        return tuple(made)

    sections = {name: dataclasses.replace(section, columns=columns(section)) for name, section in SECTIONS.items()}
    leakage, counted = (
        sections["leakage"],
        tuple(
            Row(f"{n}{', real' * (source == 'real')}", scenes=f"count_{n}", source=source)
            for n in subject.counts
            for source in ("layouts", "real")
        ),
    )
    sections["leakage"] = dataclasses.replace(leakage, text=f"{subject.confusable} {leakage.text}")
    sections["instances"] = dataclasses.replace(sections["instances"], rows=counted)
    return {name: section for name, section in sections.items() if name in names}


class Sizes(NamedTuple):
    """Numbers of images and seeds of a row, in large sections and in the others."""

    count: int
    seeds: int
    small_count: int
    small_seeds: int

    def of(self, section: Section) -> tuple[int, int]:
        """Images per seed, and number of seeds."""
        return (self.count, self.seeds) if section.large else (self.small_count, self.small_seeds)


Key = tuple[str, int, int]  # slug, seed, count


def row_keys(row: Row, section: Section, sizes: Sizes, own: SamplingConfig) -> list[Key]:
    """Keys of a row's tasks; real images have one seed only."""
    count, seeds = sizes.of(section)
    return [(row.slug(own), seed, count) for seed in range(1 if row.source == "real" else seeds)]


def make_tasks(sections: Mapping[str, Section], sizes: Sizes, own: SamplingConfig) -> dict[Key, Task]:
    """The tasks of sections, in order: the first seed of all rows comes before the second of any.

    A task that two sections share is listed once.
    """
    tasks: dict[Key, Task] = {}
    for number in range(max(sizes.seeds, sizes.small_seeds)):
        for section in sections.values():
            for row in section.rows:
                for key in row_keys(row, section, sizes, own)[number : number + 1]:
                    tasks.setdefault(key, Task(row, *key[1:]))
    return tasks
