"""Losses and metrics, by hand."""

import math

import numpy as np
import pytest
import torch
from official import RNG

import cli
import data
from tasks import scores

# ---- losses


def test_field_losses_by_hand():
    y, out = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[3.0, 5.0], [4.0, 2.0]])
    assert float(scores.rmse(out, y)) == pytest.approx((math.sqrt(1 / 2) + math.sqrt(16 / 2)) / 2)
    assert float(scores.nrmse(out, y)) == pytest.approx((1 / 5 + 4 / 2) / 2)
    assert float(scores.relative_l2(out, y)) == pytest.approx((1 / 5 + 4 / 2) / 2)
    shifted = scores.relative_l2((out - 1) / 2, y, mean=np.ones(2, np.float32), std=2 * np.ones(2, np.float32))
    assert float(shifted) == pytest.approx((1 / 5 + 4 / 2) / 2)
    assert float(scores.squared(out, y)) == pytest.approx((0 + 1 + 16 + 0) / 4)
    assert data.TASKS["burgers1d"].score(out.numpy(), y.numpy()) == pytest.approx(1.1)  # trained on RMSE, scored by nRMSE


@pytest.mark.parametrize("loss", [scores.rmse, scores.nrmse, scores.relative_l2])
def test_a_sample_that_is_predicted_exactly_has_no_gradient(loss):
    out = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    loss(out, torch.tensor([[1.0, 2.0], [0.0, 4.0]])).backward()
    assert out.grad[0].tolist() == [0, 0] and out.grad[1, 0] > 0 and out.grad.isfinite().all()


@pytest.mark.parametrize("loss", [scores.nrmse, scores.relative_l2])
def test_an_error_relative_to_a_target_of_zeros_is_not_finite(loss):
    """A large number instead would not be noticed."""
    assert not loss(torch.ones(2, 3), torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 3.0]])).isfinite()


def test_the_loss_of_a_batch_is_the_mean_of_its_micro_batches():
    """Gradient accumulation and several processes average; a denominator that depends on the samples would change the loss."""
    generator = torch.Generator().manual_seed(0)
    out, y = torch.randn(8, 3, generator=generator), torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
    mask = torch.rand(8, 4, 4, generator=generator).round()
    mask[:3] = float("nan")
    mask[0, 0, 0] = 1
    cases = [
        (lambda o, t: scores.cross_entropy(o, t, (3.0, 1.0, 0.3)), out, y),
        (scores.mask_loss, torch.randn(8, 4, 4, generator=generator), mask),
        (lambda o, t: scores.presence(o, t, 10.0), out, torch.nn.functional.one_hot(y).float()),
        (scores.rmse, out, out.roll(1, 0)),
    ]
    for loss, o, t in cases:
        parts = torch.stack([loss(o[i : i + 2], t[i : i + 2]) for i in range(0, 8, 2)])
        assert float(parts.mean()) == pytest.approx(float(loss(o, t)), rel=1e-5)
    weighted = sum(w * -torch.log_softmax(out[i], 0)[k] for i, (k, w) in enumerate((int(k), (3.0, 1.0, 0.3)[k]) for k in y)) / 8
    assert float(scores.cross_entropy(out, y, (3.0, 1.0, 0.3))) == pytest.approx(float(weighted))


def test_binary_losses_by_hand():
    out, y = torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 0.0]])
    expected = (10 * math.log(2) + math.log(1 + math.exp(2))) / 2
    assert float(data.TASKS["fsd50k"].loss(out, y)) == pytest.approx(expected)
    with_clip = torch.tensor([[1.0, 0.0, 7.0]])  # the number of the clip is no label
    assert float(data.TASKS["fsd50k"].loss(out, with_clip)) == pytest.approx(expected)
    out, y = torch.tensor([[[0.0, 1.0], [5.0, -1.0]]]), torch.tensor([[[1.0, 0.0], [float("nan"), 1.0]]])
    expected = (math.log(2) + math.log(1 + math.e) + math.log(1 + math.e)) / 4  # of all pixels: how many count is no matter
    assert float(scores.mask_loss(out, y)) == pytest.approx(expected)
    out.requires_grad_()
    scores.mask_loss(out, y).backward()
    assert out.grad.isfinite().all() and out.grad[0, 1, 0] == 0


# ---- metrics


def test_error_is_the_share_of_wrong_answers():
    out = np.array([[2.0, 1.0], [0.0, 1.0], [3.0, 4.0], [1.0, 0.0]])
    assert data.TASKS["spherical"].score(out, np.array([0, 0, 1, 0])) == 0.25


def one_hot(answers, classes):
    return np.eye(classes)[answers].astype(np.float32)


