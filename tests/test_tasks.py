"""Every task: its official files written in small, read and checked; metrics and losses by hand; damaged and missing files."""

import csv
import dataclasses
import gzip
import hashlib
import json
import math
import pickle
import re
import subprocess
import sys
import threading
import zipfile

import h5py
import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from scipy.io import savemat, wavfile
from test_data import Bomb

import cli
import data
from tasks import files, published, scores, signals, text, toys

RNG = np.random.default_rng(0)


def full(task, folder, **options):
    """All of a task as it is at full scale; the samples of training and validation together, in the order of the files."""
    return data.load(task, folder, folder / "cache", "full", **options)


def dev(loaded):
    """Inputs and targets of training and validation samples, sorted as they came."""
    splits = (loaded.train, loaded.val)
    x, y = (
        torch.cat([f(s, torch.arange(len(s))) for s in splits]) for f in (lambda s, i: s.inputs(i), lambda s, i: s.targets(i))
    )
    order = np.random.default_rng(0).permutation(len(x))
    n_val = len(loaded.val)
    back = np.argsort(np.concatenate([np.sort(order[n_val:]), np.sort(order[:n_val])]))
    return x[back].numpy(), y[back].numpy()


# ---- signals


def write_ninapro(folder, labels=18):
    folder = folder / "ninapro"
    folder.mkdir(exist_ok=True)
    for name, n in (("train", 20), ("val", 8), ("test", 6)):
        np.save(folder / f"ninapro_{name}.npy", RNG.normal(size=(n, 52, 16)))
        np.save(folder / f"label_{name}.npy", np.arange(n) % labels)
    return folder


def test_ninapro_is_electrodes_by_time_and_its_validation_file_trains(tmp_path):
    folder = write_ninapro(tmp_path)
    loaded = full("ninapro", tmp_path)
    assert (len(loaded.train) + len(loaded.val), len(loaded.test), loaded.train.output) == (28, 6, (18,))
    x, y = dev(loaded)
    assert x.shape == (28, 1, 16, 52) and x.dtype == np.float32
    raw = np.load(folder / "ninapro_val.npy")
    assert np.allclose(x[20 + 3, 0, 5, 7], raw[3, 7, 5]) and y.tolist() == [*range(18), 0, 1, *range(8)]


def test_damaged_ninapro_is_named(tmp_path):
    folder = write_ninapro(tmp_path, labels=20)
    with pytest.raises(cli.UserError, match="label_train.npy: sample 18 has 18; expected a whole number from 0 to 17"):
        full("ninapro", tmp_path)
    folder = write_ninapro(tmp_path)
    np.save(folder / "label_test.npy", np.arange(5))
    with pytest.raises(cli.UserError, match="5 labels for 6 samples"):
        full("ninapro", tmp_path)
    (folder / "label_test.npy").unlink()
    with pytest.raises(cli.Missing, match="no label_test.npy"):
        full("ninapro", tmp_path)
    np.save(folder / "ninapro_val.npy", np.zeros((8, 16, 52)))
    with pytest.raises(cli.UserError, match=r"ninapro_val.npy holds \(8, 16, 52\); expected \(n, 52, 16\)"):
        full("ninapro", tmp_path)
    whole = (folder / "ninapro_train.npy").read_bytes()
    (folder / "ninapro_train.npy").write_bytes(whole[:500])
    with pytest.raises(cli.UserError, match="ninapro_train.npy is not a readable"):
        full("ninapro", tmp_path)


def write_satellite(folder, n=30, **content):
    x = RNG.random((n, 46)).astype(np.float32)
    for name in ("train", "test"):
        np.save(folder / f"satellite_{name}.npy", {"data": x, "label": np.arange(n) % 24 + 1} | content, allow_pickle=True)
    return x


def test_satellite_labels_begin_at_1(tmp_path):
    raw = write_satellite(tmp_path)
    loaded = full("satellite", tmp_path)
    x, y = dev(loaded)
    assert np.array_equal(x[:, 0], raw) and y.tolist() == [i % 24 for i in range(30)] and len(loaded.test) == 30


def test_satellite_refuses_code_other_entries_and_half_a_file(tmp_path):
    write_satellite(tmp_path, data=Bomb())
    with pytest.raises(cli.UserError, match="asks for posix.system"):
        full("satellite", tmp_path)
    np.save(tmp_path / "satellite_train.npy", {"x": np.zeros(3)}, allow_pickle=True)
    with pytest.raises(cli.UserError, match=r"\['x'\]; expected 'data' and 'label'"):
        full("satellite", tmp_path)
    write_satellite(tmp_path)
    whole = (tmp_path / "satellite_train.npy").read_bytes()
    (tmp_path / "satellite_train.npy").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(cli.UserError, match="satellite_train.npy is not a readable pickle"):
        full("satellite", tmp_path)


def write_ecg(folder, n=40, labels="NAO~"):
    records = np.empty(n, object)
    records[:] = [RNG.normal(3, 2, RNG.integers(900, 2200)) for _ in range(n)]
    label = np.array([labels[i % len(labels)] for i in range(n)])
    (folder / "challenge2017.pkl").write_bytes(pickle.dumps({"data": records, "label": label}))
    return records, label


def test_ecg_windows_follow_the_stride_of_their_class(tmp_path):
    from sklearn.model_selection import train_test_split

    records, labels = write_ecg(tmp_path)
    expected = {}
    for side, numbers in zip(("dev", "test"), train_test_split(range(40), test_size=0.1, random_state=0), strict=True):
        expected[side] = []
        for i in numbers:
            z, start = (records[i] - records[i].mean()) / records[i].std(), 0
            while start < len(z) - 1000:
                expected[side].append((z[start : start + 1000], "NAO~".index(labels[i]), i))
                start += {"N": 500, "A": 83, "O": 250, "~": 25}[labels[i]]
    loaded = full("ecg", tmp_path)
    test = loaded.test
    assert len(test) == len(expected["test"]) and test.y.tolist() == [y for _, y, _ in expected["test"]]
    assert np.allclose(test.inputs(torch.arange(len(test)))[:, 0], np.stack([x for x, _, _ in expected["test"]]), atol=1e-4)
    records_of = {s: {int(g) for g in getattr(loaded, s).x.groups} for s in ("train", "val")}
    assert not records_of["train"] & records_of["val"] and len(records_of["val"]) == 3  # a tenth of the records that have one
    for split in (loaded.train, loaded.val):
        for i in (0, len(split) - 1):
            z, y, number = expected["dev"][split.x.rows[i]]
            assert np.allclose(split.inputs(torch.tensor([i]))[0, 0], z, atol=1e-4)
            assert (int(split.y[i]), int(split.x.groups[i])) == (y, number)


def test_an_ecg_file_with_another_label_or_no_window_is_named(tmp_path):
    write_ecg(tmp_path, labels="NX")
    with pytest.raises(cli.UserError, match=r"40 records with labels \['X'\]"):
        full("ecg", tmp_path)
    records = np.array([np.zeros(900 + i) for i in range(20)], object)
    (tmp_path / "challenge2017.pkl").write_bytes(pickle.dumps({"data": records, "label": ["N"] * 20}))
    with pytest.raises(cli.UserError, match="no window"):
        full("ecg", tmp_path)


