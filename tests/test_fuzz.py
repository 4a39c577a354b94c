"""Damaged files and odd command lines, drawn at random: a result or a UserError, nothing else, and no input is changed."""

import contextlib
import hashlib
import io
import itertools
import warnings

import numpy as np
import pytest
import torch
from official import (
    TINY,
    write_cifar100,
    write_cosmic,
    write_darcy,
    write_deepsea,
    write_ecg,
    write_fsd50k,
    write_ninapro,
    write_openml,
    write_pde,
    write_psicov,
    write_satellite,
    write_voc,
)  # fmt: skip

import cli
import data

DAMAGES, SLOW, COMMAND_LINES = 19, 6, 100  # of each kind of file; 17 kinds, one of them slow: 310 in all


def write_tiny_imagenet(folder):
    for name, content in TINY.items():
        path = folder / "tiny-imagenet-200" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def write_conll(folder):
    (folder / "conll2003").mkdir()
    lines = [f"word{i} NN B-NP {'B-PER' if i % 3 else 'B-LOC'}" for i in range(400)]
    (folder / "conll2003/train.txt").write_text("\n".join(lines) + "\n")


def write_table(folder):
    columns = [("age", None), ("kind", ["a", "b", "c"]), ("class", ["x", "y"])]
    write_openml(folder, 7, columns, [(i / 7, "abc"[i % 3], "xy"[i % 2]) for i in range(60)])


WRITERS = {  # a task or a source -> its files
    "cifar100": write_cifar100, "spherical": write_cifar100, "ninapro": write_ninapro, "satellite": write_satellite,
    "ecg": write_ecg, "deepsea": write_deepsea, "fsd50k": write_fsd50k, "darcy": lambda f: write_darcy(f, 5),
    "psicov": lambda f: write_psicov(f, (20, 30)), "cosmic": write_cosmic, "advection1d": lambda f: write_pde("advection1d", f),
    "openml7": write_table,
    "diffusion_sorption1d": lambda f: write_pde("diffusion_sorption1d", f), "darcy2d": lambda f: write_pde("darcy2d", f),
    "tiny_imagenet": write_tiny_imagenet, "conll2003": write_conll, "voc": write_voc,
}  # fmt: skip


class Tokenizer:
    pad = 0

    def __call__(self, words):
        return [len(word) for word in words]


def state(folder):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def damage(content, others, rng):
    """One kind of damage at random: a file cut short, emptied, overwritten in places, longer, or another file's content."""
    changed, kind = bytearray(content), rng.integers(7)
    if kind == 0:
        return content[: rng.integers(len(content))]
    if kind == 1:
        return b""
    if kind == 2:  # bits
        for place in rng.integers(len(content), size=rng.integers(1, 9)):
            changed[place] ^= 1 << rng.integers(8)
    elif kind == 3:  # the header, where it hurts most
        for place in rng.integers(min(256, len(content)), size=4):
            changed[place] = rng.integers(256)
    elif kind == 4:  # a block of zeros or of noise
        begin = rng.integers(len(content))
        block = rng.integers(256, size=512, dtype=np.uint8) * rng.integers(2, dtype=np.uint8)
        changed[begin : begin + 512] = block[: len(content) - begin].tobytes()
    elif kind == 5:
        changed += rng.integers(256, size=100, dtype=np.uint8).tobytes()
    else:
        return others[rng.integers(len(others))]
    return bytes(changed)


def everything(name, folder, cache):
    """Load a task or a source, and read every sample of it."""
    if name in data.PROXIES:
        splits = [data.load_proxy(name, folder, "full", tokenizer=Tokenizer())]
    else:
        loaded = data.load(name, folder, cache, "full")
        splits = [loaded.train, loaded.val, loaded.test]
    for split in splits:
        for index in torch.arange(len(split)).split(16):
            yield split.inputs(index), split.targets(index)


LARGE = [pytest.mark.matrix]  # these write fields of the official size


@pytest.mark.parametrize(
    "number, name", [pytest.param(i, n, marks=LARGE if n in ("psicov", "darcy") else ()) for i, n in enumerate(WRITERS)]
)
def test_a_damaged_file_is_read_or_named(tmp_path, capsys, number, name):
    folder, rng = tmp_path / "data", np.random.default_rng(number)
    folder.mkdir()
    WRITERS[name](folder)
    contents = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    outcomes = set()
    for i in range(SLOW if name == "psicov" else DAMAGES):
        path = list(contents)[rng.integers(len(contents))]
        path.write_bytes(damage(contents[path], list(contents.values()), rng))
        before = state(folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of libraries, about the damage
            try:
                for x, y in everything(name, folder, tmp_path / f"cache{i}"):
                    assert x.isfinite().all() and (y.isfinite().all() or name in ("cosmic", "voc"))
                outcomes.add("read")
            except cli.UserError as error:
                assert 1 <= len(str(error).splitlines()) <= 3
                outcomes.add("named")
        assert state(folder) == before, f"{path.name}: the data folder was changed"
        path.write_bytes(contents[path])
    assert "named" in outcomes


ODD = {
    "--task": ["satellite", "spherica", "", "../etc", "openml", "openml-3", "openml0", "voc"],
    "--scale": ["tiny", "huge"],
    "--backbone": ["tiny-roberta", "tiny-swin", "/nonexistent", "~", "", "random:", "x" * 300],
    "--source": ["conll2003", "cifar10", "imagenet"],
    "--data-dir": ["nowhere", "/dev/null", "~nobody/x"],
    "--seed": ["0", "-1", "1.5", str(2**32), str(2**70)],
    "--epochs": ["1", "0", "-3", "one", "1e9x"],
    "--n-train": ["16", "1", "0", "-5"],
    "--batch-size": ["8", "0", "3", "1000000"],
    "--accumulate": ["1", "0", "7"],
    "--lr": ["1e-3", "nan", "inf", "-1", "0", "1e38"],
    "--weight-decay": ["0", "nan", "-1"],
    "--clip": ["1", "nan", "-0.5"],
    "--warmup-epochs": ["0", "0.5", "-1", "nan"],
    "--decay-epochs": ["1", "0", "nan"],
    "--momentum": ["0.9", "2"],
    "--dropout": ["0", "1", "1.1"],
    "--optimizer": ["sgd", "adam", "lion"],
    "--init": ["random", "zeros"],
    "--nonsense": ["1"],
}


def test_an_odd_command_line_runs_or_costs_a_few_lines(script, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "TOY_TEST", 20)
    rng, codes = np.random.default_rng(0), set()
    for i in range(COMMAND_LINES):
        options = {"--task": "satellite", "--scale": "tiny", "--n-train": "16", "--batch-size": "8", "--epochs": "1"}
        for name in rng.choice(list(ODD), rng.integers(2, 6), replace=False):
            options[name] = str(rng.choice(ODD[name]))
        method = ("finetune.py", "pare.py")[i % 2]
        out, complained = tmp_path / str(i), io.StringIO()
        with contextlib.redirect_stderr(complained):
            try:
                script(method, *itertools.chain(*options.items()), out=out)
                codes.add(0)
            except AssertionError as failed:  # another exit code than 0: `script` says which
                assert str(failed).startswith("exit code 2\n"), f"{options}\n{failed}"
                codes.add(2)
                assert not list(out.glob("*/result.json"))
    assert codes == {0, 2}
