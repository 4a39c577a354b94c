#!/usr/bin/env bash
# The runs behind docs/results.md: bash tools/study.sh DATA_DIR OUT_DIR
#
# DATA_DIR holds cifar100, cifar10, tiny_imagenet, satellite, conll2003 and OpenML's tables 23 and 31 (python data.py --prepare).
# What is missing there is replaced by toy data; a study with such rows is not copied to docs/.
# First with 1,000 samples (a run takes 1 to 8 minutes on one thread), then at the default budget (5 minutes to an hour). Two
# runs at a time, of one thread each; all of them take some days. It may be stopped at any time: finished runs are skipped, an
# interrupted one resumes, and a run whose row is in docs/results*.csv is not repeated even if its folder is lost. The most
# important runs come first. Runs go to OUT_DIR, OUT_DIR-1000 and so on, their rows to docs/results*.csv.
set -euo pipefail
trap 'exit 130' INT TERM # otherwise Ctrl-C would only end the current line
data=$(realpath "${1:?folder of the data}")
mkdir -p "${2:?folder for the runs}"
runs=$(realpath "$2") # macOS has no realpath -m
if [[ -n ${MINILM:-} ]]; then MINILM=$(realpath "$MINILM"); export MINILM; fi
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
run() { # NAME of the study ("", -1000, -2000), options of reproduce.py
  local rows=docs/results$1.csv known=()
  if [[ -e $rows ]]; then known=(--known "$rows"); fi
  python tools/reproduce.py --seeds 3 --data-dir "$data" --out-dir "$runs$1" ${known[@]+"${known[@]}"} "${@:2}" || failed=1
  if grep -qs ',toy,' "$runs$1/results.csv"; then
    echo "$runs$1/results.csv has rows of toy data and is not copied to $rows." >&2
    failed=1
  elif [[ -e $runs$1/results.csv ]]; then
    cp "$runs$1/results.csv" "$rows"
  fi
}

methods=(naive orca mona scratch recraft pare warmup frozen lora norms mona-e10)
contrast=(contrast contrast-stage1 contrast-gate contrast-random)
# MINILM: the folder of a text encoder that knows what names mean, as all-MiniLM-L6-v2
names=(lsg lsg-text lsg-random lsg-simplex lsg-pull ${MINILM:+lsg-minilm lsg-minilm-pull lsg-minilm-text})
voc=(--options="--source cifar10") # PaRe's source on fields: VOC, the published one, was not available

# ---- 1,000 samples: all methods, then what a detail is worth
images=(-1000 --tasks cifar100 --n-train 1000 --options="--steps-per-epoch 15 --lr 1e-3")
series=(-1000 --tasks satellite --n-train 1000 --options="--steps-per-epoch 40")
run "${images[@]}" --methods "${methods[@]}" contrast contrast-stage1 contrast-stage2 contrast-stage2-gate contrast-stage2-random
run "${images[@]}" --seeds 5 --methods "${methods[@]}" contrast
run "${series[@]}" --methods naive orca naive-bias orca-shuffled orca-bias contrast-stage1
run "${series[@]}" --methods "${methods[@]}" contrast recraft-align
run "${images[@]}" --methods naive-random contrast-stage1-init-random orca-random mona-random pare-random
run "${images[@]}" --methods orca-one-class orca-e5 orca-e60 orca-freeze-embedder mona-plain mona-e10 mona-plain-e10 mona-alpha1
run "${images[@]}" --methods naive-released naive-test orca-released pare-released naive-mean naive-sum
run "${images[@]}" --methods pare-frozen-gate pare-chance pare-highest pare-share pare-end pare-noise
run "${series[@]}" --methods boosting logistic
run "${images[@]}" --methods convnet
run -2000 --tasks cifar100 --n-train 2000 --options="--steps-per-epoch 30" --methods naive norms lora

# ---- fewer and more samples, shorter and longer runs: the charts `sizes` and `compute`
few=(naive scratch pare orca mona)
for n in 100 300; do
  run -$n --tasks cifar100 --n-train $n --options="--steps-per-epoch 15 --lr 1e-3" --methods "${few[@]}"
  run -$n --tasks satellite --n-train $n --options="--steps-per-epoch 40" --methods "${few[@]}" naive-bias
done
run -3000 --tasks cifar100 --n-train 3000 --options="--steps-per-epoch 45 --lr 1e-3" --methods "${few[@]}"
run -3000 --tasks satellite --n-train 3000 --options="--steps-per-epoch 80" --methods "${few[@]}"
run -1000-5 --tasks cifar100 --n-train 1000 --options="--steps-per-epoch 5 --lr 1e-3" --methods naive pare orca mona
for steps in 30 45; do # naive fine-tuning with the compute of PaRe, and with more
  run -1000-$steps --tasks cifar100 --n-train 1000 --options="--steps-per-epoch $steps --lr 1e-3" --methods naive
done
run -1000-10 --tasks satellite --n-train 1000 --options="--steps-per-epoch 10" --methods "${few[@]}"

# ---- the default budget
run "" --tasks advection1d satellite --methods "${methods[@]}"
run "" --tasks cifar100 --methods "${methods[@]}" "${names[@]}"
run "" --tasks cifar100 satellite --methods "${contrast[@]}"
run "" --tasks darcy shallow_water2d --methods "${methods[@]}" "${voc[@]}"
run "" --tasks openml23 openml31 --seeds 5 --methods "${methods[@]}" contrast boosting logistic
run "" --tasks spherical burgers1d diffusion_reaction1d --methods "${methods[@]}"
run "" --tasks advection1d --methods mean input fourier
run "" --tasks advection1d --methods naive-bias
run "" --tasks satellite --methods boosting logistic
run "" --tasks cifar100 spherical --methods convnet
exit ${failed:-0} # 1: run the same command again to repeat what failed
