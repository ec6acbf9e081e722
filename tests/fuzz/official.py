"""The official training JSON, as `instdiff build-official-json` reads it."""

import base64
import io
from pathlib import Path

import numpy as np
from PIL import Image

from instdiff_jax.geometry.masks import RLE
from tests.fuzz.annotations import check_dataset
from tests.fuzz.cases import Kind, command
from tests.fuzz.mutate import json_file, mutate_bytes

WIDTH, HEIGHT = 40, 32


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _values(number: int) -> dict:
    rng = np.random.default_rng(number)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)).save(buffer, "JPEG")
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[4:20, 6:18] = True
    annos = []
    for i, name in enumerate(["cat", "traffic light"]):
        embeddings = [_base64(rng.standard_normal(8).astype(np.float32).tobytes()) for _ in range(2)]
        anno = {"bbox": [6, 4, 12, 16], "mask": RLE.from_mask(mask).to_dict(), "category_name": name, "id": i}
        anno |= {"caption": f"a small {name}", "text_embedding_before": embeddings[0], "category_id": i}
        annos.append(anno | {"blip_clip_embeddings": embeddings[1]})
    values = {"image": _base64(buffer.getvalue()), "caption": "a scene", "data_id": number, "is_det": 1}
    return values | {"annos": annos, "width": WIDTH, "height": HEIGHT}


def _write(rng, folder: Path) -> None:
    (folder / "in").mkdir()
    for number in (1, 2):
        values = _values(number)
        changed = rng if number == 1 else None
        if changed is not None and rng.random() < 0.15:
            values["image"] = _base64(mutate_bytes(rng, base64.b64decode(values["image"])))
            changed = None
        (folder / "in" / f"{number}.json").write_bytes(json_file(changed, values))


def _write_list(rng, folder: Path) -> None:
    _write(None, folder)
    text = b"in/1.json\nin/2.json\n\n"
    (folder / "list.txt").write_bytes(text if rng is None else mutate_bytes(rng, text))


def _build(folder: Path, source: str) -> None:
    output = folder / "data"
    flags = ("--input", folder / source, "--data_dir", output)
    command("build-official-json", *flags, output=output, writes_early=True)
    records = check_dataset(output)
    imported = output / "phrases" / "imported"
    if imported.exists():
        rows, numbers = np.load(imported / "embeddings.npy"), np.load(imported / "numbers.npy")
        assert rows.dtype == np.float32 and np.isfinite(rows).all() and len(rows) == len(set(numbers))
    assert any(record.instances for record in records)


def kinds(folder: Path) -> list[Kind]:
    return [
        Kind("official JSON", _write, lambda place: _build(place, "in"), weight=8),
        Kind("list of files", _write_list, lambda place: _build(place, "list.txt")),
    ]
