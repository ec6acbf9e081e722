"""The persistent cache of compiled programs."""

import os
import warnings
from pathlib import Path

import jax


def enable_compilation_cache() -> None:
    """Keeps compiled programs under the user's cache folder, unless jax is configured otherwise already."""
    if jax.config.jax_compilation_cache_dir is not None:
        return
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = root / "instdiff_jax" / "xla"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        warnings.warn(f"no compilation cache: {folder}: {error.strerror}", stacklevel=2)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
