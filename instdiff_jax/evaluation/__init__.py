"""Measures how well images follow their layouts; `instdiff evaluate` puts it together."""
