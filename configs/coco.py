"""InstanceDiffusion trained on COCO from Stable Diffusion 1.5, on a TPU pod or many GPUs, as in the paper.

Make the start and the dataset, then run this on every host:

    python -m instdiff_jax convert --input v1-5-pruned.safetensors --convnext convnext_tiny.pth \
        --output checkpoints/sd15_base
    python -m instdiff_jax build-coco --coco_dir coco --data_dir datasets/coco
    python train.py --config=configs/coco.py --workdir=runs/coco

The fusers, UniFusion and ScaleU learn; Stable Diffusion is frozen. 512 images a step, AdamW at 5e-5 after 5,000 steps
of warm-up, as released. The loss of noise prediction moves little and is noisy: watch validation_loss, which always
draws the same noise, and the sample grids.
"""

from ml_collections import ConfigDict

from configs import sd15


def get_config() -> ConfigDict:
    config = sd15.get_config()
    config.data = ConfigDict(
        dict(
            dir="datasets/coco",
            train_split="train",
            validation_split="val",
            workers=16,
            prefetch=2,
            cache_latents=False,
            imported_phrases=False,
            # The released training's; see data/examples.py.
            examples=dict(
                image_size=512,
                map_size=512,
                min_area=0.01,
                flip=0.5,
                keep_caption=0.5,
                count_categories=True,
                instance_caption=0.5,
                drop_box=0.1,
                drop_point=0.1,
                drop_scribble=0.1,
                drop_mask=0.1,
                only_point=0.1,
                only_mask=0.1,
                only_scribble=0.0,
                null_grounding=0.1,
                dropout_per="sample",
                point="center",
                use_crowds=False,
                max_instances=30,
            ),
        )
    )
    config.train = ConfigDict(
        dict(
            task="diffusion",
            start="checkpoints/sd15_base",
            trainable="paper",
            grounding=True,
            masked_attention="none",
            steps=100_000,
            batch_size=512,
            accumulate=1,
            seed=0,
            dtype="bfloat16",
            remat="blocks",
            loss_weight="epsilon",
            loss_weight_limit=0.0,
            kl_weight=1e-6,
            max_skips=20,
            log_every=50,
            save_every=1000,
            keep_newest=3,
            keep_every=10_000,
            validate_every=1000,
            validation_batches=4,
            sample_every=5000,
            sample_layouts="examples",
            sample_count=4,
            profile_start=-1,
            profile_steps=5,
            optimizer=dict(
                learning_rate=5e-5,
                schedule="constant",
                warmup_steps=5000,
                beta1=0.9,
                beta2=0.999,
                eps=1e-8,
                weight_decay=0.0,
                clip_norm=0.0,
                ema_decay=0.9999,
            ),
        )
    )
    config.parallel = ConfigDict(
        dict(
            data=-1,
            fsdp=16,
            # The first pattern that matches a whole path decides; kernels and embeddings hold nearly every parameter.
            rules=((r".*/(kernel|embedding)", "fsdp"), (r".*", "replicate")),
            frozen="replicated",
        )
    )
    return config
