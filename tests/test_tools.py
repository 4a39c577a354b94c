"""The tools, on the smallest thing each can do."""

import csv
import io
import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

import backbones
import cli
import common
import data
import pare


def test_pretraining_writes_weights_that_are_a_backbone_and_their_card(script, tmp_path):
    rng = np.random.default_rng(0)
    for name in [f"train/n{c:03}/images/n{c:03}_{i}.JPEG" for c in range(200) for i in range(2)] + ["val/images/val_0.JPEG"]:
        path = tmp_path / "tiny-imagenet-200" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file, "JPEG")
        path.write_bytes(file.getvalue())
    (tmp_path / "tiny-imagenet-200/val/val_annotations.txt").write_text("val_0.JPEG\tn007\t0\t0\t9\t9\n")
    small = ["--size", 16, "--window", 2, "--width", 32, "--depths", 1, 1, "--epochs", 1, "--batch-size", 100, "--no-compile"]
    script("tools/pretrain.py", "images", "--data-dir", tmp_path, *small, out=tmp_path / "small")
    card = (tmp_path / "small.md").read_text()
    assert "400 training images (2 a class)" in card and "1 of 1 epochs" in card
    source = common.load_source(str(tmp_path / "small.safetensors"))
    assert (source.size, source.token_width, source.feature_width) == (16, 32, 64)
    assert source.encoder(source.embedder(torch.randn(2, 3, 64, 64))).shape == (2, 4, 64)


def test_reproduce_skips_what_is_finished_and_prints_the_tables(script, tmp_path):
    few = ["--tasks", "openml1510", "--n-train", 64, "--options=--epochs 1"]
    command = ["tools/reproduce.py", "--methods", "naive-random", "--seeds", 2, *few]
    table = script(*command, out=tmp_path)
    files = sorted(tmp_path.glob("naive-random/*/result.json"))
    errors = [json.loads(file.read_text())["test"] for file in files]
    assert len(files) == 2 and f"| naive-random | {np.mean(errors):.4f} ± {np.std(errors, ddof=1):.4f} |" in table
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [(row["method"], float(row["test"])) for row in rows] == [("naive-random", error) for error in errors]
    before = [file.stat().st_mtime_ns for file in files]
    assert script(*command, out=tmp_path) == table and [file.stat().st_mtime_ns for file in files] == before


def test_reproduce_compares_methods_in_pairs(capsys):
    from tools import reproduce

    rows = [
        {"task": task, "method": method, "seed": seed, "test": error, "test_last": error}
        for task, scale in (("a", 1.0), ("b", 10.0))
        for seed in range(4)
        for method, error in (("naive", scale * (1 + 0.1 * seed)), ("pare", scale * (0.9 + 0.1 * seed)))
    ]
    reproduce.paired(rows)
    line = capsys.readouterr().out.splitlines()[-1]  # always 0.1 better, of a mean of 1.15: 8 pairs of one sign, p = 2 / 2^8
    assert line == "| pare | 2 | 8 | 8, 0 | -8.7 % | 0.0078 | -8.7 % | 0.0078 |"


def test_the_profile_compares_with_the_best_on_each_task(tmp_path):
    from tools import reproduce

    errors = {"naive": (0.2, 4.0, 0.0), "pare": (0.1, 6.0, 0.0), "orca": (0.1, 4.0, 0.5)}
    rows = [
        {"task": task, "method": method, "test": error * factor}
        for method, of_method in errors.items()
        for task, error in zip("abc", of_method, strict=True)
        for factor in (0.9, 1.1)  # two seeds, whose mean counts
    ] + [{"task": "a", "method": "mona", "test": 0.01}]  # did not run everywhere
    factors = reproduce.profile(rows, tmp_path / "profile.png")
    assert {m: pytest.approx(f) for m, f in factors.items()} == {
        "naive": [1, 1, 2], "pare": [1, 1, 1.5], "orca": [1, 1, float("inf")],
    }  # fmt: skip
    assert (tmp_path / "profile.png").stat().st_size > 5000


