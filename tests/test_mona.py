"""MoNA's losses against check values, its meta-gradient against differences of the bilevel objective, and its first stage."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import SHORT, here, result, rows, weights
from safetensors.torch import load_file
from torch.func import functional_call

import backbones
import common
import data
import mona

# ---- the outer loss


def directions(vectors, copies):
    return vectors.repeat_interleave(copies, 0), torch.arange(len(vectors)).repeat_interleave(copies)


def test_the_losses_have_the_values_of_known_configurations():
    copies = 100
    share = (copies - 1) / (10 * copies - 1)  # of the pairs, those of one class
    same = torch.ones(20, 3, dtype=torch.float64) / 3**0.5
    assert mona.alignment(same, torch.arange(20) % 4).item() == pytest.approx(0, abs=1e-9)
    assert mona.uniformity(same).item() == pytest.approx(0, abs=1e-9)
    f, y = directions(torch.eye(10, dtype=torch.float64), copies)  # ten orthogonal classes
    assert mona.alignment(f, y).item() == pytest.approx(0, abs=1e-9)
    assert mona.uniformity(f).item() == pytest.approx(math.log(share + (1 - share) * math.exp(-4)))
    assert mona.uniformity(f).item() == pytest.approx(-2.150, abs=0.02)
    simplex = F.normalize(torch.eye(10, dtype=torch.float64) - 0.1, dim=1)
    assert mona.uniformity(directions(simplex, copies)[0]).item() == pytest.approx(-2.202, abs=0.02)
    spread = F.normalize(torch.randn(1000, 2000, generator=torch.Generator().manual_seed(0)), dim=1)
    assert mona.alignment(spread, torch.arange(1000) % 10).item() == pytest.approx(2, abs=0.02)
    assert mona.uniformity(spread).item() == pytest.approx(-4, abs=0.02)


def test_the_losses_are_means_over_pairs_of_different_samples():
    f = F.normalize(torch.randn(7, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64), dim=1)
    y = torch.tensor([0, 0, 0, 1, 1, 2, 5])
    pairs = [(i, j) for i in range(7) for j in range(7) if i != j]
    d = {(i, j): (f[i] - f[j]).square().sum() for i, j in pairs}
    align = torch.stack([d[p] for p in pairs if y[p[0]] == y[p[1]]]).mean()
    assert mona.alignment(f, y).item() == pytest.approx(align.item())
    assert mona.uniformity(f).item() == pytest.approx(torch.stack([(-2 * v).exp() for v in d.values()]).mean().log().item())
    assert mona.alignment(f, torch.arange(7)).item() == 0  # no class has two


def test_clusters_score_lower_than_collapse_and_than_a_mixture():
    f, y = directions(torch.eye(4), 5)
    total = lambda f, y: (mona.alignment(f, y) + mona.uniformity(f)).item()
    assert total(f, y) < total(torch.ones(20, 4) / 2, y) and total(f, y) < total(f, y.roll(2))


# ---- the meta-gradient


@pytest.fixture(scope="module")
def small():
    """A Swin of two blocks in double precision, a target batch and an embedded source batch."""
    torch.manual_seed(0)
    swin = backbones.build_swin(
        img_size=16, patch_size=4, window_size=2, embed_dim=8, depths=(1, 1), num_heads=(2, 2), num_classes=0
    )
    embedder, predictor = common.Embedder2d(3, 8, 16), common.ClassPredictor(16, 3)
    model = common.Model(embedder, backbones.SwinEncoder(swin), predictor).double().eval()
    x, y = torch.randn(6, 3, 16, 16).double(), torch.arange(6) % 3
    return model, F.cross_entropy, x, y, torch.randn(8, 16, 8).double(), torch.arange(8) % 2


ALPHA, LAMBDA = 0.5, 0.7


def objective(small, embedder):
    """lambda L_outer(theta*(e)) + L_inner(e), from its definition."""
    model, loss, x, y, tokens_s, y_s = small
    theta = {k: p.detach().requires_grad_() for k, p in model.encoder.named_parameters()}
    tokens = functional_call(model.embedder, embedder, (x,))
    inner = loss(model.predictor(functional_call(model.encoder, theta, (tokens,))), y)
    gradient = torch.autograd.grad(inner, list(theta.values()))
    after = {k: p - ALPHA * g for (k, p), g in zip(theta.items(), gradient, strict=True)}
    f = F.normalize(functional_call(model.encoder, after, (tokens_s,)).mean(1), dim=1)
    return LAMBDA * (mona.alignment(f, y_s) + mona.uniformity(f)) + inner


def test_the_exact_meta_gradient_is_the_slope_of_the_bilevel_objective(small):
    gradient, _, log = mona.meta_gradient(*small, ALPHA, LAMBDA, "exact")
    names = [k for k, _ in small[0].embedder.named_parameters()]
    start = {k: p.detach() for k, p in small[0].embedder.named_parameters()}
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        step = {k: torch.randn(p.shape, generator=generator, dtype=p.dtype) for k, p in start.items()}
        ends = [objective(small, {k: p + sign * 1e-5 * step[k] for k, p in start.items()}) for sign in (1, -1)]
        slope = (ends[0] - ends[1]).item() / 2e-5
        ours = sum((g * step[k]).sum() for k, g in zip(names, gradient, strict=True)).item()
        assert ours == pytest.approx(slope, rel=1e-5)
    assert log[3] > 0.05  # the outer part is no rounding error: the test would see it missing


def test_the_finite_difference_agrees_with_the_exact_gradient(small):
    exact, h, log = mona.meta_gradient(*small, ALPHA, LAMBDA, "exact")
    near, h_near, log_near = mona.meta_gradient(*small, ALPHA, LAMBDA, "finite-difference")
    inner, _, _ = mona.meta_gradient(*small, ALPHA, 0.0, "exact")
    flat = lambda parts: torch.cat([p.flatten() for p in parts])
    outer = flat(exact) - flat(inner)  # compare the outer part alone
    assert (flat(near) - flat(exact)).norm() < 1e-3 * outer.norm()
    assert torch.allclose(flat(h), flat(h_near)) and torch.allclose(log, log_near, rtol=1e-3)


def test_lambda_0_is_embedder_warm_up_step_for_step(small):
    model, loss, x, y, *_ = small
    expected = torch.autograd.grad(loss(model(x), y), list(model.embedder.parameters()))
    for way in ("exact", "finite-difference"):
        gradient, _, log = mona.meta_gradient(*small, ALPHA, 0.0, way)
        assert all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(gradient, expected, strict=True)) and log[3] == 0


def test_one_class_has_no_inner_gradient_and_a_finite_log(small):
    model, _, x, y, *source = small
    for way in ("exact", "finite-difference"):
        gradient, _, log = mona.meta_gradient(model, lambda out, y: 0 * out.sum(), x, y, *source, ALPHA, LAMBDA, way)
        assert log.isfinite().all() and all(g.isfinite().all() for g in gradient)


def test_first_order_leaves_nothing_of_the_outer_loss(small):
    """MAML's shortcut holds theta* constant; L_outer then knows nothing of the target embedder: stage 1 is warm-up."""
    model, loss, x, y, tokens_s, y_s = small
    theta = dict(model.encoder.named_parameters())
    inner = loss(model(x), y)
    gradients = torch.autograd.grad(inner, list(theta.values()))
    constant = {name: (p - ALPHA * g).detach() for (name, p), g in zip(theta.items(), gradients, strict=True)}
    assert not any(term.requires_grad for term in mona.outer_loss(model.encoder, constant, tokens_s, y_s))


