"""Official layouts written in small, the projection, the augmentations, the splits, the downloads, the toy pictures."""

import dataclasses
import gzip
import hashlib
import io
import os
import pickle
import subprocess
import sys
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import cli
import data
from tasks import files, images, toys

RNG = np.random.default_rng(0)


# ---- official files


def write_cifar100(folder, n=40, labels=None):
    folder = folder / "cifar-100-python"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("train", "test"):
        content = {
            b"data": RNG.integers(0, 256, (n, 3072), dtype=np.uint8),
            b"fine_labels": labels or [i % 100 for i in range(n)],
        }
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    return folder


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


def test_cifar10_reads_the_batches_that_are_there(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for i, n in ((1, 6), (4, 5)):
        content = {b"data": np.full((n, 3072), i, np.uint8), b"labels": list(range(n))}
        (folder / f"data_batch_{i}").write_bytes(pickle.dumps(content))
    x, y = images.read_cifar10(tmp_path)
    assert x.shape == (11, 3, 32, 32) and y.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4]
    assert len(data.load_proxy("cifar10", tmp_path, "full", n=7)) == 7


def test_official_spherical_file_comes_first(tmp_path):
    write_cifar100(tmp_path)
    images = RNG.integers(0, 256, (12, 3, 60, 60), dtype=np.uint8)
    content = {split: {"images": images, "labels": np.arange(12)} for split in ("train", "test")}
    with gzip.open(tmp_path / "s2_cifar100.gz", "wb") as file:
        pickle.dump(content, file)
    train, test, kind = images.read_spherical(tmp_path, tmp_path / "cache")
    assert kind == "official" and np.array_equal(train[0], images) and test[1].tolist() == list(range(12))
    loaded = data.load("spherical", tmp_path, tmp_path / "cache", "full")
    assert loaded.train.inputs(torch.arange(2)).max() <= 1  # divided by 255 and nothing else


def test_without_it_cifar100_is_projected_once(tmp_path):
    write_cifar100(tmp_path)
    train, test, kind = images.read_spherical(tmp_path, tmp_path / "cache")
    assert kind == "simulated" and train[0].shape == test[0].shape == (40, 3, 60, 60) and train[0].dtype == np.uint8
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    again, _, _ = images.read_spherical(tmp_path, tmp_path / "cache")
    assert np.array_equal(train[0], again[0]) and len(files) == 2
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}


def jpeg(value, mode="RGB"):
    file = io.BytesIO()
    Image.new(mode, (64, 64), value).save(file, "JPEG")
    return file.getvalue()


TINY = {
    "train/n02/images/n02_0.JPEG": jpeg((200, 0, 0)),
    "train/n01/images/n01_0.JPEG": jpeg(90, "L"),  # some of the official files are grey
    "train/n01/images/n01_1.JPEG": jpeg((0, 0, 200)),
    "val/images/val_0.JPEG": jpeg((0, 200, 0)),
    "val/val_annotations.txt": b"val_0.JPEG\tn02\t0\t0\t62\t62\n",
}


@pytest.mark.parametrize("layout", ["folder", "one zip", "two zips"])
def test_tiny_imagenet_from_its_folder_or_its_zips(tmp_path, layout):
    for i, (name, content) in enumerate(TINY.items()):
        if layout == "folder":
            path = tmp_path / "tiny-imagenet-200" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        else:
            part = f".part{i % 2}" if layout == "two zips" else ""
            with zipfile.ZipFile(tmp_path / f"tiny-imagenet-200{part}.zip", "a") as archive:
                archive.writestr(f"tiny-imagenet-200/{name}", content)
    x, y = images.read_tiny_imagenet(tmp_path)
    assert x.shape == (3, 3, 64, 64) and y.tolist() == [0, 0, 1]
    assert abs(x[0].astype(int) - 90).max() < 4 and abs(x[2, 0].astype(int) - 200).max() < 4
    x, y = images.read_tiny_imagenet(tmp_path, split="val")
    assert y.tolist() == [1] and x[0, 1].mean() > 190
    assert len(images.read_tiny_imagenet(tmp_path, n=2, seed=1)[1]) == 2


# ---- damaged, unsafe, missing


