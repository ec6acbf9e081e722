"""The loss, and the training step around it.

A step is one `shard_map`. Every device gathers the parameters and computes the loss and gradient of its own rows.
Gradients are summed and sharded like their parameters. Noise, timesteps and posterior samples are keyed by
(seed, step, row), so they do not depend on the mesh.

Axes: b rows of the global batch, h w latents, z latent channels, n tokens, c context.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from instdiff_jax.config import ModelConfig
from instdiff_jax.diffusion.schedule import prediction_target, q_sample, velocity_weights
from instdiff_jax.models.autoencoder import sample_posterior
from instdiff_jax.models.regions import Regions
from instdiff_jax.parallel.mesh import AXES, BATCH, REPLICATED, gather, sum_gradients
from instdiff_jax.training.optimizer import apply_gradients, global_norm, learning_rate
from instdiff_jax.training.settings import TrainSettings
from instdiff_jax.training.state import Networks, Params, ShardingPlan, TrainState, make_networks, merge_params

# fold_in constants: one per random stream of a row.
_TIMESTEP, _NOISE, _POSTERIOR = range(3)

Loss = Callable[[Params, Mapping[str, Any], jax.Array], Float[Array, ""]]


class Batch(TypedDict, total=False):
    """The input of a step. The first axis of every array is the batch.

    Images are given as `image` (uint8, or float in [−1, 1]), or encoded as `latent_mean` and `latent_logvar`.
    Captions are given as `caption_ids`, or encoded as `context`. `latents`, `noise` and `timesteps` replace what the
    step would draw itself; validation and parity checks give them.
    """

    image: Float[Array, "b H W 3"]
    latent_mean: Float[Array, "b h w z"]
    latent_logvar: Float[Array, "b h w z"]
    latents: Float[Array, "b h w z"]
    caption_ids: Int[Array, "b n"]
    context: Float[Array, "b n c"]
    grounding: dict[str, Array]
    regions: Regions
    noise: Float[Array, "b h w z"]
    timesteps: Int[Array, " b"]


def batch_keys(settings: TrainSettings) -> set[str]:
    """The keys of a loaded batch that the task's loss reads; the others need not go to the devices."""
    if settings.task != "diffusion":
        return {"image"} if settings.task == "autoencoder" else {"caption_ids"}
    keys = {"image", "latent_mean", "latent_logvar", "caption_ids"}
    if settings.grounding:
        keys |= {"grounding"}
    return keys | {"regions"} if settings.masked_attention != "none" else keys


