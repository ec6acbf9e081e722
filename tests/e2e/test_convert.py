"""The converter: every layout it reads, both directions, what it refuses, and the memory it takes."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from tiny_checkpoint import TOKENIZER, tiny_config
from training_common import make_run, numpy_params, tiny_settings

from common import state_dict
from instdiff_jax.checkpoint import folder, pytorch, torch_file
from instdiff_jax.checkpoint.rename import from_state_dict
from instdiff_jax.checkpoint.shapes import ADAPTERS, parameter_shapes
from instdiff_jax.checkpoint.tables import PARTS, rename_table
from instdiff_jax.cli import convert
from instdiff_jax.config import CheckpointSettings, SamplingConfig, ScheduleConfig
from instdiff_jax.errors import InputError
from instdiff_jax.training.start import start_params
from instdiff_jax.training.state import fresh_params
from instdiff_jax.tree import flatten, unflatten

torch = pytest.importorskip("torch")
from make_checkpoint import diffusion_buffers, make_checkpoint  # noqa: E402  (needs torch)

ROOT = Path(__file__).resolve().parent.parent.parent
SMALL = [
    "--config.model.unet.model_channels=64",
    "--config.model.unet.num_heads=4",
    "--config.model.unifusion.mid_dim=256",
    "--config.model.autoencoder.ch=32",
    "--config.model.autoencoder.num_res_blocks=1",
    "--config.model.text_encoder.vocab_size=1024",
    "--config.model.text_encoder.intermediate_size=512",
    "--config.model.text_encoder.num_layers=2",
    f"--config.model.text_encoder.tokenizer={TOKENIZER}",
]

TINY = tiny_config()
TINY_FLAGS = [
    f"--config.model.{group}.{name}={value}" for group, sizes in TINY.to_dict().items() for name, value in sizes.items()
]


def run(*argv) -> None:
    """The command line, in this process."""
    with mock.patch.object(sys, "argv", ["convert", *map(str, argv)]):
        convert.main()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A released checkpoint of the small size with EMA weights, and the folder converted from it."""
    directory = tmp_path_factory.mktemp("small")
    torch.save(make_checkpoint("small", seed=0, ema_seed=1), directory / "small.pth")
    run("--input", directory / "small.pth", "--output", directory / "folder", *SMALL)
    return directory


def tiny_state(seed: int = 0) -> dict[str, dict[str, np.ndarray]]:
    random = np.random.default_rng(seed)
    return {
        part: {
            key: random.standard_normal(entry.torch_shape).astype(np.float32)
            for key, entry in rename_table(part, TINY).items()
        }
        for part in PARTS
    }


def adapters_of(state):
    table = rename_table("model", TINY)
    return {key: value for key, value in state["model"].items() if table[key].group in ADAPTERS}


def sd_file(state, path, wrap=True, extra=()):
    """Stable Diffusion 1.5's own layout, without adapters."""
    adapters = adapters_of(state)
    base = {f"model.diffusion_model.{k}": v for k, v in state["model"].items() if k not in adapters}
    base.update({f"first_stage_model.{k}": v for k, v in state["autoencoder"].items()})
    base.update({f"cond_stage_model.{k}": v for k, v in state["text_encoder"].items()})
    tensors = {key: torch.from_numpy(value) for key, value in base.items()}
    tensors.update(diffusion_buffers())
    tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    tensors["model_ema.decay"] = torch.tensor(0.9999)
    tensors["model_ema.diffusion_modeltime_embed0weight"] = torch.zeros(3)
    tensors.update(extra)
    torch.save({"state_dict": tensors, "global_step": 1, "callbacks": {}} if wrap else tensors, path)
    return path


def port_files(state, directory):
    """Adapter files in the layout of the ComfyUI port."""
    fusers = {"input_blocks": {}, "middle_block": {}, "output_blocks": {}}
    scaleu, positionnet = {}, {}
    for key, value in adapters_of(state).items():
        value = torch.from_numpy(value)
        if ".fuser." in key:
            block, name = key.split(".transformer_blocks.0.fuser.")
            group, index = block.split(".")[:2]
            entry = fusers[group].setdefault(index, {"params": {"n_heads": 2, "d_head": 16, "context_dim": 48}})
            entry.setdefault("state", {})[name] = value
        elif key.startswith("scaleu_"):
            name, index = key.rsplit("_", 1)
            scaleu.setdefault(index, {})[name] = value
        else:
            positionnet[key.removeprefix("position_net.")] = value
    files = {"fusers": fusers, "position_net": positionnet, "scaleu": scaleu}
    for name, content in files.items():
        torch.save(content, directory / f"{name}.ckpt")
    return [directory / f"{name}.ckpt" for name in files]


