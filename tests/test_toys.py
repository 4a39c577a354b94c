"""Toys have the shape of their task, can be learnt, and do not give their class away."""

import math

import numpy as np
import pytest
import torch
from official import RNG

import data
from tasks import toys

TASKS = [pytest.param(name, marks=pytest.mark.matrix if name == "psicov" else ()) for name in (*data.TASKS, "openml31")]


@pytest.mark.parametrize("name", TASKS)
def test_toys_and_simulations_look_like_their_task(name, tmp_path, capsys, monkeypatch):
    n = 9 if name in ("psicov", "deepsea", "fsd50k") else 40  # large samples
    monkeypatch.setattr(data, "TOY_TEST", 16)
    loaded = data.load(name, tmp_path, tmp_path, "tiny", n_train=n)
    kind, said = ("simulated", "SIMULATED") if loaded.task.simulate else ("toy", "TOY DATA")
    assert loaded.train.kind == kind and said in capsys.readouterr().out
    task, train = loaded.task, loaded.train
    x, y = next(train.batches(1, 8, 0, 0))
    assert x.shape == (8, *task.shape) and x.isfinite().all() and x.dtype == torch.float32
    if task.target == "class":
        assert y.shape == (8,) and y.dtype == torch.int64 and 2 <= train.classes <= max(9, task.output[0])
    else:
        assert y.shape == (8, *train.output) and y.dtype == torch.float32
    out = torch.zeros(8, *train.output, requires_grad=True)
    task.loss(out, y).backward()
    assert out.grad.isfinite().all() and out.grad.abs().sum() > 0
    index = torch.arange(min(16, len(loaded.test)))
    assert math.isfinite(
        task.score(RNG.normal(size=(len(index), *train.output)).astype("f"), loaded.test.targets(index).numpy())
    )
    again = data.load(name, tmp_path, tmp_path, "tiny", n_train=n)
    assert torch.equal(next(again.train.batches(1, 8, 0, 0))[0], x)


def test_toy_signals_and_fields_can_be_learnt():
    from sklearn.linear_model import LogisticRegression, Ridge

    x, y = toys.signals(1200, 0, (1, 46), 6)
    spectrum = abs(np.fft.rfft(x[:, 0]))
    assert LogisticRegression(max_iter=300).fit(spectrum[:1000], y[:1000]).score(spectrum[1000:], y[1000:]) > 0.8
    x, y = (part[:, 0, ::8] for part in toys.fields(400, 0, (1, 256), (1, 256)))
    assert Ridge(1e-3).fit(x[:300], y[:300]).score(x[300:], y[300:]) > 0.95  # a linear map takes one to the other
    x, y = toys.table(900, 0)
    assert LogisticRegression().fit(x[:600, 0], y[:600]).score(x[600:, 0], y[600:]) > 0.8
    pieces, y, classes = toys.text(50, 0)
    assert classes == 4 and all(len(piece) == 32 for piece in pieces)


def test_colours_do_not_tell_the_class_of_a_toy():
    from sklearn.linear_model import LogisticRegression

    x, y = toys.images(3000, 0, 32)
    assert x.shape == (3000, 3, 32, 32) and sorted(set(y)) == list(range(9))
    features = np.concatenate(
        [x.mean((2, 3)), x.std((2, 3)), np.quantile(x, [0.1, 0.5, 0.9], axis=(2, 3)).transpose(1, 2, 0).reshape(3000, -1)], 1
    )
    features = (features - features.mean(0)) / features.std(0)
    right = LogisticRegression(max_iter=500).fit(features[:2000], y[:2000]).score(features[2000:], y[2000:])
    assert right < 1 / 3  # what knowing the texture alone would give; a guess has 1 / 9


def test_toys_are_the_same_every_time():
    assert np.array_equal(toys.spherical(5, 1, 60)[0], toys.spherical(5, 1, 60)[0])
    assert not np.array_equal(toys.images(5, 1, 32)[0], toys.images(5, 2, 32)[0])
