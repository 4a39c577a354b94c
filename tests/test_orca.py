"""Distances between data sets against independent computations, and ORCA's first stage."""

import numpy as np
import pytest
import torch
from conftest import SHORT, result, rows, weights
from safetensors.torch import load_file
from scipy.linalg import sqrtm
from scipy.optimize import linprog

import common
import data
import orca
from run import embed_all
from tasks import files
from tools import bench


def labelled(n, D, classes, seed=0, shift=0.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    x = torch.randn(n, D, generator=generator, dtype=dtype) * 0.5 + torch.randn(classes, D, generator=generator, dtype=dtype)[y]
    return x + shift, y


S, T = labelled(24, 3, 3), labelled(15, 3, 2, seed=1, shift=0.5)


def programme(cost):
    """Transport between uniform weights by scipy's general linear programme."""
    n, m = cost.shape
    rows_, columns = np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))
    done = linprog(cost.flatten(), np.r_[rows_, columns][:0], [], np.r_[rows_, columns], np.r_[[1 / n] * n, [1 / m] * m])
    return done.fun


def brute_force(x_s, y_s, x_t, y_t, label=lambda a, b: programme(((a[:, None] - b) ** 2).sum(-1))):
    w = np.array([[label(x_s[y_s == a], x_t[y_t == b]) for b in np.unique(y_t)] for a in np.unique(y_s)])
    index = [np.unique(y, return_inverse=True)[1] for y in (y_s, y_t)]
    return programme(((x_s[:, None] - x_t) ** 2).sum(-1) / 2 + w[index[0]][:, index[1]] / 2)


def bures(a, b):
    mean, cov = [z.mean(0) for z in (a, b)], [np.cov(z.T) if len(z) > 1 else np.zeros((z.shape[1],) * 2) for z in (a, b)]
    root = sqrtm(cov[0] + 1e-12 * np.eye(len(cov[0])))
    return ((mean[0] - mean[1]) ** 2).sum() + np.trace(
        cov[0] + cov[1] - 2 * np.real(sqrtm(root @ cov[1] @ root + 1e-12 * np.eye(len(root))))
    )


# ---- the distance


@pytest.mark.parametrize("counts", [(24, 3, 15, 2), (7, 7, 9, 4), (10, 1, 6, 1)])
def test_exact_otdd_is_the_linear_programme(counts):
    (x_s, y_s), (x_t, y_t) = labelled(counts[0], 3, counts[1]), labelled(counts[2], 3, counts[3], 1)
    expected = brute_force(x_s.numpy(), y_s.numpy(), x_t.numpy(), y_t.numpy())
    assert common.otdd(x_s, y_s, x_t, y_t).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("n, classes", [(24, 3), (12, 3), (3, 3)])  # more samples than dimensions, fewer, one in a class
def test_gaussian_label_distances_are_the_closed_form(n, classes):
    (x_s, y_s), (x_t, y_t) = labelled(n, 5, classes), T
    x_t = torch.cat([x_t, x_t[:, :2] ** 2], 1)
    expected = brute_force(x_s.numpy(), y_s.numpy(), x_t.numpy(), y_t.numpy(), bures)
    assert common.otdd(x_s, y_s, x_t, y_t, "gaussian").item() == pytest.approx(expected, rel=1e-5)


def test_gaussian_clouds_have_the_distance_of_the_distributions():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 200_000, 2, generator=generator, dtype=torch.float64)
    y = torch.zeros(200_000, dtype=torch.long)
    sides = [common.OtddTerms(x, y, "gaussian", 0.0) for x in (z[0], z[1] * torch.tensor([3.0, 0.5]) + 1)]
    w = common.label_distances(None, *sides, torch.tensor([0]), torch.tensor([0]))
    assert w.item() == pytest.approx(2 + (3 - 1) ** 2 + (1 - 0.5) ** 2, rel=0.01)  # commuting: |mu|^2 + sum (sigma - sigma')^2


def test_two_point_masses():
    x, x2 = torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0]])
    y = torch.tensor([7])
    for reg in (0.0, 0.1):
        assert common.otdd(x, y, x2, y, "none", reg).item() == pytest.approx(12.5)  # r^2 / 2
        for inner in ("exact", "gaussian"):
            assert common.otdd(x, y, x2, y, inner, reg).item() == pytest.approx(25)  # r^2 / 2 + r^2 / 2


WAYS = [(inner, reg) for inner in ("exact", "gaussian", "none") for reg in (0.0, 0.5)]


