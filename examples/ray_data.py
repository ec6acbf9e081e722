"""Many layouts on many machines with Ray Data: one Pipeline an actor.

    pip install "ray[data]"
    python examples/ray_data.py --checkpoint checkpoints/sd15 --layouts layouts --output images --actors 8 --gpus 1

Every machine of the Ray cluster sees the same folders. For each layout x.json this writes OUT/x/<seed>.png. What is
there already is not made again, so the same command goes on after a stop.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


class Sampler:
    """An actor: loads the checkpoint once, then turns batches of layouts into images."""

    def __init__(self, checkpoint: str, output: str, seeds: Sequence[int], settings: dict[str, Any]):
        from instdiff_jax import Pipeline

        self._pipeline = Pipeline.from_checkpoint(checkpoint)
        self._output, self._seeds, self._settings = Path(output), list(seeds), settings

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list]:
        """Takes paths of layouts; returns the file and the seed of each image."""
        from instdiff_jax import Layout
        from instdiff_jax.files import write_file

        layouts = [Layout.from_json(path, name=Path(path).stem) for path in batch["path"]]
        made: dict[str, list] = {"file": [], "seed": []}
        for result in self._pipeline(layouts, seeds=self._seeds, **self._settings):
            folder = self._output / result.layout.name
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{result.seed}.png"
            write_file(path, lambda file, image=result.image: image.save(file, "PNG"))  # whole or not at all
            made["file"].append(str(path))
            made["seed"].append(result.seed)
        return made


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--layouts", type=Path, required=True, help="a folder of layouts")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--num_images", type=int, default=1, help="images per layout, of seeds 0, 1, ...")
    parser.add_argument("--batch_size", type=int, default=8, help="layouts an actor takes at a time")
    parser.add_argument("--actors", type=int, default=1)
    parser.add_argument("--gpus", type=float, default=0, help="of each actor")
    parser.add_argument("--tpus", type=float, default=0, help="chips of each actor")
    parser.add_argument("--steps", type=int, default=50)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Samples; returns the number of new images."""
    import ray

    args = parse_args(argv)
    seeds = range(args.num_images)
    waiting = [
        {"path": str(path.absolute())}
        for path in sorted(args.layouts.glob("*.json"))
        if not all((args.output / path.stem / f"{seed}.png").exists() for seed in seeds)
    ]
    made = 0
    if waiting:
        made = (
            ray.data.from_items(waiting)
            .repartition(max(args.actors, -(-len(waiting) // args.batch_size)))  # as many blocks as there are batches
            .map_batches(
                Sampler,
                fn_constructor_args=(
                    str(args.checkpoint.absolute()),
                    str(args.output.absolute()),
                    seeds,
                    {"steps": args.steps},
                ),
                batch_size=args.batch_size,
                compute=ray.data.ActorPoolStrategy(size=args.actors),
                num_gpus=args.gpus or None,
                resources={"TPU": args.tpus} if args.tpus else None,
            )
            .count()
        )
    print(f"{made} images in {args.output}")
    return made


if __name__ == "__main__":
    main()
