"""Images: CIFAR, Tiny-ImageNet, VOC, and CIFAR-100 projected onto the sphere; how images are augmented.

A reader of a task takes (data_dir, cache) and returns (x, y) of training, (x, y) of test and the origin of the data; a reader
of a source takes (data_dir, n, seed), for text also the tokenizer, and returns x, y.
Shapes: n samples, B batch, C channels, H W sizes, 2b x 2b the sphere's grid.
torch is imported only where it is used, in all of tasks/ except pde.py, so that `python data.py` starts quickly.
"""

import glob
import hashlib
import io
import zipfile
from pathlib import Path

import numpy as np

from cli import Missing, UserError, stream
from tasks.files import (
    DOWNLOADS,
    check,
    drawn,
    find,
    is_system_file,
    locate,
    map_cached,
    numbers,
    read_text,
    reading,
    save_array,
    text_list,
    unpickle_entries,
)

# ---------------------------------------------------------------------------------------------------------------------
# Images with a class
# ---------------------------------------------------------------------------------------------------------------------


def check_images(path, images, labels, shape, classes):
    """The two arrays as (n, *shape) uint8 and (n,) int64. Raises UserError if they are anything else."""
    images = numbers(f"{path}: images", images)
    if images.dtype != np.uint8:  # whether their values go to 1 or to 255 would be a guess
        raise UserError(f"{path}: {images.dtype} images {images.shape}; expected uint8.")
    images, labels = check(f"{path}: images", images, shape, "input"), check(f"{path}: labels", labels, (), "class", classes)
    if len(images) != len(labels):
        raise UserError(f"{path}: {len(labels)} labels for {len(images)} images.")
    return images, labels


def read_cifar(folder, names, label, classes):
    """Images (n, 3, 32, 32) uint8 and labels (n,) from those of the official pickles `names` that are in `folder`."""
    paths = [folder / name for name in names if (folder / name).exists()]
    if not paths:
        raise Missing(f"no {' or '.join(names[:2])} in {folder}.")
    parts = []
    for path in paths:
        x, y = check_images(path, *unpickle_entries(path, "data", label), (3072,), classes)
        parts.append((x.reshape(-1, 3, 32, 32), y))  # a row is the red, green and blue plane: (n, 3072) -> (n, 3, 32, 32)
    return tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))


def read_cifar100(data_dir, cache):
    folder = data_dir / "cifar-100-python"
    return *(read_cifar(folder, [name], "fine_labels", 100) for name in ("train", "test")), "official"


def cifar100_names(data_dir):
    """The 100 fine names, (100,) str, from the archive's `meta`, underscores as they are. Spherical has the same classes."""
    path = data_dir / "cifar-100-python" / "meta"
    if not path.exists():
        raise Missing(f"no {path}, which has the names of the classes.\n`python data.py --prepare cifar100` downloads it.")
    (names,) = unpickle_entries(path, "fine_label_names")
    return text_list(f"{path}: fine_label_names", names, 100)


def read_cifar10(data_dir, n=None, seed=0):
    folder, names = data_dir / "cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)]
    archive = data_dir / DOWNLOADS["cifar10"].file  # it is removed once all of it is unpacked
    if folder.exists() and archive.exists() and not all((folder / name).exists() for name in names):
        again = f"Repeat `python data.py --prepare cifar10 --data-dir {data_dir}`, or remove the archive."
        raise UserError(f"{folder} is incomplete: {archive} is still there.\n{again}")
    return subset(*read_cifar(folder, names, "labels", 10), n, seed)


def subset(x, y, n, seed):
    """n of the samples, drawn at random; all if n is None or there are fewer."""
    index = drawn(len(y), n, seed)
    return x[index], y[index]


