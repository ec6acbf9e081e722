"""Diffusers folders in both directions: every file layout, and networks equal to diffusers' own."""

import json
import shutil

import numpy as np
import pytest
from convert_cases import TINY, TINY_FLAGS, adapters_of, run, run_and_fail, tiny_state
from tiny_checkpoint import TOKENIZER

from common import relative_error
from instdiff_jax.checkpoint import folder, pytorch, torch_file
from instdiff_jax.checkpoint import run as runs
from instdiff_jax.checkpoint.diffusers import diffusers_table
from instdiff_jax.checkpoint.rename import to_state_dict
from instdiff_jax.checkpoint.shapes import ADAPTERS, parameter_shapes
from instdiff_jax.checkpoint.tables import rename_table
from instdiff_jax.cli import export
from instdiff_jax.config import SamplingConfig
from instdiff_jax.errors import InputError
from instdiff_jax.tree import flatten, unflatten

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
from diffusers_cases import our_outputs, save_pipeline, their_outputs, tiny_pipeline  # noqa: E402  (needs diffusers)

SIZES = [flag for flag in TINY_FLAGS if "tokenizer" not in flag]


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def saved(pipeline, tmp_path_factory):
    return save_pipeline(pipeline, tmp_path_factory.mktemp("saved") / "pipeline")


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def assert_same(params, expected):
    params, expected = flatten(params), flatten(expected)
    assert params.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(params[path], value)


