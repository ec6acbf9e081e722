"""The things of this world: their names, pictures and colours."""

from typing import NamedTuple


class Thing(NamedTuple):
    """One kind of thing.

    Attributes:
        name: its category.
        code: code point of its emoji, the name of its picture.
        hue: of the part that can be recoloured, in degrees; None if the thing always has its own colours.
        faces: whether it looks to one side. All such pictures look to the left.
        synonyms: other names.
        plural: of the name, if it is not regular.
    """

    name: str
    code: str
    hue: int | None = None
    faces: bool = False
    synonyms: tuple[str, ...] = ()
    plural: str = ""


_ANIMALS = (
    Thing("penguin", "1f427"),
    Thing("turtle", "1f422", faces=True, synonyms=("tortoise",)),
    Thing("elephant", "1f418", faces=True),
    Thing("octopus", "1f419", plural="octopuses"),
    Thing("butterfly", "1f98b", plural="butterflies"),
    Thing("bee", "1f41d", synonyms=("bumblebee",)),
    Thing("rooster", "1f413", faces=True, synonyms=("cock",)),
    Thing("owl", "1f989"),
    Thing("frog", "1f438", synonyms=("toad",)),
    Thing("cat", "1f431", synonyms=("kitten",)),
    Thing("dog", "1f436", synonyms=("puppy",)),
    Thing("pig", "1f437", synonyms=("piglet",)),
    Thing("panda", "1f43c", synonyms=("panda bear",)),
    Thing("lion", "1f981"),
    Thing("giraffe", "1f992", faces=True),
    Thing("crab", "1f980"),
    Thing("dinosaur", "1f996", faces=True, synonyms=("T-rex",)),
    Thing("whale", "1f433", faces=True),
    Thing("flamingo", "1f9a9", faces=True),
    Thing("ladybird", "1f41e", synonyms=("ladybug",)),
)
_FOOD = (
    Thing("pizza", "1f355", synonyms=("slice of pizza",), plural="slices of pizza"),
    Thing("burger", "1f354", synonyms=("hamburger",)),
    Thing("ice cream", "1f366", synonyms=("ice cream cone",)),
    Thing("doughnut", "1f369", synonyms=("donut",)),
    Thing("cake", "1f382", synonyms=("birthday cake",)),
    Thing("apple", "1f34e", hue=355),
    Thing("banana", "1f34c"),
    Thing("strawberry", "1f353", plural="strawberries"),
    Thing("bunch of grapes", "1f347", plural="bunches of grapes"),
    Thing("watermelon", "1f349", synonyms=("slice of watermelon",)),
    Thing("carrot", "1f955"),
    Thing("avocado", "1f951"),
    Thing("mushroom", "1f344", synonyms=("toadstool",)),
    Thing("pineapple", "1f34d"),
)
_VEHICLES = (
    Thing("car", "1f697", hue=355, faces=True, synonyms=("automobile",)),
    Thing("bus", "1f68c", hue=32, faces=True, synonyms=("coach",)),
    Thing("train", "1f682", faces=True, synonyms=("locomotive", "steam engine")),
    Thing("rocket", "1f680", synonyms=("spaceship",)),
    Thing("sailing boat", "26f5", synonyms=("sailboat",)),
    Thing("bicycle", "1f6b2", hue=345, synonyms=("bike",)),
    Thing("tractor", "1f69c", hue=155, faces=True),
    Thing("helicopter", "1f681", hue=20, faces=True),
)
_PLANTS = (
    Thing("cactus", "1f335", plural="cacti"),
    Thing("tree", "1f333"),
    Thing("palm tree", "1f334", synonyms=("palm",)),
    Thing("tulip", "1f337", hue=315),
    Thing("sunflower", "1f33b"),
)
_HOME = (
    Thing("chair", "1fa91", hue=12),
    Thing("sofa", "1f6cb-fe0f", hue=215, synonyms=("couch",)),
    Thing("television", "1f4fa", synonyms=("TV",)),
    Thing("teapot", "1fad6", hue=345),
    Thing("book", "1f4d5", hue=345),
    Thing("backpack", "1f392", hue=340, synonyms=("rucksack",)),
    Thing("T-shirt", "1f455", hue=100, synonyms=("shirt",)),
    Thing("umbrella", "2602-fe0f", hue=255, synonyms=("parasol",)),
    Thing("house", "1f3e0", synonyms=("cottage",)),
)
_TOOLS_AND_TOYS = (
    Thing("hammer", "1f528"),
    Thing("key", "1f511"),
    Thing("bucket", "1faa3", hue=205, synonyms=("pail",)),
    Thing("football", "26bd", synonyms=("soccer ball",)),
    Thing("basketball", "1f3c0"),
    Thing("teddy bear", "1f9f8", synonyms=("teddy",)),
    Thing("balloon", "1f388", hue=340),
    Thing("guitar", "1f3b8", hue=345, synonyms=("electric guitar",)),
)
THINGS = {thing.name: thing for thing in _ANIMALS + _FOOD + _VEHICLES + _PLANTS + _HOME + _TOOLS_AND_TOYS}
NAMES = tuple(THINGS)
