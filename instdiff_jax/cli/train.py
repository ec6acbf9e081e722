"""Trains InstanceDiffusion, or the networks beneath it.

    python train.py --config=configs/coco.py --workdir=DIR [--config.train.batch_size=64 …]

Run it again with the same arguments to go on after the newest checkpoint of DIR; SIGTERM saves and ends. DIR gets
checkpoints/, metrics.jsonl, tensorboard/, samples/ and config.json. `python -m instdiff_jax export` makes a
checkpoint folder of it. On several hosts start the same command on each; see docs/training.md.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Float, Int
from PIL import Image

from instdiff_jax.analysis.flops import count_flops
from instdiff_jax.checkpoint.folder import read_config as read_folder
from instdiff_jax.checkpoint.tokenizer_files import find_tokenizer
from instdiff_jax.cli.config_flags import read_settings
from instdiff_jax.data.dataset import InstanceDataset
from instdiff_jax.data.examples import DataConfig
from instdiff_jax.data.latents import LatentCache, cache_latents
from instdiff_jax.data.loader import DevicePrefetch, make_loader
from instdiff_jax.data.phrases import PhraseTable, phrase_table
from instdiff_jax.errors import ArgumentParser, InputError, exit_on_input_error
from instdiff_jax.layout import Layout
from instdiff_jax.models.tokenizer import Tokenizer
from instdiff_jax.parallel.mesh import (
    REPLICATED,
    ParallelSettings,
    check_batch,
    initialize_distributed,
    make_mesh,
    process_rows,
    put_batch,
)
from instdiff_jax.parallel.runtime import enable_compilation_cache
from instdiff_jax.sampling.pipeline import Pipeline
from instdiff_jax.sampling.visualize import contact_sheet, draw_layout, enlarge
from instdiff_jax.training.checkpoints import Checkpoints, StopSignal
from instdiff_jax.training.metrics import Clock, MetricsWriter, ProfilerWindow, make_workdir
from instdiff_jax.training.settings import RunSettings
from instdiff_jax.training.start import base_fingerprint, run_facts, start_params
from instdiff_jax.training.state import Params, RunLayout, init_state, make_layout, make_networks, merge_params
from instdiff_jax.training.step import batch_keys, compile_step, make_train_step, make_validation_step

# ---------------------------------------------------------------- settings


def parse_args(argv: Sequence[str]) -> tuple[argparse.Namespace, RunSettings]:
    run, rest = (RunSettings(), argv) if {"-h", "--help"} & set(argv) else read_settings(argv, RunSettings)
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", help="a config file; --config.KEY=VALUE changes a setting of it")
    parser.add_argument("--workdir", required=True, help="the run's folder")
    return parser.parse_args(rest), run


# ---------------------------------------------------------------- input


def open_tokenizer(run: RunSettings) -> Tokenizer:
    """The tokenizer of the checkpoint that the run starts from, else the config's."""
    text = run.model.text_encoder
    name = read_folder(run.train.start)[0].text_encoder.tokenizer if run.train.start else text.tokenizer
    return Tokenizer(find_tokenizer(name, text.vocab_size), text.vocab_size, text.max_length)


class NoPhrases:
    """Stands for the phrase table where nothing reads phrases."""

    def __init__(self, width: int):
        self._width = width

    def lookup(self, numbers: Int[np.ndarray, "*n"]) -> Float[np.ndarray, "*n width"]:
        return np.zeros((*numbers.shape, self._width), np.float32)


def on_one_device(tree: Params, layout: RunLayout) -> Params:
    """A whole copy on this process's first device. Every process of the job must ask for it together."""
    whole = jax.jit(lambda tree: tree, out_shardings=jax.NamedSharding(layout.mesh, REPLICATED))(tree)
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), whole)


def first_process_first(make: Callable[[], Any]) -> Any:
    """Runs it on process 0, then on the others, which find what the first has made."""
    if jax.process_index() == 0:
        result = make()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("made by the first process")
    return result if jax.process_index() == 0 else make()


