"""The pictures of a run."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import DRAWN, here
from PIL import Image

import data
import plots
from tasks import scores

RNG = np.random.default_rng(0)


def pixels(content):
    with Image.open(io.BytesIO(content)) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def test_curves_have_a_panel_for_each_number():
    stage1 = [{"epoch": e, "distance": 1 / e, "seconds": 1.0} for e in (1, 2, 3)]
    history = [{"epoch": e, "loss": 2 / e, "val": 1 / e, "lr": 0.1, "k": 3 - e, "seconds": 1.0} for e in (1, 2, 3)]
    result = {"metric": "error", "test": 0.3, "test_last": 0.4, "best_epoch": 3}
    drawn = pixels(DRAWN["curves"]("a run", stage1, history, result))
    assert drawn.shape[0] > 200 and drawn.shape[1] > 1300 and (drawn.mean(2) < 128).mean() > 0.005


def test_the_confusion_matrix_has_true_classes_in_rows():
    y = np.repeat([0, 1, 2], 10)
    shares = plots.shares(np.eye(3)[[0] * 10 + [1] * 5 + [0] * 5 + [2] * 10], y)
    assert np.allclose(shares, [[1, 0, 0], [0.5, 0.5, 0], [0, 0, 1]])
    assert np.allclose(plots.shares(np.eye(3)[[0]], np.array([0])), [[1, 0, 0], [0, 0, 0], [0, 0, 0]])  # two do not occur
    for names in (("a", "$5_or_$9", "c"), ("a", "b"), None, str):  # no formula; two do not fit
        task = SimpleNamespace(target="class", names=names)
        drawn = pixels(DRAWN["predictions"]("a run", task, None, np.eye(3)[y], y))
        assert (drawn.mean(2) < 80).mean() > 0.01  # the diagonal


@pytest.mark.parametrize("shape, out", [((3, 16, 16), (20, 20)), ((1, 16, 16), (2, 16, 16)), ((2, 40), (1, 20))], ids=str)
def test_fields_show_their_errors(shape, out):
    x, y = RNG.normal(size=(1, *shape)), RNG.normal(size=(1, *out))
    task = SimpleNamespace(target="field", restore=None, normalised=False)
    right, wrong = (pixels(DRAWN["predictions"]("a run", task, x, y + shift, y)) for shift in (0, RNG.normal(size=y.shape)))
    assert right.shape == wrong.shape and (right != wrong).any()
    if len(shape) == 3:  # no error is white: less colour in the last column
        last = slice(3 * right.shape[1] // 4, None)
        colour = lambda picture: np.ptp(picture[:, last], axis=2).mean()
        assert colour(right) < colour(wrong) / 2
    unknown = y.copy()
    unknown.reshape(1, -1)[:, :4] = np.nan  # pixels that do not count
    assert pixels(DRAWN["predictions"]("a run", task, x, y, unknown)).std() > 5


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 64)], ids=["2D", "1D"])
def test_the_lowest_scored_patches_are_coloured(shape):
    x, scores = np.zeros((3, *shape)), np.tile(np.arange(16.0), (3, 1))
    drawn = pixels(DRAWN["replaced"]("a run", x, scores, {1: 16, 2: 8, 3: 0}))
    red = (drawn[:, :, 0] > drawn[:, :, 1] + 40).reshape(len(drawn), -1)
    thirds = [part.mean() for part in np.array_split(red, 3, axis=1)]
    assert thirds[0] > 1.7 * thirds[1] > 0.2 and thirds[2] < 0.02


def test_a_run_leaves_its_pictures(tmp_path, monkeypatch):
    for name, function in DRAWN.items():
        monkeypatch.setattr(plots, name, function)
    monkeypatch.setattr(data, "TOY_TEST", 20)
    few = ["--scale", "tiny", "--n-train", 16, "--batch-size", 8, "--epochs", 1]
    here("contrast", "--task", "satellite", *few, "--contrast-epochs", 0, out=tmp_path)
    here("finetune", "--task", "deepsea", *few, out=tmp_path)
    (contrast,), (finetune,) = (tmp_path.glob(f"{task}-*-s0-toy") for task in ("satellite", "deepsea"))
    assert {path.name for path in contrast.glob("*.png")} == {"curves.png", "predictions.png", "patches.png"}
    assert {path.name for path in finetune.glob("*.png")} == {"curves.png"}  # of labels there is none
    assert all(pixels(path.read_bytes()).std() > 5 for path in contrast.glob("*.png"))


def test_toy_classes_are_called_what_they_are(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(plots, "predictions", DRAWN["predictions"])
    monkeypatch.setattr(plots, "confusion", lambda title, out, y, names: called.append(names) or b"a picture")
    few = ["--scale", "tiny", "--n-train", 16, "--batch-size", 8, "--epochs", 1]
    here("finetune", "--task", "ecg", *few, out=tmp_path)
    assert called == [data.TASKS["ecg"].toy_names] != [data.TASKS["ecg"].names]


@pytest.mark.parametrize("task, error", [("darcy", scores.relative_l2), ("navier_stokes1d", scores.nrmse)])
def test_fields_and_predictions_are_drawn_in_one_unit(task, error, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "predictions", DRAWN["predictions"])
    monkeypatch.setattr(plots, "fields", lambda title, x, out, y: drawn.extend((out, y)) or b"a picture")
    few = ["--scale", "tiny", "--n-train", 16, "--batch-size", 8, "--epochs", 1]
    found = here("finetune", "--task", task, *few, out=tmp_path)
    out, y = (torch.from_numpy(part) for part in drawn)
    assert error(out, y).item() == pytest.approx(found["test"], rel=1e-4)
