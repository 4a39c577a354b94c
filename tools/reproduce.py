"""Run tasks x methods x seeds, and compare them: results.csv, tables and, for several tasks, profile.png.

    python tools/reproduce.py --tasks spherical cifar100 --methods pare naive scratch --seeds 5 --n-train 2000
    python tools/reproduce.py --tasks spherical --seeds 0          only the tables of the finished runs

Finished runs are skipped, interrupted runs are resumed. A method is a method file, a mode of finetune.py, a variant of one of
them (variants.py), or a reference (references.py). Each run is a process, forked from one that has already imported everything:
imports take most of the time of a short run.
"""

import contextlib
import csv
import importlib
import io
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import queue
import shlex
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import matplotlib
import matplotlib.pyplot as plt
import torch
from scipy.stats import ttest_rel, wilcoxon

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import cli
import data
from run import damage, write
from tasks import files, published
from tools import references
from tools.references import REFERENCES
from tools.variants import METHODS, PATCHES

matplotlib.use("Agg")

# imported once, for all runs: the method files, what they import lazily, and this file
PRELOAD = ("pare", "orca", "mona", "recraft", "contrast", "lsg", "finetune", "timm", "transformers", "sklearn.cluster",
           "tools.reproduce")  # fmt: skip
COLUMNS = ("task", "method", "seed", "test", "test_last", "val", "metric", "data", "scale", "backbone", "source", "lr",
           "epochs", "steps", "best_epoch", "n_train", "seconds", "device", "torch", "commit", "options")  # fmt: skip

OWN = {"--task", "--scale", "--seed", "--data-dir", "--out-dir", "--n-train", "--resume"}  # options that `start` sets

# Published at full scale in the ORCA, MoNA and PaRe papers. 0-1 errors (cifar100, spherical, ninapro, satellite) are fractions.
PUBLISHED_METHODS = ("naive", "orca", "mona", "pare")
PUBLISHED = {
    "cifar100": (0.0767, 0.0653, 0.0648, 0.0625), "spherical": (0.5526, 0.2985, 0.2713, 0.2555),
    "darcy": (0.00734, 0.00728, 0.0068, 0.007), "psicov": (1.92, 1.91, 0.99, 0.99), "cosmic": (0.17, 0.152, 0.121, 0.121),
    "ninapro": (0.0835, 0.0754, 0.0728, 0.0653), "fsd50k": (0.63, 0.56, 0.55, 0.55), "ecg": (0.44, 0.28, 0.27, 0.28),
    "satellite": (0.1386, 0.1159, 0.1113, 0.1118), "deepsea": (0.51, 0.29, 0.28, 0.28),
    "advection1d": (None, 0.0098, 0.0088, 0.0027), "burgers1d": (None, 0.012, 0.0114, 0.0083),
    "diffusion_reaction1d": (None, 0.003, 0.0028, 0.0026), "diffusion_sorption1d": (None, 0.0016, 0.0016, 0.0016),
    "navier_stokes1d": (None, 0.062, 0.054, 0.0662), "darcy2d": (None, 0.081, 0.079, 0.0806),
    "shallow_water2d": (None, 0.006, 0.0057, 0.0057), "diffusion_reaction2d": (None, 0.82, 0.818, 0.818),
}  # fmt: skip


@dataclass(frozen=True)
class Args:
    tasks: tuple[str, ...] = ("spherical",)
    """tasks; `python data.py` lists them"""
    methods: tuple[str, ...] = ("pare", "orca", "mona", "recraft", "contrast", "naive", "warmup", "frozen", "scratch")
    """method files and modes: pare orca mona recraft contrast naive warmup frozen lora norms probe scratch, and lsg where
    classes have names; variants: tools/variants.py; references: boosting logistic (classes), convnet
    (images with classes), mean input fourier (fields)"""
    seeds: int = 3
    """number of seeds, from seed 0. 0: only the tables of the finished runs"""
    n_train: int | None = None
    """training samples of each run. Default: the recipe of the task"""
    scale: Literal["tiny", "full", "auto"] = "tiny"
    """auto: full on a GPU"""
    data_dir: str = "datasets"
    """folder with the official files"""
    out_dir: str = "runs"
    """output folder; the runs of a variant are in its subfolder of that name. Use one --out-dir for each set of options"""
    known: str = ""
    """a results.csv of earlier runs: runs that have a row there, with the same options, are not repeated"""
    options: str = ""
    """additional options for all runs, known to all methods; with an equals sign: --options="--epochs 2" """
    jobs: int = 2
    """number of parallel runs; they share the CPU cores evenly and are distributed over the GPUs"""


