"""tools/reproduce.py, its variants and references: what it runs, skips, compares and prints."""

import contextlib
import csv
import dataclasses
import importlib
import json
import shlex
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import tyro
from helpers import ended, fork
from safetensors.torch import load_file

import cli
import common
import data
from tools import references, reproduce
from tools.variants import METHODS, PATCHES


def test_reproduce_skips_what_is_finished_and_prints_the_tables(script, tmp_path):
    few = ["--tasks", "openml1510", "--n-train", 32, "--options=--epochs 1"]
    command = ["tools/reproduce.py", "--methods", "naive-random", "--seeds", 2, *few]
    table = script(*command, out=tmp_path)
    files = sorted(tmp_path.glob("naive-random/*/result.json"))
    errors = [json.loads(file.read_text())["test"] for file in files]
    assert len(files) == 2 and f"| naive-random | {np.mean(errors):.4f} ± {np.std(errors, ddof=1):.4f} |" in table
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [(row["method"], float(row["test"])) for row in rows] == [("naive-random", error) for error in errors]
    before = [file.stat().st_mtime_ns for file in files]
    assert script(*command, out=tmp_path) == table and [file.stat().st_mtime_ns for file in files] == before
    known = ["--known", tmp_path / "results.csv"]  # where the folder is lost
    assert script(*command, *known, out=tmp_path / "lost") == table and not list((tmp_path / "lost").glob("*/*/result.json"))
    assert (tmp_path / "lost/results.csv").read_text() == (tmp_path / "results.csv").read_text()
    reproduce_args = SimpleNamespace(n_train=32, options="--epochs 1")
    script(*command[:-1], "--options=--epochs 2", *known, out=tmp_path / "other")  # other options replace the rows
    assert {row["epochs"] for row in csv.DictReader((tmp_path / "other/results.csv").open())} == {"2"}
    assert {row["options"] for row in rows} == {reproduce.options_of(vars(reproduce_args))} == {"--n-train 32 --epochs 1"}


def test_an_option_that_no_method_has_does_not_block_the_folder(script, tmp_path):
    command = ["tools/reproduce.py", "--tasks", "openml1510", "--methods", "naive", "--seeds", 1, "--n-train", 32]
    for mistake in ("--epoch 1", "--help"):  # the second ends without an error, and without a run
        error = script(*command, f"--options={mistake}", out=tmp_path, code=2)
        assert "openml1510 naive seed 0 failed" in error and "1 of 1 runs failed" in error
    assert "| naive |" in script(*command, "--options=--epochs 1", out=tmp_path)
    assert "holds runs of openml1510" in script(*command, "--options=--epochs 2", out=tmp_path, code=2)


def written(path, rows):
    """A results.csv of rows that have what is given, and else the same."""
    same = {"task": "a", "method": "naive", "seed": 0, "test": 0.5, "test_last": 0.5, "metric": "error", "data": "official",
            "scale": "tiny", "n_train": 9, "seconds": 60}  # fmt: skip
    rows = [same | row for row in rows]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_a_row_stays_when_the_folder_of_its_run_is_gone(tmp_path):
    path = written(tmp_path / "results.csv", [{"seed": seed, "test_last": 0.1 * seed} for seed in range(3)])
    run = tmp_path / "a-naive-tiny-swin-s2/result.json"
    run.parent.mkdir()
    run.write_text(json.dumps({"task": "a", "method": "naive", "seed": 2, "test": 0.7, "test_last": 0.7, "metric": "error",
                               "data": "official", "seconds": 1, "n_train": 9}))  # fmt: skip
    reproduce.save(reproduce.Args(out_dir=str(tmp_path)))
    assert {row["seed"]: row["test_last"] for row in reproduce.read_results(path)} == {0: 0.0, 1: 0.1, 2: 0.7}


def refused(folder, match, **changes):
    args = reproduce.Args(("a",), out_dir=str(folder), **changes)
    with pytest.raises(cli.UserError, match=match), reproduce.same_options(args):
        pass


