"""Converting Stable Diffusion bases, adapter files and ConvNeXt, and training from them."""

import dataclasses

import numpy as np
import pytest
from convert_cases import (
    TINY,
    TINY_FLAGS,
    adapters_of,
    assert_params,
    port_files,
    run,
    run_and_fail,
    sd_file,
    tiny_state,
)
from tiny_checkpoint import TOKENIZER
from training_common import make_run, numpy_params, tiny_settings

from instdiff_jax.checkpoint import folder, pytorch, sources, torch_file
from instdiff_jax.checkpoint.shapes import ADAPTERS, parameter_shapes
from instdiff_jax.cli import convert
from instdiff_jax.config import SamplingConfig, ScheduleConfig
from instdiff_jax.errors import InputError
from instdiff_jax.training.start import start_params
from instdiff_jax.training.state import fresh_params
from instdiff_jax.tree import flatten, unflatten

torch = pytest.importorskip("torch")
from make_checkpoint import diffusion_buffers  # noqa: E402  (needs torch)


@pytest.mark.parametrize("wrap", [True, False])
def test_stable_diffusion_alone(tmp_path, wrap):
    state = tiny_state()
    params, absent = pytorch.load_pytorch([sd_file(state, tmp_path / "sd.ckpt", wrap)], TINY)
    assert absent == ADAPTERS
    assert_params(params, state, absent)


def test_stable_diffusion_in_half_precision_safetensors(tmp_path):
    state = tiny_state()
    content = torch_file.read_file(sd_file(state, tmp_path / "sd.ckpt", wrap=False))
    half = {key: value.astype(np.float16) if value.dtype == np.float32 else value for key, value in content.items()}
    torch_file.write_safetensors(tmp_path / "sd.safetensors", half)
    params, _ = pytorch.load_pytorch([tmp_path / "sd.safetensors"], TINY)
    assert {leaf.dtype for leaf in flatten(params).values()} == {np.dtype(np.float16)}


def test_stable_diffusion_with_adapter_files_in_any_order(tmp_path):
    state = tiny_state()
    fusers, positionnet, scaleu = port_files(state, tmp_path)
    base = sd_file(state, tmp_path / "sd.ckpt")
    params, absent = pytorch.load_pytorch([scaleu, base, fusers, positionnet], TINY)
    assert absent == ()
    assert_params(params, state)
    _, absent = pytorch.load_pytorch([base, fusers, scaleu], TINY)
    assert absent == ("unifusion", "trunk")
    with pytest.raises(InputError, match="already given by"):
        pytorch.load_pytorch([base, scaleu, scaleu], TINY)
    other = dataclasses.replace(TINY, unet=dataclasses.replace(TINY.unet, num_heads=4))
    with pytest.raises(InputError, match="2 heads, config 4"):
        pytorch.load_pytorch([base, fusers], other)


def test_another_base_takes_only_the_adapters_of_the_released_file(tmp_path):
    released, other = tiny_state(0), tiny_state(1)
    flat = {f"{part}.{key}": value for part, group in released.items() for key, value in group.items()}
    torch_file.write_safetensors(tmp_path / "released.safetensors", flat)
    base = sd_file(other, tmp_path / "sd.ckpt")
    params, absent = pytorch.load_pytorch([base, tmp_path / "released.safetensors"], TINY)
    other["model"].update(adapters_of(released))
    assert absent == ()
    assert_params(params, other)
    torch_file.write_safetensors(tmp_path / "adapters.safetensors", adapters_of(released))
    params, _ = pytorch.load_pytorch([tmp_path / "adapters.safetensors", base], TINY)
    assert_params(params, other)


def convnext_file(state, path):
    """ImageNet weights as their authors publish them: with the classifier."""
    trunk = {
        key.removeprefix(sources.TRUNK_PREFIX): torch.from_numpy(value)
        for key, value in state["model"].items()
        if key.startswith(sources.TRUNK_PREFIX)
    }
    classifier = {"norm.weight": torch.ones(3), "norm.bias": torch.ones(3), "head.weight": torch.ones(2, 3)}
    torch.save({"model": {**trunk, **classifier}}, path)
    return path


