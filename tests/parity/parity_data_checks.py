"""The numbers of tests/parity that no network makes: schedules, masks, training examples; and the training steps."""

import jax
import jax.numpy as jnp
import numpy as np
from official_data import official_batch, official_record, official_settings, unpack
from parity_checks import add

import common
from common import parity, relative_error, worst
from instdiff_jax.checkpoint.rename import from_state_dict
from instdiff_jax.checkpoint.tables import rename_table
from instdiff_jax.config import ScheduleConfig
from instdiff_jax.data.examples import DataConfig, locate, select_instances
from instdiff_jax.data.images import Crop
from instdiff_jax.diffusion import schedule as schedules
from instdiff_jax.geometry.points import mask_points
from instdiff_jax.grounding import null_grounding
from instdiff_jax.images import open_image
from instdiff_jax.models.regions import region_bits
from instdiff_jax.training.state import init_state, split_params
from instdiff_jax.training.step import compile_step, make_train_step
from instdiff_jax.tree import flatten

SCHEDULE = ScheduleConfig(linear_start=0.00085, linear_end=0.012, timesteps=1000)
EXACT = 0.0


def _schedule(entry: str) -> float:
    data = parity("schedule")
    if entry == "q_out":
        x0, noise, t = (jnp.asarray(data[name]) for name in ("q_x", "q_noise", "q_t"))
        ours = schedules.q_sample(x0, noise, t, SCHEDULE)
    elif entry.startswith("ddim_timesteps"):
        ours = schedules.uniform_timesteps(int(entry.rsplit("_", 1)[1]), 1000)[::-1]
    elif entry.startswith("alpha_"):
        ours = schedules.alpha_schedule(50, data[f"{entry}_type"].astype(float).tolist())
    else:
        ours = getattr(schedules, entry)(SCHEDULE).astype(np.float32)
    return relative_error(ours, data[entry])


def _mask_points(index: int) -> float:
    data = parity("mask_points")
    return relative_error(mask_points(data[f"mask{index}"]).ravel(), data[f"points256_{index}"])


def _regions() -> float:
    data = parity("attention_masks")
    grounding = null_grounding(64, 8)
    for slot, box in enumerate(data["boxes"]):
        grounding["boxes"][slot] = box
        grounding["valid"][slot] = grounding["has_box"][slot] = 1
    visual, _ = region_bits(grounding, 64, 64, "official")
    slots = np.arange(len(data["boxes"]), dtype=np.uint32)[:, None]
    return relative_error(((visual >> slots) & 1).reshape(-1, 64, 64), data["att_masks"])


def _training_example(case: int, flip: int) -> float:
    """The worst of image, boxes, points, mask points and maps."""
    data, record = parity("training_examples"), official_record(case)
    expected = {key.split("_", 1)[1]: value for key, value in data.items() if key.startswith(f"c{case}f{flip}_")}
    crop = Crop(record.width, record.height, 512, bool(flip))
    chosen = select_instances(record, crop, DataConfig(keep_caption=1.0, instance_caption=0.0))
    arrays = locate(chosen, record, crop, 512, np.random.default_rng(0))
    image = (crop.image(open_image(record.image)).astype(np.float32) / 127.5 - 1)[::4, ::4].transpose(2, 0, 1)
    segments = np.unpackbits(expected["segs_packed"]).reshape(30, 512, 512)
    pairs = [
        (image, expected["image"]),
        (arrays["boxes"], expected["boxes"]),
        (arrays["points"], expected["points"]),
        (arrays["mask_points"], expected["polygons"]),
        (unpack(arrays["maps"]), segments),
    ]
    return worst(relative_error(ours, theirs) for ours, theirs in pairs)


def _training_errors() -> dict[str, float]:
    """Four training steps of the small model; errors of losses, and the worst parameter's of norms."""
    import torch
    from training_common import make_run, small_model

    data, model = parity("train_small"), small_model()
    settings = official_settings(data)
    params = {}
    for part, spec in (("model", "unet"), ("autoencoder", "autoencoder"), ("text_encoder", "text_encoder")):
        params |= from_state_dict(part, common.state_dict(f"{spec}_small", int(data["seed"])), model)
    run = make_run(model, settings)
    trainable, frozen = split_params(params, settings)
    start = flatten(trainable)
    state, frozen = init_state(jax.tree.map(jnp.asarray, trainable)), jax.tree.map(jnp.asarray, frozen)
    step = compile_step(make_train_step(model, settings, run.plan), run.plan)
    batch = jax.tree.map(jnp.asarray, official_batch(data))
    losses, grads = [], {}
    for i in range(4):
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
        if i == 0:
            # After one step Adam's first moment is a tenth of the gradient.
            grads = {path: 10 * np.asarray(leaf) for path, leaf in flatten(state.optimizer.mu).items()}
    after, ema = flatten(state.params), flatten(state.optimizer.ema)
    errors = dict(losses=float(np.abs(losses / data["losses"] - 1).max()))
    table = rename_table("model", model)
    for entry in ("grad_norms", "param_delta_norms", "ema_delta_norms"):
        errors[entry] = 0.0
        for key, theirs in zip(data["grad_keys"], data[entry], strict=True):
            path = table[key].path
            rounding = np.sqrt(start[path].size) * 1.2e-7
            if entry == "grad_norms":
                # The stored norms are PyTorch's own, whose float32 sum over millions of numbers is 2e-4 too small.
                ours, slack = float(torch.tensor(np.array(table[key].to_torch(grads[path]))).norm()), 0.0
            elif entry == "param_delta_norms":
                ours, slack = np.linalg.norm(np.float64(after[path]) - start[path]), rounding
            else:
                ours, slack = np.linalg.norm(np.float64(ema[path]) - start[path]), 4 * rounding
            # The map's null vector has no gradient here: both are exactly 0.
            # np.maximum, unlike max, keeps a NaN.
            difference = np.maximum(abs(ours - theirs) - slack, 0.0)
            errors[entry] = worst((errors[entry], difference / theirs if difference else 0.0))
    return errors


_TRAINING: dict[str, float] = {}


def _training(entry: str) -> float:
    if not _TRAINING:
        _TRAINING.update(_training_errors())
    return _TRAINING[entry]


for entry in ("betas", "alphas_cumprod", "q_out"):
    add("schedule", entry, "noise schedule", 1e-7, _schedule, entry)
for steps in (50, 20, 30):
    add("schedule", f"ddim_timesteps_{steps}", "timestep grid", EXACT, _schedule, f"ddim_timesteps_{steps}")
for case in range(4):
    add("schedule", f"alpha_{case}", "α schedule", 1e-12, _schedule, f"alpha_{case}")
for case in range(9):
    add("mask_points", f"points256_{case}", "256 points of a mask", EXACT, _mask_points, case)
add("attention_masks", "att_masks", "regions, official orientation", EXACT, _regions)
for case in range(3):
    for flip in range(2):
        how = "training transform: image, boxes, points, mask points, maps"
        add("training_examples", f"c{case}f{flip}", how, EXACT, _training_example, case, flip)
HOW = {
    "losses": "train step, four losses",
    "grad_norms": "gradient norm of each trainable parameter, summed by PyTorch in float32 as the stored ones",
    "param_delta_norms": "how far each parameter moved, float32 rounding of parameters aside",
    "ema_delta_norms": "how far each average moved, float32 rounding of parameters aside",
}
for entry, how in HOW.items():
    add("train_small", entry, how, 1e-4, _training, entry, cost="slow")
