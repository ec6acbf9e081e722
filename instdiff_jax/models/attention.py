"""Attention: the kernels, and the modules that use them.

Axes: b batch, n queries, m keys, h heads, d head width, c channels, w words of 32 bits.
"""

from typing import Literal, TypedDict

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt32

from instdiff_jax.models.layers import LayerNorm, platform

Kernel = Literal["auto", "plain", "chunked", "cudnn"]

# The bit of a key's word that every query shares: a key that carries it is visible from everywhere.
# (A numpy scalar: a jax one would start the backend at import, before several hosts can join.)
EVERYWHERE = np.uint32(1 << 31)
# Logits held at a time by the chunked kernel; on a CPU few enough for its cache.
_LOGITS = {"cpu": 1 << 22, "gpu": 1 << 28, "tpu": 1 << 27}
# Fewer queries than this at a time make the matrix products too thin to be fast.
_MIN_CHUNK = 64


class KeyValue(TypedDict):
    """Keys and values of some tokens for one attention layer."""

    k: Float[Array, "b m h d"]
    v: Float[Array, "b m h d"]


class Regions(TypedDict):
    """Which instances each token belongs to, for instance-masked attention (paper section 3.3).

    Bit i of a word stands for slot i, bit 31 for "visible everywhere".
    """

    visual: UInt32[Array, "b n"]
    tokens: UInt32[Array, "b m"]


def visible(
    query_words: UInt32[Array, "b n"], key_words: UInt32[Array, "b m"], first: int | Array = 0
) -> Bool[Array, "b 1 n m"]:
    """Which keys each query may see: those whose word shares a bit with its own, and itself.

    Query i is the same token as key `first` + i.
    """
    shared = ((query_words[:, :, None] | EVERYWHERE) & key_words[:, None, :]) != 0
    rows = jnp.arange(query_words.shape[1]) + first
    itself = rows[:, None] == jnp.arange(key_words.shape[1])[None, :]
    return (shared | itself)[:, None]


def attention(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b m h d"],
    v: Float[Array, "b m h d"],
    query_words: UInt32[Array, "b n"] | None = None,
    key_words: UInt32[Array, "b m"] | None = None,
    kernel: Kernel = "auto",
) -> Float[Array, "b n h d"]:
    """softmax(q·kᵀ/√d)·v, the one place where a kernel is picked.

    With words, query i sees key j where their words share a bit or i = j (see `visible`); every kernel
    obeys them. The softmax is in float32 in every dtype.

    Args:
        kernel: "auto" picks by platform, head width and dtype: cuDNN flash on GPU where it can, else the
            form that is chunked over queries, so that no [n, m] array of the whole exists.
    """
    if kernel == "auto":
        kernel = _pick_kernel(q)
    if kernel == "cudnn":
        # On Hopper cuDNN's gradient is not finite where keys are 64 more than a multiple of 128 and all of a query's
        # logits are below -88 (github.com/NVIDIA/cudnn-frontend, pull 628), as in the model in the box, whose captions
        # have 64 tokens. (`_flash` makes 63 into 64.)
        even = k.shape[1] + k.shape[1] % 2
        flash = _flash if even % 128 != 64 else _flash_forward
        return flash(q, k, v, query_words, key_words)
    if kernel == "chunked":
        return _chunked_attention(q, k, v, query_words, key_words)
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    mask = None if key_words is None else visible(query_words, key_words)
    return jnp.swapaxes(_attend(q, k, v, mask), 1, 2)


def _flash(q, k, v, query_words, key_words) -> Float[Array, "b n h d"]:
    """cuDNN's kernel. Its gradient takes even numbers of keys alone (a caption has 77): an odd one gets a key more,
    that nothing sees.
    """
    count, lengths = k.shape[1], None
    if count % 2:
        k, v = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (k, v))
        if key_words is None:
            lengths = jnp.full(k.shape[:1], count, jnp.int32)
        else:
            key_words = jnp.pad(key_words, ((0, 0), (0, 1)))
    mask = None if key_words is None else visible(query_words, key_words)
    return jax.nn.dot_product_attention(q, k, v, mask=mask, key_value_seq_lengths=lengths, implementation="cudnn")


