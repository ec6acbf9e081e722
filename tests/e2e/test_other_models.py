"""Single files as found in the wild: extra keys, and other models, which are named in one line."""

import dataclasses

import numpy as np
import pytest
from convert_cases import TINY, TINY_FLAGS, assert_params, run_and_fail, sd_file, tiny_state

from instdiff_jax.checkpoint import pytorch, torch_file
from instdiff_jax.checkpoint.shapes import ADAPTERS
from instdiff_jax.errors import InputError

torch = pytest.importorskip("torch")
FINAL_NORM = "cond_stage_model.transformer.text_model.final_layer_norm.bias"
SHORT = FINAL_NORM.replace("text_model.", "")


def test_extra_keys_are_listed_and_dropped_only_if_asked(tmp_path, caplog):
    state = tiny_state()
    extra = {"embedding_manager.x": torch.zeros(3), "model.diffusion_model.extra.weight": torch.zeros(3)}
    extra[SHORT] = torch.from_numpy(state["text_encoder"]["transformer.text_model.final_layer_norm.bias"])
    path = sd_file(state, tmp_path / "merged.ckpt", extra=extra)
    with pytest.raises(InputError, match="are one tensor"):
        pytorch.load_pytorch([path], TINY)
    params, absent = pytorch.load_pytorch([path], TINY, ignore_extra=True)
    assert_params(params, state, absent)
    assert absent == ADAPTERS and "3 extra keys dropped" in caplog.text
    assert all(key in caplog.text for key in ("embedding_manager.x", SHORT, "model: extra.weight"))


def test_a_file_that_predicts_v_is_taken_if_asked(tmp_path):
    state = tiny_state()
    path = sd_file(state, tmp_path / "v.ckpt", extra={"v_pred": torch.zeros(0)})
    with pytest.raises(InputError, match="a v-prediction model"):
        pytorch.load_pytorch([path], TINY)
    predicts_v = dataclasses.replace(TINY, schedule=dataclasses.replace(TINY.schedule, prediction="v"))
    params, absent = pytorch.load_pytorch([path], predicts_v)
    assert_params(params, state, absent)


def test_two_text_encoders_and_missing_keys_stay_errors(tmp_path):
    state = tiny_state()
    path = sd_file(state, tmp_path / "a.ckpt", extra={SHORT: torch.ones(TINY.text_encoder.hidden_size)})
    with pytest.raises(InputError, match="differ: two text encoders, expected one"):
        pytorch.load_pytorch([path], TINY, ignore_extra=True)
    del state["model"]["out.2.bias"]
    with pytest.raises(InputError, match=r"1 missing: out\.2\.bias"):
        pytorch.load_pytorch([sd_file(state, tmp_path / "b.ckpt")], TINY, ignore_extra=True)


def test_the_text_encoder_under_newer_names(tmp_path):
    state = tiny_state()
    content = torch.load(sd_file(state, tmp_path / "a.ckpt", wrap=False))
    torch.save({key.replace("text_model.", ""): value for key, value in content.items()}, tmp_path / "b.ckpt")
    assert_params(pytorch.load_pytorch([tmp_path / "b.ckpt"], TINY)[0], state, ADAPTERS)


UNET = "model.diffusion_model"
TO_K = f"{UNET}.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
OTHERS = {
    "SDXL": {"conditioner.embedders.0.x": (1,), f"{UNET}.out.2.bias": (4,)},
    "Stable Diffusion 2": {"cond_stage_model.model.ln_final.bias": (1,), f"{UNET}.out.2.bias": (4,)},
    "Stable Diffusion 2, expected": {TO_K: (32, 1024)},
    "Stable Diffusion 3": {f"{UNET}.joint_blocks.0.x": (1,)},
    "Flux": {"double_blocks.0.img_attn.proj.bias": (1,)},
    "a v-prediction model": {"v_pred": (1,), f"{UNET}.out.2.bias": (4,)},
    "an inpainting model (9 channels)": {f"{UNET}.input_blocks.0.0.weight": (32, 9, 3, 3)},
    "InstructPix2Pix (8 channels)": {f"{UNET}.input_blocks.0.0.weight": (32, 8, 3, 3)},
    "a LoRA; give": {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": (2, 32)},
    "a LoRA; give the model": {"unet.mid_block.attentions.0.proj_in.lora_A.weight": (2, 32)},
    "a LoRA; give the model it": {"unet.mid_block.attentions.0.proj_in.lora.down.weight": (2, 32)},
    "a LoRA; give the model it belongs": {"unet.a.processor.to_q_lora.down.weight": (2, 32)},
    "a textual inversion embedding": {"emb_params": (2, 768)},
    "a ControlNet": {"control_model.time_embed.0.bias": (1,)},
    "the UNet of a diffusers folder alone": {"down_blocks.0.resnets.0.conv1.bias": (1,)},
    "a text encoder alone": {"text_model.final_layer_norm.bias": (1,)},
    "a VAE; give it as --vae": {"decoder.conv_in.bias": (1,)},
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_model_is_named(name, tmp_path):
    tensors = {key: np.zeros(shape, np.float32) for key, shape in OTHERS[name].items()}
    torch_file.write_safetensors(tmp_path / "x.safetensors", tensors)
    with pytest.raises(InputError) as error:
        pytorch.load_pytorch([tmp_path / "x.safetensors"], TINY)
    assert str(error.value).startswith(f"{tmp_path / 'x.safetensors'}: {name}")
    assert str(error.value).endswith("expected Stable Diffusion 1.5")


def test_a_name_that_is_nowhere(tmp_path, capsys):
    error = run_and_fail(capsys, "--input", tmp_path / "none.ckpt", "--output", tmp_path / "out", *TINY_FLAGS)
    assert "none.ckpt: no such file or folder, and no such name in the hub's local cache" in error
    assert error.count("\n") == 1 and not (tmp_path / "out").exists()
