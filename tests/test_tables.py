"""Tables of OpenML, as scikit-learn keeps them, and the copies that it carries."""

import math

import numpy as np
import pytest
import torch
from official import dev, full, write_openml

import cli


def test_a_table_with_categories_becomes_columns_in_sequence(tmp_path):
    columns = [
        ("age", None),
        ("colour", ["red", "blue"]),
        ("height", None),
        ("kind", ["a", "b", "c"]),
        ("class", ["no", "yes"]),
    ]
    rows = [[i, "red" if i % 3 else "blue", i * i if i % 10 else "?", "?" if i == 5 else "abc"[i % 3], "yes" if i % 2 else "no"]
            for i in range(40)]  # fmt: skip
    write_openml(tmp_path, 999, columns, rows)
    loaded = full("openml999", tmp_path)
    assert loaded.task.shape == (4, 4) and loaded.task.output == (2,)  # channels: three kinds and missing; columns: all
    assert (len(loaded.train) + len(loaded.val), len(loaded.test)) == (36, 4)
    test = loaded.test.inputs(torch.arange(4)).numpy()
    train = dev(loaded)[0]
    every = np.concatenate([train, test])
    # categories first (colour, kind), then numbers (age, height) in channel 0
    assert set(every[:, :2, 0].sum(1)) == {1.0} and (every[:, 2:, 0] == 0).all()
    assert (every[:, :, 1].sum(1) == 1).all() and every[:, 3, 1].sum() == 1  # the one missing kind
    assert (every[:, 1:, 2:] == 0).all()
    assert abs(train[:, 0, 2].mean()) < 1e-6 and train[:, 0, 2].std() == pytest.approx(1, abs=1e-6)  # training rows alone
    ages = np.sort(every[:, 0, 2])  # 0..39, scaled: equal steps, so training and test rows are scaled alike
    assert np.allclose(np.diff(ages), ages[1] - ages[0], atol=1e-5)
    assert loaded.test.y.sum() == 2  # by class


def test_numbers_alone_are_one_position_and_columns_with_gaps_are_left_out(tmp_path):
    columns = [("a", None), ("b", None), ("c", None), ("class", ["x", "y", "z"])]
    rows = [[i, "?" if i == 7 else 1, 3 * i, "xyz"[i % 3]] for i in range(60)]
    write_openml(tmp_path, 37, columns, rows)
    loaded = full("openml37", tmp_path)
    assert loaded.task.shape == (2, 1) and loaded.task.output == (3,) and loaded.train.kind == "official"
    x, _ = dev(loaded)
    assert np.allclose(x[:, 0], x[:, 1], atol=1e-6)  # proportional columns are the same, scaled
    out, y = torch.randn(5, 3), torch.tensor([0, 1, 2, 2, 2])
    assert torch.allclose(loaded.task.loss(out, y), torch.nn.functional.cross_entropy(out, y))  # equal classes weigh equally


def test_a_constant_column_is_not_scaled(tmp_path):
    """The standard deviation of 0.1, 0.1, ... is 1e-17 after rounding, not 0."""
    write_openml(tmp_path, 37, [("a", None), ("b", None), ("class", ["x", "y"])], [[0.1, i, "xy"[i % 2]] for i in range(60)])
    loaded = full("openml37", tmp_path)
    assert np.abs(dev(loaded)[0][:, 0]).max() < 1e-6
    prepared = loaded.task.prepare("new rows", np.array([[0.6, 3.0]]))
    assert prepared[0, 0, 0] == pytest.approx(0.5)


def test_rare_classes_weigh_more(tmp_path):
    write_openml(tmp_path, 37, [("a", None), ("class", ["x", "y"])], [[i, "x" if i % 4 else "y"] for i in range(80)])
    task = full("openml37", tmp_path).task
    out, y = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]]), torch.tensor([0, 1, 1])
    minus_log = [math.log(1 + math.exp(-1)), math.log(1 + math.exp(-2)), math.log(2)]
    expected = (2 / 3 * minus_log[0] + 2 * minus_log[1] + 2 * minus_log[2]) / 3  # weights 1 / 2 / share, of mean 1
    assert float(task.loss(out, y)) == pytest.approx(expected, rel=1e-5)


COPIES = [(61, 4, 3, 150), (187, 13, 3, 178), (1510, 30, 2, 569), (28, 64, 10, 1797)]


@pytest.mark.parametrize(("number", "shape", "classes", "rows"), COPIES)
def test_tables_that_scikit_learn_carries(tmp_path, number, shape, classes, rows):
    loaded = full(f"openml{number}", tmp_path)
    assert loaded.task.shape == (shape, 1) and loaded.train.output == (classes,) and loaded.train.kind == "sklearn"
    assert sum(len(s) for s in (loaded.train, loaded.val, loaded.test)) == rows


def test_damaged_and_missing_tables_are_named(tmp_path):
    with pytest.raises(cli.Missing, match=r"openml999: no table 999 in .*\n`python data.py --prepare openml999"):
        full("openml999", tmp_path)
    root = write_openml(tmp_path, 999, [("a", None), ("class", ["x", "y"])], [[i, "x" if i else "y"] for i in range(30)])
    with pytest.raises(cli.UserError, match="2 classes, the rarest with 1: too few"):
        full("openml999", tmp_path)
    path = root / "data/v1/download/7/t.arff.gz"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(cli.UserError, match="not a readable table 999"):
        full("openml999", tmp_path)
