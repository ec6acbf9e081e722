"""The detector of things: its network's maps, and bad flags."""

import functools

import jax
import jax.numpy as jnp
import pytest

from projects.common.segmentation_network import SegmentationNetwork, enlarge, init_params
from projects.stickers.things import NAMES
from projects.stickers.train_segmenter import CONFIG, main


def test_the_network_maps_every_thing_and_colour():
    params = jax.eval_shape(functools.partial(init_params, CONFIG), jax.eval_shape(lambda: jax.random.key(0)))
    image = jax.ShapeDtypeStruct((2, 128, 128, 3), jnp.float32)
    maps, features = jax.eval_shape(SegmentationNetwork(CONFIG).apply, {"params": params}, image)
    # One pixel of the maps stands for 2x2 of the image; detections have masks of the image's size.
    assert maps.category.shape == (2, 64, 64, len(NAMES) + 1) and maps.centre.shape[-1] == len(NAMES)
    assert [part.shape[-1] for part in maps.attributes] == [8] and maps.offset.shape[-1] == 2
    whole = jax.eval_shape(functools.partial(enlarge, size=(128, 128)), maps)
    assert whole.category.shape == (2, 128, 128, len(NAMES) + 1) and whole.offset.shape == (2, 128, 128, 2)
    assert features.shape == (2, 128)


@pytest.mark.parametrize(
    "flags, message",
    [
        ((), "--assets"),
        (("--assets", "nowhere"), "--assets: nowhere/1f427.webp: missing"),
        (("--assets", "nowhere", "--size", "40"), "--size: expected a multiple of 16 pixels, got 40"),
    ],
)
def test_bad_flags_are_one_line(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--output", str(tmp_path / "out"), *flags])
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
