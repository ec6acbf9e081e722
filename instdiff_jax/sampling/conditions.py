"""The unique conditions of a batch of layouts, listed on the host: what each is made of, and which rows read it."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal, NamedTuple

from instdiff_jax import grounding as groundings
from instdiff_jax.config import ModelConfig
from instdiff_jax.diffusion.rows import ImageRows
from instdiff_jax.grounding import FORMATS, KEPT, Format, Grounding
from instdiff_jax.layout import Layout


class ConditionInput(NamedTuple):
    """What one unique condition is made of.

    Attributes:
        grounding: without phrase embeddings.
        text: index of its caption among the texts.
        phrases: indices of its instances' captions among the phrases, from the first slot on.
    """

    grounding: Grounding
    text: int
    phrases: Sequence[int] = ()


class ConditionList(NamedTuple):
    """Unique texts, phrases and conditions (the null ones last), and the rows of each layout, by its number."""

    texts: list[str]
    phrases: list[str]
    conditions: list[ConditionInput]
    rows: dict[int, ImageRows]


def separate_instances(
    layout: Layout, format: Format = "auto", drop: Collection[str] = (), merge: Literal["mean", "crop"] = "mean"
) -> list[int]:
    """Slots of the instances that the multi-instance sampler denoises on their own: all, or those with a box to paste.

    `format` and `drop` are those of `grounding.make_grounding`: boxes are as it has them, and with all formats dropped
    there is no instance.
    """
    if set(drop) == set(FORMATS):
        return []
    boxes = "box" in KEPT.get(format, FORMATS)
    pasted = [
        boxes and (instance.box is not None or format == "auto" and instance.rle is not None)
        for instance in layout.instances
    ]
    return [slot for slot, has_box in enumerate(pasted) if has_box or merge == "mean"]


def list_conditions(
    layouts: Mapping[int, Layout],
    negative_prompt: str,
    config: ModelConfig,
    format: Format = "auto",
    drop: Collection[str] = (),
    choose_slots: Callable[[Layout], Sequence[int]] = separate_instances,
) -> ConditionList:
    """Lists each layout's conditions: its own, and one for each instance in the slots that `choose_slots` returns.

    A layout's own negative prompt goes before `negative_prompt`.
    `format` and `drop` are those of `grounding.make_grounding`.
    """
    slots = {number: choose_slots(layout) for number, layout in layouts.items()}
    phrases = sorted({instance.caption for layout in layouts.values() for instance in layout.instances})
    captions = {layout.caption for layout in layouts.values()}
    own = {layout.instances[slot].caption for number, layout in layouts.items() for slot in slots[number]}
    negatives = {
        number: negative_prompt if layout.negative_prompt is None else layout.negative_prompt
        for number, layout in layouts.items()
    }
    unique_negatives = sorted(set(negatives.values()))
    texts = sorted({*captions, *unique_negatives, *own})
    text_index, phrase_index = ({text: i for i, text in enumerate(column)} for column in (texts, phrases))
    count = sum(1 + len(chosen) for chosen in slots.values())
    conditions, rows = [], {}
    for number, layout in layouts.items():
        whole = groundings.make_grounding(layout, config, format, drop)
        indices = [phrase_index[instance.caption] for instance in layout.instances if whole["valid"].any()]
        each = groundings.instance_groundings(whole) if slots[number] else []
        first = len(conditions) + 1
        conditions.append(ConditionInput(whole, text_index[layout.caption], indices))
        for slot in slots[number]:
            conditions.append(ConditionInput(each[slot], text_index[phrases[indices[slot]]], [indices[slot]]))
        rows[number] = ImageRows(
            layout=first - 1,
            negative=count + unique_negatives.index(negatives[number]),
            instances=tuple(range(first, len(conditions))),
            boxes=[tuple(each[slot]["boxes"][0]) for slot in slots[number]],
        )
    null = groundings.null_grounding(config.unifusion.map_size, config.unet.context_dim)
    conditions += [ConditionInput(null, text_index[text]) for text in unique_negatives]
    return ConditionList(texts, phrases, conditions, rows)
