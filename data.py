"""The tasks: what they look like, where their files come from, how they are prepared and scored.

    python data.py                       the table of tasks, and what is present in --data-dir
    python data.py --prepare spherical   fetch what the task and its source need (checksum, resumes a broken download)

A run reads --data-dir and writes only under --out-dir. Where its data come from is never hidden (result.json, "data"):
"official" the benchmark's own files; "simulated" made here by the benchmark's procedure (PDEs: solved by pde.py; spherical:
real CIFAR-100 images, projected by us); "sklearn" scikit-learn's copy of an OpenML table; "toy" a generated stand-in of the
same shape, at the tiny scale only.

Shapes: n samples, B batch, C channels, H W L sizes, K classes. torch is imported where it is used, so that `--help` answers
at once.
"""

import contextlib
import csv
import difflib
import errno
import functools
import gzip
import hashlib
import http.client
import json
import math
import os
import pickle
import re
import shutil
import sys
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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
                     "embedder_lr", "meta_lr", "inner_lr", "max_samples", "classes_per_problem", "source_samples",
                     "jobs"):  # fmt: skip
            if (value := getattr(args, name, None)) is not None and not value > 0:
                raise UserError(f"--{name.strip('_').replace('_', '-')} {value} must be positive.")
        for name, most in (("k_begin", 1), ("k_end", 1), ("seed", 2**32), ("gate_noise", 1e3), ("clip", 1e9),
                           ("weight_decay", 1e6), ("warmup_share", 1), ("embedder_epochs", 1e6), ("meta_epochs", 1e6),
                           ("reg", 1e9), ("lambda_", 1e9), ("momentum", 1), ("dropout", 1), ("mix_weight", 1e6)):  # fmt: skip
            if not 0 <= (getattr(args, name, None) or 0) <= most:
                raise UserError(f"--{name.strip('_').replace('_', '-')} {getattr(args, name)} must lie between 0 and {most:g}.")
        return args

    return guarded(read)


def guarded(main, *args):
    """Call `main`; a UserError, a forbidden folder, a full disk become one or two lines on stderr and exit code 2."""
    try:
        return main(*args)
    except UserError as error:
        message = str(error)
    except KeyboardInterrupt:
        print(f"\n{Path(sys.argv[0]).name}: stopped. A training run goes on with --resume.", file=sys.stderr)
        raise SystemExit(130) from None
    except (PermissionError, NotADirectoryError) as error:
        message = f"{error.filename}: {error.strerror}.\nGive a folder of your own."
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
    name: str | None = None  # where it goes in the data folder, if not to the address's last part
    by_hand: str = ""  # another way to get it
    unpack: bool = False  # a zip that is read as a folder


NAS, DARUS = "https://pde-xd.s3.amazonaws.com", "https://darus.uni-stuttgart.de/api/access/datafile"
NAS_DRIVE = "NAS-Bench-360's Google Drive, https://drive.google.com/drive/folders/1OOp6UrCiP79mTIkCrUdjjHWDo8K0bJUw"
NINAPRO = {"ninapro_train": "d4c33785587983348e6091e86a0d30b6", "label_train": "4164e7fcae3f8abed0a04fd86b704f77",
           "ninapro_val": "138b106d4374a3fc204e41f6c4deda49", "label_val": "f0464819f7ed56cb1cbbfafd312bd604",
           "ninapro_test": "8a2b2cf87d5a5cf3986db2d67ebcfa18", "label_test": "807b502000dba69ae0111063970ac5d2"}  # fmt: skip


def nas(path, megabytes, *gives, md5=None, name=None, unpack=False):
    """A file of NAS-Bench-360, whose public bucket may no longer answer."""
    name = name or path.rsplit("/", 1)[-1]
    return Download(f"{NAS}/{path}", md5, megabytes, gives or (f"**/{Path(name).name}",), name, NAS_DRIVE, unpack)


def darus(number, md5, megabytes, name):
    """A file of PDEBench, doi:10.18419/darus-2986."""
    return Download(f"{DARUS}/{number}", md5, megabytes, (f"**/{name}",), name)


DOWNLOADS = {
    "s2_cifar100": Download("https://pde-xd.s3.amazonaws.com/spherical/s2_cifar100.gz", None, 272, ("s2_cifar100.gz",)),
    "cifar100": Download("https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85",
                         161, ("cifar-100-python/train", "cifar-100-python/test")),
    "darcy_train": nas("piececonst_r421_N1024_smooth1.mat", 1600),
    "darcy_test": nas("piececonst_r421_N1024_smooth2.mat", 1600),
    "protein": nas("protein.zip", 1100, "**/deepcov.lst", "**/psicov.lst", unpack=True),
    "cosmic_train": nas("cosmic/deepCR.ACS-WFC.train.tar", 6500, "**/npy_train"),
    "cosmic_test": nas("cosmic/deepCR.ACS-WFC.test.tar", 2000, "**/npy_test"),
    **{key: nas(f"ninapro/{key}.npy", 10, md5=md5, name=f"ninapro/{key}.npy") for key, md5 in NINAPRO.items()},
    "audio": nas("audio/audio.zip", 24000, "**/chunks/tr.csv", "**/chunks/eval.csv", unpack=True),
    "ecg": nas("ECG/challenge2017.pkl", 150),
    "satellite_train": nas("satellite/satellite_train.npy", 322, name="satellite/satellite_train.npy"),
    "satellite_test": nas("satellite/satellite_test.npy", 35, name="satellite/satellite_test.npy"),
    "deepsea": nas("deepsea/deepsea_filtered.npz", 860),
    # advection and Burgers: the files as corrected in 2023. ORCA (February 2023) used the earlier ones, 133110 and 133142,
    # whose waves move twice as fast
    "advection1d": darus(255674, "d595bbfd2c659df995a93cd40d6ea568", 8200, "1D_Advection_Sols_beta0.4.hdf5"),
    "burgers1d": darus(281365, "9021eba35332d127306f11ef84c1a60f", 8200, "1D_Burgers_Sols_Nu1.0.hdf5"),
    "diffusion_reaction1d": darus(133177, "69a429239778d529cd419ed5888ea835", 4100, "ReacDiff_Nu0.5_Rho1.0.hdf5"),
    "diffusion_sorption1d": darus(133020, "9d466d1213065619d087319e16d9a938", 4100, "1D_diff-sorp_NA_NA.h5"),
    "navier_stokes1d": darus(164668, "45655bd77d006ab539c52b7fbcf099b9", 12400,
                             "1D_CFD_Rand_Eta0.1_Zeta0.1_periodic_Train.hdf5"),
    "darcy2d": darus(133218, "294f9a03a4aa16b0e386469ca8b471be", 1300, "2D_DarcyFlow_beta0.1_Train.hdf5"),
    "shallow_water2d": darus(133021, "75d838c47aa410694bdc912ea7f22282", 6600, "2D_rdb_NA_NA.h5"),
    "diffusion_reaction2d": darus(133017, "b8d0b86064193195ddc30c33be5dc949", 13200, "2D_diff-react_NA_NA.h5"),
    "cifar10": Download("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a",
                        163, ("cifar-10-batches-py/data_batch_*", "cifar-10-batches-py/test_batch")),
    "tiny_imagenet": Download("http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de",
                              237, ("tiny-imagenet-200*",)),
    "voc": Download("http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
                    "6cd6e144f989b92b3379bac3b3de84fd", 2000, ("**/VOC2012/ImageSets/Segmentation/train.txt",)),
    "conll2003": Download("https://data.deepai.org/conll2003.zip", None, 1, ("**/conll2003/train.txt",),
                          name="conll2003/conll2003.zip", by_hand="any copy of train.txt or eng.train", unpack=True),
    "conll2000": Download("https://raw.githubusercontent.com/nltk/nltk_data/gh-pages/packages/corpora/conll2000.zip", None, 1,
                          ("**/conll2000/train.txt",), by_hand="NLTK's corpora/conll2000.zip", unpack=True),
}  # fmt: skip


DEPTH = 3  # where files are looked for: in the data folder itself, in its folders, and in theirs


def present(download, data_dir):
    """Is all that the download gives in the folder? Patterns that begin with **/ look as deep as `locate`."""
    file = Path(data_dir) / (download.name or download.url.rsplit("/", 1)[1])
    if (download.unpack or file.name.endswith((".tar", ".tar.gz"))) and file.exists():
        return False  # an archive goes when all of it is unpacked

    def found(pattern):
        deep = [f"{'*/' * depth}{pattern[3:]}" for depth in range(DEPTH)] if pattern.startswith("**/") else [pattern]
        return any(p.suffix != ".part" for d in deep for p in Path(data_dir).glob(d))

    return all(found(pattern) for pattern in download.gives)


def fetch(download, data_dir):
    """Fetch one file into `data_dir` and unpack it there if it is an archive; a broken download goes on where it stopped.

    Raises UserError when the server does not answer, sends too little, or sends something else than the checksum says.
    """
    import tarfile
    import urllib.error
    import urllib.request

    from tqdm import tqdm

    data_dir = Path(data_dir)
    path = data_dir / (download.name or download.url.rsplit("/", 1)[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    by_hand = f" ({download.by_hand})" * bool(download.by_hand)
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
                    f"{download.url} answers {error.code}.\nFetch it by hand{by_hand}: {path}, {download.megabytes:,} MB."
                ) from error
            total = have
        except (OSError, http.client.HTTPException) as error:
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(
                f"{download.url} cannot be reached ({error}).\n"
                f"Try again later, or fetch it by hand{by_hand}: {path}, {download.megabytes:,} MB."
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
    if download.unpack or path.name.endswith((".tar.gz", ".tar")):
        try:
            if download.unpack:
                with zipfile.ZipFile(path) as archive:
                    archive.extractall(path.parent)
            else:
                with tarfile.open(path) as archive:
                    archive.extractall(data_dir, filter="data")
        except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error) as error:
            raise UserError(f"{path} is not a whole archive ({error}).\nRemove it and fetch it again.") from error
        path.unlink()


# ---------------------------------------------------------------------------------------------------------------------
# Reading files
# ---------------------------------------------------------------------------------------------------------------------


class Lazy:
    """Samples that stay in their files until they are asked for: `read(rows, u)` gives an array (B, ...).

    `u` are the uniform draws (B, draws) of a training batch, or None. `groups` (n,) tells which samples belong together (cut
    from one record), so that they are not parted between training and validation.
    """

    def __init__(self, n, read, groups=None, rows=None):
        self.rows, self.groups, self._read = np.arange(n) if rows is None else rows, groups, read

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return Lazy(None, self._read, self.groups if self.groups is None else self.groups[index], self.rows[index])

    def read(self, index, u=None):
        return self._read(self.rows[index], u)


def of_files(read, paths):
    """Samples that lie each in a file of their own, read by `read`."""
    return Lazy(len(paths), lambda rows, u: np.stack([read(paths[row]) for row in rows]))


@contextlib.contextmanager
def reading(path, what):
    """Whatever goes wrong while a file is read becomes a UserError that names it: a damaged file can raise anything."""
    try:
        yield
    except (UserError, MemoryError, PermissionError):  # no fault of the file
        raise
    except Exception as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):  # unpacking to a full disk is no fault of the file
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is not a readable {what} ({reason}).\nRemove it and fetch it again.") from error


def locate(data_dir, name):
    """The file or folder `name` in data_dir, at most two folders deep. Raises Missing."""
    for depth in range(DEPTH):
        if found := sorted(Path(data_dir).glob("*/" * depth + name)):
            return found[0]
    raise Missing(f"no {name} in {data_dir}.")


def beside(path, name):
    """The file `name` in the folder of `path`. Raises Missing."""
    if not (path := path.with_name(name)).exists():
        raise Missing(f"no {path.name} in {path.parent}.")
    return path