def test_a_folder_keeps_the_options_of_its_runs(tmp_path):
    options = lambda: json.loads((tmp_path / "options.json").read_text())
    first = reproduce.Args(("a",), out_dir=str(tmp_path), options="--epochs 1")
    with reproduce.same_options(first):
        assert options()["a"]["options"] == "--epochs 1"
        refused(tmp_path, "holds runs of a", options="--epochs 2")  # also while its first run starts
        with reproduce.same_options(reproduce.Args(("b",), out_dir=str(tmp_path))):  # another study beside it
            pass
        assert list(options()) == ["a"]
    assert options() == {}  # none of its runs began
    with reproduce.same_options(first):
        (tmp_path / "a-naive-tiny-swin-s0").mkdir()
    assert list(options()) == ["a"]
    (tmp_path / "a-naive-tiny-swin-s0").rmdir()
    written(tmp_path / "results.csv", [{"options": "--epochs 1"}])
    refused(tmp_path, "holds runs of a")  # the folders are gone, the rows are not
    (tmp_path / "options.json").unlink()
    refused(tmp_path, "results.csv has rows of a with other options", n_train=9)
    with reproduce.same_options(first):
        pass
    assert list(options()) == ["a"]


def test_a_table_averages_what_belongs_together(tmp_path):
    rows = [{"seed": seed, "lr": 0.1, "steps": 1} for seed in range(3)]
    reproduce.table(reproduce.read_results(written(tmp_path / "same.csv", rows)), "a")
    for other in ({"lr": 0.2}, {"n_train": 10}, {"data": "toy"}, {"steps": 2}):
        mixed = written(tmp_path / "mixed.csv", [*rows[:2], rows[2] | other])
        with pytest.raises(cli.UserError, match=f"cannot be averaged: they differ in {next(iter(other))}"):
            reproduce.table(reproduce.read_results(mixed), "a")


def test_equal_differences_have_no_p():
    rows = [{"task": "a", "method": method, "seed": seed, "data": "toy", "test_last": error + less}
            for seed, error in enumerate((0.3, 0.4, 0.5)) for method, less in (("naive", 0.0), ("orca", -0.1))]  # fmt: skip
    assert reproduce.p_value(rows, "a", "orca") is None


def test_runs_of_different_studies_share_no_table(tmp_path):
    twice = written(tmp_path / "twice.csv", [{"n_train": 9}, {"n_train": 100, "test_last": 0.2}])
    with pytest.raises(cli.UserError, match="has a run twice"):
        reproduce.collect(tmp_path, twice)
    mixed = written(tmp_path / "mixed.csv", [{"options": "--n-train 9"}, {"options": "--n-train 100", "method": "orca"}])
    with pytest.raises(cli.UserError, match="have different options"):
        reproduce.table(reproduce.collect(tmp_path, mixed), "a")


def test_a_results_file_is_read_whole_or_refused(tmp_path):
    path = written(tmp_path / "results.csv", [{"seed": 1}])
    rows, text = reproduce.read_results(path), path.read_text()
    path.write_text(text, encoding="utf-8-sig")  # as a spreadsheet writes it
    assert reproduce.read_results(path) == rows and rows[0]["task"] == "a"
    header = text.splitlines()[0]
    for wrong in ("", header, text.replace("task", "of"), text.replace("0.5", "nan"), text.replace("0.5", "inf"),
                  text.replace("0.5", "-0.5"), text.replace("data", "kind")):  # fmt: skip
        path.write_text(wrong)
        with pytest.raises(cli.UserError, match="is not a results.csv"):
            reproduce.read_results(path)