def folder(out_dir, method):
    """Parent folder of the runs of a method. Each variant has its own: the name of a run contains only its file or mode."""
    return Path(out_dir) / method if "-" in method else Path(out_dir)


def train(method, options):
    """One run of a method, like the command `python FILE OPTIONS`."""
    file, *own = shlex.split(METHODS[method])
    module = importlib.import_module(file.removesuffix(".py"))
    PATCHES.get(method, lambda module: None)(module)
    sys.argv = [file, *options, *own]  # what defines a variant comes last: it cannot be overridden
    cli.guarded(module.main, cli.command_line(module.Args, module.__doc__))


def refer(method, args, task, seed, out):
    """One run of a reference, on the split of the methods with this seed. Does nothing if it does not fit the task."""
    began, n = time.perf_counter(), args.n_train or (published.TINY.n_train if args.scale == "tiny" else None)
    released = "--as-released" in shlex.split(args.options.replace("_", "-"))
    loaded = data.load(task, args.data_dir, f"{args.out_dir}/cache", args.scale, n, seed, as_released=released)
    error = references.refer(method, loaded, seed, ["--scale", args.scale, *shlex.split(args.options)])
    if error is not None:
        row = {"task": task, "method": method, "seed": seed, "test": error, "test_last": error, "metric": loaded.task.metric,
               "data": loaded.train.kind, "scale": args.scale, "n_train": len(loaded.train),
               "seconds": time.perf_counter() - began}  # fmt: skip
        out.mkdir(parents=True, exist_ok=True)
        write(out / "result.json", json.dumps(row).encode())


