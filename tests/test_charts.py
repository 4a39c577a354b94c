"""The charts: each point is the mean of the runs that it names, and what cannot be compared is refused."""

import csv
import json
import shutil

import numpy as np
import pytest
import tyro
from helpers import NAIVE, PARE, two_runs
from PIL import Image

import cli
from tools import charts, reproduce


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    two_runs(out)
    return out


@pytest.fixture
def use(tmp_path):
    """Runs a command as the command line would; its picture is looked at. Returns what the chart shows."""

    def run(what, *words):
        found = charts.main(tyro.cli(charts.Args, args=["--out", str(tmp_path / "out"), what, *map(str, words)]))
        pixels = np.asarray(Image.open(tmp_path / f"out/{what}.png").convert("RGB"), int)
        coloured = pixels.max(-1) - pixels.min(-1) > 50
        assert coloured.sum() > 100 and pixels.shape[1] < 1550
        return found

    return run


@pytest.fixture
def results(tmp_path):
    """Writes a results.csv: results(name, (task, method, seed, error at the last epoch, n_train, steps), ...)"""

    def write(name, *rows, **more):
        path = tmp_path / name
        with path.open("w") as file:
            writer = csv.DictWriter(file, reproduce.COLUMNS)
            writer.writeheader()
            for task, method, seed, error, n_train, steps in rows:
                row = {"task": task, "method": method, "seed": seed, "test": 9, "test_last": error, "metric": "error"}
                row |= {"n_train": n_train, "steps": steps, "epochs": 8, "scale": "tiny", "seconds": 1, "lr": 0.1}
                writer.writerow(row | more)
        return path

    return write


def test_the_table_has_a_column_for_each_task_and_size(results, capsys):
    errors = {"naive": (0.5, 0.6, 0.7), "pare": (0.4, 0.52, 0.61)}  # pare: -0.09 ± 0.01, t = 9 sqrt(3)
    rows = [("a", method, seed, error, 1000, 9) for method, of_it in errors.items() for seed, error in enumerate(of_it)]
    rows += [("b", method, 0, error, 900, 9) for method, error in (("orca", 0.3), ("naive", 0.2), ("mona", 0.1))]
    rows += [("a", "naive", 0, 0.1, 10, 9), ("a", "mona", 0, 0.3, 1000, 9)]
    rows += [("a", "lora", seed, error, 1000, 9) for seed, error in enumerate((0.4, 0.5, 0.69))]  # p = 0.11
    file = str(results("all.csv", *rows))
    charts.main(charts.Args("table", (file,), methods=("naive", "pare", "orca", "lora")))
    assert capsys.readouterr().out.splitlines() == [
        "| method | a, 1,000 samples: error, n = 3 | b, 900 samples: error, n = 1 |",
        "|---|---|---|",
        "| pare | 0.5100 ± 0.1054\\* |  |",
        "| orca |  | 0.3000 |",
        "| naive | 0.6000 ± 0.1000 | 0.2000 |",
        "| lora | 0.5300 ± 0.1473 |  |",
    ]
    charts.main(charts.Args("table", (file,), methods=("mona", "pare")))  # compared with naive all the same
    shown = capsys.readouterr().out  # p of pare is 0.0041; mona has another n than most, and no test
    assert "| pare | 0.5100 ± 0.1054\\* |\n" in shown and "| mona | 0.3000 (n = 1) |\n" in shown
    with pytest.raises(cli.UserError, match="no runs of orka"):
        charts.main(charts.Args("table", (file,), methods=("orka",)))


def test_gains_are_ratios_to_naive_with_the_same_seed(use, results, monkeypatch):
    drawn = []
    monkeypatch.setattr(charts, "save", lambda figure, args, save=charts.save: (drawn.append(figure), save(figure, args)))
    errors = {"naive": (0.5, 0.6, 0.7), "pare": (0.4, 0.52, 0.61), "lora": (0.4, 0.5, 0.69)}  # p = 0.004 and 0.11
    rows = [("a", method, seed, error, 1000, 9) for method, of_it in errors.items() for seed, error in enumerate(of_it)]
    rows += [("b", "naive", seed, error, 900, 9) for seed, error in enumerate((0.1, 0.2))] + [("b", "orca", 1, 0.3, 900, 9)]
    rows += [("c", "naive", 0, 0.0, 90, 9), ("c", "orca", 0, 0.1, 90, 9)]  # naive has no error: no ratio
    found = use("gains", results("all.csv", *rows))
    assert {key: list(ratios) for key, ratios in found.items()} == {("a", 1000): ["pare", "lora"], ("b", 900): ["orca"]}
    assert found["b", 900]["orca"] == pytest.approx([1.5])  # of seed 1 alone
    assert found["a", 1000]["pare"] == pytest.approx([0.4 / 0.5, 0.52 / 0.6, 0.61 / 0.7])
    large, none = ([line for line in axis.lines if line.get_markersize() == 8] for axis in drawn[0].axes)
    assert none == []  # one seed has no mean
    assert [line.get_xdata()[0] for line in large] == pytest.approx(
        [np.prod(found["a", 1000][m]) ** (1 / 3) for m in ("pare", "lora")]
    )
    assert [line.get_markerfacecolor() == "white" for line in large] == [False, True]  # filled: p < 0.05
    assert [axis.get_title() for axis in drawn[0].axes] == ["a, 1,000", "b, 900"]


