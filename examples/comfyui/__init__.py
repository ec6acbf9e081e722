"""A ComfyUI node that draws layouts with a running `instdiff studio`. Copy this folder to ComfyUI's custom_nodes.

Only what ComfyUI has is needed: torch, numpy and Pillow.
"""

import base64
import io
import json
import urllib.error
import urllib.request

import numpy as np
from PIL import Image


def ask(server: str, body: dict, token: str = "") -> list[bytes]:
    """The PNGs of a request to `POST /v1/images`; RuntimeError with the server's line if it refuses."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    request = urllib.request.Request(f"{server.rstrip('/')}/v1/images", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request) as answer:
            pictures = json.load(answer)["images"]
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"instdiff studio: {json.load(error)['error']}") from error
    except urllib.error.URLError as error:
        raise RuntimeError(f"instdiff studio: no answer from {server}; start it with: instdiff studio") from error
    return [base64.b64decode(picture["png"]) for picture in pictures]


class InstanceDiffusion:
    """Draws a layout (the official JSON, or that of another tool that the studio reads)."""

    CATEGORY = "image/layout"
    FUNCTION = "draw"
    RETURN_TYPES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "layout": ("STRING", {"multiline": True}),
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**63 - 1}),
                "images": ("INT", {"default": 1, "min": 1, "max": 16}),
                "server": ("STRING", {"default": "http://localhost:7860"}),
            },
            "optional": {
                "steps": ("INT", {"default": 0, "min": 0, "max": 1000, "tooltip": "0: the checkpoint's"}),
                "guidance_scale": (
                    "FLOAT",
                    {"default": -1.0, "min": -1.0, "max": 100.0, "tooltip": "-1: the checkpoint's"},
                ),
                "negative_prompt": ("STRING", {"default": ""}),
                "preset": (["checkpoint", "quality", "fast", "turbo"],),
                "format": (["auto", "box", "point", "scribble", "mask"],),
                "init_image": ("IMAGE",),
                "strength": ("FLOAT", {"default": 0.75, "min": 0.0, "max": 1.0}),
                "token": ("STRING", {"default": ""}),
            },
        }

    def draw(self, layout: str, seed: int, images: int, server: str, **given) -> tuple:
        """The pictures as ComfyUI has them: float32 [images, height, width, 3] from 0 to 1."""
        import torch

        body = {"layout": json.loads(layout), "seeds": [seed + i for i in range(images)]}
        body |= {name: given[name] for name in ("format", "negative_prompt") if given.get(name)}
        if given.get("steps"):
            body["steps"] = given["steps"]
        if given.get("guidance_scale", -1) >= 0:
            body["guidance_scale"] = given["guidance_scale"]
        if given.get("preset", "checkpoint") != "checkpoint":
            body["preset"] = given["preset"]
        if given.get("init_image") is not None:
            pixels = (np.asarray(given["init_image"][0]) * 255).round().astype(np.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, format="PNG")
            body |= {"init_image": base64.b64encode(file.getvalue()).decode(), "strength": given.get("strength", 0.75)}
        pictures = ask(server, body, given.get("token", ""))
        arrays = [np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"), np.float32) / 255 for picture in pictures]
        return (torch.from_numpy(np.stack(arrays)),)


NODE_CLASS_MAPPINGS = {"InstanceDiffusion": InstanceDiffusion}
NODE_DISPLAY_NAME_MAPPINGS = {"InstanceDiffusion": "InstanceDiffusion (instdiff)"}
