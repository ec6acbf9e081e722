"""Datasets in the forms of other tools, read as scenes and written as a COCO folder."""