def write_deepsea(folder, save=np.savez):
    arrays = {}
    for name, n in (("train", 20), ("val", 5), ("test", 7)):
        arrays[f"x_{name}"] = np.eye(4, dtype=np.uint8)[RNG.integers(0, 4, (n, 1000))]
        arrays[f"y_{name}"] = RNG.integers(0, 2, (n, 36)).astype(np.uint8)
    save(folder / "deepsea_filtered.npz", **arrays)
    return arrays


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_deepsea_is_mapped_and_transposed(tmp_path, save):
    raw = write_deepsea(tmp_path, save)
    loaded = full("deepsea", tmp_path)
    assert loaded.train.lazy and loaded.train.output == (36,) and len(loaded.test) == 7
    x, y = dev(loaded)
    assert np.array_equal(x, np.concatenate([raw["x_train"], raw["x_val"]]).transpose(0, 2, 1)) and x.max() == 1
    assert np.array_equal(y, np.concatenate([raw["y_train"], raw["y_val"]])) and y.dtype == np.float32
    index = torch.tensor([6, 0, 6])
    assert np.array_equal(loaded.test.inputs(index), raw["x_test"][[6, 0, 6]].transpose(0, 2, 1))


def test_half_a_deepsea_file_is_named(tmp_path):
    write_deepsea(tmp_path)
    path = tmp_path / "deepsea_filtered.npz"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(cli.UserError, match="deepsea_filtered.npz is not a readable .npz file"):
        full("deepsea", tmp_path)
    np.savez(path, x_train=np.zeros((4, 1000, 4)))
    with pytest.raises(cli.UserError, match="y_train"):
        full("deepsea", tmp_path)


