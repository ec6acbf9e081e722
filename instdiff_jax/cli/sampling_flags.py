"""The settings of `config.SamplingConfig` as flags of the same names, for every program that samples."""

import argparse
import dataclasses
from typing import Any

from instdiff_jax.config import PRESETS, SamplingConfig, with_preset


def fractions(text: str) -> tuple[float, ...] | float:
    """`0.8`, or several fractions `0.5,0.25,0.25`."""
    numbers = tuple(float(part) for part in text.split(","))
    return numbers[0] if len(numbers) == 1 else numbers


def add_sampling_flags(parser: argparse._ActionsContainer) -> None:
    """Adds --preset and a flag for every sampling setting; None keeps the checkpoint's own."""
    add = parser.add_argument
    add("--preset", choices=tuple(PRESETS), help="a set of the settings below; those that are given go before it")
    add("--steps", type=int, help="solver steps")
    add("--sampler", help="plms, ddim or dpm++")
    add("--guidance_scale", type=float, help="classifier-free guidance; 1 turns it off")
    add("--guidance_interval", type=fractions, help="fractions of the steps, guidance between them: 0.1,0.8")
    add("--alpha", type=fractions, help="fraction of the steps that the fusers are on (or three: ones, decay, zeros)")
    add("--mis", type=float, help="fraction of the steps of the multi-instance sampler; 0 turns it off")
    add("--mis_guidance", action=argparse.BooleanOptionalAction, help="guidance where instances are sampled alone")
    add("--reuse", type=int, help="deep features of the UNet are computed every so many evaluations; 1 is each")
    add("--merge", help="how the multi-instance sampler merges: mean or crop")
    add("--masked_attention", help="none, correct, strict or official")
    add("--negative_prompt")


def read_overrides(args: argparse.Namespace) -> dict[str, Any]:
    """What the flags change in a checkpoint's settings: the preset's values, and those given over them."""
    names = [field.name for field in dataclasses.fields(SamplingConfig)]
    return with_preset(args.preset, {name: getattr(args, name) for name in names if getattr(args, name) is not None})