class Bomb:
    def __reduce__(self):
        return os.system, ("touch bomb",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    folder = write_cifar100(tmp_path)
    (folder / "train").write_bytes(pickle.dumps({b"data": Bomb(), b"fine_labels": []}))
    with pytest.raises(cli.UserError, match="asks for posix.system"):
        images.read_cifar100(tmp_path, tmp_path)


@pytest.mark.parametrize("name", ["np.ndarray", "builtins.eval", "numpy.load", "numpy.f2py.compile"])
def test_only_arrays_pass_the_unpickler(name):
    module, function = name.rsplit(".", 1)
    unpickler = files.ArraysOnly(io.BytesIO())
    if name == "np.ndarray":
        assert unpickler.find_class("numpy", "ndarray") is np.ndarray
    else:
        with pytest.raises(pickle.UnpicklingError):
            unpickler.find_class(module, function)


def test_arrays_of_every_pickle_protocol_pass():
    for protocol in range(2, 6):
        array = np.arange(4)
        loaded = files.ArraysOnly(io.BytesIO(pickle.dumps({"a": array, "b": np.float32(2)}, protocol))).load()
        assert np.array_equal(loaded["a"], array) and loaded["b"] == 2


def test_damaged_files_are_named(tmp_path):
    folder = write_cifar100(tmp_path)
    whole = (folder / "train").read_bytes()
    (folder / "train").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(cli.UserError, match="train is not a readable pickle"):
        images.read_cifar100(tmp_path, tmp_path)
    write_cifar100(tmp_path, labels=[100] * 40)
    with pytest.raises(cli.UserError, match="train: labels: sample 0 has 100; expected a whole number from 0 to 99"):
        images.read_cifar100(tmp_path, tmp_path)
    (folder / "train").write_bytes(pickle.dumps({"data": np.zeros((3, 3072), np.float32), "fine_labels": [1, 2, 3]}))
    with pytest.raises(cli.UserError, match="float32 images"):
        images.read_cifar100(tmp_path, tmp_path)
    (tmp_path / "s2_cifar100.gz").write_bytes(gzip.compress(b"x" * 1000)[:20])
    with pytest.raises(cli.UserError, match=r"s2_cifar100.gz is not a readable"):
        images.read_spherical(tmp_path, tmp_path)
    (tmp_path / "tiny-imagenet-200.zip").write_bytes(b"PK\x03\x04 half a zip")
    with pytest.raises(cli.UserError, match="not a whole zip"):
        images.read_tiny_imagenet(tmp_path)


def test_part_of_tiny_imagenet_is_said(tmp_path):
    root = tmp_path / "tiny-imagenet-200"
    (root / "val/images").mkdir(parents=True)
    (root / "val/images/val_0.JPEG").write_bytes(jpeg(9))
    with pytest.raises(cli.Missing, match="val_annotations"):
        images.read_tiny_imagenet(tmp_path, split="val")
    (root / "val/val_annotations.txt").write_text("val_0.JPEG\tn02\t0\t0\t9\t9\n")
    with pytest.raises(cli.UserError, match="n02.*no training images"):
        images.read_tiny_imagenet(tmp_path, split="val")


def test_a_test_file_that_is_missing_is_not_called_present(tmp_path):
    (write_cifar100(tmp_path) / "test").unlink()
    assert not files.present(files.DOWNLOADS["cifar100"], tmp_path)
    with pytest.raises(cli.Missing, match="no test"):
        data.load("cifar100", tmp_path, tmp_path, "full")


def test_a_damaged_picture_is_named(tmp_path):
    path = tmp_path / "tiny-imagenet-200/train/n01/images/n01_0.JPEG"
    path.parent.mkdir(parents=True)
    path.write_bytes(jpeg(3, "L")[:200])
    with pytest.raises(cli.UserError, match=r"n01_0.JPEG .* is not a 64 x 64 image"):
        images.read_tiny_imagenet(tmp_path)


def test_missing_files_are_an_error_at_full_scale_and_toys_aloud_at_tiny(tmp_path, capsys):
    with pytest.raises(cli.Missing, match=r"spherical: no train in .*\n`python data.py --prepare spherical"):
        data.load("spherical", tmp_path, tmp_path, "full")
    with pytest.raises(cli.Missing, match="tiny_imagenet"):
        data.load_proxy("tiny_imagenet", tmp_path, "full")
    loaded = data.load("spherical", tmp_path, tmp_path, "tiny", n_train=100)
    assert (loaded.train.kind, len(loaded.train), loaded.train.classes) == ("toy", 100, 9)
    assert "TOY DATA" in capsys.readouterr().out


# ---- the sphere


def one_point(image, rotation, j, k, b=30):
    """The value that pixel (j, k) of the spherical picture shows, in plain Python."""
    theta, phi = np.pi * j / (2 * b), np.pi * k / b
    x, y, z = rotation @ np.array([np.sin(theta) * np.cos(phi), np.sin(theta) * np.sin(phi), np.cos(theta)])
    light = 2.001  # a ray from (0, 0, light) through (x, y, z + 1) meets the plane z = 0 at distance t beyond the point
    t = -(z + 1) / (z + 1 - light)
    row, column = ((q + 1.5) / 3 * 32 - 0.5 for q in (t * x + x, t * y + y))  # pixel centres lie at 0, 1, ..., 31
    r, c, value = int(np.floor(row)), int(np.floor(column)), 0.0
    for dr in (0, 1):
        for dc in (0, 1):
            if 0 <= r + dr < 32 and 0 <= c + dc < 32:
                value += image[r + dr, c + dc] * (1 - abs(row - r - dr)) * (1 - abs(column - c - dc))
    return value


def test_projection_equals_ray_casting_point_by_point():
    image, rotations = RNG.integers(0, 256, (2, 1, 32, 32), dtype=np.uint8), images.random_rotations(2, seed=5)
    sphere = images.project_to_sphere(image, rotations)
    assert sphere.shape == (2, 1, 60, 60)
    for n in range(2):
        expected = [[one_point(image[n, 0], rotations[n], j, k) for k in range(60)] for j in range(60)]
        assert abs(np.array(expected) - sphere[n, 0]).max() <= 0.51  # rounding


def test_the_south_pole_shows_the_middle_and_the_north_nothing():
    image = np.full((1, 3, 32, 32), 100, np.uint8)
    image[:, 0, 15:17, 15:17] = 250
    sphere = images.project_to_sphere(image, np.eye(3)[None])
    assert sphere[0, 0, 59].min() > 200  # the row next to the south pole
    assert (sphere[0, 1, 40:] == 100).all() and (sphere[0, :, 1:20] == 0).all()  # row 0 is the pole itself, where q = 0 too


def test_rotations_are_rotations_without_a_preferred_direction():
    rotations = images.random_rotations(4000, seed=0)
    assert np.allclose(np.einsum("nij,nkj->nik", rotations, rotations), np.eye(3), atol=1e-12)
    assert np.allclose(np.linalg.det(rotations), 1)
    assert abs(rotations.mean(0)).max() < 0.04 and abs((rotations**2).mean(0) - 1 / 3).max() < 0.02


# ---- augmentation and batches


def test_crop_and_flip_equals_a_loop():
    x = torch.rand(6, 3, 32, 32)
    u = torch.rand(6, data.DRAWS)
    out = images.crop_and_flip(x, u)
    padded = torch.nn.functional.pad(x, (4,) * 4)
    for i in range(6):
        top, left = int(u[i, 0] * 9), int(u[i, 1] * 9)
        expected = padded[i, :, top : top + 32, left : left + 32]
        assert torch.equal(out[i], expected if u[i, 2] < 0.5 else expected.flip(-1))


def test_resized_crop_shows_the_box_it_drew():
    ramp = torch.arange(64.0).expand(1, 1, 64, 64)
    whole = torch.tensor([[1.0, 0.5, 0.5, 0.5, 0.0]])  # area 1, square, centred, not flipped
    assert torch.allclose(images.resized_crop_and_flip(ramp, whole), ramp, atol=1e-3)
    whole[0, 4] = 0.9
    assert torch.allclose(images.resized_crop_and_flip(ramp, whole), ramp.flip(-1), atol=1e-3)
    corner = torch.tensor([[(0.25 - 0.08) / 0.92, 0.5, 0.0, 0.0, 0.0]])  # a quarter of the area, top left
    out = images.resized_crop_and_flip(ramp, corner)
    assert out.max() < 33 and abs(out[0, 0, 0, 1] - out[0, 0, 0, 0] - 0.5) < 0.6
    u = torch.rand(500, data.DRAWS)
    out = images.resized_crop_and_flip(ramp.expand(500, -1, -1, -1), u)
    width = (out[:, 0, 0, -1] - out[:, 0, 0, 0]).abs() / 63
    assert width.min() > 0.2 and width.max() <= 1.0 and out.min() >= 0 and out.max() <= 63


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


def test_error_is_the_share_of_wrong_answers():
    out = np.array([[2.0, 1.0], [0.0, 1.0], [3.0, 4.0], [1.0, 0.0]])
    assert data.TASKS["spherical"].score(out, np.array([0, 0, 1, 0])) == 0.25


# ---- toys


def test_colours_do_not_tell_the_class_of_a_toy():
    from sklearn.linear_model import LogisticRegression

    x, y = toys.images(3000, 0, 32)
    assert x.shape == (3000, 3, 32, 32) and sorted(set(y)) == list(range(9))
    features = np.concatenate(
        [x.mean((2, 3)), x.std((2, 3)), np.quantile(x, [0.1, 0.5, 0.9], axis=(2, 3)).transpose(1, 2, 0).reshape(3000, -1)], 1
    )
    features = (features - features.mean(0)) / features.std(0)
    right = LogisticRegression(max_iter=500).fit(features[:2000], y[:2000]).score(features[2000:], y[2000:])
    assert right < 1 / 3  # what knowing the texture alone would give; a guess has 1 / 9


def test_toys_are_the_same_every_time():
    assert np.array_equal(toys.spherical(5, 1, 60)[0], toys.spherical(5, 1, 60)[0])
    assert not np.array_equal(toys.images(5, 1, 32)[0], toys.images(5, 2, 32)[0])


# ---- downloads


@pytest.fixture
def server():
    """Serves `content` from any path, with byte ranges unless told not to; keeps what was asked for."""

    class Handler(BaseHTTPRequestHandler):
        content, ranges, cut, asked = b"", True, None, []

        def do_GET(self):
            begin = int(self.headers.get("Range", "bytes=0-")[6:-1]) if self.ranges else 0
            Handler.asked.append(begin)
            if self.path.endswith("missing") or begin >= len(self.content):
                return self.send_error(404 if self.path.endswith("missing") else 416)
            body = self.content[begin:]
            self.send_response(206 if begin else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: self.cut])

        def log_message(self, *_):
            pass

    web = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    Handler.url = f"http://127.0.0.1:{web.server_port}"
    yield Handler
    web.shutdown()


