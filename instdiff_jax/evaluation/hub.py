"""Detectors and CLIP of the transformers library, and FID's Inception network of torch-fidelity, in PyTorch.

Models come from a folder or from the hub's cache. Nothing is downloaded.
"""

import hashlib
import inspect
from typing import Any, Self

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from instdiff_jax.data.plugs import loading_model, require_transformers
from instdiff_jax.errors import InputError
from instdiff_jax.evaluation.detect import Detection, xywh_of_mask


class HubDetector:
    """An object detection model (boxes) or an instance segmentation model (boxes and masks).

    Its labels are matched to the split's categories by name.

    Attributes:
        has_masks: whether it is a segmentation model.
    """

    def __init__(self, model: Any, processor: Any, has_masks: bool, threshold: float = 0.01):
        """
        Args:
            threshold: detections with a lower score are dropped; low, because average precision uses them all.
        """
        self._model, self._processor, self.has_masks, self._threshold = model.eval(), processor, has_masks, threshold

    @classmethod
    def from_name(cls, name: str) -> Self:
        """Loads a model; InputError if it is not on this machine or is not a detector."""
        transformers = require_transformers("--detector")
        with loading_model("--detector", name):
            config = transformers.AutoConfig.from_pretrained(name, local_files_only=True)
            architecture = (config.architectures or [""])[0]
            has_masks = "Segmentation" in architecture
            if not has_masks and not architecture.endswith("ForObjectDetection"):
                raise ValueError(f"expected a model for object detection or segmentation, got {architecture or 'none'}")
            model = getattr(transformers, architecture).from_pretrained(name, local_files_only=True)
            processor = transformers.AutoImageProcessor.from_pretrained(name, local_files_only=True)
            wanted = f"post_process_{'instance_segmentation' if has_masks else 'object_detection'}"
            if not hasattr(processor, wanted):
                raise ValueError(f"{type(processor).__name__} has no {wanted}")
            if has_masks and "return_binary_maps" not in inspect.signature(getattr(processor, wanted)).parameters:
                raise ValueError(f"{type(processor).__name__}.{wanted} gives no mask for each instance")
        return cls(model, processor, has_masks)

    @property
    def fingerprint(self) -> str:
        """Hash of everything that determines its detections: weights, labels and preprocessing."""
        import torch

        digest = hashlib.sha256(f"{self._model.config.id2label} {self._processor.to_json_string()}".encode())
        for name, tensor in sorted(self._model.state_dict().items()):
            digest.update(name.encode())
            # As bytes: numpy has no bfloat16.
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()[:32]

    def detect(self, images: UInt8[np.ndarray, "b H W 3"]) -> list[list[Detection]]:
        """The instances in each image."""
        import torch

        inputs = self._processor(images=[Image.fromarray(image) for image in images], return_tensors="pt")
        with torch.no_grad():
            outputs = self._model(**inputs)
        sizes = [image.shape[:2] for image in images]
        if self.has_masks:
            found = self._processor.post_process_instance_segmentation(
                outputs, threshold=self._threshold, target_sizes=sizes, return_binary_maps=True
            )
            return [self._from_masks(item) for item in found]
        found = self._processor.post_process_object_detection(outputs, threshold=self._threshold, target_sizes=sizes)
        return [self._from_boxes(item, size) for item, size in zip(found, sizes, strict=True)]

    def _from_masks(self, item: dict[str, Any]) -> list[Detection]:
        detections = []
        for k, info in enumerate(item["segments_info"]):
            mask = np.asarray(item["segmentation"][k], bool)
            if mask.any():
                name = self._model.config.id2label[info["label_id"]]
                detections.append(Detection(name, float(info["score"]), xywh_of_mask(mask), mask))
        return detections

    def _from_boxes(self, item: dict[str, Any], size: tuple[int, int]) -> list[Detection]:
        detections = []
        for score, label, box in zip(item["scores"], item["labels"], item["boxes"], strict=True):
            x0, y0, x1, y1 = (float(edge) for edge in box)
            place = x0, y0, max(x1 - x0, 0.0), max(y1 - y0, 0.0)
            name = self._model.config.id2label[int(label)]
            detections.append(Detection(name, float(score), place, np.zeros(size, bool)))
        return detections


class Clip:
    """A CLIP model: embeds images and texts as unit vectors. Their product is the CLIP score."""

    def __init__(self, model: Any, processor: Any, tokenizer: Any):
        self._model, self._processor, self._tokenizer = model.eval(), processor, tokenizer

    @classmethod
    def from_name(cls, name: str) -> Self:
        """Loads a model; InputError if it is not on this machine or is not a CLIP model."""
        transformers = require_transformers("--clip")
        with loading_model("--clip", name):
            model = transformers.CLIPModel.from_pretrained(name, local_files_only=True)
            processor = transformers.CLIPImageProcessor.from_pretrained(name, local_files_only=True)
            tokenizer = transformers.AutoTokenizer.from_pretrained(name, local_files_only=True)
        return cls(model, processor, tokenizer)

    def embed_images(self, images: list[UInt8[np.ndarray, "h w 3"]]) -> Float[np.ndarray, "n d"]:
        """Unit vectors of images of any size."""
        inputs = self._processor(images=[Image.fromarray(image) for image in images], return_tensors="pt")
        return self._unit(self._model.get_image_features, inputs)

    def embed_texts(self, texts: list[str]) -> Float[np.ndarray, "n d"]:
        """Unit vectors of texts, truncated to the model's length."""
        length = self._model.config.text_config.max_position_embeddings
        inputs = self._tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        return self._unit(self._model.get_text_features, inputs)

    def _unit(self, embed: Any, inputs: Any) -> Float[np.ndarray, "n d"]:
        import torch

        with torch.no_grad():
            vectors = embed(**inputs)
        # Newer releases of the library wrap the vectors in an object.
        vectors = np.asarray(getattr(vectors, "pooler_output", vectors), np.float64)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


class Inception:
    """The Inception network that defines FID: its 2,048 last features. It resizes pictures to 299 pixels itself."""

    def __init__(self, network: Any):
        self._network = network

    @classmethod
    def from_file(cls, file: str) -> Self:
        """Opens the weights that torch-fidelity publishes; InputError where they or the library are missing."""
        try:
            import torch
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise InputError(f"--features: expected torch-fidelity to be installed ({error})") from error
        with loading_model("--features", file):
            torch.load(file, weights_only=True)  # the library would execute what a broken or foreign file says
            return cls(FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=file))

    def __call__(self, images: UInt8[np.ndarray, "b H W 3"]) -> Float[np.ndarray, "b features"]:
        """The features of images."""
        import torch

        with torch.no_grad():
            return self._network(torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))))[0].numpy()
