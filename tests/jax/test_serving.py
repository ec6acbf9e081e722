"""The server: pictures equal the pipeline's, requests share batches, and bad requests are one line."""

import base64
import dataclasses
import io
import json
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from PIL import Image
from serving_server import serving
from tiny_checkpoint import SIDE, make_layout

from instdiff_jax.config import SamplingConfig
from instdiff_jax.sampling.metadata import read_origin
from instdiff_jax.serving import app
from instdiff_jax.serving.gate import Access
from instdiff_jax.serving.limits import Limits

pytestmark = pytest.mark.usefixtures("quick_compilation")
FAST = dict(steps=2, mis=0)
LIMITS = Limits(side=64, steps=20, images=4, waiting=8, seconds=600, body=200_000, kept=20)


@pytest.fixture(scope="module")
def client(pipeline):
    with serving(pipeline, limits=LIMITS, examples={"first": make_layout(1)}, fingerprint="ab" * 16) as client:
        yield client


def body(count=1, seed=0, **more) -> dict:
    return dict(layout=make_layout(count, seed=seed).to_dict(), **FAST) | more


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png))).astype(int)


def pictures(answer) -> list[np.ndarray]:
    assert answer.status_code == 200, answer.text
    return [pixels(base64.b64decode(image["png"])) for image in answer.json()["images"]]


def as_png(array) -> str:
    file = io.BytesIO()
    Image.fromarray(array).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


def wait_for(condition):
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it never came")


def test_a_picture_equals_the_pipelines_and_says_what_it_is(client, pipeline):
    layout = make_layout(2)
    answer = client.post("/v1/images", json=body(2, seeds=[5, 3]))
    assert [image["seed"] for image in answer.json()["images"]] == [5, 3]
    for found, result in zip(pictures(answer), pipeline(layout, seeds=[5, 3], **FAST), strict=True):
        assert np.abs(found - result.array).max() <= 1
    answer = client.post("/v1/images", json=body(2, seeds=[3], response="png"))
    assert answer.headers["content-type"] == "image/png"
    origin = read_origin(answer.content)
    assert origin.layout == layout and origin.seed == 3 and origin.fingerprint == "ab" * 16
    assert (origin.sampling.steps, origin.sampling.mis) == (2, 0)


def test_requests_of_many_clients_share_batches_and_none_is_swapped(client, pipeline, monkeypatch):
    sizes, original = [], pipeline.start_batch

    def start(request, batch, watched):
        sizes.append(len(batch))
        time.sleep(0.1)  # others arrive meanwhile
        return original(request, batch, watched)

    monkeypatch.setattr(pipeline, "start_batch", start)
    asked = [(1 + i % 3, i, 2 + i % 2) for i in range(8)]  # instances, seed, steps
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda one: client.post("/v1/images", json=body(*one[:2], steps=one[2])), asked))
    monkeypatch.undo()
    assert sum(sizes) == 8 and len(sizes) < 8 and max(sizes) >= 2
    for (count, seed, steps), answer in zip(asked, answers, strict=True):
        (result,) = pipeline(make_layout(count, seed=seed), seeds=[0], steps=steps, mis=0)
        (found,) = pictures(answer)
        assert np.abs(found - result.array).max() <= 1


def test_a_job_reports_progress_and_keeps_its_pictures(client):
    made = client.post("/v1/images", json=body(seeds=[1, 2], steps=12, wait=False))
    assert made.status_code == 202
    place = made.headers["location"]
    with client.stream("GET", f"{place}/events") as events:
        news = [json.loads(line[6:]) for line in events.iter_lines() if line.startswith("data: ")]
    progress = [one["progress"] for one in news]
    assert progress == sorted(progress) and progress[-1] == 1 and any(0 < value < 1 for value in progress)
    assert news[-1]["state"] == "done"
    (first, second) = pictures(client.get(place))
    assert (pixels(client.get(f"{place}/images/1.png").content) == second).all() and (first != second).any()
    assert client.get(f"{place}/images/2.png").status_code == 404
    assert client.get("/v1/jobs/other").status_code == 404


