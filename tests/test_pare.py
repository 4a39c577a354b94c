"""PaRe's own maths, against plain Python, brute force and finite differences, and PaRe end to end."""

import itertools
import json

import numpy as np
import pytest
import torch
from helpers import SHORT, here, result, rows, weights
from safetensors.torch import load_file

import cli
import common
import data
import pare
import run

# ---- replacing patches


def scores(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def replace_one_by_one(tokens_t, tokens_s, scores_t, scores_s, k):
    """The rule of the text for one sample, in words: lists and loops."""
    by_score_t = sorted(range(len(scores_t)), key=lambda i: scores_t[i])
    by_score_s = sorted(range(len(scores_s)), key=lambda i: scores_s[i])
    places, chosen = sorted(by_score_t[:k]), sorted(by_score_s[len(scores_s) - k :])
    mixed = [token.clone() for token in tokens_t]
    for place, i in zip(places, chosen, strict=True):
        mixed[place] = tokens_s[i]
    return torch.stack(mixed)


@pytest.mark.parametrize("N, N_s, k", [(9, 9, 4), (9, 9, 1), (9, 9, 9), (12, 5, 5), (5, 12, 3), (64, 64, 41)])
def test_replacement_equals_a_plain_loop(N, N_s, k):
    B, D = 3, 4
    tokens_t, tokens_s = torch.randn(B, N, D), torch.randn(B, N_s, D)
    scores_t, scores_s = scores(B, N, seed=1), scores(B, N_s, seed=2)
    mixed = pare.replace_patches(tokens_t, tokens_s, scores_t, scores_s, k)
    expected = [replace_one_by_one(*sample, k) for sample in zip(tokens_t, tokens_s, scores_t, scores_s, strict=True)]
    assert torch.equal(mixed, torch.stack(expected))


def test_ties_still_replace_exactly_k():
    mixed = pare.replace_patches(
        torch.zeros(2, 10, 1), torch.ones(2, 10, 1), torch.full((2, 10), 0.5), torch.full((2, 10), 0.5), 4
    )
    assert mixed.sum((1, 2)).tolist() == [4, 4]


def test_k_0_returns_the_target_unchanged():
    tokens_t = torch.randn(2, 6, 3)
    assert torch.equal(pare.replace_patches(tokens_t, torch.randn(2, 6, 3), scores(2, 6), scores(2, 6), 0), tokens_t)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="3 target samples but 2 source"):
        pare.replace_patches(torch.randn(3, 6, 2), torch.randn(2, 6, 2), scores(3, 6), scores(2, 6), 1)
    with pytest.raises(ValueError, match="k = 5 does not fit 6 target and 4 source"):
        pare.replace_patches(torch.randn(2, 6, 2), torch.randn(2, 4, 2), scores(2, 6), scores(2, 4), 5)


def test_k_falls_linearly_and_never_rises():
    ks = [pare.schedule(epoch, 60, 2000) for epoch in range(60)]
    assert ks[0] == 2000 and ks[30] == 1000 and ks[-1] == 33
    assert all(a >= b for a, b in itertools.pairwise(ks))
    released = [pare.schedule(epoch, 60, 2000, 500) for epoch in range(60)]
    assert (released[0], released[-1]) == (2000, 525)  # as in the official runs


# ---- the relaxed choice


def test_top_k_mask_is_the_brute_force_choice():
    s = scores(5, 7)
    for k in range(8):
        best = max(itertools.combinations(range(7), k), key=lambda c: s[0, list(c)].sum())
        mask = pare.top_k_mask(s, k)
        assert mask[0].nonzero().flatten().tolist() == sorted(best)
        assert set(mask.unique().tolist()) <= {0.0, 1.0}
        assert mask.sum(1).tolist() == [k] * 5


def relaxed(s, k, temperature):
    """p = sigmoid(s / tau - t) with sum p = k, the threshold by scipy."""
    from scipy.optimize import brentq

    s = s / temperature
    t = brentq(lambda t: torch.sigmoid(s - t).sum().item() - k, -200, 200, xtol=1e-14)
    return torch.sigmoid(s - t)


