"""What the first process of a job cannot do ends all of them."""

import jax
import pytest
from jax.experimental import multihost_utils

from instdiff_jax.errors import InputError
from instdiff_jax.parallel.mesh import first_process_decides


def refuse():
    raise InputError("run: in use by another run")


def test_one_process_alone():
    done = []
    first_process_decides(lambda: done.append(1))
    with pytest.raises(InputError, match="^run: in use by another run$"):
        first_process_decides(refuse)
    assert done == [1]


def test_the_others_raise_what_the_first_one_did(monkeypatch):
    sent = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", lambda text: sent.append(text) or sent[0])
    for index in (0, 1):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        with pytest.raises(InputError, match="^run: in use by another run$"):
            first_process_decides(refuse if index == 0 else pytest.fail)