@pytest.fixture
def paused(client, pipeline, monkeypatch):
    """The painter, stopped in front of its next batch until the event is set."""
    go, arrived, original = threading.Event(), threading.Event(), pipeline.start_batch

    def start(*arguments):
        arrived.set()
        assert go.wait(600)
        return original(*arguments)

    monkeypatch.setattr(pipeline, "start_batch", start)
    client.post("/v1/images", json=body(wait=False))
    assert arrived.wait(600)
    yield go
    go.set()
    wait_for(lambda: len(client.app.state.server.queue) == 0)


def test_a_full_queue_says_when_to_come_again(client, paused):
    for _ in range(4):
        assert client.post("/v1/images", json=body(seeds=[0, 1], wait=False)).status_code == 202
    answer = client.post("/v1/images", json=body())
    assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1


def test_cancelled_and_replaced_jobs_are_not_drawn(client, paused, pipeline):
    first, other, second = (
        client.post("/v1/images", json=body(seed=i, live=live, wait=False)).json()
        for i, live in enumerate(("drag", None, "drag"))
    )
    assert client.get(f"/v1/jobs/{first['id']}").json()["error"] == "replaced by a newer request"
    assert client.delete(f"/v1/jobs/{other['id']}").json()["state"] == "cancelled"
    assert len(client.app.state.server.queue) == 1
    paused.set()
    wait_for(lambda: client.get(f"/v1/jobs/{second['id']}").json()["state"] == "done")
    assert not client.get(f"/v1/jobs/{other['id']}").json()["images"]


def test_a_client_that_leaves_is_not_waited_for(client, paused):
    queue = client.app.state.server.queue
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(client.base_url.join("/v1/images"), json=body(seed=7), timeout=0.5)
    wait_for(lambda: len(queue) == 0)
    assert [job.problem for job in queue.jobs.values()].count("the client left") == 1


def test_a_request_times_out(client, paused, monkeypatch):
    server = client.app.state.server
    monkeypatch.setitem(vars(server), "limits", dataclasses.replace(LIMITS, seconds=0.2))
    answer = client.post("/v1/images", json=body())
    assert answer.status_code == 504 and answer.json() == {"error": "timed out"}
    assert len(server.queue) == 0


def test_an_edit_keeps_the_picture_outside_what_changed(client):
    before = body(2, seed=1)
    picture = client.post("/v1/images", json=before | {"response": "png"}).content
    after = json.loads(json.dumps(before))
    after["layout"]["annos"][1] |= {"bbox": [2, 2, 8, 8], "caption": "a blue thing"}
    answer = client.post("/v1/images", json=after | {"edit": base64.b64encode(picture).decode()})
    changed = (pictures(answer)[0] != pixels(picture)).any(axis=-1)
    assert changed.any()
    x, y, w, h = before["layout"]["annos"][1]["bbox"]
    allowed = np.zeros((SIDE, SIDE), bool)
    for x, y, w, h in ((x, y, w, h), (2, 2, 8, 8)):
        allowed[max(y - 1, 0) : y + h + 1, max(x - 1, 0) : x + w + 1] = True
    assert not (changed & ~allowed).any()
    same = client.post("/v1/images", json=before | {"edit": base64.b64encode(picture).decode()})
    assert same.status_code == 422 and "nothing differs" in same.json()["error"]