def read_tiny_imagenet(data_dir, n=None, seed=0, split="train"):
    """Tiny-ImageNet from the folder tiny-imagenet-200/ or from tiny-imagenet-200*.zip; only the images returned are decoded.

    Args:
        split: "train" or "val" (the 10,000 images the literature tests on).
        n: this many images, drawn at random with `seed`; None: all.
    Returns: images (n, 3, 64, 64) uint8, labels (n,) int64 in 0..199, the classes in the order of their WordNet ids.
    """
    from PIL import Image

    open_file = {}  # name inside tiny-imagenet-200/ -> function that opens it
    root = data_dir / "tiny-imagenet-200"
    archives = find(data_dir, "tiny-imagenet-200*.zip")
    if root.is_dir():
        names = glob.iglob("**", root_dir=root, recursive=True)  # also of linked folders
        open_file = {Path(name).as_posix(): (root / name).open for name in names if name.endswith((".JPEG", ".txt"))}
    else:
        for path in archives:
            with reading(path, "zip file"):
                archive = zipfile.ZipFile(path)
            for name in archive.namelist():
                open_file[name.removeprefix("tiny-imagenet-200/")] = lambda mode, a=archive, name=name: a.open(name)

    open_file = {name: opened for name, opened in open_file.items() if not is_system_file(name)}
    images = sorted(name for name in open_file if name.startswith(f"{split}/") and name.endswith(".JPEG"))
    if not images:
        raise Missing(f"no images in {root} or {data_dir}/tiny-imagenet-200*.zip.")
    if split == "train":  # train/n01443537/images/n01443537_0.JPEG
        label_of = {name: name.split("/")[1] for name in images}
    else:  # val_annotations.txt: val_0.JPEG <tab> n03444034 <tab> box
        if "val/val_annotations.txt" not in open_file:
            raise Missing(f"no val/val_annotations.txt in {root} or {data_dir}/tiny-imagenet-200*.zip.")
        with reading(root / "val/val_annotations.txt", "table"), open_file["val/val_annotations.txt"]("rb") as file:
            rows = (line.split("\t") for line in io.TextIOWrapper(file, "utf-8-sig"))
            label_of = {f"val/images/{row[0]}": row[1] for row in rows}
    classes = sorted({name.split("/")[1] for name in open_file if name.startswith("train/") and name.endswith(".JPEG")})
    if n is not None and n < len(images):
        chosen = np.random.default_rng(stream("source samples", seed)).choice(len(images), n, replace=False)
        images = [images[i] for i in chosen]
    x = np.empty((len(images), 64, 64, 3), np.uint8)
    for i, name in enumerate(images):
        with reading(f"{name} of Tiny-ImageNet in {data_dir}", "image"), open_file[name]("rb") as file:
            image = Image.open(file)
            if image.size != (64, 64):
                raise ValueError(f"{image.width} x {image.height} pixels, not 64 x 64")
            x[i] = np.asarray(image.convert("RGB"))
    number = {name: i for i, name in enumerate(classes)}
    unknown = {label_of.get(name) for name in images} - number.keys()
    if unknown:
        raise UserError(f"Tiny-ImageNet in {data_dir} is incomplete: {sorted(map(str, unknown))[:3]} have no training images.")
    y = np.array([number[label_of[name]] for name in images])
    return x.transpose(0, 3, 1, 2), y


BORDER = 255  # in a mask of VOC: ignored pixels


def voc_colour(k):
    """The colour (red, green, blue) of class k in VOC's palette: bits 0, 3, 6 of k are the highest bits of red, and so on."""
    return tuple(sum((k >> 3 * bit + channel & 1) << 7 - bit for bit in range(3)) for channel in range(3))


VOC_CLASSES = {voc_colour(k): k for k in (*range(21), BORDER)}


def read_voc_mask(path):
    """A mask of VOC, resized: (128, 128) 1 where an object is, 0 background, NaN border.

    Raises UserError if it is not of one channel with classes 0 (background) to 20 and 255, or if its palette has the colours of
    VOC in another order: some programs renumber the colours of an image they save.
    """
    from PIL import Image

    with reading(path, "palette image"):
        image = Image.open(path)
        classes = np.asarray(image)  # (H, W)
        small = np.asarray(image.resize((128, 128), Image.NEAREST))
    found = np.unique(classes)
    if classes.ndim != 2 or not set(found.tolist()) <= set(VOC_CLASSES.values()):
        what = f"the values {found[:30].tolist()}" if classes.ndim == 2 else f"{classes.shape[2]} channels"
        raise UserError(f"{path} has {what}; expected one channel of classes 0 to 20, and {BORDER} for a border.")
    palette = image.getpalette() if image.mode == "P" else []  # red, green, blue of 0, of 1, ...
    for k in found.tolist():
        if (meant := VOC_CLASSES.get(tuple(palette[3 * k : 3 * k + 3]), k)) != k:
            raise UserError(f"{path} has {k} where VOC has {meant}: a program renumbered its colours.\nUse VOC's own file.")
    return np.where(small == BORDER, np.nan, small > 0)


