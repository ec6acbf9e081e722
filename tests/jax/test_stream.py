"""`Pipeline.stream`: order, what runs ahead, how much is held, layouts from an iterator, and errors in the middle."""

import itertools
import time
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_checkpoint import make_layout, make_tiny_checkpoint

from common import relative_error
from instdiff_jax import Pipeline
from instdiff_jax.diffusion import multi_instance
from instdiff_jax.errors import InputError
from instdiff_jax.sampling.results import one_ahead

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """Four rows a program: a layout of three instances is a batch."""
    checkpoint = make_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")
    return Pipeline.from_checkpoint(checkpoint, max_rows=4)


FAST = dict(steps=2, mis=0.5)


def scenes(count: int) -> list:
    return [make_layout(3, f"scene{i}", seed=i) for i in range(count)]


@pytest.fixture
def events(pipeline, monkeypatch):
    """Which layouts' batches were launched, as tests add what they take."""
    events, original = [], pipeline.start_batch

    def start(request, batch, watched):
        events.append(("start", batch[0].layout.name))
        return original(request, batch, watched)

    monkeypatch.setattr(pipeline, "start_batch", start)
    return events


def test_results_in_order_equal_one_by_one(pipeline):
    """Batches of several layouts, of one, and of another canvas."""
    layouts = [make_layout(count, f"scene{i}", 48 if i == 3 else 32, i) for i, count in enumerate((1, 1, 3, 2, 3, 1))]
    results = pipeline(layouts, seeds=[4, 9], **FAST)
    pairs = itertools.product(layouts, [4, 9])
    for result, (layout, seed) in zip(results, pairs, strict=True):
        assert result.layout is layout and result.seed == seed
        alone = pipeline([layout], seeds=[seed], **FAST)[0]
        assert relative_error(result.latents, alone.latents) <= 1e-4
        assert np.abs(result.array.astype(int) - alone.array).max() <= 1


def test_the_next_batch_is_launched_before_results_come(pipeline, events):
    for result in pipeline.stream(scenes(4), **FAST):
        events.append(("result", result.layout.name))
    names = [f"scene{i}" for i in range(4)]
    expected = [("start", names[0])]
    for name, following in itertools.pairwise(names):
        expected += [("start", following), ("result", name)]
    assert events == [*expected, ("result", names[3])]


def test_a_launch_waits_for_nothing(pipeline, monkeypatch):
    """Two batches are on their way while the first one's loop has not come to its end."""
    original, start, ready, rounds = multi_instance.denoise, pipeline.start_batch, [], 1

    @jax.jit
    def delayed(latents, rounds):
        square = jax.lax.fori_loop(0, rounds, lambda _, a: a @ a / 256, jnp.ones((256, 256)))
        return latents + square[0, 0] - 1

    def denoise(eps_fn, params, state, *args, **settings):
        return original(eps_fn, params, state._replace(latents=delayed(state.latents, rounds)), *args, **settings)

    def watched_start(request, batch, watched):
        pending = start(request, batch, watched)
        ready.append(pending.latents.is_ready())
        return pending

    monkeypatch.setattr(multi_instance, "denoise", denoise)
    list(pipeline.stream(scenes(2), **FAST))  # compiles everything
    began = time.monotonic()
    delayed(jnp.ones((4, 8, 8, 4)), 1000).block_until_ready()
    rounds = int(1000 * 5 / (time.monotonic() - began))  # 5 seconds a loop
    monkeypatch.setattr(pipeline, "start_batch", watched_start)
    calls = []
    results = list(pipeline.stream(scenes(2), progress=lambda done, total: calls.append(done), **FAST))
    assert len(results) == 2 and ready == [False, False] and calls


