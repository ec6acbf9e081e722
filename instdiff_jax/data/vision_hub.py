"""Models of the transformers library that find, mask, caption and answer; or functions of the user's in their place."""

from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np
from jaxtyping import Bool
from PIL import Image

from instdiff_jax.data.plugs import import_plug, loading_model, require_transformers
from instdiff_jax.data.vision import Found, Pixels
from instdiff_jax.errors import InputError

# Grounding DINO's thresholds of COCO-MIG's scorer.
BOX_THRESHOLD = TEXT_THRESHOLD = 0.25
# The longest answer and the longest description, in tokens.
ANSWER, DESCRIPTION = 1024, 40


class _HubModel:
    """A model and its processor; subclasses name their classes in the library."""

    _classes = ("AutoModelForImageTextToText", "AutoProcessor")

    def __init__(self, model: Any, processor: Any):
        self._model, self._processor = model.eval(), processor

    @classmethod
    def from_name(cls, flag: str, name: str) -> Self:
        """Loads a folder or a name in the hub's cache; InputError, which names the flag, if that fails."""
        transformers = require_transformers(flag)
        with loading_model(flag, name):
            return cls(
                *(getattr(transformers, kind).from_pretrained(name, local_files_only=True) for kind in cls._classes)
            )


class HubGrounder(_HubModel):
    """A model for zero-shot object detection, such as Grounding DINO."""

    _classes = ("AutoModelForZeroShotObjectDetection", "AutoProcessor")

    def ground(self, image: Pixels, phrase: str) -> Found:
        """Boxes of what the phrase names, highest score first."""
        import torch

        text = f"{phrase.lower().strip().rstrip('.')}."  # the model was trained on such captions
        inputs = self._processor(images=Image.fromarray(image), text=text, return_tensors="pt")
        with torch.no_grad():
            outputs = self._model(**inputs)
        (found,) = self._processor.post_process_grounded_object_detection(
            outputs,
            inputs["input_ids"],
            threshold=BOX_THRESHOLD,
            text_threshold=TEXT_THRESHOLD,
            target_sizes=[image.shape[:2]],
        )
        boxes, scores = (np.asarray(found[key], np.float64) for key in ("boxes", "scores"))
        order = np.argsort(-scores, kind="stable")
        return Found(boxes.reshape(-1, 4)[order], scores[order])


class HubSegmenter(_HubModel):
    """A model that segments what a box is around: SAM."""

    _classes = ("SamModel", "SamProcessor")

    def segment(self, image: Pixels, box: Sequence[float]) -> Bool[np.ndarray, "H W"]:
        """Of the masks that the model proposes, the one that it rates highest."""
        import torch

        inputs = self._processor(
            images=Image.fromarray(image), input_boxes=[[[float(edge) for edge in box]]], return_tensors="pt"
        )
        with torch.no_grad():
            outputs = self._model(**inputs)
        (masks,) = self._processor.image_processor.post_process_masks(
            outputs.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"]
        )
        best = int(outputs.iou_scores.reshape(-1).argmax())
        return np.asarray(masks).reshape(-1, *image.shape[:2])[best].astype(bool)


class HubAnswerer(_HubModel):
    """A vision language model that chats: it takes the most likely word at each step."""

    def answer(self, image: Pixels, question: str) -> str:
        """The answer's text."""
        import torch

        content = [{"type": "image", "image": Image.fromarray(image)}, {"type": "text", "text": question}]
        inputs = self._processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        with torch.no_grad():
            tokens = self._model.generate(**inputs, max_new_tokens=ANSWER, do_sample=False)
        return self._processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]


class HubCaptioner(_HubModel):
    """A model that describes pictures, such as BLIP, BLIP-2 or GIT: it takes the most likely word at each step."""

    def caption(self, image: Pixels) -> str:
        """The description, in one line."""
        import torch

        inputs = self._processor(images=Image.fromarray(image), return_tensors="pt")
        with torch.no_grad():
            tokens = self._model.generate(**inputs, max_new_tokens=DESCRIPTION, do_sample=False)
        return " ".join(self._processor.batch_decode(tokens, skip_special_tokens=True)[0].split())


class _Function:
    """A model that is one function."""

    def __init__(self, function: Callable[..., Any]):
        self.ground = self.segment = self.caption = self.answer = function


# Flag -> the method that its model needs, and the class for models of the transformers library.
_KINDS = {
    "--detector": ("ground", HubGrounder),
    "--segmenter": ("segment", HubSegmenter),
    "--captioner": ("caption", HubCaptioner),
    "--vlm": ("answer", HubAnswerer),
}


def open_model(flag: str, name: str | None) -> Any:
    """The model that a flag names.

    Args:
        flag: --detector, --segmenter, --captioner or --vlm.
        name: `transformers:NAME`, a folder or a name in the hub's cache, or `python:MODULE:FUNCTION`, a function of an
            image (and a phrase, a box or a question), or a class or object with the method.

    Raises:
        InputError: for one that is missing or cannot be opened.
    """
    method, hub = _KINDS[flag]
    kind, _, rest = (name or "").partition(":")
    if kind == "transformers" and rest:
        return hub.from_name(flag, rest)
    if kind != "python" or not rest:
        raise InputError(f"{flag}: expected transformers:NAME or python:MODULE:FUNCTION, got {name or 'nothing'}")
    found = import_plug(flag, f"python:{rest}")
    found = found() if isinstance(found, type) else found
    return found if hasattr(found, method) else _Function(found)
