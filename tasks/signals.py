"""Signals: the readers of ninapro, ecg, satellite, deepsea and fsd50k; sound as log-mel images.

A reader takes (data_dir, cache) and returns (x, y) of training, (x, y) of test and the origin of the data.
Shapes: n samples, B batch; the last axis is time, except for log-mel images (B, bands, times).
"""

import csv
import functools
import io
import json

import numpy as np

from cli import Missing, UserError
from tasks.files import Lazy, beside, check, check_shape, find, locate, map_npz, read_npy, read_text, reading, unpickle_entries


def read_ninapro(data_dir, cache):
    """Surface electromyography, 16 electrodes x 52 times: x (n, 1, 16, 52), not normalised. The validation file trains, too."""
    splits = {}
    for name in ("train", "val", "test"):
        path = locate(data_dir, f"ninapro_{name}.npy")
        x = check(path, read_npy(path), (52, 16)).transpose(0, 2, 1)[:, None]  # (n, 52, 16) -> (n, 1, 16, 52)
        labels = beside(path, f"label_{name}.npy")
        y = check(labels, read_npy(labels), (), "class", 18)
        if len(x) != len(y):
            raise UserError(f"{labels}: {len(y)} labels for {len(x)} samples.")
        splits[name] = x, y
    train = tuple(np.concatenate(parts) for parts in zip(splits["train"], splits["val"], strict=True))
    return train, splits["test"], "official"


def read_satellite(data_dir, cache):
    """Vegetation index at 46 dates: x (n, 1, 46), not normalised; the files' labels 1..24 become 0..23."""
    splits = []
    for name in ("train", "test"):
        path = locate(data_dir, f"satellite_{name}.npy")
        x, y = unpickle_entries(path, "data", "label")
        x = check(f"{path}: data", x, (46,))[:, None]  # (n, 46) -> (n, 1, 46)
        splits.append((x, check(f"{path}: label", y, (), "class", 24, first=1)))
    return *splits, "official"


