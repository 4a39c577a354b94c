"""The tasks: what they look like, where their files come from, how they are prepared and scored.

    python data.py                       the table of tasks, and what is present in --data-dir
    python data.py --prepare spherical   fetch what the task and its source need (checksum, resumes a broken download)

A run reads --data-dir and writes only under --out-dir. Where its data come from is never hidden (result.json, "data"):
"official" the benchmark's own files; "simulated" made here by the benchmark's procedure (spherical: real CIFAR-100
images, projected by us); "toy" a generated stand-in of the same shape, at the tiny scale only.

Shapes: n samples, B batch, C channels, H W sizes. torch is imported where it is used, so that `--help` answers at once.
"""

import difflib
import errno
import gzip
import hashlib
import http.client
import os
import pickle
import sys
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np


class UserError(Exception):
    """A mistake the user can mend: one or two lines that say what, where and what to do; exit code 2."""


class Missing(UserError):
    """Files that a task needs are not there."""


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------


def command_line(Args, doc):
    """Read the command line into the dataclass `Args`; its field docstrings are the help. Needs no torch."""
    import tyro

    def read():
        args = tyro.cli(Args, description=doc)
        if hasattr(args, "task"):
            find_task(args.task)
        for name in ("epochs", "n_train", "batch_size", "accumulate", "lr", "decay_epochs", "temperature",
                     "embedder_lr", "meta_lr", "inner_lr", "max_samples", "classes_per_problem", "source_samples"):  # fmt: skip
            if (value := getattr(args, name, None)) is not None and not value > 0:
                raise UserError(f"--{name.strip('_').replace('_', '-')} {value} must be positive.")
        for name, most in (("k_begin", 1), ("k_end", 1), ("seed", 2**32), ("gate_noise", 1e3), ("clip", 1e9),
                           ("warmup_share", 1), ("embedder_epochs", 1e6), ("meta_epochs", 1e6), ("reg", 1e9),
                           ("lambda_", 1e9)):  # fmt: skip
            if not 0 <= (getattr(args, name, None) or 0) <= most:
                raise UserError(f"--{name.strip('_').replace('_', '-')} {getattr(args, name)} must lie between 0 and {most:g}.")
        return args

    return guarded(read)


def guarded(main, *args):
    """Call `main`; a UserError, and a full disk, become one or two lines on stderr and exit code 2."""
    try:
        return main(*args)
    except UserError as error:
        message = str(error)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        message = (
            f"no space left, writing {error.filename or 'a file'}.\nMake room and repeat; a training run goes on with --resume."
        )
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(2)


# ---------------------------------------------------------------------------------------------------------------------
# Fetching the official files
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Download:
    url: str
    md5: str | None  # None where nobody published one
    megabytes: int
    gives: tuple[str, ...]  # what lies in the data folder once it is there: all of these glob patterns


DOWNLOADS = {
    "s2_cifar100": Download("https://pde-xd.s3.amazonaws.com/spherical/s2_cifar100.gz", None, 272, ("s2_cifar100.gz",)),
    "cifar100": Download("https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85",
                         161, ("cifar-100-python/train", "cifar-100-python/test")),
    "cifar10": Download("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a",
                        163, ("cifar-10-batches-py/data_batch_*",)),
    "tiny_imagenet": Download("http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de",
                              237, ("tiny-imagenet-200*",)),
}  # fmt: skip


def present(download, data_dir):
    return all(any(p.suffix != ".part" for p in Path(data_dir).glob(pattern)) for pattern in download.gives)