def test_convnext_weights_for_a_base(tmp_path):
    state = tiny_state()
    convnext_file(state, tmp_path / "convnext.pth")
    base = sd_file(state, tmp_path / "sd.ckpt")
    params, absent = pytorch.load_pytorch([base], TINY, tmp_path / "convnext.pth")
    assert absent == ("fusers", "scaleu", "unifusion")
    assert_params(params, state, absent)
    with pytest.raises(InputError, match="already given by"):
        pytorch.load_pytorch([base, *port_files(state, tmp_path)], TINY, tmp_path / "convnext.pth")
    with pytest.raises(InputError, match="not ConvNeXt weights"):
        pytorch.load_pytorch([base], TINY, base)


def test_training_switches_what_is_predicted_only_if_asked(tmp_path):
    params = numpy_params(parameter_shapes(TINY))
    folder.save_folder(tmp_path / "base", params, TINY, SamplingConfig(), TOKENIZER)
    other = dataclasses.replace(TINY, schedule=dataclasses.replace(TINY.schedule, prediction="v"))
    plan, start = make_run(other, tiny_settings()).plan, str(tmp_path / "base")
    with pytest.raises(InputError, match="config.model.schedule.prediction: expected epsilon as in .*base, got v"):
        start_params(plan, other, tiny_settings(start=start))
    trainable, frozen = start_params(plan, other, tiny_settings(start=start, switch_prediction=True))
    np.testing.assert_array_equal(
        (flatten(trainable) | flatten(frozen))["unet", "conv_in", "kernel"], params["unet"]["conv_in"]["kernel"]
    )


def test_training_gives_positions_to_a_model_without_and_does_not_take_them(tmp_path):
    params = numpy_params(parameter_shapes(TINY))
    folder.save_folder(tmp_path / "base", params, TINY, SamplingConfig(), TOKENIZER)
    told = dataclasses.replace(TINY, unet=dataclasses.replace(TINY.unet, positions=True))
    plan = make_run(told, tiny_settings()).plan
    trainable, frozen = start_params(plan, told, tiny_settings(start=str(tmp_path / "base")))
    found = flatten(trainable) | flatten(frozen)
    assert found.keys() == flatten(parameter_shapes(told)).keys()
    assert not found["unet", "position_in", "kernel"].any()
    np.testing.assert_array_equal(found["unet", "conv_in", "kernel"], params["unet"]["conv_in"]["kernel"])

    params["unet"]["position_in"] = {"kernel": np.ones(found["unet", "position_in", "kernel"].shape, np.float32)}
    folder.save_folder(tmp_path / "told", params, told, SamplingConfig(), TOKENIZER)
    with pytest.raises(InputError, match=r"config.model.unet.positions: expected True as in .*told, got False"):
        start_params(make_run(TINY, tiny_settings()).plan, TINY, tiny_settings(start=str(tmp_path / "told")))


def test_training_starts_from_a_base_and_convnext(tmp_path):
    """The trunk's weights are the file's, Stable Diffusion's are its own, and the other adapters are fresh."""
    base, convnext = tiny_state(0), tiny_state(1)
    files = sd_file(base, tmp_path / "sd.ckpt"), convnext_file(convnext, tmp_path / "convnext.pth")
    run("--input", files[0], "--convnext", files[1], "--output", tmp_path / "base", *TINY_FLAGS)
    model, _, absent = folder.read_config(tmp_path / "base")
    assert absent == ("fusers", "scaleu", "unifusion")

    plan = make_run(model, tiny_settings()).plan
    trainable, frozen = start_params(plan, model, tiny_settings(start=str(tmp_path / "base")))
    found = flatten(trainable) | flatten(frozen)
    held = flatten(parameter_shapes(model, absent))
    for key, value in convnext["model"].items():
        if key.startswith(sources.TRUNK_PREFIX):
            base["model"][key] = value
    assert_params(unflatten({path: leaf for path, leaf in found.items() if path in held}), base, absent)
    trunk = {path[2:]: leaf for path, leaf in flatten(trainable).items() if path[:2] == ("unifusion", "trunk")}
    stem = convnext["model"][f"{sources.TRUNK_PREFIX}downsample_layers.0.0.weight"]
    np.testing.assert_array_equal(trunk["downsample_0_conv", "kernel"], stem.transpose(2, 3, 1, 0))

    assert found.keys() == flatten(parameter_shapes(model)).keys()
    rest = found.keys() - held.keys()
    fresh = flatten(fresh_params(plan, tiny_settings().seed, rest)[0])
    assert fresh.keys() == rest < flatten(trainable).keys()
    for path in rest:
        np.testing.assert_array_equal(found[path], fresh[path])
    # The fusers' gates are closed: the first step's prediction is the base's.
    assert all(found[path] == 0 for path in rest if path[-1].startswith("gate_"))


