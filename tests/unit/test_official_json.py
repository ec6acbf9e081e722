"""The official training JSON becomes the same dataset, its embeddings a table."""

import base64
import json

import numpy as np
import pytest

from common import parity
from instdiff_jax.cli import build_official_json
from instdiff_jax.data import official_json
from instdiff_jax.data.dataset import InstanceDataset
from instdiff_jax.data.phrases import phrase_table, read_phrases
from instdiff_jax.errors import InputError

RNG = np.random.default_rng(0)
EMBEDDINGS = {name: RNG.normal(size=768).astype(np.float32) for name in ("thing0", "thing1", "thing2", "thing3", "own")}


def encode(array):
    return base64.b64encode(np.asarray(array, np.float32).tobytes()).decode()


def official(case):
    """One of the parity examples as the official pipeline stores it; the first instance has a caption of its own."""
    data = parity("training_examples")
    size = [int(side) for side in data[f"c{case}_size"]]
    annos = []
    for i, (counts, box) in enumerate(zip(data[f"c{case}_rle_counts"], data[f"c{case}_bbox"], strict=True)):
        name = f"thing{i % 4}"
        anno = {"bbox": list(box), "mask": {"size": size, "counts": counts.decode()}, "category_name": name, "id": 0}
        anno |= {"text_embedding_before": encode(EMBEDDINGS[name]), "caption": name, "blip_clip_embeddings": ""}
        annos.append(anno)
    annos[0] |= {"caption": "something nice", "blip_clip_embeddings": encode(EMBEDDINGS["own"])}
    image = base64.b64encode(data[f"c{case}_png"].tobytes()).decode()
    return {"image": image, "caption": "a scene of things", "data_id": 1, "is_det": 1, "annos": annos}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("official")
    for case in range(2):
        (folder / f"label_{case}.json").write_text(json.dumps(official(case)))
    broken = official(1)
    broken["annos"][1]["bbox"] = [1, 2, 3]
    broken["annos"][2]["text_embedding_before"] = encode(EMBEDDINGS["own"])
    (folder / "label_2.json").write_text(json.dumps(broken))
    (folder / "label_3.json").write_text(json.dumps({"image": "!", "annos": []}))
    (folder / "label_4.json").write_text("not json")
    path = tmp_path_factory.mktemp("imported") / "data"
    build_official_json.main(["--input", str(folder), "--data_dir", str(path)])
    return path


def test_records(data_dir):
    data, dataset, phrases = parity("training_examples"), InstanceDataset(data_dir, "train"), read_phrases(data_dir)
    records = {dataset[i].file_name: dataset[i] for i in range(len(dataset))}
    assert sorted(records) == ["label_0.json", "label_1.json", "label_2.json"]
    for case in range(2):
        record = records[f"label_{case}.json"]
        assert record.image == data[f"c{case}_png"].tobytes()
        assert [record.height, record.width] == data[f"c{case}_size"].tolist()
        assert record.captions == ("a scene of things",) and record.detection
        assert [item.mask for item in record.instances] == list(data[f"c{case}_rle_counts"])
        np.testing.assert_allclose([item.box for item in record.instances], data[f"c{case}_bbox"], rtol=1e-6)
        assert phrases[record.instances[0].caption_phrase] == "thing0. something nice"
        assert record.instances[1].caption_phrase == -1


def test_what_is_broken_is_named(data_dir):
    report = json.loads((data_dir / "report.json").read_text())
    assert report["counts"] == {"train annotation": 1, "train embedding": 1, "train file": 2}
    names = [entry["name"] for entry in report["skipped"]]
    assert names == ["label_2.json annos[1]", "label_2.json annos[2]", "label_3.json", "label_4.json"]


def test_embeddings_of_another_width_are_left_out(tmp_path):
    for number in range(2):
        item = official(number)
        if number:
            for anno in item["annos"][1:]:
                anno["text_embedding_before"] = base64.b64encode(np.ones(5, np.float32).tobytes()).decode()
        (tmp_path / f"{number}.json").write_text(json.dumps(item))
    flags = ["--input", str(tmp_path / "0.json"), str(tmp_path / "1.json"), "--data_dir", str(tmp_path / "data")]
    build_official_json.main(flags)
    skipped = json.loads((tmp_path / "data" / "report.json").read_text())["skipped"]
    assert any("embeddings before, got 5" in json.dumps(entry) for entry in skipped), skipped


def test_embeddings_are_kept(data_dir):
    phrases = read_phrases(data_dir)

    def embed(batch):
        raise AssertionError("every phrase came with an embedding")

    table = phrase_table(data_dir, "encoder", embed, use_imported=True)
    for name in ("thing0", "thing1", "thing2", "thing3"):
        np.testing.assert_array_equal(table.lookup(np.array(phrases.index(name))), EMBEDDINGS[name])
    own = table.lookup(np.array(phrases.index("thing0. something nice")))
    np.testing.assert_array_equal(own, EMBEDDINGS["own"])


def test_lists_and_bad_input(tmp_path):
    (tmp_path / "one.json").write_text(json.dumps(official(1)))
    (tmp_path / "train.txt").write_text("one.json\n")
    assert official_json.find_files([tmp_path / "train.txt"]) == [tmp_path / "one.json"]
    with pytest.raises(InputError, match="found nothing"):
        official_json.find_files([tmp_path / "absent.json"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="found none"):
        official_json.find_files([tmp_path / "empty"])
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(InputError, match="split train: empty"):
        build_official_json.main(["--input", str(tmp_path / "bad.json"), "--data_dir", str(tmp_path / "data")])