def assert_params(params, state, absent=()):
    expected = {}
    for part in PARTS:
        known = rename_table(part, TINY, absent)
        chosen = {key: value for key, value in state[part].items() if key in known}
        expected.update(from_state_dict(part, chosen, TINY, absent))
    found, expected = flatten(params), flatten(expected)
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        assert np.array_equal(found[path], value), path


def run_and_fail(capsys, *argv) -> str:
    with pytest.raises(SystemExit) as end:
        run(*argv)
    assert end.value.code == 2
    return capsys.readouterr().err


def test_ema_weights_are_taken(small):
    params = folder.restore_params(small / "folder", as_numpy=True)
    expected = from_state_dict("model", state_dict("unet_small", seed=1), folder.read_config(small / "folder")[0])
    expected.update(
        from_state_dict("text_encoder", state_dict("text_encoder_small"), folder.read_config(small / "folder")[0])
    )
    params, expected = flatten(params), flatten(expected)
    assert all(np.array_equal(params[path], value) for path, value in expected.items())


def test_round_trip_to_pth(small):
    run("--input", small / "folder", "--to_pytorch", small / "back.pth")
    original = torch.load(small / "small.pth", mmap=True)
    original["model"] = original["ema"]
    del original["text_encoder"]["transformer.text_model.embeddings.position_ids"]
    back = torch.load(small / "back.pth", mmap=True, weights_only=True)
    assert list(back) == [*PARTS, "diffusion"]
    for part, group in back.items():
        assert group.keys() == original[part].keys()
        for key, value in group.items():
            assert value.dtype == original[part][key].dtype and value.is_contiguous(), key
            if part == "diffusion":
                torch.testing.assert_close(value, original[part][key], rtol=1e-6, atol=0)
            else:
                assert torch.equal(value, original[part][key]), key


def test_both_ways_without_torch(tmp_path):
    state = tiny_state()
    torch.save(
        {part: {k: torch.from_numpy(v) for k, v in group.items()} for part, group in state.items()}, tmp_path / "x.pth"
    )
    code = f"""
import os, sys
sys.modules["torch"] = None
from instdiff_jax.cli import convert
def run(*arguments):
    sys.argv = ["convert", *arguments]
    convert.main()
os.chdir({str(tmp_path)!r})
run("--input", "x.pth", "--output", "a", *{TINY_FLAGS!r})
run("--input", "a", "--to_pytorch", "a.safetensors")
run("--input", "a.safetensors", "--output", "b", *{TINY_FLAGS!r})
run("--input", "a", "--to_pytorch", "a.pth")
"""
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "writing .pth needs torch" in done.stderr and not (tmp_path / "a.pth").exists()
    for name in "ab":
        assert_params(folder.restore_params(tmp_path / name, as_numpy=True), state)
    content = torch_file.read_file(tmp_path / "a.safetensors")
    assert content["diffusion.betas"].shape == (1000,)
    for part, group in state.items():
        for key, value in group.items():
            found = content[f"{part}.{key}"]
            assert found.dtype == value.dtype and np.array_equal(found, value), key


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, capsys):
    sd_file(tiny_state(), tmp_path / "sd.ckpt")
    (tmp_path / "file").write_text("")
    error = run_and_fail(capsys, "--input", tmp_path / "sd.ckpt", "--output", tmp_path / "file" / "x", *TINY_FLAGS)
    assert "cannot be written" in error and error.count("\n") == 1


