"""A config with which train.py takes seconds: the really small model of training_common on a dataset given by flags."""

from ml_collections import ConfigDict
from training_common import tiny_model


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            model=tiny_model().to_dict(),
            sampling=dict(steps=2, mis=0.0),
            data=dict(
                dir="",
                train_split="train",
                validation_split="",
                workers=0,
                prefetch=2,
                cache_latents=False,
                examples=dict(image_size=16, map_size=64, flip=0.5),
            ),
            train=dict(
                start="",
                trainable="paper",
                grounding=True,
                task="diffusion",
                steps=10,
                batch_size=4,
                accumulate=1,
                seed=0,
                dtype="float32",
                remat="none",
                max_skips=3,
                log_every=1,
                save_every=5,
                keep_newest=3,
                keep_every=0,
                validate_every=0,
                validation_batches=1,
                sample_every=0,
                sample_layouts="",
                sample_count=1,
                profile_start=-1,
                optimizer=dict(learning_rate=1e-3, warmup_steps=2, ema_decay=0.9),
            ),
            parallel=dict(data=-1, fsdp=1, frozen="replicated"),
        )
    )
