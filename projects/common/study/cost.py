"""What sampling costs, by part and by option: time, UNet evaluations, FLOPs and memory.

The measured programs are those of the pipeline, for one full batch of images with four instances each.
"""

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from instdiff_jax import grounding as groundings
from instdiff_jax.analysis.flops import count_flops
from instdiff_jax.config import ModelConfig
from instdiff_jax.diffusion.loop import FUSER_GROUP, Evaluations, denoise, start_state
from instdiff_jax.diffusion.plan import Piece, make_plan
from instdiff_jax.diffusion.rows import ImageRows, pack_rows
from instdiff_jax.diffusion.solvers import solver_table
from instdiff_jax.evaluation.files import image_path, read_image
from instdiff_jax.evaluation.generate import image_seed
from instdiff_jax.evaluation.layouts import make_layout
from instdiff_jax.files import write_json
from instdiff_jax.layout import Layout
from instdiff_jax.models.unet import UNet
from instdiff_jax.models.unifusion import NUM_TOKENS
from instdiff_jax.sampling import programs
from instdiff_jax.sampling.pipeline import Pipeline
from instdiff_jax.sampling.request import Request, SamplingOptions, make_request, sampler_settings
from projects.common.study.rows import Row, Task
from projects.common.study.runs import Study, machine
from projects.common.study.sections import FIFTY, MIS

Numbers = Mapping[tuple[str, int, int], Any]
INSTANCES = 4
_SCENES = f"count_{INSTANCES}"


def option_costs(study: Study, task: Task, numbers: Numbers) -> dict[str, float]:
    """UNet evaluations per image, the speedup relative to 50 steps, and (if those images exist) the distance to the
    images with 50 steps.
    """
    found = {"UNets": _evaluations(study, task.row)}
    found["speedup"] = _evaluations(study, FIFTY) / found["UNets"]
    fifty = Task(FIFTY, task.seed, task.count)
    if (FIFTY.slug(study.sampling), *fifty[1:]) in numbers:
        scenes = study.split(task.row.scenes, task.count).scenes
        paths = [[image_path(study.folder(one), scene) for scene in scenes] for one in (task, fifty)]
        # Numbers may exist without their images.
        if all(path.exists() for column in paths for path in column):
            ours, theirs = (np.stack([read_image(path, study.settings.size) for path in column]) for column in paths)
            found["distance"] = float(np.abs(ours.astype(float) - theirs).mean())
    return found


def _evaluations(study: Study, row: Row) -> float:
    settings = row.settings(study.sampling)
    table = solver_table(settings.sampler, settings.steps, study.config.schedule, settings.alpha)
    plan, images = make_plan(table, sampler_settings(settings, table)), [ImageRows(0, 0, (0,) * INSTANCES)]
    every, fresh = plan.evaluations(images), plan.fresh_evaluations(images)
    return fresh + (every - fresh) * finish_share(study.config, study.settings.size)


@functools.cache
def finish_share(config: ModelConfig, size: int) -> float:
    """FLOPs of an evaluation that reuses deep features, as a fraction of a full evaluation's."""
    unet, width, side = UNet(config.unet), config.unet.context_dim, size // config.latent_stride
    shapes = [(side, side, config.unet.in_channels), (), (config.text_encoder.max_length, width), (NUM_TOKENS, width)]
    inputs = [jax.ShapeDtypeStruct((1, *shape), jnp.float32) for shape in shapes]

    def make(network: UNet, latents, timesteps, context, tokens):
        conditions = network.condition(context, tokens)
        return network(latents, timesteps, conditions), conditions

    (_, conditions), params = jax.eval_shape(
        functools.partial(unet.init_with_output, method=make), jax.random.key(0), *inputs
    )
    given = params, *inputs[:2], conditions, 1.0
    deep = jax.eval_shape(functools.partial(unet.apply, method="deep_features"), *given)
    return count_flops(functools.partial(unet.apply, method="finish"), *given, deep) / count_flops(unet.apply, *given)


def cost_file(study: Study) -> tuple[Path, dict[str, Any]]:
    """The file of the numbers, and all that they depend on."""
    key = {"checkpoint": study.fingerprint, "sampling": study.sampling.to_dict(), "size": study.settings.size}
    # Seconds depend on the machine: a study that continues elsewhere measures again.
    key |= {"dtype": study.settings.dtype, "device": machine()["device"], "devices": jax.device_count()}
    key |= {"max_rows": study.settings.max_rows, "version": 2}
    return study.settings.workdir / "numbers" / "cost.json", json.loads(json.dumps(key))


