"""Files: downloading them, reading them, and `check`, the gate that every array of data passes.

A damaged file, or one with other values than the task needs, ends with a UserError that names it.
"""

import contextlib
import errno
import glob
import gzip
import hashlib
import http.client
import math
import os
import pickle
import re
import shutil
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cli import Missing, UserError, reason, stream

# ---------------------------------------------------------------------------------------------------------------------
# Downloads
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Download:
    url: str
    md5: str | None  # None where nobody published one
    megabytes: int
    gives: tuple[str, ...]  # the files it leaves in the data folder: all of these glob patterns match
    name: str | None = None  # its path in the data folder; None: the last part of the URL
    by_hand: str = ""  # another way to get it
    unpack: bool = False  # a zip that is read as a folder

    @property
    def file(self):
        return self.name or self.url.rsplit("/", 1)[1]

    @property
    def is_archive(self):
        return self.unpack or self.file.endswith((".tar", ".tar.gz"))


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


DEPTH = 4  # levels that are searched for files: the data folder and three below it, as PDEBench's downloader makes them


def is_system_file(path):
    """True for files that operating systems add to a folder or an archive: ._x.JPEG, .DS_Store, __MACOSX/x, .Trash/x."""
    return any((part.startswith(".") and part not in (".", "..")) or part == "__MACOSX" for part in Path(path).parts)


def find(data_dir, pattern):
    """The paths in `data_dir` that match a glob pattern, sorted, without system files."""
    return [path for path in sorted(Path(data_dir).glob(pattern)) if not is_system_file(path.relative_to(data_dir))]


def present(download, data_dir):
    """True if all files of a download are in the folder. Patterns that begin with **/ are searched as deep as `locate`."""
    if download.is_archive and (Path(data_dir) / download.file).exists():
        return False  # an archive is removed once all of it is unpacked

    def found(pattern):
        deep = [f"{'*/' * depth}{pattern[3:]}" for depth in range(DEPTH)] if pattern.startswith("**/") else [pattern]
        return any(path.suffix not in (".part", ".lock") for d in deep for path in find(data_dir, d))

    return all(found(pattern) for pattern in download.gives)


def size_said(headers, have=0):
    """Size of the complete file according to the response headers, if `have` bytes are already here; 0 if unknown."""
    whole = headers.get("Content-Range", "").rpartition("/")[2]
    length = headers.get("Content-Length", "")
    return int(whole) if whole.isdecimal() else int(length) + have if length.isdecimal() else 0


def other_checksum(download, path):
    """The checksum of a file, in words, if it is not the one known for this download; else None."""
    if not download.md5:
        return None
    with path.open("rb") as file:
        md5 = hashlib.file_digest(file, "md5").hexdigest()
    return None if md5 == download.md5 else f"checksum {md5}, not {download.md5}"


def lock(path, busy):
    """Lock a file against other processes as long as the returned file is open. Raises UserError(busy) if one has locked it.

    Does nothing where there are no such locks: on Windows, some network drives, and where nothing can be written.
    """
    try:
        import fcntl

        file = path.open("w")
    except (ImportError, OSError):
        return contextlib.nullcontext()
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # belongs to this process
    except (BlockingIOError, PermissionError) as error:
        file.close()
        raise UserError(busy) from error
    except OSError:
        pass
    return file


def fetch(download, data_dir):
    """Download one file into `data_dir` and unpack it there if it is an archive; an interrupted download is resumed.

    Raises UserError if the server does not answer or sends too little, if the checksum is wrong, or if another process is
    downloading the same file.
    """
    path = Path(data_dir) / download.file
    path.parent.mkdir(parents=True, exist_ok=True)
    locked = path.with_name(path.name + ".lock")
    with lock(locked, f"{path}: another process is downloading this file.\nWait for it."):
        try:
            if not path.exists():
                retrieve(download, path)
            elif wrong := other_checksum(download, path):
                raise UserError(f"{path} has {wrong}.\nRemove it and repeat the command.")
            if download.is_archive:
                unpack(download, path, Path(data_dir))
        finally:
            locked.unlink(missing_ok=True)