def edit(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_networks_equal_diffusers(pipeline, saved, tmp_path):
    run("--input", saved, "--output", tmp_path / "ours", *SIZES)
    config, _, absent = folder.read_config(tmp_path / "ours")
    assert absent == ADAPTERS
    assert (tmp_path / "ours" / "tokenizer" / "tokenizer.json").is_file()
    theirs, ours = their_outputs(pipeline), our_outputs(folder.restore_params(tmp_path / "ours"), config)
    assert {name: relative_error(ours[name], theirs[name]) <= 2e-5 for name in theirs} == dict.fromkeys(theirs, True)


def test_every_layout_of_files(pipeline, saved, tmp_path):
    expected, _ = pytorch.load_pytorch([saved], TINY)
    sharded = save_pipeline(pipeline, tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((sharded / "unet").glob("*.safetensors"))) > 2
    assert_same(pytorch.load_pytorch([sharded], TINY)[0], expected)
    pickled = save_pipeline(pipeline, tmp_path / "pickled", safe_serialization=False)
    state = pipeline.text_encoder.state_dict()
    (pickled / "text_encoder" / "model.safetensors").unlink(missing_ok=True)
    torch.save({f"text_model.{key}": value for key, value in state.items()}, pickled / "text_encoder/pytorch_model.bin")
    assert not list(pickled.rglob("*.safetensors"))
    assert_same(pytorch.load_pytorch([pickled], TINY)[0], expected)
    half = save_pipeline(tiny_pipeline().to(torch.float16), tmp_path / "half", variant="fp16")
    assert (half / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    found = flatten(pytorch.load_pytorch([half], TINY)[0])
    for path, value in flatten(expected).items():
        np.testing.assert_array_equal(found[path], value.astype(np.float16))
    (sharded / "unet" / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink(missing_ok=True)
    next(iter(sorted((sharded / "unet").glob("*.safetensors")))).unlink(missing_ok=True)
    with pytest.raises(InputError, match=r"missing; diffusion_pytorch_model.safetensors.index.json lists it"):
        pytorch.load_pytorch([sharded], TINY)


def test_a_name_in_the_hubs_cache(saved, tmp_path, monkeypatch):
    from huggingface_hub import constants

    snapshot = tmp_path / "models--me--dreamy" / "snapshots" / "abc"
    shutil.copytree(saved, snapshot)
    (tmp_path / "models--me--dreamy" / "refs").mkdir()
    (tmp_path / "models--me--dreamy" / "refs" / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert_same(pytorch.load_pytorch(["me/dreamy"], TINY)[0], pytorch.load_pytorch([saved], TINY)[0])
    with pytest.raises(InputError, match="me/other: no such file or folder, and no such name in the hub's local cache"):
        pytorch.load_pytorch(["me/other"], TINY)


def test_the_port_of_instancediffusion(saved, copy, caplog):
    """Its adapters are in the UNet, and its scheduler's file names betas that the model does not have."""
    released = tiny_state()
    path = copy / "unet" / "diffusion_pytorch_model.safetensors"
    table = {key: name for name, (key, _) in diffusers_table("model", TINY).items()}
    adapters = {table[key]: value for key, value in adapters_of(released).items()}
    assert "down_blocks.0.attentions.0.transformer_blocks.0.fuser.attn.to_q.weight" in adapters
    assert {"scaleu_b_0", "scaleu_s_3", "position_net.null_positive_feature"} <= adapters.keys()
    torch_file.write_safetensors(path, torch_file.read_file(path) | adapters)
    edit(copy / "scheduler" / "scheduler_config.json", beta_schedule="linear")
    params, absent = pytorch.load_pytorch([copy], TINY)
    assert absent == () and "scaled_linear is" in caplog.text
    base, _ = pytorch.load_pytorch([saved], TINY)
    expected = flatten(base)
    for key, value in adapters_of(released).items():
        entry = rename_table("model", TINY)[key]
        expected[entry.path] = entry.to_ours(value)
    assert {path: np.array_equal(leaf, expected[path]) for path, leaf in flatten(params).items()} == dict.fromkeys(
        expected, True
    )


def test_adapters_of_a_checkpoint_folder_on_another_base(saved, tmp_path):
    random = np.random.default_rng(0)
    shapes = parameter_shapes(TINY)
    mine = {path: random.standard_normal(shape).astype(np.float32) for path, shape in flatten(shapes).items()}
    folder.save_folder(tmp_path / "mine", unflatten(mine), TINY, SamplingConfig(), TOKENIZER)
    params, absent = pytorch.load_pytorch([saved, tmp_path / "mine"], TINY)
    assert absent == ()
    expected = mine | flatten(pytorch.load_pytorch([saved], TINY)[0])
    assert_same(params, unflatten(expected))


def test_back_to_diffusers(saved, tmp_path):
    """diffusers loads what we write, and its networks are ours; the adapters come back."""
    base, _ = pytorch.load_pytorch([saved], TINY)
    adapters = adapters_of(tiny_state())
    torch_file.write_safetensors(tmp_path / "adapters.safetensors", adapters)
    run("--input", saved, "--input", tmp_path / "adapters.safetensors", "--output", tmp_path / "ours", *SIZES)
    run("--input", tmp_path / "ours", "--to_diffusers", tmp_path / "back")
    back = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "back")
    assert back.scheduler.config.beta_schedule == "scaled_linear"
    theirs, ours = their_outputs(back), our_outputs(base)
    assert {name: relative_error(ours[name], theirs[name]) <= 2e-5 for name in theirs} == dict.fromkeys(theirs, True)
    params, absent = pytorch.load_pytorch([tmp_path / "back"], TINY)
    assert absent == ()
    assert_same(params, folder.restore_params(tmp_path / "ours", as_numpy=True))


def test_another_vae(saved, tmp_path):
    other = tiny_pipeline(seed=10)
    other.vae.save_pretrained(tmp_path / "vae")
    expected, _ = pytorch.load_pytorch([save_pipeline(other, tmp_path / "other")], TINY)
    single = {key: value for key, value in to_state_dict("autoencoder", expected, TINY).items()}
    torch_file.write_safetensors(tmp_path / "ldm.safetensors", single)
    whole = {f"first_stage_model.{key}": value for key, value in single.items()}
    torch_file.write_safetensors(tmp_path / "whole.safetensors", whole)
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    old = {
        key.replace("to_q", "query").replace("to_k", "key").replace("to_v", "value").replace("to_out.0", "proj_attn"): v
        for key, v in torch_file.read_file(file).items()
    }
    torch_file.write_safetensors(tmp_path / "old.safetensors", old)
    for name in ("vae", "other", "ldm.safetensors", "whole.safetensors", "old.safetensors", file):
        params, _ = pytorch.load_pytorch([saved], TINY, vae=tmp_path / name)
        assert_same(params["autoencoder"], expected["autoencoder"])
        assert not np.array_equal(params["unet"]["conv_in"]["kernel"], expected["unet"]["conv_in"]["kernel"])
    torch_file.write_safetensors(tmp_path / "none.safetensors", {"x": np.zeros(1, np.float32)})
    with pytest.raises(InputError, match="none.safetensors: not a VAE: no decoder.conv_in.weight"):
        pytorch.load_pytorch([saved], TINY, vae=tmp_path / "none.safetensors")


def test_a_run_is_exported_to_diffusers(saved, tmp_path, monkeypatch, capsys):
    params, _ = pytorch.load_pytorch([saved], TINY)
    loaded = TINY, SamplingConfig(), params, 7
    monkeypatch.setattr(runs, "read_run", lambda workdir: runs.RunConfig(*loaded[:2], {}))
    monkeypatch.setattr(runs, "run_tokenizer", lambda workdir: TOKENIZER)
    monkeypatch.setattr(runs, "load_run", lambda workdir, step: loaded)
    export.main(["--workdir", str(tmp_path / "run"), "--to_diffusers", str(tmp_path / "theirs")])
    assert f"wrote {tmp_path / 'theirs'}: the averaged parameters of step 7" in capsys.readouterr().out
    assert_same(pytorch.load_pytorch([tmp_path / "theirs"], TINY)[0], params)
    diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "theirs" / "unet")
    for flags in ([], ["--output", "a", "--to_diffusers", "b"]):
        with pytest.raises(SystemExit) as stop:
            export.main(["--workdir", str(tmp_path / "run"), *flags])
        assert stop.value.code == 2 and "give one of --output and --to_diffusers" in capsys.readouterr().err


def test_a_folder_that_predicts_v(saved, copy, tmp_path):
    edit(copy / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    run("--input", copy, "--output", tmp_path / "ours", *SIZES)
    config, _, _ = folder.read_config(tmp_path / "ours")
    assert config.schedule.prediction == "v"
    run("--input", tmp_path / "ours", "--to_diffusers", tmp_path / "back")
    written = json.loads((tmp_path / "back" / "scheduler" / "scheduler_config.json").read_text())
    assert written["prediction_type"] == "v_prediction"
    assert_same(pytorch.load_pytorch([tmp_path / "back"], config)[0], pytorch.load_pytorch([copy], config)[0])
    with pytest.raises(InputError, match="an epsilon model, expected config.model.schedule.prediction v"):
        pytorch.load_pytorch([saved], config)


FOLDERS = {
    "SDXL \\(StableDiffusionXLPipeline\\)": ("model_index.json", dict(_class_name="StableDiffusionXLPipeline")),
    "an inpainting model \\(9 channels\\)": ("unet/config.json", dict(in_channels=9)),
    "Stable Diffusion 2": ("unet/config.json", dict(cross_attention_dim=1024)),
    "a v-prediction model": ("scheduler/scheduler_config.json", dict(prediction_type="v_prediction")),
    "a 'sample' model": ("scheduler/scheduler_config.json", dict(prediction_type="sample")),
    "rescale_betas_zero_snr: expected false": ("scheduler/scheduler_config.json", dict(rescale_betas_zero_snr=True)),
    "attention_head_dim: expected 2, got 4": ("unet/config.json", dict(attention_head_dim=4)),
    "hidden_act: expected 'quick_gelu', got 'gelu'": ("text_encoder/config.json", dict(hidden_act="gelu")),
    "scaling_factor: expected 0.18215, got 0.13025": ("vae/config.json", dict(scaling_factor=0.13025)),
    "beta_end: expected config.model.schedule's 0.012": ("scheduler/scheduler_config.json", dict(beta_end=0.02)),
}


@pytest.mark.parametrize("expected", FOLDERS)
def test_another_model_is_named(copy, expected):
    file, values = FOLDERS[expected]
    edit(copy / file, **values)
    with pytest.raises(InputError, match=expected):
        pytorch.load_pytorch([copy], TINY)


def test_what_is_missing_is_named(copy, tmp_path, capsys):
    (copy / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    error = run_and_fail(capsys, "--input", copy, "--output", tmp_path / "out", *SIZES)
    assert "unet: expected diffusion_pytorch_model.safetensors or diffusion_pytorch_model.bin, found config" in error
    assert not (tmp_path / "out").exists()
    (tmp_path / "empty").mkdir()
    error = run_and_fail(capsys, "--input", tmp_path / "empty", "--output", tmp_path / "out", *TINY_FLAGS)
    assert "empty: neither a diffusers folder (model_index.json, unet/) nor a checkpoint folder" in error
