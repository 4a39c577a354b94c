"""Reading what cannot be trusted, and downloading it."""

import errno
import gzip
import hashlib
import io
import os
import pickle
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
from official import RNG, Bomb, write_cifar100

import cli
import data
from tasks import files, images

# ---- files that cannot be trusted


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


class Reduced:
    """Pickled as this call and this state."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


def pickled_type(code, **changes):
    """The pickle of a numpy type, some parts of its state replaced."""
    names = ("version", "order", "subtype", "names", "fields", "size", "alignment", "flags")
    state = dict(zip(names, np.dtype(code).__reduce__()[2], strict=False)) | changes
    return pickle.dumps(Reduced(np.dtype, (code, False, True), tuple(state.values())))


@pytest.mark.parametrize("code", ["f4", ">f8", "i8", "u1", "?", "S3", "U5", "O"])
def test_types_of_numbers_and_text_pass_unchanged(code):
    assert files.ArraysOnly(io.BytesIO(pickled_type(code))).load() == np.dtype(code)


@pytest.mark.parametrize(
    ("code", "changes"),
    [("O", {"flags": 0}), ("U5", {"size": 10**6}), ("U5", {"size": 19}), ("f8", {"flags": 63}), ("V8", {}), ("M8[s]", {}),
     ("i8", {"names": ("a",), "fields": {"a": (np.dtype("O"), 0)}}), ("f8", {"subtype": (np.dtype("O"), (3,))})],
)  # fmt: skip
def test_a_damaged_type_is_refused(code, changes):
    """numpy takes such a state: arrays of these types read and write memory that is not theirs."""
    with pytest.raises(pickle.UnpicklingError, match="damaged type"):
        files.ArraysOnly(io.BytesIO(pickled_type(code, **changes))).load()


def test_a_length_that_no_memory_holds_is_a_fault_of_the_file(tmp_path):
    frame = pickle.FRAME + (2**62).to_bytes(8, "little")
    (tmp_path / "a.pkl").write_bytes(pickle.PROTO + b"\x04" + frame + pickle.dumps(1, 4)[2:])
    with pytest.raises(cli.UserError, match="a.pkl is not a readable pickle of arrays .it asks for more memory"):
        files.unpickle(tmp_path / "a.pkl")


# ---- downloads


def test_an_interrupted_download_is_resumed(tmp_path, server):
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


def test_a_file_is_downloaded_by_one_process_at_a_time(tmp_path, server):
    server.content = RNG.bytes(5000)
    download = files.Download(f"{server.url}/a.zip", hashlib.md5(server.content).hexdigest(), 1, ("a.zip",))
    code = f"import fcntl; f = open({str(tmp_path / 'a.zip.lock')!r}, 'w'); fcntl.lockf(f, 2); print(1, flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(cli.UserError, match="another process is downloading this file"):
            files.fetch(download, tmp_path)
        assert not server.asked
        other.communicate(b"\n")
    files.fetch(download, tmp_path)
    assert (tmp_path / "a.zip").read_bytes() == server.content


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


def test_a_full_disk_leaves_no_part_of_an_array(tmp_path, capsys):
    path, part = tmp_path / "a/x.npy", tmp_path / f"a/x.npy.{os.getpid()}.part"
    part.parent.mkdir()
    part.symlink_to("/dev/full")
    with pytest.raises(SystemExit, match="2"):
        cli.guarded(files.save_array, path, np.zeros(10**5))
    assert "no space left to write" in capsys.readouterr().err and not list(path.parent.iterdir())
    files.save_array(path, np.arange(3))
    assert np.load(path).tolist() == [0, 1, 2] and list(path.parent.iterdir()) == [path]


def test_a_wrong_checksum_a_missing_file_and_a_dead_server_are_named(tmp_path, server):
    server.content = b"something else"
    with pytest.raises(cli.UserError, match="came with checksum"):
        files.fetch(files.Download(f"{server.url}/a.zip", "0" * 32, 1, ("a.zip",)), tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(cli.UserError, match="answers 404"):
        files.fetch(files.Download(f"{server.url}/missing", None, 1, ("x",)), tmp_path)
    with pytest.raises(cli.UserError, match="cannot be reached"):
        files.fetch(files.Download("http://127.0.0.1:9/a", None, 1, ("x",)), tmp_path)


def test_a_part_that_is_not_of_this_file_is_removed(tmp_path, server):
    server.content = RNG.bytes(1000)
    download = files.Download(f"{server.url}/a.zip", None, 1, ("a.zip",))
    (tmp_path / "a.zip.part").write_bytes(RNG.bytes(1028))  # two downloads at once wrote it
    with pytest.raises(cli.UserError, match="came with 1,028 of 1,000 bytes"):
        files.fetch(download, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_damaged_archive_fetched_by_hand_is_named(tmp_path):
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        archive.add(__file__, "a/b")
    path = tmp_path / "a.tar.gz"
    download = files.Download("nowhere", hashlib.md5(path.read_bytes()).hexdigest(), 1, ("a/b",), name="a.tar.gz")
    content = bytearray(path.read_bytes())
    content[-5] ^= 1  # gzip's own checksum, which tarfile does not look at
    path.write_bytes(content)
    with pytest.raises(cli.UserError, match="a.tar.gz has checksum"):
        files.fetch(download, tmp_path)
    assert path.exists() and not (tmp_path / "a").exists()


def tar(folder, suffix=""):
    """A tar file of three members, and where the header of the second one begins."""
    path = folder / f"a.tar{suffix}"
    with tarfile.open(path, f"w:{suffix[1:]}") as archive:
        for name in ("a/1", "a/2", "a/3"):
            member = tarfile.TarInfo(name)
            member.size = 3000
            archive.addfile(member, io.BytesIO(name.encode() * 1000))
    return path, 512 + 3072


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    "damage",
    [lambda b, at: b[:at], lambda b, at: b[: at + 100], lambda b, at: b[:at] + bytes(512) + b[at + 512 :],
     lambda b, at: b[: at + 3] + b"?" + b[at + 4 :], lambda b, at: b[: at + 1000], lambda b, at: b[: at + 512 + 3000]],
    ids=["cut before a header", "cut in a header", "header of zeros", "wrong byte", "cut in a file", "cut after a file"],
)  # fmt: skip
def test_a_damaged_tar_file_is_named_and_nothing_is_unpacked(tmp_path, suffix, damage):
    path, second = tar(tmp_path, suffix)
    download = files.Download("nowhere", None, 1, ("a",), name=path.name)
    pack, open_packed = (gzip.compress, gzip.decompress) if suffix else (bytes, bytes)
    path.write_bytes(pack(damage(open_packed(path.read_bytes()), second)))
    with pytest.raises(cli.UserError, match="a.tar.* is not a readable archive"):
        files.fetch(download, tmp_path)
    assert path.exists() and not (tmp_path / "a").exists()
    path, _ = tar(tmp_path, suffix)
    files.fetch(download, tmp_path)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["1", "2", "3"] and not path.exists()


@pytest.mark.parametrize("damage", ["content", "method", "encrypted", "offset"])
def test_a_damaged_zip_file_is_named_and_nothing_is_unpacked(tmp_path, damage):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/1", "first")
        archive.writestr("a/2", "second")
    content = bytearray(path.read_bytes())
    central = content.rfind(b"PK\x01\x02")  # the entry of the second file in the directory at the end
    if damage == "content":
        content[content.find(b"second")] ^= 1
    elif damage == "method":
        content[central + 10] = 99
    elif damage == "encrypted":
        content[central + 8] |= 1
    else:
        content[central + 42 : central + 46] = b"\xff\xff\xff\x7f"  # where the file begins
    path.write_bytes(content)
    with pytest.raises(cli.UserError, match="a.zip (is not a readable archive|cannot be read)"):
        files.fetch(files.Download("nowhere", None, 1, ("a/*",), name="a.zip", unpack=True), tmp_path)
    assert path.exists() and not (tmp_path / "a").exists()


@pytest.mark.parametrize("size", [0, 5, 60, 200])
def test_a_damaged_file_of_the_cache_is_named(tmp_path, size):
    make = lambda: files.kept(tmp_path, "a", "making it", lambda: (np.arange(99), np.arange(99)))
    make()
    (tmp_path / "a-x.npy").write_bytes((tmp_path / "a-x.npy").read_bytes()[:size])
    with pytest.raises(cli.UserError, match="a-x.npy is damaged .*\nRemove it: it will be made again"):
        make()


def test_an_archive_fetched_by_hand_is_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "conll2000.zip", "w") as archive:
        archive.writestr("conll2000/train.txt", "w NN O")
    data.prepare("conll2000", tmp_path)
    assert (tmp_path / "conll2000/train.txt").read_text() == "w NN O"
    (tmp_path / "protein.zip").write_bytes(b"half a zip")
    with pytest.raises(cli.UserError, match="protein.zip is not a readable archive"):
        files.fetch(files.DOWNLOADS["protein"], tmp_path)


def test_the_lock_of_a_killed_download_is_not_taken_for_the_file(tmp_path):
    (tmp_path / "tiny-imagenet-200.zip.lock").touch()
    (tmp_path / "tiny-imagenet-200.zip.part").touch()
    assert not files.present(files.DOWNLOADS["tiny_imagenet"], tmp_path)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EFBIG, errno.ENOSPC])
def test_an_error_of_the_disk_is_not_taken_for_one_of_the_network(tmp_path, server, monkeypatch, number):
    server.content = RNG.bytes(5000)

    def cannot_write(self, mode):
        raise OSError(number, "this disk", str(self))

    monkeypatch.setattr(type(tmp_path), "open", cannot_write)
    with pytest.raises(OSError, match="this disk") as raised:
        files.retrieve(files.Download(f"{server.url}/a.zip", None, 1, ("a.zip",)), tmp_path / "a.zip")
    assert raised.value.filename == str(tmp_path / "a.zip.part")


def test_what_a_killed_process_left_in_the_cache_is_removed_after_a_day(tmp_path):
    old, new = tmp_path / "x.npy.1.part", tmp_path / "x.npy.2.part"
    for part in (old, new):
        part.touch()
    os.utime(old, (0, 0))
    files.save_array(tmp_path / "x.npy", np.arange(3))
    assert not old.exists() and new.exists() and np.load(tmp_path / "x.npy").sum() == 3


def test_a_file_that_claims_more_than_it_holds_is_named(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros(10))
    whole = (tmp_path / "x.npy").read_bytes()
    for claim, size in ((b"(10,), }          ", 208), (b"(90000000000000,)}", 720_000_000_000_128)):  # too much for any memory
        (tmp_path / "x.npy").write_bytes(whole[:-8].replace(b"(10,), }          ", claim))
        with pytest.raises(cli.UserError, match=rf"x.npy is not a readable .npy file \(200 of {size:,} bytes\)"):
            files.read_npy(tmp_path / "x.npy")


def test_an_archive_that_is_still_there_was_not_unpacked_to_its_end(tmp_path):
    (tmp_path / "npy_train").mkdir()
    assert files.present(files.DOWNLOADS["cosmic_train"], tmp_path)
    (tmp_path / "deepCR.ACS-WFC.train.tar").touch()
    assert not files.present(files.DOWNLOADS["cosmic_train"], tmp_path)