class Sparse:
    """A file that leaves holes where zeros are written."""

    def __init__(self, path):
        self.file = path.open("wb")

    def write(self, block):
        if not np.frombuffer(block, np.uint8).any():
            self.file.seek(len(block), 1)
        else:
            self.file.write(block)
        return len(block)

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_deepsea_of_the_official_size_needs_less_than_3_gb(tmp_path):
    sparse = Sparse(tmp_path / "deepsea_filtered.npz")
    with zipfile.ZipFile(sparse, "w") as archive:
        for name, n in (("train", 71_753), ("val", 2_490), ("test", 149_400)):
            for key, shape in ((f"x_{name}", (n, 1000, 4)), (f"y_{name}", (n, 36))):
                with archive.open(f"{key}.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
                    for _ in range(0, n, 1000):
                        file.write(bytes(math.prod(shape[1:]) * min(1000, n - _)))
    sparse.file.close()
    assert (tmp_path / "deepsea_filtered.npz").stat().st_size > 890_000_000
    code = (
        "import data, resource, torch\n"
        f"loaded = data.load('deepsea', {str(tmp_path)!r}, {str(tmp_path / 'cache')!r}, 'full')\n"
        "for x, y in loaded.train.batches(100, 16, 0, 0): assert x.shape == (16, 4, 1000) and y.shape == (16, 36)\n"
        "assert len(loaded.test) == 149_400 and len(loaded.train) + len(loaded.val) == 74_243\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[-1]) < 3_000_000  # kB


def write_fsd50k(folder, clips=(3, 1, 2, 4), noise=True, rate=22050):
    """`clips`: the number of chunks of each, the same for training and test."""
    chunks = folder / "audio" / "chunks"
    chunks.mkdir(parents=True)
    names = [f"class{i}" for i in range(200)]
    (chunks / "lbl_map.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    sounds = {}
    for table in ("tr", "val", "eval"):
        with (chunks / f"{table}.csv").open("w", newline="") as file:
            out = csv.writer(file)
            out.writerow(["", "files", "labels", "ext"])
            for clip, count in enumerate(clips):
                for i in range(count):
                    name = f"{table}_{clip}_{i}.wav"
                    sounds[name] = (RNG.normal(0, 3000, 22050)).astype(np.int16)
                    wavfile.write(chunks / name, rate, sounds[name])
                    out.writerow([i, f"root/chunks/{name}", f"class{clip},class{199 - clip}", f"clip{clip}"])
    if noise:
        (folder / "audio" / "noise_22050").mkdir()
        wavfile.write(folder / "audio/noise_22050/n.wav", 22050, RNG.normal(0, 3000, 30000).astype(np.int16))
    return sounds


def one_spectrum(sound, t):
    """96 mel powers of the t-th spectrum, summed term by term: frequencies of a 1920-point transform, HTK mel triangles."""
    padded = np.concatenate([sound[960:0:-1], sound, sound[-2:-962:-1]])  # reflected
    frame = padded[220 * t : 220 * t + 1920].copy()
    hann = np.zeros(1920)
    hann[629 : 629 + 661] = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(661) / 661)  # in the middle of the 1920
    n, k = np.arange(1920), np.arange(961)[:, None]
    power = abs((frame * hann * np.exp(-2j * np.pi * n * k / 1920)).sum(1)) ** 2
    top = 2595 * math.log10(1 + 11025 / 700)
    edges = [700 * (10 ** (m * top / 97 / 2595) - 1) for m in range(98)]
    mel = np.zeros(96)
    for band in range(96):
        low, middle, high = edges[band : band + 3]
        for i in range(961):
            f = i * 22050 / 1920
            mel[band] += power[i] * max(0, min((f - low) / (middle - low), (high - f) / (high - middle)))
    return mel


def test_fsd50k_is_a_log_mel_picture_of_a_chunk(tmp_path):
    sounds = write_fsd50k(tmp_path)
    loaded = full("fsd50k", tmp_path)
    assert (len(loaded.train) + len(loaded.val), len(loaded.test)) == (4, 10) and loaded.train.lazy
    x, y = dev(loaded)
    assert x.shape == (4, 1, 96, 102) and (x[..., -1] == 0).all()
    assert [sorted(np.flatnonzero(row)) for row in y] == [[i, 199 - i] for i in range(4)]
    middle = sounds["tr_3_2.wav"] / 32768  # the middle one of clip 3's four chunks
    decibel = 10 * np.log10([one_spectrum(middle, t) for t in (0, 50, 100)]).T
    shown = x[3, 0][:, [0, 50, 100]]
    assert abs((shown - shown.mean()) - (decibel - decibel.mean())).max() < 0.05 and abs(x[3, 0, :, :101].mean()) < 1e-3


def test_fsd50k_draws_chunks_and_noise_and_masks(tmp_path):
    write_fsd50k(tmp_path, clips=(4,) * 4)
    train = full("fsd50k", tmp_path).train
    x, u = train.inputs, torch.zeros(2, 25)
    u[:, 23] = 0.9  # no noise
    u[1, 0] = 0.99  # another chunk
    index = torch.tensor([0, 0])
    clean = x(index, u)
    assert not torch.equal(clean[0], clean[1])
    assert torch.equal(clean[0], x(index, u)[0])
    u[1, 0], u[1, 23], u[1, 24] = 0, 0, 1.0  # half sound, half noise
    noisy = x(index, u)
    assert torch.equal(noisy[0], clean[0]) and not torch.allclose(noisy[1], clean[0], atol=0.1)
    noise = signals.log_mel(torch.from_numpy(train.x.read(np.array([0]), u[1:].numpy())[:, 1]))[0]
    assert torch.allclose(noisy[1, 0, :, :101], (clean[0, 0, :, :101] + noise) / 2, atol=1e-4)


def test_bands_are_masked_where_the_draws_say():
    s, u = torch.arange(96 * 101.0).view(1, 96, 101).repeat(2, 1, 1) + 5, torch.zeros(2, 10)
    u[0, 0], u[0, 1], u[0, 2:6] = 0.6, 0.1, torch.tensor([0.999, 0.5, 0.999, 0.0])  # one round
    out = signals.mask_bands(s, u)
    assert torch.equal(out[1], s[1])
    hidden = (out[0] != s[0]) | (s[0] == 5)
    assert hidden.all(1).nonzero().flatten().tolist() == list(range(41, 55))  # 14 bands, from half of what is left
    assert hidden.all(0).nonzero().flatten().tolist() == list(range(20)) and out[0].min() == 5


def test_damaged_sounds_are_named(tmp_path):
    sounds = write_fsd50k(tmp_path)
    wavfile.write(tmp_path / "audio/chunks/eval_0_1.wav", 44100, sounds["eval_0_1.wav"])
    loaded = full("fsd50k", tmp_path)
    with pytest.raises(cli.UserError, match="has 44100 Hz"):
        loaded.test.inputs(torch.tensor([1]))
    wavfile.write(tmp_path / "audio/chunks/eval_0_1.wav", 22050, sounds["eval_0_1.wav"])
    (tmp_path / "audio/chunks/eval_0_0.wav").write_bytes(b"RIFF")
    with pytest.raises(cli.UserError, match="eval_0_0.wav is not a readable wav file"):
        list(loaded.test.batches(1, 10, 0, 0))  # read in another thread
    (tmp_path / "audio/chunks/tr_0_0.wav").unlink()
    with pytest.raises(cli.Missing, match="tr_0_0.wav"):
        full("fsd50k", tmp_path)
    (tmp_path / "audio/chunks/lbl_map.json").write_text("{")
    with pytest.raises(cli.UserError, match="lbl_map.json is not a readable json"):
        full("fsd50k", tmp_path)


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


# ---- fields


def write_darcy(folder, version, n=(12, 3)):
    arrays = []
    for name, count in zip(("smooth1", "smooth2"), n, strict=True):
        content = {"coeff": RNG.choice([3.0, 12.0], (count, 421, 421)), "sol": RNG.random((count, 421, 421)) * 0.01}
        path = folder / f"piececonst_r421_N1024_{name}.mat"
        if version == 5:
            savemat(path, content)
        else:
            with h5py.File(path, "w") as file:
                for key, array in content.items():
                    file[key] = array.T
        arrays.append(content)
    return arrays


@pytest.mark.parametrize("version", [5, 7.3])
def test_darcy_is_every_fifth_point_normalised_by_training_pixels(tmp_path, version):
    raw, raw_test = write_darcy(tmp_path, version)
    loaded = full("darcy", tmp_path)
    x, y = dev(loaded)
    assert x.shape == (12, 3, 85, 85) and y.shape == (12, 85, 85) and len(loaded.test) == 3
    coefficient = raw["coeff"][:, ::5, ::5]
    i, j = 40, 84
    mean, std = coefficient[:, i, j].mean(), math.sqrt(((coefficient[:, i, j] - coefficient[:, i, j].mean()) ** 2).sum() / 11)
    assert np.allclose(x[:, 0, i, j], (coefficient[:, i, j] - mean) / (std + 1e-5), atol=1e-4)
    test = loaded.test.inputs(torch.arange(3))
    assert np.allclose(test[:, 0, i, j], (raw_test["coeff"][:, 200, 420] - mean) / (std + 1e-5), atol=1e-4)
    assert np.allclose(x[0, 1, 3], np.linspace(0, 1, 85)) and np.allclose(x[0, 2, :, 3], np.linspace(0, 1, 85))
    assert np.allclose(y, raw["sol"][:, ::5, ::5], atol=1e-7)
    u = raw["sol"][:, ::5, ::5]
    perfect = (torch.from_numpy((u - u.mean(0)) / (u.std(0, ddof=1) + 1e-5))).float()
    assert loaded.task.loss(perfect, torch.from_numpy(y)) < 1e-3  # the loss undoes the normalisation
    zero = np.zeros_like(y)
    expected = np.mean([np.linalg.norm(u.mean(0) - v) / np.linalg.norm(v) for v in u])
    assert loaded.task.score(zero, y) == pytest.approx(expected, rel=1e-4)
    cached = sorted(p.name for p in (tmp_path / "cache").iterdir())
    full("darcy", tmp_path)
    assert cached == sorted(p.name for p in (tmp_path / "cache").iterdir()) and len(cached) == 4


def test_half_a_mat_file_is_named(tmp_path):
    write_darcy(tmp_path, 5, n=(1, 1))
    path = tmp_path / "piececonst_r421_N1024_smooth1.mat"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(cli.UserError, match="smooth1.mat is not a readable MATLAB file"):
        full("darcy", tmp_path)


def write_psicov(folder, lengths=(40, 520, 60)):
    root, raw = folder / "protein", {}
    for name in ("deepcov", "psicov"):
        for part in ("features", "distance"):
            (root / name / part).mkdir(parents=True)
        (root / f"{name}.lst").write_text("\n".join(f"{name}{m}" for m in lengths))
        for m in lengths:
            f = {"seq": "A" * m, "ss": RNG.random((3, m)), "pssm": RNG.random((m, 22)), "sa": RNG.random(m),
                 "entropy": RNG.random(m)}  # fmt: skip
            f |= {pair: RNG.random((m, m)) for pair in ("ccmpred", "freecon", "potential")}
            d = RNG.random((m, m)) * 30
            d = ((d + d.T) / 2).astype(np.float32)
            (root / name / "features" / f"{name}{m}.pkl").write_bytes(pickle.dumps(f))
            triple = np.empty(3, object)
            triple[:] = [m, "A" * m, d]
            np.save(root / name / "distance" / f"{name}{m}-cb.npy", triple, allow_pickle=True)
            raw[f"{name}{m}"] = f, d
    return raw


def test_psicov_pairs_features_of_rows_and_columns(tmp_path):
    raw = write_psicov(tmp_path)
    loaded = full("psicov", tmp_path)
    assert (len(loaded.train) + len(loaded.val), len(loaded.test), loaded.test.chunk) == (3, 3, 1)
    x, y = loaded.test.inputs(torch.tensor([0]))[0].numpy(), loaded.test.targets(torch.tensor([0]))[0].numpy()
    f, d = raw["psicov40"]
    assert x.shape == (57, 512, 512) and y.shape == (512, 512)
    i, j = 7, 31
    for row, column, value in ((i, j, f["ss"][1, j]), (j, i, f["ss"][1, i])):
        assert x[2, row + 5, column + 5] == pytest.approx(value)  # channel 2: the second structure, by column
        assert x[3, column + 5, row + 5] == pytest.approx(value)  # channel 3: the same, by row
    assert x[6 + 2 * 21 + 1, i + 5, j + 5] == pytest.approx(f["pssm"][i, 21])
    assert x[51, i + 5, j + 5] == pytest.approx(f["sa"][i]) and x[52, i + 5, j + 5] == pytest.approx(f["entropy"][j])
    assert [x[c, i + 5, j + 5] for c in (54, 55, 56)] == pytest.approx(
        [f[n][i, j] for n in ("ccmpred", "freecon", "potential")]
    )
    assert (x[:, :5] == 0).all() and (x[:, 45:] == 0).all() and (y[:, :5] == 16).all() and (y[45:] == 16).all()
    assert y[i + 5, j + 5] == pytest.approx(min(max(d[i, j], 1), 16))
    assert y[i + 5, i + 5] == pytest.approx(np.clip((d[i, i - 1] + d[i, i + 1]) / 2, 1, 16))
    assert y[5, 5] == pytest.approx(np.clip(d[0, 1], 1, 16)) and y[44, 44] == pytest.approx(np.clip(d[39, 38], 1, 16))
    long = loaded.test.targets(torch.tensor([1]))[0]
    assert long[511, 100] == pytest.approx(np.clip(raw["psicov520"][1][506, 95], 1, 16))


def test_damaged_proteins_are_named(tmp_path):
    write_psicov(tmp_path, lengths=(30, 31))
    path = tmp_path / "protein/psicov/features/psicov30.pkl"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(cli.UserError, match="psicov30.pkl is not a readable pickle"):
        full("psicov", tmp_path).test.inputs(torch.tensor([0]))
    path.unlink()
    with pytest.raises(cli.Missing, match=r"psicov30.pkl \(1 of the files"):
        full("psicov", tmp_path)


def write_cosmic(folder, planes=3):
    tiles = {}
    for name, n in (("train", 4), ("test", 2)):
        for visit in ("10760/2", "99999/1"):  # a field of galaxies, and another
            place = folder / f"npy_{name}" / "f435w" / visit
            place.mkdir(parents=True)
            np.save(place / "sky.npy", np.array([10.0, 20.0, 30.0]))
            for i in range(n):
                tile = RNG.integers(0, 2, (planes, 256, 256)).astype(np.float32)
                tile[0] = RNG.normal(100, 10, (256, 256))
                np.save(place / f"{i % 3 + 1}_{i}.npy", tile)
                tiles[name, visit, f"{i % 3 + 1}_{i}"] = tile
    return tiles


@pytest.mark.parametrize("planes", [2, 3])
def test_cosmic_takes_galaxy_fields_their_middle_and_the_sky(tmp_path, planes):
    tiles = write_cosmic(tmp_path, planes)
    loaded = full("cosmic", tmp_path)
    assert (len(loaded.train) + len(loaded.val), len(loaded.test)) == (4, 2)
    tile, middle = tiles["test", "10760/2", "2_1"], (slice(64, 192), slice(64, 192))
    x, y = loaded.test.inputs(torch.tensor([1])), loaded.test.targets(torch.tensor([1]))
    assert x.shape == (1, 1, 128, 128) and np.allclose(x[0, 0], tile[0][middle] + 1.05 * 20, atol=1e-3)
    u = torch.full((1, 5), 1 / 3.9)
    assert np.allclose(loaded.test.inputs(torch.tensor([1]), u)[0, 0], tile[0][middle] + 0.1 * 20, atol=1e-3)
    ignored = tile[2][middle] > 0 if planes == 3 else np.zeros((128, 128), bool)
    assert np.array_equal(y[0].isnan(), ignored) and np.array_equal(y[0][~ignored], tile[1][middle][~ignored])


def test_damaged_tiles_are_named(tmp_path):
    write_cosmic(tmp_path)
    path = tmp_path / "npy_train/f435w/10760/2/1_0.npy"
    np.save(path, np.zeros((3, 100, 100)))
    with pytest.raises(cli.UserError, match=r"1_0.npy holds \(1, 37, 36\)"):
        full("cosmic", tmp_path)
    path.write_bytes(b"")
    with pytest.raises(cli.UserError, match="1_0.npy is not a readable tile"):
        full("cosmic", tmp_path)


# Every value of these files is 1000 sample + snapshot, + 0.5 in the second channel or field and so on.
SINGLE = {  # task: arrays (samples, snapshots, space), the snapshot of the target, points kept
    "advection1d": (["tensor"], (201, 1024), 200, 256),
    "burgers1d": (["tensor"], (201, 1024), 200, 1024),
    "diffusion_reaction1d": (["tensor"], (101, 1024), 29, 1024),
    "navier_stokes1d": (["density", "pressure", "Vx"], (101, 1024), 100, 3072),
}
MULT = {
    "diffusion_sorption1d": ((1024, 1), 0),
    "shallow_water2d": ((128, 128, 1), 0),
    "diffusion_reaction2d": ((128, 128, 2), 1),
}


def write_pde(task, folder):
    path = folder / files.DOWNLOADS[task].name
    with h5py.File(path, "w") as file:
        if task in SINGLE:
            arrays, (snapshots, points), _, _ = SINGLE[task]
            for i, name in enumerate(arrays):
                value = 1000.0 * np.arange(20)[:, None] + np.arange(snapshots) + 0.25 * i
                array = np.broadcast_to(value[..., None], (20, snapshots, points)).astype(np.float32)
                file[name] = array + np.arange(points, dtype=np.float32) / 8192
        elif task == "darcy2d":
            file["nu"] = RNG.random((20, 128, 128)).astype(np.float32)
            file["tensor"] = RNG.random((20, 1, 128, 128)).astype(np.float32)
        else:
            space, _ = MULT[task]
            for sample in range(20):
                d = file.create_dataset(f"{sample:04d}/data", (101, *space), "f4", chunks=(1, *space))
                for time in (0, 99, 100):
                    d[time] = np.broadcast_to(1000 * sample + time + 0.5 * np.arange(space[-1]), space)
    return path


@pytest.mark.parametrize("task", SINGLE)
def test_pde_single_files_give_the_first_snapshot_and_the_right_later_one(tmp_path, task):
    write_pde(task, tmp_path)
    loaded = full(task, tmp_path)
    arrays, (_, points), last, kept = SINGLE[task]
    assert (len(loaded.train) + len(loaded.val), len(loaded.test)) == (18, 2)
    x, y = dev(loaded)
    assert x.shape == y.shape == (18, 1, kept)
    samples = np.arange(2, 20)  # the first tenth is the test set
    each = np.concatenate([0.25 * i + np.arange(0, points, points * len(arrays) // kept) / 8192 for i in range(len(arrays))])
    x_raw, y_raw = (1000.0 * samples[:, None] + time + each for time in (0, last))
    test_raw = 1000.0 * np.arange(2)[:, None] + last + each
    if task == "navier_stokes1d":  # targets, too, by the statistics of the training inputs
        mean, std = x_raw.mean(0), x_raw.std(0, ddof=1) + 1e-5
        x_raw, y_raw, test_raw = ((v - mean) / std for v in (x_raw, y_raw, test_raw))
    assert np.allclose(x[:, 0], x_raw, rtol=1e-5, atol=1e-4) and np.allclose(y[:, 0], y_raw, rtol=1e-5, atol=1e-4)
    assert np.allclose(loaded.test.y[:, 0], test_raw, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("task", MULT)
def test_pde_mult_files_have_one_target_time_in_training_and_test(tmp_path, task):
    write_pde(task, tmp_path)
    loaded = full(task, tmp_path)
    space, channel = MULT[task]
    x, y = dev(loaded)
    assert x.shape == (18, 1, *space[:-1]) and y.shape == ((18, *space[:-1]) if len(space) == 3 else (18, 1, *space[:-1]))
    assert (x.reshape(18, -1)[:, 5] == 1000 * np.arange(18)).all()  # the last tenth is the test set
    assert (y.reshape(18, -1)[:, 5] == 1000 * np.arange(18) + 100 + 0.5 * channel).all()
    assert (loaded.test.y.flatten(1)[:, 0].numpy() == 1000 * np.array([18, 19]) + 100 + 0.5 * channel).all()


@pytest.mark.parametrize("task", ["diffusion_reaction1d", *MULT])
def test_as_released_the_test_set_of_an_official_file_has_another_target_time(tmp_path, task):
    write_pde(task, tmp_path)
    ours, released = full(task, tmp_path), full(task, tmp_path, as_released=True)
    late = 99 - (29 if task == "diffusion_reaction1d" else 100)  # snapshots, each worth 1 in these files
    assert torch.allclose(released.test.y, ours.test.y + late) and torch.equal(released.test.x, ours.test.x)
    assert torch.equal(released.train.y, ours.train.y) and torch.equal(released.val.y, ours.val.y)


def test_darcy2d_predicts_the_solution_from_the_coefficient(tmp_path):
    path = write_pde("darcy2d", tmp_path)
    x, y = dev(full("darcy2d", tmp_path))
    with h5py.File(path) as file:
        assert np.array_equal(x[:, 0], file["nu"][2:, ::2, ::2]) and np.array_equal(y, file["tensor"][2:, 0, ::2, ::2])


def test_damaged_pde_files_are_named(tmp_path):
    path = write_pde("diffusion_reaction1d", tmp_path)
    with h5py.File(path, "w") as file:
        file["tensor"] = np.zeros((20, 20, 1024), np.float32)
    with pytest.raises(cli.UserError, match="tensor has 20 snapshots; expected more than 29"):
        full("diffusion_reaction1d", tmp_path)
    with h5py.File(path, "w") as file:
        file["u"] = np.zeros(3)
    with pytest.raises(cli.UserError, match=r"has the arrays \['u'\]; expected tensor"):
        full("diffusion_reaction1d", tmp_path)
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(cli.UserError, match="is not a readable HDF5 file"):
        full("diffusion_reaction1d", tmp_path)
    with h5py.File(path, "w") as file:
        file["tensor"] = np.zeros((20, 101, 512), np.float32)
    with pytest.raises(cli.UserError, match=r"x holds \(\d+, 1, 512\); expected \(\d+, 1, 1024\)"):
        full("diffusion_reaction1d", tmp_path)


# ---- tables


def write_openml(folder, number, columns, rows):
    """As fetch_openml keeps it. columns: [(name, None or its categories)], the last is the target."""
    root = folder / "openml" / "openml.org"
    arff = [f"@RELATION t{number}"]
    arff += [f"@ATTRIBUTE {n} {'REAL' if c is None else '{' + ','.join(c) + '}'}" for n, c in columns] + ["@DATA"]
    arff = "\n".join(arff + [",".join(map(str, row)) for row in rows]) + "\n"
    feature = [{"index": str(i), "name": n, "data_type": "numeric" if c is None else "nominal", "is_ignore": "false",
                "is_target": str(i == len(columns) - 1).lower(), "is_row_identifier": "false", "number_of_missing_values": "0"}
               for i, (n, c) in enumerate(columns)]  # fmt: skip
    description = {"id": str(number), "name": f"t{number}", "version": "1", "format": "ARFF", "status": "active",
                   "file_id": "7", "default_target_attribute": columns[-1][0], "description": "", "licence": "Public",
                   "url": "https://www.openml.org/data/v1/download/7/t.arff", "parquet_url": "",
                   "md5_checksum": hashlib.md5(arff.encode()).hexdigest()}  # fmt: skip
    contents = {
        f"api/v1/json/data/{number}": json.dumps({"data_set_description": description}),
        f"api/v1/json/data/features/{number}": json.dumps({"data_features": {"feature": feature}}),
        f"api/v1/json/data/qualities/{number}": json.dumps({"data_qualities": {"quality": []}}),
        "data/v1/download/7/t.arff": arff,
    }
    for name, content in contents.items():
        path = root / f"{name}.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(content.encode()))
    return root


def test_a_table_with_categories_becomes_columns_in_sequence(tmp_path):
    columns = [
        ("age", None),
        ("colour", ["red", "blue"]),
        ("height", None),
        ("kind", ["a", "b", "c"]),
        ("class", ["no", "yes"]),
    ]
    rows = [[i, "red" if i % 3 else "blue", i * i if i % 10 else "?", "?" if i == 5 else "abc"[i % 3], "yes" if i % 2 else "no"]
            for i in range(40)]  # fmt: skip
    write_openml(tmp_path, 999, columns, rows)
    loaded = full("openml999", tmp_path)
    assert loaded.task.shape == (4, 4) and loaded.task.output == (2,)  # channels: three kinds and missing; columns: all
    assert (len(loaded.train) + len(loaded.val), len(loaded.test)) == (36, 4)
    test = loaded.test.inputs(torch.arange(4)).numpy()
    train = dev(loaded)[0]
    every = np.concatenate([train, test])
    # categories first (colour, kind), then numbers (age, height) in channel 0
    assert set(every[:, :2, 0].sum(1)) == {1.0} and (every[:, 2:, 0] == 0).all()
    assert (every[:, :, 1].sum(1) == 1).all() and every[:, 3, 1].sum() == 1  # the one missing kind
    assert (every[:, 1:, 2:] == 0).all()
    assert abs(train[:, 0, 2].mean()) < 1e-6 and train[:, 0, 2].std() == pytest.approx(1, abs=1e-6)  # training rows alone
    age = np.concatenate([train, test])[:, 0, 2]
    ages = np.sort(age)  # 0..39, scaled: equal steps, so the scale is one line for training and test rows
    assert np.allclose(np.diff(ages), ages[1] - ages[0], atol=1e-5)
    assert loaded.test.y.sum() == 2  # by class


def test_numbers_alone_are_one_position_and_columns_with_gaps_are_left_out(tmp_path):
    columns = [("a", None), ("b", None), ("c", None), ("class", ["x", "y", "z"])]
    rows = [[i, "?" if i == 7 else 1, 3 * i, "xyz"[i % 3]] for i in range(60)]
    write_openml(tmp_path, 37, columns, rows)
    loaded = full("openml37", tmp_path)
    assert loaded.task.shape == (2, 1) and loaded.task.output == (3,) and loaded.train.kind == "official"
    x, _ = dev(loaded)
    assert np.allclose(x[:, 0], x[:, 1], atol=1e-6)  # proportional columns are the same, scaled
    out, y = torch.randn(5, 3), torch.tensor([0, 1, 2, 2, 2])
    assert torch.allclose(loaded.task.loss(out, y), torch.nn.functional.cross_entropy(out, y))  # equal classes weigh equally


def test_rare_classes_weigh_more(tmp_path):
    write_openml(tmp_path, 37, [("a", None), ("class", ["x", "y"])], [[i, "x" if i % 4 else "y"] for i in range(80)])
    task = full("openml37", tmp_path).task
    out, y = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]]), torch.tensor([0, 1, 1])
    minus_log = [math.log(1 + math.exp(-1)), math.log(1 + math.exp(-2)), math.log(2)]
    expected = (4 / 3 * minus_log[0] + 4 * minus_log[1] + 4 * minus_log[2]) / (4 / 3 + 8)
    assert float(task.loss(out, y)) == pytest.approx(expected, rel=1e-5)


COPIES = [(61, 4, 3, 150), (187, 13, 3, 178), (1510, 30, 2, 569), (28, 64, 10, 1797)]


@pytest.mark.parametrize(("number", "shape", "classes", "rows"), COPIES)
def test_tables_that_scikit_learn_carries(tmp_path, number, shape, classes, rows):
    loaded = full(f"openml{number}", tmp_path)
    assert loaded.task.shape == (shape, 1) and loaded.train.output == (classes,) and loaded.train.kind == "sklearn"
    assert sum(len(s) for s in (loaded.train, loaded.val, loaded.test)) == rows


def test_damaged_and_missing_tables_are_named(tmp_path):
    with pytest.raises(cli.Missing, match=r"openml999: no table 999 in .*\n`python data.py --prepare openml999"):
        full("openml999", tmp_path)
    root = write_openml(tmp_path, 999, [("a", None), ("class", ["x", "y"])], [[i, "x" if i else "y"] for i in range(30)])
    with pytest.raises(cli.UserError, match="2 classes, the rarest with 1: too few"):
        full("openml999", tmp_path)
    path = root / "data/v1/download/7/t.arff.gz"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(cli.UserError, match="not a readable table 999"):
        full("openml999", tmp_path)


# ---- sources


class Tokenizer:
    """Words to the numbers of their letters: more tokens than words."""

    pad = 0

    def __call__(self, words):
        return [ord(letter) for word in words for letter in word]


def test_conll2003_is_cut_into_32_words_with_the_type_that_most_have(tmp_path):
    (tmp_path / "conll2003").mkdir()
    lines = ["-DOCSTART- -X- O O", ""]
    for piece in range(210):
        tags = [["B-LOC", "B-PER", "I-PER"], ["B-PER", "I-PER", "B-LOC"], ["O", "O", "O"], ["B-LOC", "O", "I-LOC"]][piece % 4]
        lines += [f"w{i % 10} NN I-NP {tag}" for i, tag in enumerate(tags + ["O"] * 29)] + [""] * (piece % 2)
    (tmp_path / "conll2003/train.txt").write_text("\n".join([*lines, "left over O O"]))
    source = data.load_proxy("conll2003", tmp_path, "full", tokenizer=Tokenizer())
    assert len(source) == 210 and source.classes == 3 and source.output == (3,)
    assert source.y.tolist()[:8] == [2, 2, 0, 1] * 2  # 1 LOC, 2 PER
    x = source.inputs(torch.tensor([0]))
    assert x.dtype == torch.int64 and x[0, :4].tolist() == [ord(c) for c in "w0w1"] and x.shape == (1, 32)
    few = data.load_proxy("conll2003", tmp_path, "full", n=7, seed=1, tokenizer=Tokenizer())
    assert len(few) == 7


def test_conll2000_from_its_file_or_its_zip_prefers_what_is_rare(tmp_path):
    tags = ["B-NP"] * 6 + ["B-VP"] * 2 + ["O"] * 24, ["B-NP"] * 8 + ["O"] * 24, ["B-XX"] + ["O"] * 31
    pieces = [tags[i % 2] for i in range(100)] + [tags[2]]
    text = "\n".join(f"w NN {tag}" for piece in pieces for tag in piece)
    with zipfile.ZipFile(tmp_path / "conll2000.zip", "w") as archive:
        archive.writestr("conll2000/train.txt", text)
    source = data.load_proxy("conll2000", tmp_path, "full", tokenizer=Tokenizer())
    assert source.y.tolist() == [2, 1] * 50 + [0] and source.classes == 3  # VP, NP; XX occurs too seldom
    (tmp_path / "conll2000.zip").write_bytes(b"PK\x03\x04 half")
    with pytest.raises(cli.UserError, match="conll2000.zip is not a readable"):
        data.load_proxy("conll2000", tmp_path, "full", tokenizer=Tokenizer())
    (tmp_path / "conll2000").mkdir()
    (tmp_path / "conll2000/train.txt").write_text(text[:100])
    with pytest.raises(cli.UserError, match="expected words with B- and I- tags"):
        data.load_proxy("conll2000", tmp_path, "full", tokenizer=Tokenizer())


def test_pieces_with_few_tokens_are_padded(tmp_path):
    one = lambda words: [5]
    one.pad = 9
    source = data.load_proxy("conll2003", tmp_path, "tiny", n=3, tokenizer=one)
    assert source.inputs(torch.tensor([1])).tolist() == [[5] + [9] * 31] and source.kind == "toy"


def write_voc(folder):
    root = folder / "VOCdevkit" / "VOC2012"
    for name in ("ImageSets/Segmentation", "JPEGImages", "SegmentationClass"):
        (root / name).mkdir(parents=True)
    (root / "ImageSets/Segmentation/train.txt").write_text("a\nb\n")
    for name, colour in (("a", (200, 0, 0)), ("b", (0, 0, 90))):
        Image.new("RGB", (300, 200), colour).save(root / f"JPEGImages/{name}.jpg")
        mask = np.zeros((200, 300), np.uint8)
        mask[:, 150:] = 15
        mask[:, -30:] = 255
        image = Image.fromarray(mask, "P")
        image.putpalette(RNG.integers(0, 256, 768).astype(np.uint8).tobytes())
        image.save(root / f"SegmentationClass/{name}.png")
    return root


def test_voc_masks_are_foreground_background_or_no_matter(tmp_path):
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


# ---- losses and metrics, by hand


def test_field_losses_by_hand():
    y, out = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[3.0, 5.0], [4.0, 2.0]])
    assert float(scores.rmse(out, y)) == pytest.approx((math.sqrt(1 / 2) + math.sqrt(16 / 2)) / 2)
    assert float(scores.nrmse(out, y)) == pytest.approx((1 / 5 + 4 / 2) / 2)
    assert float(scores.relative_l2(out, y)) == pytest.approx((1 / 5 + 4 / 2) / 2)
    shifted = scores.relative_l2((out - 1) / 2, y, mean=np.ones(2, np.float32), std=2 * np.ones(2, np.float32))
    assert float(shifted) == pytest.approx((1 / 5 + 4 / 2) / 2)
    assert float(scores.squared(out, y)) == pytest.approx((0 + 1 + 16 + 0) / 4)
    assert data.TASKS["burgers1d"].score(out.numpy(), y.numpy()) == pytest.approx(1.1)  # trained on RMSE, scored by nRMSE


def test_binary_losses_by_hand():
    out, y = torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 0.0]])
    expected = (10 * math.log(2) + math.log(1 + math.exp(2))) / 2
    assert float(data.TASKS["fsd50k"].loss(out, y)) == pytest.approx(expected)
    with_clip = torch.tensor([[1.0, 0.0, 7.0]])  # the number of the clip is no label
    assert float(data.TASKS["fsd50k"].loss(out, with_clip)) == pytest.approx(expected)
    out, y = torch.tensor([[[0.0, 1.0], [5.0, -1.0]]]), torch.tensor([[[1.0, 0.0], [float("nan"), 1.0]]])
    expected = (math.log(2) + math.log(1 + math.e) + math.log(1 + math.e)) / 3
    assert float(scores.mask_loss(out, y)) == pytest.approx(expected)
    out.requires_grad_()
    scores.mask_loss(out, y).backward()
    assert out.grad.isfinite().all() and out.grad[0, 1, 0] == 0


