"""LoRAs and textual inversion: merged as diffusers fuses them, and what is refused."""

import itertools
import json

import jax
import numpy as np
import pytest
from convert_cases import TINY, run
from tiny_checkpoint import SIDE, make_layout, make_tiny_checkpoint

from common import relative_error
from instdiff_jax import Pipeline
from instdiff_jax.checkpoint import folder, pytorch, torch_file
from instdiff_jax.checkpoint.lora import Lora, merge_loras, read_lora
from instdiff_jax.errors import InputError
from instdiff_jax.tree import flatten

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")
from diffusers_cases import save_pipeline, tiny_pipeline  # noqa: E402  (needs diffusers)

UNET = r".*\.(to_q|to_out\.0|proj_in|conv1|ff\.net\.0\.proj|time_emb_proj)"
TEXT = r".*\.(q_proj|out_proj|fc1)"


def layers(module, pattern):
    import re

    return {name: layer for name, layer in module.named_modules() if re.fullmatch(pattern, name)}


def factors(layer, rank, generator):
    """Random down and up of a layer, as a LoRA file has them."""
    weight = layer.weight
    down, up = torch.empty(rank, *weight.shape[1:]), torch.empty(weight.shape[0], rank, *[1] * (weight.ndim - 2))
    return tuple(torch.randn(x.shape, generator=generator) * 0.2 for x in (down, up))


def random_lora(pipeline, naming, seed=0, rank=3):
    """A LoRA of a pipeline's UNet and text encoder in a naming: kohya, peft or diffusers."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for part, pattern, short in (("unet", UNET, "lora_unet"), ("text_encoder", TEXT, "lora_te")):
        for name, layer in layers(getattr(pipeline, part), pattern).items():
            name = f"text_model.{name}" if part == "text_encoder" and not name.startswith("text_model.") else name
            down, up = factors(layer, rank, generator)
            if naming == "kohya":
                key = f"{short}_{name.replace('.', '_')}"
                tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
                tensors[f"{key}.alpha"] = torch.tensor(2.0)
            else:
                ends = (
                    ("lora.down", "lora.up") if part == "unet" else ("lora_linear_layer.down", "lora_linear_layer.up")
                )
                ends = ("lora_A", "lora_B") if naming == "peft" else ends
                tensors |= {f"{part}.{name}.{ends[0]}.weight": down, f"{part}.{name}.{ends[1]}.weight": up}
    return {key: value.numpy() for key, value in tensors.items()}


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def base(pipeline, tmp_path_factory):
    saved = save_pipeline(pipeline, tmp_path_factory.mktemp("base") / "pipeline")
    return pytorch.load_pytorch([saved], TINY)[0]


def fused(base_folder, *files, config=TINY):
    """diffusers' weights after `load_lora_weights` and `fuse_lora`, as our tree."""
    pipeline = tiny_pipeline()
    for i, (file, scale) in enumerate(files):
        pipeline.load_lora_weights(str(file), adapter_name=f"lora{i}")
        pipeline.fuse_lora(lora_scale=scale, adapter_names=[f"lora{i}"])
        pipeline.unload_lora_weights()
    return pytorch.load_pytorch([save_pipeline(pipeline, base_folder)], config)[0]


def assert_equal(ours, theirs, base):
    ours, theirs, base = flatten(ours), flatten(theirs), flatten(base)
    assert ours.keys() == theirs.keys()
    changed = [path for path, value in theirs.items() if not np.array_equal(value, base[path])]
    assert {path[0] for path in changed} == {"unet", "text_encoder"} and len(changed) > 40
    for path, value in theirs.items():
        assert relative_error(ours[path], value) <= 1e-5, path


@pytest.mark.parametrize("naming", ["kohya", "peft", "diffusers"])
def test_merged_weights_equal_those_of_diffusers(naming, pipeline, base, tmp_path):
    file = tmp_path / "lora.safetensors"
    torch_file.write_safetensors(file, random_lora(pipeline, naming))
    ours = merge_loras(base, [Lora(file, 0.7)], TINY)
    assert_equal(ours, fused(tmp_path / "fused", (file, 0.7)), base)


def test_a_file_that_diffusers_saves_has_its_alpha_in_the_header(base, tmp_path):
    pipeline, settings = tiny_pipeline(), dict(r=4, lora_alpha=6, target_modules=["to_k", "conv2"])
    pipeline.unet.add_adapter(peft.LoraConfig(**settings, init_lora_weights=False))
    state = peft.get_peft_model_state_dict(pipeline.unet)
    pipeline.save_lora_weights(tmp_path / "saved", unet_lora_layers=state, unet_lora_adapter_metadata=settings)
    deltas = read_lora(Lora(tmp_path / "saved"), TINY)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    theirs = flatten(pytorch.load_pytorch([save_pipeline(pipeline, tmp_path / "fused")], TINY)[0])
    for path, value in flatten(base).items():
        assert relative_error(value + deltas.get(path, 0), theirs[path]) <= 1e-5, path
    assert len(deltas) > 10


