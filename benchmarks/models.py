"""Models by name, with their weights, layouts and inputs."""

import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from instdiff_jax.config import ModelConfig, SamplingConfig
from instdiff_jax.errors import InputError
from instdiff_jax.layout import Layout

ROOT = Path(__file__).parent.parent
TOKENIZER = ROOT / "tests" / "parity" / "tokenizer"
BOX = ROOT / "checkpoints" / "shapes"

# Modules `weights` and `common` of the parity tests: weights and inputs that the official code can load too.
sys.path += [str(ROOT / "tests" / "support"), str(ROOT / "tests" / "parity")]

from weights import make_array  # noqa: E402

# Differences of each size from the released model, and the side of its images. The official code fixes the width of the
# text embeddings and UniFusion's trunk, so these are the same in all sizes.
SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "full": {},
    "small": dict(
        unet=dict(model_channels=64, num_heads=4),
        unifusion=dict(mid_dim=256),
        autoencoder=dict(ch=32, num_res_blocks=1),
        text_encoder=dict(vocab_size=1024, intermediate_size=512, num_layers=2),
    ),
    "tiny": dict(
        unet=dict(model_channels=32, num_heads=2, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(1,)),
        unifusion=dict(mid_dim=64),
        autoencoder=dict(ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1),
        text_encoder=dict(vocab_size=1024, intermediate_size=64, num_layers=1),
    ),
}
CANVAS = {"full": 512, "small": 512, "tiny": 64}


class Model(NamedTuple):
    """A model to measure: sizes, side of its images in pixels, and checkpoint folder (None: deterministic weights)."""

    name: str
    config: ModelConfig
    canvas: int
    folder: Path | None


def find_model(name: str, canvas: int | None = None) -> Model:
    """A model by the name of a size, `box` for checkpoints/shapes, or a checkpoint folder.

    Raises:
        InputError: if there is no such size and no such folder.
    """
    if name in SIZES:
        values = ModelConfig().to_dict()
        for group, sizes in SIZES[name].items():
            values[group].update(sizes)
        values["text_encoder"]["tokenizer"] = str(TOKENIZER)
        return Model(name, ModelConfig.from_dict(values), canvas or CANVAS[name], None)
    from instdiff_jax.checkpoint.folder import read_config

    folder = BOX if name == "box" else Path(name).resolve()
    if not folder.is_dir():
        raise InputError(f"--model {name}: expected one of {', '.join(SIZES)}, or a checkpoint folder; no {folder}")
    config, _, _ = read_config(folder)
    # The last part of the path: it is in the names of the tables' files.
    return Model(name if name == "box" else folder.name, config, canvas or config.canvas_side, folder)


# Larger arrays repeat this many numbers: drawing every weight of the full model takes a minute. No axis is a multiple.
_DRAWN = (1 << 20) - 3


def make_weights(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """The parity tests' deterministic array of a key; large ones repeat the numbers of a smaller one."""
    size = int(np.prod(shape))
    if size <= _DRAWN:
        return make_array(key, shape)
    drawn = make_array(key, (_DRAWN, 1)) / np.float32(np.sqrt(np.prod(shape[1:])))
    return np.resize(drawn, shape)


def make_params(config: ModelConfig, dtype: Any) -> dict[str, Any]:
    """Deterministic parameters, on the device (`make_weights`). The official code can load the same ones.

    As in `loading.load_model`, they have `dtype` if they have two axes or more and are not the autoencoder's.
    """
    import jax.numpy as jnp

    from instdiff_jax.checkpoint.tables import PARTS, rename_table
    from instdiff_jax.tree import unflatten

    leaves = {}
    for part in PARTS:
        for key, entry in rename_table(part, config).items():
            wide = part == "autoencoder" or len(entry.torch_shape) < 2
            leaf = entry.to_ours(make_weights(key, entry.torch_shape))
            leaves[entry.path] = jnp.asarray(leaf, jnp.float32 if wide else dtype)
    return unflatten(leaves)


def write_checkpoint(model: Model, folder: Path, dtype: Any = np.float32) -> None:
    """Writes a checkpoint folder with the parameters of `make_params`."""
    from instdiff_jax.checkpoint.folder import save_folder

    params = make_params(model.config, dtype)
    save_folder(folder, params, model.config, SamplingConfig(), TOKENIZER)


def make_layout(instances: int, side: int) -> Layout:
    """A layout with this many boxes, in rows of six, each with its own caption.

    A layout must have an instance, so 0 gives one; without the multi-instance sampler the time is the same.
    """
    columns = 6
    step = side / columns
    annos = []
    for i in range(max(instances, 1)):
        row, column = divmod(i, columns)
        box = [column * step, row * step, 0.9 * step, 0.9 * step]
        annos.append({"caption": f"a red thing, number {i}", "bbox": [round(value, 2) for value in box]})
    values = {"caption": "many things on a table", "width": side, "height": side, "annos": annos}
    return Layout.from_dict(values, name=f"boxes_{instances}")


def random_grounding(
    valid: int, rng: np.random.Generator, width: int = 768, map_size: int = 512
) -> dict[str, np.ndarray]:
    """One random grounding of boxes with the official names, with a leading axis of 1.

    Args:
        valid: number of instances; the other slots are empty.
        width: of the phrase embeddings.
        map_size: side of the empty instance maps.
    """
    masks = (np.arange(30) < valid).astype(np.float32)
    corners = np.sort(rng.random((30, 2, 2)), axis=1).reshape(30, 4)
    data = dict(
        boxes=corners,
        points=(corners[:, :2] + corners[:, 2:]) / 2,
        scribbles=np.zeros((30, 40)),
        polygons=np.zeros((30, 512)),
        text_embeddings=rng.standard_normal((30, width)),
    )
    data = {key: (value * masks[:, None]).astype(np.float32) for key, value in data.items()}
    data |= dict(masks=masks, segs=np.zeros((30, map_size, map_size), np.float32))
    return {key: value[None] for key, value in data.items()}