def test_macro_f1_counts_the_classes_that_occur():
    y, out = np.array([0, 0, 1, 3]), one_hot([0, 1, 1, 0], 5)
    # class 0: TP 1, FP 1, FN 1; class 1: TP 1, FP 1, FN 0; class 3: TP 0; classes 2 and 4 do not occur
    assert scores.macro_f1_error(out, y) == pytest.approx(1 - (2 / 4 + 2 / 3 + 0) / 3)


def area(scores, y):
    """Share of the pairs (present, absent) in the right order, half for ties."""
    pairs = [(p > q) + (p == q) / 2 for p in scores[y == 1] for q in scores[y == 0]]
    return sum(pairs) / len(pairs)


def test_auroc_is_the_share_of_pairs_in_order():
    out, y = RNG.normal(size=(12, 2)), np.array([0, 1] * 6)
    assert scores.auroc_error(out, y) == pytest.approx(1 - area(out[:, 1] - out[:, 0], y))
    out, y = RNG.normal(size=(30, 4)), np.arange(30) % 3  # the fourth class does not occur
    p = np.exp(out) / np.exp(out).sum(1, keepdims=True)
    areas = []
    for a, b in ((0, 1), (0, 2), (1, 2)):
        pair = (y == a) | (y == b)
        areas += [area(p[pair, a], (y[pair] == a) * 1), area(p[pair, b], (y[pair] == b) * 1)]
    assert scores.auroc_error(out, y) == pytest.approx(1 - np.mean(areas))
    assert scores.auroc_error(out, np.zeros(30, int)) == 0.5
    assert scores.auroc_error(np.float32([[0, 40], [0, 50], [0, 60]]), np.array([0, 0, 1])) == 0  # their softmax is 1
    out, y = RNG.normal(size=(20, 3)), RNG.integers(0, 2, (20, 3))
    y[:, 2] = 1  # always there: left out
    assert scores.label_auroc_error(out, y) == pytest.approx(1 - (area(out[:, 0], y[:, 0]) + area(out[:, 1], y[:, 1])) / 2)


def precision(scores, y):
    """Mean over the present ones of the precision down to their rank."""
    order = np.argsort(-scores)
    return np.mean([y[order[: r + 1]].mean() for r in range(len(y)) if y[order[r]]])


def test_map_averages_the_chunks_of_a_clip_first():
    out, y = RNG.normal(size=(9, 3)), RNG.integers(0, 2, (9, 3)).astype(float)
    y[0] = 1
    assert scores.clip_map_error(out, y) == pytest.approx(1 - np.mean([precision(out[:, k], y[:, k]) for k in range(3)]))
    chunks = np.array([2, 0, 2, 1, 1, 2, 3])
    of_clip = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 0]], float)
    out = RNG.normal(size=(7, 3))
    mean = np.array([out[chunks == c].mean(0) for c in range(4)])
    expected = 1 - np.mean([precision(mean[:, k], of_clip[:, k]) for k in range(2)])  # nothing has the third label
    assert scores.clip_map_error(out, np.concatenate([of_clip[chunks], chunks[:, None]], 1)) == pytest.approx(expected)


def test_balanced_error_leaves_out_what_does_not_count():
    out = np.array([[[1.0, -1.0, 2.0, 3.0, -4.0, 5.0]]])
    y = np.array([[[1.0, 1.0, 0.0, 0.0, 0.0, np.nan]]])
    assert scores.balanced_error(out, y) == pytest.approx(1 - (1 / 2 + 1 / 3) / 2)
    assert scores.balanced_error(out, np.ones_like(y)) == pytest.approx(1 - (4 / 6 + 1) / 2)  # no background: nothing is missed
    assert scores.balanced_error(out, np.zeros_like(y)) == pytest.approx(1 - (1 + 2 / 6) / 2)


def test_protein_error_by_hand():
    y = np.full((2, 40, 40), 16.0, np.float32)
    y[0, 3, 30], y[0, 5, 29], y[0, 30, 3] = 6.0, 8.0, 6.0
    y[0, 5, 28], y[0, 6, 39] = 2.0, 8.1  # 23 apart; too far away
    out = np.full((2, 40, 40), 7.0, np.float32)
    out[0, 3, 30], out[0, 30, 3], out[0, 5, 29], out[0, 29, 5] = 4.0, 10.0, -9.0, 1.0
    # |6 - (4 + 10) / 2| = 1, |8 - 0.01| = 7.99; the second protein has no such pair
    assert scores.protein_mae(out, y) == pytest.approx((1 + 7.99) / 2, rel=1e-5)
    with pytest.raises(cli.UserError, match="nothing to score"):
        scores.protein_mae(out[1:], y[1:])