def test_a_folder_of_peft_has_its_alpha_beside_it(pipeline, tmp_path):
    state = {
        f"base_model.model.{key.removeprefix('unet.')}": value
        for key, value in random_lora(pipeline, "peft").items()
        if key.startswith("unet.")
    }
    torch_file.write_safetensors(tmp_path / "adapter_model.safetensors", state)
    plain = read_lora(Lora(tmp_path), TINY)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 6, "use_rslora": False}))
    scaled = read_lora(Lora(tmp_path), TINY)
    for path, delta in plain.items():
        np.testing.assert_allclose(scaled[path], 2 * delta, rtol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [[], {"lora_alpha": "x"}, {"lora_alpha": float("inf")}, {"alpha_pattern": [1]}, {"alpha_pattern": {"(": 1}}],
    ids=str,
)
def test_wrong_settings_of_peft_are_named(settings, pipeline, tmp_path):
    key = "base_model.model."
    state = {key + name.removeprefix("unet."): value for name, value in random_lora(pipeline, "peft").items()}
    torch_file.write_safetensors(tmp_path / "adapter_model.safetensors", state)
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="lora_alpha"):
        read_lora(Lora(tmp_path), TINY)


def test_two_loras_add_up_and_the_other_names_are_the_same(pipeline, base, tmp_path):
    files = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for seed, file in enumerate(files):
        torch_file.write_safetensors(file, random_lora(pipeline, "kohya", seed))
    ours = merge_loras(base, [Lora.parse(f"{files[0]}:0.5"), Lora.parse(files[1])], TINY)
    assert_equal(ours, fused(tmp_path / "fused", (files[0], 0.5), (files[1], 1.0)), base)

    weights = random_lora(pipeline, "peft")
    torch_file.write_safetensors(files[0], weights)
    expected = read_lora(Lora(files[0]), TINY)
    old = {}
    for key, value in weights.items():
        end = "down" if "lora_A" in key else "up"
        name = key.partition(".lora_")[0]
        head, last = name.removesuffix(".0").rsplit(".", 1)
        if last in ("to_q", "to_out"):
            old[f"{head}.processor.{last}_lora.{end}.weight"] = value
        elif last in ("q_proj", "out_proj"):
            old[f"{head}.to_{last.removesuffix('_proj')}_lora.{end}.weight"] = value
        else:
            old[f"{name}.lora_linear_layer.{end}.weight"] = value
    torch_file.write_safetensors(files[1], old)
    found = read_lora(Lora(files[1]), TINY)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[path], delta) for path, delta in expected.items())


FACTORS = {"lora_down.weight": np.ones((2, 32), np.float32), "lora_up.weight": np.ones((32, 2), np.float32)}
LAYER = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
WRONG = {
    "2 layers that this model does not have: lora_unet_input_blocks_8_1_proj_in, lora_te2_x": {
        f"{name}.{end}": value
        for name in ("lora_unet_input_blocks_8_1_proj_in", "lora_te2_x")
        for end, value in FACTORS.items()
    },
    "DoRA is not supported": {f"{LAYER}.dora_scale": np.ones(3, np.float32)},
    "LoHa is not supported": {f"{LAYER}.hada_w1_a": np.ones((2, 2), np.float32)},
    "LoKr is not supported": {f"{LAYER}.lokr_w1": np.ones((2, 2), np.float32)},
    "a layer of shape \\[32, 16\\], the model's is \\[32, 32\\]": {
        f"{LAYER}.lora_down.weight": np.ones((2, 16), np.float32),
        f"{LAYER}.lora_up.weight": np.ones((32, 2), np.float32),
    },
    "no up factor": {f"{LAYER}.lora_down.weight": np.ones((2, 32), np.float32)},
    "not a LoRA; its keys begin with model.x": {"model.x": np.ones(3, np.float32)},
    "1 keys of no LoRA: what": {f"{LAYER}.{end}": value for end, value in FACTORS.items()} | {"what": np.ones(1)},
    "expected a matrix of finite numbers": {f"{LAYER}.{end}": value * np.nan for end, value in FACTORS.items()},
}


@pytest.mark.parametrize("expected", WRONG)
def test_a_wrong_file_is_named(expected, tmp_path):
    torch_file.write_safetensors(tmp_path / "x.safetensors", WRONG[expected])
    with pytest.raises(InputError, match=f"x.safetensors: .*{expected}"):
        read_lora(Lora(tmp_path / "x.safetensors"), TINY)


def test_a_wrong_flag_is_named(tmp_path):
    for value, message in ((f"{tmp_path}/x:y", "expected FILE or FILE:SCALE"), (f"{tmp_path}/x:1e9", "its scale")):
        with pytest.raises(InputError, match=message):
            Lora.parse(value)
    with pytest.raises(InputError, match="no LoRA in this folder"):
        assert Lora(tmp_path).file


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")