def test_reproduce_compares_methods_by_task(capsys):
    rows = [
        {"task": task, "method": method, "seed": seed, "data": "toy", "test": error, "test_last": error}
        for task, scale in (("a", 1.0), ("b", 10.0), ("openml187", 1.0))  # the last is saturated, and left out
        for seed in range(4)
        for method, error in (("naive", scale * (1 + 0.1 * seed)), ("pare", scale * (0.9 + 0.1 * seed)))
    ]
    reproduce.paired(rows)
    line = capsys.readouterr().out.splitlines()[-1]  # 0.1 better, of a mean of 1.15: two tasks of one sign, p = 2 / 2^2
    assert line == "| pare | 2 (8) | 2, 0 | -8.7 % | 0.5 | 2 (8) | 2, 0 | -8.7 % | 0.5 |"


def test_runs_on_different_data_are_no_pair():
    row = {"task": "a", "seed": 0, "test_last": 0.5}
    rows = [row | {"method": method, "data": data} for method, data in (("naive", "simulated"), ("orca", "official"))]
    assert reproduce.pairs(rows, "a", "orca", "naive") == ([], [])


def test_the_table_compares_seed_by_seed(capsys):
    errors = {"naive": (0.5, 0.6, 0.7), "pare": (0.4, 0.52, 0.61, 0.9), "orca": (0.6,)}  # pare: -0.09 +- 0.01
    row = {"task": "a", "data": "toy", "metric": "error", "scale": "tiny", "n_train": 9, "seconds": 60}
    rows = [row | {"method": method, "seed": seed, "test": 2 * error, "test_last": error}
            for method, of_method in errors.items() for seed, error in enumerate(of_method)]  # fmt: skip
    reproduce.table(rows[::-1], "a")
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3:] == [
        "| pare | 1.2150 ± 0.4263 | 0.6075 ± 0.2131 | -0.0900 ± 0.0100 | 0.0041 | 4 | 1.0 |  |",
        "| orca | 1.2000 | 0.6000 |  |  | 1 | 1.0 |  |",
        "| naive | 1.2000 ± 0.2000 | 0.6000 ± 0.1000 |  |  | 3 | 1.0 |  |",
    ]


def test_a_table_names_the_origins_of_all_its_runs(capsys):
    row = {"task": "a", "seed": 0, "metric": "error", "scale": "tiny", "n_train": 9, "seconds": 60, "test": 1, "test_last": 1}
    reproduce.table([row | {"method": "naive", "data": "official"}, row | {"method": "orca", "data": "toy"}], "a")
    assert "a: official and toy data, error, tiny scale, 9 training samples\n" in capsys.readouterr().out


def test_the_profile_compares_with_the_best_on_each_task(tmp_path):
    errors = {"naive": (0.2, 4.0, 0.0), "pare": (0.1, 6.0, 0.0), "orca": (0.1, 4.0, 0.5)}
    rows = [
        {"task": task, "method": method, "test": error * factor}
        for method, of_method in errors.items()
        for task, error in zip("abc", of_method, strict=True)
        for factor in (0.9, 1.1)  # two seeds, whose mean counts
    ] + [{"task": "a", "method": "mona", "test": 0.01}]  # did not run everywhere
    factors = reproduce.profile(rows, tmp_path / "profile.png")
    assert {m: pytest.approx(f) for m, f in factors.items()} == {
        "naive": [1, 1, 2], "pare": [1, 1, 1.5], "orca": [1, 1, float("inf")],
    }  # fmt: skip
    assert (tmp_path / "profile.png").stat().st_size > 5000


def test_a_variant_differs_from_its_method_in_what_it_says(tmp_path):
    few = "--task cifar100 --scale tiny --n-train 32 --epochs 1 --batch-size 16 --data-dir none --out-dir".split()
    for variant in ("pare", "pare-highest", "pare-frozen-gate", "orca-freeze-embedder", "naive-test"):
        out = reproduce.folder(tmp_path, variant)
        ended(fork(reproduce.train, variant, [*few, str(out)]))  # its patch changes the module
    last = lambda variant, name: torch.load(tmp_path / variant / f"cifar100-{name}-tiny-swin-s0-toy/last.pt")
    plain, highest, frozen = last("", "pare"), last("pare-highest", "pare"), last("pare-frozen-gate", "pare")
    assert not torch.equal(plain["net"]["predictor_s.linear.weight"], highest["net"]["predictor_s.linear.weight"])
    trained = [len(state["optimizer"]["param_groups"][0]["params"]) for state in (plain, frozen)]
    assert trained[0] - trained[1] == 2  # the gate's weight and bias
    aligned = load_file(next((tmp_path / "orca-freeze-embedder").glob("*/stage1.safetensors")))
    after = last("orca-freeze-embedder", "orca")["net"]
    assert all(torch.equal(value, after[key]) for key, value in aligned.items())
    row = json.loads((tmp_path / "naive-test/cifar100-naive-tiny-swin-s0-toy/result.json").read_text())
    assert row["val"] == row["test"]