def known_cost(study: Study) -> dict[str, Any] | None:
    """The numbers of an earlier run; None if there are none."""
    path, key = cost_file(study)
    try:
        cost = json.loads(path.read_text())
        return cost if cost["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def measure_cost(study: Study) -> dict[str, Any]:
    """Measures every part: compiles it, runs it once to warm up, and times a second run.

    Returns:
        `pictures` (images in the batch), `instances`, and `parts`: a list of {part; seconds, evaluations and gflop per
        image; temporary_mb of the batch's program}. The last two parts are whole calls, with MIS and without.
    """
    pipeline = study.pipeline()
    canvas = (study.settings.size, study.settings.size)
    count = max(pipeline.limits.row_limit(canvas) // (INSTANCES + 1), 1)
    scenes = study.split(_SCENES, count).scenes
    layouts = [make_layout(scene, "box") for scene in scenes]
    seeds = [image_seed(0, scene.image_id) for scene in scenes]
    # MIS is measured even if the checkpoint has it off.
    sampling = Row("", sampling=MIS).settings(study.sampling)
    settings = sampling.to_dict()
    options = SamplingOptions(layout_seeds=seeds, width=canvas[0], height=canvas[1])
    parts = _parts(pipeline, make_request(pipeline.config, sampling, options), layouts)
    for name, mis in (("whole call", sampling.mis), ("whole call, MIS off", 0.0)):

        def call(mis: float = mis) -> None:
            pipeline(layouts, layout_seeds=seeds, **settings | {"mis": mis})

        parts.append(dict(part=name, seconds=_seconds(call) / count))
    path, key = cost_file(study)
    cost = {"key": key, "pictures": count, "instances": INSTANCES, "parts": parts}
    write_json(path, cost, indent=None)
    return cost


def _parts(pipeline: Pipeline, request: Request, layouts: list[Layout]) -> list[dict[str, Any]]:
    count, numbered, canvas = len(layouts), dict(enumerate(layouts)), (request.options.width, request.options.height)
    shape = request.latent_shape(canvas)
    with jax.default_matmul_precision(pipeline.matmul_precision):
        conditions, images = pipeline.make_conditions(request, numbered, shape[:2])
        parts = [_text_and_tokens(pipeline, request, numbered, shape[:2])]
        for piece in request.plan.pieces:
            parts.append(_piece(pipeline, request, piece, conditions, list(images.values())))
        latents = jnp.zeros((count, *shape))
        one = latents[: pipeline.limits.decode_limit(canvas)]
        autoencoder, params = pipeline.networks.autoencoder, pipeline.params["autoencoder"]
        lowered = programs.decode_chunk.lower(autoencoder, None, params, one)
        parts.append(
            dict(
                part="decoding",
                seconds=_seconds(lambda: pipeline.decode(latents)) / count,
                gflop=count_flops(pipeline.decode_parts, latents) / count / 1e9,
                temporary_mb=lowered.compile().memory_analysis().temp_size_in_bytes / 1e6,
            )
        )
    return parts


def _text_and_tokens(
    pipeline: Pipeline, request: Request, layouts: dict[int, Layout], grid: tuple[int, int]
) -> dict[str, Any]:
    """Text encoder, UniFusion, and their keys and values in every block; the padding of a chunk is counted."""

    def make() -> Any:
        return pipeline.make_conditions(request, layouts, grid)[0]

    chunk, length, width = programs.CHUNK, pipeline.config.text_encoder.max_length, pipeline.config.unet.context_dim
    texts = jnp.zeros((chunk, length), jnp.int32)
    batch = groundings.stack([groundings.make_grounding(layouts[0], pipeline.config, "auto")] * chunk)
    del batch["maps"], batch["phrase_embeddings"]
    slots = groundings.MAX_INSTANCES
    arrays = jnp.zeros((chunk, slots), jnp.int32), jnp.zeros((chunk, slots, width)), jnp.zeros((chunk, length, width))
    params, networks = pipeline.params, pipeline.networks
    lowered = (
        programs.encode_text_chunk.lower(networks.text_encoder, None, params["text_encoder"], texts),
        programs.make_conditions_chunk.lower(
            networks, None, False, (params["unifusion"], params["unet"]), batch, *arrays
        ),
    )
    memory = max(program.compile().memory_analysis().temp_size_in_bytes for program in lowered)
    return dict(
        part="text, UniFusion, keys and values",
        seconds=_seconds(lambda: jax.block_until_ready(make())) / len(layouts),
        gflop=count_flops(make) / len(layouts) / 1e9,
        temporary_mb=memory / 1e6,
    )


def _piece(
    pipeline: Pipeline, request: Request, piece: Piece, conditions: dict[str, Any], images: list[ImageRows]
) -> dict[str, Any]:
    """One piece of the sampler's loop."""
    plan, canvas = request.plan, (request.options.width, request.options.height)
    rows = pack_rows(images, piece.rows, max_rows=pipeline.limits.row_limit(canvas, request.masked))
    entries = rows.conditions[: rows.chunk, : 1 + piece.guided]
    used = {name: tree for name, tree in conditions.items() if piece.use_fusers or name != FUSER_GROUP}
    given = jax.tree.map(lambda leaf: leaf[entries], used)
    noise = np.random.default_rng(0).standard_normal((rows.chunk, *request.latent_shape(canvas)))
    coefficients, scale = jax.device_put((plan.table.coefficients, np.float32(plan.settings.guidance_scale)))
    predict, params = pipeline.predict_noise, pipeline.params["unet"]
    args = given, Evaluations(coefficients, jnp.int32(piece.start), jnp.int32(piece.stop), scale)
    compiled = denoise.lower(predict, params, start_state(noise), *args, use_fusers=piece.use_fusers).compile()

    def call() -> None:
        jax.block_until_ready(compiled(params, start_state(noise), *args))

    chunks = len(rows.image) // rows.chunk
    run = functools.partial(denoise, predict, use_fusers=piece.use_fusers)
    # Counted for one step of the loop, with the padding of a chunk.
    flops = count_flops(run, params, start_state(noise), *args) * (piece.stop - piece.start) * chunks
    kinds = {"all": "MIS: all rows", "global": "MIS: global row", "instances": "MIS: instances", "image": "global row"}
    unguided = ", no guidance" if plan.settings.guidance_scale != 1 and not piece.guided else ""
    return dict(
        part=f"{kinds[piece.rows]}, fusers {'on' if piece.use_fusers else 'off'}{unguided}",
        seconds=_seconds(call) * chunks / len(images),
        evaluations=dataclasses.replace(plan, pieces=(piece,)).evaluations(images) / len(images),
        gflop=flops / len(images) / 1e9,
        temporary_mb=compiled.memory_analysis().temp_size_in_bytes / 1e6,
    )


def _seconds(call: Callable[[], Any]) -> float:
    """Seconds of a call, after one to warm up."""
    call()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