def fetch(download, data_dir):
    """Fetch one file into `data_dir` and unpack it there if it is a tar; a broken download goes on where it stopped.

    Raises UserError when the server does not answer, sends too little, or sends something else than the checksum says.
    """
    import tarfile
    import urllib.error
    import urllib.request

    from tqdm import tqdm

    data_dir = Path(data_dir)
    data_dir.mkdir(parents=True, exist_ok=True)
    path = data_dir / download.url.rsplit("/", 1)[1]
    part = path.with_name(path.name + ".part")
    if not path.exists():
        have = part.stat().st_size if part.exists() else 0
        try:
            request = urllib.request.Request(download.url, headers={"Range": f"bytes={have}-"} if have else {})
            with urllib.request.urlopen(request, timeout=30) as answer:
                resumed = answer.status == 206
                total = int(answer.headers.get("Content-Length", 0)) + have * resumed
                with (
                    part.open("ab" if resumed else "wb") as file,
                    tqdm(desc=path.name, total=total or None, initial=have * resumed, unit="B", unit_scale=True) as bar,
                ):
                    while block := answer.read(1 << 20):
                        file.write(block)
                        bar.update(len(block))
        except urllib.error.HTTPError as error:
            if error.code != 416:  # 416: nothing is missing
                raise UserError(
                    f"{download.url} answers {error.code}.\nFetch it by hand and put it into {data_dir}."
                ) from error
            total = have
        except (OSError, http.client.HTTPException) as error:
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(
                f"{download.url} cannot be reached ({error}).\nTry again later, or put the file into {data_dir} by hand."
            ) from error
        if part.stat().st_size < total:
            raise UserError(
                f"{download.url} stopped after {part.stat().st_size:,} of {total:,} bytes.\n"
                "The same command goes on from there."
            )
        if download.md5:
            with part.open("rb") as file:
                md5 = hashlib.file_digest(file, "md5").hexdigest()
            if md5 != download.md5:
                part.unlink()
                raise UserError(f"{download.url} came with checksum {md5}, not {download.md5}.\nIt was removed; try again.")
        part.rename(path)
    if path.name.endswith(".tar.gz"):
        with tarfile.open(path) as archive:
            archive.extractall(data_dir, filter="data")
        path.unlink()


# ---------------------------------------------------------------------------------------------------------------------
# Reading the official files
# ---------------------------------------------------------------------------------------------------------------------


class ArraysOnly(pickle.Unpickler):
    """Opens pickles of numpy arrays and plain Python values; refuses everything else, since a pickle can run code."""

    allowed = {f.__name__: f for f in (np.ndarray, np.dtype, np.zeros(1).__reduce__()[0], np.zeros(1).__reduce_ex__(5)[0],
                                       np.float64(0).__reduce__()[0])}  # fmt: skip

    def find_class(self, module, name):
        if module.split(".")[0] == "numpy" and name in self.allowed:
            return self.allowed[name]
        if (module, name) == ("_codecs", "encode"):  # how Python 2 wrote bytes
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no array")


