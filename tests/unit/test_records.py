"""Records that programs write and read again: what is none of theirs is one line that names file and field."""

import json

import numpy as np
import pytest
from coco_fixture import build, make_coco

from instdiff_jax.checkpoint.run import read_run
from instdiff_jax.cli.config_flags import read_settings
from instdiff_jax.config import ModelConfig
from instdiff_jax.data.dataset import FORMAT, InstanceDataset
from instdiff_jax.data.phrases import PhraseTable, phrase_table, read_phrases
from instdiff_jax.errors import InputError
from instdiff_jax.sampling.outputs import OutputFolder, read_record
from instdiff_jax.training.metrics import MetricsWriter
from instdiff_jax.training.settings import RunSettings

GOOD_ENTRY = {"layout": "x", "seeds": [0], "latents": True}
BAD_RECORDS = [[], {}, {"layouts": None}, {"layouts": {"x": 1}}, {"layouts": [3]}, {"layouts": [{"seeds": [0]}]}]
BAD_RECORDS += [{"layouts": [{"layout": ["x"], "seeds": [0]}]}, {"layouts": [GOOD_ENTRY, {"layout": "y", "seeds": 0}]}]


@pytest.mark.parametrize("record", BAD_RECORDS, ids=repr)
def test_a_record_of_a_run_is_checked_when_it_is_read(tmp_path, record):
    (tmp_path / "run.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="run.json: layouts: expected those of a run's record"):
        read_record(tmp_path / "run.json")
    with pytest.raises(InputError, match="run.json: layouts"):
        OutputFolder(tmp_path, [0], save_latents=True).finished([], {})


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("seed", None, "train.seed: expected int, got None"),
        ("seed", "0", "train.seed: expected int, got '0'"),
        ("start", ["x"], "train.start: expected str"),
        ("grounding", 1, "train.grounding: expected bool, got 1"),
    ],
)
def test_the_training_settings_that_a_run_is_read_by_are_checked(tmp_path, key, value, words):
    (tmp_path / "checkpoints").mkdir()
    train = {"seed": 0, "start": "", key: value}
    groups = {"model": ModelConfig().to_dict(), "sampling": {}, "train": train}
    (tmp_path / "config.json").write_text(json.dumps(groups))
    with pytest.raises(InputError, match=words):
        read_run(tmp_path)


def test_tables_of_numbers_are_checked_when_they_are_opened(tmp_path):
    table = tmp_path / "embeddings.npy"
    for odd in (np.zeros(3, np.float32), np.zeros((3, 4)), np.zeros((3, 4), np.int32)):
        np.save(table, odd)
        with pytest.raises(InputError, match="embeddings.npy: expected float32 of shape"):
            PhraseTable(table)
    header = table.read_bytes()
    table.write_bytes(header.replace(b"'shape'", b"'shape(").replace(b"}", b" "))  # text that does not end
    with pytest.raises(InputError, match="embeddings.npy: expected a table of phrase embeddings"):
        PhraseTable(table)


@pytest.mark.parametrize("numbers", [[0, 0], [0, 9], [-1, 0], [0], [[0, 1]], [0.0, 1.0]], ids=repr)
def test_embeddings_that_came_with_the_data_belong_to_different_phrases(tmp_path, numbers):
    folder = tmp_path / "phrases" / "imported"
    folder.mkdir(parents=True)
    np.save(folder / "embeddings.npy", np.ones((2, 4), np.float32))
    np.save(folder / "numbers.npy", np.array(numbers))
    meta = {"format": FORMAT, "phrases": 2, "splits": {}}
    (tmp_path / "dataset.json").write_text(json.dumps(meta))
    (tmp_path / "phrases.json").write_text('["a", "b"]')
    with pytest.raises(InputError, match="imported: expected"):
        phrase_table(tmp_path, "key", lambda texts: np.ones((len(texts), 4)), use_imported=True)


@pytest.mark.parametrize(("count", "phrases"), [(2, ["a", 3]), (2, ["a"]), (None, ["a", "b"]), ("2", ["a", "b"])])
def test_phrases_are_texts_as_many_as_the_dataset_says(tmp_path, count, phrases):
    (tmp_path / "dataset.json").write_text(json.dumps({"format": FORMAT, "phrases": count, "splits": {}}))
    (tmp_path / "phrases.json").write_text(json.dumps(phrases))
    with pytest.raises(InputError, match="phrases"):
        read_phrases(tmp_path)


def test_foreign_lines_of_metrics_do_not_stop_a_run_that_goes_on(tmp_path):
    lines = [
        b'{"step": 1, "loss": 0.5}',
        b"null",
        b'{"loss": 1}',
        b'{"step": {}}',
        b"[" * 100_000,
        b"\xe5",
        b'{"step": 9}',
    ]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    MetricsWriter(tmp_path, start_step=3, total_steps=9).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == lines[0] + b"\n"


def test_a_config_file_that_ends_the_program_is_named(tmp_path):
    (tmp_path / "config.py").write_text("raise SystemExit(3)\n")
    with pytest.raises(InputError, match="--config: .*SystemExit: 3"):
        read_settings([f"--config={tmp_path / 'config.py'}"], RunSettings)


def test_a_damaged_record_is_named(tmp_path):
    make_coco(tmp_path / "coco", train=6, val=2, broken=False)
    build(tmp_path / "coco", tmp_path / "data")
    (file,) = (tmp_path / "data" / "instances" / "1.0.0").glob("*train*.array_record*")
    data = bytearray(file.read_bytes())
    data[data.rindex(b"JFIF") + 300] ^= 1  # in the last image
    file.write_bytes(data)
    dataset = InstanceDataset(tmp_path / "data", "train")
    with pytest.raises(InputError, match=r"instances: record \d is damaged: .*Corrupted"):
        [dataset[i] for i in range(len(dataset))]
