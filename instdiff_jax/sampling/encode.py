"""Layouts to the conditions of their rows: texts, phrases and groundings through their networks."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.sharding import NamedSharding

from instdiff_jax.diffusion.rows import ImageRows
from instdiff_jax.layout import Layout
from instdiff_jax.models.regions import region_bits
from instdiff_jax.models.tokenizer import Tokenizer
from instdiff_jax.models.unet import Conditions
from instdiff_jax.sampling import programs
from instdiff_jax.sampling.conditions import list_conditions
from instdiff_jax.sampling.prompts import read_phrases, read_prompts
from instdiff_jax.sampling.request import Request


def encode_layouts(
    networks: programs.SamplingNetworks,
    params: dict[str, Any],
    tokenizer: Tokenizer,
    request: Request,
    layouts: Mapping[int, Layout],
    grid: tuple[int, int],
    sharding: NamedSharding | None,
) -> tuple[Conditions, dict[int, ImageRows]]:
    """The unique conditions of some layouts on a latent grid (height, width), and each layout's rows, by its number."""
    settings, options = request.settings, request.options
    listed = list_conditions(
        layouts, settings.negative_prompt, request.config, options.format, options.drop, request.separate_instances
    )
    prompts = read_prompts(tokenizer, listed.texts, settings)
    ids = prompts.ids, read_phrases(tokenizer, listed.phrases, settings)
    (hidden, _), (_, pooled) = (
        programs.encode_text(networks.text_encoder, params["text_encoder"], column, sharding) for column in ids
    )
    if prompts.weights is not None:
        hidden = programs.weigh_texts(hidden, prompts.weights, sharding)
    encoded = hidden, pooled, sharding, prompts.rows
    conditions = programs.make_conditions(networks, params, listed.conditions, *encoded)
    if settings.masked_attention != "none":
        bits = [region_bits(entry.grounding, *grid, settings.masked_attention) for entry in listed.conditions]
        visual, tokens = (np.stack(column) for column in zip(*bits, strict=True))
        conditions["regions"] = {"visual": visual, "tokens": tokens}
    return conditions, listed.rows
