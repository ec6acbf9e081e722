"""The unique conditions that a batch of layouts is sampled under, as the host lists them."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal, NamedTuple

from instdiff_jax import grounding as groundings
from instdiff_jax.config import ModelConfig
from instdiff_jax.diffusion.multi_instance import ImageRows
from instdiff_jax.grounding import KEPT, Format, Grounding
from instdiff_jax.layout import Layout


class Entry(NamedTuple):
    """What one unique condition is made of: the number of a text, and a grounding but for its phrase embeddings.

    `phrases` are the numbers of the slots' captions among the phrases, from the first slot on.
    """

    grounding: Grounding
    text: int
    phrases: Sequence[int] = ()


class Entries(NamedTuple):
    """Unique texts, phrases and conditions, the null one last; and the rows of each layout, by its number."""

    texts: list[str]
    phrases: list[str]
    entries: list[Entry]
    rows: dict[int, ImageRows]


def alone(
    layout: Layout, format: Format = "auto", drop: Collection[str] = (), merge: Literal["mean", "crop"] = "mean"
) -> list[int]:
    """Which instances the multi-instance sampler denoises alone: all, or those with a box to paste.

    `format` and `drop` are those of `grounding.make_grounding`: boxes are as it has them, and with all formats dropped
    there is no instance.
    """
    if set(drop) == set(KEPT["scribble"]):
        return []
    boxes = "box" in KEPT.get(format, KEPT["scribble"])
    pasted = [
        boxes and (instance.box is not None or format == "auto" and instance.mask is not None)
        for instance in layout.instances
    ]
    return [slot for slot, has_box in enumerate(pasted) if has_box or merge == "mean"]


def list_entries(
    layouts: Mapping[int, Layout],
    negative_prompt: str,
    config: ModelConfig,
    format: Format = "auto",
    drop: Collection[str] = (),
    slots_alone: Callable[[Layout], Sequence[int]] = alone,
) -> Entries:
    """Lists each layout's conditions: its own, and one for each of its instances that `slots_alone` names.

    `format` and `drop` are those of `grounding.make_grounding`.
    """
    slots = {number: slots_alone(layout) for number, layout in layouts.items()}
    phrases = sorted({instance.caption for layout in layouts.values() for instance in layout.instances})
    captions = {layout.caption for layout in layouts.values()}
    own = {layout.instances[slot].caption for number, layout in layouts.items() for slot in slots[number]}
    texts = sorted({*captions, negative_prompt, *own})
    text_number, phrase_number = ({text: i for i, text in enumerate(column)} for column in (texts, phrases))
    negative = sum(1 + len(chosen) for chosen in slots.values())
    entries, rows = [], {}
    for number, layout in layouts.items():
        whole = groundings.make_grounding(layout, config, format, drop)
        numbers = [phrase_number[instance.caption] for instance in layout.instances if whole["valid"].any()]
        entries.append(Entry(whole, text_number[layout.caption], numbers))
        each = groundings.instance_groundings(whole) if slots[number] else []
        singles = [(each[slot], numbers[slot]) for slot in slots[number]]
        rows[number] = ImageRows(
            layout=len(entries) - 1,
            negative=negative,
            instances=tuple(range(len(entries), len(entries) + len(singles))),
            boxes=[tuple(single["boxes"][0]) for single, _ in singles],
        )
        for single, phrase in singles:
            entries.append(Entry(single, text_number[phrases[phrase]], [phrase]))
    null = groundings.null_grounding(config.unifusion.map_size, config.unet.context_dim)
    return Entries(texts, phrases, [*entries, Entry(null, text_number[negative_prompt])], rows)
