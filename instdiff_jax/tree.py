"""Nested dicts of arrays as flat dicts, by path, and back.

flatten({"unet": {"conv_in": {"kernel": x}}})  ->  {("unet", "conv_in", "kernel"): x}
"""

from flax.traverse_util import flatten_dict as flatten
from flax.traverse_util import unflatten_dict as unflatten

__all__ = ["flatten", "unflatten"]
