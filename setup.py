"""Puts the small model and its layouts into the wheel as instdiff_jax/box/. All else is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

BOX = ("checkpoints/shapes", "examples/shapes")


class BuildWithBox(build_py):
    """An editable install finds the folders in the clone instead."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for name in BOX:
                shutil.copytree(name, Path(self.build_lib, "instdiff_jax", "box", name), dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithBox})