def one_hot(answers, classes):
    return np.eye(classes)[answers].astype(np.float32)


def test_macro_f1_counts_the_classes_that_occur():
    y, out = np.array([0, 0, 1, 3]), one_hot([0, 1, 1, 0], 5)
    # class 0: TP 1, FP 1, FN 1; class 1: TP 1, FP 1, FN 0; class 3: TP 0; classes 2 and 4 do not occur
    assert scores.macro_f1_error(out, y) == pytest.approx(1 - (2 / 4 + 2 / 3 + 0) / 3)


def area(scores, y):
    """Share of the pairs (present, absent) in the right order, half for ties."""
    pairs = [(p > q) + (p == q) / 2 for p in scores[y == 1] for q in scores[y == 0]]
    return sum(pairs) / len(pairs)


def test_auroc_is_the_share_of_pairs_in_order():
    out, y = RNG.normal(size=(12, 2)), np.array([0, 1] * 6)
    assert scores.auroc_error(out, y) == pytest.approx(1 - area(out[:, 1] - out[:, 0], y))
    out, y = RNG.normal(size=(30, 4)), np.arange(30) % 3  # the fourth class does not occur
    p = np.exp(out) / np.exp(out).sum(1, keepdims=True)
    areas = []
    for a, b in ((0, 1), (0, 2), (1, 2)):
        pair = (y == a) | (y == b)
        areas += [area(p[pair, a], (y[pair] == a) * 1), area(p[pair, b], (y[pair] == b) * 1)]
    assert scores.auroc_error(out, y) == pytest.approx(1 - np.mean(areas))
    assert scores.auroc_error(out, np.zeros(30, int)) == 0.5
    out, y = RNG.normal(size=(20, 3)), RNG.integers(0, 2, (20, 3))
    y[:, 2] = 1  # always there: left out
    assert scores.label_auroc_error(out, y) == pytest.approx(1 - (area(out[:, 0], y[:, 0]) + area(out[:, 1], y[:, 1])) / 2)