def test_at_load_and_at_conversion(checkpoint, pipeline, tmp_path):
    """No program is compiled for it, and merging at conversion is the same."""
    file = tmp_path / "lora.safetensors"
    torch_file.write_safetensors(file, random_lora(pipeline, "kohya"))
    plain = Pipeline.from_checkpoint(checkpoint)
    loaded = Pipeline.from_checkpoint(checkpoint, loras=[(file, 0.5)])
    assert jax.tree.map(jax.typeof, plain.params) == jax.tree.map(jax.typeof, loaded.params)
    assert plain.config == loaded.config
    expected = merge_loras(folder.restore_params(checkpoint, as_numpy=True), [Lora(file, 0.5)], TINY)
    flags = [
        f"--config.model.{group}.{name}={value}"
        for group, sizes in TINY.to_dict().items()
        for name, value in sizes.items()
        if name != "tokenizer"
    ]
    run("--input", checkpoint, "--output", tmp_path / "merged", f"--lora={file}:0.5", *flags)
    found = folder.restore_params(tmp_path / "merged", as_numpy=True)
    for path, value in flatten(expected).items():
        np.testing.assert_array_equal(flatten(loaded.params)[path], value)
        np.testing.assert_array_equal(flatten(found)[path], value)


def test_embeddings_equal_diffusers(checkpoint, tmp_path):
    random = np.random.default_rng(0)
    width = TINY.text_encoder.hidden_size
    one, two = random.standard_normal(width).astype(np.float32), random.standard_normal((2, width)).astype(np.float32)
    torch.save({"<cat>": torch.from_numpy(one)}, tmp_path / "cat.bin")
    torch_file.write_safetensors(tmp_path / "bad.safetensors", {"emb_params": two})
    files = [tmp_path / "cat.bin", f"{tmp_path}/bad.safetensors:ugly"]
    ours = Pipeline.from_checkpoint(checkpoint, embeddings=files)
    texts = ["a <cat> on a mat", "ugly, <cat>", "a plain text", "uglyx"]

    theirs = tiny_pipeline()
    saved = ours.params["text_encoder"]
    state = pytorch.to_state_dict("text_encoder", {"text_encoder": with_vocabulary(saved)}, TINY)
    names = theirs.text_encoder.state_dict()
    prefix = "transformer." if next(iter(names)).startswith("text_model.") else "transformer.text_model."
    theirs.text_encoder.load_state_dict({name: torch.tensor(np.array(state[f"{prefix}{name}"])) for name in names})
    theirs.load_textual_inversion(str(tmp_path / "cat.bin"))
    theirs.load_textual_inversion({"ugly": torch.from_numpy(two)}, token="ugly")
    ids = theirs.tokenizer(
        [theirs.maybe_convert_prompt(text, theirs.tokenizer) for text in texts[:3]],
        padding="max_length", max_length=77, return_tensors="pt",
    ).input_ids  # fmt: skip
    with torch.no_grad():
        expected = theirs.text_encoder(ids).last_hidden_state.numpy()
    rows = ours._tokenizer.encode_prompts(texts)
    hidden, _ = ours.networks.text_encoder.apply({"params": saved}, rows)
    assert relative_error(hidden[:3], expected) <= 2e-5
    assert (rows[3] >= 0).all() and (rows[1] < 0).sum() == 3
    with pytest.raises(InputError, match="text encoder's width 64, got 32"):
        torch.save({"x": torch.zeros(32)}, tmp_path / "x.bin")
        Pipeline.from_checkpoint(checkpoint, embeddings=[tmp_path / "x.bin"])


def with_vocabulary(encoder):
    table = encoder["token_embedding"]["embedding"][: TINY.text_encoder.vocab_size]
    return encoder | {"token_embedding": {"embedding": table}}


def test_resume_draws_again_when_a_lora_changes(checkpoint, pipeline, tmp_path, capsys):
    from instdiff_jax.cli import sample

    file, out = tmp_path / "lora.safetensors", tmp_path / "out"
    layout = tmp_path / "scene.json"
    layout.write_text(json.dumps(make_layout(1, side=SIDE).to_dict()))
    flags = ["--checkpoint", str(checkpoint), "--layout", str(layout), "--output", str(out), "--resume", "--steps=1"]
    images, counts = [], []
    for seed, extra in itertools.product((0, 1), ([], [f"--lora={file}:0.5"])):
        torch_file.write_safetensors(file, random_lora(pipeline, "kohya", seed))
        sample.main([*flags, *extra])
        images.append((out / "scene" / "0.png").read_bytes())
        counts.append(capsys.readouterr().out.count("made again"))
    assert counts == [0, 1, 1, 1] and images[0] == images[2] and len({*images}) == 3
    record = json.loads((out / "run.json").read_text())
    assert record["loras"][0]["file"] == str(file) and record["loras"][0]["scale"] == 0.5
    sample.main([*flags, f"--lora={file}:0.5"])
    assert "0 images in" in capsys.readouterr().out
