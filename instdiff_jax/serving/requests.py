"""What `POST /v1/images` takes: the request's fields, and the checked work they ask for."""

import dataclasses
import typing
from typing import Annotated, Any, Literal

import numpy as np
from jaxtyping import Bool
from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from instdiff_jax.config import Sampler, SamplingConfig, Sigmas
from instdiff_jax.errors import InputError
from instdiff_jax.geometry.masks import box_from_mask
from instdiff_jax.grounding import Format
from instdiff_jax.layout import MAX_INSTANCES, Instance, Layout
from instdiff_jax.sampling.metadata import read_origin
from instdiff_jax.sampling.pipeline import Pipeline
from instdiff_jax.sampling.presets import PRESETS
from instdiff_jax.sampling.request import Request, SamplingOptions, make_request
from instdiff_jax.serving.limits import Limits, decode_base64, read_mask, read_pixels

_NUMBERS = {"type": "array", "items": {"type": "number"}}
_RLE = {
    "type": "object",
    "properties": {"size": {"type": "array", "items": {"type": "integer"}}, "counts": {}},
    "required": ["size", "counts"],
}
_ANNO = {
    "type": "object",
    "properties": {
        "caption": {"type": "string"},
        "category_name": {"type": "string"},
        "bbox": _NUMBERS | {"description": "x, y, width, height in pixels"},
        "point": _NUMBERS | {"description": "x, y"},
        "scribble": _NUMBERS | {"description": "x1, y1, x2, y2, ..."},
        "mask": {"anyOf": [_RLE, {"type": "array", "items": _NUMBERS}], "description": "COCO run lengths or polygons"},
    },
}
LAYOUT_SCHEMA = {
    "type": "object",
    "description": "a layout in the official JSON, see docs/layouts.md",
    "properties": {
        "caption": {"type": "string"},
        "width": {"type": "integer", "minimum": 1},
        "height": {"type": "integer", "minimum": 1},
        "annos": {"type": "array", "items": _ANNO, "minItems": 1, "maxItems": MAX_INSTANCES},
    },
    "required": ["caption", "width", "height", "annos"],
}
_PRESETS = typing.cast(Any, Literal[tuple(PRESETS)])
Base64 = Annotated[str, Field(json_schema_extra={"contentEncoding": "base64"})]
Number = Annotated[float, Field(allow_inf_nan=False)]


class ImagesRequest(BaseModel):
    """Draw one picture of a layout for each seed. Settings that are left out are the preset's or the checkpoint's."""

    model_config = ConfigDict(extra="forbid")

    layout: Annotated[dict[str, Any], WithJsonSchema(LAYOUT_SCHEMA)]
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**63)]], Field(min_length=1, max_length=256)] = [0]
    format: Format = "auto"
    preset: _PRESETS | None = None
    steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    sampler: Sampler | None = None
    sigmas: Sigmas | None = None
    guidance_scale: Number | None = None
    guidance_interval: tuple[Number, Number] | None = None
    alpha: Number | tuple[Number, Number, Number] | None = None
    mis: Number | None = None
    mis_guidance: bool | None = None
    merge: Literal["mean", "crop"] | None = None
    negative_prompt: str | None = None
    prompt_weights: bool | None = None
    long_prompts: bool | None = None
    masked_attention: Literal["none", "correct", "strict", "official"] | None = None
    reuse: Annotated[int, Field(ge=1, le=1000)] | None = None
    init_image: Annotated[Base64 | None, Field(description="an image as large as the canvas to start from")] = None
    inpaint_mask: Annotated[Base64 | None, Field(description="white where init_image is painted anew")] = None
    strength: Annotated[float, Field(ge=0, le=1)] | None = None
    edit: Annotated[
        Base64 | None, Field(description="a PNG made here: it is kept outside the instances that differ from its own")
    ] = None
    response: Annotated[Literal["json", "png"], Field(description="png needs one seed")] = "json"
    wait: Annotated[bool, Field(description="false: answer with a job at once")] = True
    live: Annotated[
        str | None, Field(max_length=64, description="a newer request with the same text replaces a waiting one")
    ] = None


