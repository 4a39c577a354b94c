"""A finished run answers for new samples: as it was tested, without its data and its backbone; mistakes print two lines.

test_matrix.py does the same for every task and method on toy data and simulated fields.
"""

import functools
import os
import pickle
import shutil

import h5py
import numpy as np
import official
import pytest
import torch
from helpers import here, result, score
from safetensors.torch import load_file, save_file
from sklearn.model_selection import train_test_split

import cli
import data
import predict
from run import load
from tasks import scores, tables

RNG = np.random.default_rng(0)
ONE_STEP = ["--scale", "tiny", "--mode", "probe", "--epochs", 1, "--steps-per-epoch", 1, "--batch-size", 4]


def trained(out, task, *options):
    """The folder of a run of one step on the official files in out/none."""
    here("finetune.py", "--task", task, *ONE_STEP, *options, out=out)
    return next(path.parent for path in out.glob(f"{task}-*/result.json"))


# ---- official files: x and y of the test set as they are in there, and the units in which fields are compared


def cifar100(folder):
    official.write_cifar100(folder)
    content = pickle.loads((folder / "cifar-100-python/test").read_bytes())
    return content[b"data"].reshape(-1, 3, 32, 32), np.array(content[b"fine_labels"])


def satellite(folder):
    x = official.write_satellite(folder)
    return x.astype(np.float64)[:, None], np.arange(30) % 24


def darcy(folder):
    test = official.write_darcy(folder, 5)[1]
    return test["coeff"][:, None, ::5, ::5], np.float32(test["sol"][:, ::5, ::5])


def cosmic(folder):
    official.write_cosmic(folder)
    (_, _), (x, y), _ = data.TASKS["cosmic"].read(folder, None)
    return x, y


def fsd50k(folder):
    sounds = official.write_fsd50k(folder)
    y = np.zeros((10, 201), np.float32)
    names = [name for name in sounds if name.startswith("eval")]
    for row, name in enumerate(names):
        clip = int(name.split("_")[1])
        y[row, [clip, 199 - clip, 200]] = 1, 1, clip
    x = np.stack([sounds[name] / 2**15 for name in names])[:, None]
    return np.concatenate([x, 0 * x], axis=1), y


def navier_stokes1d(folder):
    with h5py.File(official.write_pde("navier_stokes1d", folder)) as h5:
        x, y = (np.concatenate([h5[name][:, t] for name in ("density", "pressure", "Vx")], axis=1) for t in (0, 100))
    mean, std = x[2:].mean(0), x[2:].std(0, ddof=1) + 1e-5
    return x[:2, None], y[:2, None], lambda field: (field - mean) / std


def openml900(folder):
    """Numbers and categories, of both of which some are missing."""
    rows = [["?" if i % 9 == 4 else RNG.normal(), "?" if i % 7 == 3 else "abc"[i % 3], 3 * RNG.normal(), "uv"[i % 2],
             "xy"[int(RNG.random() < 0.4)]] for i in range(80)]  # fmt: skip
    columns = [("n", None), ("c", ["a", "b", "c"]), ("m", None), ("d", ["u", "v"]), ("label", ["x", "y"])]
    official.write_openml(folder, 900, columns, rows)
    code = {"?": np.nan} | {name: i for name in ("abc", "uv", "xy") for i, name in enumerate(name)}
    values = np.array([[code.get(cell, cell) for cell in row] for row in rows], np.float64)
    test = train_test_split(np.arange(80), test_size=0.1, random_state=0, stratify=values[:, 4])[1]
    return values[test, :4], values[test, 4].astype(int)


@pytest.mark.parametrize("write", [cifar100, satellite, darcy, cosmic, fsd50k, navier_stokes1d, openml900])
def test_answers_for_the_official_test_set_have_the_error_of_the_run(script, tmp_path, write):
    task, files = write.__name__, tmp_path / "none"
    files.mkdir()
    x, y, *units = write(files)
    folder = trained(tmp_path, task)
    shutil.rmtree(files)
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    np.save(tmp_path / "x.npy", x)
    said = script("predict.py", folder, tmp_path / "x.npy", out=tmp_path / "new/answers.npy", option="-o")
    answers = np.load(tmp_path / "new/answers.npy")
    _, found = load(folder)
    assert answers.dtype == np.float32 and answers.shape == (len(x), *found.output) and data.by_x(answers.shape) in said
    if found.target == "class":
        assert np.allclose(answers.sum(1), 1, atol=1e-6)
    if found.target != "field" or task == "cosmic":
        assert 0 <= answers.min() and answers.max() <= 1
    assert ("fields" if found.target == "field" else "probabilities") in said
    there = units[0] if units else lambda field: field
    assert score(found, there(answers), there(y)) == pytest.approx(result(folder)["test"], rel=1e-5, abs=1e-7)