def test_a_variant_differs_from_its_method_in_what_it_says(script, tmp_path):
    few = ["--tasks", "cifar100", "--n-train", 64, "--options=--epochs 1 --batch-size 16", "--seeds", 1]
    variants = ["pare-highest", "pare-frozen-gate", "orca-freeze-embedder", "naive-test"]
    script("tools/reproduce.py", "--methods", "pare", *variants, *few, out=tmp_path)
    last = lambda variant, name: torch.load(tmp_path / variant / f"cifar100-{name}-tiny-swin-s0-toy/last.pt")
    plain, highest, frozen = last("", "pare"), last("pare-highest", "pare"), last("pare-frozen-gate", "pare")
    assert not torch.equal(plain["net"]["predictor_s.linear.weight"], highest["net"]["predictor_s.linear.weight"])
    trained = [len(state["optimizer"]["param_groups"][0]["params"]) for state in (plain, frozen)]
    assert trained[0] - trained[1] == 2  # the gate's weight and bias
    aligned = common.load_file(next((tmp_path / "orca-freeze-embedder").glob("*/stage1.safetensors")))
    after = last("orca-freeze-embedder", "orca")["net"]
    assert all(torch.equal(value, after[key]) for key, value in aligned.items())
    row = json.loads((tmp_path / "naive-test/cifar100-naive-tiny-swin-s0-toy/result.json").read_text())
    assert row["val"] == row["test"]


def test_runs_of_other_options_are_not_taken_for_these_and_toys_not_for_real_data(script, tmp_path):
    from tools import reproduce

    command = ["tools/reproduce.py", "--tasks", "openml187", "--methods", "logistic", "--seeds", 1]
    script(*command, out=tmp_path)
    assert "Give these another --out-dir" in script(*command, "--n-train", 20, out=tmp_path, code=2)
    row = {"task": "a", "method": "naive", "seed": 0, "scale": "tiny"}
    for folder, kind, error in (("a-naive-b-s0", "official", 0.8), ("a-naive-b-s0-toy", "toy", 0.1)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "result.json").write_text(json.dumps(row | {"data": kind, "test": error}))
    assert [r["test"] for r in reproduce.collect(tmp_path) if r["task"] == "a"] == [0.8]


def test_a_class_that_training_lacks_does_not_shift_the_others():
    from types import SimpleNamespace

    from tools import references

    y, y_test = torch.tensor([0, 2, 3, 4]).repeat(20), torch.arange(5).repeat(4)
    split = lambda y: SimpleNamespace(inputs=lambda _: torch.nn.functional.one_hot(y, 5).float()[:, None], y=y, classes=5)
    out = references.logistic(SimpleNamespace(train=split(y), test=split(y_test)), 0)
    assert out.shape == (20, 5) and ((out.argmax(1) != y_test) == (y_test == 1)).all()


def test_a_reference_is_scored_like_a_method(script, tmp_path):
    from sklearn.datasets import load_breast_cancer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    table = script("tools/reproduce.py", "--tasks", "openml1510", "--methods", "logistic", "--seeds", 1, out=tmp_path)
    row = json.loads((tmp_path / "openml1510-logistic-s0/result.json").read_text())
    loaded = data.load("openml1510", tmp_path, tmp_path, "tiny", 5000, 0)
    x, y = loaded.train.inputs(slice(None)).flatten(1).numpy(), loaded.train.targets(slice(None)).numpy()
    shift, scale = x.mean(0), x.std(0)
    model = LogisticRegression(max_iter=2000).fit((x - shift) / scale, y)
    x, y = loaded.test.inputs(slice(None)).flatten(1).numpy(), loaded.test.targets(slice(None)).numpy()
    by_hand = 1 - roc_auc_score(y, model.predict_proba((x - shift) / scale)[:, 1])
    assert row["test"] == pytest.approx(by_hand, abs=1e-3) and f"| logistic | {row['test']:.4f}" in table
    assert len(load_breast_cancer().target) == len(loaded.train) + len(loaded.val) + len(loaded.test)


def test_the_operator_that_the_bench_compares_with_makes_the_same_hard_choice():
    from tools import bench

    scores = torch.rand(3, 40)
    for k in (1, 7, 39):
        assert torch.equal(bench.n_softmaxes(scores, k).round(), bench.OPERATORS["threshold (ours)"](scores, k))