def unpickle(path):
    """The dictionary in a (gzipped) pickle, with str keys. Raises UserError if it is truncated, damaged or unsafe."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            content = ArraysOnly(file, encoding="bytes").load()
        return {k.decode() if isinstance(k, bytes) else k: v for k, v in content.items()}
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(f"{path} is not a readable pickle of arrays ({error}).\nRemove it and fetch it again.") from error


def check_images(path, images, labels, shape, classes):
    """The two arrays as (n, C, H, W) uint8 and (n,) int64. Raises UserError where they are not what the task says."""
    images, labels = np.asarray(images), np.asarray(labels)
    if images.dtype != np.uint8 or images.size != len(labels) * np.prod(shape) or len(labels) == 0:
        raise UserError(f"{path}: {images.dtype} images {images.shape} for {len(labels)} labels; expected uint8 (n, {shape}).")
    if labels.min() < 0 or labels.max() >= classes:
        raise UserError(f"{path}: labels {labels.min()} to {labels.max()}; expected 0 to {classes - 1}.")
    return images.reshape(-1, *shape), labels.astype(np.int64)


def read_cifar(folder, names, label, classes):
    """Images (n, 3, 32, 32) uint8 and labels (n,) from the official pickles `names` of `folder`, those that are there."""
    paths = [folder / name for name in names if (folder / name).exists()]
    if not paths:
        raise Missing(f"no {' or '.join(names[:2])} in {folder}.")
    parts = []
    for path in paths:
        content = unpickle(path)
        if "data" not in content or label not in content:
            raise UserError(f"{path} has the entries {sorted(content)}; expected 'data' and '{label}'.")
        parts.append(check_images(path, content["data"], content[label], (3, 32, 32), classes))
    return tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))


def read_cifar100(data_dir, cache):
    folder = data_dir / "cifar-100-python"
    return *(read_cifar(folder, [name], "fine_labels", 100) for name in ("train", "test")), "official"


def read_cifar10(data_dir):
    return read_cifar(data_dir / "cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)], "labels", 10)


def read_tiny_imagenet(data_dir, split="train", n=None, seed=0):
    """Tiny-ImageNet from the folder tiny-imagenet-200/ or from tiny-imagenet-200*.zip, decoding only the images asked for.

    Args:
        split: "train" or "val" (the 10,000 images the literature tests on).
        n: this many images, drawn at random with `seed`; None: all.
    Returns: images (n, 3, 64, 64) uint8, labels (n,) int64 in 0..199, the classes in the order of their WordNet ids.
    """
    from PIL import Image

    open_file = {}  # name inside tiny-imagenet-200/ -> function that opens it
    root = data_dir / "tiny-imagenet-200"
    archives = sorted(data_dir.glob("tiny-imagenet-200*.zip"))
    if root.is_dir():
        open_file = {p.relative_to(root).as_posix(): p.open for p in root.rglob("*") if p.suffix in (".JPEG", ".txt")}
    else:
        for path in archives:
            try:
                archive = zipfile.ZipFile(path)
            except zipfile.BadZipFile as error:
                raise UserError(f"{path} is not a whole zip file ({error}).\nRemove it and fetch it again.") from error
            for name in archive.namelist():
                open_file[name.removeprefix("tiny-imagenet-200/")] = lambda mode, a=archive, name=name: a.open(name)

    images = sorted(name for name in open_file if name.startswith(f"{split}/") and name.endswith(".JPEG"))
    if not images:
        raise Missing(f"no images in {root} or {data_dir}/tiny-imagenet-200*.zip.")
    if split == "train":  # train/n01443537/images/n01443537_0.JPEG
        label_of = {name: name.split("/")[1] for name in images}
    else:  # val_annotations.txt: val_0.JPEG <tab> n03444034 <tab> box
        if "val/val_annotations.txt" not in open_file:
            raise Missing(f"no val/val_annotations.txt in {root} or {data_dir}/tiny-imagenet-200*.zip.")
        with open_file["val/val_annotations.txt"]("rb") as file:
            rows = (line.decode().split("\t") for line in file)
            label_of = {f"val/images/{row[0]}": row[1] for row in rows}
    classes = sorted({name.split("/")[1] for name in open_file if name.startswith("train/") and name.endswith(".JPEG")})
    if n is not None and n < len(images):
        images = [images[i] for i in np.random.default_rng(seed).choice(len(images), n, replace=False)]
    x = np.empty((len(images), 64, 64, 3), np.uint8)
    for i, name in enumerate(images):
        try:
            with open_file[name]("rb") as file:
                x[i] = np.asarray(Image.open(file).convert("RGB"))
        except (OSError, ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:
            raise UserError(f"{name} of Tiny-ImageNet in {data_dir} is not a 64 x 64 picture ({error}).") from error
    number = {name: i for i, name in enumerate(classes)}
    unknown = {label_of.get(name) for name in images} - number.keys()
    if unknown:
        raise UserError(f"Tiny-ImageNet in {data_dir} is in part: {sorted(map(str, unknown))[:3]} have no training images.")
    y = np.array([number[label_of[name]] for name in images])
    return x.transpose(0, 3, 1, 2), y


# ---------------------------------------------------------------------------------------------------------------------
# Spherical images: CIFAR-100 seen from the sphere (NAS-Bench-360's generator, s2cnn's gendata.py, restated)
# ---------------------------------------------------------------------------------------------------------------------


def random_rotations(n, seed):
    """n random rotation matrices (n, 3, 3), uniform over rotations (Arvo 1992): M = (V V^T - I) R_z(2 pi r1)."""
    r1, r2, r3 = np.random.default_rng(seed).random((3, n))
    alpha, phi, zeta = 2 * np.pi * r1, 2 * np.pi * r2, 2 * r3
    zero, one = np.zeros(n), np.ones(n)
    rotation = np.array([[np.cos(alpha), np.sin(alpha), zero], [-np.sin(alpha), np.cos(alpha), zero], [zero, zero, one]])
    v = np.array([np.sin(phi) * np.sqrt(zeta), np.cos(phi) * np.sqrt(zeta), np.sqrt(2 - zeta)])  # (3, n), |v|^2 = 2
    return np.einsum("ikn,kjn->nij", v[:, None] * v[None] - np.eye(3)[:, :, None], rotation)


def sphere_grid(b):
    """Driscoll-Healy grid of bandwidth b: unit vectors (2b, 2b, 3); rows are colatitudes pi j / 2b, columns longitudes."""
    theta, phi = np.meshgrid(np.pi * np.arange(2 * b) / (2 * b), np.pi * np.arange(2 * b) / b, indexing="ij")
    return np.stack([np.sin(theta) * np.cos(phi), np.sin(theta) * np.sin(phi), np.cos(theta)], axis=-1)


def project_to_sphere(images, rotations, b=30):
    """Stereographic projection of flat pictures onto a rotated sphere.

    The sphere rests on the picture's plane and is lit from just above its north pole, so a point (x, y, z) of the
    sphere shows the plane's point q = s / (s - 1 - z) (x, y), s = 2.001. The picture fills |q| <= 1.5, x along its rows;
    outside of it is black. Values are interpolated bilinearly (the official script uses the pixels at -1 and +1 instead of
    0 and +1 and repairs the brightness afterwards).

    Args:
        images: (n, C, H, W) uint8.
        rotations: (n, 3, 3), one for each picture (the official script: one for 500 pictures).
    Returns: (n, C, 2b, 2b) uint8. About 0.1 ms a picture on two CPU cores.
    """
    import torch
    import torch.nn.functional as F

    grid, out = torch.tensor(sphere_grid(b), dtype=torch.float32), []
    for i in range(0, len(images), 500):
        x = torch.from_numpy(np.ascontiguousarray(images[i : i + 500])).float()  # (500, C, H, W)
        rotation = torch.tensor(rotations[i : i + 500], dtype=torch.float32)
        points = torch.einsum("nij,hwj->nhwi", rotation, grid)  # (500, 2b, 2b, 3)
        q = points[..., :2] * (2.001 / (2.001 - 1 - points[..., 2:]))  # (500, 2b, 2b, 2)
        where = q.flip(-1) / 1.5  # grid_sample wants (column, row) in [-1, 1]; x is the row
        out.append(F.grid_sample(x, where, padding_mode="zeros", align_corners=False).round().to(torch.uint8).numpy())
    return np.concatenate(out)


def read_spherical(data_dir, cache):
    """The official file if it is there, else our projection of CIFAR-100, kept under `cache` (10.8 kB an image)."""
    path, splits = data_dir / "s2_cifar100.gz", []
    if path.exists():
        content = unpickle(path)
        for name in ("train", "test"):
            part = {k.decode() if isinstance(k, bytes) else k: v for k, v in content.get(name, {}).items()}
            if not {"images", "labels"} <= part.keys():
                raise UserError(f"{path} has no images and labels under '{name}'.")
            splits.append(check_images(path, part["images"], part["labels"], (3, 60, 60), 100))
        return *splits, "official"
    for name, (x, y) in zip(("train", "test"), read_cifar100(data_dir, cache)[:2], strict=True):
        key = hashlib.sha256(x.tobytes()).hexdigest()[:12]
        path = cache / f"spherical-{name}-{key}.npy"
        if not path.exists():
            print(f"projecting {len(x):,} CIFAR-100 {name} images onto the sphere, once: {path}")
            sphere = project_to_sphere(x, random_rotations(len(x), seed=("train", "test").index(name)))
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_suffix(f".{os.getpid()}.part")  # another run may be doing the same
            with unfinished.open("wb") as file:
                np.save(file, sphere)
            unfinished.replace(path)
        splits.append((np.load(path, mmap_mode="r"), y))
    return *splits, "simulated"


# ---------------------------------------------------------------------------------------------------------------------
# Toy stand-ins
# ---------------------------------------------------------------------------------------------------------------------


def toy_pictures(n, size, seed):
    """Pictures whose class is a shape (ring, triangle, cross) and the texture inside it (plain, stripes, dots) together.

    Place, size, angle and all colours are random, so neither the colours nor the texture alone nor the outline alone tell
    the class.

    Returns: images (n, 3, size, size) uint8, labels (n,) int64 in 0..8, 3 shape + texture.
    """
    rng = np.random.default_rng(seed)
    shape, texture = rng.integers(3, size=n), rng.integers(3, size=n)
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1
    row, column = axis[None, :, None], axis[None, None, :]  # the picture is [-1, 1] x [-1, 1]

    def uniform(low, high, *shape):
        return rng.uniform(low, high, (n, *shape)).astype(np.float32)

    def turned(rows, columns, angle):
        c, s = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
        return c * rows + s * columns, c * columns - s * rows

    def pattern(kind):  # (n, size, size) in {0, 1}; a period is about a quarter of the picture
        u, v = turned(row, column, uniform(0, 2 * np.pi))
        frequency, phase = uniform(10, 14, 1, 1), uniform(0, 2 * np.pi, 2, 1, 1)
        a, b = np.sin(frequency * u + phase[:, 0]), np.sin(frequency * v + phase[:, 1])
        kinds = [np.zeros_like(a), a, a + b - 0.7]  # plain, stripes, dots
        return np.take_along_axis(np.stack(kinds), kind[None, :, None, None], axis=0)[0] > 0

    radius = uniform(0.7, 0.95)[:, None, None]
    u, v = turned(row - uniform(-0.1, 0.1)[:, None, None], column - uniform(-0.1, 0.1)[:, None, None], uniform(0, 2 * np.pi))
    u, v = u / radius, v / radius
    r, big, small = np.hypot(u, v), np.maximum(abs(u), abs(v)), np.minimum(abs(u), abs(v))
    triangle = np.maximum(abs(v) * 0.866 + u * 0.5, -u)  # distance to the nearest side
    inside = [(r > 0.45) & (r < 1), triangle < 0.55, (small < 0.3) & (big < 1)]  # ring, triangle, cross
    inside = np.take_along_axis(np.stack(inside), shape[None, :, None, None], axis=0)[0][:, None]  # (n, 1, size, size)
    colours = uniform(0, 255, 3, 3, 1, 1)
    front = np.where(pattern(texture)[:, None], colours[:, 0], colours[:, 1])
    x = np.where(inside, front, colours[:, 2]) + rng.normal(0, 15, (n, 3, size, size)).astype(np.float32)
    return x.clip(0, 255).astype(np.uint8), 3 * shape + texture


def toy_spherical(n, size, seed):
    """Toy pictures through the real projection: (n, 3, 60, 60) uint8."""
    x, y = toy_pictures(n, 32, seed)
    return project_to_sphere(x, random_rotations(n, seed), b=size // 2), y


# ---------------------------------------------------------------------------------------------------------------------
# Augmentation: functions of a batch and of uniform draws, the same on every device and for any number of processes
# ---------------------------------------------------------------------------------------------------------------------

DRAWS = 5  # uniform numbers an augmentation may use for one sample


def crop_and_flip(x, u, padding=4):
    """Random crop after zero padding, and horizontal flip. x (B, C, H, W) float in [0, 1], u (B, 5) in [0, 1)."""
    import torch

    B, C, H, W = x.shape
    padded = torch.nn.functional.pad(x, (padding,) * 4)  # (B, C, H + 2p, W + 2p)
    shift = (u[:, :2] * (2 * padding + 1)).long()  # 0..2p
    rows = shift[:, :1] + torch.arange(H, device=x.device)  # (B, H)
    columns = shift[:, 1:2] + torch.arange(W, device=x.device)  # (B, W)
    columns = torch.where(u[:, 2:3] < 0.5, columns, columns.flip(1))
    return padded[torch.arange(B, device=x.device)[:, None, None], :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


def resized_crop_and_flip(x, u, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)):
    """A box of random area and aspect ratio, enlarged to the whole picture, and horizontal flip (Inception's crop)."""
    import torch
    import torch.nn.functional as F

    area = scale[0] + (scale[1] - scale[0]) * u[:, 0]
    aspect = torch.exp(np.log(ratio[0]) + (np.log(ratio[1]) - np.log(ratio[0])) * u[:, 1])  # width / height
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)  # shares of the picture
    flip = torch.where(u[:, 4] < 0.5, 1.0, -1.0)
    theta = torch.zeros(len(x), 2, 3, device=x.device)
    theta[:, 0, 0], theta[:, 0, 2] = width * flip, (2 * u[:, 2] - 1) * (1 - width)
    theta[:, 1, 1], theta[:, 1, 2] = height, (2 * u[:, 3] - 1) * (1 - height)
    return F.grid_sample(x, F.affine_grid(theta, x.shape, align_corners=False), padding_mode="border", align_corners=False)