def retrieve(download, path):
    """Download a file to `path`, first under the name *.part. Raises UserError as `fetch` does."""
    by_hand = f" ({download.by_hand})" * bool(download.by_hand)
    part = path.with_name(path.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    try:
        request = urllib.request.Request(download.url, headers={"Range": f"bytes={have}-"} if have else {})
        with urllib.request.urlopen(request, timeout=30) as answer:
            resumed = answer.status == 206
            total = size_said(answer.headers, have * resumed)
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
                f"{download.url} answers {error.code}.\nDownload it by hand{by_hand}: {path}, {download.megabytes:,} MB."
            ) from error
        total = size_said(error.headers) or have
    except (OSError, http.client.HTTPException) as error:
        of_disk = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM)
        if getattr(error, "errno", None) in of_disk:
            error.filename = str(part)
            raise
        raise UserError(
            f"{download.url} cannot be reached ({error}).\n"
            f"Repeat the command later, or download it by hand{by_hand}: {path}, {download.megabytes:,} MB."
        ) from error
    size = part.stat().st_size
    if size < total:
        raise UserError(f"{download.url} stopped after {size:,} of {total:,} bytes.\nRepeat the command to resume.")
    if wrong := f"{size:,} of {total:,} bytes" if size > total > 0 else other_checksum(download, part):
        part.unlink()
        raise UserError(f"{download.url} came with {wrong}.\nIt was removed; try again.")
    part.rename(path)


def unpack(download, path, data_dir):
    """Unpack an archive, then remove it. Raises UserError if it is damaged, before anything is unpacked."""
    print(f"checking and unpacking {path.name}", flush=True)  # takes minutes for the largest
    with reading(path, "archive"):
        if download.unpack:
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise ValueError(f"{damaged} in it is damaged")
                archive.extractall(path.parent)
        else:
            with tarfile.open(path) as archive:
                check_end(archive)
                archive.extraction_filter = getattr(tarfile, "data_filter", None)  # Python before 3.11.4 has none
                archive.extractall(data_dir)
    path.unlink()


def check_end(archive):
    """Raise ValueError unless 512 zeros or more end a tar file: tarfile takes a cut and a damaged header for the end, too."""
    members = archive.getmembers()
    archive.fileobj.seek(archive.offset)  # where tarfile looked for a further header
    rest = iter(lambda: archive.fileobj.read(1 << 20), b"")
    first = next(rest, b"")
    if len(first) < 512 or first.strip(b"\0") or any(block.strip(b"\0") for block in rest):
        raise ValueError(f"it is cut or damaged after {members[-1].name}")


# ---------------------------------------------------------------------------------------------------------------------
# Reading files
# ---------------------------------------------------------------------------------------------------------------------


def drawn(total, n, seed):
    """The sorted numbers of n source samples out of `total`, drawn at random; all if n is None or larger."""
    return np.sort(np.random.default_rng(stream("source samples", seed)).permutation(total)[:n])


class Lazy:
    """Samples that stay in their files until they are needed: `read(rows, u)` returns an array (B, ...).

    `u` are the uniform draws (B, draws) of a training batch, or None. `groups` (n,) are the numbers of the records that samples
    are cut from; those of one record never go to both training and validation.
    """

    def __init__(self, n, read, groups=None, rows=None):
        self.rows, self.groups, self._read = np.arange(n) if rows is None else rows, groups, read

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return Lazy(None, self._read, self.groups if self.groups is None else self.groups[index], self.rows[index])

    def read(self, index, u=None):
        return self._read(self.rows[index], u)

    def checked(self, where, shape, *values):
        """The same samples, passed through `check` when they are read."""
        return Lazy(None, lambda rows, u: check(where, self._read(rows, u), shape, *values, rows=rows), self.groups, self.rows)