def child(log, device, threads, function, *arguments):
    """Main function of a new process: calls `function`, writes its output to the file `log`, exits if the parent exits."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    with open(log, "w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(device)
    torch.set_num_threads(threads)
    cli.guarded(function, *arguments)


STARTING = threading.Lock()  # starting a process reaps the finished ones of other threads; an exit code can be read only once
SAVING = threading.Lock()


def start(args, task, method, seed, device, context):
    """Start a run in a new process and wait for it; skip it if it is finished. Returns: whether it succeeded."""
    out = folder(args.out_dir, method)
    if method in REFERENCES:
        work = refer, method, args, task, seed, out / f"{task}-{method}-s{seed}"
        finished = [file for file in out.glob(f"{task}-{method}-s{seed}/result.json") if read_json(file)["data"] != "toy"]
    else:
        options = ["--task", task, "--scale", args.scale, "--seed", str(seed), "--data-dir", args.data_dir]
        options += ["--out-dir", str(out), "--resume", *shlex.split(args.options)]
        options += ["--n-train", str(args.n_train)] if args.n_train else []
        work = train, method, options
        file, *own = shlex.split(METHODS[method])
        mode = own[1] if file == "finetune.py" else file.removesuffix(".py")
        finished = list(out.glob(f"{task}-{mode}-*-s{seed}/result.json"))  # not -s0-toy: real data may be available now
        results = [f"{task}-{mode}-*-s{seed}{toy}/result.json" for toy in ("", "-toy")]
    if finished:
        return True
    threads, began = max(1, torch.get_num_threads() // args.jobs), time.perf_counter()  # as many as OMP_NUM_THREADS allows
    with tempfile.TemporaryDirectory() as folder_of_log:
        log = Path(folder_of_log) / "log"
        process = context.Process(target=child, args=(log, device, threads, *work))
        with STARTING:
            process.start()
        multiprocessing.connection.wait([process.sentinel])
        with STARTING:
            process.join()
        if process.exitcode == 130:  # Ctrl-C
            return False
        without = method not in REFERENCES and not any(file for name in results for file in out.glob(name))  # e.g. --help
        if process.exitcode or without:
            print(f"{task} {method} seed {seed} failed:\n{log.read_text(errors='replace')[-2000:]}", file=sys.stderr)
            return False
    if method in REFERENCES and not (work[-1] / "result.json").exists():
        print(f"{task} {method}: left out, this reference does not fit the task", file=sys.stderr, flush=True)
        return True
    print(f"{task} {method} seed {seed}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    return True


def options_of(chosen):
    """The column "options" of results.csv: what all runs of a task were given in addition. Of a dict or Args."""
    n_train = chosen["n_train"]
    return " ".join([f"--n-train {n_train}"] * bool(n_train) + [chosen["options"]] * bool(chosen["options"]))


@contextlib.contextmanager
def same_options(args):
    """Keep the options of the runs of each task in OUT_DIR/options.json. Tasks whose runs all failed at once are free again.

    Raises: UserError if the folder has runs or rows of a task with other options: they would be mistaken for the new ones.
    """
    out, chosen = Path(args.out_dir), {"scale": args.scale, "n_train": args.n_train, "options": args.options}
    note, csv_file = out / "options.json", out / "results.csv"
    before = read_json(note) if note.exists() else {}
    rows_of = lambda task: of(read_results(csv_file), task=task) if csv_file.exists() else []
    for task in args.tasks:
        if task not in before and (others := sorted(out.glob(f"{task}-*-s*[0-9]/result.json"))):
            raise cli.UserError(f"{others[0].parent} was not started by this tool.\nGive another --out-dir.")
        if before.setdefault(task, chosen) != chosen:
            raise cli.UserError(f"{out} holds runs of {task} with {before[task]}.\nGive these another --out-dir.")
        if {(row["options"] or "", row["scale"]) for row in rows_of(task)} - {(options_of(chosen), args.scale)}:
            raise cli.UserError(f"{csv_file} has rows of {task} with other options.\nGive these runs another --out-dir.")
    out.mkdir(parents=True, exist_ok=True)
    write(note, json.dumps(before, indent=1).encode())
    try:
        yield
    finally:
        begun = lambda task: rows_of(task) or any(any(out.glob(f"{where}{task}-*-s*[0-9]*")) for where in ("", "*/"))
        others = {task: of for task, of in read_json(note).items() if task not in args.tasks}  # perhaps of another process
        write(note, json.dumps(others | {task: chosen for task in args.tasks if begun(task)}, indent=1).encode())


def read_json(path):
    """The dictionary in a file. Raises UserError if it is damaged."""
    if wrong := damage(path):
        raise cli.UserError(f"{path} {wrong}.\nRestore it, or remove it and the files beside it.")
    return json.loads(path.read_text())


def read(file):
    """The result.json of a run, with its learning rate "lr" and its "variant": the name of the method in variants.py."""
    row, parent, options = read_json(file), file.parent.parent.name, file.with_name("args.json")
    lr = read_json(options)["lr"] if options.exists() else None  # references have none
    return row | {"lr": lr, "variant": parent if "-" in parent and parent in METHODS else row["method"]}


def read_results(path):
    """The rows of a results.csv, with numbers where a row of `collect` has numbers. Raises UserError if it is no such file."""
    whole = lambda text: int(text) if text else None  # references take no steps

    def error(text):
        if not 0 <= float(text) < float("inf"):
            raise ValueError(f"an error of {text}")
        return float(text)

    needed = {"task": str, "method": str, "seed": int, "test": error, "test_last": error, "metric": str, "data": str,
              "seconds": float, "n_train": int}  # fmt: skip
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:  # a spreadsheet may have added a byte-order mark
            rows = list(csv.DictReader(file))
        if not rows or needed.keys() - rows[0].keys():
            raise ValueError("no rows, or columns are missing")
        kinds = needed | {"epochs": whole, "steps": whole}
        return [{name: row.get(name) for name in COLUMNS} | {name: kind(row.get(name)) for name, kind in kinds.items()}
                for row in rows]  # fmt: skip
    except FileNotFoundError as error:
        raise cli.UserError(f"{path} is missing.\nGive a results.csv of tools/reproduce.py.") from error
    except (OSError, TypeError, ValueError, csv.Error) as error:
        why = f"{path} is not a results.csv of tools/reproduce.py ({cli.reason(error)})"
        raise cli.UserError(f"{why}.\nRestore it, or give one like docs/results.csv.") from error


def key_of(row):
    """What a row of results.csv is of."""
    return row["task"], row["method"], row["seed"]


def collect(out_dir, known=""):
    """The rows of results.csv: the finished runs in `out_dir` and the folders of variants; real data replace toys.

    known: a results.csv, whose rows come first. Of the tasks that have runs in `out_dir`, those of other options are left out.
    """
    rows = {}
    note = Path(out_dir) / "options.json"
    chosen = read_json(note) if note.exists() else {}
    if known:
        same = lambda row, of: (row["options"], row["scale"]) == (options_of(of), of["scale"])
        kept = [row for row in read_results(known) if row["task"] not in chosen or same(row, chosen[row["task"]])]
        rows = {key_of(row): row for row in kept}
        if len(rows) < len(kept):
            raise cli.UserError(f"{known} has a run twice: it joins studies with different options.\nGive a file of one study.")
    variants = [file for file in Path(out_dir).glob("*/*/result.json") if file.parent.parent.name in METHODS]
    for file in sorted([*Path(out_dir).glob("*/result.json"), *variants]):
        row = read(file)
        row |= {"method": row["variant"], "options": options_of(chosen[row["task"]]) if row["task"] in chosen else ""}
        key = key_of(row)
        if key not in rows or rows[key]["data"] == "toy":
            rows[key] = {name: row.get(name) for name in COLUMNS}
    return list(rows.values())


def save(args):
    """Write OUT_DIR/results.csv after each run, so that nothing is lost if the study is stopped. Returns its rows.

    Rows of an earlier results.csv stay, even if the folders of their runs are gone.
    """
    text, path = io.StringIO(), Path(args.out_dir) / "results.csv"
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    with SAVING:
        rows = collect(args.out_dir, args.known)
        if path.exists():
            have = {key_of(row) for row in rows}
            rows += [row for row in collect(args.out_dir, path) if key_of(row) not in have]
        writer.writerows(rows)
        if rows:
            with files.replacing(path) as file:
                file.write(text.getvalue().encode())
    return rows


def spread(values):
    """Format mean ± standard deviation, which a single value does not have."""
    return f"{statistics.mean(values):.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")


def of(rows, **wanted):
    """The rows with these values: of(rows, task="darcy", method="pare")."""
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def known_methods(rows):
    """In the order of variants.py and references.py; variants of an earlier version come last."""
    return dict.fromkeys((*METHODS, *REFERENCES, *(row["method"] for row in rows)))


ALIKE = ("metric", "data", "scale", "backbone", "lr", "epochs", "steps", "n_train")  # what runs must share to be averaged


def check_alike(rows):
    """Refuse runs of a method on a task whose mean would mean nothing (UserError): of different options, or of one seed."""
    seeds = [row["seed"] for row in rows]
    differ = [name for name in ALIKE if len({str(row.get(name)) for row in rows}) > 1]  # a csv has text
    if differ or len(set(seeds)) < len(seeds):
        runs = f"the runs of {rows[0]['task']} {rows[0]['method']}, seeds {', '.join(map(str, seeds))}, cannot be averaged"
        why = f"differ in {', '.join(differ)}" if differ else "have a seed twice"
        raise cli.UserError(f"{runs}: they {why}.\nGive the runs of one study.")


def pairs(rows, task, method, base, which="test_last"):
    """Errors of a method and of the base in the runs with the same seeds, on the same kind of data: two lists."""
    ours, theirs = ({(row["seed"], row["data"]): row[which] for row in of(rows, task=task, method=m)} for m in (method, base))
    both = sorted(ours.keys() & theirs.keys())
    return [ours[seed] for seed in both], [theirs[seed] for seed in both]


def p_value(rows, task, method, base="naive"):
    """p of the paired t test at the last epoch, same seeds; None with fewer than three, or if all differ by the same."""
    ours, theirs = pairs(rows, task, method, base)
    differences = {round(a - b, 12) for a, b in zip(ours, theirs, strict=True)}  # equal up to rounding
    return float(ttest_rel(ours, theirs).pvalue) if len(ours) > 2 and len(differences) > 1 else None


def apart(rows, task, method, base="naive"):
    """Two cells: difference to the base at the last epoch, same seeds, mean ± std, and p of the paired t test (3 or more)."""
    ours, theirs = pairs(rows, task, method, base)
    if method == base or len(ours) < 2:
        return " | "
    d = [a - b for a, b in zip(ours, theirs, strict=True)]
    p = p_value(rows, task, method, base)
    return f"{statistics.mean(d):+.4f} ± {statistics.stdev(d):.4f} | {'' if p is None else f'{p:.2g}'}"


def table(rows, task):
    """Print the results of one task in Markdown: test error at the best and at the last epoch, mean ± std over seeds."""
    first = of(rows, task=task)[0]
    if len(given := {(row["scale"], row.get("options") or "") for row in of(rows, task=task)}) > 1:
        raise cli.UserError(f"the runs of {task} have different options: {sorted(given)}.\nGive such studies one by one.")
    origins = " and ".join(dict.fromkeys(row["data"] for row in of(rows, task=task)))  # toy: a method's source may be missing
    print(f"\n{task}: {origins} data, {first['metric']}, {first['scale']} scale, {first['n_train']:,} training samples\n")
    print("| method | test, epoch best on validation | test, last epoch | last epoch minus naive, same seeds | p | n | minutes",
          "| published, full scale |\n" + "|---" * 8 + "|")  # fmt: skip
    for method in known_methods(rows):
        if runs := of(rows, task=task, method=method):
            check_alike(runs)
            best, last = (spread([row[which] for row in runs]) for which in ("test", "test_last"))
            known = dict(zip(PUBLISHED_METHODS, PUBLISHED.get(task, ()), strict=False)).get(method)
            print(f"| {method} | {best} | {last} | {apart(rows, task, method)} | {len(runs)} |",
                  f"{statistics.mean(row['seconds'] for row in runs) / 60:.1f} | {known or ''} |")  # fmt: skip


def everywhere(rows):
    """The tasks of the rows, and the methods that have runs on all of them."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    return tasks, [method for method in METHODS if all(of(rows, task=task, method=method) for task in tasks)]


