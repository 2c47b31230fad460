#!/bin/bash
# Trains the embedded CLIP on accelerators: experiments/pretrain/accelerator.sh RUN OUT [MINUTES] [FLAGS].
# RUN holds pack.npz (`--stage pack`, made beforehand); OUT gets log, plan and, in float16, the
# decayed weights. A checkpoint in OUT is continued. Export and judge where the tokenizer is:
# copy OUT over RUN, then `--export FOLDER --half`.
set -eu
cd "$(dirname "$0")/../.."
run=$1 out=$2 minutes=${3:-6}
mkdir -p "$out"
cp -n "$run/pack.npz" "$out/"
export PYTHONPATH=.:experiments PYTHONUNBUFFERED=1
"${PYTHON:-python3}" experiments/pretrain_compact_clip.py --run "$out" --stage device --minutes "$minutes" \
  --dtype bfloat16 --width 256 --layers 8 --batch 1024 --patches 98 --rate 2e-3 --steps 600 "${@:4}"
rm "$out/pack.npz"
