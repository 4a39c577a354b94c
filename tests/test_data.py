"""data.py: splits, batches, missing files, the table of tasks, downloads."""

import dataclasses
import io
import pickle
import re
import subprocess
import sys
import tarfile
import threading

import numpy as np
import pytest
import torch
from helpers import ROOT
from official import write_cifar100

import cli
import data
from tasks import files, images

# ---- load


def test_cifar100_is_channel_first_and_the_validation_split_is_held_out(tmp_path):
    folder = write_cifar100(tmp_path)
    raw = pickle.loads((folder / "train").read_bytes())
    loaded = data.load("cifar100", tmp_path, tmp_path / "cache", "full", n_train=20, seed=3)
    assert (len(loaded.train), len(loaded.val), len(loaded.test), loaded.train.kind) == (20, 2, 40, "official")
    assert loaded.train.x.dtype == torch.uint8 and loaded.train.x.shape == (20, 3, 32, 32)
    x = raw[b"data"].reshape(-1, 3, 32, 32)
    where = [int(np.flatnonzero((x == sample.numpy()).all((1, 2, 3)))[0]) for sample in [*loaded.train.x, *loaded.val.x]]
    assert len(set(where)) == 22  # no sample is in both
    assert [i % 100 for i in where[:20]] == loaded.train.y.tolist()
    first = (x[where[0]] / 255 - np.array(loaded.task.mean)[:, None, None]) / np.array(loaded.task.std)[:, None, None]
    assert np.allclose(loaded.train.inputs(torch.tensor([0]))[0], first, atol=1e-5)
    again, other = (data.load("cifar100", tmp_path, tmp_path, "full", 20, seed).train.x for seed in (3, 4))
    assert torch.equal(again, loaded.train.x) and not torch.equal(other, loaded.train.x)


def test_a_test_file_that_is_missing_is_not_called_present(tmp_path):
    (write_cifar100(tmp_path) / "test").unlink()
    assert not files.present(files.DOWNLOADS["cifar100"], tmp_path)
    with pytest.raises(cli.Missing, match="no test"):
        data.load("cifar100", tmp_path, tmp_path, "full")


def test_missing_files_are_an_error_at_full_scale_and_replaced_by_toy_data_at_tiny(tmp_path, capsys):
    with pytest.raises(cli.Missing, match=r"spherical: no train in .*\n`python data.py --prepare spherical"):
        data.load("spherical", tmp_path, tmp_path, "full")
    with pytest.raises(cli.Missing, match="tiny_imagenet"):
        data.load_proxy("tiny_imagenet", tmp_path, "full")
    loaded = data.load("spherical", tmp_path, tmp_path, "tiny", n_train=100)
    assert (loaded.train.kind, len(loaded.train), loaded.train.classes) == ("toy", 100, 9)
    assert "TOY DATA" in capsys.readouterr().out


@pytest.mark.parametrize("given", [{"loss": None}, {"score": None}])
def test_a_task_of_ones_own_with_other_targets_has_its_own_loss_and_score(given):
    own = {name: abs for name in ("loss", "score") if name not in given}  # the default is of classes
    with pytest.raises(cli.UserError, match="task mine: labels targets need a loss"):
        data.Task("mine", "", (3, 8), "labels", (5,), None, None, (), {}, **own)


@pytest.mark.parametrize(
    "wrong",
    [{"shape": 16}, {"shape": (16,)}, {"shape": (3, 2, 2, 4)}, {"shape": (3, 0)}, {"output": 3}, {"output": ()},
     {"target": "classes"}, {"names": (2021, 2022, 2023, 2024)}, {"names": ["a", "b", "c", "d"]}, {"mean": (0.5,)},
     {"std": (1.0, 1.0)}, {"std": (1.0, 0.0, 1.0)}, {"std": ()}, {"tokens": 0}],
    ids=str,
)  # fmt: skip
def test_a_record_of_ones_own_that_fits_nothing_is_refused(wrong):
    right = {"shape": (3, 16), "target": "class", "output": (4,), "mean": (0.0, 1.0, 2.0), "std": (1.0, 2.0, 4.0),
             "names": ("a", "b", "c", "d")}  # fmt: skip
    data.Task("mine", "", read=None, toy=None, downloads=(), recipes={}, **right)
    (field,) = wrong
    with pytest.raises(cli.UserError, match=f"task mine: {field} is .*; expected "):
        data.Task("mine", "", read=None, toy=None, downloads=(), recipes={}, **right | wrong)