def read_ahead(read, n):
    """read(0), ..., read(n - 1), each read in a thread while the one before is used."""
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(read, 0) if n else None
        for i in range(n):
            now, following = following.result(), thread.submit(read, i + 1) if i + 1 < n else None
            yield now


def of_files(read, paths):
    """Samples in files of their own, one each, read by `read`."""

    def read_all(rows, u):
        x = None
        for i, row in enumerate(rows):
            sample = read(paths[row])
            if x is None:  # filled in place: a list and its stack would take twice as much
                x = np.empty((len(rows), *sample.shape), sample.dtype)
            x[i] = sample
        return x

    return Lazy(len(paths), read_all)


@contextlib.contextmanager
def reading(path, what):
    """Turn errors while a file is read into a UserError that names it, except for those that are not the file's fault."""
    try:
        yield
    except (UserError, MemoryError, PermissionError, ImportError):  # not a fault of the file
        raise
    except Exception as error:
        number = getattr(error, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT):  # unpacking to a full disk is not a fault of the file
            raise
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, UnicodeDecodeError):
            raise UserError(f"{path} is not UTF-8 text ({why}).\nSave it as UTF-8.") from error
        if "unable to lock file" in why:
            raise UserError(
                f"{path} is locked: another program has it open, or its file system has no locks ({why}).\n"
                "Close that program; if there is none, set HDF5_USE_FILE_LOCKING=FALSE."
            ) from error
        if re.search(r"filter .*not registered|required filter|can't open (directory|plugin)", why):
            raise UserError(
                f"{path} is compressed by a filter that HDF5 does not have here ({why}).\n"
                "`pip install hdf5plugin` and set HDF5_PLUGIN_PATH to hdf5plugin.PLUGIN_PATH, or rewrite it: h5repack -f NONE."
            ) from error
        if isinstance(error, OSError) and number:  # of the disk or the network
            raise UserError(f"{path} cannot be read: {error.strerror or why}.") from error
        raise UserError(f"{path} is not a readable {what} ({why}).\nRemove it and download or save it again.") from error


def read_text(path):
    """The text of a UTF-8 file, with or without a byte-order mark. Raises UserError if it is in another encoding."""
    with reading(path, "text file"):
        return path.read_text(encoding="utf-8-sig")


def locate(data_dir, name):
    """The file or folder `name` in data_dir, at most three folders deep. Raises Missing, or UserError if there are several."""
    for depth in range(DEPTH):
        if found := find(data_dir, "*/" * depth + name):
            if len(found) > 1:
                raise UserError(f"{found[0]} and {found[1]}: which one?\nGive a --data-dir that holds one of them.")
            return found[0]
    raise Missing(f"no {name} in {data_dir}.")


def beside(path, name):
    """The file `name` in the folder of `path`. Raises Missing."""
    if not (path := path.with_name(name)).exists():
        raise Missing(f"no {path.name} in {path.parent}.")
    return path


@contextlib.contextmanager
def replacing(path):
    """A temporary file to write bytes to, renamed to `path` once complete: another process may be writing the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f"{glob.escape(path.name)}.*.part"):  # of a killed process
        with contextlib.suppress(OSError):
            if time.time() - left.lstat().st_mtime > 24 * 3600:
                left.unlink()
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # a renamed file is complete, even after a power failure
        part.replace(path)
    except OSError as error:  # of a full disk: numpy's has no errno
        raise OSError(error.errno or errno.ENOSPC, error.strerror or str(error), str(path)) from error
    finally:
        part.unlink(missing_ok=True)


def check_record(task):
    """Raise UserError if a field of a data.Task, perhaps of one's own, has a value that cannot be right."""
    whole = lambda sizes: isinstance(sizes, tuple) and all(isinstance(size, (int, np.integer)) and size > 0 for size in sizes)
    text = lambda names: isinstance(names, tuple) and all(isinstance(name, str) for name in names)
    C = task.shape[:1] if isinstance(task.shape, tuple) else ()
    for field, right, expected in (
        ("shape", whole(task.shape) and len(task.shape) in (2, 3), "(C, L) or (C, H, W)"),
        ("output", whole(task.output) and task.output, "(K,), (H, W) or (C, L)"),
        ("target", task.target in ("class", "labels", "field"), "class, labels or field"),
        ("names", isinstance(task.names, str) or callable(task.names) or text(task.names), "a tuple of str"),
        ("mean", task.mean is None or (len(task.mean),) == C, f"one number for each channel, {C}"),
        ("std", task.mean is None or ((len(task.std),) == C and min(task.std) > 0), "as many as in `mean`, above 0"),
        ("tokens", task.tokens > 0, "a positive number"),
    ):
        if not right:
            raise UserError(f"task {task.name}: {field} is {getattr(task, field)!r}; expected {expected}.")


