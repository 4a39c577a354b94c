"""RECRAFT's table of labels, its first stage, and RECRAFT end to end."""

import itertools
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import SHORT, rows, weights
from safetensors.torch import load_file
from torch import nn

import cli
import common
import data
import orca
import recraft
from recraft import entropies, joint_table
from run import seed_everything

# ---- the table and what it says


def random_predictions(seed, n=60, k_s=5, k_t=4):
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(k_t, (n,), generator=generator)
    return (2 * torch.randn(n, k_s, generator=generator, dtype=torch.float64)).softmax(1), y


@pytest.mark.parametrize("k_t, k_s", [(6, 6), (6, 3), (3, 6)])
def test_information_of_uniform_collapsed_and_balanced_maps(k_t, k_s):
    y = torch.arange(k_t).repeat_interleave(10)
    uniform, collapsed = torch.full((len(y), k_s), 1 / k_s), torch.eye(k_s)[torch.zeros(len(y), dtype=torch.long)]
    assert [v.item() for v in entropies(joint_table(uniform, y, k_t))] == pytest.approx(
        [math.log(k_s), math.log(k_s), 0], abs=1e-5
    )
    assert [v.item() for v in entropies(joint_table(collapsed, y, k_t))] == pytest.approx([0, 0, 0], abs=1e-5)
    balanced = torch.eye(k_s)[y % k_s]  # one source class for each target class, as evenly as can be
    assert entropies(joint_table(balanced, y, k_t))[2].item() == pytest.approx(math.log(min(k_s, k_t)), abs=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_bounds_invariances_and_the_error_of_a_relabelling(seed):
    p, y = random_predictions(seed)
    pi = joint_table(p, y, 4)
    by_hand = np.array([[sum(p[i, z] for i in range(60) if y[i] == c) / 60 for z in range(5)] for c in range(4)])
    assert np.allclose(pi, by_hand) and pi.sum().item() == pytest.approx(1)
    h_z, h_z_given, information = (v.item() for v in entropies(pi))
    h_t = -sum(f * math.log(f) for f in (y.bincount(minlength=4) / 60).tolist() if f)
    assert 0 <= information <= min(h_z, h_t) and 0 <= h_z_given <= math.log(5)
    product = by_hand.sum(1)[:, None] * by_hand.sum(0)
    assert information == pytest.approx((by_hand * np.log(by_hand / product)).sum())  # a Kullback-Leibler divergence
    renamed = joint_table(p[:, torch.randperm(5)], torch.randperm(4)[y], 4)
    assert entropies(renamed)[2].item() == pytest.approx(information)
    # LEEP: p_Q(z' | x) = sum_z p(z | x) Q(z' | z), Q = pi(z' | z), errs by at most H(Z' | Z) = H(Z') - I
    relabelled = p @ (pi / pi.sum(0)).T
    error = -relabelled[torch.arange(60), y].log().mean().item()
    assert error <= h_t - information + 1e-9 <= math.log(4) + 1e-9
    sharp = torch.eye(5, dtype=torch.float64)[p.argmax(1)]
    pi = joint_table(sharp, y, 4)
    relabelled = sharp @ (pi / pi.sum(0).clamp(min=1e-12)).T
    error = -relabelled[torch.arange(60), y].log().mean().item()
    assert error == pytest.approx(h_t - entropies(pi)[2].item())  # equal where the predictions are certain


def test_gradients_of_the_entropies_are_finite_differences():
    p, y = random_predictions(0, n=12)
    value = lambda logits, which: entropies(joint_table(logits.softmax(1), y, 4))[which]
    for which in range(3):
        assert torch.autograd.gradcheck(lambda logits, which=which: value(logits, which), p.log().requires_grad_())
    certain = torch.eye(5)[y].requires_grad_()  # zeros in the table
    entropies(joint_table(certain, y, 4))[2].backward()
    assert torch.isfinite(certain.grad).all()


# ---- the first stage


class Embedder(nn.Module):
    """Samples (B, 8) to one token (B, 1, 6)."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(8, 6)

    def forward(self, x):
        return self.project(x)[:, None]


class Target:
    """Six classes in eight dimensions, as a data.Split has them."""

    device, chunk = torch.device("cpu"), 256

    def __init__(self, n=240, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.y = torch.arange(n) % 6
        self.x = 2 * torch.randn(6, 8, generator=generator)[self.y] + 0.3 * torch.randn(n, 8, generator=generator)

    def __len__(self):
        return len(self.y)

    def inputs(self, index):
        return self.x[index]


def small_stage(seed=0, **options):
    """The stage's arguments: a linear embedder, an encoder that squashes, four source classes."""
    torch.manual_seed(seed)
    encoder, h_s, embedder = nn.Sequential(nn.Linear(6, 6), nn.Tanh()), nn.Linear(6, 4), Embedder()
    with torch.no_grad():
        h_s.weight *= 6
    args = data.complete(recraft.Args(task="satellite", scale="tiny", clip=0.0, **options), "recraft", "tiny")
    features = lambda embedder, split, index: encoder(embedder(split.inputs(index))).mean(1)
    train = Target()
    return (embedder, features, h_s.requires_grad_(False), torch.randn(50, 6), train, train.y, args), encoder


def test_stage_1_by_a_plain_loop():
    """Two steps of alignment and one epoch of labels, from the algorithm at the top of the file."""
    options = dict(
        optimizer="sgd", align_epochs=2, label_epochs=1, label_samples=100, align_samples=70, label_lr=0.1, embedder_lr=2e-3
    )
    (embedder, features, h_s, u_s, train, y, args), encoder = small_stage(**options)
    torch.manual_seed(0)
    _, _, mine = nn.Sequential(nn.Linear(6, 6)), nn.Linear(6, 4), Embedder()
    assert torch.equal(mine.project.weight, embedder.project.weight)
    sample = torch.randperm(240, generator=torch.Generator().manual_seed(cli.stream("measured", 0)))
    p = h_s(encoder(mine(train.x[sample])[:, 0])).softmax(1).detach()
    others = []  # I of labels that belong to other samples
    for i in range(1, 11):
        pi = torch.stack([p[y[sample].roll(i) == c].sum(0) for c in range(6)]) / 240
        others.append((pi * (pi / (pi.sum(1, keepdim=True) * pi.sum(0, keepdim=True))).log()).sum().item())
    found = recraft.learn_embedder(embedder, features, h_s, u_s, train, y, args)
    sgd = lambda lr: torch.optim.SGD(mine.parameters(), lr=lr, momentum=args.momentum, weight_decay=args.weight_decay)
    optimizer = sgd(2e-3)
    for epoch in range(2):
        generator = torch.Generator().manual_seed(cli.stream("alignment", 0, epoch))
        u_t = mine(train.x[torch.randperm(240, generator=generator)[:70]])[:, 0]
        cost = (u_s[:, None] - u_t[None]).square().sum(2) / 2
        loss = common.exact_cost(cost, torch.full((50,), 1 / 50), torch.full((70,), 1 / 70))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer, running = sgd(0.1), None
    generator = torch.Generator().manual_seed(cli.stream("labels", 0, 0))
    for index in torch.randperm(240, generator=generator).split(80):  # three equal steps of at most 100
        p = h_s(encoder(mine(train.x[index])[:, 0])).softmax(1)
        batch = torch.stack([p[y[index] == c].sum(0) for c in range(6)]) / 80
        pi = batch if running is None else 0.1 * batch + 0.9 * running
        independent = pi.sum(1, keepdim=True) * pi.sum(0, keepdim=True)
        loss = -(pi * (pi / independent).log()).sum() / (1 if running is None else 0.1)
        running = pi.detach()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.allclose(embedder.project.weight, mine.project.weight, atol=1e-6)
    assert [row["epoch"] for row in found] == [0, 1, 2, 3] and found[2]["distance"] < found[0]["distance"]
    assert found[0]["I(Z;Z')"] == pytest.approx(found[0]["H(Z)"] - found[0]["H(Z|Z')"], abs=1e-6)
    assert found[0]["I, other labels"] == pytest.approx(sum(others) / 10, abs=1e-6) and others[0] < found[0]["I(Z;Z')"]


def test_the_seconds_of_stage_1_are_those_of_training(monkeypatch):
    (embedder, features, h_s, u_s, train, y, args), _ = small_stage(align_epochs=1, label_epochs=1, label_samples=240)
    clock = [0]

    def timed(*arguments):  # the measurements have no gradient
        clock[0] += 1 if torch.is_grad_enabled() else 100
        return features(*arguments)

    monkeypatch.setattr(recraft.time, "perf_counter", lambda: clock[0])
    found = recraft.learn_embedder(embedder, timed, h_s, u_s, train, y, args)
    assert [row["seconds"] for row in found] == [0, 0, 1]  # the alignment needs no features of the encoder


def test_entropy_collapses_and_mutual_information_does_not():
    """Row R3: H(Z | Z') alone is lowest where every sample is predicted as one source class."""
    last = {}
    for distortion in ("mutual", "entropy"):
        stage, _ = small_stage(distortion=distortion, align_epochs=0, label_epochs=60, label_samples=240, label_lr=3e-2)
        first, *_, last[distortion] = recraft.learn_embedder(*stage)
        assert last[distortion]["H(Z|Z')"] < first["H(Z|Z')"]
    assert last["mutual"]["I(Z;Z')"] > 0.95 * math.log(4) * 0.9 and last["mutual"]["H(Z)"] > 1.2
    assert (
        last["entropy"]["H(Z)"] < last["mutual"]["H(Z)"] - 0.1 and last["entropy"]["I(Z;Z')"] < last["mutual"]["I(Z;Z')"] - 0.1
    )


def test_alignment_is_orcas_where_there_is_one_class():
    (embedder, _, h_s, u_s, train, y, args), _ = small_stage()
    with torch.no_grad():
        u_t = embedder(train.x)[:, 0]
    one = torch.zeros(len(train), dtype=torch.long)
    its = orca.make_distance(u_s, one[:50])(u_t, one, None, None)
    args = recraft.replace(args, align_epochs=0, label_epochs=0)
    ours = recraft.learn_embedder(embedder, lambda *_: torch.zeros(240, 6), h_s, u_s, train, y, args)
    assert 2 * ours[0]["distance"] == pytest.approx(its.item(), rel=1e-5)  # 1/2 |x - x'|^2 + 1/2 W^2, which is twice the first


def test_as_released_steps_through_groups_of_one_class():
    y = torch.tensor([0] * 70 + [1] * 33 + [2] * 10)
    args = SimpleNamespace(label_samples=32, batch_size=16)
    groups = list(recraft.released_groups(y, args, torch.Generator().manual_seed(0)))
    assert sorted((y[g].unique().tolist(), len(g)) for g, _ in groups) == [([0], 32), ([0], 32), ([1], 32)]  # 6, 1, 10: too few
    assert {(int(y[g][0]), round(w, 6)) for g, w in groups} == {
        (0, round(70 / 113 * 32 / 5, 6)), (1, round(33 / 113 * 32 / 3, 6)),
    }  # fmt: skip
    args.label_samples = 20  # two batches of 16, and a rest counts from 10
    groups = list(recraft.released_groups(y, args, torch.Generator().manual_seed(0)))
    assert sorted((int(y[g][0]), len(g)) for g, _ in groups) == [(0, 32), (0, 32), (1, 32), (2, 10)]
    stage, _ = small_stage(as_released=True, reg=0.0, align_epochs=0, label_epochs=1, label_samples=500)
    with pytest.raises(cli.UserError, match="Lower --label-samples"):
        recraft.learn_embedder(*stage)
    stage, _ = small_stage(as_released=True, reg=0.0, align_epochs=0, label_epochs=3, label_samples=20, label_lr=1e-2)
    h_s = stage[2]
    before = h_s.weight.clone()
    first, *_, last = recraft.learn_embedder(*stage)
    assert last["H(Z|Z')"] < first["H(Z|Z')"] and not torch.equal(h_s.weight, before)  # R4: it trains along


def test_the_source_predictor_learns_and_the_released_one_of_text_stays_flat():
    target = Target(n=240)
    args = data.complete(recraft.Args(task="satellite", scale="tiny"), "recraft", "tiny")
    h_s = recraft.train_source_predictor(target.x, target.y, args, text=False)
    assert (h_s(target.x).argmax(1) == target.y).float().mean() > 0.95 and not h_s.weight.requires_grad
    again = recraft.train_source_predictor(target.x, target.y, args, text=False)
    assert torch.equal(h_s.weight, again.weight)
    few, args = torch.arange(40), recraft.replace(args, as_released=True)
    for text, epochs in ((True, 30), (False, 20)):  # R9: for text, the softmax of a softmax
        released = recraft.train_source_predictor(target.x[few], target.y[few], args, text)
        seed_everything("source predictor", args.seed)
        by_hand = nn.Linear(8, 6)
        optimizer = torch.optim.AdamW(by_hand.parameters(), lr=1e-4, weight_decay=0.05)
        for index in itertools.chain(*(torch.randperm(40).split(4) for _ in range(epochs))):
            p = by_hand(target.x[index]).softmax(1)
            nn.functional.nll_loss((p.softmax(1) if text else p).log(), target.y[index]).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert torch.allclose(released.weight, by_hand.weight, atol=1e-5)


# ---- end to end


def test_recraft_trains_the_embedder_only_and_keeps_it(script, tmp_path):
    options = [*SHORT[:-1], 1, "--align-epochs", 2, "--label-epochs", 1, "--label-lr", 1e-3]
    said = script("recraft.py", *options, out=tmp_path)
    folder = tmp_path / "spherical-recraft-tiny-swin-s0-toy"
    lines = rows(folder)
    assert "a source predictor is right for" in said and [row.get("stage") for row in lines] == [1, 1, 1, 1, None]
    assert set(lines[0]) == {"stage", "epoch", "distance", "H(Z)", "H(Z|Z')", "I(Z;Z')", "I, other labels"}
    assert lines[2]["distance"] < lines[0]["distance"]
    kept, source = load_file(folder / "stage1.safetensors"), common.load_source("tiny-swin")
    assert kept.keys() == {f"embedder.{k}" for k in source.embedder.state_dict()}
    assert not torch.equal(kept["embedder.project.weight"], source.embedder.project.weight)
    before = weights(folder)
    for name in ("last.pt", "result.json", "best.safetensors", "metrics.jsonl"):
        (folder / name).unlink()
    assert "resumed after stage 1, with its 4 rows" in script("recraft.py", *options, "--resume", out=tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in weights(folder).items())
    script("recraft.py", *options, "--freeze-embedder", out=tmp_path / "frozen")
    after = weights(tmp_path / "frozen" / folder.name)
    assert all(torch.equal(after[name], value) for name, value in kept.items())
    encoder = {f"encoder.{name}": value for name, value in source.encoder.named_parameters()}
    assert any(not torch.equal(after[name], value) for name, value in encoder.items())


def test_encoder_and_source_predictor_are_bit_identical_after_stage_1(tmp_path, monkeypatch):
    found = {}

    def spy(embedder, features, h_s, *rest):
        original(embedder, features, h_s, *rest)
        found.update(encoder=features.args[0].state_dict(), h_s=h_s.weight.clone(), training=features.args[0].training)
        raise KeyboardInterrupt

    def predictor(*arguments):
        trained = train(*arguments)
        found.setdefault("weight", trained.weight.clone())  # of the first; the second is only measured
        return trained

    original, train = recraft.learn_embedder, recraft.train_source_predictor
    monkeypatch.setattr(recraft, "learn_embedder", spy)
    monkeypatch.setattr(recraft, "train_source_predictor", predictor)
    args = recraft.Args(scale="tiny", data_dir=str(tmp_path / "none"), out_dir=str(tmp_path), n_train=64, epochs=1,
                        align_epochs=2, label_epochs=2, source_samples=50)  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        recraft.main(args)
    source = common.load_source("tiny-swin").encoder.state_dict()
    assert all(torch.equal(value, found["encoder"][name]) for name, value in source.items()) and not found["training"]
    assert torch.equal(found["h_s"], found["weight"])


@pytest.mark.parametrize("permuted", [True, False])
def test_a_source_predictor_that_knows_nothing_is_reported(permuted, tmp_path, monkeypatch, capsys):
    def labels(split, seed):
        y = class_labels(split, seed=seed)
        return y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))] if permuted else y

    class_labels = data.class_labels
    monkeypatch.setattr(data, "class_labels", labels)
    features = lambda encoder, autocast, embedder, split, index: nn.functional.one_hot(class_labels(split, seed=0)[index], 9)
    monkeypatch.setattr(recraft, "encode", lambda *a: features(*a).float())  # that say all of the labels
    monkeypatch.setattr(recraft, "learn_embedder", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    args = recraft.Args(scale="tiny", data_dir=str(tmp_path), out_dir=str(tmp_path), n_train=64, epochs=1)
    with pytest.raises(KeyboardInterrupt):
        recraft.main(args)
    said = capsys.readouterr().out
    right = float(re.search(r"is right for (\d\.\d\d) of held-out samples", said)[1])
    assert ("near chance" in said) == permuted == (right < 0.2) == (right != 1)  # the samples it is trained on always fit


def test_recraft_passes_its_options_on(tmp_path, monkeypatch):
    found, start, make = {}, {}, common.make_embedder
    monkeypatch.setattr(common, "make_embedder", lambda *a, **k: found.setdefault("embedder", make(*a, **k)))
    monkeypatch.setattr(recraft.Run, "distribute", lambda run, net: found.setdefault("net", net))
    monkeypatch.setattr(recraft, "make_optimizer", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    for init in ("copy", "random"):
        found.clear()
        out = tmp_path / init
        args = recraft.Args(task="satellite", scale="tiny", data_dir=str(out), out_dir=str(out), n_train=64, init=init,
                            dropout=0.25, align_epochs=0, label_epochs=0, source_samples=50)  # fmt: skip
        with pytest.raises(KeyboardInterrupt):
            recraft.main(args)
        start[init] = found["embedder"].positions.clone()
        assert any(m.p == 0.25 for m in found["net"].modules() if isinstance(m, nn.Dropout))
    assert not torch.equal(start["copy"], start["random"])
