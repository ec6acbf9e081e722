"""Models of the transformers library that find, mask, caption and answer; or functions of the user's in their place."""

from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np
from jaxtyping import Bool
from PIL import Image

from instdiff_jax.data.plugs import import_plug, loading_model, require_transformers
from instdiff_jax.data.vision import Found, Pictures, Pixels
from instdiff_jax.errors import InputError

# Grounding DINO's thresholds of COCO-MIG's scorer.
BOX_THRESHOLD = TEXT_THRESHOLD = 0.25
# The longest answer and the longest description, in tokens.
ANSWER, DESCRIPTION = 1024, 40


class _HubModel:
    """A model and its processor; subclasses name their classes in the library."""

    _classes: tuple[str, ...] = ("AutoModelForImageTextToText", "AutoProcessor")

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
        return self.ground_all([image], [phrase])[0]

    def ground_all(self, images: Pictures, phrases: Sequence[str]) -> list[Found]:
        """The same for several images, each with its phrase. Only images of one size share a call: others are padded,
        which changes what is found; so do texts of one length."""
        texts = [f"{phrase.lower().strip().rstrip('.')}." for phrase in phrases]  # it was trained on such captions
        groups: dict[tuple, list[int]] = {}
        for k, (image, text) in enumerate(zip(images, texts, strict=True)):
            length = len(self._processor.tokenizer(text)["input_ids"])
            groups.setdefault((image.shape, length), []).append(k)
        found: dict[int, Found] = {}
        for members in groups.values():
            together = self._ground([images[k] for k in members], [texts[k] for k in members])
            found |= dict(zip(members, together, strict=True))
        return [found[k] for k in range(len(texts))]

    def _ground(self, images: Pictures, texts: Sequence[str]) -> list[Found]:
        import torch

        pictures = [Image.fromarray(image) for image in images]
        inputs = self._processor(images=pictures, text=list(texts), return_tensors="pt")
        with torch.no_grad():
            outputs = self._model(**inputs)
        rows = self._processor.post_process_grounded_object_detection(
            outputs,
            inputs["input_ids"],
            threshold=BOX_THRESHOLD,
            text_threshold=TEXT_THRESHOLD,
            target_sizes=[image.shape[:2] for image in images],
        )
        results = []
        for row in rows:
            boxes, scores = (np.asarray(row[key], np.float64) for key in ("boxes", "scores"))
            order = np.argsort(-scores, kind="stable")
            results.append(Found(boxes.reshape(-1, 4)[order], scores[order]))
        return results


class HubSegmenter(_HubModel):
    """A model that segments what a box is around: SAM."""

    _classes: tuple[str, ...] = ("SamModel", "SamProcessor")

    def segment(self, image: Pixels, box: Sequence[float]) -> Bool[np.ndarray, "H W"]:
        """Of the masks that the model proposes, the one that it rates highest."""
        return self.segment_all(image, [box])[0]

    def segment_all(self, image: Pixels, boxes: Sequence[Sequence[float]]) -> list[Bool[np.ndarray, "H W"]]:
        """The same for several boxes; the network looks at the image once."""
        import torch

        listed = [[float(edge) for edge in box] for box in boxes]
        with torch.no_grad():
            masks, ratings = self._propose(image, listed)
        best = ratings.reshape(len(listed), -1).argmax(1)
        return [np.asarray(masks[k, best[k]]).astype(bool) for k in range(len(listed))]

    def _propose(self, image: Pixels, boxes: list[list[float]]) -> tuple[Any, Any]:
        """Masks [box, proposal, H, W] and their ratings."""
        inputs = self._processor(images=Image.fromarray(image), input_boxes=[boxes], return_tensors="pt")
        outputs = self._model(**inputs)
        (masks,) = self._processor.image_processor.post_process_masks(
            outputs.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"]
        )
        return masks, outputs.iou_scores


