"""The converter: every layout it reads, both directions, what it refuses, and the memory it takes."""

import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from convert_cases import TINY, TINY_FLAGS, assert_params, run, run_and_fail, sd_file, tiny_state
from tiny_checkpoint import TOKENIZER

from common import state_dict
from instdiff_jax.checkpoint import folder, pytorch, torch_file
from instdiff_jax.checkpoint.rename import from_state_dict
from instdiff_jax.checkpoint.tables import PARTS, rename_table
from instdiff_jax.cli import convert
from instdiff_jax.config import CheckpointSettings
from instdiff_jax.errors import InputError
from instdiff_jax.tree import flatten

torch = pytest.importorskip("torch")
from make_checkpoint import make_checkpoint  # noqa: E402  (needs torch)

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


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A released checkpoint of the small size with EMA weights, and the folder converted from it."""
    directory = tmp_path_factory.mktemp("small")
    torch.save(make_checkpoint("small", seed=0, ema_seed=1), directory / "small.pth")
    run("--input", directory / "small.pth", "--output", directory / "folder", *SMALL)
    return directory


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
        (["--input", "{file}"], "give one of --output, --to_pytorch and --to_diffusers"),
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