ECG_STRIDE = {"N": 500, "A": 500 // 6, "O": 500 // 2, "~": 500 // 20}  # normal, atrial fibrillation, other, noise: 0..3


ECG_NAMES = ("normal rhythm", "atrial fibrillation", "other rhythm", "noise")  # of PhysioNet's challenge of 2017


def read_ecg(data_dir, cache):
    """Windows of 1000 samples (3.3 s at 300 Hz) of electrocardiograms, x (n, 1, 1000), cut closer where the class is rare.

    A record is scaled to mean 0 and standard deviation 1. All its windows are in one split: a tenth of the records, those of
    `train_test_split(random_state=0)`, is the test set, and validation is held out by records, too.
    """
    from sklearn.model_selection import train_test_split

    path = locate(data_dir, "challenge2017.pkl")
    records, labels = unpickle_entries(path, "data", "label")
    with reading(path, "pickle of arrays"):
        labels = [name.decode() if isinstance(name, bytes) else str(name) for name in labels]
    if len(records) != len(labels) or (unknown := set(labels) - ECG_STRIDE.keys()):
        wrong = f"labels {sorted(unknown)}" if len(records) == len(labels) else f"{len(labels)} labels"
        raise UserError(f"{path}: {len(records)} records with {wrong}; expected one of N, A, O, ~ for each.")
    splits = []
    for numbers in train_test_split(np.arange(len(labels)), test_size=0.1, random_state=0):
        signals, starts, y, groups, offset = [], [], [], [], 0
        for number in numbers:
            signal = check(f"{path}: record {number}", records[number], ())  # (length,)
            begin = np.arange(0, len(signal) - 1000, ECG_STRIDE[labels[number]])
            signals.append((signal - signal.mean()) / (signal.std() if (signal != signal[:1]).any() else 1))
            starts.append(offset + begin)
            y.append(np.full(len(begin), list(ECG_STRIDE).index(labels[number])))
            groups.append(np.full(len(begin), number))
            offset += len(signal)
        splits.append((windows(np.concatenate(signals), np.concatenate(starts), np.concatenate(groups)), np.concatenate(y)))
    if not all(len(y) for _, y in splits):
        raise UserError(f"{path}: {len(records)} records give no window of 1000 samples for training or for test.")
    return *splits, "official"


def windows(signal, starts, groups):
    """Windows of one long signal, cut when they are needed: (n, 1, 1000)."""
    return Lazy(len(starts), lambda rows, u: signal[starts[rows][:, None] + np.arange(1000)][:, None], groups)


def read_deepsea(data_dir, cache):
    """One-hot DNA and the presence of 36 chromatin features: x (n, 4, 1000) read lazily, y (n, 36). Validation trains, too."""
    path = locate(data_dir, "deepsea_filtered.npz")
    x, y = {}, {}
    for name in ("train", "val", "test"):
        x[name] = check_shape(f"{path}: x_{name}", map_npz(path, f"x_{name}", cache), (None, 1000, 4))
        y[name] = map_npz(path, f"y_{name}", cache)  # (n, 36)
        y[name] = check(f"{path}: y_{name}", check_shape(f"{path}: y_{name}", y[name], (len(x[name]), 36)), (36,), "labels")

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


def read_wav(path, start=None):
    """A sound as float in [-1, 1]; with `start`, only `a_second` of it, without reading the rest.

    Raises UserError for a damaged file, NaN, several channels, or another rate.
    """
    from scipy.io import wavfile

    with reading(path, "wav file"):
        with path.open("rb") as file:  # RIFF, the size of what follows; 0 or all ones: written as a stream
            size = int.from_bytes(file.read(8)[4:], "little")
        if size not in (0, 2**32 - 1) and path.stat().st_size < size + 7:  # a last byte of padding may be missing
            raise ValueError(f"{path.stat().st_size:,} of {size + 8:,} bytes")  # scipy would read what is there
        try:
            rate, sound = wavfile.read(path, mmap=start is not None)
        except ValueError:  # samples of 24 bits cannot be mapped
            rate, sound = wavfile.read(path)
    if rate != RATE or sound.ndim != 1 or len(sound) == 0:
        raise UserError(f"{path} has {rate} Hz and shape {sound.shape}; expected one channel at {RATE} Hz.")
    sound = sound if start is None else a_second(sound, start)
    if sound.dtype == np.uint8:  # 8-bit PCM is unsigned, around 128; wider samples are signed
        return (sound - 128.0) / 128
    return sound / -float(np.iinfo(sound.dtype).min) if sound.dtype.kind == "i" else check(path, sound, ())


def a_second(sound, start=0):
    """One second of a sound, (RATE,), from the share `start` in [0, 1) on; a shorter one is repeated."""
    if len(sound) < RATE:
        return np.resize(sound, RATE)
    begin = int(start * (len(sound) - RATE + 1))
    return sound[begin : begin + RATE]


def fsd50k_numbers(data_dir):
    """The number of each of the 200 labels by its name, {str: int}, and the path of the file."""
    with reading(path := beside(locate(data_dir, "chunks/tr.csv"), "lbl_map.json"), "json file"):
        number = {name: int(i) for name, i in json.loads(read_text(path)).items()}
    if sorted(number.values()) != list(range(200)):
        raise UserError(f"{path} does not number its labels from 0 to 199.")
    return number, path


def fsd50k_names(data_dir):
    """The 200 labels, (200,) str, in the order of their numbers."""
    number, _ = fsd50k_numbers(data_dir)
    return tuple(sorted(number, key=number.get))


def read_fsd50k(data_dir, cache):
    """Seconds of sound, read lazily, x (n, 2, 22050): the chunk, and the noise to mix in; y (n, 200) the labels of the clip.

    A training sample is a clip: each access draws one of its chunks (official: one, chosen once); validation takes the middle
    one. A test sample is a chunk; its y has a last column, the number of its clip: the score averages over a clip.
    """
    table = locate(data_dir, "chunks/tr.csv")
    number, label_file = fsd50k_numbers(data_dir)
    noises = find(table.parent.parent / "noise_22050", "**/*.wav")
    if not noises:
        print(f"fsd50k: no noise_22050 in {table.parent.parent}: training without the noise that is mixed in.")

    def clips(path):
        """The chunks of each clip, and its labels (clips, 200)."""
        with reading(path, "table with files, labels, ext"):
            content = read_text(path)
            rows = [(row["files"], row["labels"], row["ext"]) for row in csv.DictReader(io.StringIO(content))]
            if not content.endswith("\n") or not all(map(all, rows)):
                raise ValueError("the last line is incomplete, or a line has an empty field: is the file truncated?")
            tail = rows[0][0][4:].lstrip("/")  # the first four characters stand for the folder, which is searched for
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
                x[i, 1] = read_wav(noises[int(u[i, 1] * len(noises))], u[i, 2])
        return x

    def read_test(rows, u):
        sounds = np.stack([a_second(read_wav(test_chunks[row])) for row in rows]).astype(np.float32)
        return np.stack([sounds, np.zeros_like(sounds)], axis=1)  # (B, 2, RATE)

    chunks, y = clips(table)
    of_clip, y_clip = clips(beside(table, "eval.csv"))
    test_chunks = [path for paths in of_clip for path in paths]
    clip = np.repeat(np.arange(len(of_clip)), [len(paths) for paths in of_clip])  # (test chunks,)
    y_test = np.concatenate([y_clip[clip], clip[:, None].astype(np.float32)], axis=1)  # (test chunks, 201)
    return (Lazy(len(chunks), read_train), y), (Lazy(len(clip), read_test), y_test), "official"


MELS, FFT, HOP = 96, 1920, 220  # bands, points of a spectrum, samples between spectra


@functools.cache
def mel_filters(device):
    """Triangles on the HTK mel scale from 0 to 11,025 Hz, each with height 1: (961, 96). mel = 2595 log10(1 + f / 700)"""
    import torch

    mel = np.linspace(0, 2595 * np.log10(1 + RATE / 2 / 700), MELS + 2)
    edge = 700 * (10 ** (mel / 2595) - 1)  # (98,) Hz
    f = np.linspace(0, RATE / 2, FFT // 2 + 1)[:, None]
    rising = (f - edge[:-2]) / (edge[1:-1] - edge[:-2])
    falling = (edge[2:] - f) / (edge[2:] - edge[1:-1])
    return torch.from_numpy(np.maximum(0, np.minimum(rising, falling)).astype(np.float32)).to(device)


def log_mel(sound):
    """Log-mel spectrum in decibels, with mean 0: (B, 22050) -> (B, 96, 101).

    10 log10 max(power, 1e-10), cut 80 dB below the loudest, minus the mean. Spectra of 661 samples (Hann) every 220.
    """
    import torch

    window = torch.hann_window(661, device=sound.device)
    power = torch.stft(sound, FFT, HOP, 661, window, center=True, pad_mode="reflect", return_complex=True).abs() ** 2
    mel = mel_filters(sound.device).T @ power  # (96, 961) x (B, 961, 101)
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


def log_mel_image(x, u):
    """Sound and noise to log-mel images: (B, 2, 22050) -> (B, 1, 96, 102), the last column is zero.

    With draws u (B, 25) both are masked, and three quarters become (1 - a) * sound + a * noise, in decibels, a ~ U(0, 0.5).
    """
    import torch

    spectrum = log_mel(x[:, 0])  # (B, 96, 101)
    if u is not None:
        spectrum, noise = mask_bands(spectrum, u[:, 3:13]), mask_bands(log_mel(x[:, 1]), u[:, 13:23])
        a = torch.where((u[:, 23] < 0.75) & x[:, 1].any(1), 0.5 * u[:, 24], 0)[:, None, None]
        spectrum = (1 - a) * spectrum + a * noise
    return torch.nn.functional.pad(spectrum, (0, 1))[:, None]  # (B, 1, 96, 102)