def test_a_broken_download_goes_on_where_it_stopped(tmp_path, server):
    server.content, server.cut = RNG.bytes(300_000), 100_000
    download = files.Download(f"{server.url}/a.zip", hashlib.md5(server.content).hexdigest(), 1, ("a.zip",))
    with pytest.raises(cli.UserError, match="stopped after 100,000 of 300,000"):
        files.fetch(download, tmp_path)
    assert not files.present(download, tmp_path)
    server.cut = None
    files.fetch(download, tmp_path)
    assert (tmp_path / "a.zip").read_bytes() == server.content and server.asked == [0, 100_000]
    files.fetch(download, tmp_path)  # present: nothing is asked
    assert len(server.asked) == 2 and [p.name for p in tmp_path.iterdir()] == ["a.zip"]


def test_a_server_without_ranges_starts_over_and_a_complete_part_is_taken(tmp_path, server):
    server.content = RNG.bytes(5000)
    download = files.Download(f"{server.url}/a.zip", hashlib.md5(server.content).hexdigest(), 1, ("a.zip",))
    (tmp_path / "a.zip.part").write_bytes(b"rubbish")
    server.ranges = False
    files.fetch(download, tmp_path)
    assert (tmp_path / "a.zip").read_bytes() == server.content
    (tmp_path / "a.zip").rename(tmp_path / "a.zip.part")
    server.ranges = True
    files.fetch(download, tmp_path)
    assert (tmp_path / "a.zip").read_bytes() == server.content