def overview(rows):
    """Print a Markdown table of tasks and methods: test error at the best epoch, for methods with runs on all tasks."""
    tasks, methods = everywhere(rows)
    print(f"\n| method | {' | '.join(tasks)} |\n|---" + "|---" * len(tasks) + "|")
    for method in methods:
        cells = [spread([row["test"] for row in of(rows, task=task, method=method)]) for task in tasks]
        print(f"| {method} |", " | ".join(cells), "|")


def profile(rows, path):
    """Plot performance profiles (figure 3 of PaRe) of the methods that have runs on all tasks.

    profile(tau) is the share of the tasks on which the error of a method is within a factor tau of the error of the best method
    on that task. Errors are means over seeds, at the epoch that is best on validation. Returns: method -> sorted factors.
    """
    tasks, methods = everywhere(rows)
    mean = lambda task, method: statistics.mean(row["test"] for row in of(rows, task=task, method=method))
    errors = {method: [mean(task, method) for task in tasks] for method in methods}
    best = [min(column) for column in zip(*errors.values(), strict=True)]
    ratio = lambda error, least: 1.0 if error == least else error / least if least else float("inf")
    factors = {method: sorted(map(ratio, error, best)) for method, error in errors.items()}
    figure, axis = plt.subplots(figsize=(5.6, 3.6), layout="constrained")
    most = 1.05 * max(f for row in factors.values() for f in row if f < float("inf"))
    for method, row in factors.items():
        shares = [(i + 1) / len(tasks) for i in range(len(tasks))]
        axis.step([1, *row, most], [0, *shares, shares[-1]], where="post", label=method, linewidth=1.6)
    axis.set(xscale="log", xlim=(1, most), ylim=(0, 1.03), xlabel="tau", ylabel="tasks with error <= tau x best")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("{x:g}")
    axis.set_title(f"{len(tasks)} tasks, mean over seeds", fontsize=10)
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return factors


