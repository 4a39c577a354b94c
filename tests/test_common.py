"""Embedders, predictors and distances between data sets, against independent computations."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.optimize import linprog

import cli
import common
from tasks import pde
from tools import bench

# ---- embedders


@pytest.mark.parametrize("channels", [1, 2, 5, 7])
def test_copy_tiles_the_three_input_slices(swin, channels):
    embedder = common.initialise(common.Embedder2d(channels, swin.token_width, swin.size), swin, "copy")
    for c in range(channels):
        assert torch.equal(embedder.project.weight[:, c], swin.embedder.project.weight[:, c % 3])
    assert torch.equal(embedder.project.bias, swin.embedder.project.bias)
    assert torch.equal(embedder.norm.weight, swin.embedder.norm.weight)


def test_random_and_truncated_starts(swin):
    random = common.initialise(common.Embedder2d(3, 64, 32), swin, "random")
    bound = math.sqrt(2) * math.sqrt(6 / (3 * 16 + 64 * 16))  # Xavier: fan_in + fan_out of a 4 x 4 convolution
    assert 0.9 * bound < random.project.weight.abs().max() <= bound
    assert random.project.bias.abs().sum() == 0 and (random.norm.weight == 1).all()
    truncated = common.initialise(common.Embedder2d(3, 64, 32), swin, "truncated")
    assert abs(truncated.project.weight.std().item() - 0.02) < 0.002


def test_no_weights_of_the_source_are_shared_with_the_target(swin):
    embedder = common.initialise(common.Embedder2d(3, swin.token_width, swin.size), swin, "copy")
    before = swin.embedder.project.weight.clone()
    with torch.no_grad():
        embedder.project.weight.add_(1)
    assert torch.equal(swin.embedder.project.weight, before)


def test_pictures_of_any_size_are_resized_and_shrinking_does_not_alias():
    embedder = common.Embedder2d(1, 8, 32)
    assert embedder(torch.randn(2, 1, 16, 52)).shape == (2, 64, 8)
    stripes = torch.zeros(1, 1, 64, 64)
    stripes[..., ::2] = 1  # the finest stripes become even grey
    small = torch.nn.functional.interpolate(stripes, (32, 32), mode="bilinear", antialias=True)
    assert torch.allclose(embedder(stripes), embedder(small)) and small[..., 2:-2].std() < 0.01


@pytest.mark.parametrize(
    ("length", "most", "stack", "tokens"),
    [(1000, 512, 2, 500), (1000, 64, 20, 50), (46, 512, 1, 46), (256, 512, 1, 256), (256, 128, 2, 128), (1024, 512, 2, 512),
     (1024, 256, 4, 256), (1024, 32, 32, 32), (3072, 128, 24, 128), (3840, 32, 120, 32), (521, 512, 521, 1), (1, 512, 1, 1)],
)  # fmt: skip
def test_stack_number_of_the_papers_tasks(length, most, stack, tokens):
    assert common.stack_number(length, most) == stack
    embedder = common.Embedder1d(1, length, 8, most)
    assert (embedder.stack, embedder.tokens) == (stack, tokens) and embedder(torch.randn(2, 1, length)).shape == (2, tokens, 8)


def test_a_token_sees_its_own_time_steps_and_the_positions_come_after_the_norm():
    embedder = common.Embedder1d(3, 12, 8, max_tokens=4)  # k = 3
    x = torch.randn(2, 3, 12)
    tokens = embedder(x)
    weight = embedder.project.weight.flatten(1)  # (D, C k)
    for i in range(4):
        block = x[:, :, 3 * i : 3 * i + 3].flatten(1)  # (B, C k)
        z = block @ weight.T
        z = (z - z.mean(1, keepdim=True)) / (z.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        assert torch.allclose(tokens[:, i], z + embedder.positions[i], atol=1e-5)


def test_what_is_copied_in_1d(roberta):
    table, norm = roberta.embedder.position_embeddings.weight, roberta.embedder.LayerNorm
    copied, truncated, random = (common.make_embedder((2, 1000), roberta, init) for init in ("copy", "truncated", "random"))
    for embedder in (copied, truncated):
        assert torch.equal(embedder.positions, table[2:502])  # RoBERTa's rows 0 and 1 belong to the padding
    assert torch.equal(copied.norm.weight, norm.weight) and torch.equal(copied.norm.bias, norm.bias)
    for embedder in (truncated, random):
        assert (embedder.norm.weight == 1).all() and (embedder.norm.bias == 0).all()
    assert abs(random.positions.std().item() - 0.02) < 1e-3
    bound = math.sqrt(2) * math.sqrt(6 / (2 * 2 + 128 * 2))  # Xavier of a convolution: C k + D k
    for embedder in (copied, truncated, random):
        assert 0.9 * bound < embedder.project.weight.abs().max() <= bound and embedder.project.bias.abs().sum() == 0
    with torch.no_grad():
        copied.positions.add_(1)
    assert not torch.equal(copied.positions, table[2:502])  # no memory is shared


def test_never_more_tokens_than_the_backbone_has_positions(roberta):
    embedder = common.make_embedder((1, 2048), roberta, "copy", max_tokens=2048)
    assert roberta.positions == 512 and embedder.tokens == 512
    assert roberta.encoder(embedder(torch.randn(1, 1, 2048))).shape == (1, 512, roberta.feature_width)


def test_modalities_that_do_not_fit_are_told_what_does(roberta, swin):
    with pytest.raises(cli.UserError, match="tiny-swin is a Swin.*1 x 1000(.|\n)*Give tiny-roberta or roberta_base") as error:
        common.make_embedder((1, 1000), swin, "copy")
    assert len(str(error.value).splitlines()) == 2
    with pytest.raises(cli.UserError, match="tiny-roberta is a text model.*3 x 60 x 60(.|\n)*Give tiny-swin or swin_base"):
        common.make_embedder((3, 60, 60), roberta, "copy")
    assert isinstance(common.make_embedder((5, 60, 60), swin, "copy"), common.Embedder2d)


# ---- predictors


@pytest.mark.parametrize("out", [(85, 85), (128, 128), (2, 24, 24), (4, 16, 40), (3, 100, 7)])
def test_2d_fields_are_pixels_of_the_tokens_averaged(out):
    """Against loops over pixels: feature 3 f^2 -> (channel, row, column) of the token's square, then means of windows."""
    f, side, width = 4, 6, 10
    predictor = common.DensePredictor2d(width, out, f)
    features = torch.randn(2, side * side, width)
    values = (features @ predictor.linear.weight.T + predictor.linear.bias).detach().numpy()  # (B, n, 3 f^2)
    picture = np.zeros((2, 3, side * f, side * f))
    for token in range(side * side):
        row, column = divmod(token, side)
        square = values[:, token].reshape(2, 3, f, f)
        picture[:, :, row * f : row * f + f, column * f : column * f + f] = square
    for axis, size in zip((1, 2, 3), (1, *out)[-3:], strict=True):
        n = picture.shape[axis]
        windows = [np.arange(i * n // size, -(-(i + 1) * n // size)) for i in range(size)]
        picture = np.stack([picture.take(w, axis).mean(axis) for w in windows], axis)
    assert np.allclose(predictor(features).detach().numpy(), picture.reshape(2, *out), atol=1e-5)


@pytest.mark.matrix
def test_swin_base_predicts_fields_as_the_papers_do():
    source = common.load_source("random:swin_base")
    predictor = common.make_predictor((512, 512), "field", source, None)
    assert predictor.factor == 32 and predictor.linear.weight.shape == (3 * 32**2, 1024)
    assert predictor(torch.randn(1, 49, 1024)).shape == (1, 512, 512)


def test_the_tiny_swin_has_a_pixel_for_each_cell_of_a_simulated_field(swin):
    predictor = common.make_predictor((2, 9, 9), "field", swin, None)
    features = swin.encoder(swin.embedder(torch.randn(2, 3, 32, 32)))
    assert features.shape[1] * predictor.factor**2 == 64**2 and predictor(features).shape == (2, 2, 9, 9)
    assert {sim.tiny for name, sim in pde.SETS.items() if name.endswith("2d")} == {64}


def test_1d_fields_are_the_values_of_each_tokens_time_steps():
    predictor = common.DensePredictor1d(10, (2, 15), stack=3)
    features = torch.randn(4, 5, 10)
    out = predictor(features)
    assert out.shape == (4, 2, 15)
    values = features @ predictor.head.weight.T + predictor.head.bias  # (B, N, c k)
    for c in range(2):
        for t in range(15):
            assert torch.allclose(out[:, c, t], values[:, t // 3, c * 3 + t % 3])


def test_the_released_1d_head_averages_groups_of_features():
    predictor = common.DensePredictor1d(12, (1, 20), stack=4, pooling=True)
    features = torch.randn(2, 5, 12)
    assert not list(predictor.parameters())
    assert torch.allclose(predictor(features), features.unflatten(2, (4, 3)).mean(3).flatten(1)[:, None])


def test_which_predictor_a_task_gets(roberta):
    embedder = common.make_embedder((1, 1024), roberta, "copy", 32)
    for target in ("class", "labels"):
        assert isinstance(common.make_predictor((36,), target, roberta, embedder), common.ClassPredictor)
    predictor = common.make_predictor((1, 1024), "field", roberta, embedder)
    out = predictor(roberta.encoder(embedder(torch.randn(2, 1, 1024))))
    assert predictor.stack == embedder.stack == 32 and out.shape == (2, 1, 1024)
    released = common.make_predictor((3, 512), "field", roberta, embedder, pooling=True)
    assert released(torch.randn(1, 32, 128)).shape == (1, 3, 512)
    with pytest.raises(cli.UserError, match="32 tokens cannot predict 1000"):
        common.make_predictor((1, 1000), "field", roberta, embedder)


def test_fields_and_logits_are_not_rounded_by_autocast():
    """bf16 keeps 8 bits: 2e-3 of a field would be lost, whatever is learned."""
    torch.manual_seed(0)
    parts = [
        (common.DensePredictor1d(8, (1, 32), 4), torch.randn(2, 8, 8)),
        (common.DensePredictor2d(8, (16, 16), 8), torch.randn(2, 4, 8)),
        (common.ClassPredictor(8, 5), torch.randn(2, 4, 8)),
        (common.Embedder1d(1, 32, 8), torch.randn(2, 1, 32)), (common.Embedder2d(3, 8, 16), torch.randn(2, 3, 16, 16)),
    ]  # fmt: skip
    for module, x in parts:
        exact = module(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(module(x), exact), module


@pytest.mark.parametrize("name, width", [("tiny-swin", 64), ("tiny-roberta", 128)])
def test_checkpointing_keeps_less_and_changes_no_gradient(name, width):
    def saved_and_gradients(checkpointing):
        encoder, saved = common.load_source(name).encoder.train(), []
        if checkpointing:
            common.checkpoint_activations(encoder)
        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            loss = encoder(torch.randn(4, 64, width)).square().mean()
        loss.backward()
        return sum(saved), [p.grad for p in encoder.parameters()]

    everything, expected = saved_and_gradients(False)
    less, gradients = saved_and_gradients(True)
    assert less < everything / 4 and all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True) if b is not None)


# ---- OTDD


def labelled(n, D, classes, seed=0, shift=0.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    x = torch.randn(n, D, generator=generator, dtype=dtype) * 0.5 + torch.randn(classes, D, generator=generator, dtype=dtype)[y]
    return x + shift, y


S, T = labelled(24, 3, 3), labelled(15, 3, 2, seed=1, shift=0.5)


def program(cost):
    """Transport between uniform weights by scipy's general linear program."""
    n, m = cost.shape
    rows_, columns = np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))
    done = linprog(cost.flatten(), np.r_[rows_, columns][:0], [], np.r_[rows_, columns], np.r_[[1 / n] * n, [1 / m] * m])
    return done.fun


def brute_force(x_s, y_s, x_t, y_t, label=lambda a, b: program(((a[:, None] - b) ** 2).sum(-1))):
    w = np.array([[label(x_s[y_s == a], x_t[y_t == b]) for b in np.unique(y_t)] for a in np.unique(y_s)])
    index = [np.unique(y, return_inverse=True)[1] for y in (y_s, y_t)]
    return program(((x_s[:, None] - x_t) ** 2).sum(-1) / 2 + w[index[0]][:, index[1]] / 2)


def bures(a, b):
    mean, cov = [z.mean(0) for z in (a, b)], [np.cov(z.T) if len(z) > 1 else np.zeros((z.shape[1],) * 2) for z in (a, b)]
    root = sqrtm(cov[0] + 1e-12 * np.eye(len(cov[0])))
    return ((mean[0] - mean[1]) ** 2).sum() + np.trace(
        cov[0] + cov[1] - 2 * np.real(sqrtm(root @ cov[1] @ root + 1e-12 * np.eye(len(root))))
    )


@pytest.mark.parametrize("counts", [(24, 3, 15, 2), (7, 7, 9, 4), (10, 1, 6, 1)])
def test_exact_otdd_is_the_linear_program(counts):
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
    monkeypatch.setattr(common.entropic_cost, "__defaults__", (False, None, 1e-6, 3000))
    (x_s, y_s), (x_t, y_t) = S, T
    for x, distance in ((x_t, lambda x: common.otdd(x_s, y_s, x, y_t, inner, reg)),
                        (x_s, lambda x: common.otdd(x, y_s, x_t, y_t, inner, reg))):  # fmt: skip
        x = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(distance(x), x)
        for k in range(3):
            step = torch.randn(x.shape, generator=torch.Generator().manual_seed(k), dtype=x.dtype)
            with torch.no_grad():
                slope = (distance(x + 1e-4 * step) - distance(x - 1e-4 * step)) / 2e-4
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