def test_the_step_leaves_the_model_untouched(small):
    before = {k: v.clone() for k, v in small[0].state_dict().items()}
    for way in ("exact", "finite-difference"):
        mona.meta_gradient(*small, ALPHA, LAMBDA, way)
    assert all(torch.equal(v, before[k]) for k, v in small[0].state_dict().items())
    assert all(p.grad is None for p in small[0].parameters())


# ---- stage 1


def stage_1(tmp_path, task="spherical", **options):
    torch.manual_seed(0)
    source = common.load_source("tiny-swin")
    args = data.complete(mona.Args(scale="tiny", backbone="tiny-swin", meta_epochs=2, **options), "mona", "tiny")
    loaded = data.load(task, tmp_path, tmp_path, "tiny", 64)
    source_set = data.load_proxy("cifar10", tmp_path, "tiny", 96)
    embedder = common.initialise(common.Embedder2d(3, source.token_width, source.size), source, "copy")
    model = common.Model(embedder, source.encoder, common.ClassPredictor(source.feature_width, 9))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    quiet = lambda items, steps, label: items
    history = mona.meta_train(model, source, loaded.train, source_set, loaded.task, args, quiet)
    return model, before, history, loaded, args


@pytest.mark.parametrize("task", ["spherical", "cifar100"])  # cifar100 is augmented: its batches are channels last
def test_stage_1_with_lambda_0_is_a_plain_loop_over_the_embedder(task, tmp_path):
    model, before, _, loaded, args = stage_1(tmp_path, task, lambda_=0.0, predictor="frozen")
    reference = common.Model(
        common.Embedder2d(3, 64, 32), common.load_source("tiny-swin").encoder, common.ClassPredictor(128, 9)
    ).eval()
    reference.load_state_dict(before)
    reference.encoder.requires_grad_(False)
    reference.predictor.requires_grad_(False)
    optimizer = torch.optim.AdamW(reference.embedder.parameters(), args.lr, (0.9, 0.98), weight_decay=0.05)
    for epoch in range(2):
        for x, y in loaded.train.batches(2, 32, 0, epoch, stage=1):
            optimizer.zero_grad()
            F.cross_entropy(reference(x), y).backward()
            torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
            optimizer.step()
    for name, value in reference.state_dict().items():
        assert torch.allclose(value, model.state_dict()[name], atol=1e-5), name