def open_phrases(run: RunSettings, layout: RunLayout, params: Params, tokenizer: Tokenizer) -> PhraseTable | NoPhrases:
    """The phrases' embeddings, made first where this text encoder has not met the dataset yet."""
    if run.train.task != "diffusion" or not run.train.grounding:
        return NoPhrases(run.model.unet.context_dim)
    encoder = make_networks(run.model, run.train).text_encoder.clone(dtype=jnp.float32)
    local = on_one_device(params["text_encoder"], layout)
    encode = jax.jit(lambda params, ids: encoder.apply({"params": params}, ids)[1])

    def embed(phrases: list[str]) -> Float[np.ndarray, "n width"]:
        return np.asarray(encode(local, tokenizer.encode_phrases(phrases)))

    # Frozen parameters have been rounded to the run's dtype.
    fingerprint = base_fingerprint(run.train, run.model, "text_encoder") + _dtype_suffix(run)
    return first_process_first(
        lambda: phrase_table(run.data.dir, fingerprint, embed, use_imported=run.data.imported_phrases)
    )


def _dtype_suffix(run: RunSettings) -> str:
    return "" if run.train.dtype == "float32" else f"-{run.train.dtype}"


def open_latents(run: RunSettings, layout: RunLayout, params: Params, dataset: InstanceDataset) -> LatentCache | None:
    """Every image's encoding, made first where it is not there; None where the config does not ask for it."""
    if not run.data.cache_latents:
        return None
    if run.train.task != "diffusion":
        raise InputError(f"config.data.cache_latents: the {run.train.task} task has no use for latents; expected False")
    autoencoder = make_networks(run.model, run.train).autoencoder
    local = on_one_device(params["autoencoder"], layout)

    @jax.jit
    def encode(params, images):
        pixels = images.astype(jnp.float32) / 127.5 - 1
        return tuple(x.astype(jnp.float32) for x in autoencoder.apply({"params": params}, pixels, method="encode"))

    fingerprint = base_fingerprint(run.train, run.model, "autoencoder")
    size = run.data.examples.image_size
    flips = run.data.examples.flip > 0
    name = f"{dataset.split}-{size}-{fingerprint[:16]}{_dtype_suffix(run)}" + "-unflipped" * (not flips)
    path = Path(run.data.dir) / "latents" / name
    cache = first_process_first(
        lambda: cache_latents(lambda images: encode(local, images), dataset, path, fingerprint, size, flips=flips)
    )
    scale = run.model.autoencoder.scale_factor
    if jax.process_index() == 0:
        # Diffusion's noise has 1: latents far from it are drowned by it, or never noised away.
        print(f"latents: standard deviation {scale * cache.deviation():.3f}; expected about 1", file=sys.stderr)
    return cache


def check_data(run: RunSettings) -> None:
    """Raises InputError where the examples do not fit the networks, or these one another."""
    examples, stride, model = run.data.examples, run.model.canvas_stride, run.model
    fits = {
        "unet.in_channels": (model.unet.in_channels, "autoencoder.z_channels", model.autoencoder.z_channels),
        "unet.out_channels": (model.unet.out_channels, "unet.in_channels", model.unet.in_channels),
        "unet.context_dim": (model.unet.context_dim, "text_encoder.hidden_size", model.text_encoder.hidden_size),
    }
    for name, (value, other, expected) in fits.items():
        if value != expected and run.train.task == "diffusion":
            raise InputError(f"config.model.{name}: expected {other}, which is {expected}, got {value}")
    if examples.image_size % stride:
        raise InputError(f"config.data.examples.image_size: expected a multiple of {stride}, got {examples.image_size}")
    if examples.map_size != run.model.unifusion.map_size:
        expected = run.model.unifusion.map_size
        raise InputError(f"config.data.examples.map_size: expected the model's {expected}, got {examples.map_size}")


def check_held_out(run: RunSettings) -> None:
    """Raises InputError where what is looked at between steps is missing: now, not after encoding a whole dataset."""
    if run.train.validate_every and run.data.validation_split:
        InstanceDataset(run.data.dir, run.data.validation_split)
    if run.train.sample_every:
        read_sample_layouts(run)


# ---------------------------------------------------------------- what happens between steps


def read_sample_layouts(run: RunSettings) -> list[Layout]:
    """The layouts of sample grids; InputError where there are none, or the run cannot draw them."""
    if run.train.task != "diffusion" or not run.train.grounding:
        raise InputError("config.train.sample_every: only runs with grounding draw samples; expected 0")
    folder = Path(run.train.sample_layouts)
    files = sorted(folder.glob("*.json"))[: run.train.sample_count]
    if not files:
        raise InputError(f"config.train.sample_layouts: {folder}: expected a folder of layouts")
    return [Layout.from_json(file) for file in files]


