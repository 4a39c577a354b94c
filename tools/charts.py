"""Tables and charts of errors: from results.csv, or from the folders of finished runs.

From the results.csv of tools/reproduce.py, one for each set of options, for example those in docs/:

    python tools/charts.py table CSV...           methods and tasks, as in README
    python tools/charts.py gains CSV...           the same as a picture, relative to naive fine-tuning
    python tools/charts.py pairs CSV...           each method against each other one: difference and p
    python tools/charts.py details CSV...         variants (tools/variants.py), each beside its method
    python tools/charts.py start CSV...           the methods with copied and with random weights of the target embedder
    python tools/charts.py sizes CSV...           error against the number of training samples
    python tools/charts.py compute CSV...         error against the batches that a run encodes

From finished runs:

    python tools/charts.py curves RUN...          training loss and validation metric over the epochs
    python tools/charts.py budget RUN...          validation metric over the optimizer steps, a panel for each task

From all runs of a task in the --out-dir of tools/reproduce.py:

    python tools/charts.py gate                   figure 5 of PaRe: gate against random selection
    python tools/charts.py ablation               ORCA: embedder epochs, source, frozen parts, as in "What explains ..."
"""

import itertools
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import tyro
from matplotlib.ticker import LogLocator

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import cli
import data
from run import damage
from tools.reproduce import apart, check_alike, collect, known_methods, of, p_value, pairs, read, read_results, spread
from tools.variants import METHODS

matplotlib.use("Agg")


@dataclass(frozen=True)
class Args:
    what: Annotated[
        Literal["table", "gains", "pairs", "details", "start", "sizes", "compute", "curves", "budget", "gate", "ablation"],
        tyro.conf.Positional,
    ]
    """the chart"""
    inputs: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """results.csv files, or folders of finished runs"""
    out: str = "."
    """output folder; the file name is WHAT.png"""
    methods: tuple[str, ...] = ()
    """methods to show, of the charts of results.csv but `start`. Default: all; of sizes and compute, those with runs at
    several x. Tasks where none of them has such runs are left out"""
    out_dir: str = "runs"
    """gate, ablation: runs of tools/reproduce.py"""
    task: str = "spherical"
    """gate, ablation: task of the runs"""


SOURCE, TARGET = "#d1495b", "#00798c"
COLOURS = (TARGET, SOURCE, "#edae49", "#66a182", "#8c6d46", "#8d96a3", "#2e4057", "#a44a8b", "#5aa9e6", "#b5c99a", "#f28482",
           "#6d597a", "#9c6644", "#222222")  # fmt: skip
METHOD_COLOURS = dict(zip(METHODS, COLOURS, strict=False))  # the methods without their variants


def colours_of(names):
    """name -> colour: a method has its own in every picture, other names get those that are left."""
    own = {name: METHOD_COLOURS[name] for name in names if name in METHOD_COLOURS}
    left = itertools.cycle([colour for colour in COLOURS if colour not in own.values()] or COLOURS)
    return own | {name: next(left) for name in names if name not in own}


def save(figure, args):
    """Write the figure to --out as WHAT.png and print its path."""
    if Path(args.out).is_file():
        raise cli.UserError(f"--out {args.out} is a file.\nGive a folder.")
    path = Path(args.out) / f"{args.what}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(path)


def plain(*axes, grid="both"):
    """Light grid; no top and right spines."""
    for axis in axes:
        axis.grid(alpha=0.3, axis=grid)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)


def readable(axis, which="y"):
    """A logarithmic axis with decimal numbers, also between the powers of ten; linear where the values are close."""
    low, high = getattr(axis.dataLim, f"interval{which}")
    if low <= 0 or high < 5 * low:
        return
    axis.set(**{f"{which}scale": "log"})
    ticks = getattr(axis, f"{which}axis")
    ticks.set_minor_locator(LogLocator(subs=(2, 4, 6, 8) if which == "y" else (2, 5)))  # labels of x need more room
    ticks.set_major_formatter("{x:g}")
    ticks.set_minor_formatter("{x:g}")
    axis.tick_params(axis=which, which="minor", labelsize=7)


