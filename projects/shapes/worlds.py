"""Settings of random scenes, and two named sets of them."""

import dataclasses

from instdiff_jax.config import Settings
from instdiff_jax.errors import InputError
from projects.shapes.drawing import SHAPES


@dataclasses.dataclass(frozen=True)
class SceneSettings(Settings):
    """What scenes look like. Sides are fractions of the image's side.

    Attributes:
        min_instances: the number of instances is uniform between this
        max_instances: and this. A scene without enough room gets fewer; ten have always fitted.
        min_side: side of the smallest shape. By default no box is smaller than 1% of an image of 64 pixels or more.
        max_side: side of the largest shape; smaller if there are many shapes.
        max_turn: largest rotation in degrees, in either direction.
        max_stretch: largest aspect ratio.
        min_periods: smallest number of texture periods across a shape
        max_periods: and largest. There are fewer if a period would be under 4 pixels.
        max_hidden: largest fraction of a shape that others may hide. In a third of the scenes nothing is hidden.
        nested: probability that a scene has a shape inside another one, as its part.
        confusable: neighbours have the same shape and different colours and textures; in every group of four, the
            third and fourth have those of the first two swapped. For measuring how attributes leak.
        captions: captions per image.
        favour: comma-separated shapes that are drawn three times as often as others, for a model that confuses them.
    """

    min_instances: int = 1
    max_instances: int = 10
    min_side: float = 0.16
    max_side: float = 0.6
    max_turn: float = 30.0
    max_stretch: float = 1.2
    min_periods: float = 2.5
    max_periods: float = 4.0
    max_hidden: float = 0.4
    nested: float = 0.15
    confusable: bool = False
    captions: int = 5
    favour: str = ""

    @property
    def choices(self) -> tuple[str, ...]:
        """The shapes to draw from with equal probability; favoured ones are listed three times."""
        return SHAPES + 2 * tuple(filter(None, self.favour.split(",")))

    def validate(self, where: str = "scene") -> None:
        """Raises InputError for a value out of its range."""
        ranges = {
            "min_instances": (1, 30),
            "max_instances": (self.min_instances, 30),
            "min_side": (0.05, 0.9),
            "max_side": (self.min_side, 0.9),
            "max_turn": (0, 180),
            "max_stretch": (1, 2),
            "min_periods": (1, 20),
            "max_periods": (self.min_periods, 20),
            "max_hidden": (0, 0.9),
            "nested": (0, 1),
            "captions": (1, 20),
        }
        for field, (low, high) in ranges.items():
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
                raise InputError(f"{where}.{field}: expected a number from {low} to {high}, got {value!r}")
        for shape in self.choices:
            if shape not in SHAPES:
                raise InputError(f"{where}.favour: expected shapes out of {', '.join(SHAPES)}, got {shape!r}")


# The model in checkpoints/shapes learned "calm": a box and a phrase nearly determine how a shape looks.
WORLDS = {
    "varied": SceneSettings(),
    "calm": SceneSettings(min_side=0.24, max_side=0.7, max_turn=10.0, min_periods=3.0, max_periods=3.3),
}