def test_pairs_compare_each_method_with_each_other_one(results, capsys):
    errors = {"naive": (0.5, 0.6, 0.7), "pare": (0.4, 0.52, 0.61), "orca": (0.5, 0.5)}
    rows = [("a", method, seed, error, 1000, 9) for method, of_it in errors.items() for seed, error in enumerate(of_it)]
    rows += [("b", "naive", 0, 0.1, 90, 9), ("a", "mona", 0, 0.5, 1000, 9)]
    found = charts.main(charts.Args("pairs", (str(results("all.csv", *rows)),)))
    assert found == {("a", 1000): ["pare", "orca", "mona", "naive"]}  # b has one method
    assert capsys.readouterr().out.splitlines() == [
        "",
        "| a, 1,000 samples | orca | mona | naive |",
        "|---|---|---|---|",
        "| pare | -0.0400 ± 0.0849 |  | -0.0900 ± 0.0100, p = 0.0041 |",
        "| orca |  |  | -0.0500 ± 0.0707 |",
        "| mona |  |  |  |",
    ]


def test_details_put_a_variant_beside_its_method(results, capsys):
    errors = {"pare": (0.5, 0.6, 0.7), "pare-end": (0.4, 0.52, 0.61), "orca-e5": (0.1,), "naive": (0.9, 0.9, 0.9)}
    file = results("all.csv", *[("a", m, seed, e, 9, 9) for m, of_it in errors.items() for seed, e in enumerate(of_it)])
    found = charts.main(charts.Args("details", (str(file),)))
    assert found == {("a", 9): ["pare-end"]}  # orca has no run
    assert capsys.readouterr().out.splitlines()[2:] == ["| a | pare-end | 0.5100 ± 0.1054 | -0.0900 ± 0.0100 | 0.0041 | 3 |"]


def test_a_random_start_is_compared_with_the_copied_start_of_the_same_variant(results, capsys):
    errors = {"contrast": (0.9, 0.8), "contrast-stage1": (0.5, 0.4), "contrast-stage1-init-random": (0.7, 0.6)}
    file = results("all.csv", *[("a", m, seed, e, 9, 9) for m, of_it in errors.items() for seed, e in enumerate(of_it)])
    charts.main(charts.Args("details", (str(file),), methods=("contrast-stage1-init-random",)))
    assert "| 0.6500 ± 0.0707 | +0.2000 ± 0.0000 |" in capsys.readouterr().out


def test_sizes_are_means_over_seeds_by_method_and_number_of_samples(use, results):
    few = results("few.csv", ("a", "naive", 0, 0.8, 100, 50), ("a", "naive", 1, 0.9, 100, 50), ("a", "orca", 0, 0.5, 100, 50),
                  ("a", "boosting", 0, 0.1, 100, ""), ("b", "naive", 0, 0.3, 100, 50))  # fmt: skip
    many = results("many.csv", ("a", "orca", 0, 0.01, 1000, 90), ("a", "naive", 0, 0.7, 1000, 90),
                   ("a", "boosting", 0, 0.1, 1000, ""), ("a", "pare", 0, 0.2, 1000, 90))  # fmt: skip
    found = use("sizes", many, few)
    assert found.keys() == {"a"} and list(found["a"]) == ["orca", "naive"]  # two sizes each; references take no steps
    assert list(found["a"]["naive"]) == [100, 1000] and found["a"]["naive"][1000] == (0.7, 0)
    assert found["a"]["naive"][100] == pytest.approx((0.85, 0.1 / 2**0.5))
    assert found["a"]["orca"] == {100: (0.5, 0), 1000: (0.01, 0)}
    found = use("sizes", many, few, "--methods", "pare", "naive")  # also a method with one size; b has one size only
    assert list(found) == ["a"] and found["a"]["pare"] == {1000: (0.2, 0)} and len(found["a"]["naive"]) == 2


