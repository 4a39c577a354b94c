"""Every method on every task, end to end on toy or simulated data: all pairs with -m matrix, by default those of USUAL."""

import importlib
import json
import math

import numpy as np
import pytest
from helpers import METHODS, score
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split

import cli
import data
import predict
from run import load

TASKS = [*data.TASKS, "openml1510"]
LARGE = ("psicov", "deepsea", "fsd50k")
# run by default: tasks with one method each, and every method but LSG (test_lsg.py) at least once
USUAL = {
    "cifar100": "pare", "spherical": "orca", "darcy": "pare", "cosmic": "contrast", "ninapro": "contrast", "fsd50k": "finetune",
    "ecg": "pare", "satellite": "recraft", "deepsea": "finetune", "advection1d": "recraft", "navier_stokes1d": "mona",
    "shallow_water2d": "orca", "openml1510": "mona",
}  # fmt: skip


def run(method, task, tmp_path, monkeypatch):
    module = importlib.import_module(method)
    monkeypatch.setattr(data, "TOY_TEST", 6 if task in LARGE else 30)
    options = dict(n_train=8, batch_size=4, accumulate=1) if task in LARGE else dict(n_train=16, batch_size=8)
    if method == "orca":
        options |= dict(embedder_epochs=3, source_samples=40)
    if method == "mona":
        options |= dict(meta_epochs=1)
    if method == "recraft":
        options |= dict(align_epochs=2, label_epochs=1, source_samples=40)
    if method == "contrast":
        options |= dict(contrast_epochs=1)
    if method == "lsg":  # the names of toys, or no names
        options |= dict(gcn_steps=20, prototypes="graph" if data.find_task(task).toy_names else "simplex")
    module.main(
        module.Args(task=task, scale="tiny", data_dir=str(tmp_path / "none"), out_dir=str(tmp_path), epochs=3, **options)
    )
    (folder,) = [path.parent for path in tmp_path.glob("*/result.json")]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((folder / "result.json").read_text())
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 3 and min(losses[1:]) < losses[0]
    assert all(math.isfinite(value) for row in rows for value in row.values()) and math.isfinite(result["test"])
    first_stage = [row for row in rows if "stage" in row]
    looks = {"orca": 3, "mona": 1, "recraft": 4, "contrast": 2, "lsg": 10 * (options.get("prototypes") == "graph")}
    assert len(first_stage) == looks.get(method, 0)
    assert result["task"] == task
    x, y, units = raw_test_set(task, tmp_path)
    model, found = load(folder)
    answers = predict.predict(model, found, x, batch_size=7)
    assert answers.dtype == np.float32 and answers.shape == (len(x), *found.output)
    assert score(found, units(answers), units(y)) == pytest.approx(result["test"], rel=1e-4, abs=1e-6)


def raw_test_set(task, folder):
    """The test samples of a run as they came, x and y, and what changes fields to the units in which they are compared."""
    same = lambda field: field
    if task == "openml1510":
        x, y = load_breast_cancer(return_X_y=True)
        test = train_test_split(np.arange(len(y)), test_size=0.1, random_state=0, stratify=y)[1]
        return x[test], y[test], same
    if toy := data.TASKS[task].toy:
        whole = lambda part: part if isinstance(part, np.ndarray) else part.read(np.arange(len(part)))
        x, y = map(whole, toy(data.TOY_TEST, seed=1))
        return x, y, same
    of = lambda part, name: np.load(next(folder.glob(f"cache/{task}-{part}-*-{name}.npy")))
    x, y, train = of("test", "x")[:, None], of("test", "y"), of("train", "x")
    if task == "navier_stokes1d":
        return x, y[:, None], lambda field: (field - train.mean(0)) / (train.std(0, ddof=1) + 1e-5)
    return x, y if y.ndim == 3 else y[:, None], same


@pytest.mark.parametrize("task, method", USUAL.items())
def test_each_task_with_one_method(task, method, tmp_path, monkeypatch):
    run(method, task, tmp_path, monkeypatch)


@pytest.mark.matrix
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("method", METHODS)
def test_each_task_with_each_method(method, task, tmp_path, monkeypatch):
    if method == "lsg" and data.find_task(task).target == "field":
        with pytest.raises(cli.UserError, match=f"{task} predicts a field"):
            run(method, task, tmp_path, monkeypatch)
        return
    run(method, task, tmp_path, monkeypatch)