def test_the_channels_of_a_series_of_ones_own_are_normalised_one_by_one():
    constants = {"mean": (0.0, 1.0, 2.0), "std": (1.0, 2.0, 4.0)}
    task = dataclasses.replace(data.TASKS["satellite"], shape=(3, 16), augment=None, **constants)
    x = np.random.default_rng(0).normal(size=(3, 3, 16)).astype(np.float32)  # as many samples as channels
    split = data.Split(x, np.zeros(3, int), 24, "official", task, "cpu")
    expected = (x - np.array([0, 1, 2])[:, None]) / np.array([1, 2, 4])[:, None]
    assert np.allclose(split.inputs(slice(None)).numpy(), expected, atol=1e-6)


def test_classes_of_ones_own_have_to_begin_at_0(tmp_path, monkeypatch):
    x, y = np.zeros((20, 3, 16), np.float32), np.arange(20) % 5
    task = data.TASKS["satellite"]
    own = lambda y: dataclasses.replace(
        task, name="mine", shape=(3, 16), output=(5,), read=lambda *_: ((x, y), (x, y), "official"), downloads=()
    )
    monkeypatch.setitem(data.TASKS, "mine", own(y))
    assert data.load("mine", tmp_path, tmp_path, "full").train.classes == 5
    monkeypatch.setitem(data.TASKS, "mine", own(y + 1))
    with pytest.raises(cli.UserError, match=r"mine, training set: y: sample \d+ has 5; expected a whole number from 0 to 4"):
        data.load("mine", tmp_path, tmp_path, "full")


@pytest.mark.parametrize(
    "returned", [lambda x, y: (x, y), lambda x, y: ((x, y), (x, y)), lambda x, y: (x, y, x, y), lambda x, y: None]
)
def test_a_reader_of_ones_own_that_returns_something_else_is_told(returned, tmp_path, monkeypatch):
    read = lambda *_: returned(np.zeros((20, 1, 46), np.float32), np.arange(20) % 5)
    monkeypatch.setitem(data.TASKS, "mine", dataclasses.replace(data.TASKS["satellite"], name="mine", read=read))
    with pytest.raises(cli.UserError, match=r'task mine: `read` must return \(x, y\), \(x_test, y_test\), "official"'):
        data.load("mine", tmp_path, tmp_path, "full")


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


def test_unknown_tasks_are_refused_with_the_nearest_name():
    assert data.find_task("openml12345").name == "openml12345"
    with pytest.raises(cli.UserError, match="perhaps openml<ID>"):
        data.find_task("openml")
    with pytest.raises(cli.UserError, match="perhaps darcy"):
        data.find_task("darcyy")


# ---- batches


def split(n=23):
    x = np.arange(n, dtype=np.uint8)[:, None, None, None].repeat(3, 1).repeat(8, 2).repeat(8, 3)
    return data.Split(x, np.arange(n), n, "toy", data.PROXIES["cifar10"], "cpu")


def test_an_epoch_shows_every_sample_at_most_once_in_another_order_each_time():
    first, again, other = (split().plan(5, 4, seed=1, epoch=e)[0] for e in (0, 0, 1))
    assert first.shape == (5, 4) and len(set(first.flatten().tolist())) == 20
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert sorted(split(4).plan(3, 4, 0, 0)[0].flatten().tolist()) == sorted([0, 1, 2, 3] * 3)  # a small source starts over


def test_source_and_target_are_shuffled_apart():
    """Two sets of one size would otherwise pair the same two pictures in every epoch."""
    x, y = np.zeros((20, 3, 8, 8), np.uint8), np.zeros(20, int)
    source, target = (data.Split(x, y, 1, "toy", like, "cpu") for like in (data.PROXIES["cifar10"], data.TASKS["cifar100"]))
    (order_s, u_s), (order_t, u_t) = (split.plan(5, 4, 0, 0) for split in (source, target))
    assert not torch.equal(order_s, order_t) and not torch.equal(u_s, u_t)