@pytest.mark.parametrize("inner, reg", WAYS)
def test_a_distance_is_zero_to_itself_symmetric_and_blind_to_names_and_order(inner, reg):
    distance = lambda *sets: common.otdd(*sets, inner, reg).item()
    there = distance(*S, *T)
    assert distance(*S, *S) == pytest.approx(0, abs=1e-4) and there > 0.1
    assert distance(*T, *S) == pytest.approx(there, rel=2e-3)
    names = torch.tensor([900, -5, 33])
    assert distance(S[0], names[S[1]], *T) == pytest.approx(there, rel=1e-6)
    order = torch.randperm(len(S[1]), generator=torch.Generator().manual_seed(0))
    assert distance(S[0][order], S[1][order], *T) == pytest.approx(there, rel=1e-4)
    if inner != "none":
        assert abs(distance(S[0], torch.arange(24) // 8, *T) - there) > 0.01 * there  # labels matter


@pytest.mark.parametrize("inner, reg", WAYS)
def test_gradients_are_finite_differences(inner, reg, monkeypatch):
    monkeypatch.setattr(common.entropic_cost, "__defaults__", (False, None, 1e-8, 3000))
    (x_s, y_s), (x_t, y_t) = S, T
    for x, distance in ((x_t, lambda x: common.otdd(x_s, y_s, x, y_t, inner, reg)),
                        (x_s, lambda x: common.otdd(x, y_s, x_t, y_t, inner, reg))):  # fmt: skip
        x = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(distance(x), x)
        for k in range(3):
            step = torch.randn(x.shape, generator=torch.Generator().manual_seed(k), dtype=x.dtype)
            with torch.no_grad():
                slope = (distance(x + 1e-5 * step) - distance(x - 1e-5 * step)) / 2e-5
            assert (gradient * step).sum().item() == pytest.approx(slope.item(), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("inner", ["exact", "gaussian", "none"])
def test_sinkhorn_tends_to_the_exact_value(inner):
    exact = common.otdd(*S, *T, inner).item()
    errors = [abs(common.otdd(*S, *T, inner, reg).item() / exact - 1) for reg in (3.0, 0.3, 0.01)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.01


def test_the_mass_of_subsampled_classes_stands_for_their_copies():
    x, y = T
    again = torch.cat([x, x[y == 1]]), torch.cat([y, y[y == 1]])  # class 1 twice
    mass = torch.where(y == 1, 2.0, 1.0)
    for inner, reg in (("exact", 0.0), ("exact", 0.3), ("none", 0.0)):
        whole = common.otdd(*S, *again, inner, reg).item()
        assert common.otdd(*S, x, y, inner, reg, mass_t=mass).item() == pytest.approx(whole, rel=1e-3)


def test_terms_worked_out_before_change_nothing_and_must_fit():
    for inner, reg in WAYS:
        terms = common.OtddTerms(*S, inner, reg)
        assert torch.equal(common.otdd(*S, *T, inner, reg, terms_s=terms), common.otdd(*S, *T, inner, reg))
    with pytest.raises(ValueError, match="terms_s are those of"):
        common.otdd(*T, *S, "none", 0.5, terms_s=terms)
    with pytest.raises(ValueError, match="reg = 0.5"):
        common.otdd(*S, *T, "none", 0.1, terms_s=terms)


def test_sinkhorn_says_how_far_it_got():
    info = {}
    common.otdd(*S, *T, reg=0.1, info=info)
    assert 0 < info["error"] <= 1e-3 and 10 < info["iterations"] < 5000
    cost = common.squared_distances(S[0], T[0])
    a, b = (torch.full((n,), 1 / n, dtype=torch.float64) for n in cost.shape)
    with pytest.warns(UserWarning, match="its marginal off by"):
        common.entropic_cost(cost, a, b, 1e-4, info=info, max_iterations=20)
    assert info["error"] > 1e-3


def test_a_batch_of_problems_of_different_sizes_equals_each_alone():
    x, y = S[0], torch.tensor([0] * 14 + [1] * 9 + [2])  # 14, 9 and 1 samples
    sides = common.OtddTerms(x, y, "exact", 0.1), common.OtddTerms(*T, "exact", 0.1)
    d = common.squared_distances(x, T[0])
    i, j = torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 0, 1])
    together = common.class_costs(d, *sides, i, j)
    for p in range(4):
        block = d[y == i[p]][:, T[1] == j[p]]
        a, b = (torch.full((n,), 1 / n, dtype=torch.float64) for n in block.shape)
        assert together[p].item() == pytest.approx(common.entropic_cost(block, a, b, 0.1).item(), rel=1e-4)


def test_distances_far_from_the_origin_and_in_half_precision():
    x_s, x_t = S[0].float(), T[0].float()
    here = common.otdd(x_s, S[1], x_t, T[1]).item()
    assert common.otdd(x_s + 1000, S[1], x_t + 1000, T[1]).item() == pytest.approx(here, rel=1e-3)
    assert common.otdd(x_s.bfloat16(), S[1], x_t.bfloat16(), T[1]).item() == pytest.approx(here, rel=0.02)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(x_t=torch.zeros(4, 5), y_t=torch.zeros(4, dtype=torch.long)), "width 3, the target 5"),
        (dict(x_s=torch.zeros(0, 3), y_s=torch.zeros(0, dtype=torch.long)), "n > 0"),
        (dict(x_t=torch.full((15, 3), torch.nan)), "NaN"),
        (dict(y_s=torch.zeros(23, dtype=torch.long)), r"y \(23,\)"),
        (dict(y_t=torch.zeros(15)), "int"),
        (dict(x_s=torch.zeros(24, 3, dtype=torch.long)), "float"),
        (dict(inner="exakt"), "choose exact"),
        (dict(reg=-1.0), "negative"),
    ],
)
def test_what_cannot_be_computed_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        common.otdd(**dict(x_s=S[0], y_s=S[1], x_t=T[0], y_t=T[1]) | change)


