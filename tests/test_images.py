"""Images: the official files, the projection to the sphere, the augmentations."""

import gzip
import pickle
import zipfile

import numpy as np
import pytest
import torch
from official import RNG, TINY, jpeg, write_cifar100, write_voc
from PIL import Image

import cli
import data
from tasks import images

# ---- official files


def test_cifar10_reads_the_batches_that_are_there(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for i, n in ((1, 6), (4, 5)):
        content = {b"data": np.full((n, 3072), i, np.uint8), b"labels": list(range(n))}
        (folder / f"data_batch_{i}").write_bytes(pickle.dumps(content))
    x, y = images.read_cifar10(tmp_path)
    assert x.shape == (11, 3, 32, 32) and y.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4]
    assert len(data.load_proxy("cifar10", tmp_path, "full", n=7)) == 7
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"")  # it was being unpacked
    with pytest.raises(cli.UserError, match="incomplete: .*cifar-10-python.tar.gz is still there"):
        images.read_cifar10(tmp_path)


def test_a_part_of_a_source_is_drawn_with_its_labels(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    content = {b"data": np.arange(50, dtype=np.uint8)[:, None].repeat(3072, 1), b"labels": [i % 10 for i in range(50)]}
    (folder / "data_batch_1").write_bytes(pickle.dumps(content))
    parts = []
    for seed in (1, 2):
        x, y = images.read_cifar10(tmp_path, n=7, seed=seed)
        parts.append(set(x[:, 0, 0, 0].tolist()))
        assert (x[:, 0, 0, 0] % 10 == y).all() and len(parts[-1]) == 7
    assert parts[0] != parts[1] and set(range(7)) not in parts


def test_official_spherical_file_comes_first(tmp_path):
    write_cifar100(tmp_path)
    raw = RNG.integers(0, 256, (12, 3, 60, 60), dtype=np.uint8)
    raw_test = RNG.integers(0, 256, (5, 3, 60, 60), dtype=np.uint8)
    content = {"train": {"images": raw, "labels": np.arange(12)}, "test": {"images": raw_test, "labels": np.arange(5) + 7}}
    with gzip.open(tmp_path / "s2_cifar100.gz", "wb") as file:
        pickle.dump(content, file)
    train, test, kind = images.read_spherical(tmp_path, tmp_path / "cache")
    assert kind == "official" and np.array_equal(train[0], raw) and train[1].tolist() == list(range(12))
    assert np.array_equal(test[0], raw_test) and test[1].tolist() == list(range(7, 12))
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


@pytest.mark.parametrize("layout", ["folder", "links", "one zip", "two zips"])
def test_tiny_imagenet_from_its_folder_or_its_zips(tmp_path, layout):
    for i, (name, content) in enumerate(TINY.items()):
        if layout in ("folder", "links"):
            path = tmp_path / "tiny-imagenet-200" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        else:
            part = f".part{i % 2}" if layout == "two zips" else ""
            with zipfile.ZipFile(tmp_path / f"tiny-imagenet-200{part}.zip", "a") as archive:
                archive.writestr(f"tiny-imagenet-200/{name}", content)
    if layout == "links":
        train = (tmp_path / "tiny-imagenet-200/train").rename(tmp_path / "elsewhere")
        (tmp_path / "tiny-imagenet-200/train").symlink_to(train)
    x, y = images.read_tiny_imagenet(tmp_path)
    assert x.shape == (3, 3, 64, 64) and y.tolist() == [0, 0, 1]
    assert abs(x[0].astype(int) - 90).max() < 4 and abs(x[2, 0].astype(int) - 200).max() < 4
    x, y = images.read_tiny_imagenet(tmp_path, split="val")
    assert y.tolist() == [1] and x[0, 1].mean() > 190
    assert len(images.read_tiny_imagenet(tmp_path, n=2, seed=1)[1]) == 2


def test_voc_masks_are_foreground_background_or_ignored(tmp_path):
    root = write_voc(tmp_path)
    source = data.load_proxy("voc", tmp_path, "full")
    assert source.target == "field" and source.output == (128, 128) and source.classes is None
    x, y = source.inputs(torch.arange(2)), source.targets(torch.arange(2))
    assert x.shape == (2, 3, 224, 224) and y.shape == (2, 128, 128)
    assert abs(float(x[0, 0].mean()) - (200 / 255 - 0.485) / 0.229) < 0.05
    assert (y[:, :, :63] == 0).all() and (y[:, :, 65:114] == 1).all() and y[:, :, 116:].isnan().all()
    (root / "JPEGImages/b.jpg").write_bytes(b"no picture")
    with pytest.raises(cli.UserError, match="b.jpg is not a readable image"):
        data.load_proxy("voc", tmp_path, "full")
    (root / "SegmentationClass/a.png").unlink()
    with pytest.raises(cli.Missing, match="a.png"):
        data.load_proxy("voc", tmp_path, "full")


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
    with pytest.raises(cli.UserError, match="tiny-imagenet-200.zip is not a readable zip file"):
        images.read_tiny_imagenet(tmp_path)


def test_an_incomplete_tiny_imagenet_is_refused(tmp_path):
    root = tmp_path / "tiny-imagenet-200"
    (root / "val/images").mkdir(parents=True)
    (root / "val/images/val_0.JPEG").write_bytes(jpeg(9))
    with pytest.raises(cli.Missing, match="val_annotations"):
        images.read_tiny_imagenet(tmp_path, split="val")
    (root / "val/val_annotations.txt").write_text("val_0.JPEG\tn02\t0\t0\t9\t9\n")
    with pytest.raises(cli.UserError, match="n02.*no training images"):
        images.read_tiny_imagenet(tmp_path, split="val")


def test_a_damaged_picture_is_named(tmp_path):
    path = tmp_path / "tiny-imagenet-200/train/n01/images/n01_0.JPEG"
    path.parent.mkdir(parents=True)
    path.write_bytes(jpeg(3, "L")[:200])
    with pytest.raises(cli.UserError, match=r"n01_0.JPEG .* is not a readable image"):
        images.read_tiny_imagenet(tmp_path)
    Image.new("RGB", (1, 64)).save(path)
    with pytest.raises(cli.UserError, match=r"n01_0.JPEG .* is not a readable image .1 x 64 pixels, not 64 x 64"):
        images.read_tiny_imagenet(tmp_path)


def test_a_picture_in_a_damaged_zip_file_is_named(tmp_path):
    path = tmp_path / "tiny-imagenet-200.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny-imagenet-200/train/n01/images/n01_0.JPEG", jpeg(9))
    content = bytearray(path.read_bytes())
    content[content.rfind(b"PK\x01\x02") + 10] = 99  # the method of compression
    path.write_bytes(content)
    with pytest.raises(cli.UserError, match=r"n01_0.JPEG .* is not a readable image"):
        images.read_tiny_imagenet(tmp_path)


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


# ---- augmentation


def test_crop_and_flip_equals_a_loop():
    x = torch.rand(6, 3, 32, 32)
    u = torch.rand(6, data.TASKS["cifar100"].draws)
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
    assert out.max() < 33 and abs(out[0, 0, 0, 11] - out[0, 0, 0, 10] - 0.5) < 1e-3
    assert torch.allclose(images.resized_crop_and_flip(ramp.mT, corner), out.mT, atol=1e-3)  # the same box in rows
    u = torch.rand(500, data.PROXIES["tiny_imagenet"].draws)
    out = images.resized_crop_and_flip(ramp.expand(500, -1, -1, -1), u)
    width = (out[:, 0, 0, -1] - out[:, 0, 0, 0]).abs() / 63
    assert width.min() > 0.2 and width.max() <= 1.0 and out.min() >= 0 and out.max() <= 63
