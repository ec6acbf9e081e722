"""The world of things: Fluent emoji on plain backgrounds."""