class HubSegmenter2(HubSegmenter):
    """SAM 2. Its processor in the library needs torchvision; what it does to an image are these few lines."""

    _classes = ("Sam2Model",)

    def __init__(self, model: Any):
        super().__init__(model, None)

    def _propose(self, image: Pixels, boxes: list[list[float]]) -> tuple[Any, Any]:
        import torch
        from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

        side, (height, width) = self._model.config.prompt_encoder_config.image_size, image.shape[:2]
        squeezed = np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR), np.float32) / 255
        pixels = (squeezed - np.array(IMAGENET_DEFAULT_MEAN, np.float32)) / np.array(IMAGENET_DEFAULT_STD, np.float32)
        scaled = torch.tensor(boxes) * torch.tensor([side / width, side / height] * 2)
        outputs = self._model(
            pixel_values=torch.from_numpy(pixels.transpose(2, 0, 1)[None]), input_boxes=scaled[None].float()
        )
        masks = torch.nn.functional.interpolate(outputs.pred_masks[0], (height, width), mode="bilinear")
        return masks > 0, outputs.iou_scores


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
        return self.caption_all([image])[0]

    def caption_all(self, images: Pictures) -> list[str]:
        """The same for several images in one call."""
        import torch

        inputs = self._inputs([Image.fromarray(image) for image in images])
        with torch.no_grad():
            tokens = self._model.generate(**inputs, max_new_tokens=DESCRIPTION, do_sample=False, num_beams=1)
        return [" ".join(text.split()) for text in self._processor.batch_decode(tokens, skip_special_tokens=True)]

    def _inputs(self, pictures: list[Image.Image]) -> Any:
        return self._processor(images=pictures, return_tensors="pt")


class HubFlorence(HubCaptioner):
    """Florence-2: describes pictures, and names the kinds of things in them. It answers no questions."""

    _classes = ("Florence2ForConditionalGeneration", "Florence2Processor")

    def _inputs(self, pictures: list[Image.Image]) -> Any:
        return self._processor(images=pictures, text=["<CAPTION>"] * len(pictures), return_tensors="pt")

    def tags(self, image: Pixels) -> list[str]:
        """The names of what it detects, as it gives them."""
        import torch

        inputs = self._processor(images=Image.fromarray(image), text="<OD>", return_tensors="pt")
        with torch.no_grad():
            tokens = self._model.generate(**inputs, max_new_tokens=ANSWER, do_sample=False, num_beams=1)
        (text,) = self._processor.batch_decode(tokens, skip_special_tokens=False)
        height, width = image.shape[:2]
        return self._processor.post_process_generation(text, task="<OD>", image_size=(width, height))["<OD>"]["labels"]


class _Function:
    """A model that is one function."""

    def __init__(self, function: Callable[..., Any]):
        self.ground = self.segment = self.caption = self.answer = function


# Flag -> the method that its model needs, and the class for models of the transformers library.
_KINDS: dict[str, tuple[str, type[_HubModel]]] = {
    "--detector": ("ground", HubGrounder),
    "--segmenter": ("segment", HubSegmenter),
    "--captioner": ("caption", HubCaptioner),
    "--vlm": ("answer", HubAnswerer),
}
# Models that are opened in another way, by the flag and the `model_type` of their config.
_OTHERS: dict[tuple[str, str], type[_HubModel]] = {
    ("--segmenter", "sam2"): HubSegmenter2,
    ("--segmenter", "sam2_video"): HubSegmenter2,
    ("--captioner", "florence2"): HubFlorence,
    ("--vlm", "florence2"): HubFlorence,
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
        with loading_model(flag, rest):
            config = require_transformers(flag).AutoConfig.from_pretrained(rest, local_files_only=True)
        return _OTHERS.get((flag, config.model_type), hub).from_name(flag, rest)
    if kind != "python" or not rest:
        raise InputError(f"{flag}: expected transformers:NAME or python:MODULE:FUNCTION, got {name or 'nothing'}")
    found = import_plug(flag, f"python:{rest}")
    found = found() if isinstance(found, type) else found
    return found if hasattr(found, method) else _Function(found)
