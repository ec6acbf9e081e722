"""InstanceDiffusion in JAX: pictures that obey a layout of instances (arXiv 2402.03290)."""

from typing import TYPE_CHECKING, Any

from instdiff_jax.errors import InputError
from instdiff_jax.layout import Instance, Layout

if TYPE_CHECKING:
    from instdiff_jax.sampling.pipeline import Pipeline

__all__ = ["InputError", "Instance", "Layout", "Pipeline", "__version__"]
__version__ = "0.2.0"  # read by pyproject.toml


def __getattr__(name: str) -> Any:
    # jax takes seconds to import; who only reads layouts should not wait for it.
    if name == "Pipeline":
        from instdiff_jax.sampling.pipeline import Pipeline

        return Pipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