def row_keys(seed: int, step: Int[Array, ""], rows: Int[Array, " b"]) -> jax.Array:
    """A random key for each row of a step."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)


def _normal(keys: jax.Array, stream: int, shape: tuple[int, ...]) -> Float[Array, "b *shape"]:
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, stream), shape))(keys)


def _to_float(image: Array) -> Float[Array, "b H W 3"]:
    return image.astype(jnp.float32) / 127.5 - 1 if image.dtype == jnp.uint8 else image


def _latents(networks: Networks, params: Params, batch: Batch, keys: jax.Array, scale: float) -> Array:
    if "latents" in batch:
        return batch["latents"]
    if "latent_mean" in batch:
        moments = batch["latent_mean"], batch["latent_logvar"]
    else:
        variables, image = {"params": params["autoencoder"]}, _to_float(batch["image"])
        moments = networks.autoencoder.apply(variables, image, method="encode")
    return sample_posterior(*moments, _normal(keys, _POSTERIOR, moments[0].shape[1:]), scale)


def diffusion_loss(networks: Networks, model: ModelConfig, settings: TrainSettings) -> Loss:
    """Mean of (ε − prediction)² over rows and latents, in float32 (paper, "Training"; DDPM, eq. 14).

    A model that predicts v has (v − prediction)².
    `loss_weight` "velocity" takes the error in v = √ᾱ·ε − √(1−ᾱ)·x0 instead (`velocity_weights`).
    """

    def loss(params: Params, batch: Batch, keys: jax.Array) -> Float[Array, ""]:
        latents = _latents(networks, params, batch, keys, model.autoencoder.scale_factor)
        timesteps, noise = batch.get("timesteps"), batch.get("noise")
        if timesteps is None:
            uniform = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, _TIMESTEP)))(keys)
            timesteps = (model.schedule.timesteps * uniform).astype(jnp.int32)
        if noise is None:
            noise = _normal(keys, _NOISE, latents.shape[1:])
        context = batch.get("context")
        if context is None:
            context, _ = networks.text_encoder.apply({"params": params["text_encoder"]}, batch["caption_ids"])
        tokens, alpha = None, None
        if settings.grounding:
            tokens, alpha = networks.unifusion.apply({"params": params["unifusion"]}, batch["grounding"]), 1.0
        unet = {"params": params["unet"]}
        conditions = networks.unet.apply(unet, context, tokens, method="condition")
        if settings.masked_attention != "none":
            conditions["regions"] = batch["regions"]
        noisy = q_sample(latents, noise, timesteps, model.schedule)
        prediction = networks.unet.apply(unet, noisy, timesteps, conditions, alpha)
        target = prediction_target(latents, noise, timesteps, model.schedule)
        error = jnp.square(prediction.astype(jnp.float32) - target)
        if settings.loss_weight == "velocity" and model.schedule.prediction == "epsilon":
            weights = velocity_weights(model.schedule, settings.loss_weight_limit)
            error = error * weights[timesteps][:, None, None, None]
        return jnp.mean(error)

    return loss


def autoencoder_loss(networks: Networks, model: ModelConfig, settings: TrainSettings) -> Loss:
    """Mean squared error of the reconstruction, plus `kl_weight` times the mean KL divergence from a unit normal.

    Plus `equivariance` times the error of what half-size latents decode to, from the half-size picture.
    """
    network, scale = networks.autoencoder, model.autoencoder.scale_factor

    def loss(params: Params, batch: Batch, keys: jax.Array) -> Float[Array, ""]:
        variables, image = {"params": params["autoencoder"]}, _to_float(batch["image"])
        mean, log_variance = network.apply(variables, image, method="encode")
        noise = _normal(keys, _POSTERIOR, mean.shape[1:])
        latents = sample_posterior(mean, log_variance, noise, scale)
        error = _squared_error(network.apply(variables, latents, method="decode"), image)
        if settings.equivariance:
            halved = network.apply(variables, _halve(latents), method="decode")
            error += settings.equivariance * _squared_error(halved, _halve(image))
        mean, log_variance = mean.astype(jnp.float32), jnp.clip(log_variance.astype(jnp.float32), -30.0, 20.0)
        kl = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance)
        return error + settings.kl_weight * kl

    return loss


def _squared_error(x: Array, y: Array) -> Float[Array, ""]:
    return jnp.mean(jnp.square(x.astype(jnp.float32) - y))


def _halve(x: Float[Array, "b h w c"]) -> Float[Array, "b h//2 w//2 c"]:
    """Means of 2×2 pixels."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))


def text_loss(networks: Networks, model: ModelConfig, settings: TrainSettings) -> Loss:
    """Cross-entropy of a caption's words given its pooled state, for a small text encoder trained from scratch.

    UniFusion sees only the pooled state of a phrase. CLIP's pooled state carries every word, because CLIP was trained
    contrastively. An encoder trained by noise prediction keeps colours and little else. Here the logits are the pooled
    state times the token embeddings. The targets are the caption's words, with equal weights.
    """

    def loss(params: Params, batch: Batch, keys: jax.Array) -> Float[Array, ""]:
        ids, encoder = batch["caption_ids"], params["text_encoder"]
        _, pooled = networks.text_encoder.apply({"params": encoder}, ids)
        embedding = encoder["token_embedding"]["embedding"].astype(jnp.float32)
        likely = jax.nn.log_softmax(pooled.astype(jnp.float32) @ embedding.T)
        # Words are between the start token and the first end token, which has the highest id.
        place = jnp.arange(ids.shape[1])[None]
        words = (place > 0) & (place < jnp.argmax(ids, axis=1)[:, None])
        rows = jnp.arange(ids.shape[0])[:, None]
        present = jnp.zeros_like(likely).at[rows, ids].max(words.astype(jnp.float32))
        return -jnp.mean((likely * present).sum(-1) / jnp.maximum(present.sum(-1), 1))

    return loss


LOSSES = {"diffusion": diffusion_loss, "autoencoder": autoencoder_loss, "text": text_loss}