def test_every_variant_is_a_command_line_that_its_method_knows():
    for command in set(METHODS.values()):
        file, *own = shlex.split(command)
        args = tyro.cli(importlib.import_module(file.removesuffix(".py")).Args, args=["--task", "satellite", *own])
        assert args.task == "satellite", command


def test_a_bias_lets_amplitudes_pass_and_shuffled_labels_are_the_same_labels():
    x, make = torch.rand(8, 1, 46) + 0.1, lambda *shape: common.Embedder1d(*shape)
    finetune = SimpleNamespace(common=SimpleNamespace(make_embedder=make))
    PATCHES["naive-bias"](finetune)
    apart = lambda embedder: (embedder(x) - embedder(x.flip(0))).norm() / embedder(x).norm()
    assert apart(make(1, 46, 128)) < 0.01 and apart(finetune.common.make_embedder(1, 46, 128)) > 0.05
    orca = SimpleNamespace(align=lambda *given: given)
    PATCHES["orca-shuffled"](orca)
    *before, y_t, args = orca.align("embedder", "u_s", "y_s", "train", torch.arange(50), "args")
    assert (before, args) == (["embedder", "u_s", "y_s", "train"], "args")
    assert sorted(y_t.tolist()) == list(range(50)) != y_t.tolist()


def test_only_real_runs_of_the_same_options_and_scale_count_as_known(tmp_path, monkeypatch):
    known, started = tmp_path / "known.csv", []
    row = {"task": "cifar100", "method": "naive", "test": 0.5, "test_last": 0.5, "metric": "error", "n_train": 9, "seconds": 1}
    with known.open("w") as file:
        writer = csv.DictWriter(file, reproduce.COLUMNS)
        writer.writeheader()
        for seed, kind, scale, options in (
            (0, "official", "tiny", "--epochs 2"), (1, "toy", "tiny", "--epochs 2"), (2, "official", "tiny", "--epochs 3"),
            (3, "official", "full", "--epochs 2"),
        ):  # fmt: skip
            writer.writerow(row | {"seed": seed, "data": kind, "scale": scale, "options": options})
    monkeypatch.setattr(reproduce, "start", lambda args, task, method, seed, *rest: started.append(seed) or True)
    twice = ("naive", "naive")  # the second is left out
    args = reproduce.Args(("cifar100",), twice, 4, out_dir=str(tmp_path / "out"), known=str(known), options="--epochs 2")
    with pytest.raises(cli.UserError, match="cannot be averaged: they differ in data"):  # the run on toy data was not repeated
        reproduce.main(args)
    assert sorted(started) == [1, 2, 3]
    assert [row["seed"] for row in reproduce.read_results(tmp_path / "out/results.csv")] == [0, 1]