def check_parts(name, parts):
    """Return what the reader of task `name` returned. Raise UserError if it is not (x, y), (x, y), origin[, changes]."""
    has = lambda part, *lengths: isinstance(part, (tuple, list)) and len(part) in lengths
    if not (has(parts, 3, 4) and has(parts[0], 2) and has(parts[1], 2) and isinstance(parts[2], str)):
        raise UserError(f'task {name}: `read` must return (x, y), (x_test, y_test), "official".')
    return parts


def save_array(path, array):
    """Write an .npy file."""
    with replacing(path) as file:
        np.save(file, array)


def map_cached(path):
    """A cached .npy file, memory-mapped. Raises UserError if it is damaged."""
    try:
        return np.load(path, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise UserError(f"{path} is damaged ({reason(error)}).\nRemove it: it will be made again.") from error


def kept(cache, name, what, make):
    """The two arrays of `make()`, cached as memory-mapped files. `make` is slow, so it runs once; `what` it does is printed."""
    paths = [cache / f"{name}-{part}.npy" for part in ("x", "y")]
    if not all(path.exists() for path in paths):
        print(f"{what}, once; kept in {cache}")
        for path, array in zip(paths, make(), strict=True):
            save_array(path, array)
    return tuple(map(map_cached, paths))


def kept_of_file(cache, name, file, make, *what):
    """The two arrays that `make()` reads from a large `file`, cached until the file, or `what` is read of it, changes."""
    key = f"{file} {file.stat().st_size} {file.stat().st_mtime_ns} {what}"
    key = hashlib.sha256(key.encode()).hexdigest()[:12]
    return kept(cache, f"{name}-{key}", f"reading what is needed of {file}", make)


def read_npy(path, shape=None):
    """The array in an .npy file. Raises UserError if it is damaged, or not shaped as `shape` says (None: any number)."""
    with reading(path, ".npy file"), path.open("rb") as file:
        shape_said, _, dtype = npy_header(file)
        check_dtype(path, dtype)
        said, size = file.tell() + math.prod(shape_said) * dtype.itemsize, path.stat().st_size
        if size < said:
            raise ValueError(f"{size:,} of {said:,} bytes")
        file.seek(0)
        array = np.load(file, allow_pickle=False)
    return check_shape(path, array, shape or (None,) * array.ndim)


# ---------------------------------------------------------------------------------------------------------------------
# Checking what was read
# ---------------------------------------------------------------------------------------------------------------------


def check_dtype(where, dtype):
    """Raises UserError unless this is a type of real numbers: no complex numbers, text, dates, or Python objects."""
    if dtype.kind not in "biuf":
        raise UserError(f"{where} holds values of type {dtype}; expected real numbers.")


def numbers(where, array):
    """`array`, or a list of numbers, as a numpy array; Lazy unchanged. Raises UserError unless it holds real numbers only."""
    if isinstance(array, Lazy):
        return array
    if np.ma.is_masked(array):
        raise UserError(f"{where} holds masked values; expected numbers only.")
    try:
        array = np.asarray(array)
    except (ValueError, TypeError) as error:  # rows of unequal length, a tensor on a GPU
        raise UserError(f"{where} is not an array of numbers ({str(error).splitlines()[0]}).") from error
    check_dtype(where, array.dtype)
    return array if array.ndim else array[None]  # a single number is one sample


def check_shape(where, array, shape):
    """`array`, if it holds real numbers and has this shape (None: any number). Raises UserError."""
    check_dtype(where, array.dtype)
    if array.ndim != len(shape) or any(want not in (None, have) for want, have in zip(shape, array.shape, strict=True)):
        expected = ", ".join("n" if size is None else str(size) for size in shape) + "," * (len(shape) == 1)
        raise UserError(f"{where} holds {array.shape}; expected ({expected}).")
    return array


def check(where, array, shape, values="number", classes=None, first=0, rows=None):
    """The gate: `array` (n, *shape), of any real dtype and byte order, in the dtype that models take. Lazy: when it is read.

    Args:
        where: what the message begins with: a file, or a task and its set.
        shape: of a sample. Compared as a shape: nothing is reshaped, except class numbers (n, 1) to (n,).
        values: what they must be
            "number"  finite in fp32 -> fp32
            "input"   the same, but images (uint8) stay uint8
            "class"   whole numbers from `first` to `first` + `classes` - 1 -> int64 from 0
            "labels"  0 or 1 -> fp32; columns after the first `classes` are other numbers
            "mask"    0, 1, or NaN where a pixel is ignored -> fp32
        rows: (n,) numbers of the samples for the message; None: 0, 1, ...
    Raises UserError with `where`, the first wrong sample, its value and what was expected.
    """
    if isinstance(array, Lazy):
        return array.checked(where, shape, values, classes, first)
    array = numbers(where, array)
    if not shape and array.shape[1:] == (1,):
        array = array[:, 0]  # (n, 1) -> (n,)
    check_shape(where, array, (None if rows is None else len(rows), *shape))
    with np.errstate(over="ignore", invalid="ignore"):  # what they warn of is refused
        if values == "class":
            expected = f"a whole number from {first} to {first + classes - 1}"
            right = (array >= first) & (array < first + classes) & (array % 1 == 0)
            result = array.astype(np.int64) - first
        elif values == "input" and array.dtype == np.uint8:
            return array
        else:
            result = array.astype(np.float32, copy=False)
            if values in ("number", "input"):
                expected = "a finite fp32 number"
                finite = not array.size or np.isfinite([result.min(), result.max()]).all()  # both are NaN if one value is
                right = np.True_ if finite else np.isfinite(result)
            else:
                expected = "0 or 1" + ", or NaN where a pixel is ignored" * (values == "mask")
                right = (array == 0) | (array == 1)
                if values == "mask":
                    right |= np.isnan(array)
                elif classes is not None:
                    right[:, classes:] = np.isfinite(array[:, classes:])
    if right.all():
        return result
    wrong = np.flatnonzero(~right.reshape(len(right), -1).all(1))  # the samples with wrong values
    sample, low, high = wrong[0], np.fmin.reduce(array, axis=None), np.fmax.reduce(array, axis=None)  # NaN left out
    value = array[sample][~right[sample]].flat[0]
    raise UserError(
        f"{where}: sample {sample if rows is None else rows[sample]} has {value}; expected {expected}.\n"
        f"Wrong in {len(wrong):,} of {len(array):,} samples (values {low} to {high}): correct them, or leave these samples out."
    )


class ArraysOnly(pickle._Unpickler):
    """Opens pickles of numpy arrays and plain Python values; refuses everything else, since a pickle can run code.

    In Python, not in C, so that each step can be checked; arrays take the same time.
    """

    dispatch = dict(pickle._Unpickler.dispatch)  # opcode -> method
    allowed = {f.__name__: f for f in (np.ndarray, np.dtype, np.zeros(1).__reduce__()[0], np.zeros(1).__reduce_ex__(5)[0],
                                       np.float64(0).__reduce__()[0])}  # fmt: skip

    def find_class(self, module, name):
        if module.split(".")[0] == "numpy" and name in self.allowed:
            return self.allowed[name]
        if (module, name) == ("_codecs", "encode"):  # how Python 2 wrote bytes
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not an array")

    def load_build(self):
        """Set the state of the last object. numpy believes that of a type: a wrong size or flag would make wild pointers."""
        state, last = self.stack[-1], self.stack[-2]
        if isinstance(last, np.dtype):
            expected = last.__reduce__()[2]  # (version, byte order, subtype, names, fields, size, alignment, flags)
            if last.kind not in "biufSUO" or not isinstance(state, tuple) or state[2:] != expected[2:]:
                raise pickle.UnpicklingError("it holds a damaged type of numbers")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build


def unpickle(path):
    """What a (gzipped) pickle holds, or an .npy file with a pickle inside; the keys of a dictionary become str.

    Raises UserError if it is truncated, damaged or unsafe.
    """
    with reading(path, "pickle of arrays"):
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            is_npy = file.read(6) == b"\x93NUMPY"
            file.seek(0)
            if is_npy:
                npy_header(file)
            try:
                content = ArraysOnly(file, encoding="bytes").load()
            except MemoryError as error:  # a damaged length, more likely than a lack of memory
                raise ValueError("it asks for more memory than there is") from error
        if isinstance(content, np.ndarray):  # 0-d: one object
            content = content.item() if content.ndim == 0 else list(content)
        if isinstance(content, dict):
            content = {k.decode() if isinstance(k, bytes) else k: v for k, v in content.items()}
    return content


def npy_header(file):
    """(shape, Fortran order, dtype) from the header of an open .npy file; the file is left at the start of the data."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    return readers[np.lib.format.read_magic(file)](file)


def unpickle_entries(path, *names):
    """These entries of the dictionary in a pickle. Raises UserError if there is no such entry."""
    content = unpickle(path)
    if not isinstance(content, dict) or not set(names) <= content.keys():
        have = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise UserError(f"{path} has the entries {have}; expected {' and '.join(map(repr, names))}.")
    return [content[name] for name in names]


def text_list(where, names, n):
    """n different texts, str or bytes, as a tuple of str. Raises UserError if they are anything else."""
    names = [name.decode("utf-8", "replace") if isinstance(name, bytes) else name for name in names]
    if len(names) != n or len(set(names)) != n or not all(isinstance(name, str) and name.strip() for name in names):
        raise UserError(f"{where} has {len(names)} entries; expected {n} different names.")
    return tuple(names)


def map_npz(path, name, cache):
    """One array of an .npz file, memory-mapped. A compressed one is unpacked to `cache` once.

    Raises UserError if the file is damaged, has no such array, or holds Python objects: mapped, they would be wild pointers.
    """
    with reading(path, ".npz file"), zipfile.ZipFile(path) as archive:
        if f"{name}.npy" not in archive.namelist():
            raise UserError(f"{path} has the arrays {[Path(n).stem for n in archive.namelist()]}; expected {name}.")
        info = archive.getinfo(f"{name}.npy")
        with archive.open(info) as content:
            shape, fortran, dtype = npy_header(content)
            header = content.tell()  # bytes
        check_dtype(f"{path}: {name}", dtype)
        if 0 in shape:
            raise UserError(f"{path}: {name} holds {shape}, no values.")
        if info.compress_type == zipfile.ZIP_STORED:
            with path.open("rb") as file:
                file.seek(info.header_offset + 26)
                lengths = np.frombuffer(file.read(4), "<u2")  # of the name and of the extra field, which the data follow
            begin = info.header_offset + 30 + int(lengths.sum()) + header
            return np.memmap(path, dtype, "r", begin, shape, "F" if fortran else "C")
        unpacked = cache / f"{path.stem}-{name}-{info.CRC:08x}.npy"
        if not unpacked.exists():
            print(f"unpacking {name} of {path.name}, once: {unpacked}")
            with archive.open(info) as packed, replacing(unpacked) as out:
                shutil.copyfileobj(packed, out, 1 << 20)
        return map_cached(unpacked)
