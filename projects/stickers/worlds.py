"""Settings of random scenes."""

import dataclasses

from instdiff_jax.config import Settings
from instdiff_jax.errors import InputError
from projects.stickers.things import NAMES


@dataclasses.dataclass(frozen=True)
class SceneSettings(Settings):
    """What scenes look like. Sides are fractions of the image's side.

    Attributes:
        min_instances: the number of instances is uniform between this
        max_instances: and this. A scene without enough room gets fewer.
        min_side: longer side of the smallest thing
        max_side: and of the largest; smaller if there are many things.
        max_turn: largest rotation in degrees, in either direction.
        max_hidden: largest fraction of a thing that others may hide. In a third of the scenes nothing is hidden.
        confusable: neighbours are the same thing in different colours. For measuring how attributes leak.
        captions: captions per image.
        favour: comma-separated things that are drawn three times as often as others, for a model that confuses them.
    """

    min_instances: int = 1
    max_instances: int = 8
    min_side: float = 0.23
    max_side: float = 0.6
    max_turn: float = 10.0
    max_hidden: float = 0.3
    confusable: bool = False
    captions: int = 5
    favour: str = ""

    @property
    def choices(self) -> tuple[str, ...]:
        """The things to draw from with equal probability; favoured ones are listed three times."""
        return NAMES + 2 * tuple(filter(None, self.favour.split(",")))

    def validate(self, where: str = "scene") -> None:
        """Raises InputError for a value out of its range."""
        ranges = {
            "min_instances": (1, 30),
            "max_instances": (self.min_instances, 30),
            "min_side": (0.05, 0.9),
            "max_side": (self.min_side, 0.9),
            "max_turn": (0, 180),
            "max_hidden": (0, 0.9),
            "captions": (1, 20),
        }
        for field, (low, high) in ranges.items():
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
                raise InputError(f"{where}.{field}: expected a number from {low} to {high}, got {value!r}")
        for name in self.choices:
            if name not in NAMES:
                raise InputError(f"{where}.favour: expected things out of {', '.join(NAMES)}, got {name!r}")


WORLDS = {"book": SceneSettings()}
