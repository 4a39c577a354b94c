"""The scripts as a user runs them: subprocesses, toy data, the tiny backbone, seconds each."""

import difflib
import json
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import METHODS, ROOT, SHORT, here, result, rows, weights
from safetensors.torch import load_file

NOISE = ["--gate-noise", 1]  # random numbers that a resumed run has to draw again


@pytest.fixture(scope="module")
def uninterrupted(script, tmp_path_factory):
    """PaRe, three short epochs; several tests compare with it."""
    out = tmp_path_factory.mktemp("uninterrupted")
    return script("pare.py", *SHORT, *NOISE, out=out), out / "spherical-pare-tiny-swin-s0-toy"


# ---- end to end


def test_pare_learns_and_leaves_its_folder_behind(uninterrupted):
    said, folder = uninterrupted
    assert "TOY DATA" in said and "k from 41" in said
    names = {path.name for path in folder.iterdir()}
    assert names == {"args.json", "metrics.jsonl", "curves.png", "last.pt", "best.safetensors", "result.json"}
    history, r = rows(folder), result(folder)
    assert history[-1]["loss"] < history[0]["loss"] and [row["k"] for row in history] == [41, 27, 13]
    assert [round(row["lambda"], 3) for row in history] == [1.0, round(27 / 41, 3), round(13 / 41, 3)]
    assert r["data"] == "toy" and r["source"] == "tiny_imagenet" and r["n_train"] == 320 and r["method"] == "pare"
    assert r["val"] == min(row["val"] for row in history) == history[r["best_epoch"] - 1]["val"]
    assert 0 <= r["test"] <= 1 and r["samples_per_second"] > 0 and r["direction"] == "min"
    args = json.loads((folder / "args.json").read_text())
    assert args["lr"] is not None and args["scale"] == "tiny"
    assert any(name.startswith("gate") for name in weights(folder))
    assert {name.split(".")[0] for name in load_file(folder / "best.safetensors")} == {"embedder", "encoder", "predictor"}


@pytest.mark.parametrize("mode", ["naive", "scratch", "frozen", "warmup", "probe"])
def test_each_baseline_learns_and_trains_what_it_says(tmp_path, mode):
    import common

    here("finetune.py", *SHORT, "--mode", mode, *(["--warmup-share", 1] if mode == "warmup" else []), out=tmp_path)
    folder = tmp_path / f"spherical-{mode}-tiny-swin-s0-toy"
    assert rows(folder)[-1]["loss"] < rows(folder)[0]["loss"]
    assert result(folder)["method"] == mode and result(folder)["source"] is None
    after, source = weights(folder), common.load_source("tiny-swin")
    before = {f"encoder.{k}": v for k, v in source.encoder.state_dict().items()}
    before |= {f"embedder.{k}": v for k, v in source.embedder.state_dict().items()}
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    parameters = {f"encoder.{k}" for k, _ in source.encoder.named_parameters()} | {
        k for k in before if k.startswith("embedder")
    }
    body = {name for name in parameters if any(part in name for part in ("qkv", "attn.proj", "mlp"))}
    expected = {"naive": parameters, "scratch": parameters, "frozen": parameters - body, "probe": set()}
    expected["warmup"] = {name for name in parameters if name.startswith("embedder")}  # all three epochs are warm-up here
    assert changed == expected[mode]


def test_as_released_runs_both_phases(tmp_path, capsys):
    here("pare.py", *SHORT, "--as-released", out=tmp_path)  # the gate trains in the first epoch only
    assert "lambda = k/N" in capsys.readouterr().out
    ks = [row["k"] for row in rows(tmp_path / "spherical-pare-tiny-swin-s0-toy")]
    assert ks == [41, int(41 - 31 / 3), int(41 - 31 * 2 / 3)]  # 10 of 64 is the released 500 of 3136