def test_sizes_that_do_not_match_name_key_and_shapes_and_write_nothing(small, capsys):
    arguments = ["--input", small / "small.pth", "--output", small / "wrong", *SMALL]
    error = run_and_fail(capsys, *arguments, "--config.model.unet.model_channels=96")
    assert "time_embed.0.weight (file [256, 64], config [384, 96])" in error and error.count("\n") == 1
    assert not (small / "wrong").exists() and not list(small.glob(".*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "nowhere.pth", "--output", "{new}"], "nowhere.pth"),
        (["--input", "{file}", "--output", "{new}", "--config.model.text_encoder.tokenizer=no/such"], "tokenizer"),
        (["--input", "{file}"], "--output or --to_pytorch"),
        (["--input", "{file}", "--output", "{folder}"], "--overwrite"),
        (["--input", "{file}", "--to_pytorch", "{new}.pth"], "config.json"),
        (["--input", "{folder}", "--to_pytorch", "{new}.bin"], ".pth or .safetensors"),
        (["--input", "{file}", "--output", "{new}", "--surprise"], "--surprise"),
    ],
)
def test_wrong_arguments(small, capsys, arguments, message):
    names = {"file": small / "small.pth", "folder": small / "folder", "new": small / "new"}
    assert message in run_and_fail(capsys, *SMALL, *(argument.format(**names) for argument in arguments))
    assert not (small / "new").exists()


def test_missing_extra_and_misshaped_keys(tmp_path):
    state = tiny_state()
    del state["autoencoder"]["quant_conv.bias"]
    state["autoencoder"]["surprise"] = np.zeros(2, np.float32)
    state["autoencoder"]["post_quant_conv.bias"] = np.zeros(7, np.float32)
    flat = {f"{part}.{key}": value for part, group in state.items() for key, value in group.items()}
    torch_file.write_safetensors(tmp_path / "x.safetensors", flat)
    with pytest.raises(InputError) as error:
        pytorch.load_pytorch([tmp_path / "x.safetensors"], TINY)
    for text in ("x.safetensors", "missing: quant_conv.bias", "extra: surprise", "post_quant_conv.bias (file [7], "):
        assert text in str(error.value)


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
        key.removeprefix(pytorch.TRUNK_PREFIX): torch.from_numpy(value)
        for key, value in state["model"].items()
        if key.startswith(pytorch.TRUNK_PREFIX)
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
        if key.startswith(pytorch.TRUNK_PREFIX):
            base["model"][key] = value
    assert_params(unflatten({path: leaf for path, leaf in found.items() if path in held}), base, absent)
    trunk = {path[2:]: leaf for path, leaf in flatten(trainable).items() if path[:2] == ("unifusion", "trunk")}
    stem = convnext["model"][f"{pytorch.TRUNK_PREFIX}downsample_layers.0.0.weight"]
    np.testing.assert_array_equal(trunk["downsample_0_conv", "kernel"], stem.transpose(2, 3, 1, 0))

    assert found.keys() == flatten(parameter_shapes(model)).keys()
    rest = found.keys() - held.keys()
    fresh = flatten(fresh_params(layout, tiny_settings().seed, rest)[0])
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


MEASURE = """
import sys, threading, time
from instdiff_jax.cli import convert
peak = 0
def watch():
    global peak
    while True:
        lines = open("/proc/self/status").read().splitlines()
        peak = max(peak, next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")))
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
convert.main()
print("peak", peak * 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_of_a_conversion(tmp_path):
    """Peak anonymous memory of the whole run is at most 1.5 times the parameters, with EMA weights beside them."""
    flags = [*SMALL, "--config.model.unet.model_channels=96", "--config.model.unifusion.mid_dim=512"]
    with mock.patch.object(sys, "argv", ["convert", *flags]):
        config, _ = convert.read_config(flags, CheckpointSettings)
    model = convert.ModelConfig.from_dict(config.model.to_dict())
    noise = torch.randn(40_000_000)
    checkpoint, size = {}, 0
    for part in PARTS:
        shapes = {key: entry.torch_shape for key, entry in rename_table(part, model).items()}
        # Clones, so that each has a storage of its own, as in a real file.
        checkpoint[part] = {key: noise[: int(np.prod(shape))].reshape(shape).clone() for key, shape in shapes.items()}
        size += sum(4 * value.numel() for value in checkpoint[part].values())
    checkpoint["ema"] = {key: value + 1 for key, value in checkpoint["model"].items()}
    torch.save(checkpoint, tmp_path / "x.pth")
    del checkpoint
    command = [sys.executable, "-c", MEASURE, "--input", tmp_path / "x.pth", "--output", tmp_path / "folder", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    peak = int(done.stdout.split("peak")[1])
    assert size > 500e6
    assert peak <= 1.5 * size, f"{peak / 1e9:.2f} GB for {size / 1e9:.2f} GB"
    print(f"{peak / size:.2f} of {size / 1e9:.2f} GB")
