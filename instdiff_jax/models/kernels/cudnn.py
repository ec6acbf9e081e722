"""cuDNN's flash attention on Nvidia GPUs.

Axes: b batch, h heads, n queries, m keys, d head width.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

from instdiff_jax.models.kernels import chunked
from instdiff_jax.models.regions import visible


def supports(queries: tuple[int, ...], dtype: jnp.dtype) -> bool:
    """Whether cuDNN can run queries of this shape [b, n, h, d] here, its gradient included.

    It takes 16-bit floats, heads of at most 128 and a multiple of 8, and even numbers of queries. SD 1.5's innermost
    heads are 160 wide, over few tokens, where the chunked kernel is no slower.
    """
    _, n, _, d = queries
    return dtype in (jnp.bfloat16, jnp.float16) and d <= 128 and d % 8 == 0 and n % 2 == 0 and _has_cudnn()


def _has_cudnn() -> bool:
    """Whether this process's GPU is Nvidia's with compute capability 8.0 (Ampere) or later."""
    if jax.default_backend() != "gpu":
        return True  # the program is compiled for another machine
    capability = str(getattr(jax.local_devices()[0], "compute_capability", ""))
    return capability.replace(".", "", 1).isdecimal() and float(capability) >= 8


def attention(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b m h d"],
    v: Float[Array, "b m h d"],
    query_bits: UInt32[Array, "b n"] | None = None,
    key_bits: UInt32[Array, "b m"] | None = None,
) -> Float[Array, "b n h d"]:
    """`plain.attention` by cuDNN; the gradient is cuDNN's where that is finite, else the chunked kernel's."""
    return (flash if _gradient_is_finite(k.shape[1]) else _flash_forward)(q, k, v, query_bits, key_bits)


def _gradient_is_finite(keys: int) -> bool:
    """False where cuDNN's gradient may be NaN on Hopper: 64 keys more than a multiple of 128.

    It happens where all of a query's logits are below -88 (github.com/NVIDIA/cudnn-frontend, pull 628). Checkpoints
    with captions of 64 tokens meet it. `flash` pads odd numbers by one key.
    """
    return (keys + keys % 2) % 128 != 64


def flash(q, k, v, query_bits, key_bits) -> Float[Array, "b n h d"]:
    """cuDNN's kernel. Its gradient needs an even number of keys; odd lengths (a caption has 77) get one masked key."""
    count, lengths = k.shape[1], None
    if count % 2:
        k, v = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (k, v))
        if key_bits is None:
            lengths = jnp.full(k.shape[:1], count, jnp.int32)
        else:
            key_bits = jnp.pad(key_bits, ((0, 0), (0, 1)))
    mask = None if key_bits is None else visible(query_bits, key_bits)
    return jax.nn.dot_product_attention(q, k, v, mask=mask, key_value_seq_lengths=lengths, implementation="cudnn")


@jax.custom_vjp
def _flash_forward(q, k, v, query_bits, key_bits) -> Float[Array, "b n h d"]:
    """cuDNN's kernel with the gradient of the chunked kernel."""
    return flash(q, k, v, query_bits, key_bits)


def _flash_forward_fwd(q, k, v, query_bits, key_bits):
    return flash(q, k, v, query_bits, key_bits), (q, k, v, query_bits, key_bits)


def _flash_forward_bwd(saved, gradient):
    q, k, v, query_bits, key_bits = saved
    _, pull = jax.vjp(lambda q, k, v: chunked.attention(q, k, v, query_bits, key_bits), q, k, v)
    return *pull(gradient), None, None


_flash_forward.defvjp(_flash_forward_fwd, _flash_forward_bwd)
