"""Which part of a long list of pictures a process draws."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from instdiff_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Shard:
    """Part `index` of `count` parts: items index, index + count, ..."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """Reads `i/n`."""
        parts = text.split("/")
        if len(parts) != 2 or not all(part.isdecimal() for part in parts) or not int(parts[0]) < int(parts[1]):
            raise InputError(f"--shard: expected i/n with i from 0 to n - 1, got {text!r}")
        return cls(int(parts[0]), int(parts[1]))

    @classmethod
    def of_process(cls) -> "Shard":
        """This process's part of its job."""
        import jax

        return cls(jax.process_index(), jax.process_count())

    def of(self, items: Sequence[Any]) -> Sequence[Any]:
        """This part of the items."""
        return items[self.index :: self.count]