def make_sampler(run: RunSettings, layout: RunLayout, workdir: Path, tokenizer: Tokenizer) -> Callable | None:
    """(step, averaged parameters, frozen ones) → a grid of layouts and pictures, drawn by the first process."""
    if not run.train.sample_every:
        return None
    layouts = read_sample_layouts(run)
    canvas = dict(width=run.data.examples.image_size, height=run.data.examples.image_size)

    def sample(step: int, average: Params, frozen: Params) -> np.ndarray | None:
        params = on_one_device(merge_params(average, frozen), layout)
        if jax.process_index() != 0:
            return None
        pipeline = Pipeline(run.model, run.sampling, params, tokenizer, run.train.dtype)
        results = pipeline(layouts, seeds=[0], **canvas)
        pictures = [(result.layout, enlarge(result.image)) for result in results]
        sheet = contact_sheet([image for pair in pictures for image in (draw_layout(*pair), pair[1])])
        (workdir / "samples").mkdir(exist_ok=True)
        Image.fromarray(sheet).save(workdir / "samples" / f"{step:08d}.png")
        return sheet

    return sample


def make_validation(run: RunSettings, layout: RunLayout, loader: Callable[..., Iterator], put: Callable) -> Any:
    """(trainable, frozen) → mean loss over the validation split's first batches, with the same draws every time."""
    if not run.train.validate_every or not run.data.validation_split:
        return None
    step = jax.jit(make_validation_step(run.model, run.train, layout))
    dataset = InstanceDataset(run.data.dir, run.data.validation_split)
    batches = loader(dataset, run.data.examples.without_chance(), shuffle=False)
    held = [next(batches) for _ in range(run.train.validation_batches)]
    copied = jax.NamedSharding(layout.mesh, REPLICATED)

    def validate(trainable: Params, frozen: Params) -> float:
        losses = [
            step(trainable, frozen, put(batch), jax.device_put(np.int32(i), copied)) for i, batch in enumerate(held)
        ]
        return float(np.mean(jax.device_get(losses)))

    return validate


def local_flops(run: RunSettings, batch: Mapping[str, Any], mesh: Mesh) -> int:
    """Model FLOPs of one device's share of a step, nothing computed twice: counted from the jaxpr, run nowhere."""
    alone = ParallelSettings(data=1, fsdp=1)
    settings = dataclasses.replace(run.train, remat="none", accumulate=1)
    layout = make_layout(run.model, settings, alone, make_mesh(alone, jax.local_devices()[:1]))
    rows = run.train.batch_size // mesh.size
    share = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype), batch)
    step = make_train_step(run.model, settings, layout)
    return count_flops(step, layout.state_shapes(), layout.frozen_shapes(), share)