def test_fields_are_in_the_units_of_the_files(tmp_path):
    """A predictor that says 0 answers with the mean of the training targets."""
    (tmp_path / "none").mkdir()
    train, test = official.write_darcy(tmp_path / "none", 5)
    model, task = load(trained(tmp_path, "darcy"))
    for parameter in model.predictor.parameters():
        parameter.data.zero_()
    answers = predict.predict(model, task, test["coeff"][:, None, ::5, ::5])
    assert np.allclose(answers, train["sol"][:, ::5, ::5].mean(0), rtol=1e-5)


# ---- the folder is enough


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run on toy spherical images, and its test images: (folder, x, y)."""
    out = tmp_path_factory.mktemp("finished")
    folder = trained(out, "spherical", "--n-train", 16)
    return folder, *data.TASKS["spherical"].toy(20, seed=1)


def test_the_backbone_is_not_needed(tmp_path):
    """A folder of timm and a folder of transformers, both gone."""
    import timm
    import transformers

    swin = dict(img_size=16, window_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2])
    text = dict(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    model = timm.create_model("swinv2_tiny_window8_256", num_classes=3, **swin)
    timm.models.save_for_hf(model, tmp_path / "swin", model_args=swin, safe_serialization=True)
    transformers.BertModel(transformers.BertConfig(**text)).save_pretrained(tmp_path / "bert")
    for backbone, task in (("swin", "cifar100"), ("bert", "satellite")):
        folder = trained(tmp_path, task, "--n-train", 8, "--backbone", tmp_path / backbone)
        shutil.rmtree(tmp_path / backbone)
        model, found = load(folder)
        x, y = data.TASKS[task].toy(data.TOY_TEST, seed=1)
        assert score(found, predict.predict(model, found, x), y) == pytest.approx(result(folder)["test"])


def test_the_model_is_that_of_the_best_epoch_in_evaluation_mode(finished):
    model, task = load(str(finished[0]))
    assert not model.training and task.output == (9,)  # the classes of the toy, not those of the task
    weights = load_file(finished[0] / "best.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_the_released_head_has_nothing_to_load(tmp_path, capsys):
    options = ["--task", "advection1d", "--scale", "tiny", "--as-released", "--n-train", 8, "--batch-size", 4]
    here("finetune.py", *options, "--epochs", 1, "--steps-per-epoch", 1, out=tmp_path)
    (folder,) = [path.parent for path in tmp_path.glob("*/result.json")]
    x, y = (np.load(next(tmp_path.glob(f"cache/*-test-*-{name}.npy")))[:, None] for name in "xy")
    model, task = load(folder)
    assert task.score(predict.predict(model, task, x), y) == pytest.approx(result(folder)["test"], rel=1e-5)


def test_answers_do_not_depend_on_the_size_of_a_batch(finished):
    folder, x, _ = finished
    one, most, turned = (predict.predict(*load(folder), v, batch_size=n) for v, n in ((x, 1), (x, 32), (x[::-1], 7)))
    assert np.allclose(one, most, atol=1e-6) and np.allclose(turned[::-1], most, atol=1e-6)
    assert np.ptp(most, axis=0).max() > 1e-4


def test_images_alone_are_scaled(tmp_path):
    """uint8 numbers of a task without images are numbers."""
    model, task = load(trained(tmp_path, "satellite", "--n-train", 8))
    x = RNG.integers(0, 9, (5, 1, 46), dtype=np.uint8)
    assert np.array_equal(predict.predict(model, task, x), predict.predict(model, task, x.astype(">f4")))


@pytest.mark.parametrize("target, loss", [
    ("class", functools.partial(scores.cross_entropy, weights=(3.0, 0.5, 1.0))),
    ("class", scores.cross_entropy),
    ("labels", functools.partial(scores.presence, positive=10.0)),
])  # fmt: skip
def test_probabilities_are_shares_also_if_the_loss_has_weights(target, loss):
    """The logits that minimise the loss on targets of one and the same input give the shares of the targets."""
    y = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 1, 2])
    share = torch.tensor([0.5, 0.4, 0.1])
    y = y if target == "class" else torch.nn.functional.one_hot(y, 3).float()  # (10,) or (10, 3)
    logits = torch.zeros(1, 3, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-9, tolerance_change=1e-12)

    def closure():
        optimizer.zero_grad()
        value = loss(logits.expand(10, 3), y)
        value.backward()
        return value

    optimizer.step(closure)
    task = data.replace(data.TASKS["satellite"], target=target, output=(3,), loss=loss, score=max)
    answers = predict.predict(lambda x: logits.expand(len(x), 3), task, np.zeros((2, 1, 46)))
    assert np.allclose(answers, share, atol=1e-4)


# ---- mistakes


def refused(folder, x, words):
    with pytest.raises(cli.UserError, match=words) as error:
        predict.predict(*load(folder), x, where="x.npy")
    assert len(str(error.value).splitlines()) <= 2 and str(error.value).startswith("x.npy")


def test_samples_of_another_kind_are_refused(finished, tmp_path):
    folder, x, _ = finished
    refused(folder, x / 255, "float64; expected images of type uint8")
    refused(folder, x[:, :, :50], r"holds \(20, 3, 50, 60\); expected \(n, 3, 60, 60\)")
    refused(folder, x[0], r"expected \(n, 3, 60, 60\)")
    refused(folder, x[:0], "no samples")
    series = trained(tmp_path, "satellite", "--n-train", 8)
    x = RNG.normal(size=(6, 1, 46))
    refused(series, x.astype(complex), "complex128; expected real numbers")
    refused(series, x.astype(str), "expected real numbers")
    x[4, 0, 2] = np.nan
    refused(series, x, "sample 4 has nan; expected a finite")
    x[4] = 3e38
    refused(series, x, "the prediction of sample 4 is not finite")


def test_rows_of_a_table_have_its_categories():
    """Columns: numbers, three categories, two; when it was read, nothing was missing in the second."""
    statistics = {"categories": np.array([0, 3, 2]), "mean": np.array([1.0]), "std": np.array([2.0]), "channels": np.array(3),
                  "weights": np.ones(2)}  # fmt: skip
    task = data.replace(data.TASKS["satellite"], shape=(3, 3), **tables.of_training_rows(statistics))
    x = predict.prepare(task, np.array([[5.0, 2, 1], [np.nan, 0, np.nan]]), "x.npy")  # categories first
    assert x[0].tolist() == [[0, 0, 2.0], [0, 1, 0], [1, 0, 0]] and x[1].tolist() == [[1, 0, -0.5], [0, 0, 0], [0, 1, 0]]
    for row, words in (([0, 3, 0], "column 1: sample 1 has 3.0; expected a whole number from 0 to 2"),
                       ([0, 0.5, 0], "column 1: sample 1 has 0.5"), ([0, np.nan, 0], "sample 1 lacks a category"),
                       ([np.inf, 0, 0], "sample 1 has inf")):  # fmt: skip
        with pytest.raises(cli.UserError, match=f"x.npy.*{words}"):
            predict.prepare(task, np.array([[0, 0, 0], row]), "x.npy")
    numbers = statistics | {"categories": np.array([0]), "channels": np.array(1)}
    task = data.replace(task, shape=(1, 1), **tables.of_training_rows(numbers))
    with pytest.raises(cli.UserError, match="sample 0 has nan"):
        predict.prepare(task, np.array([[np.nan]]), "x.npy")
    with pytest.raises(cli.UserError, match=r"expected \(n, 1\)"):
        predict.prepare(task, np.zeros((2, 3)), "x.npy")


def test_folders_that_hold_no_finished_run_are_refused(script, finished, tmp_path):
    np.save(tmp_path / "x.npy", finished[1])

    def refused(words, folder):
        error = script("predict.py", folder, tmp_path / "x.npy", out=tmp_path / "answers.npy", option="-o", code=2)
        assert words in error and len(error.splitlines()) <= 2 and not (tmp_path / "answers.npy").exists()

    refused("holds no finished run", tmp_path / "nowhere")
    for name in ("result.json", "args.json", "best.safetensors"):
        folder = tmp_path / f"without-{name}"
        shutil.copytree(finished[0], folder)
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        refused(name, folder)
        (folder / name).write_bytes(content[: len(content) // 2])
        refused(f"{name} is empty or cut short", folder)


def test_a_folder_of_an_earlier_version_says_how_to_complete_it(finished, tmp_path):
    folder = tmp_path / finished[0].name
    shutil.copytree(finished[0], folder)
    save_file(load_file(folder / "best.safetensors"), folder / "best.safetensors")
    said = "an earlier version wrote it.\nWith last.pt: remove .*result.json and repeat .* with --resume"
    with pytest.raises(cli.UserError, match=said):
        load(folder)
    (folder / "result.json").unlink()
    trained(tmp_path, "spherical", "--n-train", 16, "--resume")
    model, task = load(folder)
    assert predict.predict(model, task, finished[1][:5]).shape == (5, *task.output)


def test_answers_take_the_place_of_nothing_else(script, finished, tmp_path):
    np.save(tmp_path / "x.npy", finished[1][:2])
    before = (tmp_path / "x.npy").read_bytes()
    for out in (tmp_path / "x.npy", tmp_path):
        error = script("predict.py", finished[0], tmp_path / "x.npy", out=out, option="-o", code=2)
        assert "is the input file, or something else than a file" in error and (tmp_path / "x.npy").read_bytes() == before
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        assert "-o" in script("predict.py", finished[0], tmp_path / "x.npy", out=tmp_path / "pipe", option="-o", code=2)
        assert (tmp_path / "pipe").is_fifo()
        (tmp_path / "link.npy").symlink_to("real.npy")
        script("predict.py", finished[0], tmp_path / "x.npy", out=tmp_path / "link.npy", option="-o")
        assert (tmp_path / "link.npy").is_symlink() and len(np.load(tmp_path / "real.npy")) == 2
    error = script("predict.py", finished[0], tmp_path / "y.npy", out=tmp_path / "answers.npy", option="-o", code=2)
    assert "y.npy cannot be read: No such file" in error and len(error.splitlines()) == 1