def test_a_wrong_checksum_a_missing_file_and_a_dead_server_are_named(tmp_path, server):
    server.content = b"something else"
    with pytest.raises(cli.UserError, match="came with checksum"):
        files.fetch(files.Download(f"{server.url}/a.zip", "0" * 32, 1, ("a.zip",)), tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(cli.UserError, match="answers 404"):
        files.fetch(files.Download(f"{server.url}/missing", None, 1, ("x",)), tmp_path)
    with pytest.raises(cli.UserError, match="cannot be reached"):
        files.fetch(files.Download("http://127.0.0.1:9/a", None, 1, ("x",)), tmp_path)


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


# ---- the command line


def test_the_table_needs_no_torch(tmp_path):
    code = "import sys, data; data.print_tasks('datasets'); assert 'torch' not in sys.modules"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert all(name in out for name in [*data.TASKS, *data.PROXIES])


def test_a_shorter_run_has_the_same_learning_rate_curve_squeezed():
    import pare

    full = data.complete(pare.Args(), "pare", "full")
    assert (full.epochs, full.batch_size, full.accumulate, full.lr, full.decay_epochs) == (60, 16, 8, 1e-4, 60)
    assert full.source == "tiny_imagenet" and round(full.k_begin * 3136) == 2000 and full.k_end == 0
    sgd = data.complete(pare.Args(task="cifar100"), "pare", "full")
    summed_rate, summed_decay = 1e-4, 1e-3  # of the official code, whose gradient is 32 times ours
    assert sgd.lr == pytest.approx(summed_rate * 32) and sgd.lr * sgd.weight_decay == pytest.approx(summed_rate * summed_decay)
    half = data.complete(pare.Args(epochs=30, lr=1.0, as_released=True), "pare", "full")
    assert (half.epochs, half.warmup_epochs, half.decay_epochs, half.lr) == (30, 2.5, 30, 1.0) and round(
        half.k_end * 3136
    ) == 500


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
