"""InstanceDiffusion in JAX: generate images from a caption and captioned, located instances (arXiv 2402.03290)."""

from typing import TYPE_CHECKING, Any

from instdiff_jax.errors import InputError
from instdiff_jax.layout import Instance, Layout

if TYPE_CHECKING:
    from instdiff_jax.sampling.pipeline import Pipeline, Result

__version__ = "0.2.0"  # read by pyproject.toml
__all__ = ["InputError", "Instance", "Layout", "Pipeline", "Result", "__version__"]


def __getattr__(name: str) -> Any:
    # jax takes seconds to import: code that only reads layouts should not wait for it.
    if name in ("Pipeline", "Result"):
        from instdiff_jax.sampling import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
