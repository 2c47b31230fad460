#!/bin/bash
# The tables of `peers`, whole: experiments/table.sh DATA FOLDER. Run it again to resume; several at once
# share the work. Idle priority where chrt is known. DATA holds busi, brain_mri, chest_xray and sets.
# Core hours: three sets 25, development sets 13, report sets 5 (2,160, 1,440 and 540 runs); disk below 20 GB.
set -eu
cd "$(dirname "$0")/.."
data=$1 folder=$2 python=${PYTHON:-python} idle=$(command -v chrt > /dev/null && echo chrt -i 0 || true)
export PYTHONPATH=.

sweep() {  # NAME FLAGS...
  $idle "$python" experiments/sweep.py --variants peers --runs "$folder/runs" --out "$folder/$1" \
    --set "data.root=$data" --set "cache=$folder/cache" "${@:2}"
}

named() { printf 'configs/sets.py:%s ' "$@"; }

sweep three_sets --config configs/{busi,brain_mri,chest_xray}.py --k 4 8 16 32 --draws 10
sweep development --config $(named oct_mx fundus_mx knee_xr derm_ph2 gallbladder_us wce_bleed lung_ct \
  histo_lung) --k 4 16 --draws 5
sweep report --config $(named mammo_mias blood_rbc spine_xr) --k 4 16 --draws 5 --report