def dots(axis, groups, colour, x=None, line="none", label=None):
    """Plot mean ± standard deviation of each group, at x or side by side.

    Args:
        groups: name -> list of values.
    Returns: name -> (mean, standard deviation).
    """
    found = {name: (np.mean(values), np.std(values, ddof=1) if len(values) > 1 else 0.0) for name, values in groups.items()}
    at = range(len(found)) if x is None else x
    means, deviations = zip(*found.values(), strict=True)
    axis.errorbar(at, means, deviations, marker="o", linestyle=line, color=colour, capsize=4, linewidth=1.6, label=label)
    if x is None:
        axis.set_xticks(at, [name.replace("_", "\n").replace("-", "\n") for name in found])
        axis.set_xlim(-0.5, len(found) - 0.5)
    plain(axis, grid="y")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# From results.csv
# ---------------------------------------------------------------------------------------------------------------------


def rows_in(files):
    """The rows of several results.csv."""
    return [row for file in files for row in read_results(file)]


def errors_of(rows, *names):
    """Group the errors at the last epoch: errors_of(rows, "method", "x") is method -> x -> list over seeds.

    Raises: UserError if a group has two runs of one seed or runs of different options, as `check_alike`.
    """
    if names:
        values = dict.fromkeys(row[names[0]] for row in rows)
        return {value: errors_of(of(rows, **{names[0]: value}), *names[1:]) for value in values}
    check_alike(rows)
    return [row["test_last"] for row in rows]


def studies(rows):
    """(task, n_train), its rows, and method -> errors, a list over seeds. Raises UserError if rows do not belong together."""
    for task, n_train in dict.fromkeys((row["task"], row["n_train"]) for row in rows):
        those = of(rows, task=task, n_train=n_train)
        if len({(row["scale"], row["metric"]) for row in those}) > 1:
            raise cli.UserError(f"the runs of {task} differ in scale or metric.\nGive the runs of one study.")
        yield (task, n_train), those, errors_of(those, "method")


def check_some(args, found):
    """Raise UserError if there is nothing to show."""
    if not found:
        raise cli.UserError(f"{args.what}: the results files have no two methods to compare.\nGive others, or other --methods.")


def chosen(args, rows):
    """The methods to show: --methods, or all of the rows. Raises UserError for a method without a row."""
    have = {row["method"] for row in rows}
    if unknown := [method for method in args.methods if method not in have]:
        raise cli.UserError(f"{args.what}: the results files have no runs of {unknown[0]}.")
    return args.methods or have


def table(args):
    """Print a Markdown table of errors at the last epoch: mean ± standard deviation over n seeds.

    A column is a task and a number of training samples; those with one method only are left out. A cell shows n if it is not
    that of the column, and an asterisk if p < 0.05 in a paired t test against naive fine-tuning. Returns: column -> methods.
    """
    rows, columns = rows_in(args.inputs), {}
    methods = chosen(args, rows)
    for (task, n_train), those, errors in studies(rows):
        errors = {method: found for method, found in errors.items() if method in methods}
        if len(errors) < 2:
            continue
        n = statistics.mode(map(len, errors.values()))
        cells = columns[f"{task}, {n_train:,} samples: {those[0]['metric']}, n = {n}"] = {}
        for method, found in errors.items():
            p = p_value(those, task, method)
            star = "\\*" if p is not None and p < 0.05 else ""  # escaped: Markdown
            cells[method] = spread(found) + star + f" (n = {len(found)})" * (len(found) != n)
    check_some(args, columns)
    print(f"| method | {' | '.join(columns)} |\n|---" + "|---" * len(columns) + "|")
    for method in known_methods(rows):
        if any(method in cells for cells in columns.values()):
            print(f"| {method} |", " | ".join(cells.get(method, "") for cells in columns.values()), "|")
    return {column: list(cells) for column, cells in columns.items()}


