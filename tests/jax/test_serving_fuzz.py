"""Broken requests of every kind: no answer is a fault of the server's, and nothing is left behind."""

import base64
import copy
import json
import os
import random

import hypothesis
import pytest
from serving_server import serving
from tiny_checkpoint import make_layout

from instdiff_jax.serving.limits import Limits

pytestmark = pytest.mark.usefixtures("quick_compilation")
LIMITS = Limits(side=32, steps=3, images=2, waiting=8, seconds=600, body=100_000, kept=5)
ODD = (
    None,
    True,
    0,
    -1,
    3,
    2**63,
    10**400,
    0.5,
    -1e308,
    float("nan"),
    float("inf"),
    "",
    "box",
    "\ud800",
    "💥" * 50,
    [],
    {},
)
ODD += ([[]], [0, 0, 0, 0], {"a": {}}, "../../etc/passwd", "file:///etc/passwd", "1" * 5000, [1e9] * 8)


@pytest.fixture(scope="module")
def client(pipeline):
    with serving(pipeline, limits=LIMITS, warm=False) as client:
        yield client


def start() -> dict:
    values = make_layout(2, mask=True).to_dict()
    values["annos"][1] |= {"point": [3, 4], "scribble": [1, 2, 3, 4, 5, 6]}
    return dict(layout=values, seeds=[1], steps=2, mis=0, format="auto", guidance_scale=2.0, alpha=0.5)


def places(values, path=()):
    """The path of every value inside."""
    for key, value in values.items() if isinstance(values, dict) else enumerate(values):
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


def mutate(values: dict, rng: random.Random) -> dict:
    """A copy with some values replaced, removed, repeated or swapped."""
    values = copy.deepcopy(values)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        *path, last = rng.choice(list(places(values)))
        holder = values
        for key in path:
            holder = holder[key]
        kind = rng.random()
        if kind < 0.6:
            holder[last] = copy.deepcopy(rng.choice(ODD))
        elif kind < 0.75:
            del holder[last]
        elif kind < 0.85 and isinstance(holder, list):
            holder.extend([copy.deepcopy(holder[last])] * rng.choice((1, 40)))
        elif isinstance(holder, dict):
            holder[rng.choice(("edit", "init_image", "inpaint_mask", "preset", "live", "response", "wait", "x"))] = (
                rng.choice((*ODD, "turbo", "png", False, base64.b64encode(rng.randbytes(30)).decode()))
            )
    return values


def text_of(values: dict, rng: random.Random) -> bytes:
    """JSON, now and then damaged."""
    data = json.dumps(values).encode()
    if rng.random() < 0.1:
        cut = rng.randrange(len(data))
        data = data[:cut] + rng.choice((b"", b"\x00\xff", b"[" * 2000)) + data[cut + rng.randrange(5) :]
    return data


def ask(client, count: int, seed: int) -> dict[int, int]:
    rng, found = random.Random(seed), {}
    for _ in range(count):
        data = text_of(mutate(start(), rng), rng)
        path = rng.choice(("/v1/images", "/v1/images", "/v1/images", "/v1/layouts"))
        answer = client.post(path, content=data, headers={"content-type": "application/json"})
        found[answer.status_code] = found.get(answer.status_code, 0) + 1
        assert answer.status_code < 500, (answer.text, data[:2000])
        if answer.status_code >= 400:
            assert "\n" not in answer.json()["error"] and "Traceback" not in answer.text
    return found


def check_nothing_is_left(client):
    queue = client.app.state.server.queue
    for job in list(queue.jobs.values()):
        client.delete(f"/v1/jobs/{job.id}")
    assert len(queue) == 0 and len(queue.jobs) <= LIMITS.kept
    assert client.post("/v1/images", json=start()).status_code == 200


def test_some_broken_requests(client):
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    found = ask(client, 250, seed=0)
    assert found.get(200, 0) > 10 and found[422] > 100
    check_nothing_is_left(client)
    after = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    assert after <= before + 4


@pytest.mark.slow
def test_what_the_api_page_allows(client):
    """Up to 200 requests of each path that schemathesis makes of openapi.json."""
    import schemathesis

    schema = schemathesis.openapi.from_url(str(client.base_url.join("/openapi.json")))
    for result in schema.get_all_operations():
        operation = result.ok()

        @hypothesis.given(case=operation.as_strategy())
        @hypothesis.settings(
            max_examples=200, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
        )
        def run(case):
            answer = case.call(base_url=str(client.base_url), timeout=600)
            assert answer.status_code < 500, answer.text

        run()
    check_nothing_is_left(client)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "seed"), ((8000, 1), (2000, 2)))
def test_many_broken_requests(client, count, seed):
    ask(client, count, seed)
    check_nothing_is_left(client)
