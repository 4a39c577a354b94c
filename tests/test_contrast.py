"""The slides' proposal: noise, the contrastive loss and the printed one, attention scores, both stages."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import test_wiring as wiring
import torch
import torch.nn.functional as F
from helpers import SHORT, here, rows, weights
from safetensors.torch import load_file
from test_backbones_messy import save_swin
from test_wiring import backbone  # noqa: F401 (a fixture)
from timm.models.swin_transformer import window_partition

import cli
import common
import contrast
import data
import pare

K, n = 10, 8  # classes, samples of each
Y = torch.arange(K).repeat_interleave(n)


# ---- line 1: noise


def test_no_noise_returns_the_samples_and_full_noise_forgets_them():
    x = torch.randn(5000, 3, 7) * 4 + 1
    assert torch.equal(contrast.views(x, torch.tensor([0.0]), 2, 0.3, 0.7), x)
    torch.manual_seed(0)
    noise = contrast.views(x, torch.tensor([1.0]), 2, 1.0, 4.0)
    torch.manual_seed(0)
    assert torch.equal(noise, contrast.views(x + 5, torch.tensor([1.0]), 2, 1.0, 4.0))
    assert noise.mean() == pytest.approx(1, abs=0.1) and noise.std() == pytest.approx(4, rel=0.02)


def test_one_draw_has_mean_and_variance_of_a_chain_of_steps():
    x, sigma = torch.tensor([-1.0, 0.0, 2.0]).repeat(120_000, 1), 0.5
    torch.manual_seed(0)
    draw = contrast.views(x, torch.tensor([sigma]), 3)
    torch.manual_seed(0)
    _, t = torch.randint(1, (len(x), 1)), torch.randint(1, 4, (len(x), 1))[:, 0]  # as drawn: sigma, then t
    chain = x
    for steps in (1, 2, 3):
        chain = math.sqrt(1 - sigma**2) * chain + sigma * torch.randn_like(x)
        seen, a2t = draw[t == steps], (1 - sigma**2) ** steps
        assert torch.allclose(seen.mean(0), chain.mean(0), atol=0.02) and torch.allclose(seen.std(0), chain.std(0), atol=0.02)
        assert torch.allclose(seen.mean(0), a2t**0.5 * x[0], atol=0.02)
        assert seen.std(0).mean() == pytest.approx(math.sqrt(1 - a2t), abs=0.01)


def test_views_keep_mean_and_variance_of_a_channel_and_draw_all_scales():
    torch.manual_seed(0)
    mean, std = torch.tensor([3.0, -2.0])[:, None], torch.tensor([0.1, 5.0])[:, None]  # (C, 1)
    x = mean + std * torch.randn(4000, 2, 6)
    seen = contrast.views(x, torch.tensor([0.1, 0.9]), 2, mean, std)
    for c in range(2):
        assert seen[:, c].mean() == pytest.approx(mean[c].item(), abs=0.05 * std[c].item())
        assert seen[:, c].std() == pytest.approx(std[c].item(), rel=0.02)
    # correlations a^t with the samples: of sigma 0.1 and 0.9, t = 1 and 2
    unit = lambda a: F.normalize(((a - mean) / std).flatten(1), dim=1)
    correlations = (unit(x) * unit(seen)).sum(1)
    expected = sum(math.sqrt(1 - sigma**2) ** t for sigma in (0.1, 0.9) for t in (1, 2)) / 4
    assert correlations.mean() == pytest.approx(expected, abs=0.03)
    torch.manual_seed(1)
    once = contrast.views(x, torch.tensor([0.1, 0.9]), 2)
    torch.manual_seed(1)
    assert torch.equal(once, contrast.views(x, torch.tensor([0.1, 0.9]), 2))


# ---- line 3: the loss


def simplex():
    """K directions with cosines -1 / (K - 1), each n times."""
    return (torch.eye(K) - 1 / K).repeat_interleave(n, 0)


@pytest.mark.parametrize("tau", [0.1, 0.5])
def test_the_loss_has_its_values_at_collapse_clusters_simplex_and_own_axes(tau):
    loss = lambda z, weights=None: contrast.contrastive_loss(z, Y, weights, tau).item()
    orthogonal, own = torch.eye(K).repeat_interleave(n, 0), torch.eye(n * K)
    assert loss(torch.ones(n * K, 3)) == pytest.approx(math.log(n * K - 1), abs=1e-5) == pytest.approx(4.3694, abs=1e-4)
    assert loss(own) == pytest.approx(math.log(n * K - 1), abs=1e-5)
    clusters = math.log(n - 1 + n * (K - 1) * math.exp(-1 / tau))
    ideal = math.log(n - 1 + n * (K - 1) * math.exp(-(1 + 1 / (K - 1)) / tau))
    assert loss(orthogonal) == pytest.approx(clusters, abs=1e-5) and loss(simplex()) == pytest.approx(ideal, abs=1e-5)
    assert clusters == pytest.approx({0.1: 1.9464, 0.5: 2.8180}[tau], abs=1e-4)
    assert ideal == pytest.approx({0.1: 1.9461, 0.5: 2.6948}[tau], abs=1e-4)
    assert loss(simplex()) < loss(orthogonal) < loss(own)
    heavy = torch.full((n * K, n * K), 3.0)
    assert loss(torch.ones(n * K, 3), heavy) == pytest.approx(math.log(n - 1 + 3 * n * (K - 1)), abs=1e-5)


@pytest.fixture
def batch():
    torch.manual_seed(0)
    z, y = torch.randn(9, 4, dtype=torch.float64), torch.tensor([0, 0, 1, 1, 1, 2, 3, 2, 0])
    return z, y, torch.rand(9, 9, dtype=torch.float64) + 0.2


def test_the_loss_is_its_formula(batch):
    z, y, lam = batch
    total = []
    for i in range(len(z)):
        cosine = [float(z[i] @ z[j] / (z[i].norm() * z[j].norm())) / 0.3 for j in range(len(z))]
        P = [j for j in range(len(z)) if j != i and y[j] == y[i]]
        N = [j for j in range(len(z)) if y[j] != y[i]]
        if P:
            whole = sum(math.exp(cosine[q]) for q in P) + sum(lam[i, q].item() * math.exp(cosine[q]) for q in N)
            total.append(sum(-cosine[p] + math.log(whole) for p in P) / len(P))
    assert len(total) == 8  # one sample is alone in its class
    assert contrast.contrastive_loss(z, y, lam, 0.3).item() == pytest.approx(np.mean(total), abs=1e-9)
    assert contrast.contrastive_loss(z, y, torch.ones_like(lam), 0.3) == contrast.contrastive_loss(z, y, None, 0.3)
    heavier = lam.clone()
    heavier[0, 3] *= 2
    assert contrast.contrastive_loss(z, y, heavier, 0.3) > contrast.contrastive_loss(z, y, lam, 0.3)


def test_the_loss_has_the_gradient_and_the_symmetries_of_its_formula(batch):
    z, y, lam = batch
    loss = lambda z, y=y, lam=lam: contrast.contrastive_loss(z, y, lam, 0.3)
    assert torch.autograd.gradcheck(loss, z.clone().requires_grad_())
    order, turn = torch.randperm(9), torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    permuted, longer = loss(z[order], y[order], lam[order][:, order]), loss(z * z.norm(dim=1)[:, None])
    for other in (permuted, longer, loss(5 * z), loss(z @ turn), loss(z, 7 - y)):
        assert other.item() == pytest.approx(loss(z).item(), abs=1e-9)
    (slope,) = torch.autograd.grad(loss(z.requires_grad_()), z)
    assert slope.abs().max() > 0.01 and ((slope * z).sum(1).abs() < 1e-9).all()


@pytest.mark.parametrize(
    "z, y",
    [
        (torch.ones(4, 3), [0] * 4),
        (torch.randn(4, 3), [0, 1, 2, 3]),
        (torch.randn(1, 3), [0]),
        (torch.zeros(4, 3), [0, 0, 1, 1]),
    ],
    ids=["one class", "no positives", "one sample", "zeros"],
)
def test_the_loss_is_finite_for_degenerate_batches(z, y):
    z = z.clone().requires_grad_()
    loss = contrast.contrastive_loss(z, torch.tensor(y))
    loss.backward()
    assert loss.isfinite() and z.grad.isfinite().all() and (len(set(y)) < len(y) or loss == 0)


def test_label_weights_follow_the_correlation_of_the_targets():
    torch.manual_seed(0)
    targets, y = torch.randn(7, 5, 2), torch.tensor([0, 0, 1, 1, 2, 2, 2])
    found, rho = contrast.label_weights(targets, y), np.corrcoef(targets.flatten(1).numpy())
    for i in range(7):
        r = np.array([1 / (max(rho[i, j], 0) + 0.1) for j in range(7)])
        others = [r[j] for j in range(7) if y[j] != y[i]]
        assert torch.allclose(found[i], torch.tensor(r / np.mean(others)).float(), rtol=1e-4)
        assert found[i][y != y[i]].mean() == pytest.approx(1)
        assert found[i].max() / found[i].min() < 11.01
    assert torch.allclose(contrast.label_weights(F.one_hot(Y), Y)[Y[:, None] != Y], torch.ones(()))  # classes: plain SupCon
    assert torch.allclose(contrast.correlation(targets), torch.from_numpy(rho).float(), atol=1e-5)
    labels = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 1]])  # the second is more like the first than the third is
    several = contrast.label_weights(labels, torch.arange(3))
    assert several[0, 2] > several[0, 1] and (several[0, 1] + several[0, 2]) / 2 == pytest.approx(1)
    constant = torch.cat([targets, torch.full((1, 5, 2), 3.0), torch.full((1, 5, 2), torch.nan)])
    assert (contrast.correlation(constant)[-2:] == 0).all()
    assert contrast.label_weights(constant, torch.zeros(9).long()).isfinite().all()  # no negatives at all


# ---- the printed formula and its four faults


def printed(z):
    return contrast.printed_loss(z, Y, torch.full((n * K, n * K), 1 - contrast.EPS))  # lambda = 1


def test_the_printed_loss_is_its_formula(batch):
    z, y, rho = batch
    unit, losses = F.normalize(z, dim=1) + 0.5, []  # a common mean: the logarithms are defined
    cosine = F.normalize(unit, dim=1) @ F.normalize(unit, dim=1).T
    for c in range(4):
        inside = [(i, j) for i in range(9) for j in range(9) if y[i] == c]
        N = sum(cosine[i, j] for i, j in inside if y[j] == c)
        D = sum(cosine[i, j] * (1 if y[j] == c else 1 / (rho[i, j] + contrast.EPS)) for i, j in inside)
        losses.append(-math.log(N / D))
    assert contrast.printed_loss(unit, y, rho).item() == pytest.approx(np.mean(losses), abs=1e-9)


def test_fault_1_the_logarithm_is_undefined_for_centred_features():
    torch.manual_seed(0)
    z = torch.randn(n * K, 128)
    assert printed(z - z.mean(0)).isnan()
    assert printed(z + 5).isfinite()  # a common mean hides it


def test_fault_2_the_loss_falls_to_minus_infinity_at_the_simplex():
    torch.manual_seed(0)
    near = [printed(simplex() + shift).item() for shift in (0.1, 0.01, 0.001)]  # a common mean, from above
    assert near[0] > near[1] > near[2] and near[2] < -8
    assert not printed(simplex() + 1e-6 * torch.randn(n * K, K)).isfinite()


def test_fault_3_the_loss_does_not_see_the_spread_within_a_class():
    clusters, own = torch.eye(K).repeat_interleave(n, 0), torch.eye(n * K)
    assert printed(clusters).item() == pytest.approx(0, abs=1e-6) == printed(own).item()
    assert printed(torch.ones(n * K, 3)).item() == pytest.approx(math.log(K), abs=1e-5)
    assert contrast.contrastive_loss(clusters, Y) < contrast.contrastive_loss(own, Y) - 2


def test_fault_4_the_weights_of_classes_are_one_constant_that_may_be_negative():
    rho = contrast.correlation(F.one_hot(Y))[Y[:, None] != Y]
    assert torch.allclose(rho, torch.tensor(-1 / (K - 1))) and 1 / (rho[0] + contrast.EPS) < 0


# ---- line 5: attention scores


def by_hand(encoder, tokens, alpha):
    """Rollout with dense matrices, from the attention that the library's own eager path returns: (B, N, D) -> (B, N)"""
    encoder, maps = copy.deepcopy(encoder).eval(), []
    if isinstance(encoder, common.SwinEncoder):
        for block in encoder.blocks:
            block.attn.fused_attn = False
            block.attn.softmax.register_forward_hook(lambda module, args, out: maps.append(out.mean(1)))  # (B W, T, T)
        with torch.no_grad():
            encoder(tokens)
        dense = []
        for A, block in zip(maps, encoder.blocks, strict=True):
            H, W = block.input_resolution
            place = torch.roll(torch.arange(H * W).view(1, H, W, 1), [-s for s in block.shift_size], (1, 2))
            windows = window_partition(place, block.window_size).flatten(1)  # (W, T)
            whole = torch.zeros(len(tokens), H * W, H * W)
            for b in range(len(tokens)):
                for w, window in enumerate(windows):
                    whole[b][window[:, None], window] = A[b * len(windows) + w]
            dense.append(whole)
    else:
        encoder.layers.config._attn_implementation = "eager"
        for block in encoder.blocks:
            block.attention.self.register_forward_hook(lambda module, args, out: maps.append(out[1].mean(1)))
        with torch.no_grad():
            encoder(tokens)
        dense = maps
    r = torch.full(dense[-1].shape[:2], 1 / dense[-1].shape[1])
    for A in dense[::-1]:
        while r.shape[1] < A.shape[1]:
            side = math.isqrt(r.shape[1])
            r = torch.stack(
                [r.view(-1, side, side)[:, i // 2, j // 2] / 4 for i in range(2 * side) for j in range(2 * side)], 1
            )
        r = (1 - alpha) * r + alpha * torch.einsum("bi,bij->bj", r, A)
    return r, dense


@pytest.mark.parametrize("name", ["tiny-swin", "tiny-roberta"])
def test_attention_scores_are_those_of_the_librarys_eager_path(name):
    torch.manual_seed(0)
    source = common.load_source(name)
    x = torch.rand(2, 3, 32, 32) if name == "tiny-swin" else torch.randint(5, 900, (2, 20))
    tokens, encoder = source.embedder(x), source.encoder
    for alpha in (0.5, 0.9):
        expected, dense = by_hand(encoder, tokens, alpha)
        found = common.attention_rollout(encoder, tokens, alpha)
        assert torch.allclose(found, expected, atol=1e-6) and torch.allclose(found.sum(1), torch.ones(2)) and (found >= 0).all()
    for block in (0, 1):  # of the Swin, the second is shifted
        per_window = torch.stack([A.sum(0) for A in dense[block]]) / (16 if name == "tiny-swin" else 20)
        assert torch.allclose(common.received_attention(encoder, tokens, block), per_window, atol=1e-6)
    assert name == "tiny-roberta" or any(s > 0 for s in encoder.blocks[1].shift_size)
    if name == "tiny-swin":
        with pytest.raises(ValueError, match="16 tokens, not 64"):
            common.received_attention(encoder, tokens, 2)


@pytest.mark.parametrize("name", ["tiny-swin", "tiny-roberta"])
def test_uniform_attention_gives_uniform_scores(name):
    source = common.load_source(name)
    for key, parameter in source.encoder.named_parameters():
        if any(part in key for part in ("qkv", "relative_position", "query", "key")):
            torch.nn.init.zeros_(parameter)
    x = torch.rand(2, 3, 32, 32) if name == "tiny-swin" else torch.randint(5, 900, (2, 20))
    scores = common.attention_rollout(source.encoder, source.embedder(x))
    assert torch.allclose(scores, torch.full_like(scores, 1 / scores.shape[1]), atol=1e-6)


def test_scores_leave_the_model_as_it_was():
    source = common.load_source("tiny-swin")
    encoder = common.set_dropout(source.encoder, 0.5).train()
    tokens = source.embedder(torch.rand(2, 3, 32, 32)).requires_grad_()
    before, state = copy.deepcopy(encoder.state_dict()), torch.get_rng_state()
    scores = common.attention_rollout(encoder, tokens)
    assert not scores.requires_grad and encoder.training and torch.equal(state, torch.get_rng_state())
    assert all(module.training for module in encoder.modules())
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert not any(module._forward_pre_hooks for module in encoder.modules())
    with pytest.raises(RuntimeError):  # hooks are removed if the model fails
        encoder.attentions(tokens[:, :, :5])
    assert not any(module._forward_pre_hooks for module in encoder.modules())


def test_weights_cast_for_scores_do_not_take_part_in_training():
    """Under autocast, older torch keeps the bf16 copies that the scores used, which have no gradient."""
    source = common.load_source("tiny-swin")
    tokens = source.embedder(torch.rand(2, 3, 32, 32))
    with torch.autocast("cpu", torch.bfloat16):
        common.attention_rollout(source.encoder, tokens)
        out = source.encoder(tokens)
    out.float().square().sum().backward()
    assert all(parameter.grad is not None for parameter in source.encoder.parameters())


def test_a_backbone_without_attention_scores_is_refused_before_stage_1(tmp_path, monkeypatch):
    save_swin(tmp_path, "swinv2_tiny_window8_256", patch_size=2)
    monkeypatch.setattr(contrast, "learn_embedder", None)
    with pytest.raises(cli.UserError, match="not available for this backbone.\nUse --scores gate or random"):
        here("contrast", *SHORT, "--backbone", tmp_path, out=tmp_path / "runs")


def test_a_table_of_one_token_has_scores_that_do_not_vary(tmp_path, capsys):
    here("contrast", "--task", "openml1510", "--scale", "tiny", "--n-train", 32, "--epochs", 1, out=tmp_path)
    assert "scores vary by 0% of their mean (target)" in capsys.readouterr().out


def test_scores_follow_a_permutation_of_the_tokens():
    """Equivariance: without positions, permuting the tokens of a text permutes their scores."""
    encoder = common.load_source("tiny-roberta").encoder
    tokens, order = torch.randn(1, 12, 128), torch.randperm(12)
    for score in (common.attention_rollout, common.received_attention):
        assert torch.allclose(score(encoder, tokens[:, order]), score(encoder, tokens)[:, order], atol=1e-6)


# ---- both stages, end to end


STAGE_1 = ["--contrast-epochs", 2, "--contrast-samples", 12, "--tau", 0.4, "--sigmas", 0.3, 0.6, "--noise-steps", 3]
STAGE_2 = ["--clip", 1.6, "--init", "random", "--k-begin", 0.5, "--mix-weight", 0.3, "--embedder-lr", 0.01]


@pytest.fixture(scope="module")
def contrast_run(backbone, tmp_path_factory):  # noqa: F811
    before, stage1 = [], contrast.learn_embedder

    def learn(embedder, *rest):
        before.append(copy.deepcopy(embedder))
        return stage1(embedder, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contrast, "learn_embedder", learn)
        run = wiring.recorded("contrast", backbone, tmp_path_factory.mktemp("contrast"), *wiring.RATE, *STAGE_1, *STAGE_2)
    run.start = before[0]
    return run


def test_stage_1_takes_the_steps_of_the_sheet(contrast_run):
    seen = contrast_run
    torch.manual_seed(0)
    embedder, train = copy.deepcopy(seen.start), seen.train
    encoder = copy.deepcopy(seen.sources[0].encoder)
    encoder.load_state_dict({k: v for k, v in seen.pretrained.items() if k in encoder.state_dict()})
    encoder.eval()
    plans = seen.plans[id(train)]
    fixed = torch.randperm(31, generator=torch.Generator().manual_seed(cli.stream("measured", 0)))
    x = wiring.images(train, "cifar100", fixed)
    mean, std = x.mean((0, 2, 3))[:, None, None], x.transpose(0, 1).flatten(1).std(1)[:, None, None]
    velocity, parameters = {}, dict(embedder.named_parameters())
    args = replace(seen.args, lr=0.01)

    def loss_of(index):
        twice = index.repeat_interleave(2)
        x = wiring.images(train, "cifar100", twice)
        sigma = torch.tensor([0.3, 0.6])[torch.randint(2, (24, 1, 1, 1))]
        t = torch.randint(1, 4, (24, 1, 1, 1))
        a_t = (1 - sigma**2).sqrt() ** t
        x = mean + a_t * (x - mean) + (1 - a_t**2).sqrt() * std * torch.randn_like(x)
        z = wiring.encode(encoder, wiring.embed_target(embedder, x)).mean(1)
        return contrast.contrastive_loss(z, train.y[twice], None, 0.4)

    for epoch in range(2):
        order, _, state = plans[epoch]
        assert order.shape == (2, 12)
        torch.set_rng_state(state)
        for index in order:
            loss = loss_of(index)
            gradients = dict(zip(parameters, torch.autograd.grad(loss, parameters.values()), strict=True))
            wiring.sgd_by_hand(parameters, gradients, velocity, 0.01, args)
    wiring.same(embedder.state_dict(), seen.net.model.embedder.state_dict())
    moved = (embedder.project.weight - seen.start.project.weight).abs().max()
    assert moved > 1e-3
    lines = [row for row in rows(seen.folder) if row.get("stage")]
    z = wiring.encode(encoder, wiring.embed_target(embedder, wiring.images(train, "cifar100", fixed))).mean(1)
    torch.manual_seed(cli.stream("measured", 0))
    assert lines[-1]["contrast"] == pytest.approx(loss_of(fixed[:12]).item(), rel=1e-3)
    cosine, y = F.normalize(z, dim=1) @ F.normalize(z, dim=1).T, train.y[fixed]
    pairs = [(i, j) for i in range(31) for j in range(31) if i != j]
    for name, equal in (("cosine, equal labels", True), ("cosine, others", False)):
        expected = np.mean([cosine[i, j].item() for i, j in pairs if (y[i] == y[j]).item() == equal])
        assert lines[-1][name] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("option", [{}, {"label_weights": "none"}, {"as_printed": True}], ids=str)
def test_fields_are_weighted_by_the_correlation_of_their_targets(option):
    torch.manual_seed(0)
    like = replace(data.TASKS["advection1d"], shape=(1, 12), output=(1, 6))
    x, y = 1 + torch.rand(20, 1, 12), torch.arange(6) + torch.rand(20, 1, 6)  # targets that are alike: no weight is negative
    train, labels = data.Split(x.numpy(), y.numpy(), None, "toy", like, "cpu"), torch.arange(20) % 4
    args = contrast.Args(sigmas=(0.0,), contrast_epochs=1, contrast_samples=20, embedder_lr=0.1, optimizer="sgd", momentum=0.0,
                         weight_decay=0.0, lr=1.0, scale="tiny", **option)  # fmt: skip
    embedder = torch.nn.Linear(12, 5)
    start = copy.deepcopy(embedder)
    contrast.learn_embedder(embedder, embedder, train, labels, args)
    index = train.plan(1, 20, 0, 0, stage=1)[0][0].repeat_interleave(2)
    z, c = start(x[index, 0]), labels[index]
    rho = torch.from_numpy(np.corrcoef(y[index, 0].numpy())).float()
    loss = contrast.contrastive_loss(z, c, contrast.label_weights(y[index], c) if not option else None, 0.1)
    loss = contrast.printed_loss(z, c, rho) if "as_printed" in option else loss
    (slope,) = torch.autograd.grad(loss, start.weight)
    assert slope.abs().max() > 1e-3 and torch.allclose(embedder.weight, start.weight - 0.1 * slope, atol=1e-5)


def test_the_seconds_of_stage_1_are_those_of_training(monkeypatch):
    x, y = np.random.default_rng(0).normal(size=(8, 1, 12)).astype(np.float32), np.arange(8) % 2
    train, labels = data.Split(x, y, 2, "toy", data.TASKS["satellite"], "cpu"), torch.from_numpy(y)
    args = contrast.Args(contrast_epochs=2, contrast_samples=4, optimizer="sgd", momentum=0.0, weight_decay=0.0,
                         embedder_lr=0.1, lr=1.0, scale="tiny")  # fmt: skip
    embedder, clock = torch.nn.Linear(12, 5), [0]

    def timed(x):  # the measurements have no gradient
        clock[0] += 1 if torch.is_grad_enabled() else 100
        return embedder(x)

    monkeypatch.setattr(contrast.time, "perf_counter", lambda: clock[0])
    found = contrast.learn_embedder(embedder, timed, train, labels, args)
    assert [row["seconds"] for row in found] == [0, 2, 2]  # two steps an epoch


def test_each_process_measures_its_own_views():
    """Two processes take turns in the samples of `twice`: with the same noise, the two views of a sample would be one."""
    x, y = np.random.default_rng(0).normal(size=(8, 1, 12)).astype(np.float32), np.arange(8) % 2
    train, labels = data.Split(x, y, 2, "toy", data.TASKS["satellite"], "cpu"), torch.from_numpy(y)
    args = contrast.Args(sigmas=(0.5,), contrast_epochs=0, contrast_samples=8, optimizer="sgd", momentum=0.0, weight_decay=0.0,
                         embedder_lr=0.1, lr=1.0, scale="tiny")  # fmt: skip
    embedder = torch.nn.Linear(12, 5)
    losses = [contrast.learn_embedder(embedder, embedder, train, labels, args, rank=rank)[0]["contrast"] for rank in (0, 1, 0)]
    assert losses[0] == losses[2] != losses[1]


def stage_2_loss(seen, schedule, weight):
    """Lines 5 to 7. schedule: (k, lambda) of each epoch. Source samples: not augmented, scored by the pretrained encoder."""
    pretrained = copy.deepcopy(seen.net.model.encoder)

    def loss(net, epoch, step):
        x_t, y_t = wiring.batches(seen, seen.train, "cifar100", 2 + epoch, step)
        x_s, y_s = wiring.batches(seen, seen.source_set, "cifar10", epoch, step, augmented=False)
        k, lam = schedule[epoch]
        X_t, X_s = wiring.embed_target(net.model.embedder, x_t), wiring.embed_source(seen, x_s)  # (B, N, D)
        S_t, S_s = by_hand(net.model.encoder, X_t, 0.5)[0], by_hand(pretrained, X_s, 0.5)[0]
        X_m = [wiring.mix(*sample, k, 0.9) for sample in zip(X_t, X_s, S_t, S_s, strict=True)]
        F_t, F_m = wiring.encode(net.model.encoder, torch.cat([X_t, torch.stack(X_m)])).chunk(2)
        of_target = wiring.cross_entropy(wiring.predict(net.model.predictor, F_m), y_t)
        of_source = wiring.cross_entropy(wiring.predict(net.predictor_s, F_m), y_s)
        plain = wiring.cross_entropy(wiring.predict(net.model.predictor, F_t), y_t)
        return plain + weight * ((1 - lam) * of_target + lam * of_source)

    return loss


def test_stage_2_takes_the_steps_of_pare_with_attention_scores(contrast_run):
    seen = contrast_run
    done = wiring.follow(seen, copy.deepcopy(seen.net), stage_2_loss(seen, [(8, 1.0), (4, 0.5)], 0.3), first=2)
    wiring.check(seen, done)
    wiring.check_options(seen)
    assert [(row["k"], row["lambda"]) for row in seen.rows] == [(8, 1.0), (4, 0.5)]
    assert not wiring.starts_as_pretrained(seen.start, seen)  # --init random


def test_with_random_scores_and_no_stage_1_it_is_pare_with_a_random_gate(tmp_path, monkeypatch):
    """With a source of text: PaRe augments source images."""
    options = ["--task", "satellite", "--scale", "tiny", "--n-train", 64, "--epochs", 2, "--clip", 0, "--mix-weight", 1]
    here("contrast", *options, "--scores", "random", "--contrast-epochs", 0, out=tmp_path)
    monkeypatch.setattr(pare.Gate, "forward", lambda self, tokens: torch.rand(tokens.shape[:2]))
    here("pare", *options, out=tmp_path)
    ours, theirs = (tmp_path / f"satellite-{method}-tiny-roberta-s0-toy" for method in ("contrast", "pare"))
    assert rows(ours) == rows(theirs)
    other = weights(theirs)
    assert all(torch.equal(value, other[name]) for name, value in weights(ours).items())


@pytest.mark.parametrize("scores", ["received", "gate"])
def test_other_scores_train_too(scores, tmp_path):
    here("contrast", *SHORT[:-1], 1, "--scores", scores, "--contrast-epochs", 0, out=tmp_path)
    after = weights(tmp_path / "spherical-contrast-tiny-swin-s0-toy")
    assert ("gate.linear.weight" in after) == (scores == "gate")


def test_the_embedder_of_stage_1_is_kept_and_may_stay(script, tmp_path):
    options = [*SHORT[:-1], 1, "--contrast-epochs", 1, "--features", "embedder"]
    said = script("contrast.py", *options, out=tmp_path)
    folder = tmp_path / "spherical-contrast-tiny-swin-s0-toy"
    lines = rows(folder)
    assert "scores vary by" in said and [row.get("stage") for row in lines] == [1, 1, None]
    kept, before = load_file(folder / "stage1.safetensors"), weights(folder)
    assert kept.keys() == {f"embedder.{k}" for k in common.load_source("tiny-swin").embedder.state_dict()}
    for name in ("last.pt", "result.json", "best.safetensors", "metrics.jsonl"):
        (folder / name).unlink()
    assert "resumed after stage 1, with its 2 rows" in script("contrast.py", *options, "--resume", out=tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in weights(folder).items())
    script("contrast.py", *options, "--freeze-embedder", out=tmp_path / "frozen")
    after = weights(tmp_path / "frozen" / folder.name)
    assert all(torch.equal(after[f"model.{name}"], value) for name, value in kept.items())
    assert not torch.equal(before["model.embedder.project.weight"], kept["embedder.project.weight"])


def test_the_printed_formula_stops_the_run_where_it_is_undefined(script, tmp_path):
    said = script("contrast.py", *SHORT, "--as-printed", "--embedder-lr", 0.1, "--contrast-epochs", 50, out=tmp_path, code=2)
    assert "the loss is nan in epoch" in said and "Leave out --as-printed" in said


@pytest.mark.parametrize(
    "task, options, of_embedder",
    [("deepsea", [], False), ("satellite", ["--features", "embedder"], True), ("satellite", ["--as-printed"], True)],
    ids=["encoder", "embedder", "as printed"],
)
def test_z_is_of_the_part_that_is_named_and_one_hot_inputs_are_told(task, options, of_embedder, tmp_path, monkeypatch, capsys):
    def learn(embedder, encode, train, *_):
        x = train.inputs(torch.arange(2))
        assert torch.equal(encode(x), embedder(x)) == of_embedder
        raise KeyboardInterrupt

    monkeypatch.setattr(contrast, "learn_embedder", learn)
    with pytest.raises(KeyboardInterrupt):
        here("contrast", "--task", task, "--scale", "tiny", "--n-train", 64, *options, out=tmp_path)
    assert ("one-hot" in capsys.readouterr().out) == (task == "deepsea")