def gains(args):
    """Error at the last epoch divided by that of naive fine-tuning with the same seed, a panel for each column of `table`.

    A small dot is a seed, a large one the geometric mean of several, filled where `table` has an asterisk (p < 0.05). The
    baselines and the references are grey. Returns: (task, n_train) -> method -> ratios, one for each seed.
    """
    rows, found = rows_in(args.inputs), {}
    wanted = chosen(args, rows)
    methods = [method for method in known_methods(rows) if method in wanted and method != "naive"]
    for (task, n_train), those, _ in studies(rows):
        both = {method: pairs(those, task, method, "naive") for method in methods}
        # without errors of 0, as on a table that is solved: their ratio means nothing
        if ratios := {m: np.divide(ours, naive) for m, (ours, naive) in both.items() if ours and all(ours + naive)}:
            found[task, n_train] = ratios  # each (seeds,)
    if not found:
        raise cli.UserError("gains: no method has a run with the seed of a run of naive.\nRun naive with the same seeds.")
    columns = min(len(found), 4)
    lines = -(-len(found) // columns)
    size = 1 + 2.4 * columns, (0.7 + 0.2 * len(methods)) * lines
    figure, axes = plt.subplots(lines, columns, figsize=size, layout="constrained", sharey=True, squeeze=False)
    for axis in axes.flat[len(found) :]:
        axis.remove()
    for axis, ((task, n_train), ratios) in zip(axes.flat, found.items(), strict=False):
        axis.axvline(1, color="0.5", linewidth=1)
        for method, ratio in ratios.items():
            at, p = methods.index(method), p_value(of(rows, n_train=n_train), task, method)
            colour = "0.45" if METHODS.get(method, "finetune.py").startswith("finetune.py") else TARGET
            axis.plot(ratio, np.full(len(ratio), at + 0.3), ".", color=colour, markersize=4)  # below the large one
            if len(ratio) > 1:
                filled = colour if p is not None and p < 0.05 else "white"
                axis.plot(np.exp(np.log(ratio).mean()), at, "o", color=colour, markerfacecolor=filled, markersize=8)
        readable(axis, "x")
        axis.set_title(f"{task}, {n_train:,}", fontsize=10)
    axes[0, 0].set_yticks(range(len(methods)), methods)
    axes[0, 0].set_ylim(len(methods) - 0.5, -0.5)
    plain(*figure.axes)
    figure.supxlabel("error on test, divided by that of naive fine-tuning (left of 1: better)", fontsize=10)
    save(figure, args)
    return found


def versus(args):
    """Print a Markdown table for each task: row minus column at the last epoch, same seeds, mean ± std, p of a paired t test.

    Returns: (task, n_train) -> methods.
    """
    rows, shown = rows_in(args.inputs), {}
    methods = chosen(args, rows)
    for (task, n_train), those, errors in studies(rows):
        have = [method for method in known_methods(rows) if method in errors and method in methods]
        if len(have) < 2:
            continue
        shown[task, n_train] = have
        print(f"\n| {task}, {n_train:,} samples | {' | '.join(have[1:])} |\n|---" + "|---" * (len(have) - 1) + "|")
        for i, method in enumerate(have[:-1], 1):
            cells = [apart(those, task, method, other).replace(" | ", ", p = ").removesuffix(", p = ") for other in have[i:]]
            print(f"| {method} |", " | ".join((i - 1) * [""] + cells), "|")
    check_some(args, shown)
    return shown


RANDOM = {"naive": "naive-random", "orca": "orca-random", "mona": "mona-random", "pare": "pare-random",
          "contrast-stage1": "contrast-stage1-init-random"}  # fmt: skip


def details(args):
    """Print a Markdown table of variants at the last epoch, with the difference to their method and p of a paired t test.

    A variant is named after its method, with a suffix: pare-end. Returns: (task, n_train) -> variants.
    """
    rows, shown, copied = rows_in(args.inputs), {}, {other: method for method, other in RANDOM.items()}
    methods = chosen(args, rows)
    print("| task | variant | test, last epoch | minus the method, same seeds | p | n |\n" + "|---" * 6 + "|")
    for (task, n_train), those, errors in studies(rows):
        for method in known_methods(those):
            base = copied.get(method) or method.partition("-")[0]
            if method != base and {method, base} <= errors.keys() and method in methods:
                shown.setdefault((task, n_train), []).append(method)
                cells = spread(errors[method]), apart(those, task, method, base), len(errors[method])
                print(f"| {task} | {method} |", " | ".join(map(str, cells)), "|")
    check_some(args, shown)
    return shown


def start(args):
    """Error at the last epoch by the start of the target embedder: copied from the source's, as far as it fits, or random.

    Returns: task -> "copied" or "random" -> method -> (mean, standard deviation).
    """
    rows, found = rows_in(args.inputs), {}
    for task, errors in errors_of(rows, "task", "method").items():
        if both := {method: other for method, other in RANDOM.items() if {method, other} <= errors.keys()}:
            found[task] = {"copied": {m: errors[m] for m in both}, "random": {m: errors[other] for m, other in both.items()}}
    if not found:
        raise cli.UserError(f"No method has runs with both starts, such as naive and {RANDOM['naive']}.\nRun them first.")
    figure, axes = plt.subplots(1, len(found), figsize=(5.2 * len(found), 3.8), layout="constrained", squeeze=False)
    for axis, (task, starts) in zip(axes[0], found.items(), strict=True):
        for (name, groups), colour, aside in zip(starts.items(), (TARGET, SOURCE), (-0.08, 0.08), strict=True):
            starts[name] = dots(axis, groups, colour, x=np.arange(len(groups)) + aside, label=f"{name} embedder")
        axis.set_xticks(range(len(groups)), [method.replace("-", "\n") for method in groups])
        axis.set_title(f"{task}: {of(rows, task=task)[0]['metric']} on test", fontsize=11)
        axis.legend(frameon=False)
    save(figure, args)
    return found


def encoded(row):
    """Batches that the encoder of a run is trained on, in steps of naive fine-tuning; None for methods not counted here.

    PaRe encodes the target and the mixed batch. MoNA has two meta-epochs (tiny scale), and a step of them takes ten passes,
    forward or backward, where training takes three. ORCA's first stage trains the embedder without the encoder.
    """
    if not row["epochs"] or row["scale"] != "tiny":
        return None
    each = {"naive": 1, "scratch": 1, "orca": 1, "pare": 2, "mona": 1 + 2 / row["epochs"] * 10 / 3}
    return row["steps"] * each[row["method"]] if row["method"] in each else None


def against(args):
    """sizes: error at the last epoch against n_train; compute: against the batches that a run encodes, with the same n_train.

    Prints the points with what else differs between them. Returns: task -> method -> x -> (mean, standard deviation).
    """
    rows = [row for row in rows_in(args.inputs) if row["steps"]]  # references take no steps
    rows = [row | {"x": row["n_train"] if args.what == "sizes" else encoded(row)} for row in rows]
    rows = sorted((row for row in rows if row["x"]), key=lambda row: row["x"])
    wanted, points = chosen(args, rows), {}
    for task, methods in errors_of(rows, "task", "method", "x").items():
        methods = {method: at for method, at in methods.items() if method in wanted and (args.methods or len(at) > 1)}
        points[task] = {method: methods[method] for method in known_methods(rows) if method in methods}
    points = {task: methods for task, methods in points.items() if any(len(at) > 1 for at in methods.values())}
    if not points:
        raise cli.UserError(f"{args.what}: no method has runs at more than one x.\nGive more results files.")
    if args.what == "compute" and any(len({row["n_train"] for row in of(rows, task=task)}) > 1 for task in points):
        raise cli.UserError("compute: the runs of a task differ in n_train.\nGive files of results with one n_train.")
    print(f"| task | method | {LABELS[args.what]} | steps | lr | test, last epoch | n |\n|---|---|---|---|---|---|---|")
    for task, method, x in ((t, m, x) for t, methods in points.items() for m, at in methods.items() for x in at):
        row, values = of(rows, task=task, method=method, x=x)[0], points[task][method][x]
        print(f"| {task} | {method} | {x:,.0f} | {row['steps']:,} | {row['lr']} | {spread(values)} | {len(values)} |")
    figure, axes = plt.subplots(1, len(points), figsize=(5.2 * len(points), 3.8), layout="constrained", squeeze=False)
    colours = colours_of(dict.fromkeys(method for methods in points.values() for method in methods))
    for axis, (task, methods) in zip(axes[0], points.items(), strict=True):
        for method, at in methods.items():
            methods[method] = dots(axis, at, colours[method], x=list(at), line="-", label=method)
        axis.set(xscale="log", xlabel=LABELS[args.what])
        ticks = sorted({x for at in methods.values() for x in at})
        axis.set_xticks([x for before, x in zip([0, *ticks], ticks, strict=False) if x > 1.2 * before])  # labels need room
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.xaxis.set_minor_formatter("")
        readable(axis)
        axis.set_title(f"{task}: {of(rows, task=task)[0]['metric']} on test", fontsize=11)
        axis.legend(fontsize=8, frameon=False)
    plain(*axes[0])
    save(figure, args)
    return points


LABELS = {"sizes": "training samples", "compute": "batches encoded, in optimizer steps of naive fine-tuning"}


# ---------------------------------------------------------------------------------------------------------------------
# From the folders of runs
# ---------------------------------------------------------------------------------------------------------------------


def finished(run, *more):
    """`read` of the folder of a run. Raises UserError if it is not finished or that of a reference, or if a file is damaged."""
    for name in ("result.json", "args.json", *more):  # a reference has no args.json
        if wrong := damage(Path(run) / name):
            raise cli.UserError(f"{run} holds no finished run ({name} {wrong}).\nGive the folder of a finished run.")
    return read(Path(run) / "result.json")


def curves(args):
    """Thin lines are runs, thick lines their mean over seeds. The loss of PaRe is a sum.

    One colour for each method, or for each method, task, rate and number of samples or steps where these differ.
    """
    groups, seeds, results = {}, set(), [finished(run, "metrics.jsonl") for run in args.inputs]
    tasks, metrics = ({result[key] for result in results} for key in ("task", "metric"))
    several = [key for key in ("lr", "n_train", "steps", "epochs") if len({result[key] for result in results}) > 1]
    for run, result in zip(args.inputs, results, strict=True):
        name = ", ".join(
            [result["task"]] * (len(tasks) > 1) + [result["variant"]] + [f"{key} {result[key]}" for key in several]
        )
        if (name, result["seed"]) in seeds:
            raise cli.UserError(f"{run}: a run of {name}, seed {result['seed']}, was given already.\nGive each run once.")
        seeds.add((name, result["seed"]))
        rows = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
        groups.setdefault(name, []).append([row for row in rows if "stage" not in row])
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    colours = colours_of(groups)
    for name, histories in groups.items():
        colour, shortest = colours[name], min(map(len, histories))
        for axis, key in zip(axes, ("loss", "val"), strict=True):
            values = [[row[key] for row in rows] for rows in histories]
            for line in values if len(values) > 1 else ():
                axis.plot(range(1, len(line) + 1), line, color=colour, linewidth=0.8, alpha=0.35)
            mean = np.mean([line[:shortest] for line in values], 0)  # (epochs,)
            axis.plot(range(1, shortest + 1), mean, color=colour, linewidth=2, label=f"{name} ({len(values)})")
    axes[0].set_title("training loss", fontsize=11)
    axes[1].set_title(f"{metrics.pop() if len(metrics) == 1 else 'metric'} on validation", fontsize=11)
    for axis in axes:
        axis.set_xlabel("epoch")
        axis.locator_params(axis="x", integer=True)
        readable(axis)
    plain(*axes)
    title = f"{', '.join(sorted(tasks))} (runs)" if len(tasks) == 1 else "task, method (runs)"
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False, title=title)
    save(figure, args)
    return groups


