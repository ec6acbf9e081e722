"""Converts PyTorch checkpoints to a checkpoint folder, and back.

    python -m instdiff_jax convert --input instancediffusion_sd15.pth --output checkpoints/sd15
    python -m instdiff_jax convert --input v1-5-pruned.safetensors --input fusers.ckpt --input position_net.ckpt \
        --input scaleu.ckpt --output checkpoints/mine
    python -m instdiff_jax convert --input dreamy/ --input instancediffusion_sd15.pth --output checkpoints/dreamy
    python -m instdiff_jax convert --input checkpoints/sd15 --to_pytorch back.pth

An input is a PyTorch file, a diffusers folder (or its hub name, if it is in the hub's local cache) or a checkpoint
folder. Of several inputs, the base gives everything but the adapters.

The default sizes are those of the released model. Change them with --config=FILE or flags such as
--config.model.unet.num_heads=4; a key of another shape is an error that names it. The tokenizer is
--config.model.text_encoder.tokenizer=DIR, or a name in the hub's local cache, and by default that of an input folder.
Only writing .pth needs torch.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from instdiff_jax.buckets import is_bucket
from instdiff_jax.checkpoint import folder, pytorch
from instdiff_jax.checkpoint.diffusers import prediction_of, tokenizer_of
from instdiff_jax.checkpoint.diffusers_write import check_diffusers_output, save_diffusers
from instdiff_jax.checkpoint.lora import Lora, merge_loras
from instdiff_jax.checkpoint.tokenizer_files import find_tokenizer
from instdiff_jax.cli.config_flags import read_config
from instdiff_jax.cli.parser import any_path, local_path
from instdiff_jax.config import CheckpointSettings, ModelConfig, SamplingConfig, TextEncoderConfig
from instdiff_jax.errors import ArgumentParser, InputError, exit_on_input_error


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="python -m instdiff_jax convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--input",
        action="append",
        required=True,
        type=any_path,
        help="a PyTorch file, a diffusers folder or a checkpoint folder; several make one model (a base and adapters). "
        "With --to_pytorch and --to_diffusers: a checkpoint folder",
    )
    parser.add_argument("--output", type=any_path, help="the checkpoint folder to write")
    parser.add_argument("--convnext", type=local_path, help="ImageNet ConvNeXt weights, to train adapters from a base")
    parser.add_argument("--vae", type=local_path, help="another autoencoder: a file, or a diffusers folder")
    parser.add_argument(
        "--lora", action="append", default=[], metavar="FILE[:SCALE]", help="a LoRA to merge; repeatable"
    )
    parser.add_argument(
        "--ignore_extra", action="store_true", help="drop keys that the model does not have, and list them"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint folder at --output")
    parser.add_argument("--to_pytorch", type=local_path, help="write --input to this .pth or .safetensors")
    parser.add_argument("--to_diffusers", type=local_path, help="write --input to this folder for diffusers")
    parser.add_argument("--no_verify", action="store_true", help="do not compare the input with its checksums")
    args = parser.parse_args(argv)
    if sum(target is not None for target in (args.output, args.to_pytorch, args.to_diffusers)) != 1:
        parser.error("give one of --output, --to_pytorch and --to_diffusers")
    if args.output is None and (len(args.input) > 1 or args.convnext or args.vae or args.lora):
        parser.error("--to_pytorch and --to_diffusers take one --input, a checkpoint folder, and no other weights")
    return args


def to_folder(args: argparse.Namespace, model: ModelConfig, sampling: SamplingConfig) -> None:
    """PyTorch files to a checkpoint folder. The output and the tokenizer are checked before any weight is read."""
    for path in filter(is_bucket, args.input):
        raise InputError(f"--input: {path}: expected a file on this machine")
    folder.check_output(args.output, args.overwrite)
    loras = [Lora.parse(lora) for lora in args.lora]
    if "v" in map(prediction_of, args.input):
        model = dataclasses.replace(model, schedule=dataclasses.replace(model.schedule, prediction="v"))
    text = model.text_encoder
    name = text.tokenizer
    if name == TextEncoderConfig.tokenizer:
        name = _tokenizer_of(args.input, name)
    tokenizer = find_tokenizer(name, text.vocab_size)
    start = time.time()
    params, absent = pytorch.load_pytorch(
        args.input, model, args.convnext, not args.no_verify, args.vae, args.ignore_extra
    )
    params = merge_loras(params, loras, model)
    print(f"writing {args.output} …", flush=True)
    folder.save_folder(args.output, params, model, sampling, tokenizer, absent, args.overwrite)
    note = f"; without {', '.join(absent)}: it can be trained, not sampled" if absent else ""
    print(f"wrote {args.output} in {time.time() - start:.0f} s{note}")


def _tokenizer_of(inputs: Sequence[Path], default: str) -> str:
    """The tokenizer's folder of the first input that has one."""
    found = [tokenizer_of(path) for path in inputs]
    return str(next((folder for folder in found if folder is not None), default))


def to_pytorch(source: Path, target: Path, verify: bool = True) -> None:
    """A checkpoint folder to a file in the released layout."""
    pytorch.check_export_path(target)
    model, _, absent = folder.read_config(source)
    if absent:
        raise InputError(f"{source}: lacks {', '.join(absent)}; the released layout needs every part")
    start = time.time()
    params = folder.restore_params(source, dtype=None, as_numpy=True, verify=verify)
    print(f"writing {target} …", flush=True)
    pytorch.save_pytorch(target, params, model)
    print(f"wrote {target} in {time.time() - start:.0f} s")


def to_diffusers(source: Path, target: Path, verify: bool = True) -> None:
    """A checkpoint folder to a folder that diffusers loads."""
    model, _, _ = folder.read_config(source)
    check_diffusers_output(target, model)
    start = time.time()
    params = folder.restore_params(source, dtype=None, as_numpy=True, verify=verify)
    print(f"writing {target} …", flush=True)
    save_diffusers(target, params, model, Path(model.text_encoder.tokenizer))
    print(f"wrote {target} in {time.time() - start:.0f} s")


def main(argv: Sequence[str] | None = None) -> None:
    with exit_on_input_error():
        config, rest = read_config(sys.argv[1:] if argv is None else argv, CheckpointSettings)
        args = parse_args(rest)
        try:
            if args.to_pytorch is not None:
                to_pytorch(args.input[0], args.to_pytorch, not args.no_verify)
            elif args.to_diffusers is not None:
                to_diffusers(args.input[0], args.to_diffusers, not args.no_verify)
            else:
                values = config.to_dict()
                settings = CheckpointSettings.from_dict({name: values[name] for name in ("model", "sampling")})
                to_folder(args, settings.model, settings.sampling)
        except OSError as error:  # a full disk, a folder without permission
            raise InputError(
                f"{args.to_pytorch or args.to_diffusers or args.output}: cannot be written ({error})"
            ) from error