def test_compute_counts_what_a_method_encodes(use, results):
    rows = [
        ("a", method, 0, 0.5, 1000, steps) for steps in (40, 400) for method in ("pare", "naive", "mona", "orca", "recraft")
    ]
    found = use("compute", results("all.csv", *rows))["a"]
    assert {method: list(at) for method, at in found.items()} == {
        "pare": [80, 800],
        "orca": [40, 400],  # the first stage trains the embedder alone
        "mona": pytest.approx([40 + 10 * 10 / 3, 400 + 100 * 10 / 3]),  # 2 of 8 epochs, ten passes instead of three
        "naive": [40, 400],
    }


def test_every_method_has_a_colour_of_its_own():
    methods = [method for method in reproduce.METHODS if method == "mona-e10" or "-" not in method]
    colours = charts.colours_of([*methods, "pare-end", "orca-e5"])
    assert len({colours[method] for method in methods}) == len(methods)
    assert charts.colours_of(["scratch", "naive-bias", "mona"])["mona"] == colours["mona"]
    assert len(set(charts.colours_of(["naive, lr 1", "naive, lr 2", "naive"]).values())) == 3


def test_start_pairs_a_method_with_its_random_start(use, results):
    rows = [("a", "naive", 0, 0.5, 100, 9), ("a", "naive-random", 0, 0.6, 100, 9), ("a", "naive-random", 1, 0.8, 100, 9),
            ("a", "contrast-stage1", 0, 0.7, 100, 9), ("a", "contrast-stage1-init-random", 0, 0.9, 100, 9),
            ("a", "contrast", 0, 0.1, 100, 9), ("a", "contrast-random", 0, 0.2, 100, 9), ("a", "orca", 0, 0.3, 100, 9),
            ("b", "pare", 0, 0.3, 100, 9)]  # fmt: skip
    found = use("start", results("all.csv", *rows))  # contrast-random has random scores, not a random embedder
    assert list(found) == ["a"] and found["a"]["copied"] == {"naive": (0.5, 0), "contrast-stage1": (0.7, 0)}
    assert found["a"]["random"] == {"naive": pytest.approx((0.7, 0.2 / 2**0.5)), "contrast-stage1": (0.9, 0)}


@pytest.fixture
def variants(tmp_path, monkeypatch):
    """Finished runs of the variants, by their results alone: errors 0.1 i and 0.1 i + 0.02 for method i."""

    def write(methods):
        for i, method in enumerate(methods):
            monkeypatch.setitem(reproduce.METHODS, method, "")
            for seed in range(2):
                row = {"task": "cifar100", "method": method.split("-")[0], "seed": seed, "metric": "error"}
                row |= {"test": 9, "test_last": 0.1 * i + 0.02 * seed, "source": "voc" if "proxy" in method else "cifar10"}
                folder = tmp_path / "all" / (method if "-" in method else "") / f"cifar100-{method}-s{seed}"
                folder.mkdir(parents=True)
                (folder / "result.json").write_text(json.dumps(row))
        return tmp_path / "all"

    return write


def test_gate_reads_the_runs_by_their_share(use, variants):
    methods = ["pare", "pare-k0.2", "pare-k0.4", "pare-chance", "pare-chance0.2", "pare-chance0.9", "pare-random", "naive"]
    found = use("gate", "--task", "cifar100", "--out-dir", variants(methods))
    means = {name: {share: round(mean, 6) for share, (mean, _) in groups.items()} for name, groups in found.items()}
    assert means == {"the gate": {0.2: 0.11, 0.4: 0.21, 0.64: 0.01}, "chance": {0.2: 0.41, 0.64: 0.31, 0.9: 0.51}}
    assert found["chance"][0.9][1] == pytest.approx(0.02 / 2**0.5)


def test_ablation_reads_the_runs_of_its_panels(use, variants):
    methods = ["naive", "orca", "orca-e5", "orca-proxy", "orca-freeze-both", "orca-random", "pare"]
    found = use("ablation", "--task", "cifar100", "--out-dir", variants(methods))
    means = {title: {name: round(mean, 6) for name, (mean, _) in groups.items()} for title, groups in found.items()}
    assert means == {
        "embedder epochs": {"0": 0.01, "5": 0.21, "20": 0.11},
        "source of the embedder training": {"none": 0.01, "cifar10": 0.11, "voc": 0.31},
        "frozen in stage 2": {"nothing": 0.11, "both": 0.41},
    }