def due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps happens after this one."""
    return every > 0 and step % every == 0


# ---------------------------------------------------------------- the run


def train(run: RunSettings, workdir: Path) -> str:
    """Trains until the last step or a signal; returns what to tell the user."""
    # ---- devices
    initialize_distributed()
    enable_compilation_cache()
    if run.train.dtype == "float32":
        jax.config.update("jax_default_matmul_precision", "highest")
    mesh = make_mesh(run.parallel)
    check_batch(run.train.batch_size, run.train.accumulate, mesh)
    layout = make_layout(run.model, run.train, run.parallel, mesh)
    first = jax.process_index() == 0

    # ---- parameters and state
    dataset = InstanceDataset(run.data.dir, run.data.train_split)
    check_held_out(run)
    tokenizer = open_tokenizer(run)
    facts = run_facts(run.train, run.model, dataset.fingerprint)
    checkpoints = Checkpoints(workdir, facts, run.train.keep_newest, run.train.keep_every)
    state = checkpoints.restore(layout.state_shapes())
    trainable, frozen = start_params(layout, run.model, run.train, only_frozen=state is not None)
    if state is None:
        state = jax.jit(init_state, out_shardings=layout.state_shardings())(trainable)
    del trainable
    start = int(state.step)
    if first:
        groups = run.to_dict()
        if run.train.start:
            # Export and sampling may run from another folder.
            groups["train"]["start"] = str(Path(run.train.start).absolute())
        partial = workdir / "config.json.partial"
        partial.write_text(json.dumps(groups, indent=1) + "\n", encoding="utf-8")
        partial.replace(workdir / "config.json")
        print(f"{workdir}: from step {start} to {run.train.steps} on {mesh.size} devices", file=sys.stderr)

    # ---- input
    phrases = open_phrases(run, layout, frozen, tokenizer)
    latents = open_latents(run, layout, frozen, dataset)
    keys, rows = batch_keys(run.train), process_rows(run.train.batch_size, mesh)

    def put(batch: Mapping[str, Any]) -> dict[str, Any]:
        return put_batch({key: value for key, value in batch.items() if key in keys}, mesh)

    masked = None
    if run.train.masked_attention != "none":
        masked = run.train.masked_attention, run.data.examples.image_size // run.model.latent_stride

    def loader(dataset: InstanceDataset, examples: DataConfig, **options: Any) -> Iterator[dict[str, Any]]:
        return make_loader(
            dataset,
            examples,
            tokenize=tokenizer.encode_prompts,
            phrases=phrases,
            batch_size=run.train.batch_size,
            rows=rows,
            masked=masked,
            seed=run.train.seed,
            **options,
        )

    # ---- step, and what happens between steps
    step = compile_step(make_train_step(run.model, run.train, layout), layout)
    validate = make_validation(run, layout, loader, put)
    sample = make_sampler(run, layout, workdir, tokenizer)
    writer = MetricsWriter(workdir, start, run.train.steps, first)
    profiler = ProfilerWindow(workdir, run.train.profile_start, run.train.profile_steps)
    stop, clock, previous = StopSignal(), None, None
    # Last: from here on there are processes to end.
    options = dict(start_step=start, latents=latents, workers=run.data.workers, prefetch=run.data.prefetch)
    batches = DevicePrefetch(loader(dataset, run.data.examples, **options), put, run.data.prefetch)

    def report(number: int, metrics: Mapping[str, jax.Array]) -> bool:
        """Takes in the numbers of a step that is done; False where too many updates in a row were skipped."""
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if due(number, run.train.log_every) or number == run.train.steps or values["skipped_in_row"]:
            values |= clock.report(number, batches.wait_seconds)
            writer.write(number, values)
            writer.progress(number, values)
        return values["skipped_in_row"] < run.train.max_skips

    # ---- loop
    done, sound, stopped = start, True, False
    try:
        with jax.transfer_guard("disallow"):
            while done < run.train.steps and sound and not stopped:
                batch = next(batches)
                if clock is None:
                    count = functools.partial(local_flops, run, batch, mesh)
                    clock = Clock(run.train.batch_size, count, jax.devices()[0])
                    clock.start(done, batches.wait_seconds)
                profiler.before(done)
                state, metrics = step(state, frozen, batch)
                profiler.after(done, metrics)
                # The numbers of the step before are read while this one runs.
                sound = previous is None or report(done, previous)
                done, previous = done + 1, metrics
                if done == start + 1:
                    # Compiling is no part of the speed.
                    jax.block_until_ready(metrics)
                    clock.start(done, batches.wait_seconds)
                with jax.transfer_guard("allow"):
                    if validate is not None and due(done, run.train.validate_every):
                        writer.write(done, {"validation_loss": validate(state.params, frozen)})
                    if sample is not None and due(done, run.train.sample_every):
                        sheet = sample(done, state.optimizer.ema, frozen)
                        if sheet is not None:
                            writer.image(done, "samples", sheet)
                    stopped = stop.reached(done)
                    if due(done, run.train.save_every) or stopped or not sound or done == run.train.steps:
                        # Saving waits for the step anyway, and what is saved has its numbers written.
                        sound, previous = report(done, previous) and sound, None
                        checkpoints.save(done, state)
            sound = sound and (previous is None or report(done, previous))
    finally:
        profiler.close()
        checkpoints.close()
        writer.close()
        batches.close()  # workers finish what they are at
        stop.close()
    if not sound:
        raise InputError(
            f"{workdir}: stopped after step {done}: loss or gradient not finite {run.train.max_skips} times in a row; "
            "the state is saved; look at the learning rate, the data and config.train.dtype"
        )
    if stopped:
        return f"{workdir}: stopped by a signal, saved after step {done}; the same command goes on"
    return f"{workdir}: trained to step {done}"


def main(argv: Sequence[str] | None = None) -> None:
    with exit_on_input_error():
        args, run = parse_args(sys.argv[1:] if argv is None else argv)
        check_data(run)
        workdir = make_workdir(args.workdir)
        try:
            print(train(run, workdir), file=sys.stderr)
        finally:
            with contextlib.suppress(OSError):
                workdir.rmdir()  # only where nothing was written to it
