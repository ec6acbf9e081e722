#!/usr/bin/env bash
# Trains on a TPU slice: makes it, installs, and starts the same command on every host. After a preemption run it again:
# the run goes on at its newest checkpoint.
#
#   PROJECT=mine ZONE=us-west4-a REPOSITORY=https://… BUCKET=gs://mine scripts/tpu/tpu_vm.sh
#
# The bucket has checkpoints/sd15_base and datasets/coco (docs/training.md, sections 2 and 3).
set -euo pipefail
: "${PROJECT:?}" "${ZONE:?}" "${REPOSITORY:?the address to clone}" "${BUCKET:?gs://NAME}"
NAME=${NAME:-instdiff} CHIP=${CHIP:-v5e} TYPE=${TYPE:-v5litepod-16} VERSION=${VERSION:-v2-alpha-tpuv5-lite}
where=(--project="$PROJECT" --zone="$ZONE")

gcloud compute tpus tpu-vm describe "$NAME" "${where[@]}" > /dev/null 2>&1 ||
    gcloud compute tpus tpu-vm create "$NAME" "${where[@]}" --accelerator-type="$TYPE" --version="$VERSION" --spot

gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker=all --command="
    set -e
    test -d instdiff_jax || git clone --depth 1 '$REPOSITORY' instdiff_jax
    cd instdiff_jax
    pip install --quiet -r requirements.txt 'jax[tpu]' gcsfs google-cloud-storage
    eval \"\$(python3 -m instdiff_jax.parallel.chip_flags $CHIP)\"
    python3 train.py --config=configs/coco.py --workdir=$BUCKET/runs/coco --config.train.start=$BUCKET/checkpoints/sd15_base --config.data.dir=$BUCKET/datasets/coco --config.train.accumulate=4
"