def test_curves_groups_the_seeds_of_a_method(use, runs, tmp_path):
    def like(name, **changes):
        """The run of naive fine-tuning, as if it had another seed or another rate."""
        folder = tmp_path / name
        folder.mkdir()
        for file in ("result.json", "args.json"):
            (folder / file).write_text(json.dumps(json.loads((runs / NAIVE / file).read_text()) | changes))
        (folder / "metrics.jsonl").write_text((runs / NAIVE / "metrics.jsonl").read_text())
        return folder

    other_seed, other_rate = like("seed", seed=1), like("rate", lr=0.5)
    groups = use("curves", runs / PARE, runs / NAIVE, other_seed)
    assert {name: len(histories) for name, histories in groups.items()} == {"pare": 1, "naive": 2}
    assert list(use("curves", runs / NAIVE, other_rate)) == ["naive, lr 0.003", "naive, lr 0.5"]
    with pytest.raises(cli.UserError, match="seed 0, was given already"):
        use("curves", runs / NAIVE, runs / NAIVE)
    lines = [json.loads(line) for line in (runs / NAIVE / "metrics.jsonl").read_text().splitlines()]
    assert groups["naive"] == [lines, lines] and len(lines) == 2


def test_budget_shows_how_far_training_has_levelled_off(use, runs, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    for file in ("result.json", "args.json"):
        (run / file).write_text((runs / NAIVE / file).read_text())
    val = [0.9, 0.8, 0.8, 0.7, 0.7, 0.5, 0.55, 0.6, 0.45, 0.4]  # the best of the first eight epochs: 0.5
    (run / "metrics.jsonl").write_text("".join(json.dumps({"val": v}) + "\n" for v in val))
    found = use("budget", run, runs / PARE)
    assert [len(names) for names in found.values()] == [2] and "| 0.4000 | 20% |" in capsys.readouterr().out
    (run / "metrics.jsonl").write_text(10 * (json.dumps({"val": 0.0}) + "\n"))  # a saturated table
    use("budget", run)
    assert "| 0.0000 | 0% |" in capsys.readouterr().out


def test_mistakes_are_told(use, results, runs, tmp_path):
    one = results("one.csv", ("a", "naive", 0, 0.5, 100, 9))
    two = results("two.csv", ("a", "naive", 0, 0.5, 1000, 99))
    (tmp_path / "text.csv").write_text("no,results\n1,2\n")
    cut = shutil.copytree(runs / NAIVE, tmp_path / "cut")
    (cut / "metrics.jsonl").write_text((cut / "metrics.jsonl").read_text()[:-9])
    for what, words, message in (
        ("sizes", [], "takes 1 or more results.csv"),
        ("sizes", [one], "no method has runs at more than one x"),
        ("sizes", [one, one], "a naive, seeds 0, 0, cannot be averaged: they have a seed twice"),
        ("sizes", [one, results("lr.csv", ("a", "naive", 1, 0.1, 100, 9), lr=1)], "seeds 0, 1, .* differ in lr"),
        ("sizes", [one, two, "--methods", "naive", "orka"], "no runs of orka"),
        ("gains", [one], "no method has a run with the seed of a run of naive"),
        ("pairs", [one, one], "they have a seed twice"),
        ("pairs", [one], "pairs: the results files have no two methods to compare"),
        ("table", [one], "table: the results files have no two methods to compare"),
        ("details", [one], "details: the results files have no two methods to compare"),
        ("table", [one, results("score.csv", ("a", "orca", 0, 0.5, 100, 9), metric="score")], "differ in scale or metric"),
        ("gains", [one, results("full.csv", ("a", "orca", 0, 0.5, 100, 9), scale="full")], "differ in scale or metric"),
        ("compute", [one, two], "differ in n_train"),
        ("compute", [one, tmp_path / "none.csv"], "none.csv is missing"),
        ("start", [tmp_path / "text.csv"], "text.csv is not a results.csv"),
        ("start", [one], "No method has runs with both starts"),
        ("curves", [tmp_path], "holds no finished run"),
        ("curves", [cut], r"holds no finished run \(metrics.jsonl is empty or cut short"),
        ("gate", ["--task", "satellite", "--out-dir", runs], "Give a 2D task"),
        ("curves", [runs / NAIVE, "--out", one], "is a file"),
        ("gate", ["--out-dir", tmp_path], "no finished run of spherical"),
        ("ablation", ["--task", "darcy", "--out-dir", runs], "no finished run of darcy"),
    ):
        with pytest.raises(cli.UserError, match=message):
            use(what, *words)


def test_the_command_line_writes_the_chart_to_out(script, results, tmp_path):
    rows = [("a", "naive", 0, 0.5, n, 9) for n in (100, 1000)]
    script("tools/charts.py", "sizes", results("all.csv", *rows), out=tmp_path, option="--out")
    assert (tmp_path / "sizes.png").exists()
