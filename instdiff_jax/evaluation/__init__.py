"""Measures of how well pictures obey their layouts; `python -m instdiff_jax evaluate` composes them."""