@pytest.mark.parametrize("k", [1, 4, 8])
@pytest.mark.parametrize("temperature", [0.1, 0.9])
def test_gradient_of_the_mask_is_that_of_the_relaxed_choice(k, temperature):
    N, step = 9, 1e-5
    s = scores(1, N, seed=k).double().requires_grad_()
    weights = torch.randn(N, dtype=torch.double)
    (pare.top_k_mask(s, k, temperature) @ weights).sum().backward()
    for i in range(N):
        shift = torch.zeros(N, dtype=torch.double)
        shift[i] = step
        up, down = (relaxed(s.detach()[0] + sign * shift, k, temperature) @ weights for sign in (1, -1))
        assert abs(s.grad[0, i] - (up - down) / (2 * step)) < 1e-6


def test_gradient_survives_scores_as_far_apart_as_gumbel_noise_makes_them():
    s = (scores(4, 3136) + pare.gumbel(torch.empty(4, 3136))).requires_grad_()
    pare.top_k_mask(s, 2000).pow(2).sum().backward()
    assert torch.isfinite(s.grad).all() and s.grad.abs().sum() > 0
    assert s.grad.sum(1).abs().max() < 1e-3 * s.grad.abs().sum(1).min()  # shifting all scores changes nothing


# ---- the network


def tiny_net(seed=0):
    torch.manual_seed(seed)
    source = common.load_source("tiny-swin")
    model = common.Model(
        common.Embedder2d(3, source.token_width, source.size), source.encoder, common.ClassPredictor(source.feature_width, 5)
    )
    return pare.PaRe(model, pare.Gate(source.token_width), common.ClassPredictor(source.feature_width, 7)), source


def test_the_gate_learns_from_both_sides():
    net, source = tiny_net()
    x, tokens_s = torch.randn(2, 3, 32, 32), torch.randn(2, 64, source.token_width)
    for side in ("target", "source"):
        net.zero_grad()
        tokens_t = net.model.embedder(x).detach()
        scores_t, scores_s = net.gate(tokens_t), net.gate(tokens_s)
        scores_t, scores_s = (scores_t, scores_s.detach()) if side == "target" else (scores_t.detach(), scores_s)
        net.model.encoder(pare.replace_patches(tokens_t, tokens_s, scores_t, scores_s, 20)).pow(2).mean().backward()
        assert net.gate.linear.weight.grad.abs().sum() > 0, side


def test_forward_equals_separate_passes_and_the_released_second_phase_leaves_the_gate_alone():
    net, source = tiny_net()
    x, tokens_s = torch.randn(2, 3, 32, 32), torch.randn(2, 64, source.token_width)
    out, out_m, out_ms = net(x, tokens_s, 20)
    assert out.shape == out_m.shape == (2, 5) and out_ms.shape == (2, 7)
    assert torch.allclose(out, net.model(x), atol=1e-5)
    tokens_t = net.model.embedder(x)
    tokens_m = pare.replace_patches(tokens_t, tokens_s, net.gate(tokens_t), net.gate(tokens_s), 20)
    assert torch.allclose(out_ms, net.predictor_s(net.model.encoder(tokens_m)), atol=1e-5)
    assert net(x, tokens_s, 0)[1:] == (None, None)

    _, _, out_ms = net(x, tokens_s, 20, released_phase2=True)
    out_ms.sum().backward()
    assert net.gate.linear.weight.grad is None


def test_released_second_phase_replaces_the_highest_in_order_of_score():
    tokens_t, tokens_s = torch.zeros(1, 5, 1), torch.tensor([[[10.0], [20.0], [30.0], [40.0], [50.0]]])
    scores_t, scores_s = torch.tensor([[0.5, 0.9, 0.1, 0.7, 0.3]]), torch.tensor([[0.2, 0.8, 0.1, 0.9, 0.3]])
    # the two highest target tokens are 3 (0.7), 1 (0.9); the two highest source tokens 3 (40), 1 (20): lowest takes highest
    assert pare.replace_as_released(tokens_t, tokens_s, scores_t, scores_s, 2).flatten().tolist() == [0, 20, 0, 40, 0]
    assert torch.equal(
        pare.replace_as_released(tokens_t, tokens_s, scores_t, scores_s, 0), tokens_t
    )  # P9: the official code fails