SATURATED = ("openml187", "openml1510", "openml28")  # one or two wrong test rows: methods do not differ


def paired(rows, base="naive"):
    """Print a paired comparison of each method with `base` over tasks, with Wilcoxon's signed-rank test.

    A task counts once: the mean error over the seeds that both have, relative to that of the base. Saturated tables and tasks
    without an error of the base are left out. With T tasks, p is at least 2^(1 - T).
    """
    head = "tasks (pairs) | better, worse | median difference | p |"
    print(f"\n| method against {base} | best epoch: {head} last epoch: {head}")
    print("|---" * 9 + "|")
    for method in known_methods(rows):
        cells = []
        for which in ("test", "test_last"):
            differences, count = [], 0
            for task in sorted({row["task"] for row in rows} - set(SATURATED)):
                ours, theirs = pairs(rows, task, method, base, which)
                if any(theirs):
                    mean, mean_base = statistics.mean(ours), statistics.mean(theirs)
                    differences.append((mean - mean_base) / mean_base)
                    count += len(ours)
            if method == base or len(differences) < 2:
                break
            p = wilcoxon(differences).pvalue if any(differences) else 1.0
            won = f"{sum(d < 0 for d in differences)}, {sum(d > 0 for d in differences)}"
            cells += [f"{len(differences)} ({count})", won, f"{100 * statistics.median(differences):+.1f} %", f"{p:.2g}"]
        else:
            print(f"| {method} |", " | ".join(cells), "|")