def budget(args):
    """Has training levelled off? Prints by how much the last fifth of each run lowered the validation error."""
    tasks = {}
    for run in args.inputs:
        result, batch_size = finished(run, "metrics.jsonl"), json.loads((Path(run) / "args.json").read_text())["batch_size"]
        rows = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
        val = [row["val"] for row in rows if "stage" not in row]
        steps = np.arange(1, len(val) + 1) * result["steps"] / len(val)
        name = f"{result['variant']}, batch {batch_size}, lr {result['lr']:g}, {result['n_train']:,} samples"
        tasks.setdefault(result["task"], []).append((name, steps, val, result))
    figure, axes = plt.subplots(1, len(tasks), figsize=(5.2 * len(tasks), 3.8), layout="constrained", squeeze=False)
    print("| task | run | steps | minutes | validation | gain in the last fifth | test |\n|---|---|---|---|---|---|---|")
    for axis, (task, curves_of) in zip(axes[0], tasks.items(), strict=True):
        for colour, (name, steps, val, result) in zip(itertools.cycle(COLOURS), curves_of, strict=False):
            axis.plot(steps, val, color=colour, linewidth=1.8, label=name)
            before, last = min(val[: round(0.8 * len(val))]), min(val)
            gain = 1 - last / before if before else 0
            print(f"| {task} | {name} | {result['steps']:,} | {result['seconds'] / 60:.0f} | {last:.4f} |",
                  f"{gain:.0%} | {result['test']:.4f} |")  # fmt: skip
        axis.set_xlabel("optimizer steps")
        readable(axis)
        axis.set_title(f"{task}: {curves_of[0][3]['metric']} on validation", fontsize=11)
        axis.legend(fontsize=7, frameon=False)
    plain(*axes[0])
    save(figure, args)
    return {task: [name for name, *_ in curves_of] for task, curves_of in tasks.items()}


