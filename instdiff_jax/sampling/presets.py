"""Named sampling settings."""

from collections.abc import Mapping
from typing import Any

from instdiff_jax.errors import InputError

# Overrides of a checkpoint's sampling settings. With instances, "fast" needs about a quarter of the released settings'
# evaluations; "turbo" is for a base with an LCM or Hyper-SD LoRA. See docs/sampling.md.
PRESETS: dict[str, dict[str, Any]] = {
    "quality": {},
    "fast": dict(sampler="dpm++", steps=20, guidance_interval=(0.0, 0.8), mis_guidance=False),
    "turbo": dict(sampler="lcm", steps=8, guidance_scale=1.5),
}


def with_preset(preset: str | None, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A preset's settings, replaced by the overrides where both set one; InputError for an unknown preset."""
    if preset is not None and preset not in PRESETS:
        raise InputError(f"preset: expected one of {', '.join(PRESETS)}, got {preset!r}")
    return PRESETS.get(preset or "", {}) | dict(overrides)
