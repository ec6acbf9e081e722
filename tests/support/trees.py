"""Comparing trees of arrays."""

import jax
import numpy as np


def assert_same_trees(found, expected) -> None:
    """Both have the same structure and, leaf by leaf, the same type and bits."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    pairs = zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True)
    for (path, ours), theirs in pairs:
        ours, theirs = np.asarray(ours), np.asarray(theirs)
        assert ours.dtype == theirs.dtype, jax.tree_util.keystr(path)
        np.testing.assert_array_equal(ours, theirs, err_msg=jax.tree_util.keystr(path))