@pytest.mark.parametrize("options, released", [("--as_released", True), ("--as-released", True), ("--lr 1e-3", False)])
def test_references_get_the_data_of_the_methods(options, released, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(reproduce.data, "load", lambda *args, as_released: seen.append(as_released))
    monkeypatch.setattr(reproduce.references, "refer", lambda *args: None)
    reproduce.refer("mean", reproduce.Args(out_dir=str(tmp_path), options=options), "advection1d", 0, tmp_path)
    assert seen == [released]


def test_options_do_not_override_a_variant(monkeypatch):
    seen = []
    monkeypatch.setattr("finetune.main", seen.append)
    for variant in ("naive-80", "naive"):
        monkeypatch.setattr(reproduce.sys, "argv", [])
        reproduce.train(variant, ["--task", "cifar100", "--epochs", "6"])
    assert [(args.mode, args.epochs) for args in seen] == [("naive", 80), ("naive", 6)]


def test_what_reproduce_refuses(tmp_path):
    (tmp_path / "text.csv").write_text("no,results\n1,2\n")
    (tmp_path / "mine/cifar100-naive-tiny-swin-s0").mkdir(parents=True)
    (tmp_path / "mine/cifar100-naive-tiny-swin-s0/result.json").write_text("{}")
    for changes, message in (
        ({"out_dir": str(tmp_path / "naive-80")}, "has the name of a variant"),
        ({"seeds": 0}, "has no finished run of cifar100"),
        ({"known": str(tmp_path / "text.csv")}, "text.csv is not a results.csv"),
        ({"methods": ("orka",)}, "unknown method 'orka'"),
        ({"options": '--source "cifar10'}, "No closing quotation"),
        ({"options": "--epochs 2 --seed=5"}, "--options contains --seed, which this tool sets itself"),
        ({"options": "--n_train 50"}, "--options contains --n-train"),
        ({"known": str(tmp_path / "lost.csv")}, "lost.csv is missing"),
        ({"out_dir": str(tmp_path / "mine")}, "naive-tiny-swin-s0 was not started by this tool"),
    ):
        args = {"tasks": ("cifar100",), "methods": ("naive",), "seeds": 1, "out_dir": str(tmp_path / "out")} | changes
        with pytest.raises(cli.UserError, match=message):
            reproduce.main(reproduce.Args(**args))
    (tmp_path / "out/options.json").write_text("{")
    with pytest.raises(cli.UserError, match="options.json is empty or cut short"):
        reproduce.collect(tmp_path / "out")


def test_runs_of_other_options_are_not_taken_for_these_and_toys_not_for_real_data(script, tmp_path):
    command = ["tools/reproduce.py", "--tasks", "openml187", "--methods", "logistic", "--seeds", 1]
    script(*command, out=tmp_path)
    assert "Give these another --out-dir" in script(*command, "--n-train", 20, out=tmp_path, code=2)
    row = {"task": "a", "method": "naive", "seed": 0, "scale": "tiny"}
    for folder, kind, error in (("a-naive-b-s0", "official", 0.8), ("a-naive-b-s0-toy", "toy", 0.1)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "result.json").write_text(json.dumps(row | {"data": kind, "test": error}))
    assert [r["test"] for r in reproduce.collect(tmp_path) if r["task"] == "a"] == [0.8]


def test_a_class_that_training_lacks_does_not_shift_the_others():
    y, y_test = torch.tensor([0, 2, 3, 4]).repeat(20), torch.arange(5).repeat(4)
    split = lambda y: SimpleNamespace(inputs=lambda _: torch.nn.functional.one_hot(y, 5).float()[:, None], y=y, classes=5)
    out = references.logistic(SimpleNamespace(train=split(y), test=split(y_test)), 0)
    assert out.shape == (20, 5) and ((out.argmax(1) != y_test) == (y_test == 1)).all()


@pytest.mark.matrix
def test_the_convnet_learns_and_repeats(tmp_path):
    loaded = data.load("cifar100", tmp_path, tmp_path, "tiny", 64, 0)  # toy images
    seen = dataclasses.replace(loaded, test=loaded.train)
    first, again = (references.convnet(seen, 0) for _ in range(2))
    assert torch.equal(first, again) and first.shape == (64, 9)
    assert not torch.equal(first, references.convnet(seen, 0, ["--epochs", "1"]))
    unclipped = references.convnet(seen, 0, ["--clip", "0", "--epochs", "5"])
    assert (unclipped.argmax(1) != loaded.train.y).float().mean() < 0.7  # 0 is off
    parts = references.convnet(seen, 0, ["--batch-size", "16", "--accumulate", "2", "--epochs", "1"])
    assert torch.isfinite(parts).all()
    assert (first.argmax(1) != loaded.train.y).float().mean() < 0.1  # of its training samples; chance: 0.89
    for other in ("satellite", "darcy"):
        assert references.refer("convnet", SimpleNamespace(task=data.find_task(other), test=loaded.test), 0) is None
    assert references.refer("mean", SimpleNamespace(task=data.find_task("cosmic"), test=loaded.test), 0) is None


@pytest.mark.parametrize("space", [(32,), (32, 24)])
def test_the_layer_of_the_fourier_operator_keeps_the_lowest_frequencies(space):
    torch.manual_seed(0)
    net, v = references.Fourier(SimpleNamespace(shape=(1, *space), output=space), width=4, modes=3, layers=1), []
    net.lift.register_forward_hook(lambda _, __, out: v.append(out))
    net.project.register_forward_pre_hook(lambda _, inputs: v.append(inputs[0]))
    with torch.no_grad():
        identity = torch.stack([torch.eye(4), torch.zeros(4, 4)], -1)  # of complex numbers
        net.R.copy_(identity.view(1, 4, 4, *[1] * len(space), 2))
        for p in net.W.parameters():
            p.zero_()
        out = net(torch.randn(2, 1, *space))
    keep, axes = torch.zeros(space), tuple(range(2, 2 + len(space)))
    keep[(*[[-3, -2, -1, 0, 1, 2]] * (len(space) - 1), slice(3))] = 1  # k = 0, 1, 2 of the last axis, both signs of the first
    low = torch.fft.ifftn(torch.fft.fftn(v[0], dim=axes) * keep, dim=axes).real
    assert torch.allclose(v[1], v[0] + torch.nn.functional.gelu(low), atol=1e-5) and out.shape == (2, *space)


def test_a_reference_on_toy_data_is_repeated_and_reads_what_the_methods_read(tmp_path, monkeypatch):
    out = tmp_path / "satellite-mean-s0/result.json"
    out.parent.mkdir()
    args = reproduce.Args(out_dir=str(tmp_path), options="--as-released")
    started = []
    context = SimpleNamespace(Process=lambda target, args: started.append(args) or (_ for _ in ()).throw(KeyboardInterrupt))
    for kind in ("toy", "official"):
        out.write_text(json.dumps({"data": kind}))
        with contextlib.suppress(KeyboardInterrupt):
            assert reproduce.start(args, "satellite", "mean", 0, None, context)
    assert len(started) == 1
    asked = []

    def load(*rest, as_released):
        asked.append(as_released)
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "load", load)
    for options in ("--as-released", "--lr 1"):
        with pytest.raises(KeyboardInterrupt):
            reproduce.refer("mean", dataclasses.replace(args, options=options), "satellite", 0, tmp_path)
    assert asked == [True, False]


def test_a_reference_is_scored_like_a_method(script, tmp_path):
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    table = script("tools/reproduce.py", "--tasks", "openml1510", "--methods", "logistic", "--seeds", 1, out=tmp_path)
    row = json.loads((tmp_path / "openml1510-logistic-s0/result.json").read_text())
    loaded = data.load("openml1510", tmp_path, tmp_path, "tiny", 5000, 0)
    x, y = loaded.train.inputs(slice(None)).flatten(1).numpy(), loaded.train.targets(slice(None)).numpy()
    shift, scale = x.mean(0), x.std(0)
    model = LogisticRegression(max_iter=2000).fit((x - shift) / scale, y)
    x, y = loaded.test.inputs(slice(None)).flatten(1).numpy(), loaded.test.targets(slice(None)).numpy()
    by_hand = 1 - roc_auc_score(y, model.predict_proba((x - shift) / scale)[:, 1])
    assert row["test"] == pytest.approx(by_hand, abs=1e-3) and f"| logistic | {row['test']:.4f}" in table
