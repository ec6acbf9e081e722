"""Names what is not Stable Diffusion 1.5, so that a wrong file is told apart from a damaged one."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from instdiff_jax.config import ModelConfig
from instdiff_jax.errors import InputError, short

# A key of a file -> what the file is.
_BY_KEY = (
    (r"(.*[._])?lora_(A|B|down|up|unet|te|te1|te2)[._].*|.*_lora\.(down|up)\..*|.*\.lora\.(down|up)\..*",
     "a LoRA; give the model it belongs to as --input, and it as --lora"),
    (r"string_to_param|emb_params|<.*>|clip_[lg]", "a textual inversion embedding; give it to sample as --embedding"),
    (r"control_model\..*|controlnet_cond_embedding\..*|control_net\..*", "a ControlNet"),
    (r"(conditioner\.embedders\.|add_embedding\.|model\.diffusion_model\.label_emb\.).*", "SDXL"),
    (r"(model\.diffusion_model\.)?joint_blocks\..*", "Stable Diffusion 3"),
    (r"(model\.diffusion_model\.)?(double_blocks|single_transformer_blocks)\..*", "Flux"),
    (r"cond_stage_model\.model\..*", "Stable Diffusion 2"),
    (r"(down_blocks|up_blocks)\..*", "the UNet of a diffusers folder alone; give the whole folder"),
    (r"(text_model|text_projection)\..*", "a text encoder alone; give a whole model"),
    (r"(encoder|decoder)\.(conv_in|conv_out)\..*", "a VAE; give it as --vae beside a model"),
)  # fmt: skip
_IN_CHANNELS = {
    5: "a depth model (5 channels)",
    8: "InstructPix2Pix (8 channels)",
    9: "an inpainting model (9 channels)",
}
V_KEY = "v_pred"  # an empty tensor that marks models that predict v
# prediction_type in diffusers' files -> config.model.schedule.prediction
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}
_CONTEXT = {1024: "Stable Diffusion 2", 2048: "SDXL", 1280: "the SDXL refiner"}
_PIPELINES = {
    "StableDiffusionXL": "SDXL",
    "StableDiffusion3": "Stable Diffusion 3",
    "Flux": "Flux",
    "Kandinsky": "Kandinsky",
    "PixArt": "PixArt",
}


def refuse_others(path: Path, content: Mapping[Any, Any], config: ModelConfig) -> None:
    """Raises InputError for a file that is known to be another model, or only a part of one."""
    keys = [key for key in content if isinstance(key, str)]
    for pattern, name in _BY_KEY:
        if any(re.fullmatch(pattern, key) for key in keys):
            raise InputError(f"{path}: {name}, expected Stable Diffusion 1.5")
    if V_KEY in content and config.schedule.prediction != "v":
        hint = "--config.model.schedule.prediction=v takes it"
        raise InputError(f"{path}: a v-prediction model ({hint}), expected Stable Diffusion 1.5")
    sizes = (
        ("input_blocks.0.0.weight", config.unet.in_channels, _IN_CHANNELS),
        ("input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", config.unet.context_dim, _CONTEXT),
    )
    for key, expected, names in sizes:
        shape = getattr(content.get(f"model.diffusion_model.{key}"), "shape", (0, expected))
        refuse_size(path, shape[1] if len(shape) > 1 else expected, expected, names)


def refuse_size(path: Path, found: Any, expected: int, names: Mapping[int, str]) -> None:
    """Raises InputError if a size is another one's that has a name."""
    if found != expected and found in names:
        raise InputError(f"{path}: {names[found]}, expected Stable Diffusion 1.5")


def refuse_other_folder(path: Path, config: ModelConfig, settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises InputError for a diffusers folder of another model.

    Args:
        path: the folder.
        config: the model's sizes.
        settings: its model_index.json under "", and the config of each part under the part's name.
    """
    pipeline, unet = str(settings[""].get("_class_name", "")), settings["unet"]
    name = next((name for start, name in _PIPELINES.items() if pipeline.startswith(start)), None)
    if unet.get("addition_embed_type") == "text_time":
        name = "SDXL"
    if name is not None:
        raise InputError(f"{path}: {name} ({pipeline or 'by its UNet'}), expected Stable Diffusion 1.5")
    refuse_size(path, unet.get("in_channels"), config.unet.in_channels, _IN_CHANNELS)
    refuse_size(path, unet.get("cross_attention_dim"), config.unet.context_dim, _CONTEXT)
    prediction = settings["scheduler"].get("prediction_type", "epsilon")
    if PREDICTIONS.get(prediction) != config.schedule.prediction:
        kind = {"v_prediction": "a v-prediction", "epsilon": "an epsilon"}.get(prediction, f"a {short(prediction)}")
        raise InputError(
            f"{path}: scheduler: {kind} model, expected config.model.schedule.prediction {config.schedule.prediction}"
        )
    if settings["scheduler"].get("rescale_betas_zero_snr"):
        raise InputError(
            f"{path}: scheduler: rescale_betas_zero_snr: expected false, zero terminal SNR is not supported"
        )