def make_loss(model: ModelConfig, settings: TrainSettings) -> Loss:
    """The loss of the run's task, as a function of the whole parameter tree."""
    loss = LOSSES[settings.task](make_networks(model, settings), model, settings)
    if settings.remat == "dots":
        loss = jax.checkpoint(loss, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
    return loss


def _compute_params(trainable: Params, frozen: Params, plan: ShardingPlan, settings: TrainSettings) -> Params:
    def cast(path, leaf: Array) -> Array:
        # The layers cast their kernels anyway. Casting before the gather halves the bytes to send.
        return leaf.astype(settings.dtype) if path[-1].key == "kernel" else leaf

    trainable = gather(jax.tree_util.tree_map_with_path(cast, trainable), plan.trainable_specs)
    return merge_params(trainable, gather(frozen, plan.frozen_specs))


def make_train_step(
    model: ModelConfig, settings: TrainSettings, plan: ShardingPlan
) -> Callable[[TrainState, Params, Batch], tuple[TrainState, dict[str, Array]]]:
    """Makes the step, not yet compiled: (state, frozen parameters, batch) → (state, metrics).

    Metrics are float32 or int32 scalars: loss, grad_norm (before clipping), learning_rate, skipped, skipped_in_row.
    """
    loss_of = make_loss(model, settings)
    parts = settings.accumulate

    def local_gradients(trainable: Params, frozen: Params, batch: Batch, keys: jax.Array):
        def loss(trainable: Params, batch: Batch, keys: jax.Array) -> Float[Array, ""]:
            # One device's and one part's share of the mean over all.
            share = plan.mesh.size * parts
            return loss_of(_compute_params(trainable, frozen, plan, settings), batch, keys) / share

        gradient = jax.value_and_grad(loss)
        if parts == 1:
            total, grads = gradient(trainable, batch, keys)
        else:

            def part(carry, rows):
                return jax.tree.map(jnp.add, carry, gradient(trainable, *rows)), None

            zeros = jnp.zeros(()), jax.tree.map(jnp.zeros_like, trainable)
            (total, grads), _ = jax.lax.scan(part, zeros, _parts((batch, keys), parts))
        return jax.lax.psum(total, AXES), sum_gradients(grads, plan.trainable_specs)

    gradients = _over_devices(local_gradients, plan, (REPLICATED, plan.trainable_specs))

    def train_step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        keys = row_keys(settings.seed, state.step, jnp.arange(_rows(batch)))
        loss, grads = gradients(state.params, frozen, batch, keys)
        norm = global_norm(grads)
        take = jnp.isfinite(loss) & jnp.isfinite(norm)
        rate = learning_rate(state.optimizer.updates, settings.optimizer, settings.steps)
        params, optimizer = apply_gradients(
            state.params, grads, state.optimizer, settings.optimizer, rate, norm, take, plan.mesh
        )
        skip = 1 - take.astype(jnp.int32)
        state = TrainState(
            step=state.step + 1,
            skipped=state.skipped + skip,
            skipped_in_row=(state.skipped_in_row + 1) * skip,
            params=params,
            optimizer=optimizer,
        )
        metrics = dict(loss=loss, grad_norm=norm, learning_rate=rate)
        return state, metrics | dict(skipped=state.skipped, skipped_in_row=state.skipped_in_row)

    return train_step


def make_validation_step(
    model: ModelConfig, settings: TrainSettings, plan: ShardingPlan
) -> Callable[[Params, Params, Batch, Int[Array, ""]], Float[Array, ""]]:
    """Makes (trainable, frozen, batch, index) → loss; `index` determines the noise and timesteps of the batch."""
    loss_of = make_loss(model, settings)

    def local_loss(trainable: Params, frozen: Params, batch: Batch, keys: jax.Array) -> Float[Array, ""]:
        params = _compute_params(trainable, frozen, plan, settings)
        if settings.accumulate == 1:
            loss = loss_of(params, batch, keys)
        else:
            # In the same parts as the training step, so that it needs no more memory.
            rows = _parts((batch, keys), settings.accumulate)
            loss = jnp.mean(jax.lax.map(lambda part: loss_of(params, *part), rows))
        return jax.lax.pmean(loss, AXES)

    over_devices = _over_devices(local_loss, plan, REPLICATED)

    def validation_step(trainable: Params, frozen: Params, batch: Batch, index: Int[Array, ""]) -> Float[Array, ""]:
        # Training steps count up from 0, so a negative step never repeats a draw of theirs.
        keys = row_keys(settings.seed, -1 - index, jnp.arange(_rows(batch)))
        return over_devices(trainable, frozen, batch, keys)

    return validation_step


def compile_step(step: Callable, plan: ShardingPlan) -> Callable:
    """Compiles `make_train_step`'s result. The state is donated, and keeps its sharding."""
    places = plan.state_shardings()
    return jax.jit(step, donate_argnums=0, out_shardings=(places, places.step))


def _parts(rows: Any, parts: int) -> Any:
    """Splits the rows of arrays into parts, along a new first axis."""
    return jax.tree.map(lambda x: x.reshape(parts, x.shape[0] // parts, *x.shape[1:]), rows)


def _rows(batch: Batch) -> int:
    return jax.tree.leaves(batch)[0].shape[0]


def _over_devices(function: Callable, plan: ShardingPlan, out_specs: Any) -> Callable:
    specs: tuple[Params | PartitionSpec, ...] = (plan.trainable_specs, plan.frozen_specs, BATCH, BATCH)
    return jax.shard_map(function, mesh=plan.mesh, in_specs=specs, out_specs=out_specs, check_vma=False)
