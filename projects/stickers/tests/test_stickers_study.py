"""The study of things: its tables have colours and no textures, and things without a colour count for no colour."""

import types

import pytest
from made_up_pictures import made_up_pictures, write_made_up_pictures

from instdiff_jax.evaluation.image import EvaluatedImage
from instdiff_jax.evaluation.metrics import TargetMeasure
from projects.common.coco_folder import write_split
from projects.common.study import runs
from projects.common.study.results import make_targets
from projects.common.study.sections import SECTIONS, make_sections
from projects.stickers.scenes import render_scene
from projects.stickers.study import find_subject, main
from projects.stickers.things import THINGS


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    return find_subject(write_made_up_pictures(tmp_path_factory.mktemp("pictures")))


def test_tables_have_colours_and_no_textures(subject):
    sections = make_sections(subject)
    assert list(sections) == list(SECTIONS)
    columns = {column for section in sections.values() for column in section.columns}
    assert {"colour_accuracy", "colour_leak"} < columns and not any("texture" in column for column in columns)
    assert [row.label for row in sections["instances"].rows[::2]] == [str(n) for n in range(1, 9)]
    assert sections["leakage"].text.startswith("Neighbours are the same thing in different colours. Accuracy")
    assert [target.metric for target in make_targets(subject.goals)][:3] == ["box_AP50", "colour_accuracy", "found"]


def test_scenes_are_held_out_and_as_described(subject, tmp_path):
    """Seeds of the training data, its validation and test scenes, and the detector's are below 10."""
    assert not {*range(10)} & {seed for kind in subject.scenes.values() for seed in (kind.seed, kind.reference_seed)}
    for name, kind in subject.scenes.items():
        scene = render_scene(made_up_pictures(), kind.seed, 0, 128, kind.settings)
        if name.startswith("count_"):
            assert len(scene.instances) == int(name.removeprefix("count_"))
        if name == "confusable":
            assert len({item.name for item in scene.instances}) == 1
            assert len({item.colour for item in scene.instances}) == len(scene.instances)
    assert write_split(tmp_path, "held_out", subject.world, (1, 101, 128), subject.scenes["main"].settings)


def test_things_without_a_colour_count_for_no_colour():
    """Of three found things two have colours, of which one is right."""
    targets = tuple(
        types.SimpleNamespace(attributes=attributes) for attributes in ({"colour": "red"}, {}, {"colour": "blue"})
    )
    match = types.SimpleNamespace(attributes={"colour": "red"})
    measures = [TargetMeasure(0.9, None, None, None, match) for _ in targets]
    sums = runs._sums(EvaluatedImage(types.SimpleNamespace(asked=targets), [], measures, None, ()), ["colour"])
    assert (sums["found"], sums["colour_accuracy"], sums["colour_accuracy_of"]) == (3, 1, 2)


def test_bad_input_is_one_line(tmp_path, capsys):
    pictures = write_made_up_pictures(tmp_path / "pictures")
    (pictures / f"{THINGS['penguin'].code}.png").unlink()
    for flags, message in (
        ((), "--assets"),
        (("--assets", str(pictures)), "missing (penguin)"),
        (("--assets", "nowhere", "--count", "1"), "--count: expected a number of at least 2, got 1"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(list(flags))
        assert stop.value.code == 2 and message in capsys.readouterr().err
