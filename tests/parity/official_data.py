"""The official code's training examples, training batch and settings, in our form."""

import numpy as np

from common import parity
from instdiff_jax.data.dataset import AnnotatedInstance, Record
from instdiff_jax.training.settings import OptimizerSettings, TrainSettings


def unpack(maps):
    return ((maps[None] >> np.arange(30, dtype=np.uint32)[:, None, None]) & 1).astype(bool)


def official_record(case):
    data = parity("training_examples")
    height, width = (int(side) for side in data[f"c{case}_size"])
    instances = tuple(
        AnnotatedInstance(box=tuple(box), category=f"thing{i % 4}", mask=counts, phrase=i)
        for i, (counts, box) in enumerate(zip(data[f"c{case}_rle_counts"], data[f"c{case}_bbox"], strict=True))
    )
    return Record(data[f"c{case}_png"].tobytes(), width, height, case, "example", ("a scene of things",), instances)


def official_batch(data):
    """The batch of tests/parity/train_small.npz, channels last, every format kept."""
    bits = np.left_shift(np.uint32(1), np.arange(30, dtype=np.uint32))
    segs, valid = data["segs"], data["masks"]
    grounding = dict(
        boxes=data["boxes"],
        points=data["points"],
        scribbles=data["scribbles"],
        mask_points=data["polygons"],
        maps=(segs * bits[None, :, None, None]).sum(1, dtype=np.uint32),
        phrase_embeddings=data["text_embeddings"],
        valid=valid,
        has_box=valid,
        has_point=valid,
        has_scribble=(data["scribbles"].sum(-1) + valid > 0).astype(np.float32),
        has_mask=(data["polygons"].sum(-1) + valid > 0).astype(np.float32),
        has_map=segs.any((1, 2, 3)).astype(np.float32),
    )
    return dict(
        latents=data["z"].transpose(0, 2, 3, 1),
        noise=data["noise"].transpose(0, 2, 3, 1),
        timesteps=data["timesteps"].astype(np.int32),
        context=data["context"],
        grounding=grounding,
    )


def official_settings(data):
    """The settings of the four steps of tests/parity/train_small.npz."""
    optimizer = OptimizerSettings(
        learning_rate=float(data["learning_rate"]),
        warmup_steps=int(data["warmup_steps"]),
        ema_decay=float(data["ema_rate"]),
    )
    return TrainSettings(steps=4, batch_size=2, dtype="float32", optimizer=optimizer)