def bomb(side: int) -> str:
    """A PNG whose header promises side × side pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(10**6)))
        + chunk(b"IEND", b"")
    )
    return base64.b64encode(data).decode()


GRAY = np.full((SIDE, SIDE, 3), 99, np.uint8)
BAD = {
    "nothing": ({}, "layout"),
    "no layout": (dict(layout={}), "layout: caption: missing"),
    "steps": (body(steps=0), "steps"),
    "too many steps": (body(steps=21), "steps: expected at most 20, got 21"),
    "too large": (body() | {"layout": make_layout(1, side=96).to_dict()}, "width: expected at most 64 pixels"),
    "odd size": (body() | {"layout": make_layout(1, side=33).to_dict()}, "multiple of"),
    "seeds": (body(seeds=[0] * 5), "seeds: expected at most 4"),
    "negative seed": (body(seeds=[-1]), "seeds.0"),
    "unknown": (body(stepz=3), "stepz"),
    "alpha": (body(alpha=2), "alpha"),
    "NaN": (body(mis=float("nan")), "mis"),
    "path": (body(init_image="/etc/passwd"), "init_image: expected base64"),
    "no image": (body(init_image=base64.b64encode(b"GIF89a").decode()), "init_image: expected an image"),
    "bomb": (body(init_image=bomb(30_000)), "init_image: expected"),
    "another size": (body(init_image=as_png(np.zeros((8, 8, 3), np.uint8))), "init_image: expected 32x32"),
    "black mask": (body(init_image=as_png(GRAY), inpaint_mask=as_png(GRAY * 0)), "no white"),
    "foreign picture": (body(edit=as_png(GRAY)), "edit: expected a picture of this project"),
    "several as PNG": (body(seeds=[1, 2], response="png"), "response"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_is_one_line(client, name):
    values, words = BAD[name]
    answer = client.post("/v1/images", content=json.dumps(values), headers={"content-type": "application/json"})
    assert answer.status_code == 422
    (line,) = answer.json()["error"].splitlines()
    assert words in line and "Traceback" not in line


def test_bodies_that_would_take_memory_are_refused(client):
    headers = {"content-type": "application/json"}
    assert client.post("/v1/images", content="[" * 100_000, headers=headers).status_code == 400
    assert client.post("/v1/layouts", content="[" * 100_000).status_code == 422
    assert client.post("/v1/images", content=b" " * 300_000, headers=headers).status_code == 413
    assert client.post("/v1/images", content=iter([b" " * 100_000] * 3), headers=headers).status_code == 413
    zigzag = [value for i in range(9000) for value in (i % 2 * 40, i % 3 * 40)]
    layout = make_layout(1).to_dict()
    layout["annos"][0]["mask"] = [zigzag]
    answer = client.post("/v1/images", json=dict(layout=layout))
    assert answer.status_code == 422 and "shorter outlines" in answer.json()["error"]
    shape = {"label": "a thing", "points": [zigzag[i : i + 2] for i in range(0, len(zigzag), 2)]}
    labelme = {"shapes": [shape], "imageWidth": SIDE, "imageHeight": SIDE}
    for answer in (client.post("/v1/layouts", json=labelme), client.post("/v1/images", json=dict(layout=labelme))):
        assert answer.status_code == 422 and "shorter outlines" in answer.json()["error"]
    layout["annos"][0]["mask"] = {"size": [SIDE, SIDE], "counts": [10**12]}
    assert client.post("/v1/images", json=dict(layout=layout)).status_code == 422


def test_only_this_machines_page_may_ask(client):
    assert client.get("/v1/model", headers={"host": "pictures.example"}).status_code == 421
    assert client.get("/v1/model", headers={"host": "192.168.0.7:80"}).status_code == 421
    assert client.get("/v1/model", headers={"host": f"localhost:{client.base_url.port}"}).status_code == 200
    assert client.get("/v1/model", headers={"origin": "http://pictures.example"}).status_code == 403
    assert client.get("/v1/model", headers={"origin": str(client.base_url).rstrip("/")}).status_code == 200


def test_a_token_is_needed_where_there_is_one(pipeline):
    access = Access(loopback=False, token="opensesame", hosts=("studio.example",), origins=("https://a.example",))
    with serving(pipeline, access=access, warm=False) as client:
        assert client.get("/v1/model", headers={"authorization": ""}).status_code == 401
        assert client.get("/v1/model", headers={"authorization": "Bearer wrong"}).status_code == 401
        assert client.get("/healthz", headers={"authorization": ""}).status_code == 200
        assert client.get("/v1/model", headers={"host": "studio.example"}).status_code == 200
        answer = client.get("/v1/model", headers={"origin": "https://a.example"})
        assert answer.headers["access-control-allow-origin"] == "https://a.example"


def test_the_first_pictures_are_on_the_models_canvas(pipeline):
    """Examples of another model do not compile what is asked for."""
    own, other = make_layout(1), make_layout(1, side=64)
    for examples, instances in (({"other": other}, [2, 2]), ({"other": other, "own": own}, [2, 1])):
        works = app._first_works(pipeline, LIMITS, examples)
        layouts = [work.layout for work in works]
        assert [(one.width, one.height) for one in layouts] == [(SIDE, SIDE)] * 2
        assert [len(one.instances) for one in layouts] == instances
        assert [one.instances[0].rle is not None for one in layouts] == [True, False]


def test_model_examples_metrics_and_the_api_page(client):
    model = client.get("/v1/model").json()
    assert model["canvas"] == SIDE and model["sampling"]["steps"] == 4
    assert model["limits"]["side"] == 64 and "fast" in model["presets"]
    assert client.get("/v1/examples").json()["first"]["layout"] == make_layout(1).to_dict()
    assert "instdiff_images_total" in client.get("/metrics").text
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/v1/images", "/v1/jobs/{id}", "/v1/model", "/healthz", "/readyz", "/metrics"} <= set(paths)
    assert client.get("/v1/none").json() == {"error": "Not Found"}


def test_layouts_and_pictures_are_read_for_the_page(client):
    layout = make_layout(2, mask=True)
    read = client.post("/v1/layouts", content=json.dumps(layout.to_dict())).json()["layout"]
    assert read["annos"][0]["mask"]["counts"] == layout.instances[0].rle.runs()
    again = client.post("/v1/images", json=dict(layout=read, **FAST, response="png", seeds=[9]))
    found = client.post("/v1/layouts", content=again.content).json()
    assert found["layout"] == read and found["seed"] == 9 and found["sampling"]["steps"] == 2


def test_a_fault_of_ours_shows_no_traceback_and_the_server_goes_on(client, pipeline, monkeypatch):
    monkeypatch.setattr(pipeline, "start_batch", lambda *_: 1 / 0)
    answer = client.post("/v1/images", json=body())
    assert answer.status_code == 500 and answer.json() == {"error": "the server failed; its log says why"}
    monkeypatch.undo()
    assert client.post("/v1/images", json=body()).status_code == 200


def test_a_server_that_stops_draws_what_it_has_begun_and_refuses_the_rest(pipeline, monkeypatch):
    go, original = threading.Event(), pipeline.start_batch
    monkeypatch.setattr(pipeline, "start_batch", lambda *arguments: go.wait(600) and original(*arguments))
    with ThreadPoolExecutor(2) as pool:
        with serving(pipeline, limits=LIMITS, warm=False) as client:

            def ask(**more):
                return pool.submit(httpx.post, client.base_url.join("/v1/images"), json=body(2, **more), timeout=600)

            begun, queue = ask(), client.app.state.server.queue
            wait_for(lambda: any(job.state == "drawing" for job in queue.jobs.values()))
            waits = ask(steps=3)
            wait_for(lambda: len(queue) == 1)
            client.server.should_exit = True
            assert waits.result().status_code == 503 and "stops" in waits.result().json()["error"]
            go.set()
            assert begun.result().status_code == 200


def test_the_comfyui_node_speaks_the_api(client, pipeline):
    from examples.comfyui import NODE_CLASS_MAPPINGS

    node, layout, server = NODE_CLASS_MAPPINGS["InstanceDiffusion"](), make_layout(1), str(client.base_url)
    inputs = node.INPUT_TYPES()
    defaults = {name: spec[1]["default"] for name, spec in inputs["optional"].items() if "default" in (*spec, {})[1]}
    options = defaults | {"steps": 2, "format": "auto", "preset": "checkpoint"}
    (pictures,) = node.draw(layout.to_json(), seed=3, images=1, server=server, **options)
    assert pictures.shape == (1, SIDE, SIDE, 3) and pictures.dtype.is_floating_point
    for found, result in zip(pictures.numpy(), pipeline(layout, seeds=[3], steps=2), strict=True):
        assert np.abs(found * 255 - result.array).max() <= 1.01
    again = pictures[:1]
    (changed,) = node.draw(layout.to_json(), seed=3, images=1, server=server, steps=4, init_image=again, strength=0.5)
    assert changed.shape == again.shape and (changed != again).any()
    schema = client.get("/openapi.json").json()["components"]["schemas"]["ImagesRequest"]["properties"]
    settings = {field.name for field in dataclasses.fields(SamplingConfig)}
    assert {"layout", "seeds", "preset", "format", *settings} <= set(schema)
    with pytest.raises(RuntimeError, match="steps: expected at most 20"):
        node.draw(layout.to_json(), seed=3, images=1, server=server, steps=30)
    with pytest.raises(RuntimeError, match="no answer from http://127.0.0.1:9"):
        node.draw(layout.to_json(), seed=3, images=1, server="http://127.0.0.1:9")
