"""The ConvNeXt trunk: parity with transformers' ConvNeXt, parameter counts, bfloat16."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import ConvNextConfig, ConvNextModel

from common import make_array, model_config, relative_error
from instdiff_jax.checkpoint.tables import rename_table
from instdiff_jax.models.convnext import ConvNeXt
from instdiff_jax.tree import unflatten

TRUNK = "position_net.convnext_tiny_backbone."


def trunk_table(depths, dims):
    """Entries of the rename table by key; they also fix every shape."""
    config = model_config("small")
    unifusion = dataclasses.replace(config.unifusion, trunk_depths=depths, trunk_dims=dims)
    table = rename_table("model", dataclasses.replace(config, unifusion=unifusion))
    return {key: entry for key, entry in table.items() if key.startswith(TRUNK)}


def trunk_weights(depths, dims) -> dict[str, np.ndarray]:
    return {key: make_array(key, entry.torch_shape) for key, entry in trunk_table(depths, dims).items()}


def trunk_params(weights: dict[str, np.ndarray], depths, dims) -> dict:
    table = trunk_table(depths, dims)
    return {"params": unflatten({entry.path[2:]: entry.to_ours(weights[key]) for key, entry in table.items()})}


def their_model(weights: dict[str, np.ndarray], depths, dims) -> ConvNextModel:
    """transformers' ConvNeXt with the same weights; it stops at the trunk where only its last state is read."""
    model = ConvNextModel(ConvNextConfig(depths=depths, hidden_sizes=dims, num_stages=len(dims))).eval()
    renamed = {"layernorm.weight": torch.ones(dims[-1]), "layernorm.bias": torch.zeros(dims[-1])}
    for key, value in weights.items():
        kind, i, j, *rest = key.removeprefix(TRUNK).split(".")
        if kind == "stages":
            leaf = ".".join(rest).replace("gamma", "layer_scale_parameter").replace("norm", "layernorm")
            name = f"encoder.stages.{i}.layers.{j}.{leaf}"
        elif i == "0":
            name = f"embeddings.{('patch_embeddings', 'layernorm')[int(j)]}.{rest[0]}"
        else:
            name = f"encoder.stages.{i}.downsampling_layer.{j}.{rest[0]}"
        renamed[name] = torch.from_numpy(value)
    model.load_state_dict(renamed, strict=True)
    return model


def their_features(weights: dict[str, np.ndarray], depths, dims, image: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        features = their_model(weights, depths, dims)(torch.from_numpy(np.moveaxis(image, -1, 1).copy()))
    return np.moveaxis(features.last_hidden_state.numpy(), 1, -1)


@pytest.mark.parametrize(
    ("depths", "dims", "shape"),
    [((3, 3, 9, 3), (96, 192, 384, 768), (1, 64, 96)), ((1, 2, 1, 1), (16, 24, 32, 40), (2, 128, 64))],
)
def test_equals_transformers(depths, dims, shape):
    weights = trunk_weights(depths, dims)
    image = np.random.default_rng(2).standard_normal((*shape, 3)).astype(np.float32)
    ours = jax.jit(ConvNeXt(depths, dims).apply)(trunk_params(weights, depths, dims), image)
    assert ours.shape == (shape[0], shape[1] // 32, shape[2] // 32, dims[-1])
    assert relative_error(ours, their_features(weights, depths, dims, image)) < 2e-5


def test_bfloat16_stays_close_to_float32():
    config = model_config("full").unifusion
    depths, dims = config.trunk_depths, config.trunk_dims
    weights = trunk_weights(depths, dims)
    image = np.random.default_rng(3).standard_normal((1, 64, 64, 3)).astype(np.float32)
    ours = jax.jit(ConvNeXt(depths, dims, jnp.bfloat16).apply)(trunk_params(weights, depths, dims), image)
    assert ours.dtype == jnp.bfloat16
    assert relative_error(ours.astype(jnp.float32), their_features(weights, depths, dims, image)) < 0.03


def test_parameter_count_and_dtype_of_the_released_trunk():
    config = model_config("full").unifusion
    trunk = ConvNeXt(config.trunk_depths, config.trunk_dims)
    leaves = jax.tree.leaves(jax.eval_shape(trunk.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3))))
    assert sum(leaf.size for leaf in leaves) == 27_818_592
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.float32)}