def read_voc(data_dir, n, seed):
    """PASCAL VOC 2012: images (n, 3, 224, 224) uint8; masks (n, 128, 128) 1 where an object is, 0 background, NaN border.

    From VOC2012/ImageSets/Segmentation/train.txt, 1,464 names; the folders JPEGImages and SegmentationClass.
    """
    from PIL import Image

    listing = locate(data_dir, "VOC2012/ImageSets/Segmentation/train.txt")
    names, root = read_text(listing).split(), listing.parents[2]
    names = [names[i] for i in drawn(len(names), n, seed)]
    if not names:
        raise UserError(f"{listing} is empty.")
    x, y = np.empty((len(names), 3, 224, 224), np.uint8), np.empty((len(names), 128, 128), np.float32)
    for i, name in enumerate(names):
        image, mask = root / f"JPEGImages/{name}.jpg", root / f"SegmentationClass/{name}.png"
        for path in (image, mask):
            if not path.exists():
                raise Missing(f"no {path}.")
        with reading(image, "image"):
            x[i] = np.asarray(Image.open(image).convert("RGB").resize((224, 224), Image.BILINEAR)).transpose(2, 0, 1)
        y[i] = read_voc_mask(mask)
    return x, y


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
    """Stereographic projection of flat images onto a rotated sphere.

    The sphere rests on the image's plane and is lit from just above its north pole, so a point (x, y, z) of the
    sphere shows the plane's point q = s / (s - 1 - z) (x, y), s = 2.001. The image fills |q| <= 1.5, x along its rows;
    outside of it is black. Values are interpolated bilinearly (the official script uses the pixels at -1 and +1 instead of
    0 and +1 and repairs the brightness afterwards).

    Args:
        images: (n, C, H, W) uint8.
        rotations: (n, 3, 3), one for each image (the official script: one for 500 images).
    Returns: (n, C, 2b, 2b) uint8. About 0.1 ms an image on two CPU cores.
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
    """The official file; if it is missing, our projection of CIFAR-100, cached (10.8 kB an image)."""
    path, splits = data_dir / "s2_cifar100.gz", []
    if path.exists():
        for name, part in zip(("train", "test"), unpickle_entries(path, "train", "test"), strict=True):
            part = {k.decode() if isinstance(k, bytes) else k: v for k, v in part.items()} if isinstance(part, dict) else {}
            if not {"images", "labels"} <= part.keys():
                raise UserError(f"{path} has no images and labels under '{name}'.")
            splits.append(check_images(f"{path}: {name}", part["images"], part["labels"], (3, 60, 60), 100))
        return *splits, "official"
    for name, (x, y) in zip(("train", "test"), read_cifar100(data_dir, cache)[:2], strict=True):
        key = hashlib.sha256(x.tobytes()).hexdigest()[:12]
        path = cache / f"spherical-{name}-{key}.npy"
        if not path.exists():
            print(f"projecting {len(x):,} CIFAR-100 {name} images onto the sphere, once: {path}")
            sphere = project_to_sphere(x, random_rotations(len(x), seed=("train", "test").index(name)))
            save_array(path, sphere)
        splits.append((map_cached(path), y))
    return *splits, "simulated"


# ---------------------------------------------------------------------------------------------------------------------
# Augmentation: functions of a batch and of uniform draws, the same on every device and for any number of processes.
# Without draws (validation, test), only what every sample needs is done
# ---------------------------------------------------------------------------------------------------------------------


def crop_and_flip(x, u, padding=4):
    """Random crop after zero padding, and horizontal flip. x (B, C, H, W) float in [0, 1], u (B, 5) in [0, 1) or None."""
    import torch

    if u is None:
        return x

    B, C, H, W = x.shape
    padded = torch.nn.functional.pad(x, (padding,) * 4)  # (B, C, H + 2p, W + 2p)
    shift = (u[:, :2] * (2 * padding + 1)).long()  # 0..2p
    rows = shift[:, :1] + torch.arange(H, device=x.device)  # (B, H)
    columns = shift[:, 1:2] + torch.arange(W, device=x.device)  # (B, W)
    columns = torch.where(u[:, 2:3] < 0.5, columns, columns.flip(1))
    cut = padded[torch.arange(B, device=x.device)[:, None, None], :, rows[:, :, None], columns[:, None]]  # (B, H, W, C)
    return cut.permute(0, 3, 1, 2)  # (B, C, H, W)


def resized_crop_and_flip(x, u, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)):
    """Inception's crop: a random box, resized to the whole image, and horizontal flip. x (B, C, H, W), u (B, 5) or None"""
    import torch
    import torch.nn.functional as F

    if u is None:
        return x
    area = scale[0] + (scale[1] - scale[0]) * u[:, 0]
    aspect = torch.exp(np.log(ratio[0]) + (np.log(ratio[1]) - np.log(ratio[0])) * u[:, 1])  # width / height
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)  # shares of the image
    flip = torch.where(u[:, 4] < 0.5, 1.0, -1.0)
    theta = torch.zeros(len(x), 2, 3, device=x.device)
    theta[:, 0, 0], theta[:, 0, 2] = width * flip, (2 * u[:, 2] - 1) * (1 - width)
    theta[:, 1, 1], theta[:, 1, 2] = height, (2 * u[:, 3] - 1) * (1 - height)
    return F.grid_sample(x, F.affine_grid(theta, x.shape, align_corners=False), padding_mode="border", align_corners=False)
