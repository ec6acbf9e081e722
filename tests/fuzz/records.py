"""Other files: datasets, phrase tables, latent caches, records of runs, metrics, tokenizers and configs."""

import json
import random
import shutil
from pathlib import Path

import numpy as np

from common import PARITY
from instdiff_jax.checkpoint.tokenizer_files import find_tokenizer
from instdiff_jax.cli.config_flags import read_settings
from instdiff_jax.data.build_tokenizer import dataset_texts
from instdiff_jax.data.dataset import InstanceDataset
from instdiff_jax.data.latents import LatentCache, cache_latents
from instdiff_jax.data.phrases import phrase_table, read_phrases
from instdiff_jax.models.tokenizer import Tokenizer
from instdiff_jax.training.metrics import MetricsWriter
from instdiff_jax.training.settings import RunSettings
from instdiff_jax.tree import flatten
from tests.fuzz.annotations import check_dataset, write_coco
from tests.fuzz.cases import Kind, command
from tests.fuzz.layouts import LAYOUT, run_sample
from tests.fuzz.mutate import any_file, json_file, mutate_bytes

WIDTH = 6


def _embed(phrases: list[str]) -> np.ndarray:
    return np.array([[len(text) + k for k in range(WIDTH)] for text in phrases], np.float32)


def _encode(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    means = images.reshape(len(images), 2, 8, 2, 8, 3).mean(axis=(2, 4), dtype=np.float32)
    return means, -means


class Dataset:
    """A dataset with a phrase table and a latent cache, of which a file is changed."""

    def __init__(self, folder: Path):
        write_coco(None, folder, "")
        self.source = folder / "data"
        command("build-coco", "--coco_dir", folder / "coco", "--data_dir", self.source, output=self.source)
        self.records = repr(check_dataset(self.source))
        self.table = np.array(phrase_table(self.source, "key", _embed).lookup(np.arange(3)))
        dataset = InstanceDataset(self.source, "train")
        cache = cache_latents(_encode, dataset, self.source / "latents", "key", 16)
        self.latents = [cache.lookup(i, flip) for i in range(3) for flip in (False, True)]
        imported = self.source / "phrases" / "imported"
        imported.mkdir()
        np.save(imported / "embeddings.npy", _embed(["x", "y"]) + 1)
        np.save(imported / "numbers.npy", np.array([0, 2]))

    def kind(self, name: str, read, weight: int = 1) -> Kind:
        def write(rng: random.Random | None, folder: Path) -> None:
            shutil.copytree(self.source, folder / "data")
            path = folder / "data" / name
            if rng is None:
                return
            if path.is_dir():
                path = rng.choice(sorted(path.glob("*")))
            data = path.read_bytes()
            is_json = path.suffix == ".json" and rng.random() < 0.9
            path.write_bytes(json_file(rng, json.loads(data)) if is_json else any_file(rng, data))

        return Kind(name, write, lambda folder: read(folder / "data"), weight)

    def read(self, data: Path) -> None:
        dataset = InstanceDataset(data, "train")
        for i in range(len(dataset)):
            dataset[i]
        assert all(isinstance(text, str) for text in dataset_texts(data))

    def read_same(self, data: Path) -> None:
        dataset = InstanceDataset(data, "train")
        assert repr([dataset[i] for i in range(len(dataset))]) == self.records, "other records than were written"

    def read_phrases(self, data: Path) -> None:
        assert all(isinstance(text, str) and text.strip() for text in read_phrases(data))

    def read_table(self, data: Path) -> None:
        table = phrase_table(data, "key")
        assert np.array_equal(table.lookup(np.arange(3)), self.table), "other embeddings than were written"

    def read_imported(self, data: Path) -> None:
        table = phrase_table(data, "other", _embed, use_imported=True)
        rows = table.lookup(np.array([-1, 0, 1, 2]))
        assert rows.shape == (4, WIDTH) and rows.dtype == np.float32 and np.isfinite(rows).all()
        assert not rows[0].any()

    def read_latents(self, data: Path) -> None:
        cache = LatentCache(data / "latents", InstanceDataset(data, "train"), "key", 16)
        found = [cache.lookup(i, flip) for i in range(3) for flip in (False, True)]
        assert np.array_equal(found, self.latents), "other latents than were written"
        assert np.isfinite(cache.deviation())


def _write_output(rng, folder: Path) -> None:
    """A folder of `instdiff sample` with a changed record."""
    layout = LAYOUT | {"annos": LAYOUT["annos"][:2]}
    (folder / "scene.json").write_bytes(json_file(None, layout))
    record = run_sample(folder, "--layout", folder / "scene.json", "--save_latents")
    (folder / "out" / "run.json").write_bytes(json_file(rng, record))


def _resume(folder: Path) -> None:
    record = run_sample(folder, "--layout", folder / "scene.json", "--save_latents", "--resume")
    assert [entry["layout"] for entry in record["layouts"]] == ["scene"]
    assert record["layouts"][0]["seeds"] == [0]


def _write_metrics(rng, folder: Path) -> None:
    lines = [json.dumps({"step": step, "loss": 0.5, "learning_rate": 1e-4}).encode() for step in range(1, 5)]
    if rng is not None:
        for _ in range(rng.choice([1, 1, 2])):
            lines[rng.randrange(4)] = json_file(rng, {"step": 2, "loss": None})
    data = b"\n".join(lines) + b"\n"
    (folder / "metrics.jsonl").write_bytes(any_file(rng if rng is not None and rng.random() < 0.3 else None, data))


def _resume_metrics(folder: Path) -> None:
    writer = MetricsWriter(folder, start_step=3, total_steps=9)
    writer.write(4, {"loss": 0.25})
    writer.close()
    lines = (folder / "metrics.jsonl").read_bytes().decode().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert all(step <= 3 for step in steps[:-1]) and steps[-1] == 4


def _tokenizer(name: str, weight: int) -> Kind:
    def write(rng: random.Random | None, folder: Path) -> None:
        shutil.copytree(PARITY / "tokenizer", folder / "tokenizer")
        path = folder / "tokenizer" / name
        data = path.read_bytes()
        is_json = path.suffix == ".json" and (rng is None or rng.random() < 0.8)
        path.write_bytes(json_file(rng, json.loads(data)) if is_json else any_file(rng, data))

    return Kind(name, write, _read_tokenizer, weight)


def _read_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(find_tokenizer(str(folder / "tokenizer"), 1024), 1024)
    ids = tokenizer.encode_prompts(["", "a red square beside a blue dog", "x" * 300, "é\n\U0001f600"])
    assert ids.shape == (4, 77) and ids.dtype == np.int32 and ids.min() >= 0 and ids.max() < 1024
    assert (ids[:, -1] == tokenizer.eos_id).all() and (ids[0] == ids[0, :1]).sum() >= 1


_VALUES = (
    *("0", "1", "-1", "1e9", "2.5", "nan", "inf", "-inf", "1" * 400, "9" * 5000, "True", "None", "''", "[]", "()"),
    *(
        "(1,2)",
        "(1,'a')",
        "{}",
        "{'a':1}",
        "a",
        "é",
        "\udcff",
        "\0",
        "a\nb",
        "__import__('os').mkdir('X')",
        "../..",
        " ",
    ),
    *("(" * 300, "[" * 99999, "1+1", "1_0", "0x10", "1" + ",1" * 5000, "lambda: 1", "b'x'", "...", "1j"),
)


def _write_flags(rng, folder: Path) -> None:
    names = [".".join(path) for path in flatten(RunSettings().to_config())]
    flags = ["--config.train.steps=7"]
    if rng is not None:
        flags = []
        for _ in range(rng.choice([1, 1, 2])):
            name, value = rng.choice(names), rng.choice(_VALUES)
            name = rng.choice([name] * 6 + [name + "x", name.rpartition(".")[0], name + "[0]", name.upper(), ""])
            flags += rng.choice([[f"--config.{name}={value}"], [f"--config.{name}", value], [f"-config.{name}"]])
    (folder / "flags.json").write_text(json.dumps(flags))


def _read_flags(folder: Path) -> None:
    settings, rest = read_settings(json.loads((folder / "flags.json").read_text()), RunSettings)
    assert isinstance(rest, list)
    again = RunSettings.from_dict(settings.to_config())
    assert again == settings, "its own config gives other settings"


_CONFIG = """from ml_collections import ConfigDict


def get_config():
    return ConfigDict(dict(train=dict(steps=3, batch_size=2), data=dict(dir="x")))
"""


def _write_config(rng, folder: Path) -> None:
    data = _CONFIG.encode()
    if rng is not None and rng.random() < 0.4:
        bodies = [
            "1",
            "None",
            "{}",
            "ConfigDict({1: 2})",
            "1 / 0",
            "exit(3)",
            "get_config()",
            "ConfigDict(dict(train=1))",
        ]
        bodies += ["ConfigDict(dict(train=dict(steps=float('nan'))))", "ConfigDict(dict(model={}))", "open('/no/x')"]
        data = data.replace(
            b'ConfigDict(dict(train=dict(steps=3, batch_size=2), data=dict(dir="x")))',
            b"%s" % rng.choice(bodies).encode(),
        )
    elif rng is not None:
        data = mutate_bytes(rng, data)
    (folder / "config.py").write_bytes(data)


def _read_config(folder: Path) -> None:
    settings, _ = read_settings([f"--config={folder / 'config.py'}"], RunSettings)
    assert settings.train.steps >= 1


def kinds(folder: Path) -> list[Kind]:
    data = Dataset(folder)
    return [
        data.kind("dataset.json", data.read, 3),
        data.kind("instances/1.0.0", data.read_same, 2),
        data.kind("phrases.json", data.read_phrases, 2),
        data.kind("phrases/key/embeddings.npy", data.read_table, 2),
        data.kind("phrases/imported", data.read_imported, 2),
        Kind("run.json", _write_output, _resume, 4),
        Kind("metrics.jsonl", _write_metrics, _resume_metrics, 2),
        _tokenizer("vocab.json", 2),
        _tokenizer("merges.txt", 1),
        _tokenizer("tokenizer_config.json", 2),
        Kind("--config.KEY=VALUE", _write_flags, _read_flags, 4),
        Kind("--config=FILE", _write_config, _read_config, 2),
    ]
