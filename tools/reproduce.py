"""Methods x seeds on one task: runs what is missing, resumes what was killed, prints the table of mean ± standard deviation.

python tools/reproduce.py --methods pare naive scratch --seeds 3 --data-dir datasets
python tools/reproduce.py --out-dir runs/random --options="--init random"
"""

import json
import os
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data

MODES = ("naive", "scratch", "frozen", "warmup", "probe")  # of finetune.py; every other method is a file


@dataclass(frozen=True)
class Args:
    task: str = "spherical"
    """one of `python data.py`"""
    methods: tuple[str, ...] = ("pare", *MODES)
    """method files and modes of finetune.py"""
    seeds: int = 3
    """seeds 0, 1, ..., each a run of its own"""
    scale: str = "tiny"
    """tiny, full or auto"""
    data_dir: str = "datasets"
    """where the official files lie"""
    out_dir: str = "runs"
    """give every choice of options its own folder"""
    options: str = ""
    """more options, handed to every run as they are"""
    jobs: int = 2
    """runs at a time; the CPU cores are shared out evenly among them"""


def run(args, method, seed):
    """One run as a subprocess; its result, or None if it failed. A finished run is not repeated."""
    name = ["finetune.py", "--mode", method] if method in MODES else [f"{method}.py"]
    command = [sys.executable, str(ROOT / name[0]), *name[1:], "--task", args.task, "--scale", args.scale, "--seed", str(seed)]
    command += ["--data-dir", args.data_dir, "--out-dir", args.out_dir, "--resume", *shlex.split(args.options)]
    threads = str(max(1, (os.cpu_count() or 1) // args.jobs))
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": threads}, capture_output=True, text=True)
    if done.returncode:
        print(f"{shlex.join(command)}\n{done.stderr}", file=sys.stderr)
        return None
    said = next(line for line in reversed(done.stdout.splitlines()) if line.endswith("result.json"))
    result = json.loads(Path(said.split(": ")[-1]).read_text())
    print(f"{method:8} seed {seed}  test {result['test']:.4f}  {result['seconds']:.0f} s", file=sys.stderr, flush=True)
    return result


def spread(values):
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.4f} ± {deviation:.4f}"


def main(args):
    with ThreadPoolExecutor(args.jobs) as pool:
        waiting = {m: [pool.submit(run, args, m, seed) for seed in range(args.seeds)] for m in args.methods}
        results = {m: [f.result() for f in futures if f.result() is not None] for m, futures in waiting.items()}
    print("| method | test, epoch best on validation | test, last epoch | n | data | epochs | training samples | minutes |")
    print("|---|---|---|---|---|---|---|---|")
    for method, rows in results.items():
        if rows:
            first, minutes = rows[0], statistics.mean(row["seconds"] for row in rows) / 60
            best, last = (spread([row[which] for row in rows]) for which in ("test", "test_last"))
            print(f"| {method} | {best} | {last} | {len(rows)} |",
                  f"{first['data']} | {first['epochs']} | {first['n_train']:,} | {minutes:.1f} |")  # fmt: skip
    if any(len(rows) < args.seeds for rows in results.values()):
        raise data.UserError("some runs failed; the same command tries them again.")


if __name__ == "__main__":
    data.guarded(main, data.command_line(Args, __doc__))
