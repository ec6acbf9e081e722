"""UniFusion: the places and phrases of up to 30 instances become 184 grounding tokens (paper section 3.1).

Axes: b batch, n slots (at most 30), t map tokens (64), s side of the instance maps, e width of text and tokens.
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt32

from instdiff_jax.config import NUM_MAP_TOKENS, UniFusionConfig
from instdiff_jax.grounding import ARRAYS, COORDINATES, Grounding
from instdiff_jax.layout import MAX_INSTANCES
from instdiff_jax.models.convnext import ConvNeXt

NUM_TOKENS = 4 * MAX_INSTANCES + NUM_MAP_TOKENS
NUM_FREQUENCIES = 16


def fourier_features(x: Float[Array, "*b k"]) -> Float[Array, "*b 32*k"]:
    """[sin(f·x), cos(f·x)] over all coordinates for each of 16 frequencies f = 100^(i/16) in turn.

    As released: no 2π, and the sines of all coordinates stand before their cosines.
    """
    frequencies = jnp.asarray(100.0 ** (np.arange(NUM_FREQUENCIES) / NUM_FREQUENCIES), jnp.float32)
    angles = x[..., None, :] * frequencies[:, None]
    features = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return features.reshape(*x.shape[:-1], -1)


def unpack_maps(maps: UInt32[Array, "b s s"]) -> Float[Array, "b s s 30"]:
    """One channel of 0 and 1 per slot from the packed maps."""
    bits = (maps[..., None] >> jnp.arange(MAX_INSTANCES, dtype=jnp.uint32)) & jnp.uint32(1)
    return bits.astype(jnp.float32)


def _add_slot(x: Float[Array, "b n *k"]) -> Float[Array, "b n+1 *k"]:
    return jnp.pad(x, ((0, 0), (0, 1)) + ((0, 0),) * (x.ndim - 2))


class TokenMLP(nn.Module):
    """Linear–SiLU–Linear–SiLU–Linear."""

    hidden: int
    features: int
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b n k"]) -> Float[Array, "b n e"]:
        settings = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        x = nn.silu(nn.Dense(self.hidden, name="in", **settings)(x))
        x = nn.silu(nn.Dense(self.hidden, name="mid", **settings)(x))
        return nn.Dense(self.features, name="out", **settings)(x)


class UniFusion(nn.Module):
    """Groundings to grounding tokens: 30 box, 30 point, 30 scribble, 30 mask and 64 map tokens."""

    config: UniFusionConfig
    context_dim: int = 768
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @property
    def map_features(self) -> int:
        """Width of a map token before its MLP."""
        return self.config.trunk_dims[-1] * (self.config.map_size // 32) ** 2 // NUM_MAP_TOKENS

    @nn.compact
    def __call__(self, grounding: Grounding, use_maps: bool = True) -> Float[Array, "b 184 e"]:
        """Makes the tokens.

        Args:
            use_maps: static; False leaves the ConvNeXt trunk out of the program, right where `has_map`
                is 0 in the whole batch.
        """
        settings = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        slots = grounding["valid"].shape[1]
        if slots < MAX_INSTANCES:
            # Empty slots have the same tokens: one of them is computed.
            grounding = {k: x if k in ("maps", "has_map") else _add_slot(x) for k, x in grounding.items()}

        def null(name: str, size: int) -> Float[Array, " size"]:
            return self.param(f"null_{name}", nn.initializers.zeros, (size,), self.param_dtype)

        valid = grounding["valid"][..., None]
        text = jnp.where(valid > 0, grounding["phrase_embeddings"], null("text", self.context_dim))
        tokens = []
        for format, array in ARRAYS.items():
            name = "mask_points" if format == "mask" else format
            size = COORDINATES[format] * 2 * NUM_FREQUENCIES
            features = fourier_features(grounding[array])
            features = jnp.where(grounding[f"has_{format}"][..., None] > 0, features, null(name, size))
            both = jnp.concatenate([text, features], axis=-1).astype(self.dtype)
            made = TokenMLP(self.config.mid_dim, self.context_dim, name=f"mlp_{name}", **settings)(both)
            if slots < MAX_INSTANCES:
                empty = (made.shape[0], MAX_INSTANCES - slots, self.context_dim)
                made = jnp.concatenate([made[:, :slots], jnp.broadcast_to(made[:, slots:], empty)], axis=1)
            tokens.append(made)

        shape = (grounding["boxes"].shape[0], NUM_MAP_TOKENS, self.map_features)
        features = jnp.broadcast_to(null("map", self.map_features), shape)
        if use_maps:
            present = grounding["has_map"][:, None, None] > 0
            features = jnp.where(present, self._map_features(grounding["maps"]), features)
        # Added after the null replacement: null map tokens have a position too.
        position = self.param("pos_embedding", nn.initializers.normal(0.02), shape[1:], self.param_dtype)
        features = (features + position).astype(self.dtype)
        tokens.append(TokenMLP(self.config.mid_dim, self.context_dim, name="mlp_map", **settings)(features))
        return jnp.concatenate(tokens, axis=1)

    def _map_features(self, maps: UInt32[Array, "b s s"]) -> Float[Array, "b t k"]:
        settings = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        image = nn.Conv(3, (3, 3), name="map_conv", **settings)(unpack_maps(maps).astype(self.dtype))
        image = ConvNeXt(self.config.trunk_depths, self.config.trunk_dims, name="trunk", **settings)(image)
        # The official code reshapes (channels, height, width) row-major into (features, tokens). This
        # mixes space and channels, but the released weights expect it.
        flat = jnp.moveaxis(image, -1, 1).reshape(image.shape[0], self.map_features, NUM_MAP_TOKENS)
        return jnp.swapaxes(flat, 1, 2)