def save_array(path, array):
    """Write an .npy file under its final name only when it is whole: another run may be doing the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.part")
    with unfinished.open("wb") as file:
        np.save(file, array)
    unfinished.replace(path)


def kept(cache, name, what, make):
    """The two arrays of `make()`, which takes long, kept under `cache`: it runs once, and says `what` it does. Mapped."""
    paths = [cache / f"{name}-{part}.npy" for part in ("x", "y")]
    if not all(path.exists() for path in paths):
        print(f"{what}, once; kept in {cache}")
        for path, array in zip(paths, make(), strict=True):
            save_array(path, array)
    return tuple(np.load(path, mmap_mode="r") for path in paths)


def kept_of_file(cache, name, file, make):
    """The two arrays that `make()` reads from a large `file`, kept: it is gone through once, and again if it has changed."""
    key = hashlib.sha256(f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}".encode()).hexdigest()[:12]
    return kept(cache, f"{name}-{key}", f"reading what is needed of {file}", make)


def read_npy(path, shape=None):
    """The array in an .npy file. Raises UserError if it is damaged, or not shaped as `shape` says (None: any number)."""
    with reading(path, ".npy file"):
        array = np.load(path, allow_pickle=False)
    return check_shape(path, array, shape or (None,) * array.ndim)


def check_shape(path, array, shape):
    if array.ndim != len(shape) or any(want not in (None, have) for want, have in zip(shape, array.shape, strict=True)):
        raise UserError(f"{path} holds {array.shape}; expected ({', '.join(str(s or 'n') for s in shape)}).")
    return array


def check_labels(path, labels, n, classes):
    """Labels as (n,) int64. Raises UserError if there are not n of them, or one is not in 0..classes - 1."""
    labels = np.asarray(labels).reshape(-1)
    if len(labels) != n or n == 0:
        raise UserError(f"{path}: {len(labels)} labels for {n} samples.")
    if labels.min() < 0 or labels.max() >= classes:
        raise UserError(f"{path}: labels {labels.min()} to {labels.max()}; expected 0 to {classes - 1}.")
    return labels.astype(np.int64)


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
    """What a (gzipped) pickle holds, or an .npy file with a pickle inside; the keys of a dictionary become str.

    Raises UserError if it is truncated, damaged or unsafe.
    """
    with reading(path, "pickle of arrays"):
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            if file.read(6) == b"\x93NUMPY":
                file.seek(0)
                npy_header(file)
            else:
                file.seek(0)
            content = ArraysOnly(file, encoding="bytes").load()
        if isinstance(content, np.ndarray):  # 0-d: one object
            content = content.item() if content.ndim == 0 else list(content)
        if isinstance(content, dict):
            content = {k.decode() if isinstance(k, bytes) else k: v for k, v in content.items()}
    return content


def npy_header(file):
    """(shape, is it Fortran's order, dtype) of the .npy content that begins here; the file is left where the data begin."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    return readers[np.lib.format.read_magic(file)](file)


def unpickle_entries(path, *names):
    """These entries of the dictionary in a pickle. Raises UserError if there is no such entry."""
    content = unpickle(path)
    if not isinstance(content, dict) or not set(names) <= content.keys():
        have = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise UserError(f"{path} has the entries {have}; expected {' and '.join(map(repr, names))}.")
    return [content[name] for name in names]


def map_npz(path, name, cache):
    """One array of an .npz file, mapped: read only where it is asked for. A compressed one is unpacked to `cache` once."""
    with reading(path, ".npz file"), zipfile.ZipFile(path) as archive, path.open("rb") as file:
        info = archive.getinfo(f"{name}.npy")
        if info.compress_type == zipfile.ZIP_STORED:
            file.seek(info.header_offset + 26)
            lengths = np.frombuffer(file.read(4), "<u2")  # of the name and of the extra field, which the data follow
            file.seek(info.header_offset + 30 + int(lengths.sum()))
            shape, fortran, dtype = npy_header(file)
            return np.memmap(path, dtype, "r", file.tell(), shape, "F" if fortran else "C")
        unpacked = cache / f"{path.stem}-{name}-{info.CRC:08x}.npy"
        if not unpacked.exists():
            print(f"unpacking {name} of {path.name}, once: {unpacked}")
            cache.mkdir(parents=True, exist_ok=True)
            unfinished = unpacked.with_suffix(f".{os.getpid()}.part")
            with archive.open(info) as packed, unfinished.open("wb") as out:
                shutil.copyfileobj(packed, out, 1 << 20)
            unfinished.replace(unpacked)
        return np.load(unpacked, mmap_mode="r")


# ---------------------------------------------------------------------------------------------------------------------
# Pictures with a class
# ---------------------------------------------------------------------------------------------------------------------


def check_images(path, images, labels, shape, classes):
    """The two arrays as (n, C, H, W) uint8 and (n,) int64. Raises UserError where they are not what the task says."""
    images, labels = np.asarray(images), np.asarray(labels)
    if images.dtype != np.uint8 or images.size != len(labels) * np.prod(shape) or len(labels) == 0:
        raise UserError(f"{path}: {images.dtype} images {images.shape} for {len(labels)} labels; expected uint8 (n, {shape}).")
    return images.reshape(-1, *shape), check_labels(path, labels, len(labels), classes)


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
        for name, content in zip(("train", "test"), unpickle_entries(path, "train", "test"), strict=True):
            part = {k.decode() if isinstance(k, bytes) else k: v for k, v in dict(content).items()}
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
            save_array(path, sphere)
        splits.append((np.load(path, mmap_mode="r"), y))
    return *splits, "simulated"


# ---------------------------------------------------------------------------------------------------------------------
# Signals: NAS-Bench-360's ninapro, ecg, satellite, deepsea, fsd50k
# ---------------------------------------------------------------------------------------------------------------------


def read_ninapro(data_dir, cache):
    """Surface electromyography, 16 electrodes x 52 samples: x (n, 1, 16, 52), as they are. The validation file trains, too."""
    splits = {}
    for name in ("train", "val", "test"):
        path = locate(data_dir, f"ninapro_{name}.npy")
        x = read_npy(path, (None, 52, 16)).astype(np.float32).transpose(0, 2, 1)[:, None]  # (n, 52, 16) -> (n, 1, 16, 52)
        labels = beside(path, f"label_{name}.npy")
        splits[name] = x, check_labels(labels, read_npy(labels), len(x), 18)
    train = tuple(np.concatenate(parts) for parts in zip(splits["train"], splits["val"], strict=True))
    return train, splits["test"], "official"


def read_satellite(data_dir, cache):
    """Vegetation index at 46 dates: x (n, 1, 46), as they are; the files' labels 1..24 become 0..23."""
    splits = []
    for name in ("train", "test"):
        path = locate(data_dir, f"satellite_{name}.npy")
        x, y = unpickle_entries(path, "data", "label")
        x = check_shape(path, np.asarray(x, np.float32), (None, 46))[:, None]  # (n, 1, 46)
        splits.append((x, check_labels(path, np.asarray(y) - 1, len(x), 24)))
    return *splits, "official"


ECG_STRIDE = {"N": 500, "A": 500 // 6, "O": 500 // 2, "~": 500 // 20}  # normal, atrial fibrillation, other, noise: 0..3


def read_ecg(data_dir, cache):
    """Windows of 1000 samples (3.3 s at 300 Hz) of electrocardiograms, x (n, 1, 1000), cut closer where the class is rare.

    A record is scaled to mean 0 and standard deviation 1. Its windows stay on one side: a tenth of the records, those of
    `train_test_split(random_state=0)`, is the test set, and validation is held out by records, too.
    """
    from sklearn.model_selection import train_test_split

    path = locate(data_dir, "challenge2017.pkl")
    records, labels = unpickle_entries(path, "data", "label")
    labels = [name.decode() if isinstance(name, bytes) else str(name) for name in labels]
    if len(records) != len(labels) or (unknown := set(labels) - ECG_STRIDE.keys()):
        wrong = f"labels {sorted(unknown)}" if len(records) == len(labels) else f"{len(labels)} labels"
        raise UserError(f"{path}: {len(records)} records with {wrong}; expected one of N, A, O, ~ for each.")
    splits = []
    for numbers in train_test_split(np.arange(len(labels)), test_size=0.1, random_state=0):
        signals, starts, y, groups, offset = [], [], [], [], 0
        for number in numbers:
            signal = np.asarray(records[number], np.float32).reshape(-1)
            begin = np.arange(0, len(signal) - 1000, ECG_STRIDE[labels[number]])
            signals.append((signal - signal.mean()) / (signal.std() or 1))
            starts.append(offset + begin)
            y.append(np.full(len(begin), list(ECG_STRIDE).index(labels[number])))
            groups.append(np.full(len(begin), number))
            offset += len(signal)
        splits.append((windows(np.concatenate(signals), np.concatenate(starts), np.concatenate(groups)), np.concatenate(y)))
    if not all(len(y) for _, y in splits):
        raise UserError(f"{path}: {len(records)} records give no window of 1000 samples for training or for test.")
    return *splits, "official"


def windows(signal, starts, groups, length=1000):
    """Windows of one long signal, cut when they are asked for: (n, 1, length)."""
    return Lazy(len(starts), lambda rows, u: signal[starts[rows][:, None] + np.arange(length)][:, None], groups)


def read_deepsea(data_dir, cache):
    """One-hot DNA and the presence of 36 chromatin features: x (n, 4, 1000) read lazily, y (n, 36). Validation trains, too."""
    path = locate(data_dir, "deepsea_filtered.npz")
    x, y = {}, {}
    for name in ("train", "val", "test"):
        x[name] = check_shape(path, map_npz(path, f"x_{name}", cache), (None, 1000, 4))
        y[name] = check_shape(path, map_npz(path, f"y_{name}", cache), (len(x[name]), 36)).astype(np.float32)

    def lazy(*parts):
        ends = np.cumsum([len(part) for part in parts])

        def read(rows, u):
            dna, which = np.empty((len(rows), 1000, 4), np.float32), np.searchsorted(ends, rows, side="right")
            for i, part in enumerate(parts):
                dna[which == i] = part[rows[which == i] - ends[i] + len(part)]
            return dna.transpose(0, 2, 1)  # (B, 1000, 4) -> (B, 4, 1000)

        return Lazy(ends[-1], read)

    train = lazy(x["train"], x["val"]), np.concatenate([y["train"], y["val"]])
    return train, (lazy(x["test"]), y["test"]), "official"


RATE = 22050  # of the sound files, in Hz; a chunk is one second


def read_wav(path):
    """A sound as float32 in [-1, 1]. Raises UserError for a damaged file, several channels, or another rate."""
    from scipy.io import wavfile

    with reading(path, "wav file"):
        rate, sound = wavfile.read(path)
    if rate != RATE or sound.ndim != 1 or len(sound) == 0:
        raise UserError(f"{path} has {rate} Hz and shape {sound.shape}; expected one channel at {RATE} Hz.")
    return sound / -float(np.iinfo(sound.dtype).min) if sound.dtype.kind == "i" else sound


def a_second(sound, start=0):
    """One second of a sound from a share `start` in [0, 1) of what there is; a shorter one is repeated. (RATE,) float32"""
    sound = np.resize(sound, max(len(sound), RATE))
    begin = int(start * (len(sound) - RATE + 1))
    return sound[begin : begin + RATE].astype(np.float32)


def read_fsd50k(data_dir, cache):
    """Seconds of sound, read lazily, x (n, 2, 22050): the chunk, and the noise to mix in; y (n, 200) the clip's labels.

    A training sample is a clip: each time another of its chunks is drawn (official: one, chosen once), the middle one for
    validation. A test sample is a chunk; its y has one column more, the number of its clip: the score averages over a clip.
    """
    table = locate(data_dir, "chunks/tr.csv")
    with reading(label_file := beside(table, "lbl_map.json"), "json file"):
        number = {name: int(i) for name, i in json.loads(label_file.read_text()).items()}
    noises = sorted(p for p in (table.parent.parent / "noise_22050").rglob("*.wav"))

    def clips(path):
        """The chunks of each clip, and its labels (clips, 200)."""
        with reading(path, "table with files, labels, ext"), path.open(newline="") as file:
            rows = [(row["files"], row["labels"], row["ext"]) for row in csv.DictReader(file)]
            tail = rows[0][0][4:].lstrip("/")  # the first four characters stand for the folder that we look for
        roots = [root for root in list(path.parents)[:4] if (root / tail).exists()]
        if not roots:
            raise Missing(f"no {tail}, which {path} names, in {path.parent} or above it.")
        chunks, labels = {}, {}
        for name, names, clip in rows:
            chunks.setdefault(clip, []).append(roots[0] / name[4:].lstrip("/"))
            labels[clip] = names.split(",")
        y = np.zeros((len(chunks), 200), np.float32)
        for i, clip in enumerate(chunks):
            if unknown := set(labels[clip]) - number.keys():
                raise UserError(f"{path}: labels {sorted(unknown)[:3]} are not in {label_file.name}.")
            y[i, [number[name] for name in labels[clip]]] = 1
        return list(chunks.values()), y

    def read_train(rows, u):
        x = np.zeros((len(rows), 2, RATE), np.float32)
        for i, row in enumerate(rows):
            of_clip = chunks[row]
            x[i, 0] = a_second(read_wav(of_clip[len(of_clip) // 2 if u is None else int(u[i, 0] * len(of_clip))]))
            if u is not None and noises:
                x[i, 1] = a_second(read_wav(noises[int(u[i, 1] * len(noises))]), u[i, 2])
        return x

    def read_test(rows, u):
        sounds = np.stack([a_second(read_wav(test_chunks[row])) for row in rows])
        return np.stack([sounds, np.zeros_like(sounds)], axis=1)  # (B, 2, RATE)

    chunks, y = clips(table)
    of_clip, y_clip = clips(beside(table, "eval.csv"))
    test_chunks = [path for paths in of_clip for path in paths]
    clip = np.repeat(np.arange(len(of_clip)), [len(paths) for paths in of_clip])  # (test chunks,)
    y_test = np.concatenate([y_clip[clip], clip[:, None].astype(np.float32)], axis=1)  # (test chunks, 201)
    return (Lazy(len(chunks), read_train), y), (Lazy(len(clip), read_test), y_test), "official"


# ---------------------------------------------------------------------------------------------------------------------
# Fields: NAS-Bench-360's darcy, psicov, cosmic, and PDEBench
# ---------------------------------------------------------------------------------------------------------------------


def read_mat(path, name, every):
    """Every `every`-th point of an array (n, H, W) in a MATLAB file of any version, as float32."""
    import h5py
    from scipy.io import loadmat

    with reading(path, "MATLAB file"):
        if h5py.is_hdf5(path):  # version 7.3, whose axes are reversed
            with h5py.File(path) as file:
                return np.float32(file[name][::every, ::every].T)
        return np.float32(loadmat(path, variable_names=[name])[name][:, ::every, ::every])


def read_darcy(data_dir, cache):
    """Flow through a porous medium: coefficient a, x and y (n, 3, 85, 85) -> pressure (n, 85, 85), every fifth point of 421.

    The coefficient is normalised pixel by pixel with the training set's mean and standard deviation (+ 1e-5); loss and metric
    undo the same for the prediction, so y stays in its own units.
    """
    splits = []
    for name, n in (("smooth1", 1000), ("smooth2", 100)):
        path = locate(data_dir, f"piececonst_r421_N1024_{name}.mat")
        make = functools.partial(lambda path, n: [read_mat(path, array, 5)[:n] for array in ("coeff", "sol")], path, n)
        splits.append(kept_of_file(cache, f"darcy-{name}", path, make))
        check_shape(path, splits[-1][0], (None, 85, 85))
    train, test, changes = darcy_fields(*splits)
    return train, test, "official", changes


def darcy_fields(train, test):
    """Raw fields (n, 85, 85) -> what `read_darcy` returns, but for the kind."""
    (a, u), (a_test, u_test) = train, test
    mean, std = a.mean(0), a.std(0, ddof=1) + 1e-5  # (85, 85)
    y, x = np.meshgrid(*2 * [np.linspace(0, 1, a.shape[1], dtype=np.float32)], indexing="ij")  # x grows along the columns

    def channels(a):
        return np.stack([(a - mean) / std, *(np.broadcast_to(grid, a.shape) for grid in (x, y))], axis=1)  # (n, 3, 85, 85)

    loss = functools.partial(relative_l2, mean=u.mean(0), std=u.std(0, ddof=1) + 1e-5)
    return (channels(a), u), (channels(a_test), u_test), {"loss": loss, "score": score_of(loss)}


PAD, SIDE, FAR = 5, 512, 16.0  # psicov: margin and side of the maps in residues, largest distance told apart in Angstrom


def read_psicov(data_dir, cache):
    """Distances between the residues of a protein: 57 pair features (57, 512, 512) -> Angstrom (512, 512), read lazily.

    Trained on DeepCov, tested on PSICOV. Distances are cut at 16 A, which is also the value outside of the protein; the score
    looks at true distances up to 8 A only. A protein of more than 507 residues loses its end.
    """

    def features(path):
        names = ("ss", "pssm", "sa", "entropy", "ccmpred", "freecon", "potential")
        ss, pssm, sa, entropy, *pairs = unpickle_entries(path, *names)
        with reading(path, "set of protein features"):
            each = np.concatenate([ss, np.transpose(pssm), [sa], [entropy]])  # (3 + 22 + 1 + 1, m)
            m = each.shape[1]  # residues
            columns = np.broadcast_to(each[:, None], (27, m, m))  # the value of residue j, in column j
            both = np.stack([columns, columns.transpose(0, 2, 1)], axis=1).reshape(54, m, m)
            x = np.zeros((57, SIDE, SIDE), np.float32)
            n = min(m, SIDE - PAD)
            x[:, PAD : PAD + n, PAD : PAD + n] = np.concatenate([both, pairs])[:, :n, :n]
        return np.nan_to_num(x)

    def distances(path):
        content = unpickle(path)
        with reading(path, "distance map"):
            d = np.asarray(content[2], np.float32)
            m, n = len(d), min(len(d), SIDE - PAD)
            padded = np.pad(d, ((0, 0), (1, 1)), constant_values=np.nan)  # (m, m + 2)
            i = np.arange(m)
            neighbours = [padded[i, i], padded[i, i + 2]]  # left and right of the diagonal; the first and last have one
            d = d.copy()
            d[i, i] = np.nanmean(neighbours, axis=0)
            y = np.full((SIDE, SIDE), FAR, np.float32)
            y[PAD : PAD + n, PAD : PAD + n] = np.nan_to_num(d, nan=FAR)[:n, :n].clip(1, FAR)
        return y

    splits = []
    for name in ("deepcov", "psicov"):
        path = locate(data_dir, f"{name}.lst")
        proteins, folder = path.read_text().split(), path.parent / name
        x, y = [folder / "features" / f"{p}.pkl" for p in proteins], [folder / "distance" / f"{p}-cb.npy" for p in proteins]
        if missing := [p for p in x + y if not p.exists()]:
            raise Missing(f"no {missing[0]} ({len(missing)} of the files that {path} names).")
        splits.append((of_files(features, x), of_files(distances, y)))
    return *splits, "official"


# proposal_visit of the extragalactic fields taken through the filter f435w
GALAXIES = {
    "10182_pb", "10182_pd", "10190_13", "10190_28", "10260_5", "10260_7", "10342_3", "10407_3", "10584_13", "10760_2",
    "10760_4", "12058_1", "12058_12", "12058_16", "12058_6", "12513_2", "12513_3", "13057_1", "13364_95", "13691_11",
    "13737_2", "13737_3", "13804_6", "14343_1", "14704_1", "9490_a2", "9490_a3",
}  # fmt: skip


def read_cosmic(data_dir, cache):
    """Hits of cosmic rays in Hubble pictures: x (n, 1, 129, 128) raw counts, y (n, 128, 128) 1, 0, or NaN: does not count.

    The middle 128 x 128 of each tile; row 128 holds the exposure's sky level, which `add_sky` uses.
    """
    splits = []
    for name in ("train", "test"):
        root, x, y = locate(data_dir, f"npy_{name}"), [], []
        for sky_file in sorted(root.glob("f435w/**/sky.npy")):
            folder = sky_file.parent
            if not {folder.name, f"{folder.parent.name}_{folder.name}"} & GALAXIES:
                continue
            sky = read_npy(sky_file, (None,))
            for path in sorted(folder.glob("[0-9]*_*.npy")):
                with reading(path, "tile"):
                    tile = np.load(path, mmap_mode="r")[:, 64:192, 64:192]  # (2 or 3, 128, 128)
                    level = sky[int(path.name.split("_")[0]) - 1]
                    x.append(np.pad(np.float32(tile[:1]), ((0, 0), (0, 1), (0, 0)), constant_values=level))  # (1, 129, 128)
                    counts = tile[2] == 0 if len(tile) > 2 else True
                    y.append(np.float32(np.where(counts, tile[1] > 0, np.nan)))  # (128, 128)
                check_shape(path, x[-1], (1, 129, 128))
        if not x:
            raise Missing(f"no tiles of the 27 galaxy fields in {root / 'f435w'}.")
        splits.append((np.stack(x), np.stack(y)))
    return *splits, "official"


def read_pde(data_dir, cache, file, x, y, y_test=None, every=1, normalise=False):
    """The first and one later snapshot of a PDEBench file, and nothing else of it: x (n, 1, ...), y (n, 1, L) or (n, H, W).

    Args:
        x, y: fields as (name of the array, number of the snapshot), several are laid end to end. With "data", which lies in
            one group a sample: ("data", snapshot, channel). Arrays without time: snapshot None.
        y_test: the targets of the test set if they are others, as in the official code.
        every: 4 keeps each fourth point of space.
        normalise: by mean and standard deviation (+ 1e-5) of the training inputs at each point, inputs and targets alike.
    Layouts: one array a field (samples, time, space): the first tenth is the test set. One group a sample, (time, space,
    channels): the last tenth.
    """
    import h5py

    path = locate(data_dir, file)

    def snapshot(h5, array, time, channel=None):
        if channel is None:
            if array not in h5:
                raise UserError(f"{path} has the arrays {sorted(h5)}; expected {array}.")
            source, rows = h5[array], range(0, len(h5[array]), 256)
            if time is not None and source.shape[1] <= time:
                raise UserError(f"{path}: {array} has {source.shape[1]} snapshots; expected more than {time}.")
            field = np.concatenate([source[i : i + 256] if time is None else source[i : i + 256, time] for i in rows])
        else:
            field = np.stack([h5[group][array][time, ..., channel] for group in sorted(h5)])
        space = (slice(None, None, every),) * (field.ndim - 1)
        return np.float32(field[:, *space])

    def parts(n):
        tenth = n // 10
        return (slice(-tenth, None), slice(-tenth)) if len(x[0]) == 3 else (slice(tenth), slice(tenth, None))

    def make():
        with reading(path, "HDF5 file"), h5py.File(path) as h5:
            both = [np.concatenate([snapshot(h5, *f) for f in fields], axis=-1) for fields in (x, y)]
            if y_test:
                test, _ = parts(len(both[1]))
                both[1][test] = np.concatenate([snapshot(h5, *f) for f in y_test], axis=-1)[test]
            return both

    x_all, y_all = kept_of_file(cache, Path(file).stem + "-released" * bool(y_test), path, make)
    if len(x_all) < 10:
        raise UserError(f"{path} has {len(x_all)} samples; ten are needed for a training and a test set.")
    test, train = parts(len(x_all))
    train, test, changes = pde_fields((x_all[train], y_all[train]), (x_all[test], y_all[test]), normalise)
    return train, test, "official", changes


def pde_fields(train, test, normalise=False):
    """Raw fields (n, L) or (n, H, W) -> x (n, 1, ...), y (n, 1, L) or (n, H, W) of training and test set; no changes."""
    if normalise:
        mean, std = train[0].mean(0), train[0].std(0, ddof=1) + 1e-5
        train, test = (tuple((part - mean) / std for part in split) for split in (train, test))
    train, test = ((x[:, None], y[:, None] if y.ndim == 2 else y) for x, y in (train, test))
    return train, test, {}


def simulate(name, finish, cache, scale, n_train, as_released, device, tokens=512):
    """Training and test set of a PDE task, solved by pde.py and kept under `cache` as two float32 arrays each.

    Full scale: as many solutions as the official files have. Tiny: a coarser grid (the task's shape changes), at most 1000 for
    training and validation and 200 for test; if n_train asks for fewer, only as many are solved, and no more for test.

    Args:
        name: of pde.SETS.
        finish: raw fields -> prepared ones and what of the task they change; the same as for the official files.
        tokens: 1D: the task's; the tiny scale cuts its shorter sequences into fewer.
    Returns: as a task's `read`. A run that is killed meanwhile loses the set it was at.
    """
    from tqdm import tqdm

    import pde

    of = pde.SETS[name]
    counts, n, every = dict(zip(("train", "test"), of.samples, strict=True)), of.n, of.every
    if scale == "tiny":
        n, every = of.tiny, 1
        train = min(SIMULATED_TRAIN, counts["train"], n_train + n_train // 9 + 1 if n_train else SIMULATED_TRAIN)
        counts = {"train": train, "test": min(SIMULATED_TEST, counts["test"], train)}

    def make(split):
        pieces, bar = [], tqdm(total=counts[split], desc=f"{name}, {split}", unit="solution", leave=False)
        for piece in pde.simulate(name, counts[split], n, every, split == "test", as_released, device):
            pieces.append(piece)
            bar.update(len(piece[0]))
        bar.close()
        return [np.concatenate(arrays) for arrays in zip(*pieces, strict=True)]

    splits = []
    for split, count in counts.items():
        key = f"{name}-{split}-{count}-of-{n}-cells{'-released' * as_released}-v{pde.VERSION}"
        what = f"solving {name}: {count:,} samples on {n} cells for {split}"
        splits.append(kept(cache, key, what, functools.partial(make, split)))
    train, test, changes = finish(*splits)
    changes |= {"shape": train[0].shape[1:], "output": train[1].shape[1:]}
    if scale == "tiny":
        changes["tokens"] = min(tokens, SIMULATED_TOKENS)
    return train, test, "simulated", changes


# ---------------------------------------------------------------------------------------------------------------------
# Tables: OpenML
# ---------------------------------------------------------------------------------------------------------------------

SKLEARN_COPIES = {61: "load_iris", 187: "load_wine", 1510: "load_breast_cancer", 28: "load_digits"}
# iris: two values differ from OpenML's (samples 35 and 38); wine and wdbc: the same tables; optdigits: its test part, 1,797 of
# 5,620 rows


def fetch_table(number, data_dir, fetching=False):
    """Columns (rows, features) float with NaN, {number of a categorical column: how many categories}, labels (rows,).

    From what `fetch_openml` keeps in data_dir/openml. Raises Missing, unless `fetching`, if it has kept nothing there.
    """
    from sklearn.datasets import fetch_openml

    folder = Path(data_dir) / "openml"
    if not fetching and not (folder / f"openml.org/api/v1/json/data/{number}.gz").exists():
        raise Missing(f"no table {number} in {folder}.")
    with contextlib.nullcontext() if fetching else reading(folder, f"table {number} as scikit-learn keeps it"):
        table = fetch_openml(data_id=number, data_home=data_dir, as_frame=False, parser="liac-arff", n_retries=1)
    if table.target is None or table.target.ndim != 1 or not isinstance(table.data, np.ndarray):
        raise UserError(f"OpenML {number} has no single target column, or is sparse: not a classification table.")
    categories = {i: len(table.categories[name]) for i, name in enumerate(table.feature_names) if name in table.categories}
    return table.data.astype(np.float64), categories, table.target.astype(str)


def read_openml(data_dir, cache, number):
    """A classification table as a sequence of columns: x (n, channels, columns), standardised by the training rows.

    With categorical columns: each is one-hot (a missing value is a category of its own), the others follow with their value in
    channel 0, a missing one as 0 before scaling. Without: columns with missing values are left out, and all the others are the
    channels of a single position. A tenth of the rows, drawn by class, is the test set.
    """
    from sklearn import datasets
    from sklearn.model_selection import train_test_split

    try:
        (values, categories, labels), kind = fetch_table(number, data_dir), "official"
    except Missing:
        if number not in SKLEARN_COPIES:
            raise
        (values, labels), categories = getattr(datasets, SKLEARN_COPIES[number])(return_X_y=True), {}
        kind = "sklearn"
    known = np.array([label not in ("nan", "?", "None", "") for label in labels.astype(str)])
    values, (names, y) = values[known], np.unique(labels[known], return_inverse=True)
    rarest = np.bincount(y).min(initial=len(y))
    if len(names) < 2 or rarest < 2 or len(y) < 10 * len(names):
        raise UserError(
            f"OpenML {number}: {len(y)} rows, {len(names)} classes, the rarest with {rarest}: too few for a test set."
        )
    train, test = train_test_split(np.arange(len(y)), test_size=0.1, random_state=0, stratify=y)
    numeric = [i for i in range(values.shape[1]) if i not in categories]
    if not categories:
        numeric = [i for i in numeric if not np.isnan(values[:, i]).any()]
    numbers = np.nan_to_num(values[:, numeric])  # (n, numeric columns)
    mean, std = numbers[train].mean(0), numbers[train].std(0)
    numbers = (numbers - mean) / np.where(std > 0, std, 1)
    if categories:
        x = np.zeros((len(y), max(categories.values()) + 1, values.shape[1]), np.float32)  # (n, channels, columns)
        for position, (column, count) in enumerate(categories.items()):
            code = np.nan_to_num(values[:, column], nan=count).astype(int)
            x[np.arange(len(y)), code, position] = 1
        x[:, 0, len(categories) :] = numbers
        x = x[:, : max(1, np.flatnonzero(x.any((0, 2))).max() + 1)]  # the last channel only if a value is missing
    else:
        x = numbers.astype(np.float32)[:, :, None]  # (n, channels, 1)
    weights = tuple(len(train) / np.bincount(y[train], minlength=len(names)))  # 1 / share of the class
    changes = {"shape": x.shape[1:], "output": (len(names),), "loss": functools.partial(cross_entropy, weights=weights)}
    return (x[train], y[train]), (x[test], y[test]), kind, changes


# ---------------------------------------------------------------------------------------------------------------------
# Sources: VOC and CoNLL (CIFAR-10 and Tiny-ImageNet are above)
# ---------------------------------------------------------------------------------------------------------------------


def read_voc(data_dir, n, seed):
    """PASCAL VOC 2012: pictures (n, 3, 224, 224) uint8; y (n, 128, 128) 1 where an object is, 0 background, NaN border.

    From VOC2012/ImageSets/Segmentation/train.txt, 1,464 names; the folders JPEGImages and SegmentationClass.
    """
    from PIL import Image

    listing = locate(data_dir, "VOC2012/ImageSets/Segmentation/train.txt")
    names, root = listing.read_text().split(), listing.parents[2]
    names = [names[i] for i in np.sort(np.random.default_rng(seed).permutation(len(names))[:n])]
    if not names:
        raise UserError(f"{listing} is empty.")
    x, y = np.empty((len(names), 3, 224, 224), np.uint8), np.empty((len(names), 128, 128), np.float32)
    for i, name in enumerate(names):
        picture, mask = root / f"JPEGImages/{name}.jpg", root / f"SegmentationClass/{name}.png"
        for path in (picture, mask):
            if not path.exists():
                raise Missing(f"no {path}.")
        with reading(picture, "picture"):
            x[i] = np.asarray(Image.open(picture).convert("RGB").resize((224, 224), Image.BILINEAR)).transpose(2, 0, 1)
        with reading(mask, "palette picture"):
            classes = np.asarray(Image.open(mask).resize((128, 128), Image.NEAREST))  # (128, 128) 0 background, 255 border
            y[i] = np.where(classes == 255, np.nan, classes > 0)
    return x, y


WORDS = 32  # in a sequence of the text sources


def read_conll(data_dir, n, seed, files, relative=False):
    """Running text in pieces of 32 words, [[str]], and a label for each (n,): the type that most of its words have, 0 if none.

    Columns: the word first, its tag last (B-PER, I-PER, O; empty lines part sentences). Types of fewer than 100 chunks count as
    none. `relative`: the type that is most frequent compared to its share of the whole text. In CoNLL-2000 noun phrases are
    the majority of 99 % of the pieces.

    Returns: the pieces, their labels, the number of labels.
    """
    for name in files:
        try:
            path = locate(data_dir, name)
            break
        except Missing:
            if name == files[-1]:
                raise
    with reading(path, "text in columns"):
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                text = archive.read("conll2000/train.txt").decode()
        else:
            text = path.read_text(encoding="utf-8")
    lines = [line.split() for line in text.splitlines()]
    lines = [line for line in lines if len(line) > 1 and line[0] != "-DOCSTART-"]
    tags = [line[-1].partition("-")[2] for line in lines]  # "B-PER" -> "PER", "O" -> ""
    begins = [line[-1].startswith("B-") or tag != before for line, tag, before in zip(lines, tags, ["", *tags], strict=False)]
    count = Counter(tag for tag, new in zip(tags, begins, strict=True) if new and tag)  # eng.train has B- only inside runs
    types = sorted(tag for tag in count if tag and count[tag] >= 100)
    if len(lines) < WORDS or not types:
        raise UserError(f"{path}: {len(lines)} words with the tags {sorted(count)}; expected words with B- and I- tags, or O.")
    pieces, labels = [], []
    for i in range(0, len(lines) - WORDS + 1, WORDS):
        here = Counter(tag for tag in tags[i : i + WORDS] if tag in types)
        best = max(here, key=lambda tag: (here[tag] / (count[tag] if relative else 1), tag)) if here else None
        pieces.append([line[0] for line in lines[i : i + WORDS]])
        labels.append(types.index(best) + 1 if here else 0)
    chosen = np.sort(np.random.default_rng(seed).permutation(len(pieces))[:n])
    return [pieces[i] for i in chosen], np.array(labels)[chosen], len(types) + 1


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


def toy_fields(n, seed, shape, output, cycles=3):
    """Travelling waves: x (n, *shape) at the start, y (n, *output) later, moved on by a tenth, the fast ones damped.

    Four waves of random direction, phase and strength, up to `cycles` periods along an axis: their sum, or in several
    channels one of them in each. Shapes: (1, L) and (1, L) in one dimension, (C, H, W) and (H, W) in two.
    """
    rng, space = np.random.default_rng(seed), shape[1:]
    k = rng.integers(1, cycles + 1, (n, 4, len(space))) * rng.choice([-1, 1], (n, 4, len(space)))  # periods
    now = rng.uniform(0.2, 1, (n, 4)) * np.exp(2j * np.pi * rng.random((n, 4)))  # strength and phase
    later = now * np.exp(-2j * np.pi * 0.1 * k.sum(-1) - 0.05 * (k**2).sum(-1))
    along = [np.exp(2j * np.pi * k[..., i, None] * np.arange(m) / m).astype(np.complex64) for i, m in enumerate(space)]
    axes = "hw"[: len(space)]
    product = ",".join(["nj", *(f"nj{axis}" for axis in axes)])  # each wave (n, 4, *space)
    x = np.einsum(f"{product}->n{'j' * (shape[0] > 1)}{axes}", now.astype(np.complex64), *along, optimize=True).imag
    y = np.einsum(f"{product}->n{axes}", later.astype(np.complex64), *along, optimize=True).imag
    x = x[:, np.arange(shape[0]) % 4] if shape[0] > 1 else x[:, None]  # (n, C, *space)
    return x, y.reshape(n, *output)


def toy_proteins(n, seed):
    """psicov's shapes from waves, made when they are asked for: x (n, 57, 512, 512), y (n, 512, 512) from 2 to 16."""

    def enlarged(row, part):
        coarse = toy_fields(1, (seed, row), (57, SIDE // 8, SIDE // 8), (SIDE // 8, SIDE // 8))[part][0]
        fine = coarse.repeat(8, -1).repeat(8, -2)  # (..., 64, 64) -> (..., 512, 512)
        return (9 + 4 * fine).clip(2, FAR) if part else fine

    return tuple(of_files(functools.partial(enlarged, part=part), range(n)) for part in (0, 1))


def toy_hits(n, seed):
    """cosmic's raw layout: bright bars on waves, x (n, 1, 129, 128) with the sky level in row 128, y (n, 128, 128) the bars."""
    rng = np.random.default_rng(seed)
    x, _ = toy_fields(n, seed, (1, 128, 128), (128, 128))
    y = np.zeros((n, 128, 128), np.float32)
    for i, (row, column, height, width) in enumerate(zip(*rng.integers(8, 64, (4, n)), strict=True)):
        y[i, 2 * row - 8 : 2 * row - 8 + height, 2 * column - 8 : 2 * column - 8 + width] = 1
    y[:, 0, :8] = np.nan
    return np.pad(x + 3 * np.nan_to_num(y)[:, None], ((0, 0), (0, 0), (0, 1), (0, 0)), constant_values=0.1), y


def toy_signals(n, seed, shape, classes, many=False, lowest=2.0, ratio=1.5):
    """Noisy waves whose number of periods tells the class: x (n, *shape) float32, the last axis is time.

    Class k has lowest * ratio^k periods. `many`: any of them may be there together, y (n, classes) 0 or 1; else y (n,).
    """
    rng = np.random.default_rng(seed)
    present = rng.random((n, classes)) < 0.3 if many else np.eye(classes, dtype=bool)[rng.integers(classes, size=n)]
    time = np.arange(shape[-1], dtype=np.float32) / shape[-1]
    rows = int(np.prod(shape[:-1]))
    x = 0.3 * rng.standard_normal((n, rows, shape[-1]), dtype=np.float32)
    for k in range(classes):
        phase, strength = rng.random((2, n, rows, 1), dtype=np.float32)
        wave = (0.5 + strength) * np.sin(2 * np.pi * np.float32(lowest * ratio**k) * time + 2 * np.pi * phase)
        x += present[:, k, None, None] * wave  # (n, rows, time)
    return x.reshape(n, *shape), present.astype(np.float32) if many else present.argmax(1)


def toy_dna(n, seed):
    """deepsea's layout: the strongest of four noisy signals at each place, one-hot, x (n, 4, 1000); y (n, 6) 0 or 1."""
    x, y = toy_signals(n, seed, (4, 1000), 6, many=True)
    return np.eye(4, dtype=np.float32)[x.argmax(1)].transpose(0, 2, 1), y  # (n, 1000, 4) -> (n, 4, 1000)


def toy_sounds(n, seed):
    """fsd50k's raw layout, made when asked for: tones of 200 to 1,500 Hz in noise, x (n, 2, 22050); y (n, 6) 0 or 1."""

    def sample(row):
        x, y = toy_signals(1, (seed, row), (1, RATE), 6, many=True, lowest=200.0)
        return np.concatenate([x[0], np.zeros_like(x[0])]), y[0]

    return of_files(lambda row: sample(row)[0], range(n)), np.stack([sample(row)[1] for row in range(n)])


def toy_table(n, seed, columns=12, classes=3):
    """Groups of normal points, as far apart as they are wide: x (n, 1, columns), y (n,)."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(9).normal(0, 1, (classes, columns))  # the same for training and test
    y = rng.integers(classes, size=n)
    return np.float32(centres[y] + rng.normal(0, 1, (n, columns)))[:, None], y


TOPICS = ["river stone bird rain forest leaf wind hill", "market bank price trade money loan share tax",
          "goal match team player ball coach win league", "doctor nurse fever cure blood heart pill clinic"]  # fmt: skip


def toy_text(n, seed):
    """Pieces of 32 words on one of four topics among words that say nothing: [[str]], y (n,), 4."""
    rng = np.random.default_rng(seed)
    y = rng.integers(4, size=n)
    common = "the of and to a in is it was for on with".split()
    pieces = [[str(rng.choice(TOPICS[k].split() if rng.random() < 0.3 else common)) for _ in range(WORDS)] for k in y]
    return pieces, y, 4


def toy_masks(n, seed):
    """voc's layout: patches of a colour on another, x (n, 3, 224, 224) uint8; y (n, 128, 128) 1 inside, NaN at an edge."""
    rng = np.random.default_rng(seed)
    y = (toy_fields(n, seed, (1, 128, 128), (128, 128), cycles=1)[0][:, 0] > 0).astype(np.float32)
    pixel = np.arange(224) * 128 // 224
    colours = rng.integers(0, 256, (2, n, 3, 1, 1), dtype=np.uint8)
    x = np.where(y[:, None, pixel[:, None], pixel] > 0, *colours)  # (n, 3, 224, 224)
    y[:, 0] = np.nan
    return x, y


# ---------------------------------------------------------------------------------------------------------------------
# Augmentation: functions of a batch and of uniform draws, the same on every device and for any number of processes.
# Without draws (validation, test) they only do what every sample needs
# ---------------------------------------------------------------------------------------------------------------------

DRAWS = 5  # uniform numbers an augmentation may use for one sample


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
    return padded[torch.arange(B, device=x.device)[:, None, None], :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


def resized_crop_and_flip(x, u, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)):
    """A box of random area and aspect ratio, enlarged to the whole picture, and horizontal flip (Inception's crop)."""
    import torch
    import torch.nn.functional as F

    if u is None:
        return x
    area = scale[0] + (scale[1] - scale[0]) * u[:, 0]
    aspect = torch.exp(np.log(ratio[0]) + (np.log(ratio[1]) - np.log(ratio[0])) * u[:, 1])  # width / height
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)  # shares of the picture
    flip = torch.where(u[:, 4] < 0.5, 1.0, -1.0)
    theta = torch.zeros(len(x), 2, 3, device=x.device)
    theta[:, 0, 0], theta[:, 0, 2] = width * flip, (2 * u[:, 2] - 1) * (1 - width)
    theta[:, 1, 1], theta[:, 1, 2] = height, (2 * u[:, 3] - 1) * (1 - height)
    return F.grid_sample(x, F.affine_grid(theta, x.shape, align_corners=False), padding_mode="border", align_corners=False)


def add_sky(x, u):
    """Counts + s t, s the exposure's sky level in the last row, t uniform in [-0.9, 3]; without draws its mean, 1.05.

    x (B, 1, 129, 128) -> (B, 1, 128, 128)
    """
    t = -0.9 + 3.9 * (0.5 if u is None else u[:, :1, None, None])
    return x[:, :, :-1] + t * x[:, :, -1:]


MELS, FFT, HOP = 96, 1920, 220  # bands, points of a spectrum, samples between spectra


@functools.cache
def mel_filters():
    """Triangles on the HTK mel scale from 0 to 11,025 Hz, each with height 1: (961, 96). mel = 2595 log10(1 + f / 700)"""
    mel = np.linspace(0, 2595 * np.log10(1 + RATE / 2 / 700), MELS + 2)
    edge = 700 * (10 ** (mel / 2595) - 1)  # (98,) Hz
    f = np.linspace(0, RATE / 2, FFT // 2 + 1)[:, None]
    rising = (f - edge[:-2]) / (edge[1:-1] - edge[:-2])
    falling = (edge[2:] - f) / (edge[2:] - edge[1:-1])
    return np.maximum(0, np.minimum(rising, falling)).astype(np.float32)


def log_mel(sound):
    """Decibels above nothing but their own mean: (B, 22050) -> (B, 96, 101).

    10 log10 max(power, 1e-10), cut 80 dB below the loudest, minus the mean. Spectra of 661 samples (Hann) every 220.
    """
    import torch

    window = torch.hann_window(661, device=sound.device)
    power = torch.stft(sound, FFT, HOP, 661, window, center=True, pad_mode="reflect", return_complex=True).abs() ** 2
    mel = constant(mel_filters(), sound.device).T @ power  # (96, 961) x (B, 961, 101)
    decibel = 10 * mel.clamp(min=1e-10).log10()
    decibel = decibel.maximum(decibel.amax((1, 2), keepdim=True) - 80)
    return decibel - decibel.mean((1, 2), keepdim=True)


def mask_bands(spectrum, u):
    """SpecAugment for half of the samples: once or twice, up to 15 % of the bands and 20 % of the times become the minimum.

    spectrum (B, 96, 101), u (B, 10)
    """
    import torch

    least = spectrum.amin((1, 2), keepdim=True)
    rounds = torch.where(u[:, 0] < 0.5, 0, torch.where(u[:, 1] < 0.5, 1, 2))
    for r in range(2):
        for axis, share in ((1, 0.15), (2, 0.2)):
            size = spectrum.shape[axis]
            u_width, u_begin = u[:, 2 + 4 * r + 2 * (axis - 1)], u[:, 3 + 4 * r + 2 * (axis - 1)]
            width = (u_width * share * size).floor()
            begin = (u_begin * (size - width)).floor()
            place = torch.arange(size, device=u.device)
            inside = (place >= begin[:, None]) & (place < (begin + width)[:, None]) & (rounds > r)[:, None]  # (B, size)
            spectrum = torch.where(inside[:, :, None] if axis == 1 else inside[:, None], least, spectrum)
    return spectrum


def hear(x, u):
    """Sound and noise to log-mel pictures: (B, 2, 22050) -> (B, 1, 96, 102), the last column is zero.

    With draws u (B, 25) both are masked, and three quarters get (1 - a) sound + a noise in decibels, a uniform in [0, 0.5].
    """
    import torch

    spectrum = log_mel(x[:, 0])  # (B, 96, 101)
    if u is not None:
        spectrum, noise = mask_bands(spectrum, u[:, 3:13]), mask_bands(log_mel(x[:, 1]), u[:, 13:23])
        a = torch.where((u[:, 23] < 0.75) & x[:, 1].any(1), 0.5 * u[:, 24], 0)[:, None, None]
        spectrum = (1 - a) * spectrum + a * noise
    return torch.nn.functional.pad(spectrum, (0, 1))[:, None]  # (B, 1, 96, 102)


# ---------------------------------------------------------------------------------------------------------------------
# Losses: of a batch, in fp32, the mean over its samples (some official codes sum: darcy)
# ---------------------------------------------------------------------------------------------------------------------


CONSTANTS = {}  # (id of values, device) -> values, tensor


def constant(values, device):
    """`values` as an fp32 tensor on the device, sent there once: a copy in every step would make the host wait each time."""
    import torch

    key = id(values), str(device)
    if key not in CONSTANTS:  # values are kept, so that nothing else gets their id
        CONSTANTS[key] = values, torch.as_tensor(values, dtype=torch.float32, device=device)
    return CONSTANTS[key][1]


def cross_entropy(out, y, weights=None):
    """- log softmax(out)_y, with `weights` the mean weighted by class. out (B, K), y (B,) -> scalar"""
    import torch

    weights = None if weights is None else constant(weights, out.device)
    return torch.nn.functional.cross_entropy(out.float(), y, weights)


def presence(out, y, positive=1.0):
    """Binary cross-entropy, - positive y log p - (1 - y) log (1 - p), mean over all. out (B, K), y (B, K or more) -> scalar"""
    import torch

    weight = constant(positive, out.device)
    return torch.nn.functional.binary_cross_entropy_with_logits(out.float(), y[:, : out.shape[1]], pos_weight=weight)


def mask_loss(out, y):
    """Binary cross-entropy, the mean over the pixels that count (y not NaN). out (B, H, W), y (B, any, any) -> scalar

    A mask of another size is brought to that of the prediction (nearest pixel).
    """
    import torch

    y = torch.nn.functional.interpolate(y[:, None], out.shape[-2:])[:, 0]  # (B, H, W)
    counts = ~y.isnan()
    each = torch.nn.functional.binary_cross_entropy_with_logits(out.float(), y.nan_to_num(), reduction="none")
    return (each * counts).sum() / counts.sum().clamp(min=1)


def rmse(out, y):
    """sqrt(mean (out - y)^2) of each sample, then the mean. out, y (B, ...) -> scalar"""
    return (out.float() - y).flatten(1).square().mean(1).sqrt().mean()


def nrmse(out, y):
    """sqrt(mean (out - y)^2) / sqrt(mean y^2) of each sample, then the mean. out, y (B, ...) -> scalar"""
    error, size = ((v.flatten(1).square().mean(1)).sqrt() for v in (out.float() - y, y))
    return (error / size).mean()


def relative_l2(out, y, mean=0.0, std=1.0):
    """|std out + mean - y|_2 / |y|_2 of each sample, then the mean. out, y (B, H, W), mean, std (H, W) -> scalar"""
    mean, std = (constant(v, out.device) for v in (mean, std))
    return nrmse(out.float() * std + mean, y)  # the same quotient: both norms divided by sqrt(H W)


def squared(out, y):
    """mean (out - y)^2. out, y (B, ...) -> scalar"""
    return (out.float() - y).square().mean()


# ---------------------------------------------------------------------------------------------------------------------
# Metrics: errors, lower is better, of numpy arrays of all samples at once (the official codes average chunks of about 1000)
# ---------------------------------------------------------------------------------------------------------------------


def zero_one(out, y):
    """Share of wrong answers. out (n, K), y (n,)"""
    from sklearn.metrics import zero_one_loss

    return float(zero_one_loss(y, out.argmax(1)))


def macro_f1_error(out, y):
    """1 - mean over the classes that occur, in y or among the answers, of 2 TP / (2 TP + FP + FN). out (n, K), y (n,)"""
    from sklearn.metrics import f1_score

    return 1 - float(f1_score(y, out.argmax(1), average="macro", zero_division=0))


def auroc_error(out, y):
    """1 - area under the ROC curve of softmax(out); more than two classes: the mean over pairs. out (n, K), y (n,)

    0.5 if there is only one class in y.
    """
    from scipy.special import softmax
    from sklearn.metrics import roc_auc_score

    if len(np.unique(y)) < 2:
        return 0.5
    p = softmax(out.astype(np.float64), axis=1)
    if out.shape[1] == 2:
        return 1 - float(roc_auc_score(y, p[:, 1]))
    return 1 - float(roc_auc_score(y, p, multi_class="ovo", labels=np.arange(out.shape[1])))


def label_auroc_error(out, y):
    """1 - mean over the labels, those that are neither always nor never there, of the area under the ROC curve. (n, K) both"""
    from sklearn.metrics import roc_auc_score

    both = [k for k in range(y.shape[1]) if 0 < y[:, k].sum() < len(y)]
    return 1 - float(np.mean([roc_auc_score(y[:, k], out[:, k]) for k in both])) if both else 0.5


def clip_map_error(out, y):
    """1 - mean over the labels that occur of the average precision. out (n, K) logits, y (n, K) 0 or 1.

    If y has a column more, it is the number of the clip that a chunk is cut from: logits are averaged over its chunks first.
    """
    from sklearn.metrics import average_precision_score

    K = out.shape[1]
    if y.shape[1] > K:
        _, first, clip = np.unique(y[:, K], return_index=True, return_inverse=True)
        total = np.zeros((len(first), K))
        np.add.at(total, clip, out)
        out, y = total / np.bincount(clip)[:, None], y[first, :K]  # (clips, K)
    some = [k for k in range(K) if y[:, k].any()]
    return 1 - float(np.mean([average_precision_score(y[:, k], out[:, k]) for k in some])) if some else 1.0


def balanced_error(out, y):
    """1 - (TP / (TP + FN) + TN / (TN + FP)) / 2 over the pixels that count. out (n, H, W) logits, y 0, 1 or NaN.

    The benchmark calls it 1 - AUROC: it takes the area under the curve of answers that are already cut at logit 0.
    """
    hit = out > 0
    true_positive, true_negative = hit[y == 1].mean() if (y == 1).any() else 1.0, (~hit[y == 0]).mean()
    return 1 - float(true_positive + true_negative) / 2


def protein_mae(out, y):
    """MAE_8 in Angstrom: mean |y - P| over pairs 24 or more residues apart, truly at most 8 A, then over proteins.

    P = (out + out^T) / 2, at least 0.01; upper triangle; proteins without such a pair are left out. out, y (n, 512, 512)
    """
    far = np.triu(np.ones(y.shape[1:], bool), k=24)
    errors = []
    for p, d in zip(out, y, strict=True):
        close = far & (d <= 8)
        if close.any():
            errors.append(np.abs(d - ((p + p.T) / 2).clip(0.01))[close].mean())
    if not errors:
        raise UserError("no two residues 24 or more apart are within 8 Angstrom in any protein: there is nothing to score.")
    return float(np.mean(errors))


def score_of(loss):
    """The metric that is the same formula as a loss, on numpy arrays."""

    def score(out, y):
        import torch

        return float(loss(torch.from_numpy(out), torch.from_numpy(y)))

    return score


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
    momentum: float = 0.9  # of sgd
    dropout: float = 0.0  # of a text encoder: hidden states and attention
    source: str = "cifar10"
    k_begin: float = 0.0  # PaRe: share of the target's tokens replaced in the first epoch, but never more than the source has
    k_end: float = 0.0  # PaRe as released: share that the schedule falls to
    mix_weight: float = 1.0  # PaRe: weight of the loss on mixed samples
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
    shape: tuple[int, ...]  # of a sample: (C, H, W) or (C, L)
    target: Literal["class", "labels", "field"]  # y: a class (n,), labels 0 or 1 (n, K), or real numbers (n, *output)
    output: tuple[int, ...]  # of a prediction: (K,), (H, W) or (C, L)
    read: Callable  # (data_dir, cache) -> (x, y) train, (x, y) test, kind of data, and what of the task the files change
    toy: Callable | None  # (n, seed) -> x, y; None: there is no need, the task can be simulated
    downloads: tuple[tuple[str, ...], ...]  # keys of DOWNLOADS: all of these, of each the first that can be had
    recipes: dict[str, Recipe] = field(repr=False)  # method -> published settings, full scale
    loss: Callable = cross_entropy  # (out, y) of a batch -> scalar
    score: Callable = zero_one  # (out, y) of all samples, numpy -> error, lower is better
    metric: str = "error"
    mean: tuple[float, ...] | None = None  # per channel, after pictures (uint8) are scaled to [0, 1]
    std: tuple[float, ...] = ()
    augment: Callable | None = None  # (x, u or None) -> x: training batches come with draws u
    draws: int = DRAWS  # how many of them
    tokens: int = 512  # 1D: the most tokens that a sequence is cut into
    simulate: Callable | None = None  # (cache, scale, n_train, as_released, device) -> as read; where the files are missing
    read_released: Callable | None = None  # instead of `read` where the official code reads other targets
    direction: str = "min"

    @property
    def modality(self):
        return "1d" if len(self.shape) == 2 else "2d"


@dataclass(frozen=True)
class Proxy:
    """A labelled data set of the modality the backbone was pretrained on: the source."""

    name: str
    shape: tuple[int, ...]  # of a picture, or (words,)
    target: Literal["class", "field"]
    output: tuple[int, ...]
    read: Callable  # (data_dir, n, seed) -> x, y and, for text, the number of labels
    toy: Callable  # (n, seed) -> the same
    download: str
    loss: Callable = cross_entropy
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] = ()
    augment: Callable | None = None
    draws: int = DRAWS

    @property
    def modality(self):
        return "1d" if len(self.shape) == 1 else "2d"


def published(optimizer, lr, weight_decay, batch_size, epochs, warmup=5, decay=None, accumulate=1, **more):
    """The settings of an official configuration. The official code sums the gradients of accumulated batches, we average:

    sgd    lr (sum g + wd w) = accumulate lr (mean g + wd / accumulate w): the same step with these
    adam   the size of its gradient does not matter, but the decay is a part of it: wd / accumulate
    adamw  neither matters
    """
    lr = accumulate * lr if optimizer == "sgd" else lr
    weight_decay = weight_decay if optimizer == "adamw" else weight_decay / accumulate
    return Recipe(epochs, batch_size, accumulate, optimizer, lr, weight_decay, warmup, decay or epochs, **more)


def both(orca, **pare):
    """Recipes for ORCA (which the other methods share) and for PaRe, which names what differs."""
    return {"orca": orca, "pare": replace(orca, **pare)}


# PaRe has published settings for NAS-Bench-360 only; elsewhere ours follow ORCA's, with the mixing of the same kind of task.
PICTURE = dict(k_begin=2000 / 3136, k_end=500 / 3136)
DENSE = dict(source="voc", k_begin=1000 / 3136, k_end=500 / 3136, mix_weight=0.3)
SEQUENCE = dict(k_begin=1.0, mix_weight=0.1)  # all 32 tokens of the source, or all of the target if it has fewer
TEXT = dict(source="conll2003")


def pdebench(name, about, shape, output, recipe, loss=nrmse, tokens=512, y_test=None, normalise=False, **read):
    """A task of PDEBench: from the first snapshot to a later one. PDEBench's own scores are of another task, step by step."""
    finish = functools.partial(pde_fields, normalise=normalise)
    read = functools.partial(read_pde, **read, normalise=normalise)
    return Task(
        name, about, shape, "field", output, read, None, ((name,),),
        both(replace(recipe, **TEXT), **SEQUENCE) if len(shape) == 2 else both(recipe, **DENSE),
        loss=loss, score=score_of(nrmse), metric="nRMSE", tokens=tokens,
        simulate=functools.partial(simulate, name, finish, tokens=tokens),
        read_released=functools.partial(read, y_test=y_test) if y_test else None,
    )  # fmt: skip


TASKS = {
    task.name: task
    for task in (
        Task(
            "cifar100", "natural images, the control", (3, 32, 32), "class", (100,), read_cifar100,
            lambda n, seed: toy_pictures(n, 32, seed), (("cifar100",),),
            both(published("sgd", 1e-4, 1e-3, 32, 60, decay=200, accumulate=32), **PICTURE),
            mean=(0.5071, 0.4867, 0.4408), std=(0.2675, 0.2565, 0.2761), augment=crop_and_flip,
        ),
        Task(
            "spherical", "CIFAR-100 projected onto a rotated sphere", (3, 60, 60), "class", (100,), read_spherical,
            lambda n, seed: toy_spherical(n, 60, seed), (("s2_cifar100", "cifar100"),),
            both(published("adamw", 1e-4, 0.1, 32, 60, accumulate=4), batch_size=16, accumulate=8, source="tiny_imagenet",
                 **PICTURE),
        ),
        Task(
            "darcy", "flow through a porous medium", (3, 85, 85), "field", (85, 85), read_darcy, None,
            (("darcy_train",), ("darcy_test",)), both(published("adamw", 1e-3, 5e-3, 4, 100), **DENSE),
            loss=relative_l2, score=score_of(relative_l2), metric="rel. L2",
            simulate=functools.partial(simulate, "darcy", darcy_fields),
        ),
        Task(
            "psicov", "distances in a protein, from its sequence", (57, SIDE, SIDE), "field", (SIDE, SIDE), read_psicov,
            toy_proteins, (("protein",),), both(published("adam", 5e-6, 1e-5, 1, 10, decay=100, accumulate=32, max_samples=64),
                                                **DENSE),
            loss=squared, score=protein_mae, metric="MAE8",
        ),
        Task(
            "cosmic", "cosmic rays in Hubble pictures", (1, 128, 128), "field", (128, 128), read_cosmic, toy_hits,
            (("cosmic_train",), ("cosmic_test",)),
            both(published("adamw", 1e-3, 0, 4, 60), **DENSE | dict(k_begin=500 / 3136, k_end=0.0)),
            loss=mask_loss, score=balanced_error, metric="1-bal.acc", augment=add_sky,
        ),
        Task(
            "ninapro", "hand movements from muscle signals", (1, 16, 52), "class", (18,), read_ninapro,
            lambda n, seed: toy_signals(n, seed, (1, 16, 52), 6), tuple((key,) for key in NINAPRO),
            both(published("adam", 1e-4, 1e-5, 32, 60, clip=1.0, embedder_epochs=100), batch_size=16, accumulate=2,
                 weight_decay=1e-5 / 2, **PICTURE),
        ),
        Task(
            "fsd50k", "what sounds there are, from a log-mel picture", (1, 96, 102), "labels", (200,), read_fsd50k, toy_sounds,
            (("audio",),), both(published("adam", 1e-4, 5e-5, 32, 100), lr=3e-5, **PICTURE),
            loss=functools.partial(presence, positive=10.0), score=clip_map_error, metric="1-mAP", augment=hear, draws=25,
        ),
        Task(
            "ecg", "heart rhythm from an electrocardiogram", (1, 1000), "class", (4,), read_ecg,
            lambda n, seed: toy_signals(n, seed, (1, 1000), 4), (("ecg",),),
            both(published("sgd", 1e-6, 0.1, 4, 15, decay=200, accumulate=16, momentum=0.99, **TEXT),
                 optimizer="adamw", lr=3e-5, weight_decay=0.1, batch_size=64, accumulate=1, **SEQUENCE),
            score=macro_f1_error, metric="1-F1", tokens=64,
        ),
        Task(
            "satellite", "land cover from 46 dates of a pixel", (1, 46), "class", (24,), read_satellite,
            lambda n, seed: toy_signals(n, seed, (1, 46), 6), (("satellite_train",), ("satellite_test",)),
            both(published("adamw", 3e-5, 3e-6, 16, 60, accumulate=4, **TEXT), batch_size=64, accumulate=1, **SEQUENCE),
        ),
        Task(
            "deepsea", "chromatin features from DNA", (4, 1000), "labels", (36,), read_deepsea, toy_dna, (("deepsea",),),
            both(published("adam", 1e-5, 0, 16, 13, warmup=10, decay=25, clip=1.0, max_samples=64, **TEXT),
                 epochs=25, **SEQUENCE),
            loss=functools.partial(presence, positive=4.0), score=label_auroc_error, metric="1-AUROC",
        ),
        pdebench(
            "advection1d", "a wave travels", (1, 256), (1, 256), published("adam", 1e-4, 1e-5, 4, 200, clip=1.0),
            file="1D_Advection_Sols_beta0.4.hdf5", x=[("tensor", 0)], y=[("tensor", 200)], every=4,
        ),
        pdebench(
            "burgers1d", "a viscous wave steepens and fades", (1, 1024), (1, 1024),
            published("adam", 1e-5, 1e-5, 4, 200, clip=1.0), rmse,  # 512 tokens: the official 128 is for a length of 256
            file="1D_Burgers_Sols_Nu1.0.hdf5", x=[("tensor", 0)], y=[("tensor", 200)],
        ),
        pdebench(
            "diffusion_reaction1d", "a concentration spreads and grows", (1, 1024), (1, 1024),
            published("sgd", 1e-3, 1e-5, 4, 200, clip=1.0, momentum=0.99), tokens=256,
            file="ReacDiff_Nu0.5_Rho1.0.hdf5", x=[("tensor", 0)], y=[("tensor", 29)], y_test=[("tensor", 99)],
        ),
        pdebench(
            "diffusion_sorption1d", "a substance seeps into the ground", (1, 1024), (1, 1024),
            published("adamw", 1e-4, 0, 4, 200, clip=1.0), tokens=32,
            file="1D_diff-sorp_NA_NA.h5", x=[("data", 0, 0)], y=[("data", 100, 0)], y_test=[("data", 99, 0)],
        ),
        pdebench(
            "navier_stokes1d", "a compressible gas: density, pressure, velocity", (1, 3072), (1, 3072),
            published("adamw", 1e-4, 1e-3, 4, 200, clip=1.0), rmse, tokens=128,
            file="1D_CFD_Rand_Eta0.1_Zeta0.1_periodic_Train.hdf5", x=[("density", 0), ("pressure", 0), ("Vx", 0)],
            y=[("density", 100), ("pressure", 100), ("Vx", 100)], normalise=True,
        ),
        pdebench(
            "darcy2d", "flow through a porous medium, PDEBench's", (1, 64, 64), (64, 64),
            published("adamw", 1e-4, 1e-5, 4, 100, decay=200),
            file="2D_DarcyFlow_beta0.1_Train.hdf5", x=[("nu", None)], y=[("tensor", 0)], every=2,
        ),
        pdebench(
            "shallow_water2d", "a round dam breaks", (1, 128, 128), (128, 128),
            published("adamw", 1e-4, 0, 4, 200, warmup=10, clip=1.0),
            file="2D_rdb_NA_NA.h5", x=[("data", 0, 0)], y=[("data", 100, 0)], y_test=[("data", 99, 0)],
        ),
        pdebench(
            "diffusion_reaction2d", "patterns form: the inhibitor from the activator", (1, 128, 128), (128, 128),
            published("adam", 1e-4, 1e-3, 4, 200, clip=1.0),
            file="2D_diff-react_NA_NA.h5", x=[("data", 0, 0)], y=[("data", 100, 1)], y_test=[("data", 99, 1)],
        ),
    )
}  # fmt: skip

# ORCA's configurations for OpenML tables: id, optimizer, learning rate, weight decay, momentum, batch, epochs, warm-up, decay,
# dropout, clip, samples of a class in an alignment step, tokens
OPENML = """
   11 adamw 1e-06 1e-05 0.9    4 60  5  60 0    1.0 128  16
   12 adamw 1e-05 1e-05 0.9   64 60  5  60 0.05 1.0 128   8
   14 adam  1e-05 1e-05 0.9    4 25  5  60 0.05   0 128 512
   15 sgd   1e-04 1e-01 0.99   4 20  5  60 0.05 1.0 128 512
   16 adamw 1e-05 1e-05 0.9   64 60  5  60 0.05   0 128 512
   18 adam  1e-05 1e-03 0.9    4 60  5  60 0.05   0 128 512
   22 sgd   1e-04 1e-01 0.99  32 60  5  60 0      0 128 512
   23 adam  1e-05 0e+00 0.9   64 25  5  60 0.1  1.0  64   4
   28 sgd   1e-04 0e+00 0.999  4 60  5  60 0    1.0 128 512
   29 adamw 1e-05 1e-05 0.9   64 12  5  60 0.05 1.0 128   4
   31 adam  1e-05 1e-03 0.9   64 20  5  20 0.05 1.0 128   8
   37 adam  1e-05 0e+00 0.9   64 20  5  60 0.1  1.0 128 512
   44 adamw 1e-06 1e-05 0.9    4 40 10 100 0.05 1.0 128 512
   48 adamw 1e-05 1e-05 0.9   64 60  5  60 0.05 1.0 128   4
   50 adam  1e-06 0e+00 0.9   64 30  5  60 0.05 1.0 128 512
   54 adam  1e-03 1e-03 0.9    4 60  5  60 0.05 1.0 128 512
   61 adam  1e-03 1e-03 0.9    4 60  5  60 0.05 1.0 128 512
  187 adamw 1e-06 1e-05 0.9    4 20  5  60 0.05 1.0 128 512
  188 adam  1e-04 1e-01 0.9   64 60  5  60 0.05 1.0 128  16
  458 sgd   1e-04 1e-05 0.99  32 60 10  60 0      0 128 512
  469 adam  1e-06 0e+00 0.9   64 10  5  60 0.05 1.0 128 512
  882 sgd   1e-03 1e-03 0.99   4 60  5  60 0    1.0 128 512
 1049 sgd   1e-04 1e-01 0.99  32 60 10  60 0      0 512 512
 1050 adam  1e-05 0e+00 0.9   64 60  5  60 0.05 1.0 128 512
 1063 adam  1e-04 1e-01 0.9   64 40  5  60 0.1  1.0 128  16
 1068 sgd   1e-04 1e-05 0.99  32 44  5  60 0      0 128 512
 1462 sgd   1e-04 1e-05 0.99  32 60  5  60 0      0 128 512
 1464 adamw 1e-05 1e-03 0.9   64 60  5  60 0.05 0.1 128  16
 1479 adamw 1e-06 1e-05 0.9    4 60  5  60 0    1.0 128  16
 1480 adamw 1e-06 1e-05 0.9   64 60  5  60 0.05 1.0 128 512
 1491 adam  1e-04 1e-03 0.9   16 30  5  60 0    1.0 128 512
 1493 adam  1e-04 1e-03 0.9   16 30  5  60 0    1.0 128 512
 1494 adam  1e-06 1e-03 0.9    4 60  5  60 0.05   0 128 512
 1510 adamw 1e-05 1e-05 0.9   64 60  5  60 0    0.1 128  16
 1511 adamw 1e-06 1e-05 0.9    4 60  5  60 0.05 1.0 128 512
 6332 adamw 1e-05 1e-03 0.9   64 60  5  60 0.05 1.0 128  16
23381 sgd   1e-05 1e-03 0.99  32 25  5  60 0.05 1.0 128  16
40496 adamw 1e-06 1e-05 0.9    4 30  5  60 0.05 1.0 128 512
40966 adamw 1e-04 0e+00 0.9   64 60  5  60 0.05 1.0 128   8
40975 adamw 1e-04 0e+00 0.9   64 60  5  60 0.05 1.0 128  16
40982 sgd   1e-04 1e-05 0.999 16 60  5  60 0.05 1.0 128 512
40994 sgd   1e-04 1e-01 0.99  32 60  5  60 0      0 128 512
"""


def openml_task(number):
    """The table of OpenML with this number; its shape and classes come with its files. Unlisted ones train like credit-g."""
    rows = {row[0]: row[1:] for row in map(str.split, OPENML.strip().splitlines())}
    row = rows.get(str(number), rows["31"])
    lr, weight_decay, momentum, batch_size, epochs, warmup, decay, dropout, clip, max_samples, tokens = map(float, row[1:])
    recipe = published(
        row[0], lr, weight_decay, int(batch_size), int(epochs), int(warmup), int(decay),
        momentum=momentum, dropout=dropout, clip=clip, max_samples=int(max_samples), embedder_epochs=20, **TEXT,
    )  # fmt: skip
    return Task(
        f"openml{number}", "a table", (1, 12), "class", (3,), functools.partial(read_openml, number=number), toy_table, (),
        both(recipe, **SEQUENCE), score=auroc_error, metric="1-AUROC", tokens=int(tokens),
    )  # fmt: skip


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PROXIES = {
    proxy.name: proxy
    for proxy in (
        Proxy(
            "cifar10", (3, 32, 32), "class", (10,), lambda data_dir, n, seed: subset(*read_cifar10(data_dir), n, seed),
            lambda n, seed: toy_pictures(n, 32, seed), "cifar10",
            mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010), augment=crop_and_flip,
        ),
        Proxy(
            "tiny_imagenet", (3, 64, 64), "class", (200,),
            lambda data_dir, n, seed: read_tiny_imagenet(data_dir, "train", n, seed),
            lambda n, seed: toy_pictures(n, 64, seed), "tiny_imagenet",
            mean=IMAGENET_MEAN, std=IMAGENET_STD, augment=resized_crop_and_flip,
        ),
        Proxy("voc", (3, 224, 224), "field", (128, 128), read_voc, toy_masks, "voc", mask_loss, IMAGENET_MEAN, IMAGENET_STD),
        Proxy(
            "conll2003", (WORDS,), "class", (5,), functools.partial(read_conll, files=("conll2003/train.txt", "eng.train")),
            toy_text, "conll2003",
        ),
        Proxy(
            "conll2000", (WORDS,), "class", (8,),
            functools.partial(read_conll, files=("conll2000/train.txt", "conll2000.zip"), relative=True),
            toy_text, "conll2000",
        ),
    )
}  # fmt: skip

# The tiny scale has one recipe for every method and task: no method is tuned alone.
TINY = Recipe(12, 32, 1, "adamw", 1e-3, 0.05, warmup_epochs=1, decay_epochs=12, clip=1.0, embedder_epochs=20, max_samples=32,
              source_samples=1000, reg=0.0, meta_epochs=2, n_train=5000)  # fmt: skip
TOY_TRAIN, TOY_TEST = 3000, 1000
SIMULATED_TRAIN, SIMULATED_TEST, SIMULATED_TOKENS = 1000, 200, 64  # at the tiny scale, at most
SOURCE_SAMPLES = 5000  # as in the official codes
LARGEST = 2**26  # numbers in a batch of the tiny scale: 256 MB. Only psicov has more in 32 samples


def find_task(name):
    """The Task called `name`. Raises UserError with the nearest names."""
    if table := re.fullmatch(r"openml([1-9]\d*)", name):
        return openml_task(int(table[1]))
    if name not in TASKS:
        near = difflib.get_close_matches(name, [*TASKS, "openml<ID>"], 3, 0.5) or TASKS
        raise UserError(f"there is no task {name!r}; perhaps {' or '.join(near)}. `python data.py` lists all.")
    return TASKS[name]


def complete(args, method, scale):
    """`args` with every option that was left at None filled in from the recipe of its task, method and scale.

    Raises UserError for a source of another modality than the task's.
    """
    task = find_task(args.task)
    recipe = task.recipes.get(method, task.recipes["orca"])
    source = getattr(args, "source", None) or recipe.source
    if PROXIES[source].modality != task.modality:
        fitting = " or ".join(proxy.name for proxy in PROXIES.values() if proxy.modality == task.modality)
        raise UserError(f"--source {source} does not go with {task.name}.\nTake {fitting}.")
    if scale == "tiny":
        share = 2 ** max(0, math.ceil(math.log2(TINY.batch_size * math.prod(task.shape) / LARGEST)))
        recipe = replace(TINY, source=recipe.source, k_begin=recipe.k_begin, k_end=recipe.k_end, mix_weight=recipe.mix_weight,
                         batch_size=TINY.batch_size // share, accumulate=share)  # fmt: skip
    squeeze = (args.epochs or recipe.epochs) / recipe.epochs  # a shorter run has the same learning rate curve, squeezed
    recipe = replace(
        recipe,
        warmup_epochs=recipe.warmup_epochs * squeeze,
        decay_epochs=recipe.decay_epochs * squeeze,
        k_end=recipe.k_end if args.as_released else 0.0,
        reg=Recipe.reg if args.as_released else recipe.reg,
    )
    return replace(args, **{f.name: getattr(recipe, f.name) for f in fields(recipe) if getattr(args, f.name, "") is None})


def of_one_batch(args):
    """Learning rate and weight decay in a first stage, which accumulates nothing: the published ones as they were before
    `published` rescaled them; others as given."""
    recipe = find_task(args.task).recipes["orca"]
    released = args.scale == "full" and (args.lr, args.weight_decay) == (recipe.lr, recipe.weight_decay)
    if not released or recipe.optimizer == "adamw":
        return args.lr, args.weight_decay
    return args.lr / (recipe.accumulate if recipe.optimizer == "sgd" else 1), args.weight_decay * recipe.accumulate


# ---------------------------------------------------------------------------------------------------------------------
# Data on the device
# ---------------------------------------------------------------------------------------------------------------------


class Split:
    """One split: x (n, ...) and y (n, ...), whole on the device, or Lazy; prepared there, in batches.

    Pictures are uint8 and scaled to [0, 1], token ids int64 and left alone, anything else becomes fp32. `like` is its Task or
    Proxy: name, target, output, loss, mean, std and augmentation. `classes`: how many there are (labels: how many), else None.
    """

    def __init__(self, x, y, classes, kind, like, device):
        import torch

        self.device = torch.device(device)
        self.x, self.y = (
            part if isinstance(part, Lazy) else torch.from_numpy(np.require(part, requirements="CWO")).to(device)
            for part in (x, y)
        )  # copied if it is the map of a file
        self.classes, self.kind, self.augment, self.draws = classes, kind, like.augment, like.draws
        self.target, self.shape, self.loss = like.target, like.shape, like.loss
        self.output = like.output if classes is None else (classes,)
        self.stream = zlib.crc32(like.name.encode())  # target and source draw different numbers
        self.mean = None if like.mean is None else torch.tensor(like.mean, device=device)[:, None, None]  # (C, 1, 1)
        self.std = None if like.mean is None else torch.tensor(like.std, device=device)[:, None, None]

    def __len__(self):
        return len(self.y)

    @property
    def lazy(self):
        return isinstance(self.x, Lazy) or isinstance(self.y, Lazy)

    def _rows(self, part, index, u=None):
        if not isinstance(part, Lazy):
            return part[index]
        import torch

        array = part.read(index.cpu().numpy(), None if u is None else u.cpu().numpy())
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, non_blocking=True)

    def _prepare(self, x, u):
        import torch

        if x.dtype == torch.int64:
            return x
        x = x.float() / 255 if x.dtype == torch.uint8 else x.float()
        if self.augment is not None:
            x = self.augment(x, u)
        return x if self.mean is None else (x - self.mean) / self.std

    def inputs(self, index, u=None):
        """Samples `index`, as the embedder takes them (B, C, H, W) or (B, C, L) fp32, or token ids (B, words).

        Augmented by the draws u (B, draws) if there are any.
        """
        return self._prepare(self._rows(self.x, index, u), u)

    def targets(self, index):
        """y of the samples `index`: (B,) classes, (B, K) labels, (B, *output) fields."""
        return self._rows(self.y, index)

    @property
    def chunk(self):
        """How many samples may be evaluated at once: 256, or fewer where they are large (64 MB of inputs)."""
        return min(256, max(1, 2**24 // math.prod(self.shape)))

    def plan(self, steps, batch_size, seed, epoch):
        """The samples of every step of an epoch (steps, batch_size) and the draws that augment them (steps, batch_size, draws).

        Shuffled, all batches of one size: what does not fill a batch is left out and comes in another epoch; a set smaller
        than the epoch starts over.
        """
        import torch

        generator = torch.Generator().manual_seed(int(np.random.SeedSequence([seed, epoch, self.stream]).generate_state(1)[0]))
        rounds = -(-steps * batch_size // len(self))
        order = torch.cat([torch.randperm(len(self), generator=generator) for _ in range(rounds)])[: steps * batch_size]
        return order.view(steps, batch_size), torch.rand(steps, batch_size, self.draws, generator=generator)

    def batches(self, steps, batch_size, seed, epoch, rank=0, world=1):
        """The augmented batches x (B, C, H, W) or (B, C, L), y (B, ...) of this process, B = batch_size / world.

        All processes follow one plan and take their own columns of it: G processes see the batches of one. What lies in files
        is read a batch ahead, in a thread.
        """
        here = "cpu" if self.lazy else self.device  # what reads files needs the numbers before the device is free
        order, u = (part[:, rank::world].to(here) for part in self.plan(steps, batch_size, seed, epoch))

        def read(step):
            return self._rows(self.x, order[step], u[step]), self.targets(order[step])

        with ThreadPoolExecutor(1) as ahead:
            following = ahead.submit(read, 0) if self.lazy else None
            for step in range(steps):
                x, y = following.result() if self.lazy else read(step)
                if self.lazy and step + 1 < steps:
                    following = ahead.submit(read, step + 1)
                yield self._prepare(x, u[step].to(self.device)), y


def subset(x, y, n, seed):
    """n of the samples, drawn at random; all of them if there are no more."""
    index = np.sort(np.random.default_rng(seed).permutation(len(y))[:n])
    return x[index], y[index]


@dataclass
class Loaded:
    task: Task  # with what only the files tell: a table's shape and classes, darcy's units
    train: Split
    val: Split
    test: Split


def load(task, data_dir, cache, scale, n_train=None, seed=0, device="cpu", as_released=False):
    """Training, validation and test split of a task, on the device.

    A tenth of the training samples that are used is held out for validation, drawn with `seed`; the official codes choose
    the checkpoint on the test set. `n_train` remain for training (None: the other nine tenths of all there are).
    `as_released`: data of PDE tasks with the mistakes of the official files and of ORCA's loader (docs/pde.md).

    Where files are missing, PDE tasks are simulated; toy data take the place of others at the tiny scale, aloud.
    Raises: Missing at full scale.
    """
    import torch

    task, data_dir, cache = find_task(task), Path(data_dir), Path(cache)
    try:
        read = (as_released and task.read_released) or task.read
        train, test, kind, *changes = read(data_dir, cache)
    except Missing as missing:
        advice = f"`python data.py --prepare {task.name} --data-dir {data_dir}` fetches the files."
        advice = advice if task.downloads or task.name.startswith("openml") else "Put it there."  # a task of one's own
        if task.simulate:
            print(f"SIMULATED: {missing}\n           The equation is solved here instead.")
            train, test, kind, *changes = task.simulate(cache, scale, n_train, as_released, device)
        elif scale != "tiny":
            raise Missing(f"{task.name}: {missing}\n{advice} To try without: --scale tiny.") from None
        else:
            print(f"TOY DATA: {missing}\n          Generated data take the place of {task.name}; {advice}")
            most = max(24, 2**25 // math.prod(task.shape))  # 128 MB
            n = min(n_train or TOY_TRAIN, TOY_TRAIN, most)
            train = task.toy(n + n // 9 + 1, seed=0)
            test = task.toy(min(TOY_TEST, most), seed=1)
            kind, changes = "toy", []
    task = replace(task, **changes[0]) if changes else task
    for part, (_, y) in (("training", train), ("test", test)):
        if task.target == "class" and kind != "toy" and not 0 <= y.min() <= y.max() < task.output[0]:
            raise UserError(f"{task.name}: the classes of the {part} set go from {y.min()} to {y.max()}.\n"
                            f"Number its {task.output[0]} classes from 0 to {task.output[0] - 1}.")  # fmt: skip
    classes = count_classes(task.target, train[1]) if kind == "toy" else None if task.target == "field" else task.output[0]
    order = np.random.default_rng(seed).permutation(len(train[1]))
    n_train = min(n_train or len(order), len(order) - max(1, len(order) // 10))
    n_val = max(1, n_train // 9)
    if (groups := getattr(train[0], "groups", None)) is not None:  # a tenth of the groups, whole, comes first
        kinds = np.random.default_rng(seed).permutation(np.unique(groups))
        held = np.isin(groups[order], kinds[: max(1, len(kinds) // 10)])  # (n,) in the order drawn
        n_val, n_train = min(n_val, int(held.sum())), min(n_train, int((~held).sum()))
        order = np.concatenate([order[held][:n_val], order[~held]])
    parts = {"val": np.sort(order[:n_val]), "train": np.sort(order[n_val : n_val + n_train])}
    splits = {name: Split(train[0][i], train[1][i], classes, kind, task, device) for name, i in parts.items()}
    loaded = Loaded(task, **splits, test=Split(*test, classes, kind, task, device))
    first = torch.zeros(1, dtype=torch.int64, device=device)
    found, wanted = tuple(loaded.train.inputs(first).shape[1:]), tuple(task.shape)
    if found != wanted:
        raise UserError(f"{task.name}: {data_dir} has samples of {size(found)}; expected {size(wanted)}.")
    what = f"{classes} {'classes' if task.target == 'class' else 'labels'}" if classes else f"fields {size(task.output)}"
    print(f"target  {task.name}: {kind} data, {n_train:,} samples for training and {n_val:,} for validation of {len(order):,},",
          f"{len(loaded.test):,} for test, {what}")  # fmt: skip
    return loaded


def count_classes(target, y):
    """How many classes or labels there are in y; None for fields."""
    if target == "class":
        return int(y.max()) + 1
    return y.shape[1] if target == "labels" else None


def load_proxy(name, data_dir, scale, n=SOURCE_SAMPLES, seed=0, device="cpu", tokenizer=None):
    """n labelled samples of the source modality, as a Split; toy data at the tiny scale if the files are missing.

    Text becomes the ids of its first 32 tokens, (n, 32) int64, by `tokenizer`, the backbone's: list[str] -> list[int], and
    `tokenizer.pad`, the id that fills a shorter piece.
    """
    proxy, data_dir = PROXIES[name], Path(data_dir)
    try:
        x, y, *count = proxy.read(data_dir, n, seed)
        kind, classes = "official", None if proxy.target == "field" else [*proxy.output, *count][-1]
    except Missing as missing:
        advice = f"`python data.py --prepare {name} --data-dir {data_dir}` fetches the files."
        if scale != "tiny":
            raise Missing(f"source {name}: {missing}\n{advice} To try without: --scale tiny.") from None
        print(f"TOY DATA: {missing}\n          Generated data take the place of {name}; {advice}")
        x, y, *count = proxy.toy(min(n, TOY_TEST), seed=2)
        kind, classes = "toy", count_classes(proxy.target, y)
    if proxy.modality == "1d":
        ids = [tokenizer(words)[:WORDS] for words in x]
        x = np.array([row + [tokenizer.pad] * (WORDS - len(row)) for row in ids], np.int64)  # (n, words)
    what = f"{classes} classes" if classes else f"fields {size(proxy.output)}"
    print(f"source  {name}: {kind} data, {len(y):,} samples, {what}")
    return Split(x, y, classes, kind, proxy, device)


def size(shape):
    return " x ".join(map(str, shape))


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
    """Fetch the files of a task and of its sources, or of one source.

    Raises UserError if they cannot be had; not for a task that can be simulated, which then says so.
    """
    if name in PROXIES:
        wanted = [(PROXIES[name].download,)]
    else:
        task = find_task(name)
        sources = sorted({recipe.source for recipe in task.recipes.values()})
        wanted = [*task.downloads] + [(PROXIES[source].download,) for source in sources]
        if table := re.fullmatch(r"openml(\d+)", name):
            prepare_table(int(table[1]), data_dir)
    failed = {}
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
                    failed[key] = error
                else:
                    print(f"{key}: {error}\nTrying {keys[1]} instead, from which we make it.")
    if name in TASKS and TASKS[name].simulate and failed:
        for key, error in failed.items():
            print(f"{key}: {error}")
        own = {key for keys in TASKS[name].downloads for key in keys}
        if own & failed.keys():
            print(f"{name} will be simulated: its equation is solved here when a run needs it (docs/pde.md).")
        if failed := sorted(failed.keys() - own):
            print(f"Without {' and '.join(failed)}, methods that use a source run at the tiny scale only, with a toy.")
    elif len(failed) == 1:
        raise failed.popitem()[1]
    elif failed:
        for key, error in failed.items():
            print(f"{key}: {error}")
        raise UserError(f"{', '.join(failed)} could not be fetched; above is where each can be had and where it goes.")


def prepare_table(number, data_dir):
    """Let scikit-learn fetch a table of OpenML into data_dir/openml. Raises UserError if it cannot be had."""
    try:
        values, _, labels = fetch_table(number, data_dir, fetching=True)
        print(f"openml{number}: present, {values.shape[0]:,} rows, {values.shape[1]} columns, {len(set(labels))} classes")
    except (OSError, ValueError, http.client.HTTPException) as error:
        own = SKLEARN_COPIES.get(number)
        rest = f"Without it scikit-learn's own copy is used ({own})." if own else "Try again later."
        print(f"openml{number}: https://www.openml.org/d/{number} cannot be had ({error}).\n{rest}")
        if not own:
            raise UserError(f"openml{number} could not be fetched.") from error


def print_tasks(data_dir):
    """The table of tasks: shapes, metric, source, what is present locally."""
    print(f"{'task':21}{'input':16}{'output':11}{'metric':10}{'source (PaRe)':14}{'in ' + str(data_dir):13}about")
    for task in TASKS.values():
        here = sum(any(present(DOWNLOADS[key], data_dir) for key in keys) for keys in task.downloads)
        rest = "solved here" if task.simulate else "in part" if here else "missing"
        state = "present" if here == len(task.downloads) else rest
        print(f"{task.name:21}{size(task.shape):16}{size(task.output):11}{task.metric:10}",
              f"{task.recipes['pare'].source:14}{state:13}{task.about}", sep="")  # fmt: skip
    example = openml_task(31)
    tables = len(list(Path(data_dir).glob("openml/openml.org/api/v1/json/data/[0-9]*.gz")))
    print(f"{'openml<ID>':21}{'as the table':16}{'classes':11}{example.metric:10}{example.recipes['pare'].source:14}",
          f"{f'{tables} tables':13}61, 187, 1510 and part of 28 are always here", sep="")  # fmt: skip
    print()
    for proxy in PROXIES.values():
        here = "present" if present(DOWNLOADS[proxy.download], data_dir) else "missing"
        what = f"{proxy.output[0]} classes" if proxy.target == "class" else f"masks {size(proxy.output)}"
        print(f"source {proxy.name}: {size(proxy.shape)}{' words' * (proxy.modality == '1d')}, {what}, {here}")
    print(f"\n`python data.py --prepare NAME --data-dir {data_dir}` fetches what is missing.")


def main(args):
    if args.prepare:
        prepare(args.prepare, args.data_dir)
    print_tasks(args.data_dir)


if __name__ == "__main__":
    guarded(main, command_line(Args, __doc__))