@jax.custom_vjp
def _flash_forward(q, k, v, query_words, key_words) -> Float[Array, "b n h d"]:
    """cuDNN's kernel with the gradient of the chunked form."""
    return _flash(q, k, v, query_words, key_words)


def _flash_forward_fwd(q, k, v, query_words, key_words):
    return _flash(q, k, v, query_words, key_words), (q, k, v, query_words, key_words)


def _flash_forward_bwd(saved, gradient):
    q, k, v, query_words, key_words = saved
    _, pull = jax.vjp(lambda q, k, v: _chunked_attention(q, k, v, query_words, key_words), q, k, v)
    return *pull(gradient), None, None


_flash_forward.defvjp(_flash_forward_fwd, _flash_forward_bwd)


def _pick_kernel(q: Float[Array, "b n h d"]) -> Kernel:
    # cuDNN's flash kernel wants 16-bit floats and heads of at most 128, a multiple of 8; SD 1.5's
    # innermost heads are 160 wide, over few tokens, where the chunked form is no slower.
    if platform() == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16) and _has_flash():
        # Its gradient takes even numbers of queries alone.
        if q.shape[-1] <= 128 and q.shape[-1] % 8 == 0 and q.shape[1] % 2 == 0:
            return "cudnn"
    return "chunked"


def _has_flash() -> bool:
    """Whether this process's GPU has cuDNN's flash kernels: Nvidia's, from compute capability 8.0 (Ampere) on."""
    if jax.default_backend() != "gpu":
        return True  # compiled here for another machine
    capability = str(getattr(jax.local_devices()[0], "compute_capability", ""))
    return capability.replace(".", "", 1).isdecimal() and float(capability) >= 8