def run_all(args):
    """Run what is not finished or known, `args.jobs` runs at a time. Returns: whether each run succeeded."""
    # without fork (Windows), each run imports everything itself
    context = multiprocessing.get_context("forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn")
    context.set_forkserver_preload(PRELOAD)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    gpus = gpus.split(",") if torch.cuda.is_available() else [None]
    devices = queue.SimpleQueue()  # free GPUs
    for slot in range(args.jobs):
        devices.put(gpus[slot % len(gpus)])

    rows = collect(args.out_dir, args.known) if args.seeds else []
    known = {key_of(row) for row in rows if row["data"] != "toy"}  # data may be available now

    def run(task, method, seed):
        if (task, method, seed) in known:
            return True
        device = devices.get()
        try:
            return start(args, task, method, seed, device, context)
        finally:
            devices.put(device)
            save(args)

    for out in {folder(args.out_dir, method) for method in args.methods} - {Path(args.out_dir)}:  # share prepared data
        out.mkdir(parents=True, exist_ok=True)
        (Path(args.out_dir) / "cache").mkdir(exist_ok=True)
        if not (out / "cache").exists():
            with contextlib.suppress(OSError):  # Windows: links need a privilege; without, each variant prepares its own
                (out / "cache").symlink_to(Path("..") / "cache")
    wanted = list(itertools.product(range(args.seeds), args.tasks, args.methods))  # seed 0 of all tasks and methods comes first
    if args.known:
        print(f"{len(wanted)} runs, {sum((t, m, s) in known for s, t, m in wanted)} of them known", file=sys.stderr, flush=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        return list(pool.map(lambda one: run(one[1], one[2], one[0]), wanted))


def main(args):
    for task in args.tasks:
        data.find_task(task)
    if unknown := [method for method in args.methods if method not in METHODS and method not in REFERENCES]:
        raise cli.UserError(f"unknown method {unknown[0]!r}.\nAvailable: {', '.join((*METHODS, *REFERENCES))}.")
    if "-" in Path(args.out_dir).name and Path(args.out_dir).name in METHODS:
        raise cli.UserError(f"--out-dir {args.out_dir} has the name of a variant, whose runs these would be.\nGive another.")
    try:
        words = shlex.split(args.options)
    except ValueError as error:
        raise cli.UserError(f"--options {args.options!r}: {cli.reason(error)}.\nClose its quotes.") from error
    if taken := OWN & {word.partition("=")[0].replace("_", "-") for word in words}:
        raise cli.UserError(f"--options contains {min(taken)}, which this tool sets itself.\nLeave it out.")
    scale = ("full" if torch.cuda.is_available() else "tiny") if args.scale == "auto" else args.scale
    args = replace(args, scale=scale, tasks=tuple(dict.fromkeys(args.tasks)), methods=tuple(dict.fromkeys(args.methods)))
    with same_options(args) if args.seeds else contextlib.nullcontext():
        done = run_all(args)
        rows = save(args)
    if rows := [row for row in rows if row["task"] in args.tasks]:
        rows.sort(key=lambda row: args.tasks.index(row["task"]))
        for task in dict.fromkeys(row["task"] for row in rows):
            table(rows, task)
        if len({row["task"] for row in rows}) > 1:
            overview(rows)
            if everywhere(rows)[1]:
                profile(rows, Path(args.out_dir) / "profile.png")
            paired(rows)
    elif all(done):
        raise cli.UserError(f"{args.out_dir} has no finished run of {', '.join(args.tasks)}.\nGive another --out-dir.")
    if not all(done):
        raise cli.UserError(f"{done.count(False)} of {len(done)} runs failed.\nRun the same command again to repeat them.")


if __name__ == "__main__":
    cli.guarded(main, cli.command_line(Args, __doc__))
