"""What the server's answers hold."""

import base64
import dataclasses
import json
import typing
from collections.abc import Sequence
from typing import Any

from instdiff_jax.config import SamplingConfig
from instdiff_jax.errors import InputError, short
from instdiff_jax.grounding import FORMAT_CHOICES
from instdiff_jax.layout import MAX_INSTANCES, Layout
from instdiff_jax.sampling.metadata import is_png, read_origin, version
from instdiff_jax.sampling.pipeline import Pipeline
from instdiff_jax.sampling.presets import PRESETS
from instdiff_jax.serving.jobs import Job
from instdiff_jax.serving.limits import Limits

# What live mode asks for: a picture within a blink. Of the solvers, DDIM is best at four steps (docs/results.md).
LIVE = dict(sampler="ddim", steps=4, mis=0.0)
_ERROR = {"content": {"application/json": {"schema": {"type": "object", "properties": {"error": {"type": "string"}}}}}}
_MEANINGS = {
    400: "no JSON",
    401: "no token",
    404: "no such job",
    409: "cancelled",
    413: "too large",
    422: "a field is not as expected",
    429: "too many images wait",
    503: "starts or stops",
    504: "timed out",
}
PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"description": meaning, **_ERROR} for status, meaning in _MEANINGS.items()
}


def job_answer(job: Job, pictures: bool = True) -> dict[str, Any]:
    """A job's state, and with `pictures` those that are drawn."""
    work = job.work
    answer: dict[str, Any] = {
        "id": job.id,
        "state": job.state,
        "progress": 1.0 if job.state == "done" else min(job.done / max(work.evaluations, 1), 1.0),
        "seeds": list(work.seeds),
    }
    if job.problem:
        answer["error"] = job.problem
    if job.finished is not None:
        answer["seconds"] = round(job.finished - job.created, 4)
    if pictures:
        answer["images"] = [
            {"seed": work.seeds[index], "png": base64.b64encode(job.pictures[index]).decode()}
            for index in sorted(job.pictures)
        ]
    return answer


def describe_model(pipeline: Pipeline, limits: Limits, about: dict[str, Any]) -> dict[str, Any]:
    """The model, its default settings, and what may be asked for."""
    hints = typing.get_type_hints(SamplingConfig)
    choices = {
        name: list(typing.get_args(hint)) for name, hint in hints.items() if typing.get_origin(hint) is typing.Literal
    }
    return {
        "version": version(),
        **about,
        "canvas": pipeline.config.canvas_side,
        "canvas_multiple": pipeline.config.canvas_stride,
        "sampling": pipeline.sampling.to_dict(),
        "live": LIVE,
        "presets": {name: pipeline.settings(name).to_dict() for name in PRESETS},
        "choices": choices | {"format": list(FORMAT_CHOICES)},
        "limits": dataclasses.asdict(limits) | {"instances": MAX_INSTANCES},
    }


def first_problem(errors: Sequence[Any]) -> str:
    """The first fault that pydantic found, as one line that names the field."""
    error = errors[0]
    where = ".".join(str(part) for part in error["loc"] if part != "body") or "request"
    given = f", got {short(error['input'])}" if "input" in error and not isinstance(error["input"], dict) else ""
    return " ".join(f"{where}: {error['msg']}{given}".split())[:2000]


def read_layout(source: Layout | bytes, limits: Limits = Limits()) -> dict[str, Any]:
    """A layout for the page: the official JSON's object with masks as lists of run lengths.

    Of a picture made here, its seed and settings come with it.
    """
    settings: dict[str, Any] = {}
    if isinstance(source, Layout):
        layout = source
    elif is_png(source):
        origin = read_origin(source)
        layout = origin.layout
        settings = {"seed": origin.seed, "format": origin.format, "sampling": origin.sampling.to_dict()}
    else:
        layout = _read_json(source, limits)
    values = layout.to_dict()
    for anno, instance in zip(values["annos"], layout.instances, strict=True):
        if instance.rle is not None:
            anno["mask"] = {"size": list(instance.rle.size), "counts": instance.rle.runs()}
    return {"layout": values, **settings}


def _read_json(data: bytes, limits: Limits) -> Layout:
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"layout: expected JSON or a picture: {short(str(error))}") from error
    return limits.read_layout(values)
