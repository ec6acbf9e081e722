"""The fields of `config.SamplingConfig` as flags of the same names, for every command that samples."""

import argparse
import dataclasses
import typing
from typing import Any, Literal

from instdiff_jax.cli.parser import local_path
from instdiff_jax.config import SamplingConfig
from instdiff_jax.errors import InputError
from instdiff_jax.sampling.presets import PRESETS, with_preset

DTYPES = ("float32", "bfloat16", "float16", "int8", "fp8")
DTYPE_HELP = "default: float32 on a CPU, else bfloat16; int8 and fp8: the UNet's projections in 8 bits, else bfloat16"
HELP = {
    "steps": "solver steps",
    "sampler": "the solver",
    "sigmas": "the steps' noise levels; auto: the solver's own",
    "guidance_scale": "of classifier-free guidance; 1 turns it off",
    "guidance_interval": "fractions of the steps between which there is guidance: 0.1,0.8",
    "alpha": "fraction of the steps that the fusers are on, or three fractions: ones, linear decay, zeros",
    "mis": "fraction of the steps of the multi-instance sampler; 0 turns it off",
    "mis_guidance": "guidance for instances that are denoised on their own",
    "merge": "how the multi-instance sampler merges",
    "negative_prompt": "what guidance leads away from; a layout's own comes first",
    "prompt_weights": "read weights in captions: (word:1.3), (word), [word]",
    "long_prompts": "use up to 300 tokens of a caption, not 75",
    "masked_attention": "keep instances apart in the fusers",
    "reuse": "compute the UNet's deep features only in every n-th evaluation",
}


def fractions(text: str) -> tuple[float, ...] | float:
    """`0.8`, or several fractions `0.5,0.25,0.25`."""
    numbers = tuple(float(part) for part in text.split(","))
    return numbers[0] if len(numbers) == 1 else numbers


def add_sampling_flags(parser: argparse._ActionsContainer) -> None:
    """Adds --preset and a flag per sampling setting; None keeps the checkpoint's value."""
    parser.add_argument("--preset", choices=tuple(PRESETS), help="a named set of settings; flags take precedence")
    for name, hint in typing.get_type_hints(SamplingConfig).items():
        options: dict[str, Any] = {"type": hint}
        text = HELP[name]
        if hint is bool:
            options = {"action": argparse.BooleanOptionalAction}
        elif typing.get_origin(hint) is tuple:
            options = {"type": fractions}
        elif typing.get_origin(hint) is Literal:  # SamplingConfig checks the value
            options, text = {}, f"{text}: {', '.join(typing.get_args(hint))}"
        parser.add_argument(f"--{name}", help=text, **options)


def add_addon_flags(parser: argparse._ActionsContainer) -> None:
    """Adds --lora and --embedding."""
    parser.add_argument("--lora", action="append", default=[], metavar="FILE[:SCALE]", help="a LoRA; may be repeated")
    parser.add_argument(
        "--embedding",
        action="append",
        default=[],
        metavar="FILE[:TOKEN]",
        help="a textual inversion embedding, and the word for it (default: the file's); may be repeated",
    )


def add_picture_flags(parser: argparse._ActionsContainer) -> None:
    """Adds --taesd, --tile, --upscale, --upscale_strength, --refiner and --cascade_strength."""
    add = parser.add_argument
    add("--taesd", type=local_path, metavar="FILE", help="decode with TAESD: a file, or a diffusers folder")
    add("--tile", type=int, help="decode in tiles of so many pixels a side, which needs less memory")
    add("--upscale", type=float, help="make the sides so many times larger, in a second pass with the same layout")
    add("--upscale_strength", type=float, help="fraction of the steps of the second pass (default: 0.4)")
    add(
        "--refiner", type=local_path, metavar="FILE", help="SDXL's refiner (sd_xl_refiner_1.0.safetensors) goes over it"
    )
    add("--cascade_strength", type=float, help="fraction of the refiner's 20 steps (default: 0.35)")


def strength_of(args: argparse.Namespace, kind: Literal["upscale", "cascade"]) -> float:
    """The fraction of the steps of a second pass, or of the refiner."""
    given = getattr(args, f"{kind}_strength")
    return {"upscale": 0.4, "cascade": 0.35}[kind] if given is None else given


def read_picture_flags(args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """These flags as a record has them; {} without any. InputError for a file that is not there."""
    from instdiff_jax.sampling.loading import file_fingerprint

    for name, needed in (("upscale_strength", "upscale"), ("cascade_strength", "refiner")):
        if getattr(args, name) is not None and getattr(args, needed) is None:
            raise InputError(f"--{name}: only means something with --{needed}")
    found: dict[str, list[dict[str, Any]]] = {}
    if args.taesd is not None:
        found["taesd"] = [{"file": str(args.taesd), "fingerprint": file_fingerprint(args.taesd)}]
    if args.tile is not None:
        found["tile"] = [{"pixels": args.tile}]
    if args.upscale is not None:
        found["upscale"] = [{"factor": args.upscale, "strength": strength_of(args, "upscale")}]
    if args.refiner is not None:
        fingerprint = file_fingerprint(args.refiner)
        found["refiner"] = [
            {"file": str(args.refiner), "fingerprint": fingerprint, "strength": strength_of(args, "cascade")}
        ]
    return found


def read_addons(args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """--lora and --embedding as a record has them; {} without any. InputError for a file that is not there."""
    if not args.lora and not args.embedding:
        return {}
    from instdiff_jax.checkpoint.embeddings import Embedding
    from instdiff_jax.checkpoint.lora import Lora
    from instdiff_jax.sampling.loading import addon_fingerprints

    return addon_fingerprints(list(map(Lora.parse, args.lora)), list(map(Embedding.parse, args.embedding)))


def read_overrides(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that the flags change, those of the preset included. Precedence: flag > preset > checkpoint."""
    names = [field.name for field in dataclasses.fields(SamplingConfig)]
    return with_preset(args.preset, {name: getattr(args, name) for name in names if getattr(args, name) is not None})