def test_every_rung_of_the_bench_takes_a_step_and_two_passes_equal_the_stacked_one():
    from tools import bench

    device, ends, counts = torch.device("cpu"), [], []
    for method, ladder in (("pare", bench.LADDER), ("mona", ("finite difference",)), ("finetune", ())):
        splits = bench.make_splits(method, device, 64)
        batch = [part for split in splits for part in next(split.batches(1, 4, 0, 0))]
        for have in ((), tuple(rung for rung in ladder if rung not in ("bf16", "compile"))):
            _, _, step = bench.build(method, "tiny", have, device, pare.replace_patches)
            with bench.Operations() as counter:
                ends.append([step(*batch).item() for _ in range(2)])
            counts.append(counter.total)
    assert ends[0] == pytest.approx(ends[1], rel=1e-4)  # PaRe: one sample after the other, and all at once
    assert ends[2] == pytest.approx(ends[3], rel=1e-4)  # MoNA: exact, and finite difference
    assert counts[0] == pytest.approx(counts[1], rel=0.01)  # the same arithmetic, stacked or not
    assert 2.9 < counts[3] / counts[4] < 3.5 and 1.9 < counts[0] / counts[4] < 2.1  # in steps of fine-tuning
    loaded = next(iter(bench.loader(splits[0], 4, 1, 0, device)))
    assert loaded[0].shape == batch[0].shape and loaded[0].dtype == batch[0].dtype


def test_the_picture_of_the_idea_can_be_drawn_again(script, tmp_path):
    script("tools/figures.py", "idea", out=tmp_path, option="--out")
    assert Image.open(tmp_path / "idea.png").size[0] > 1000


def test_torch_and_torchvision_that_do_not_fit_cost_two_lines(monkeypatch):
    import builtins

    real = builtins.__import__

    def broken(name, *rest):
        if name == "timm":
            raise RuntimeError("operator torchvision::nms does not exist")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", broken)
    with pytest.raises(cli.UserError, match="do not fit together") as error:
        backbones.import_timm()
    assert len(str(error.value).splitlines()) == 2


def test_the_probe_measures_what_a_run_left_of_the_source(script, tmp_path, capsys):
    from tools import figures

    rng = np.random.default_rng(0)
    folder = tmp_path / "data" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name, n in (("data_batch_1", 200), ("test_batch", 100)):  # brightness hints at the class
        y = rng.integers(0, 10, n)
        x = (15 * y[:, None] + rng.integers(0, 60, (n, 1)) + rng.integers(0, 50, (n, 3072))).astype(np.uint8)
        (folder / name).write_bytes(pickle.dumps({b"data": x, b"labels": y.tolist()}))
    script("finetune.py", "--task", "spherical", "--scale", "tiny", "--n-train", 64, "--epochs", 1, out=tmp_path)
    naive, kept = tmp_path / "spherical-naive-tiny-swin-s0-toy", tmp_path / "kept"
    kept.mkdir()  # a run of PaRe that left the encoder as it was
    (kept / "result.json").write_text((naive / "result.json").read_text().replace("naive", "pare"))
    pretrained = common.load_source("tiny-swin").encoder.state_dict()
    torch.save({"net": {f"model.encoder.{k}": v for k, v in pretrained.items()}}, kept / "last.pt")
    figures.probe(figures.Args("probe", (str(naive), str(kept)), str(tmp_path / "data")))
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[4:]]
    errors = {row[1]: (float(row[3].split()[0]), float(row[4])) for row in table}
    assert errors["pare"][0] == errors["pare"][1] == errors["naive"][1] < 0.85
    assert 0 <= errors["naive"][0] < 0.9 and errors["naive"][0] != errors["naive"][1]
    with pytest.raises(cli.UserError, match="holds no finished run"):
        figures.probe(figures.Args("probe", (str(tmp_path),), str(tmp_path / "data")))


@pytest.mark.parametrize("way", ["fine-tuning step", "finite-difference"])
def test_the_bench_runs_the_steps_it_compares(way):
    from tools import bench

    seconds, megabytes = bench.one_meta_step(way, "tiny-swin", 2)
    assert seconds > 0 and megabytes >= 0
