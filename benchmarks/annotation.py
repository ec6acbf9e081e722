"""Pictures a second that `instdiff annotate` takes, by the number of pictures in a call.

    python -m benchmarks.annotation --batches 1 4 16 --images photos --tags "cat,dog" \\
        --detector transformers:IDEA-Research/grounding-dino-tiny \\
        --captioner transformers:Salesforce/blip-image-captioning-base

The other flags are those of `instdiff annotate`; nothing is written but a table on the screen. The first call of every
batch is a warm-up.
"""

import time
from collections.abc import Sequence

from instdiff_jax.cli import annotate
from instdiff_jax.data.annotate import annotate as annotate_pictures
from instdiff_jax.errors import ArgumentParser, InputError, exit_on_input_error


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16], help="pictures in a call (1 4 16)")
    own, rest = parser.parse_known_args(argv)
    if min(own.batches) < 1:
        raise InputError(f"--batches: expected whole numbers of at least 1, got {own.batches}")
    args = annotate.parse_args([*rest, "--output", "unused"])
    annotate.check_args(args)
    pictures, _ = annotate.read_pictures(args)
    settings, models = annotate.read_settings(args), annotate.open_models(args)
    print("| pictures in a call | pictures/s | per core |\n| ---: | ---: | ---: |")
    for batch in own.batches:
        parts = [pictures[first : first + batch] for first in range(0, len(pictures), batch)]
        annotate_pictures(parts[0], models, settings)
        start, cpu = time.perf_counter(), time.process_time()
        for part in parts:
            annotate_pictures(part, models, settings)
        seconds, busy = time.perf_counter() - start, time.process_time() - cpu
        print(f"| {batch} | {len(pictures) / seconds:.2f} | {len(pictures) / busy:.2f} |")


if __name__ == "__main__":
    with exit_on_input_error():
        main()
