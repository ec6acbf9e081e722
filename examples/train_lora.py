"""Trains a LoRA of a style on the small model, and shows that it changes the style and keeps the places.

    python examples/train_lora.py --output lora_dusk
    python sample.py --lora lora_dusk --layout examples/shapes/boxes_pair.json

The style is dusk: dark and blue pictures of rendered scenes. Only the factors of the UNet's attention layers are
trained, on the loss of `instdiff train`. The folder is PEFT's (adapter_model.safetensors, adapter_config.json). At the
end it measures held-out layouts without and with the LoRA: AP50 of boxes, and how far the pictures' mean colour is from
the style's. Two cores need some minutes.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402

from instdiff_jax import Instance, Layout, Pipeline, grounding  # noqa: E402
from instdiff_jax.checkpoint.diffusers import diffusers_table  # noqa: E402
from instdiff_jax.checkpoint.torch_file import write_safetensors  # noqa: E402
from instdiff_jax.evaluation.generate import GenerateSettings, generate  # noqa: E402
from instdiff_jax.evaluation.measure import Measures, inspect, summarize  # noqa: E402
from instdiff_jax.evaluation.split import Split, read_split  # noqa: E402
from instdiff_jax.files import write_json  # noqa: E402
from instdiff_jax.models.networks import make_networks  # noqa: E402
from instdiff_jax.models.regions import region_bits  # noqa: E402
from instdiff_jax.training.settings import TrainSettings  # noqa: E402
from instdiff_jax.training.step import diffusion_loss, row_keys  # noqa: E402
from instdiff_jax.tree import flatten, unflatten  # noqa: E402
from projects.common.segmenter import Segmenter  # noqa: E402
from projects.shapes.render import write_coco  # noqa: E402
from projects.shapes.scenes import render_scene  # noqa: E402
from projects.shapes.worlds import WORLDS  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
SIDE, RANK, BATCH, MOST = 64, 8, 8, 10
TRAINING_SEED, HELD_OUT_SEED = 91, 92

Factors = dict[str, dict[str, jax.Array]]  # diffusers' name of a layer -> A [rank, in] and B [out, rank]


def dusk(image: np.ndarray) -> np.ndarray:
    """The style: darker and bluer."""
    return (0.7 * image + np.array([0, 5, 55])).clip(0, 255).astype(np.uint8)


def attention_layers(pipeline: Pipeline) -> dict[str, tuple[str, ...]]:
    """The layers that get factors, by their names in diffusers, and their kernels' paths in our tree."""
    table = diffusers_table("model", pipeline.config)
    ends = tuple(f"attn{i}.to_{name}.weight" for i in (1, 2) for name in ("q", "k", "v", "out.0"))
    return {key.removesuffix(".weight"): entry.path for key, (_, entry) in table.items() if key.endswith(ends)}


def init_factors(pipeline: Pipeline, layers: dict[str, tuple[str, ...]]) -> Factors:
    """A is random and B zero, so that the LoRA begins as nothing."""
    rng, kernels, factors = np.random.default_rng(0), flatten(pipeline.params), {}
    for name, path in layers.items():
        inputs, outputs = kernels[path].shape
        a = rng.standard_normal((RANK, inputs), dtype=np.float32) / np.sqrt(inputs)
        factors[name] = {"A": jnp.asarray(a), "B": jnp.zeros((outputs, RANK))}
    return factors


def merged(params: Any, factors: Factors, layers: dict[str, tuple[str, ...]]) -> Any:
    """The parameters with the factors' products added; our kernels are [in, out]."""
    leaves = flatten(params)
    for name, path in layers.items():
        leaves[path] = leaves[path] + (factors[name]["B"] @ factors[name]["A"]).T
    return unflatten(leaves)


def training_data(pipeline: Pipeline, count: int) -> dict[str, Any]:
    """Scenes in the style, with their captions and boxes, as the loss takes them."""
    config, side = pipeline.config, SIDE // pipeline.config.latent_stride
    encode = jax.jit(lambda params, ids: pipeline.networks.text_encoder.apply({"params": params}, ids))
    rows = []
    for number in range(count):
        scene = render_scene(TRAINING_SEED, number, SIDE, WORLDS["calm"])
        things = [(one.caption, one.box) for one in scene.instances]
        instances = tuple(Instance(caption, box=(x, y, x + w, y + h)) for caption, (x, y, w, h) in things)
        arrays = grounding.make_grounding(Layout(scene.caption, SIDE, SIDE, instances), config, "box")
        visual, tokens = region_bits(arrays, side, side, "strict")
        # One shape for every scene: one program.
        texts = [scene.caption, *(one.caption for one in instances), *[""] * (MOST - len(instances))]
        hidden, pooled = encode(pipeline.params["text_encoder"], pipeline._tokenizer.encode_prompts(texts))
        arrays["phrase_embeddings"][: len(instances)] = np.asarray(pooled)[1 : 1 + len(instances)]
        rows.append(
            {
                "latents": np.asarray(pipeline.encode(dusk(scene.image)))[0],
                "context": np.asarray(hidden)[0],
                "grounding": arrays,
                "regions": {"visual": visual, "tokens": tokens},
            }
        )
    return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)