# ---------------------------------------------------------------------------------------------------------------------
# From all runs of a task
# ---------------------------------------------------------------------------------------------------------------------


def rows_of(args):
    """The results of the finished runs of the task in --out-dir."""
    if rows := of(collect(args.out_dir), task=args.task):
        return rows
    raise cli.UserError(f"{args.out_dir} has no finished run of {args.task}.\nGive the --out-dir of tools/reproduce.py.")


def errors(rows, methods):
    """The errors at the last epoch of `methods` (name -> method): name -> list over seeds, without methods that have no run."""
    found = {name: errors_of(of(rows, method=method)) for name, method in methods.items()}
    return {name: values for name, values in found.items() if values}


def gate(args):
    """Test error over k0, for patches selected by the gate and at random."""
    if data.find_task(args.task).modality == "1d":
        raise cli.UserError(f"gate: k0 of {args.task} is limited by the tokens of its source.\nGive a 2D task.")
    rows = rows_of(args)
    default = data.find_task(args.task).recipes["pare"].k_begin
    figure, axis = plt.subplots(figsize=(6.4, 4), layout="constrained")
    found = {}
    for name, method, variant, colour in (("the gate", "pare", "pare-k", TARGET), ("chance", *2 * ("pare-chance",), "0.55")):
        methods = {round(default, 2): method} | {share: f"{variant}{share}" for share in (0.2, 0.4, 0.9)}
        groups = dict(sorted(errors(rows, methods).items()))
        if not groups:
            raise cli.UserError(f"{args.out_dir} has no run of {method}.\nRun tools/reproduce.py --methods {method} first.")
        found[name] = dots(axis, groups, colour, x=list(groups), line="-", label=f"patches selected by {name}")
    axis.set(xlabel="k0 / N, share of source patches in the first epoch", ylabel=f"test {rows[0]['metric']}")
    axis.set_title(args.task, fontsize=11)
    axis.legend(frameon=False)
    save(figure, args)
    return found


