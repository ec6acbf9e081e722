"""Attributes of detected instances, such as colour: which the detector names, and CLIP for the others."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from instdiff_jax.evaluation.files import image_path, read_image
from instdiff_jax.evaluation.image import EvaluatedImage, TextImageModel
from instdiff_jax.evaluation.split import crop_box


def unnamed_kinds(images: Sequence[EvaluatedImage], kinds: Sequence[str]) -> list[str]:
    """The kinds of attributes that the detector does not name, or names in words that the split does not use.

    A detector that always gives the same value names the kind, even if the split never uses that value.
    """
    asked: dict[str, set[str]] = {kind: set() for kind in kinds}
    named: dict[str, set[str]] = {kind: set() for kind in kinds}
    for image in images:
        for sets, items in ((asked, image.scene.asked), (named, image.found)):
            for kind, value in (pair for item in items for pair in item.attributes.items()):
                if kind in sets:
                    sets[kind].add(value)
    return [kind for kind in kinds if len(named[kind]) != 1 and not asked[kind] & named[kind]]


def name_attributes(
    images: Sequence[EvaluatedImage], clip: TextImageModel, kinds: Sequence[str], folder: Path
) -> list[EvaluatedImage]:
    """Gives each match the attributes of the split that CLIP scores highest in its box (paper, section 4)."""
    targets = [target for image in images for target in image.scene.asked]
    values = {kind: sorted({t.attributes[kind] for t in targets if kind in t.attributes}) for kind in kinds}
    texts = {
        (kind, category): clip.embed_texts([f"a {value} {category}" for value in values[kind]])
        for kind in kinds
        for category in sorted({target.category for target in targets})
    }
    named = []
    for image in images:
        pixels = read_image(image_path(folder, image.scene), image.scene.size)
        measures = []
        for item in image.measures:
            if item.match is not None:
                x, y, w, h = item.match.box
                vector = clip.embed_images([crop_box(pixels, (x, y, x + w, y + h))])[0]
                seen = {k: values[k][int(np.argmax(texts[k, item.match.category] @ vector))] for k in kinds}
                item = item._replace(match=item.match._replace(attributes={**item.match.attributes, **seen}))
            measures.append(item)
        named.append(dataclasses.replace(image, measures=measures))
    return named
