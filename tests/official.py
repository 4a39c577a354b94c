"""The official files of the tasks and the sources, written in small, and what a task reads from them."""

import csv
import gzip
import hashlib
import io
import json
import os
import pickle

import h5py
import numpy as np
import torch
from PIL import Image
from scipy.io import savemat, wavfile

import cli
import data
from tasks import files

RNG = np.random.default_rng(0)


def full(task, folder, **options):
    """Load a task at full scale from the files in `folder`, split into training, validation and test."""
    return data.load(task, folder, folder / "cache", "full", **options)


def dev(loaded):
    """Inputs and targets of training and validation samples, sorted as they came."""
    splits = (loaded.train, loaded.val)
    x, y = (
        torch.cat([f(s, torch.arange(len(s))) for s in splits]) for f in (lambda s, i: s.inputs(i), lambda s, i: s.targets(i))
    )
    order = np.random.default_rng(cli.stream("validation split", 0)).permutation(len(x))
    n_val = len(loaded.val)
    back = np.argsort(np.concatenate([np.sort(order[n_val:]), np.sort(order[:n_val])]))
    return x[back].numpy(), y[back].numpy()


class Bomb:
    def __reduce__(self):
        return os.system, ("touch bomb",)


# ---- images


def write_cifar100(folder, n=40, labels=None):
    folder = folder / "cifar-100-python"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("train", "test"):
        content = {
            b"data": RNG.integers(0, 256, (n, 3072), dtype=np.uint8),
            b"fine_labels": labels or [i % 100 for i in range(n)],
        }
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    (folder / "meta").write_bytes(pickle.dumps({b"fine_label_names": [b"name_%d" % i for i in range(100)]}, protocol=2))
    return folder


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


# ---- signals


def write_ninapro(folder, labels=18):
    folder = folder / "ninapro"
    folder.mkdir(exist_ok=True)
    for name, n in (("train", 20), ("val", 8), ("test", 6)):
        np.save(folder / f"ninapro_{name}.npy", RNG.normal(size=(n, 52, 16)))
        np.save(folder / f"label_{name}.npy", np.arange(n) % labels)
    return folder


def write_satellite(folder, n=30, **content):
    x = RNG.random((n, 46)).astype(np.float32)
    for name in ("train", "test"):
        np.save(folder / f"satellite_{name}.npy", {"data": x, "label": np.arange(n) % 24 + 1} | content, allow_pickle=True)
    return x


def write_ecg(folder, n=40, labels="NAO~"):
    records = np.empty(n, object)
    records[:] = [RNG.normal(3, 2, RNG.integers(900, 2200)) for _ in range(n)]
    label = np.array([labels[i % len(labels)] for i in range(n)])
    (folder / "challenge2017.pkl").write_bytes(pickle.dumps({"data": records, "label": label}))
    return records, label


def write_deepsea(folder, save=np.savez):
    arrays = {}
    for name, n in (("train", 20), ("val", 5), ("test", 7)):
        arrays[f"x_{name}"] = np.eye(4, dtype=np.uint8)[RNG.integers(0, 4, (n, 1000))]
        arrays[f"y_{name}"] = RNG.integers(0, 2, (n, 36)).astype(np.uint8)
    save(folder / "deepsea_filtered.npz", **arrays)
    return arrays


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


# Values: 1000 sample + snapshot + 0.25 field + point / 8192 (SINGLE); 1000 sample + snapshot + 0.5 channel (MULT).
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


def write_pictures(folder, n):
    """Tiny-ImageNet with n training images for each of the 200 classes, and one for validation."""
    for name in [f"train/n{c:03}/images/n{c:03}_{i}.JPEG" for c in range(200) for i in range(n)] + ["val/images/val_0.JPEG"]:
        path = folder / "tiny-imagenet-200" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path, "JPEG")
    (folder / "tiny-imagenet-200/val/val_annotations.txt").write_text("val_0.JPEG\tn007\t0\t0\t9\t9\n")