# ---- the other distances


def test_mmd_is_its_formula():
    x, x2 = S[0], T[0]
    both = np.concatenate([x, x2])
    d = ((both[:, None] - both) ** 2).sum(-1)
    b = d[~np.eye(len(both), dtype=bool)].mean()
    K = sum(np.exp(-d / (c * b)) for c in (0.25, 0.5, 1, 2, 4))
    n = len(x)
    expected = K[:n, :n].mean() + K[n:, n:].mean() - 2 * K[:n, n:].mean()
    assert common.mmd(x, x2).item() == pytest.approx(expected, rel=1e-6) and expected > 0
    assert common.mmd(x, x).item() == pytest.approx(0, abs=1e-9)
    assert common.mmd(3 * x, 3 * x2).item() == pytest.approx(expected, rel=1e-6)  # the bandwidth scales along
    assert common.l2(x[:15], x2).item() == pytest.approx(np.linalg.norm(x[:15] - x2, axis=1).mean())


# ---- what the released objective optimises


def gradient(distance):
    x = T[0].clone().requires_grad_()
    return torch.autograd.grad(distance(x), x)[0].flatten()


def test_the_released_gradient_knows_no_source_labels_and_the_joint_one_does():
    one = torch.zeros(15, dtype=torch.long)
    terms = common.OtddTerms(*S, "none", 0.3)
    ours = gradient(lambda x: common.otdd(*S, x, one, "none", 0.3, terms_s=terms))  # what --as-released optimises

    def released(x, w):  # one target class, label distances w (3,) held constant
        t = common.OtddTerms(x, one, "none", 0.3)
        cost = common.squared_distances(S[0], x) / 2 + w[S[1]][:, None] / 2
        return common.entropic_cost(cost, terms.mass, t.mass, 0.3, tolerance=1e-6) - t.self_cost / 2

    for w in (torch.zeros(3), torch.tensor([3.0, 0.5, 7.0])):
        assert torch.allclose(gradient(lambda x, w=w: released(x, w)), ours, atol=1e-4)
    other = torch.arange(24) // 8  # another partition of the source
    for y in (S[1], other):  # the official, unconverged way to work it out
        official = gradient(lambda x, y=y: bench.plain_otdd(S[0], y, x, one, eps=0.3))
        assert torch.cosine_similarity(official, ours, 0) > 0.98
    joint = [gradient(lambda x, y=y: common.otdd(S[0], y, x, T[1], "exact", 0.3)) for y in (S[1], other)]
    assert (joint[0] - joint[1]).norm() > 0.05 * joint[0].norm()


def test_the_official_way_restated_is_near_our_value():
    x_s, y_s, x_t, y_t = bench.clouds(200, 16, "cpu", 40)
    ours = common.otdd(x_s, y_s, x_t, y_t, reg=0.1).item()
    assert bench.plain_otdd(x_s, y_s, x_t, y_t).item() == pytest.approx(ours, rel=0.02)


# ---- stage 1


def small_alignment(tmp_path, **options):
    torch.manual_seed(0)
    source = common.load_source("tiny-swin")
    args = data.complete(orca.Args(scale="tiny", backbone="tiny-swin", embedder_epochs=6, **options), "orca", "tiny")
    train = data.load("spherical", tmp_path, tmp_path, "tiny", 200).train
    source_set = data.load_proxy("cifar10", tmp_path, "tiny", 100)
    embedder = common.initialise(common.Embedder2d(3, source.token_width, source.size), source, "copy")
    with torch.no_grad():
        u_s = embed_all(source.embedder, source_set, torch.arange(100))
    return embedder, u_s, source_set.y, train, train.y, args