def test_cifar100_trains_with_its_own_augmentation_and_optimizer(tmp_path):
    options = ["--task", "cifar100", "--optimizer", "sgd", "--lr", 0.05, "--accumulate", 3]
    here("pare.py", *SHORT, *options, out=tmp_path)
    history = rows(tmp_path / "cifar100-pare-tiny-swin-s0-toy")
    assert history[-1]["loss"] < history[0]["loss"]


# ---- killed, resumed, continued


def test_killed_in_the_middle_and_resumed_is_bit_identical(script, uninterrupted, tmp_path):
    command = [sys.executable, str(ROOT / "pare.py"), *map(str, SHORT + NOISE), "--out-dir", str(tmp_path)]
    folder = tmp_path / "spherical-pare-tiny-swin-s0-toy"
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "result.json").exists() and 1 <= len(rows(folder)) < 3
    assert "resumed after epoch" in script("pare.py", *SHORT, *NOISE, "--resume", out=tmp_path)
    whole = uninterrupted[1]
    assert rows(folder) == rows(whole)
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(folder)[name]), name
    assert result(folder)["test"] == result(whole)["test"]


def test_a_finished_run_is_neither_repeated_nor_overwritten(script, uninterrupted):
    folder = uninterrupted[1]
    before = (folder / "result.json").read_bytes()
    error = script("pare.py", *SHORT, *NOISE, out=folder.parent, code=2)
    assert "holds a finished run" in error and len(error.splitlines()) == 2
    assert "finished before" in script("pare.py", *SHORT, *NOISE, "--resume", out=folder.parent)
    assert "gate_noise was 1.0, now 0.0" in script("pare.py", *SHORT, "--resume", out=folder.parent, code=2)
    assert (folder / "result.json").read_bytes() == before


def test_a_checkpoint_of_another_run_is_refused(script, uninterrupted, tmp_path):
    said = script("finetune.py", *SHORT[:-1], 1, out=tmp_path)
    folder = tmp_path / "spherical-naive-tiny-swin-s0-toy"
    assert "toy data" in said
    (folder / "result.json").unlink()
    (folder / "last.pt").write_bytes((uninterrupted[1] / "last.pt").read_bytes())
    error = script("finetune.py", *SHORT[:-1], 1, "--resume", out=tmp_path, code=2)
    assert "is no checkpoint of this run" in error and "spherical-pare" in error
    (folder / "last.pt").write_bytes((uninterrupted[1] / "last.pt").read_bytes()[:5000])
    assert "is no checkpoint of this run" in script("finetune.py", *SHORT[:-1], 1, "--resume", out=tmp_path, code=2)


# ---- the house


def sections(method):
    """(common fields of Args, main without the lines and blocks that are marked as the method's)."""
    text = (ROOT / f"{method}.py").read_text()
    fields = text[text.index("    # ---- the same in every method file") : text.index(f"    # ---- {NAMES[method]}\n")]
    main = text[text.index("def main(args):") :]
    main = re.sub(rf"    # ---- {NAMES[method]}:.*?(?=    # ---- )", "", main, flags=re.S)
    return fields, [line for line in main.splitlines() if f"# {NAMES[method]}" not in line and line.strip()]


NAMES = {"pare": "PaRe", "orca": "ORCA", "mona": "MoNA", "finetune": "finetune"}


@pytest.mark.parametrize("method", [m for m in METHODS if m != "pare"])
def test_the_loop_is_the_same_text_in_every_method_file(method):
    fields, main = sections(method)
    fields_pare, main_pare = sections("pare")
    assert fields == fields_pare
    assert main == main_pare, "\n".join(difflib.unified_diff(main_pare, main, lineterm=""))


@pytest.mark.parametrize("file", ["pde.py", "common.py", "data.py", *(f"{m}.py" for m in METHODS)])
def test_a_file_imports_only_what_the_house_allows(file):
    allowed = {"pde.py": set(), "data.py": {"pde"}, "common.py": {"data"}}.get(file, {"common", "data"})
    imported = set(re.findall(r"^\s*(?:import|from) (\w+)", (ROOT / file).read_text(), flags=re.M))
    assert imported & {path.stem for path in ROOT.glob("*.py")} <= allowed
