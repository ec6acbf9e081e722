"""Masks, points and contours, in pixels."""
