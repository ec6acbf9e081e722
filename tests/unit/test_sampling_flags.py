"""Every sampling setting has a flag, in both programs that sample; what presets are, and that flags go before them."""

import dataclasses
import hashlib

import pytest

from instdiff_jax.cli import evaluate, sample
from instdiff_jax.cli.sampling_flags import read_overrides, read_picture_flags
from instdiff_jax.config import ModelConfig, SamplingConfig
from instdiff_jax.diffusion.rows import ImageRows
from instdiff_jax.errors import InputError
from instdiff_jax.sampling.presets import PRESETS, with_preset
from instdiff_jax.sampling.request import SamplingOptions, make_request

VALUES = dict(
    steps=7,
    sampler="ddim",
    sigmas="trailing",
    guidance_scale=3.5,
    guidance_interval=(0.1, 0.8),
    alpha=(0.5, 0.25, 0.25),
    mis=0.2,
    mis_guidance=False,
    merge="crop",
    negative_prompt="ugly",
    prompt_weights=True,
    long_prompts=True,
    masked_attention="correct",
    reuse=3,
)
PROGRAMS = {
    "sample": sample.parse_args,
    "evaluate": lambda argv: evaluate.parse_args(["--coco_dir", "x", "--split", "y", "--output", "z", *argv]),
}


def flags(values: dict) -> list[str]:
    """Values as they are written on a command line."""
    argv = []
    for name, value in values.items():
        if isinstance(value, bool):
            argv.append(f"--{name}" if value else f"--no-{name}")
        else:
            argv += [f"--{name}", ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return argv


@pytest.mark.parametrize("parse", PROGRAMS.values(), ids=PROGRAMS)
def test_every_setting_has_a_flag(parse):
    assert set(VALUES) == {field.name for field in dataclasses.fields(SamplingConfig)}
    overrides = read_overrides(parse(flags(VALUES)))
    assert overrides == VALUES
    assert SamplingConfig.from_dict(overrides) == SamplingConfig(**VALUES) != SamplingConfig()
    assert read_overrides(parse([])) == {}
    assert read_overrides(parse(["--mis_guidance"])) == {"mis_guidance": True}


@pytest.mark.parametrize("parse", PROGRAMS.values(), ids=PROGRAMS)
def test_flags_go_before_a_preset(parse):
    assert read_overrides(parse(["--preset", "quality"])) == {}
    assert read_overrides(parse(["--preset", "fast"])) == PRESETS["fast"]
    given = read_overrides(parse(["--preset", "fast", "--steps", "12", "--mis_guidance", "--mis", "0.1"]))
    assert given == PRESETS["fast"] | {"steps": 12, "mis_guidance": True, "mis": 0.1}
    assert PRESETS["fast"]["steps"] != 12, "the table is not changed"


def test_presets_are_valid_settings():
    for name, values in PRESETS.items():
        SamplingConfig.from_dict(values, name)
        assert with_preset(name, {}) == values
    assert with_preset(None, {"steps": 3}) == {"steps": 3}


def test_turbo_is_eight_steps_of_lcm():
    settings = SamplingConfig.from_dict(with_preset("turbo", {}))
    assert (settings.sampler, settings.steps, settings.guidance_scale) == ("lcm", 8, 1.5)
    request = make_request(ModelConfig(), settings, SamplingOptions())
    assert request.plan.table.steps == request.plan.table.evaluations == 8
    assert request.plan.table.coefficients.timestep[0] == 999
    images = [ImageRows(0, 1), ImageRows(0, 1, (2, 3, 4))]
    # MIS takes 2 of the steps; guidance is on, so each row has two entries.
    assert request.plan.settings.mis_steps == 2
    assert request.plan.evaluations(images) == 2 * (8 + 8 + 2 * 3)
    tcd = make_request(
        ModelConfig(), SamplingConfig.from_dict(with_preset("turbo", dict(sampler="tcd"))), SamplingOptions()
    )
    assert tcd.plan.table.evaluations == 8


def test_an_unknown_preset_is_named():
    with pytest.raises(InputError, match="preset: expected one of quality, fast, turbo, got 'slow'"):
        with_preset("slow", {})


def test_flags_of_pictures_are_in_the_record(tmp_path):
    file = tmp_path / "x.safetensors"
    file.write_bytes(b"weights")
    parse = PROGRAMS["sample"]
    assert read_picture_flags(parse([])) == {}
    found = read_picture_flags(parse(["--taesd", str(file), "--tile", "512", "--upscale", "2", "--refiner", str(file)]))
    fingerprint = hashlib.sha256(b"weights").hexdigest()[:32]
    assert found == {
        "taesd": [{"file": str(file), "fingerprint": fingerprint}],
        "tile": [{"pixels": 512}],
        "upscale": [{"factor": 2.0, "strength": 0.4}],
        "refiner": [{"file": str(file), "fingerprint": fingerprint, "strength": 0.35}],
    }
    for flag, needed in (("upscale_strength", "upscale"), ("cascade_strength", "refiner")):
        with pytest.raises(InputError, match=f"--{flag}: only means something with --{needed}"):
            read_picture_flags(parse([f"--{flag}", "0.5"]))
    with pytest.raises(InputError, match="none.safetensors: cannot be read"):
        read_picture_flags(parse(["--taesd", str(tmp_path / "none.safetensors")]))