def test_never_more_than_two_batches_alive(pipeline, monkeypatch):
    started, alive, held, start = [], [], [], pipeline.start_batch

    def watched_start(request, batch, watched):
        alive.append(1 + sum(latents() is not None for latents in started))
        pending = start(request, batch, watched)
        started.append(weakref.ref(pending.latents))
        return pending

    monkeypatch.setattr(pipeline, "start_batch", watched_start)
    drawn = []

    def source():
        for layout in scenes(6):
            drawn.append(layout.name)
            yield layout

    for i, _ in enumerate(pipeline.stream(source(), **FAST)):
        held.append(sum(array.nbytes for array in jax.live_arrays()))
        assert len(drawn) <= i + 3, "an iterator is read as it is needed: two batches, and what ends the second"
    assert alive == [1, 2, 2, 2, 2, 2]
    assert max(held[1:]) <= held[0], "what is held does not grow"


def test_an_iterator_gives_what_a_list_does(pipeline):
    calls = []
    listed = pipeline(scenes(3), layout_seeds=[5, 6, 7], **FAST)
    progress = lambda done, total: calls.append((done, total))  # noqa: E731
    streamed = list(pipeline.stream(iter(scenes(3)), layout_seeds=[5, 6, 7], progress=progress, **FAST))
    for one, other in zip(listed, streamed, strict=True):
        assert one.seed == other.seed and np.array_equal(one.latents, other.latents)
    done, total = zip(*calls, strict=True)
    assert done[-1] == total[-1] and list(done) == sorted(done) and list(total) == sorted(total)
    with pytest.raises(InputError, match="layout_seeds: expected one for each layout, got 1"):
        list(pipeline.stream(iter(scenes(2)), layout_seeds=[5], **FAST))


def test_progress_counts_what_a_list_takes_from_the_start(pipeline):
    calls = []
    layouts = [make_layout(count, f"scene{count}") for count in (1, 2, 3)]
    list(pipeline.stream(layouts, [0, 1], progress=lambda done, total: calls.append((done, total)), **FAST))
    # PLMS's first step takes two evaluations: two of all rows, then one of each image, with guidance.
    expected = 2 * 2 * sum(2 * (1 + count) + 1 for count in (1, 2, 3))
    assert {total for _, total in calls} == {expected} and calls[-1][0] == expected


def test_results_come_before_the_error_of_a_later_layout(pipeline, events):
    def source():
        yield from scenes(2)
        yield make_layout(1, "last")
        yield make_layout(1, "with_the_last")
        raise InputError("scene4.json: not valid JSON")

    names = []
    with pytest.raises(InputError, match="scene4.json: not valid JSON"):
        for result in pipeline.stream(source(), **FAST):
            names.append(result.layout.name)
    assert names == ["scene0", "scene1", "last", "with_the_last"]

    odd = make_layout(1, "odd", side=30)
    with pytest.raises(InputError, match="odd: width: expected a multiple of 4"):
        for result in pipeline.stream(iter([*scenes(1), odd]), **FAST):
            names.append(result.layout.name)
    assert names[4:] == ["scene0"]


def test_a_list_is_checked_before_anything_is_drawn(pipeline, events):
    with pytest.raises(InputError, match="odd: width: expected a multiple of 4"):
        next(pipeline.stream([*scenes(1), make_layout(1, "odd", side=30)], **FAST))
    assert events == []


def test_an_error_of_a_launch_comes_in_its_turn(pipeline, monkeypatch):
    start = pipeline.start_batch

    def fail(request, batch, watched):
        if batch[0].layout.name == "scene2":
            raise RuntimeError("out of memory")
        return start(request, batch, watched)

    monkeypatch.setattr(pipeline, "start_batch", fail)
    names = []
    with pytest.raises(RuntimeError, match="out of memory"):
        for result in pipeline.stream(scenes(4), **FAST):
            names.append(result.layout.name)
    assert names == ["scene0", "scene1"]


def test_one_ahead():
    made = []

    def source():
        for i in range(3):
            made.append(i)
            yield i

    for i in one_ahead(source()):
        assert made == list(range(min(i + 2, 3)))
    assert list(one_ahead(iter(()))) == []
