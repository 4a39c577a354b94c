"""Signals: ninapro, satellite, ecg, deepsea and fsd50k from their official files, whole and damaged."""

import json
import math
import pickle
import subprocess
import sys
import wave
import zipfile

import numpy as np
import pytest
import torch
from helpers import ROOT
from official import Bomb, dev, full, write_deepsea, write_ecg, write_fsd50k, write_ninapro, write_satellite
from scipy.io import wavfile

import cli
from tasks import signals

# ---- ninapro, satellite


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


# ---- ecg


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
    write_ecg(tmp_path)
    content = bytearray((tmp_path / "challenge2017.pkl").read_bytes())
    content[content.rfind("N".encode("utf-32-le")) + 3] = 1  # no character has this number
    (tmp_path / "challenge2017.pkl").write_bytes(content)
    with pytest.raises(cli.UserError, match="challenge2017.pkl is not a readable pickle of arrays"):
        full("ecg", tmp_path)


def test_a_constant_record_becomes_zeros(tmp_path):
    """The standard deviation of equal numbers is not 0 after rounding."""
    records = np.array([np.full(1200 + i, 0.1) for i in range(20)], object)
    (tmp_path / "challenge2017.pkl").write_bytes(pickle.dumps({"data": records, "label": ["N"] * 20}))
    test = full("ecg", tmp_path).test
    assert test.inputs(torch.arange(len(test))).abs().max() < 1e-6


# ---- deepsea


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


@pytest.mark.matrix
def test_deepsea_of_the_official_size_needs_less_than_3_gb(tmp_path):
    sparse = Sparse(tmp_path / "deepsea_filtered.npz")
    with zipfile.ZipFile(sparse, "w") as archive:
        for name, n in (("train", 71_753), ("val", 2_490), ("test", 149_400)):
            for key, shape in ((f"x_{name}", (n, 1000, 4)), (f"y_{name}", (n, 36))):
                with archive.open(f"{key}.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
                    for begin in range(0, n, 1000):
                        file.write(bytes(math.prod(shape[1:]) * min(1000, n - begin)))
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


# ---- fsd50k


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


def test_fsd50k_says_that_its_noise_is_missing(tmp_path, capsys):
    write_fsd50k(tmp_path)
    full("fsd50k", tmp_path)
    assert "noise" not in capsys.readouterr().out
    for path in tmp_path.glob("**/noise_22050/**/*.wav"):
        path.unlink()
    full("fsd50k", tmp_path)
    assert "fsd50k: no noise_22050 in" in capsys.readouterr().out


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
    whole = tmp_path / "audio/chunks/eval_0_1.wav"
    whole.write_bytes(whole.read_bytes()[:-3000])
    for start in (None, 0.5):
        with pytest.raises(cli.UserError, match=r"eval_0_1.wav is not a readable wav file \([\d,]+ of [\d,]+ bytes"):
            signals.read_wav(whole, start)
    (tmp_path / "audio/chunks/tr_0_0.wav").unlink()
    with pytest.raises(cli.Missing, match="tr_0_0.wav"):
        full("fsd50k", tmp_path)
    table = tmp_path / "audio/chunks/tr.csv"
    whole = table.read_text()
    for cut in range(len(whole) // 2, len(whole)):
        table.write_text(whole[:cut])
        with pytest.raises(cli.UserError, match="tr.csv"):
            full("fsd50k", tmp_path)
    (tmp_path / "audio/chunks/lbl_map.json").write_text(json.dumps({f"class{i}": i - 1 for i in range(200)}))
    with pytest.raises(cli.UserError, match="lbl_map.json does not number its labels from 0 to 199"):
        full("fsd50k", tmp_path)
    (tmp_path / "audio/chunks/lbl_map.json").write_text("{")
    with pytest.raises(cli.UserError, match="lbl_map.json is not a readable json"):
        full("fsd50k", tmp_path)


def test_a_second_of_a_long_sound_is_that_of_the_whole(tmp_path):
    sound = np.random.default_rng(0).integers(-3000, 3000, 70_000, np.int16)
    for name, values in (("int", sound), ("float", np.float32(sound / 32768)), ("short", sound[:10_000])):
        wavfile.write(tmp_path / "a.wav", signals.RATE, values)
        for start in (0, 0.3, 0.999):
            whole = signals.a_second(signals.read_wav(tmp_path / "a.wav"), start)
            assert np.array_equal(signals.read_wav(tmp_path / "a.wav", start), whole) and len(whole) == signals.RATE, name
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:  # 24 bits
        file.setparams((1, 3, signals.RATE, 0, "NONE", ""))
        file.writeframes(np.random.default_rng(0).bytes(3 * 70_000))
    whole = signals.a_second(signals.read_wav(tmp_path / "a.wav"), 0.3)
    assert np.array_equal(signals.read_wav(tmp_path / "a.wav", 0.3), whole)
