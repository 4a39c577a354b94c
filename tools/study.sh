#!/usr/bin/env bash
# The study of models that have learned: bash tools/study.sh DATA_DIR OUT_DIR
#
# Two runs at a time, of one thread each; a run takes 10 minutes (cifar100, naive) to an hour (contrast; 1D fields where other
# jobs run beside), all of them some days. It may be stopped at any time: finished runs are skipped, an interrupted one resumes,
# and a run whose row is in docs/results.csv is not repeated even if its folder is lost. The most important runs come first.
set -euo pipefail
cd "$(dirname "$0")/.."
data=$(realpath "${1:?folder of the data}") runs=$(realpath -m "${2:?folder for the runs}")
run() {
  python tools/reproduce.py --data-dir "$data" --out-dir "$runs" --known docs/results.csv "$@"
  cp "$runs/results.csv" docs/results.csv
}

methods=(naive orca mona scratch recraft pare warmup frozen lora norms)
voc=(--options="--source cifar10") # PaRe's source on fields: VOC, the published one, was not available

run --tasks advection1d satellite --seeds 3 --methods "${methods[@]}"
run --tasks cifar100 --seeds 3 --methods "${methods[@]}"
run --tasks cifar100 --seeds 3 --methods lsg lsg-text lsg-random lsg-simplex lsg-pull
# MINILM: the folder of a text encoder that knows what names mean, as all-MiniLM-L6-v2
[ -z "${MINILM:-}" ] || run --tasks cifar100 --seeds 3 --methods lsg-minilm lsg-minilm-pull lsg-minilm-text
run --tasks cifar100 satellite --seeds 3 --methods contrast contrast-stage1 contrast-gate contrast-random
run --tasks darcy --seeds 3 --methods "${methods[@]}" "${voc[@]}"
run --tasks spherical burgers1d diffusion_reaction1d --seeds 3 --methods "${methods[@]}"
run --tasks shallow_water2d --seeds 3 --methods "${methods[@]}" "${voc[@]}"
run --tasks advection1d --seeds 3 --methods mean input fourier
run --tasks satellite --seeds 3 --methods boosting logistic
run --tasks cifar100 spherical --seeds 3 --methods convnet