def test_what_is_no_weight_is_refused(tmp_path):
    state = tiny_state()
    base = sd_file(state, tmp_path / "a.ckpt", extra={"model.diffusion_model.out.2.bias": torch.zeros(4).long()})
    with pytest.raises(InputError, match=r"out\.2\.bias: expected a tensor of floats, got int64"):
        pytorch.load_pytorch([base], TINY)
    with pytest.raises(InputError, match="surprise: not a key of Stable Diffusion 1.5"):
        pytorch.load_pytorch([sd_file(state, tmp_path / "b.ckpt", extra={"surprise": torch.zeros(1)})], TINY)
    torch.save({"lora": torch.zeros(2)}, tmp_path / "c.ckpt")
    with pytest.raises(InputError, match="its keys begin with lora"):
        pytorch.load_pytorch([tmp_path / "c.ckpt"], TINY)


def test_another_noise_schedule_is_refused(tmp_path):
    other = dataclasses.replace(TINY, schedule=ScheduleConfig(0.0001, 0.02, 1000))
    with pytest.raises(InputError, match="config.model.schedule"):
        pytorch.load_pytorch([sd_file(tiny_state(), tmp_path / "sd.ckpt")], other)
    ours, theirs = pytorch.schedule_buffers(TINY.schedule), diffusion_buffers()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value.numpy(), rtol=1e-6)


def test_a_base_alone_does_not_go_back(tmp_path, capsys):
    params, absent = pytorch.load_pytorch([sd_file(tiny_state(), tmp_path / "sd.ckpt")], TINY)
    folder.save_folder(tmp_path / "base", params, TINY, convert.SamplingConfig(), TOKENIZER, absent)
    error = run_and_fail(capsys, "--input", tmp_path / "base", "--to_pytorch", tmp_path / "x.safetensors")
    assert "lacks fusers, scaleu, unifusion, trunk" in error


def test_the_canvas_of_a_base_decides_no_tensor(tmp_path):
    params = numpy_params(parameter_shapes(TINY))
    large = dataclasses.replace(TINY, unet=dataclasses.replace(TINY.unet, sample_size=96))
    folder.save_folder(tmp_path / "base", params, large, SamplingConfig(), TOKENIZER)
    found, _ = pytorch.load_pytorch([tmp_path / "base"], TINY)
    np.testing.assert_array_equal(found["unet"]["conv_in"]["kernel"], params["unet"]["conv_in"]["kernel"])


def test_two_spellings_of_one_tensor_are_named(tmp_path):
    state = tiny_state()
    key = "cond_stage_model.transformer.text_model.final_layer_norm.bias"
    short = key.replace("text_model.", "")
    path = sd_file(state, tmp_path / "sd.ckpt", extra={short: torch.ones(TINY.text_encoder.hidden_size)})
    with pytest.raises(InputError, match=f"'{key}' and '{short}' are one tensor"):
        pytorch.load_pytorch([path], TINY)
    _, _, scaleu = port_files(state, tmp_path)
    content = torch.load(scaleu)
    torch.save(content | {int(index): group for index, group in content.items()}, scaleu)
    with pytest.raises(InputError, match=r"\('scaleu_b', '0'\) and \('scaleu_b', 0\) are one tensor"):
        pytorch.load_pytorch([sd_file(state, tmp_path / "sd.ckpt"), scaleu], TINY)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_tensor_that_is_not_finite_is_named(tmp_path, value, dtype, capsys):
    name = "model.diffusion_model.time_embed.0.weight"
    shape = tiny_state()["model"]["time_embed.0.weight"].shape
    bad = torch.ones(shape, dtype=dtype)
    bad[0, -1] = value
    path = sd_file(tiny_state(), tmp_path / "sd.ckpt", extra={name: bad})
    flags = [*TINY_FLAGS, f"--config.model.text_encoder.tokenizer={TOKENIZER}"]
    error = run_and_fail(capsys, "--input", path, "--output", tmp_path / "out", *flags)
    assert "sd.ckpt: model: time_embed.0.weight: holds NaN or infinity" in error
    assert not (tmp_path / "out").exists()