@pytest.mark.parametrize("gradient", ["finite-difference", pytest.param("exact", marks=pytest.mark.matrix)])
@pytest.mark.parametrize("predictor", ["trained", "frozen"])
def test_stage_1_trains_what_it_says(tmp_path, gradient, predictor):
    model, before, history, *_ = stage_1(tmp_path, gradient=gradient, predictor=predictor)
    changed = {k.split(".")[0] for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"embedder"} | ({"predictor"} if predictor == "trained" else set())  # the encoder bit for bit
    assert history[0]["ratio"] > 0 and [row["epoch"] for row in history] == [1, 2]


def test_both_ways_to_the_gradient_take_the_same_path(tmp_path):
    ends = [stage_1(tmp_path, gradient=way, optimizer="sgd", lr=0.05)[0].embedder for way in ("finite-difference", "exact")]
    start = common.load_source("tiny-swin").embedder.project.weight
    moved = (ends[1].project.weight - start).norm()
    assert (ends[0].project.weight - ends[1].project.weight).norm() < 0.01 * moved


def test_a_warning_is_printed_if_the_source_has_no_influence(tmp_path, capsys):
    stage_1(tmp_path, inner_lr=1e-6)
    assert "Raise --inner-lr or --lambda" in capsys.readouterr().out


# ---- end to end


def test_a_compiled_encoder_has_no_exact_gradient_and_says_so(script, tmp_path):
    error = script("mona.py", *SHORT, "--compile", "--gradient", "exact", out=tmp_path, code=2)
    assert "Leave out one of them" in error and "Traceback" not in error


def test_mona_learns_logs_both_stages_and_resumes_after_stage_1(script, tmp_path):
    options = [*SHORT[:-1], 2, "--meta-epochs", 2, "--lambda", 0.5, "--n-train", 96]
    said = script("mona.py", *options, out=tmp_path)
    folder = tmp_path / "spherical-mona-tiny-swin-s0-toy"
    lines = rows(folder)
    assert "MoNA    epoch 2" in said and [row.get("stage") for row in lines] == [1, 1, None, None]
    assert set(lines[0]) == {"stage", "epoch", "L_inner", "alignment", "uniformity", "ratio", "step"}
    assert lines[-1]["loss"] < lines[2]["loss"] and result(folder)["source"] == "cifar10"
    kept, before = load_file(folder / "stage1.safetensors"), weights(folder)
    assert {k.split(".")[0] for k in kept} == {"embedder", "predictor"}
    for name in ("last.pt", "result.json", "best.safetensors", "metrics.jsonl"):
        (folder / name).unlink()
    assert "resumed after stage 1, with its 2 rows" in script("mona.py", *options, "--resume", out=tmp_path)
    assert rows(folder) == lines and all(torch.equal(v, before[k]) for k, v in weights(folder).items())


def test_the_source_has_pairs_however_small_the_batch_and_whatever_its_labels(tmp_path):
    """psicov's batches hold one sample: the outer loss needs two. Masks of a source become clusters."""
    options = ["--task", "darcy", "--scale", "tiny", "--n-train", 4, "--batch-size", 1, "--epochs", 1, "--meta-epochs", 1]
    here("mona.py", *options, "--source", "voc", out=tmp_path)
    first = rows(next(tmp_path.glob("darcy*")))[0]
    assert all(math.isfinite(first[name]) for name in ("L_inner", "uniformity", "ratio")) and first["alignment"] > 0