def precision(scores, y):
    """Mean over the present ones of the precision down to their rank."""
    order = np.argsort(-scores)
    return np.mean([y[order[: r + 1]].mean() for r in range(len(y)) if y[order[r]]])


def test_map_averages_the_chunks_of_a_clip_first():
    out, y = RNG.normal(size=(9, 3)), RNG.integers(0, 2, (9, 3)).astype(float)
    y[0] = 1
    assert scores.clip_map_error(out, y) == pytest.approx(1 - np.mean([precision(out[:, k], y[:, k]) for k in range(3)]))
    chunks = np.array([2, 0, 2, 1, 1, 2, 3])
    of_clip = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 0]], float)
    out = RNG.normal(size=(7, 3))
    mean = np.array([out[chunks == c].mean(0) for c in range(4)])
    expected = 1 - np.mean([precision(mean[:, k], of_clip[:, k]) for k in range(2)])  # nothing has the third label
    assert scores.clip_map_error(out, np.concatenate([of_clip[chunks], chunks[:, None]], 1)) == pytest.approx(expected)


def test_balanced_error_leaves_out_what_does_not_count():
    out = np.array([[[1.0, -1.0, 2.0, 3.0, -4.0, 5.0]]])
    y = np.array([[[1.0, 1.0, 0.0, 0.0, 0.0, np.nan]]])
    assert scores.balanced_error(out, y) == pytest.approx(1 - (1 / 2 + 1 / 3) / 2)