def train(pipeline: Pipeline, scenes: int, steps: int) -> Factors:
    """Trains factors on scenes in the style, in random batches."""
    layers = attention_layers(pipeline)
    settings = TrainSettings(steps=steps, batch_size=BATCH, masked_attention="strict")
    loss = diffusion_loss(make_networks(pipeline.config), pipeline.config, settings)
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))

    @jax.jit
    def update(
        factors: Factors, state: Any, params: Any, batch: Any, step: jax.Array
    ) -> tuple[Factors, Any, jax.Array]:
        keys = row_keys(0, step, jnp.arange(BATCH))
        value, grads = jax.value_and_grad(lambda f: loss(merged(params, f, layers), batch, keys))(factors)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(factors, updates), state, value

    data, rng = training_data(pipeline, scenes), np.random.default_rng(0)
    factors = init_factors(pipeline, layers)
    state, losses = optimizer.init(factors), []
    for step in range(steps):
        chosen = rng.integers(scenes, size=BATCH)
        batch = jax.tree.map(lambda leaf, rows=chosen: leaf[rows], data)
        factors, state, value = update(factors, state, pipeline.params, batch, jnp.int32(step))
        losses.append(float(value))
        if (step + 1) % 25 == 0:
            print(f"step {step + 1}: loss {np.mean(losses[-25:]):.4f}", flush=True)
    return factors


def save(factors: Factors, folder: Path) -> None:
    """Writes PEFT's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"base_model.model.{name}.lora_{factor}.weight": np.asarray(array)
        for name, pair in factors.items()
        for factor, array in pair.items()
    }
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": sorted(factors), "bias": "none"}
    write_json(folder / "adapter_config.json", config)


def evaluate(pipeline: Pipeline, split: Split, folder: Path, detector: Segmenter) -> tuple[float, np.ndarray]:
    """AP50 of boxes in percent, and the mean colour of pictures of held-out layouts."""
    generate(pipeline, split.scenes, folder, GenerateSettings(format="box"))
    seen = inspect(split, folder, Measures(detector))
    numbers = summarize(seen.images, split, detector, seen.kinds)
    return 100 * (numbers["box_AP50"] or 0.0), mean_colour(folder)


def mean_colour(folder: Path) -> np.ndarray:
    from PIL import Image

    pictures = [np.asarray(Image.open(path).convert("RGB")) for path in sorted((folder / "images").glob("*.png"))]
    return np.mean([picture.mean(axis=(0, 1)) for picture in pictures], axis=0)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "checkpoints" / "shapes")
    parser.add_argument("--output", type=Path, required=True, help="the LoRA's folder")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--scenes", type=int, default=128, help="training scenes")
    parser.add_argument("--count", type=int, default=48, help="held-out layouts to measure")
    args = parser.parse_args(argv)

    base = Pipeline.from_checkpoint(args.checkpoint)
    save(train(base, args.scenes, args.steps), args.output)
    print(f"wrote {args.output}")
    styled = Pipeline.from_checkpoint(args.checkpoint, loras=[args.output])
    detector = Segmenter.from_folder(ROOT / "checkpoints" / "shapes_segmenter")
    with tempfile.TemporaryDirectory() as work:
        write_coco(Path(work) / "scenes", "held_out", args.count, HELD_OUT_SEED, SIDE, WORLDS["calm"])
        split = read_split(Path(work) / "scenes", "held_out")
        target = np.mean([dusk(scene.real_image()).mean(axis=(0, 1)) for scene in split.scenes], axis=0)
        numbers = {}
        for name, pipeline in (("without", base), ("with", styled)):
            ap50, colour = evaluate(pipeline, split, Path(work) / name, detector)
            numbers |= {f"AP50 {name}": ap50, f"distance {name}": float(np.abs(colour - target).mean())}
            print(
                f"{name} the LoRA: box AP50 {ap50:.1f}, mean colour {np.round(colour).astype(int).tolist()}", end=", "
            )
            print(f"{numbers[f'distance {name}']:.1f} of 255 from the style's {np.round(target).astype(int).tolist()}")
    return numbers


if __name__ == "__main__":
    main()
