"""Datasets: the COCO builder, the official training JSON, transforms and the loader."""
