"""The figures of finished runs: what they measure is true, they read the right runs, and every command draws its picture."""

import functools
import io
import pickle

import numpy as np
import pytest
import torch
import tyro
from helpers import NAIVE, PARE, two_runs
from PIL import Image

import cli
import common
from tools import figures


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A toy run of PaRe and one of naive fine-tuning; beside them a CIFAR-10 and a Tiny-ImageNet of a few pictures."""
    out = tmp_path_factory.mktemp("runs")
    two_runs(out)
    rng = np.random.default_rng(0)
    folder = out / "data/cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name, n in (("data_batch_1", 80), ("test_batch", 60)):
        x, y = rng.integers(0, 256, (n, 3072), dtype=np.uint8), np.arange(n) % 10
        (folder / name).write_bytes(pickle.dumps({b"data": x, b"labels": y.tolist()}))
    for i in range(36):
        path = out / f"data/tiny-imagenet-200/train/n{i % 12:03}/images/n{i % 12:03}_{i}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file, "JPEG")
        path.write_bytes(file.getvalue())
    return out


@pytest.fixture
def use(runs, tmp_path):
    """Runs a command as the command line would; its picture is looked at."""

    def run(what, *words, data_dir="none", picture=True):
        options = [what, *map(str, words), "--data-dir", str(runs / data_dir), "--out", str(tmp_path / "out")]
        found = figures.main(tyro.cli(figures.Args, args=options))
        if picture:
            file = tmp_path / f"out/{what}.png"
            pixels = np.asarray(Image.open(file).convert("L"))
            assert pixels.std() > 5 and pixels.shape[1] < 1550 and file.stat().st_size < 300_000
        return found

    return run


@pytest.fixture(scope="module")
def rebuilt(runs):
    return figures.rebuild(runs / PARE, figures.Args("path", data_dir=str(runs / "none")), "pare")


def test_a_rebuilt_run_scores_as_it_did(rebuilt):
    with torch.no_grad():
        test = rebuilt.loaded.test
        out = rebuilt.model(test.inputs(torch.arange(len(test))))
    score = rebuilt.loaded.task.score(out.numpy(), test.y.numpy())
    assert score == pytest.approx(rebuilt.result["test_last"], abs=2e-3)


def test_intermediate_samples_go_from_the_target_to_the_source(rebuilt):
    index = torch.arange(20)
    source, *mixed = figures.between(rebuilt, index, index, [0, 20, 64])
    with torch.no_grad():
        target = rebuilt.model.embedder(rebuilt.loaded.train.inputs(index)).mean(1)
    assert torch.allclose(mixed[0], target, atol=1e-5) and torch.allclose(mixed[2], source, atol=1e-5)
    assert not torch.allclose(mixed[1], target, atol=1e-2) and not torch.allclose(mixed[1], source, atol=1e-2)


def test_path_begins_at_the_target(use, runs):
    ks, to_source, to_target = use("path", runs / PARE)
    assert ks == [8 * i for i in range(9)]
    assert abs(to_target[0]) < 1e-3 < min(to_target[1:]) and 0 < to_source[8] < to_source[0]


def test_chosen_samples_are_of_so_many_classes(rebuilt):
    index, y = figures.draw_of_classes(rebuilt.source_set, 20, 3)
    assert len(index.unique()) == 20 and len(y.unique()) == 3 and torch.equal(y, rebuilt.source_set.y[index])
    assert not torch.equal(index, figures.draw_of_classes(rebuilt.source_set, 20, 3, seed=1)[0])


def test_the_landscape_has_the_loss_in_the_middle_and_directions_as_long_as_the_filters(rebuilt):
    model, train = rebuilt.model, rebuilt.loaded.train
    x, y = train.inputs(torch.arange(16)), train.y[:16]
    before = {name: w.clone() for name, w in model.state_dict().items()}
    values = figures.surface(model, train.loss, x, y, [-0.5, 0.0, 0.25])
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())
    with torch.no_grad():
        assert values[1, 1] == pytest.approx(float(train.loss(model(x), y)), rel=1e-5)
        d1, d2 = figures.directions(model)
        for name, w in model.named_parameters():  # by hand: down is the second direction, right the first
            lengths = [t.flatten(1).norm(dim=1) if t.ndim > 1 else torch.zeros(1) for t in (d1[name], d2[name], w)]
            assert torch.allclose(lengths[0], lengths[2]) and torch.allclose(lengths[1], lengths[2])
            assert w.ndim > 1 or not d1[name].any()
            w += 0.25 * d1[name] - 0.5 * d2[name]
        assert values[0, 2] == pytest.approx(float(train.loss(model(x), y)), rel=1e-4)
        model.load_state_dict(before)
    assert values[0, 2] != values[2, 0] != values[1, 1]


def test_the_gate_keeps_its_highest_scored_patches_and_exactly_so_many(use, runs, rebuilt):
    k, (keep, chance, take) = use("patches", runs / PARE)
    assert k == 32 and all((mask.sum(1) == n).all() for mask, n in ((keep, 64 - k), (chance, 64 - k), (take, k)))
    index, _ = figures.pairs_of(rebuilt, len(keep))
    with torch.no_grad():
        scores = rebuilt.gate(rebuilt.model.embedder(rebuilt.loaded.train.inputs(index)))
    assert (scores.where(keep == 1, 1).amin(1) >= scores.where(keep == 0, 0).amax(1)).all()
    assert (keep != chance).any(1).all()


def test_a_dimmed_picture_shows_the_kept_patches_as_they_are():
    picture, mask = torch.rand(1, 8, 8, 3), torch.tensor([[0.0, 1.0, 0.0, 0.0]])
    shown = figures.dimmed(picture, mask, figures.TARGET)
    assert torch.equal(shown[0, :4, 4:], picture[0, :4, 4:]) and (shown[0, 4:] != picture[0, 4:]).all()
    assert shown[0, 4:].min() > 0.7 and shown.max() <= 1


def test_knowledge_discrepancy_is_0_for_classes_of_the_source_and_does_not_know_their_order():
    assert figures.mismatch(np.eye(5)[[3, 1, 4]]) == 0
    assert figures.mismatch(np.tile([0.1, 0.2, 0.3, 0.4], (3, 1))) == pytest.approx(1 - 1 / 3)
    P = np.random.default_rng(0).dirichlet(np.ones(8), 5)
    assert figures.mismatch(P[:, ::-1]) == pytest.approx(figures.mismatch(P))
    assert figures.mismatch(P[[4, 0, 2, 1, 3]]) == pytest.approx(figures.mismatch(P))
    # 0.5 + 0.4 is more than 0.6 + 0.1, which the first class would take by itself; then rows (0.5, 0.6) and (0.1, 0.4)
    assert figures.mismatch(np.array([[0.6, 0.5], [0.4, 0.1]])) == pytest.approx(1 - (0.5 / 1.1 + 0.4 / 0.5) / 2)


def test_discrepancy_is_drawn_for_the_tasks_asked_for(use, runs, monkeypatch, tmp_path):
    monkeypatch.setitem(figures.COMMANDS, "discrepancy", (0, 9, functools.partial(figures.discrepancy, n=60, draws=2)))
    found = use("discrepancy", "cifar100", "ninapro", "--out-dir", tmp_path, data_dir="data")
    assert list(found) == ["cifar100\n(toy)", "ninapro\n(toy)"]
    assert all(len(values) == 2 and 0 < min(values) <= max(values) < 1 for values in found.values())


def test_forgetting_varies_one_thing_in_each_panel(use, monkeypatch):
    def probes(args):
        for task, epochs, variant, error in (
            ("cifar100", 12, "naive", 0.4), ("cifar100", 12, "naive", 0.5), ("cifar100", 24, "naive-long", 0.6),
            ("darcy", 12, "naive", 0.7), ("cifar100", 12, "mona", 0.3), ("darcy", 24, "mona", 0.9),
        ):  # fmt: skip
            result = {"task": task, "epochs": epochs, "variant": variant, "method": variant.split("-")[0]}
            yield result | {"backbone": "tiny-swin"}, error, 0.25

    monkeypatch.setattr(figures, "probes", probes)
    found = use("forgetting", "RUN")
    means = {title: {name: round(mean, 6) for name, (mean, _) in groups.items()} for title, groups in found.items()}
    assert means == {
        "by task": {"cifar100": 0.45, "darcy": 0.7},
        "by epochs": {"12": 0.45, "24": 0.6},
        "by method": {"naive": 0.45, "mona": 0.3},
    }


@pytest.mark.matrix
def test_the_other_pictures_can_be_drawn(use, runs, monkeypatch, capsys):
    monkeypatch.setitem(figures.COMMANDS, "landscape", (2, 2, functools.partial(figures.landscape, side=3, n=8)))
    left, right = use("landscape", runs / PARE, runs / NAIVE)
    assert left.shape == right.shape == (3, 3) and "in the corners" in capsys.readouterr().out
    assert use("embeddings", runs / PARE).shape == (5, 64, 2)
    use("source", runs / PARE, data_dir="data")
    use("probe", runs / PARE, runs / NAIVE, data_dir="data", picture=False)
    printed = capsys.readouterr().out
    probed = [line.split("|")[5].split()[0] for line in printed.splitlines() if line.startswith("| cifar100")]
    assert f"cifar100, pare: probe error {probed[0]}" in printed and len(probed) == 2
    use("forgetting", runs / PARE, runs / NAIVE, data_dir="data")


def test_mistakes_are_told(use, runs, tmp_path):
    for what, words, message in (
        ("path", [runs / NAIVE], "is a run of naive; path needs one of pare"),
        ("path", [], "takes 1 folder.s. of finished runs; 0 given"),
        ("landscape", [runs / NAIVE], "takes 2 folder.s. of finished runs; 1 given"),
        ("forgetting", [runs / PARE], "differ in their task"),
    ):
        with pytest.raises(cli.UserError, match=message):
            use(what, *words, data_dir="data")
    torch.save({"net": {"model.encoder.x": torch.zeros(1), "A.0": torch.zeros(1)}}, tmp_path / "last.pt")
    with pytest.raises(cli.UserError, match="is a LoRA run"):
        figures.weights(tmp_path)
    with pytest.raises(cli.UserError, match="has no last.pt"):
        figures.weights(tmp_path / "pruned")


def test_a_run_is_not_rebuilt_on_other_data(use, runs, tmp_path):
    other = tmp_path / PARE
    other.mkdir()
    for name in ("result.json", "last.pt"):
        (other / name).symlink_to(runs / PARE / name)
    (other / "args.json").write_text((runs / PARE / "args.json").read_text().replace('"toy"', '"official"'))
    with pytest.raises(cli.UserError, match="was trained on official data"):
        use("embeddings", other)


def test_the_probe_measures_what_a_run_left_of_the_source(script, tmp_path, capsys):
    rng = np.random.default_rng(0)
    folder = tmp_path / "data" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name, n in (("data_batch_1", 200), ("test_batch", 100)):  # brightness hints at the class
        y = rng.integers(0, 10, n)
        x = (15 * y[:, None] + rng.integers(0, 60, (n, 1)) + rng.integers(0, 50, (n, 3072))).astype(np.uint8)
        (folder / name).write_bytes(pickle.dumps({b"data": x, b"labels": y.tolist()}))
    script("finetune.py", "--task", "spherical", "--scale", "tiny", "--n-train", 64, "--epochs", 1, "--lr", 0.02, out=tmp_path)
    naive, kept = tmp_path / "spherical-naive-tiny-swin-s0-toy", tmp_path / "kept"
    kept.mkdir()  # a run of PaRe that left the encoder as it was
    (kept / "result.json").write_text((naive / "result.json").read_text().replace("naive", "pare"))
    (kept / "args.json").write_text((naive / "args.json").read_text())
    pretrained = common.load_source("tiny-swin").encoder.state_dict()
    torch.save({"net": {f"model.encoder.{k}": v for k, v in pretrained.items()}}, kept / "last.pt")
    figures.probe(figures.Args("probe", (str(naive), str(kept)), str(tmp_path / "data")))
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[4:]]
    errors = {row[1]: (float(row[4].split()[0]), float(row[5])) for row in table}
    assert errors["pare"][0] == errors["pare"][1] == errors["naive"][1] < 0.85
    assert 0 <= errors["naive"][0] < 0.9 and errors["naive"][0] != errors["naive"][1]
    with pytest.raises(cli.UserError, match="have a seed twice"):
        figures.probe(figures.Args("probe", (str(naive), str(naive)), str(tmp_path / "data")))
    with pytest.raises(cli.UserError, match="holds no finished run"):
        figures.probe(figures.Args("probe", (str(tmp_path),), str(tmp_path / "data")))


def test_the_picture_of_the_idea_can_be_drawn_again(script, tmp_path):
    script("tools/figures.py", "idea", out=tmp_path, option="--out")
    assert Image.open(tmp_path / "idea.png").size[0] > 1000


def test_scores_keep_the_half_that_they_say(use, monkeypatch):
    tokens, scores = torch.arange(8.0).view(1, 4, 2), torch.tensor([[0.3, 0.1, 0.4, 0.2]])
    kept = figures.without_half(lambda t: t, tokens, scores)  # tokens 1 and 3 become the mean token (3, 4)
    assert torch.equal(kept, torch.tensor([[(0 + 3 + 4 + 3) / 4, (1 + 4 + 5 + 4) / 4]]))
    found = use("scores", picture=False)
    assert len(found) == 5 and all(-1 <= cosine <= 1 for pair in found.values() for cosine in pair)
    assert found["attention rollout"][0] != found["chance"][0]