def ablation(args):
    """Test error of ORCA by number of embedder epochs, by source, and by the parts frozen in stage 2."""
    rows = rows_of(args)
    sources = {row["source"]: row["method"] for row in rows if row["method"] in ("orca", "orca-proxy", "orca-proxy1d")}
    panels = {
        "embedder epochs": {"0": "naive", "5": "orca-e5", "20": "orca", "60": "orca-e60"},  # tiny scale
        "source of the embedder training": {"none": "naive", **sources},
        "frozen in stage 2": {"nothing": "orca", "embedder": "orca-freeze-embedder", "encoder": "orca-freeze-encoder",
                              "both": "orca-freeze-both"},
    }  # fmt: skip
    panels = {title: errors(rows, methods) for title, methods in panels.items()}
    if not any(panels.values()):
        raise cli.UserError(f"{args.out_dir} has no run of orca or its variants.\nRun tools/reproduce.py --methods orca first.")
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.8), layout="constrained", sharey=True)
    found = {}
    for axis, (title, groups), colour in zip(axes, panels.items(), (TARGET, SOURCE, COLOURS[4]), strict=True):
        if groups:
            found[title] = dots(axis, groups, colour, line="-" if title == "embedder epochs" else "none")
        axis.set_title(title, fontsize=11)
    axes[0].set_ylabel(f"{args.task}: test {rows[0]['metric']}")
    save(figure, args)
    return found


MANY = 999
# what: smallest and largest number of arguments after it, function
COMMANDS = {
    "table": (1, MANY, table), "gains": (1, MANY, gains), "pairs": (1, MANY, versus), "details": (1, MANY, details),
    "start": (1, MANY, start), "sizes": (1, MANY, against), "compute": (1, MANY, against), "curves": (1, MANY, curves),
    "budget": (1, MANY, budget), "gate": (0, 0, gate), "ablation": (0, 0, ablation),
}  # fmt: skip


def dispatch(args, commands, inputs, kind):
    """Call the function of args.what, or raise UserError if there are too few or too many inputs."""
    least, most, make = commands[args.what]
    if not least <= len(inputs) <= most:
        wanted = f"{least}{' or more' * (most > least)}"
        raise cli.UserError(f"{args.what} takes {wanted} {kind}; {len(inputs)} given.")
    return make(args)


def main(args):
    return dispatch(args, COMMANDS, args.inputs, "results.csv file(s) or folder(s) of finished runs")


if __name__ == "__main__":
    cli.guarded(main, cli.command_line(Args, __doc__))
