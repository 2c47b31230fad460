#!/bin/bash
# Trains the embedded CLIP on accelerators: experiments/pretrain/accelerator.sh RUN OUT [MINUTES] [FLAGS].
# RUN holds pack.npz (`--stage pack`, made beforehand), tokenizer and leaks.json; OUT gets log, plan,
# checkpoint (one that is there is continued) and clip, the folder that the package reads, in float16.
set -eu
cd "$(dirname "$0")/../.."
run=$1 out=$2 minutes=${3:-6}
mkdir -p "$out"
cp -r "$run"/{pack.npz,tokenizer,leaks.json} "$out"
export PYTHONPATH=.:experiments PYTHONUNBUFFERED=1
train() { "${PYTHON:-python3}" experiments/pretrain_compact_clip.py --run "$out" "$@"; }
train --stage device --minutes "$minutes" --dtype bfloat16 --width 256 --layers 8 --batch 1024 --patches 98 \
  --rate 2e-3 --steps 600 "${@:4}"
rm "$out/pack.npz"
train --export "$out/clip" --half
