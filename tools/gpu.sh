#!/usr/bin/env bash
# All tests and measurements that need a GPU, in steps of at most eight minutes, the most important first:
#
#     bash tools/gpu.sh OUT [--data-dir DIR] [--minutes 25] [--device cpu] [--smallest]
#
# Each step writes OUT/NAME.json (its command, its output and the device), and OUT/NAME.log while it runs. A step whose JSON file
# is there is skipped, so several short calls finish the list. --minutes: no step begins that could end later than this. The exit
# code is 1 if a step failed or did not finish in its time.
# --device cpu --smallest goes through all steps on a laptop, to try the script itself. --data-dir: real images, for the last steps.
set -uo pipefail
out="" data="" minutes=100000 device=cuda smallest=""
while (($#)); do
  case $1 in
    --data-dir) data=$(realpath -e "${2:?a folder}") || exit 2; shift ;;
    --minutes)
      minutes=${2:?a number} && shift
      [[ $minutes =~ ^[0-9]+$ ]] || { echo "gpu.sh: --minutes $minutes: give a whole number" >&2 && exit 2; } ;;
    --device) device=${2:?cuda or cpu} && shift ;;
    --smallest) smallest=1 ;;
    -*) echo "gpu.sh: there is no option $1. Known: --data-dir --minutes --device --smallest" >&2 && exit 2 ;;
    *) out=$1 ;;
  esac
  shift
done
[[ -n $out ]] || { echo "gpu.sh: give a folder for the results: bash tools/gpu.sh OUT" >&2 && exit 2; }
mkdir -p "$out" && out=$(realpath "$out")
cd "$(dirname "$0")/.."

python - <<'PY' || exit 2
import importlib.util
import sys

needed = {"torch": "torch", "timm": "timm", "transformers": "transformers", "tyro": "tyro", "ot": "pot", "sklearn": "scikit-learn",
          "scipy": "scipy", "h5py": "h5py", "matplotlib": "matplotlib", "tqdm": "tqdm", "safetensors": "safetensors",
          "pytest": "pytest", "xdist": "pytest-xdist"}  # fmt: skip
if missing := [package for module, package in needed.items() if importlib.util.find_spec(module) is None]:
    names = " ".join(missing)
    print(f"gpu.sh: missing: {names}. Where there is a network: pip install {names}. Where there is none, bring them as wheels:\n"
          f"pip download -d wheels {names} elsewhere, then here: pip install --no-index --find-links wheels {names}", file=sys.stderr)
    sys.exit(2)
PY
[[ $device == cpu ]] && export CUDA_VISIBLE_DEVICES="" CUDA_TESTS_ON=cpu
[[ $device == cuda ]] && export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}"
where=$(python -c "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu')") || exit 2
[[ $device == cuda && $where == cpu ]] && { echo "gpu.sh: no GPU is available. To try the script: --device cpu --smallest" >&2 && exit 2; }

bench="tools/bench.py --device $device"
tests=(-n 0) full="--scale full" few="--rounds 1" run="--scale full --n-train 5000 --accumulate 1 --epochs 4 --steps-per-epoch 50"
swin="--backbone random:swin_base" samples="1000 5000" meta="--backbone random:swin_base --batch-size 16"
pretrain="--size 64 --width 96 --depths 2 2 6 --window 4 --epochs 60 --batch-size 512"
if [[ -n $smallest ]]; then
  tests=(-n 2 --dist load -k "not resumes or pare") full="--scale tiny --steps 1 --batch-size 4 --workers 1" samples="100" meta="--batch-size 2" swin="--backbone tiny-swin"
  few="--rounds 1 --changes" run="--scale tiny --n-train 64 --epochs 1 --steps-per-epoch 2"
  pretrain="--size 16 --width 32 --depths 1 1 --window 2 --epochs 1 --batch-size 100 --n-train 1000 --no-compile"
fi

steps=() # NAME MINUTES COMMAND
step() { steps+=("$(printf '%q ' "$@")"); } # quoted: folders may have spaces in their names
step tests 5 -m pytest "${tests[@]}" -m cuda tests/test_cuda.py
for method in finetune pare mona orca; do step "step-$method" 8 $bench step $full $few --methods $method; done
for what in "topk" "distance --samples $samples" "meta $meta"; do step "${what%% *}" 5 $bench $what --rounds 1; done
for method in pare mona; do step "profile-$method" 5 $bench profile $full --methods $method; done
if [[ -n $data ]]; then # Swin-B with random weights, on real images
  for method in pare orca mona; do
    step "run-$method" 7 $method.py --task cifar100 --data-dir "$data" $swin $run --out-dir "$out/runs" --resume
  done
  step pretrain 8 tools/pretrain.py images --data-dir "$data" --out "$out/backbone/swin" $pretrain
fi

left() { for s in "${steps[@]}"; do read -r name _ <<<"$s" && [[ -e $out/$name.json ]] || echo -n " $name"; done; }
echo "device  $where"
for s in "${steps[@]}"; do
  read -r name most command <<<"$s"
  state="at most $most minutes" && [[ -e $out/$name.json ]] && state="done"
  printf '%-16s %-18s python %s\n' "$name" "$state" "$command"
done
for s in "${steps[@]}"; do
  read -r name most command <<<"$s"
  [[ -e $out/$name.json ]] && continue
  ((SECONDS + 60 * most > 60 * minutes)) && continue
  began=$SECONDS
  if eval "PYTHONUNBUFFERED=1 timeout $((60 * most)) python $command" >"$out/$name.log" 2>&1; then
    python - "$out/$name" "$where" "$((SECONDS - began))" "python $command" <<'PY' && echo "$name: $((SECONDS - began)) s"
import json, os, sys
from pathlib import Path

path, device, seconds, command = sys.argv[1:]
lines = Path(path + ".log").read_text(errors="replace").replace("\r", "\n").splitlines()[-400:]  # the end, far below 16 MB
row = {"command": command, "device": device, "seconds": int(seconds), "output": [line[:500] for line in lines]}
Path(path + ".part").write_text(json.dumps(row, indent=1))
os.replace(path + ".part", path + ".json")
PY
  else
    echo "$name: failed or not finished after $((SECONDS - began)) s, see $out/$name.log" >&2
    failed=1
  fi
done
rest=$(left)
echo "left:${rest:- nothing}"
exit ${failed:-0}