# ---- end to end


def test_pare_learns_and_leaves_its_folder_behind(uninterrupted):
    said, folder = uninterrupted
    assert "TOY DATA" in said and "k from 41" in said
    names = {path.name for path in folder.iterdir()}
    pictures = {"curves.png", "predictions.png", "patches.png"}
    assert names == {"args.json", "metrics.jsonl", "last.pt", "best.safetensors", "result.json", *pictures}
    history, r = rows(folder), result(folder)
    assert history[-1]["loss"] < history[0]["loss"] and [row["k"] for row in history] == [41, 27, 13]
    assert [round(row["lambda"], 3) for row in history] == [1.0, round(27 / 41, 3), round(13 / 41, 3)]
    assert r["data"] == "toy" and r["source"] == "tiny_imagenet" and r["n_train"] == 64 and r["method"] == "pare"
    assert r["val"] == min(row["val"] for row in history) == history[r["best_epoch"] - 1]["val"]
    assert 0 <= r["test"] <= 1 and r["samples_per_second"] > 0 and r["direction"] == "min"
    args = json.loads((folder / "args.json").read_text())
    assert args["lr"] is not None and args["scale"] == "tiny"
    assert any(name.startswith("gate") for name in weights(folder))
    assert {name.split(".")[0] for name in load_file(folder / "best.safetensors")} == {"embedder", "encoder", "predictor"}


def test_the_released_schedule_and_its_second_phase():
    args = data.complete(pare.Args(scale="tiny", as_released=True), "pare", "tiny")
    k0, k_end = round(args.k_begin * 64), round(args.k_end * 64)
    assert args.ratio == "k/N" and [pare.schedule(epoch, 3, k0, k_end) for epoch in range(3)] == [
        41, int(41 - 31 / 3), int(41 - 31 * 2 / 3),
    ]  # 10 of 64 is the released 500 of 3136  # fmt: skip
    full = data.complete(pare.Args(scale="full"), "pare", "full")
    assert [pare.released_phase2_begins(full, modality) for modality in ("2d", "1d")] == [10, 5]
    assert pare.released_phase2_begins(args, "2d") == 40 * 10 // 60


def test_k_does_not_rise(tmp_path):
    with pytest.raises(cli.UserError, match="k must fall"):
        here("pare", *SHORT, "--k-begin", 0.1, "--k-end", 0.5, out=tmp_path)
    args = pare.Args(k_begin=0.9, k_end=0.5)
    assert pare.limits(args, 64, 64) == (58, 32) and pare.limits(args, 128, 100) == (100, 64)  # at most N_s
    assert pare.limits(pare.Args(k_begin=0.5, k_end=0.5), 512, 32) == (32, 32)  # constant, as it was asked for
    with pytest.raises(cli.UserError, match="k would stay at 32"):
        pare.limits(args, 512, 32)


@pytest.mark.parametrize(
    "source, output, same", [("voc", (128, 128), True), ("voc", (2, 8, 8), False), ("cifar10", (128, 128), False)]
)
@pytest.mark.parametrize("method", ["pare", "contrast"])
def test_fields_and_masks_share_one_predictor(tmp_path, monkeypatch, method, source, output, same):
    def stop(self, net):
        raise KeyboardInterrupt(net.predictor_s is net.model.predictor)

    monkeypatch.setattr(run.Run, "distribute", stop)
    cosmic = data.TASKS["cosmic"]
    toy = lambda n, seed: (cosmic.toy(n, seed=seed)[0], np.zeros((n, *output), np.float32))
    changed = data.replace(cosmic, output=output, toy=toy, loss=data.scores.relative_l2)
    monkeypatch.setitem(data.TASKS, "cosmic", changed)
    options = ["--task", "cosmic", "--scale", "tiny", "--n-train", 8, "--source", source]
    with pytest.raises(KeyboardInterrupt) as stopped:
        here(method, *options, *(["--contrast-epochs", 0] if method == "contrast" else []), out=tmp_path)
    assert stopped.value.args == (same,)