@dataclasses.dataclass(frozen=True, eq=False)
class Work:
    """What one request asks for, checked.

    Attributes:
        layout: to draw.
        seeds: one image each.
        settings: all of them.
        options: format, start image and mask; without seeds.
        canvas: width and height.
        rows: that each image takes in a batch.
        evaluations: of the UNet on single latents, for all seeds.
    """

    layout: Layout
    seeds: tuple[int, ...]
    settings: SamplingConfig
    options: SamplingOptions
    canvas: tuple[int, int]
    rows: int
    evaluations: int

    @property
    def key(self) -> tuple:
        """Images of equal keys may be drawn in one batch."""
        start = id(self) if self.options.init_image is not None else None
        return self.settings, self.options.format, self.canvas, start

    def request(self, pipeline: Pipeline, seeds: list[int]) -> Request:
        """The pipeline's request for images of this work's key, with these seeds."""
        options = dataclasses.replace(self.options, layout_seeds=seeds)
        return make_request(pipeline.config, self.settings, options)


def check_work(body: ImagesRequest, pipeline: Pipeline, limits: Limits) -> Work:
    """Reads a request; InputError that names the field for anything that cannot be drawn."""
    layout = limits.read_layout(body.layout)
    if len(body.seeds) > limits.images:
        raise InputError(f"seeds: expected at most {limits.images}, got {len(body.seeds)}")
    if body.response == "png" and (len(body.seeds) != 1 or not body.wait):
        raise InputError("response: expected json with several seeds, or with wait false")
    names = [field.name for field in dataclasses.fields(SamplingConfig)]
    given = {name: getattr(body, name) for name in names if getattr(body, name) is not None}
    settings = pipeline.settings(body.preset, **given)
    if settings.steps > limits.steps:
        raise InputError(f"steps: expected at most {limits.steps}, got {settings.steps}")
    canvas = layout.width, layout.height
    options = SamplingOptions(format=body.format, **_start(body, layout, canvas))
    request = make_request(pipeline.config, settings, dataclasses.replace(options, seeds=body.seeds))
    rows, evaluations = 1 + len(request.separate_instances(layout)), request.check([layout])
    return Work(layout, tuple(body.seeds), settings, options, canvas, rows, evaluations)


def _start(body: ImagesRequest, layout: Layout, canvas: tuple[int, int]) -> dict[str, Any]:
    """The start image, and where it is painted anew."""
    if body.edit is not None:
        for name in ("init_image", "inpaint_mask", "strength"):
            if getattr(body, name) is not None:
                raise InputError(f"{name}: expected none beside edit")
        data = decode_base64(body.edit, "edit")
        image = read_pixels(data, "edit", canvas)
        changed = changed_region(read_origin(data, "edit").layout, layout)
        if not changed.any():
            raise InputError("edit: nothing differs from the picture's own layout")
        return {"init_image": image, "inpaint_mask": changed}
    start: dict[str, Any] = {"strength": body.strength}
    if body.init_image is not None:
        start["init_image"] = read_pixels(decode_base64(body.init_image, "init_image"), "init_image", canvas)
    if body.inpaint_mask is not None:
        start["inpaint_mask"] = read_mask(decode_base64(body.inpaint_mask, "inpaint_mask"), "inpaint_mask", canvas)
    return start


def changed_region(before: Layout, after: Layout, margin: float = 0.03) -> Bool[np.ndarray, "H W"]:
    """Where two layouts of one canvas differ: the instances that only one has, grown by a fraction of the canvas.

    With another caption of the whole image, that is everywhere.
    """
    region = np.zeros((after.height, after.width), bool)
    if before.caption != after.caption or (before.width, before.height) != (after.width, after.height):
        return ~region
    extra = round(margin * max(region.shape))
    for ours, others in ((before.instances, after.instances), (after.instances, before.instances)):
        for instance in ours:
            if instance in others:
                continue
            x0, y0, x1, y1 = _extent(instance, region.shape)
            rows = slice(max(int(y0) - extra, 0), int(np.ceil(y1)) + extra)
            region[rows, max(int(x0) - extra, 0) : int(np.ceil(x1)) + extra] = True
    return region


def _extent(instance: Instance, shape: tuple[int, int]) -> tuple[float, float, float, float]:
    """The box around all of an instance's locations; around a lone point a quarter of the canvas."""
    boxes = [] if instance.box is None else [instance.box]
    if instance.mask is not None:
        boxes.append(tuple(box_from_mask(instance.mask)))
    if instance.scribble is not None:
        boxes.append((*instance.scribble.min(axis=0), *instance.scribble.max(axis=0)))
    if instance.point is not None:
        reach = 0 if boxes else max(shape) / 4
        x, y = instance.point
        boxes.append((x - reach, y - reach, x + reach, y + reach))
    corners = np.array(boxes)
    return (*corners[:, :2].min(axis=0), *corners[:, 2:].max(axis=0))
