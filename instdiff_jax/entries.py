"""The unique conditions that a batch of layouts is sampled under, as the host lists them."""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from instdiff_jax import grounding as groundings
from instdiff_jax.config import ModelConfig
from instdiff_jax.diffusion.multi_instance import ImageRows
from instdiff_jax.grounding import Format, Grounding
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


def list_entries(
    layouts: Mapping[int, Layout],
    negative_prompt: str,
    config: ModelConfig,
    format: Format = "auto",
    drop: Collection[str] = (),
    instances: bool = True,
) -> Entries:
    """Lists each layout's conditions: its own, and with `instances` one for each of its instances alone.

    `format` and `drop` are those of `grounding.make_grounding`.
    """
    phrases = sorted({instance.caption for layout in layouts.values() for instance in layout.instances})
    captions = {layout.caption for layout in layouts.values()}
    texts = sorted({*captions, negative_prompt, *(phrases if instances else ())})
    text_number, phrase_number = ({text: i for i, text in enumerate(column)} for column in (texts, phrases))
    negative = sum(1 + len(layout.instances) * instances for layout in layouts.values())
    entries, rows = [], {}
    for number, layout in layouts.items():
        whole = groundings.make_grounding(layout, config, format, drop)
        numbers = [phrase_number[instance.caption] for instance in layout.instances if whole["valid"].any()]
        entries.append(Entry(whole, text_number[layout.caption], numbers))
        alone = groundings.instance_groundings(whole) if instances else []
        rows[number] = ImageRows(
            layout=len(entries) - 1,
            negative=negative,
            instances=tuple(range(len(entries), len(entries) + len(alone))),
            boxes=[tuple(single["boxes"][0]) for single in alone],
        )
        for single, phrase in zip(alone, numbers, strict=False):
            entries.append(Entry(single, text_number[phrases[phrase]], [phrase]))
    null = groundings.null_grounding(config.unifusion.map_size, config.unet.context_dim)
    return Entries(texts, phrases, [*entries, Entry(null, text_number[negative_prompt])], rows)