# ---------------------------------------------------------------------------------------------------------------------
# The table of tasks
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How a method trains on a task: the values of command line options that were not given."""

    epochs: int
    batch_size: int
    accumulate: int
    optimizer: Literal["sgd", "adam", "adamw"]
    lr: float
    weight_decay: float
    warmup_epochs: float
    decay_epochs: float  # the learning rate falls linearly to 0 here; published runs often stop long before
    clip: float = 0.0
    source: str = "cifar10"
    k_begin: float = 0.0  # PaRe: share of the target's tokens replaced in the first epoch
    k_end: float = 0.0  # PaRe as released: share that the schedule falls to
    embedder_epochs: int = 60  # ORCA: steps of the alignment
    max_samples: int = 128  # ORCA: samples of a target class in one of them
    source_samples: int = 5000  # ORCA: source samples that the distance is measured to
    reg: float = 0.1  # ORCA: entropic strength of its distance
    meta_epochs: int = 5  # MoNA: passes over the training samples in stage 1
    n_train: int | None = None


@dataclass(frozen=True)
class Task:
    """A task is data, not branches: no method file contains the name of one."""

    name: str
    about: str
    shape: tuple[int, int, int]  # C, H, W
    classes: int
    read: Callable  # (data_dir, cache) -> (x, y) train, (x, y) test, kind of data
    toy: Callable  # (n, size, seed) -> x, y
    downloads: tuple[str, ...]  # keys of DOWNLOADS: the first that can be had
    recipes: dict[str, Recipe] = field(repr=False)  # method -> published settings, full scale
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    augment: Callable | None = None
    metric: str = "error"
    direction: str = "min"

    def loss(self, out, y):
        """Cross-entropy. out (B, K), y (B,) -> scalar, in fp32."""
        from torch.nn.functional import cross_entropy

        return cross_entropy(out.float(), y)

    def score(self, out, y):
        """0-1 error in [0, 1] on all samples at once. out (n, K), y (n,) numpy arrays."""
        from sklearn.metrics import zero_one_loss

        return float(zero_one_loss(y, out.argmax(1)))


@dataclass(frozen=True)
class Proxy:
    """A labelled data set of the modality the backbone was pretrained on: the source."""

    name: str
    size: int
    classes: int
    read: Callable  # (data_dir, n, seed) -> x, y
    download: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: Callable


# The published settings (hyperparameters of the official configurations). cifar100: the official code sums the gradients of
# 32 accumulated batches, lr (sum g + wd w); we average them, 32 lr (mean g + wd / 32 w), which is the same step of SGD.
SPHERICAL = Recipe(60, 32, 4, "adamw", 1e-4, 0.1, warmup_epochs=5, decay_epochs=60)
CIFAR100 = Recipe(60, 32, 32, "sgd", 32 * 1e-4, 1e-3 / 32, warmup_epochs=5, decay_epochs=200)
K_BEGIN, K_END = 2000 / 3136, 500 / 3136

TASKS = {
    task.name: task
    for task in (
        Task(
            "spherical", "CIFAR-100 projected onto a rotated sphere", (3, 60, 60), 100, read_spherical, toy_spherical,
            downloads=("s2_cifar100", "cifar100"),
            recipes={
                "orca": SPHERICAL,
                "pare": replace(SPHERICAL, batch_size=16, accumulate=8, source="tiny_imagenet", k_begin=K_BEGIN, k_end=K_END),
            },
        ),
        Task(
            "cifar100", "natural images, the control", (3, 32, 32), 100, read_cifar100, toy_pictures,
            downloads=("cifar100",),
            recipes={"orca": CIFAR100, "pare": replace(CIFAR100, k_begin=K_BEGIN, k_end=K_END)},
            mean=(0.5071, 0.4867, 0.4408), std=(0.2675, 0.2565, 0.2761), augment=crop_and_flip,
        ),
    )
}  # fmt: skip

PROXIES = {
    proxy.name: proxy
    for proxy in (
        Proxy(
            "cifar10", 32, 10, lambda data_dir, n, seed: subset(*read_cifar10(data_dir), n, seed), "cifar10",
            (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), crop_and_flip,
        ),
        Proxy(
            "tiny_imagenet", 64, 200, lambda data_dir, n, seed: read_tiny_imagenet(data_dir, "train", n, seed), "tiny_imagenet",
            (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), resized_crop_and_flip,
        ),
    )
}  # fmt: skip

# The tiny scale has one recipe for every method and task: no method is tuned alone.
TINY = Recipe(12, 32, 1, "adamw", 1e-3, 0.05, warmup_epochs=1, decay_epochs=12, clip=1.0, embedder_epochs=20, max_samples=32,
              source_samples=1000, reg=0.0, meta_epochs=2, n_train=5000)  # fmt: skip
TOY_TRAIN, TOY_TEST = 3000, 1000
SOURCE_SAMPLES = 5000  # as in the official codes


def find_task(name):
    """The Task called `name`. Raises UserError with the nearest names."""
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, 3, 0.4) or TASKS
        raise UserError(f"there is no task {name!r}; perhaps {' or '.join(near)}. `python data.py` lists all.")
    return TASKS[name]


def complete(args, method, scale):
    """`args` with every option that was left at None filled in from the recipe of its task, method and scale."""
    recipes = find_task(args.task).recipes
    recipe = recipes.get(method, recipes["orca"])
    if scale == "tiny":
        recipe = replace(TINY, source=recipe.source, k_begin=recipe.k_begin, k_end=recipe.k_end)
    squeeze = (args.epochs or recipe.epochs) / recipe.epochs  # a shorter run has the same learning rate curve, squeezed
    recipe = replace(
        recipe,
        warmup_epochs=recipe.warmup_epochs * squeeze,
        decay_epochs=recipe.decay_epochs * squeeze,
        k_end=recipe.k_end if args.as_released else 0.0,
        reg=Recipe.reg if args.as_released else recipe.reg,
    )
    return replace(args, **{f.name: getattr(recipe, f.name) for f in fields(recipe) if getattr(args, f.name, "") is None})


# ---------------------------------------------------------------------------------------------------------------------
# Data on the device
# ---------------------------------------------------------------------------------------------------------------------


class Split:
    """One split, whole, on the device: x (n, C, H, W) uint8, y (n,) int64; normalised and augmented there, in batches.

    `like` is its Task or Proxy: name, mean, std and augmentation.
    """

    def __init__(self, x, y, classes, kind, like, device):
        import torch

        self.x = torch.from_numpy(np.require(x, requirements="CWO")).to(device)  # copied if x is the map of a file
        self.y = torch.from_numpy(np.require(y, requirements="CWO")).to(device)
        self.classes, self.kind, self.augment = classes, kind, like.augment
        self.stream = zlib.crc32(like.name.encode())  # target and source draw different numbers
        self.mean = torch.tensor(like.mean, device=device)[:, None, None]  # (C, 1, 1)
        self.std = torch.tensor(like.std, device=device)[:, None, None]

    def __len__(self):
        return len(self.y)

    def inputs(self, index, u=None):
        """Samples `index`, scaled to [0, 1], augmented by the draws u (B, 5) if there are any, normalised: (B, C, H, W)."""
        x = self.x[index].float() / 255
        if u is not None and self.augment is not None:
            x = self.augment(x, u)
        return (x - self.mean) / self.std

    def plan(self, steps, batch_size, seed, epoch):
        """The samples of every step of an epoch (steps, batch_size) and the draws that augment them (steps, batch_size, 5).

        Shuffled, all batches of one size: what does not fill a batch is left out and comes in another epoch; a set smaller
        than the epoch starts over.
        """
        import torch

        generator = torch.Generator().manual_seed(int(np.random.SeedSequence([seed, epoch, self.stream]).generate_state(1)[0]))
        rounds = -(-steps * batch_size // len(self))
        order = torch.cat([torch.randperm(len(self), generator=generator) for _ in range(rounds)])[: steps * batch_size]
        return order.view(steps, batch_size), torch.rand(steps, batch_size, DRAWS, generator=generator)

    def batches(self, steps, batch_size, seed, epoch, rank=0, world=1):
        """The augmented batches x (B, C, H, W), y (B,) of this process, B = batch_size / world.

        All processes follow one plan and take their own columns of it: G processes see the batches of one.
        """
        order, u = (part[:, rank::world].to(self.y.device) for part in self.plan(steps, batch_size, seed, epoch))
        for index, draws in zip(order, u, strict=True):
            yield self.inputs(index, draws), self.y[index]


def subset(x, y, n, seed):
    """n of the samples, drawn at random; all of them if there are no more."""
    index = np.sort(np.random.default_rng(seed).permutation(len(y))[:n])
    return x[index], y[index]


@dataclass
class Loaded:
    task: Task
    train: Split
    val: Split
    test: Split


def load(task, data_dir, cache, scale, n_train=None, seed=0, device="cpu"):
    """Training, validation and test split of a task, on the device.

    A tenth of the training samples that are used is held out for validation, drawn with `seed`; the official codes choose
    the checkpoint on the test set. `n_train` remain for training (None: the other nine tenths of all there are).

    Raises: Missing at full scale when the files are not there; at the tiny scale toy data take their place, aloud.
    """
    task, data_dir = find_task(task), Path(data_dir)
    classes = task.classes
    try:
        train, test, kind = task.read(data_dir, Path(cache))
    except Missing as missing:
        advice = f"`python data.py --prepare {task.name} --data-dir {data_dir}` fetches the files."
        if scale != "tiny":
            raise Missing(f"{task.name}: {missing}\n{advice} To try without: --scale tiny.") from None
        print(f"TOY DATA: {missing}\n          Generated pictures take the place of {task.name}; {advice}")
        n = min(n_train or TOY_TRAIN, TOY_TRAIN)
        train = task.toy(n + n // 9 + 1, task.shape[1], seed=0)
        test = task.toy(TOY_TEST, task.shape[1], seed=1)
        kind, classes = "toy", int(train[1].max()) + 1
    order = np.random.default_rng(seed).permutation(len(train[1]))
    n_train = min(n_train or len(order), len(order) - max(1, len(order) // 10))
    n_val = max(1, n_train // 9)
    parts = {"val": np.sort(order[:n_val]), "train": np.sort(order[n_val : n_val + n_train])}
    splits = {name: Split(train[0][i], train[1][i], classes, kind, task, device) for name, i in parts.items()}
    loaded = Loaded(task, **splits, test=Split(*test, classes, kind, task, device))
    print(f"target  {task.name}: {kind} data, {n_train:,} samples for training and {n_val:,} for validation of {len(order):,},",
          f"{len(loaded.test):,} for test, {classes} classes")  # fmt: skip
    return loaded


def load_proxy(name, data_dir, scale, n=SOURCE_SAMPLES, seed=0, device="cpu"):
    """n labelled samples of the source modality, as a Split; toy pictures at the tiny scale if the files are missing."""
    proxy, data_dir = PROXIES[name], Path(data_dir)
    try:
        x, y = proxy.read(data_dir, n, seed)
        kind, classes = "official", proxy.classes
    except Missing as missing:
        advice = f"`python data.py --prepare {name} --data-dir {data_dir}` fetches the files."
        if scale != "tiny":
            raise Missing(f"source {name}: {missing}\n{advice} To try without: --scale tiny.") from None
        print(f"TOY DATA: {missing}\n          Generated pictures take the place of {name}; {advice}")
        x, y = toy_pictures(min(n, TOY_TEST), proxy.size, seed=2)
        kind, classes = "toy", 9
    print(f"source  {name}: {kind} data, {len(y):,} samples, {classes} classes")
    return Split(x, y, classes, kind, proxy, device)


# ---------------------------------------------------------------------------------------------------------------------
# python data.py
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Args:
    prepare: str | None = None
    """fetch what this task and its sources (or this source) need"""
    data_dir: str = "datasets"
    """where the official files lie, or go"""


def prepare(name, data_dir):
    """Fetch the files of a task and of its sources, or of one source. Raises UserError if they cannot be had."""
    if name in PROXIES:
        wanted = [(PROXIES[name].download,)]
    else:
        task = find_task(name)
        sources = sorted({recipe.source for recipe in task.recipes.values()})
        wanted = [task.downloads] + [(PROXIES[source].download,) for source in sources]
    for keys in wanted:
        if here := [key for key in keys if present(DOWNLOADS[key], data_dir)]:
            print(f"{here[0]}: present")
            continue
        for key in keys:
            try:
                fetch(DOWNLOADS[key], data_dir)
                print(f"{key}: fetched")
                break
            except UserError as error:
                if key == keys[-1]:
                    raise
                print(f"{key}: {error}\nTrying {keys[1]} instead, from which we make it.")


def print_tasks(data_dir):
    """The table of tasks: shape, classes, metric, source, what is present locally."""
    print(f"{'task':12}{'shape':14}{'classes':9}{'metric':8}{'source (PaRe)':15}{'in ' + str(data_dir):22}about")
    for task in TASKS.values():
        here = [key for key in task.downloads if present(DOWNLOADS[key], data_dir)]
        shape = " x ".join(map(str, task.shape))
        print(f"{task.name:12}{shape:14}{task.classes:<9}{task.metric:8}{task.recipes['pare'].source:15}",
              f"{', '.join(here) or 'nothing':22}{task.about}", sep="")  # fmt: skip
    print()
    for proxy in PROXIES.values():
        here = "present" if present(DOWNLOADS[proxy.download], data_dir) else "missing"
        print(f"source {proxy.name}: 3 x {proxy.size} x {proxy.size}, {proxy.classes} classes, {here}")
    print(f"\n`python data.py --prepare NAME --data-dir {data_dir}` fetches what is missing.")


def main(args):
    if args.prepare:
        prepare(args.prepare, args.data_dir)
    print_tasks(args.data_dir)


if __name__ == "__main__":
    guarded(main, command_line(Args, __doc__))