def test_processes_share_the_batches_of_one():
    whole = list(split().batches(5, 4, 0, 0))
    shares = [list(split().batches(5, 4, 0, 0, rank, 2)) for rank in (0, 1)]
    for (x, y), (x0, y0), (x1, y1) in zip(whole, *shares, strict=True):
        assert torch.equal(y[0::2], y0) and torch.equal(y[1::2], y1)
        assert torch.equal(x[0::2], x0) and torch.equal(x[1::2], x1)  # the augmentation, too


def test_the_next_batch_is_read_in_another_thread():
    threads = []
    lazy = files.Lazy(12, lambda rows, u: threads.append(threading.get_ident()) or rows[:, None, None].astype(np.float32))
    split = data.Split(lazy[np.arange(2, 12)], np.arange(2, 12), 12, "toy", data.TASKS["satellite"], "cpu")
    batches = list(split.batches(3, 4, 0, 0))
    order = split.plan(3, 4, 0, 0)[0]
    for (x, y), index in zip(batches, order, strict=True):
        assert torch.equal(x[:, 0, 0], index + 2.0) and torch.equal(y, index + 2)
    assert len(threads) == 3 and threading.get_ident() not in threads
    x0, x1 = (list(split.batches(3, 4, 0, 0, rank, 2)) for rank in (0, 1))
    assert torch.equal(batches[1][0][1::2], x1[1][0]) and torch.equal(batches[2][1][0::2], x0[2][1])


# ---- the command line


def test_the_table_fits_on_a_screen(capsys):
    data.print_tasks("datasets")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 32 and max(map(len, lines)) <= 140 and all(any(name in line for line in lines) for name in data.TASKS)


def test_the_table_needs_no_torch(tmp_path):
    code = "import sys, data; data.print_tasks('datasets'); assert 'torch' not in sys.modules"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert all(name in out for name in [*data.TASKS, *data.PROXIES])


def test_prepare_falls_back_to_cifar100_and_unpacks_it(tmp_path, server, monkeypatch):
    write_cifar100(tmp_path / "origin")
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        archive.add(tmp_path / "origin" / "cifar-100-python", "cifar-100-python")
    server.content = packed.getvalue()
    there = {key: files.Download(f"{server.url}/{key}.tar.gz", None, 1, d.gives) for key, d in files.DOWNLOADS.items()}
    there["s2_cifar100"] = files.Download(f"{server.url}/missing", None, 1, ("s2_cifar100.gz",))
    monkeypatch.setattr(data, "DOWNLOADS", there)
    (tmp_path / "data").mkdir()
    for name in ("tiny-imagenet-200.zip", "cifar-10-batches-py"):
        (tmp_path / "data" / name).mkdir()
    (tmp_path / "data" / "cifar-10-batches-py" / "data_batch_1").touch()
    data.prepare("spherical", tmp_path / "data")
    assert len(images.read_cifar100(tmp_path / "data", tmp_path)[0][1]) == 40


def test_prepare_says_what_to_fetch_by_hand(tmp_path, monkeypatch, capsys):
    for key, download in files.DOWNLOADS.items():
        monkeypatch.setitem(files.DOWNLOADS, key, data.replace(download, url="http://127.0.0.1:9/x"))
    with pytest.raises(cli.UserError, match="^deepsea, conll2003 could not be downloaded"):
        data.prepare("deepsea", tmp_path)
    by_hand = r"deepsea: http.* cannot be reached .*\n.*by hand \(.*Google Drive.*\): .*/deepsea_filtered.npz, 860 MB."
    assert re.search(by_hand, capsys.readouterr().out)
    with pytest.raises(cli.UserError, match="cannot be reached"):
        data.prepare("voc", tmp_path)


def test_without_a_network_prepare_says_that_the_task_is_simulated(tmp_path, monkeypatch, capsys):
    for key, download in files.DOWNLOADS.items():
        monkeypatch.setitem(files.DOWNLOADS, key, data.replace(download, url="http://127.0.0.1:9/x"))
    data.prepare("darcy", tmp_path)  # no error
    said = capsys.readouterr().out
    assert "darcy will be simulated" in said and "Without cifar10 and voc" in said