def test_protein_error_by_hand():
    y = np.full((2, 40, 40), 16.0, np.float32)
    y[0, 3, 30], y[0, 5, 29], y[0, 30, 3] = 6.0, 8.0, 6.0
    y[0, 5, 28], y[0, 6, 39] = 2.0, 8.1  # 23 apart; too far away
    out = np.full((2, 40, 40), 7.0, np.float32)
    out[0, 3, 30], out[0, 30, 3], out[0, 5, 29], out[0, 29, 5] = 4.0, 10.0, -9.0, 1.0
    # |6 - (4 + 10) / 2| = 1, |8 - 0.01| = 7.99; the second protein has no such pair
    assert scores.protein_mae(out, y) == pytest.approx((1 + 7.99) / 2, rel=1e-5)
    with pytest.raises(cli.UserError, match="nothing to score"):
        scores.protein_mae(out[1:], y[1:])


# ---- recipes


def test_averaged_gradients_with_our_settings_take_the_official_step():
    """The official code sums the gradients of 4 batches, with its learning rate and decay; we average with ours."""
    for optimizer, make in (("sgd", torch.optim.SGD), ("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)):
        recipe = published.published(optimizer, 1e-2, 0.3, 8, 10, accumulate=4)
        w = [torch.tensor([1.0, -2.0], requires_grad=True) for _ in range(2)]
        official, ours = make([w[0]], lr=1e-2, weight_decay=0.3), make([w[1]], lr=recipe.lr, weight_decay=recipe.weight_decay)
        for _ in range(5):
            gradients = torch.randn(4, 2)
            w[0].grad, w[1].grad = gradients.sum(0), gradients.mean(0)
            official.step()
            ours.step()
        assert torch.allclose(w[0], w[1], atol=1e-6), optimizer


def test_recipes_name_a_source_of_their_modality():
    import pare

    for name in [*data.TASKS, "openml31"]:
        task = data.find_task(name)
        for method in ("orca", "pare"):
            for scale in ("full", "tiny"):
                args = data.complete(pare.Args(task=name), method, scale)
                assert data.PROXIES[args.source].modality == task.modality
                assert method == "orca" or args.k_begin > 0
    args = data.complete(pare.Args(task="psicov"), "pare", "tiny")
    assert (args.batch_size, args.accumulate) == (4, 8)  # 32 samples would be 1.9 GB
    with pytest.raises(cli.UserError, match=r"--source conll2003 does not go with cifar100.\nTake cifar10 or tiny_imagenet"):
        data.complete(pare.Args(task="cifar100", source="conll2003"), "pare", "tiny")


def test_unknown_tables_and_tasks():
    assert data.find_task("openml12345").name == "openml12345"
    with pytest.raises(cli.UserError, match="perhaps openml<ID>"):
        data.find_task("openml")
    with pytest.raises(cli.UserError, match="perhaps darcy"):
        data.find_task("darcyy")


# ---- toys


@pytest.mark.parametrize("name", [*data.TASKS, "openml31"])
def test_toys_and_simulations_look_like_their_task(name, tmp_path, capsys):
    loaded = data.load(name, tmp_path, tmp_path, "tiny", n_train=40)
    kind, said = ("simulated", "SIMULATED") if loaded.task.simulate else ("toy", "TOY DATA")
    assert loaded.train.kind == kind and said in capsys.readouterr().out
    task, train = loaded.task, loaded.train
    x, y = next(train.batches(1, 8, 0, 0))
    assert x.shape == (8, *task.shape) and x.isfinite().all() and x.dtype == torch.float32
    if task.target == "class":
        assert y.shape == (8,) and y.dtype == torch.int64 and 2 <= train.classes <= max(9, task.output[0])
    else:
        assert y.shape == (8, *train.output) and y.dtype == torch.float32
    out = torch.zeros(8, *train.output, requires_grad=True)
    task.loss(out, y).backward()
    assert out.grad.isfinite().all() and out.grad.abs().sum() > 0
    index = torch.arange(min(16, len(loaded.test)))
    assert math.isfinite(
        task.score(RNG.normal(size=(len(index), *train.output)).astype("f"), loaded.test.targets(index).numpy())
    )
    again = data.load(name, tmp_path, tmp_path, "tiny", n_train=40)
    assert torch.equal(next(again.train.batches(1, 8, 0, 0))[0], x)


def test_toy_signals_and_fields_can_be_learnt():
    from sklearn.linear_model import LogisticRegression, Ridge

    x, y = toys.signals(1200, 0, (1, 46), 6)
    spectrum = abs(np.fft.rfft(x[:, 0]))
    assert LogisticRegression(max_iter=300).fit(spectrum[:1000], y[:1000]).score(spectrum[1000:], y[1000:]) > 0.8
    x, y = (part[:, 0, ::8] for part in toys.fields(400, 0, (1, 256), (1, 256)))
    assert Ridge(1e-3).fit(x[:300], y[:300]).score(x[300:], y[300:]) > 0.95  # a linear map takes one to the other
    x, y = toys.table(900, 0)
    assert LogisticRegression().fit(x[:600, 0], y[:600]).score(x[600:, 0], y[600:]) > 0.8
    pieces, y, classes = toys.text(50, 0)
    assert classes == 4 and all(len(piece) == 32 for piece in pieces)


# ---- the command line


def test_the_table_fits_on_a_screen(capsys):
    data.print_tasks("datasets")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 32 and max(map(len, lines)) <= 140 and all(any(name in line for line in lines) for name in data.TASKS)


def test_prepare_says_what_to_fetch_by_hand(tmp_path, monkeypatch, capsys):
    for key, download in files.DOWNLOADS.items():
        monkeypatch.setitem(files.DOWNLOADS, key, data.replace(download, url="http://127.0.0.1:9/x"))
    with pytest.raises(cli.UserError, match="^deepsea, conll2003 could not be fetched"):
        data.prepare("deepsea", tmp_path)
    by_hand = r"deepsea: http.* cannot be reached .*\n.*by hand \(.*Google Drive.*\): .*/deepsea_filtered.npz, 860 MB."
    assert re.search(by_hand, capsys.readouterr().out)
    with pytest.raises(cli.UserError, match="cannot be reached"):
        data.prepare("voc", tmp_path)


def test_an_archive_fetched_by_hand_is_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "conll2000.zip", "w") as archive:
        archive.writestr("conll2000/train.txt", "w NN O")
    data.prepare("conll2000", tmp_path)
    assert (tmp_path / "conll2000/train.txt").read_text() == "w NN O"
    (tmp_path / "protein.zip").write_bytes(b"half a zip")
    with pytest.raises(cli.UserError, match="protein.zip is not a whole archive"):
        files.fetch(files.DOWNLOADS["protein"], tmp_path)


def test_a_first_stage_has_the_published_rate_of_one_batch():
    import orca

    for name, lr, decay in (("cifar100", 1e-4, 1e-3), ("ecg", 1e-6, 0.1), ("psicov", 5e-6, 1e-5)):  # hyperparameters.csv
        args = data.complete(orca.Args(task=name, scale="full"), "orca", "full")
        assert data.of_one_batch(args) == pytest.approx((lr, decay))
        assert data.of_one_batch(dataclasses.replace(args, lr=0.3))[0] == 0.3  # a rate of one's own is left alone


def test_text_whose_chunks_begin_with_b_only_inside_runs_is_read_alike(tmp_path):
    words = [("a", "ORG"), ("b", "ORG"), ("c", ""), ("d", "PER"), ("e", "LOC")] * 130
    begins = ["B-", "I-", "", "B-", "B-"] * 130
    new = [f"{word} x x {begin + tag or 'O'}" for (word, tag), begin in zip(words, begins, strict=True)]
    old = [f"{word} x x {'I-' + tag if tag else 'O'}" for word, tag in words]  # of different types: B- is not needed
    for name, lines in (("new", new), ("old", old)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "eng.train").write_text("\n".join(lines))
    (x, y, n), (x_old, y_old, n_old) = (text.read_conll(tmp_path / name, 99, 0, ("eng.train",)) for name in ("new", "old"))
    assert x == x_old and (y == y_old).all() and n == n_old == 4


def test_an_archive_that_is_still_there_was_not_unpacked_to_its_end(tmp_path):
    (tmp_path / "npy_train").mkdir()
    assert files.present(files.DOWNLOADS["cosmic_train"], tmp_path)
    (tmp_path / "deepCR.ACS-WFC.train.tar").touch()
    assert not files.present(files.DOWNLOADS["cosmic_train"], tmp_path)


def test_an_unknown_distance_between_residues_is_no_contact(tmp_path):
    raw = write_psicov(tmp_path, lengths=(40, 60))
    triple = np.empty(3, object)
    triple[:] = [40, "A" * 40, raw["psicov40"][1]]
    triple[2][3, 30] = np.nan
    np.save(tmp_path / "protein/psicov/distance/psicov40-cb.npy", triple, allow_pickle=True)
    y = full("psicov", tmp_path).test.targets(torch.arange(1))[0]
    assert y[5 + 3, 5 + 30] == 16