@pytest.mark.parametrize("objective", ["otdd", "otdd-gaussian", "mmd", "l2", "as_released"])
def test_alignment_brings_the_embedder_closer_by_every_objective(tmp_path, objective):
    options = dict(as_released=True) if objective == "as_released" else dict(objective=objective)
    history = orca.align(*small_alignment(tmp_path, **options))
    assert [row["epoch"] for row in history] == [1, 2, 3, 4, 5, 6]
    assert history[-1]["distance"] < 0.9 * history[0]["distance"]


def test_a_group_of_classes_is_a_problem_and_the_whole_is_their_weighted_mean(tmp_path):
    embedder, u_s, y_s, train, y_t, args = small_alignment(tmp_path, max_samples=1000, classes_per_problem=100)
    with torch.no_grad():
        u_t = embed_all(embedder, train, torch.arange(len(train)))
    assert orca.align(embedder, u_s, y_s, train, y_t, args)[0]["distance"] == pytest.approx(
        common.otdd(u_s, y_s, u_t, y_t).item(), rel=1e-4
    )
    embedder, *rest, args = small_alignment(tmp_path, max_samples=1000, classes_per_problem=1)
    parts = [(y_t == c).float().mean() * common.otdd(u_s, y_s, u_t[y_t == c], y_t[y_t == c]) for c in y_t.unique()]
    assert orca.align(embedder, *rest, args)[0]["distance"] == pytest.approx(sum(parts).item(), rel=1e-4)


@pytest.mark.parametrize("lazy", [False, True])
def test_targets_without_classes_are_clustered(lazy):
    y = torch.cat([torch.randn(30, 2, 3) * 0.1 + 10 * c for c in range(10)])
    y[7, 0, 0] = torch.nan  # unknown
    targets = files.Lazy(300, lambda rows, u=None: y.numpy()[rows]) if lazy else y.numpy()
    split = data.Split(np.zeros((300, 3, 85, 85), np.uint8), targets, None, "toy", data.TASKS["darcy"], "cpu")
    found = data.class_labels(split)
    assert found.dtype == torch.long and len(found.unique()) == 10
    assert sum(len(found[30 * c : 30 * c + 30].unique()) == 1 for c in range(10)) >= 9
    assert torch.equal(found, data.class_labels(split))


def test_stage_1_trains_the_embedder_only_and_is_kept(script, tmp_path):
    options = [*SHORT[:-1], 1, "--embedder-epochs", 3]
    said = script("orca.py", *options, out=tmp_path)
    folder = tmp_path / "spherical-orca-tiny-swin-s0-toy"
    lines = rows(folder)
    assert "ORCA    otdd from" in said and [row.get("stage") for row in lines] == [1, 1, 1, None]
    assert lines[2]["distance"] < lines[0]["distance"] and result(folder)["source"] == "cifar10"
    kept, source = load_file(folder / "stage1.safetensors"), common.load_source("tiny-swin")
    assert kept.keys() == {f"embedder.{k}" for k in source.embedder.state_dict()}
    assert not torch.equal(kept["embedder.project.weight"], source.embedder.project.weight)
    # a run killed between the stages goes on with stage 2 and ends with the same weights
    before, stage1 = weights(folder), (folder / "stage1.safetensors").read_bytes()
    for name in ("last.pt", "result.json", "best.safetensors", "metrics.jsonl"):
        (folder / name).unlink()
    assert "holds a run already" in script("orca.py", *options, out=tmp_path, code=2)
    assert "resumed after stage 1, 3 epochs" in script("orca.py", *options, "--resume", out=tmp_path)
    assert rows(folder) == lines and all(torch.equal(v, before[k]) for k, v in weights(folder).items())
    assert (folder / "stage1.safetensors").read_bytes() == stage1
    (folder / "stage1.safetensors").write_bytes(stage1[:1000])
    (folder / "result.json").unlink()
    assert "is no first stage of this run" in script("orca.py", *options, "--resume", out=tmp_path, code=2)


def test_without_embedder_epochs_orca_is_naive_fine_tuning(script, tmp_path):
    script("orca.py", *SHORT[:-1], 2, "--embedder-epochs", 0, out=tmp_path)
    script("finetune.py", *SHORT[:-1], 2, "--mode", "naive", out=tmp_path)
    orca_, naive = (tmp_path / f"spherical-{name}-tiny-swin-s0-toy" for name in ("orca", "naive"))
    assert rows(orca_) == rows(naive)
    assert all(torch.equal(value, weights(naive)[name]) for name, value in weights(orca_).items())
