"""UniFusion: instance captions and locations become grounding tokens (paper, "UniFusion": instance tokenizer).

    g_i = MLP([τ(c_i), γ(p_i)])

c_i is the caption of instance i and τ(c_i) its pooled CLIP state; p_i are the points of its location in one format and
γ is a Fourier mapping. Each format has its own MLP. Where an instance has no caption, or no location in a format, a
learned null vector stands in. Each slot gives four tokens: box, point, scribble, mask (its points). A ConvNeXt over all
masks at once gives 64 more.

Axes: b batch, n slots (at most 30), s side of the maps, t map tokens (64), e width of text and tokens, k features.
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt32

from instdiff_jax.config import NUM_MAP_TOKENS, UniFusionConfig
from instdiff_jax.grounding import ARRAYS, COORDINATES, Grounding
from instdiff_jax.layout import MAX_INSTANCES
from instdiff_jax.models.convnext import ConvNeXt
from instdiff_jax.models.layers import Dense

NUM_TOKENS = 4 * MAX_INSTANCES + NUM_MAP_TOKENS
NUM_FREQUENCIES = 16


def fourier_features(x: Float[Array, "*b k"]) -> Float[Array, "*b 32*k"]:
    """γ: [sin(f·x), cos(f·x)] of all coordinates for each of 16 frequencies f = 100^(i/16).

    As released: without 2π, and the sines of all coordinates before their cosines.
    """
    frequencies = jnp.asarray(100.0 ** (np.arange(NUM_FREQUENCIES) / NUM_FREQUENCIES), jnp.float32)
    angles = x[..., None, :] * frequencies[:, None]
    features = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return features.reshape(*x.shape[:-1], -1)


def unpack_maps(maps: UInt32[Array, "b s s"]) -> Float[Array, "b s s 30"]:
    """The packed maps as one channel of 0 and 1 per slot."""
    bits = (maps[..., None] >> jnp.arange(MAX_INSTANCES, dtype=jnp.uint32)) & jnp.uint32(1)
    return bits.astype(jnp.float32)


class TokenMLP(nn.Module):
    """Linear–SiLU–Linear–SiLU–Linear."""

    hidden: int
    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b n k"]) -> Float[Array, "b n e"]:
        x = nn.silu(Dense(self.hidden, name="in", dtype=self.dtype)(x))
        x = nn.silu(Dense(self.hidden, name="mid", dtype=self.dtype)(x))
        return Dense(self.features, name="out", dtype=self.dtype)(x)


class UniFusion(nn.Module):
    """Groundings to grounding tokens: 30 box, 30 point, 30 scribble, 30 mask and 64 map tokens."""

    config: UniFusionConfig
    context_dim: int = 768
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, grounding: Grounding, use_maps: bool = True) -> Float[Array, "b 184 e"]:
        """Computes the tokens.

        Args:
            grounding: of a batch of layouts.
            use_maps: static; False leaves the ConvNeXt trunk out of the program. It may be False where `has_map` is 0
                in the whole batch.
        """
        slots = grounding["valid"].shape[1]
        if slots < MAX_INSTANCES:
            # Empty slots all have the same tokens: one of them is computed.
            grounding = {k: x if k in ("maps", "has_map") else _add_slot(x) for k, x in grounding.items()}
        valid = grounding["valid"][..., None]
        text = jnp.where(valid > 0, grounding["phrase_embeddings"], self._null("text", self.context_dim))
        tokens = []
        for format, array in ARRAYS.items():
            name = "mask_points" if format == "mask" else format  # as parameters are called
            features = fourier_features(grounding[array])
            null = self._null(name, COORDINATES[format] * 2 * NUM_FREQUENCIES)
            features = jnp.where(grounding[f"has_{format}"][..., None] > 0, features, null)
            made = self._mlp(name, jnp.concatenate([text, features], axis=-1))
            tokens.append(_repeat_last_slot(made, slots) if slots < MAX_INSTANCES else made)
        return jnp.concatenate([*tokens, self._map_tokens(grounding, use_maps)], axis=1)

    def _null(self, name: str, size: int) -> Float[Array, " size"]:
        return self.param(f"null_{name}", nn.initializers.zeros, (size,))

    def _mlp(self, name: str, features: Float[Array, "b n k"]) -> Float[Array, "b n e"]:
        mlp = TokenMLP(self.config.mid_dim, self.context_dim, self.dtype, name=f"mlp_{name}")
        return mlp(features.astype(self.dtype))

    def _map_tokens(self, grounding: Grounding, use_maps: bool) -> Float[Array, "b 64 e"]:
        width = self.config.map_token_dim
        shape = (grounding["boxes"].shape[0], NUM_MAP_TOKENS, width)
        features = jnp.broadcast_to(self._null("map", width), shape)
        if use_maps:
            present = grounding["has_map"][:, None, None] > 0
            features = jnp.where(present, self._map_features(grounding["maps"]), features)
        # Added to null map tokens as well, as in the official code.
        position = self.param("pos_embedding", nn.initializers.normal(0.02), shape[1:])
        return self._mlp("map", features + position)

    def _map_features(self, maps: UInt32[Array, "b s s"]) -> Float[Array, "b t k"]:
        image = nn.Conv(3, (3, 3), name="map_conv", dtype=self.dtype)(unpack_maps(maps).astype(self.dtype))
        image = ConvNeXt(self.config.trunk_depths, self.config.trunk_dims, name="trunk", dtype=self.dtype)(image)
        # The official code reshapes (channels, height, width) row-major into (features, tokens). This mixes space and
        # channels, but the released weights expect it.
        flat = jnp.moveaxis(image, -1, 1).reshape(image.shape[0], self.config.map_token_dim, NUM_MAP_TOKENS)
        return jnp.swapaxes(flat, 1, 2)


def _add_slot(x: Float[Array, "b n *k"]) -> Float[Array, "b n+1 *k"]:
    """Adds an empty slot."""
    return jnp.pad(x, ((0, 0), (0, 1)) + ((0, 0),) * (x.ndim - 2))


def _repeat_last_slot(tokens: Float[Array, "b n e"], slots: int) -> Float[Array, "b 30 e"]:
    """All slots' tokens from those of `slots` slots and of one empty slot."""
    empty = jnp.broadcast_to(tokens[:, slots:], (tokens.shape[0], MAX_INSTANCES - slots, tokens.shape[2]))
    return jnp.concatenate([tokens[:, :slots], empty], axis=1)