def _attend(q, k, v, mask) -> Float[Array, "b h n d"]:
    # The scale goes into q: one pass over n·d instead of n·m.
    q = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    logits = jnp.einsum("bhnd,bhmd->bhnm", q, k, preferred_element_type=jnp.float32)
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    # Normalising after the product with v divides n·d numbers instead of n·m.
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
    total = weights.sum(-1, keepdims=True)
    out = jnp.einsum("bhnm,bhmd->bhnd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return (out / total).astype(v.dtype)


def _chunked_attention(q, k, v, query_words, key_words) -> Float[Array, "b n h d"]:
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    return jnp.swapaxes(_chunked(q, k, v, query_words, key_words), 1, 2)


def _chunked(q, k, v, query_words, key_words) -> Float[Array, "b h n d"]:
    """Chunks of queries, and of the batch where a whole batch's logits for a few queries are too many."""
    b, h, n, d = q.shape
    budget = _LOGITS.get(platform(), 1 << 27)
    if b > 1 and _MIN_CHUNK * b * h * k.shape[2] > budget:
        one = [None if x is None else x[:, None] for x in (q, k, v, query_words, key_words)]
        return jax.lax.map(lambda row: _chunked(*row), tuple(one))[:, 0]
    size = max(_MIN_CHUNK, budget // (b * h * k.shape[2]))
    if size >= n:
        return _attend(q, k, v, None if key_words is None else visible(query_words, key_words))
    chunks = -(-n // size)
    size = -(-n // chunks)  # even chunks: fewer padded queries
    q = jnp.pad(q, ((0, 0), (0, 0), (0, chunks * size - n), (0, 0)))
    if query_words is not None:
        query_words = jnp.pad(query_words, ((0, 0), (0, chunks * size - n)))

    # The backward pass recomputes a chunk's logits instead of keeping them.
    @jax.checkpoint
    def chunk(start):
        part = jax.lax.dynamic_slice_in_dim(q, start, size, axis=2)
        mask = None
        if key_words is not None:
            words = jax.lax.dynamic_slice_in_dim(query_words, start, size, axis=1)
            mask = visible(words, key_words, start)
        return _attend(part, k, v, mask)

    out = jax.lax.map(chunk, jnp.arange(0, chunks * size, size))
    return jnp.moveaxis(out, 0, 2).reshape(b, h, chunks * size, d)[:, :, :n]


class Projections(nn.Module):
    """The q, k, v (no bias) and output projections of one attention layer."""

    channels: int
    num_heads: int
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    kernel: Kernel = "auto"

    def setup(self):
        settings = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        self.q, self.k, self.v = (nn.Dense(self.channels, use_bias=False, **settings) for _ in range(3))
        self.out = nn.Dense(self.channels, **settings)

    def _split(self, x: Float[Array, "b n c"]) -> Float[Array, "b n h d"]:
        return x.reshape(*x.shape[:-1], self.num_heads, self.channels // self.num_heads)

    def key_value(self, tokens: Float[Array, "b m e"]) -> KeyValue:
        """Keys and values of tokens, ready for `__call__`."""
        return KeyValue(k=self._split(self.k(tokens)), v=self._split(self.v(tokens)))

    def __call__(
        self, x: Float[Array, "b n c"], key_value: KeyValue, regions: Regions | None = None
    ) -> Float[Array, "b n c"]:
        words = (None, None)
        if regions is not None:
            words = (regions["visual"], jnp.concatenate([regions["visual"], regions["tokens"]], axis=1))
        y = attention(self._split(self.q(x)), key_value["k"], key_value["v"], *words, kernel=self.kernel)
        return self.out(y.reshape(x.shape))


class GEGLU(nn.Module):
    """Feed-forward with a gated exact (erf) GELU, four times as wide inside: value first, gate second."""

    channels: int
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    def setup(self):
        settings = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        setattr(self, "in", nn.Dense(8 * self.channels, **settings))
        self.out = nn.Dense(self.channels, **settings)

    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        value, gate = jnp.split(getattr(self, "in")(x), 2, axis=-1)
        return self.out(value * nn.gelu(gate, approximate=False))


class Fuser(nn.Module):
    """Gated self-attention over visual and grounding tokens (paper equation 2; GLIGEN's form).

    x += α·tanh(a)·SA(LN([x; proj(tokens)]))[:n], then x += α·tanh(d)·FF(LN(x)). Only visual tokens
    are queried, and LN acts on each token alone: the grounding tokens' keys and values do not depend
    on x, so `condition` makes them once.
    """

    channels: int
    num_heads: int
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    kernel: Kernel = "auto"

    def setup(self):
        settings = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        self.proj = nn.Dense(self.channels, **settings)
        self.norm1, self.norm2 = LayerNorm(**settings), LayerNorm(**settings)
        self.attn = Projections(self.channels, self.num_heads, kernel=self.kernel, **settings)
        self.ff = GEGLU(self.channels, **settings)
        # Zero at the start of training: the fuser then changes nothing.
        self.gate_attn = self.param("gate_attn", nn.initializers.zeros, (), self.param_dtype)
        self.gate_ff = self.param("gate_ff", nn.initializers.zeros, (), self.param_dtype)

    def condition(self, tokens: Float[Array, "b m e"]) -> KeyValue:
        """Keys and values of the grounding tokens."""
        return self.attn.key_value(self.norm1(self.proj(tokens)))

    def __call__(
        self,
        x: Float[Array, "b n c"],
        grounding: KeyValue,
        alpha: Float[Array, ""] | float,
        regions: Regions | None = None,
    ) -> Float[Array, "b n c"]:
        def gate(parameter):
            return (alpha * jnp.tanh(parameter.astype(jnp.float32))).astype(self.dtype)

        y = self.norm1(x)
        visual = self.attn.key_value(y)
        both = KeyValue(
            k=jnp.concatenate([visual["k"], grounding["k"]], axis=1),
            v=jnp.concatenate([visual["v"], grounding["v"]], axis=1),
        )
        x = x + gate(self.gate_attn) * self.attn(y, both, regions)
        return x + gate(self.gate_ff) * self.ff(self.norm2(x))
