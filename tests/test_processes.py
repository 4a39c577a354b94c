"""The same result however the work is cut, and what a mistake costs: subprocesses, toy data, the tiny backbone."""

import errno
import subprocess
import sys
import time

import pytest
import torch
from conftest import METHODS, ROOT, SHORT, here, result, rows, weights

import cli

# ---- the same result however the work is cut

SGD = [
    "--task",
    "spherical",
    "--scale",
    "tiny",
    "--n-train",
    160,
    "--epochs",
    1,
    "--optimizer",
    "sgd",
    "--lr",
    0.05,
    "--clip",
    0,
]


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_and_accumulation_give_the_weights_of_one(script, tmp_path, method):
    ways = {"one": [], "two": [], "accumulated": ["--batch-size", 16, "--accumulate", 2]}
    if method == "mona":
        del ways["accumulated"]  # a micro-batch is a step of its stage 1
    for way, options in ways.items():
        if way == "two":
            script(f"{method}.py", *SGD, *options, out=tmp_path / way, processes=2)
        else:
            here(f"{method}.py", *SGD, *options, out=tmp_path / way)
    name = f"spherical-{'naive' if method == 'finetune' else method}-tiny-swin-s0-toy"
    one = weights(tmp_path / "one" / name)
    start = weights_before(method)
    for way in list(ways)[1:]:
        other = weights(tmp_path / way / name)
        assert rows(tmp_path / way / name)[-1]["val"] == pytest.approx(rows(tmp_path / "one" / name)[-1]["val"], abs=0.01)
        for key, value in one.items():
            assert torch.allclose(value, other[key], atol=2e-5), (way, key)
    moved = sum((one[key] - value).abs().sum().item() for key, value in start.items() if key in one)
    assert moved > 1  # the weights that agree have left their start


def test_two_processes_may_leave_parameters_unused(script, tmp_path):
    """PaRe's gate once k is 0, and all but the embedder in the warm-up, have no gradient to average."""
    script("pare.py", *SGD[:-2], "--clip", 1, "--epochs", 2, "--k-begin", 0.02, out=tmp_path, processes=2)
    assert [row["k"] for row in rows(tmp_path / "spherical-pare-tiny-swin-s0-toy")] == [1, 0]
    options = ["--mode", "warmup", "--warmup-share", 0.5, "--epochs", 2, "--batch-size", 16, "--accumulate", 2]
    here("finetune.py", *SGD, *options, out=tmp_path / "one")
    script("finetune.py", *SGD, *options, out=tmp_path / "two", processes=2)
    one, two = (weights(tmp_path / way / "spherical-warmup-tiny-swin-s0-toy") for way in ("one", "two"))
    assert all(torch.allclose(value, two[key], atol=2e-5) for key, value in one.items())


def weights_before(method):
    import common

    prefix = "model." if method == "pare" else ""
    return {f"{prefix}encoder.{k}": v for k, v in common.load_source("tiny-swin").encoder.named_parameters()}


# ---- mistakes


@pytest.mark.parametrize(
    "options, words",
    [
        (["--task", "spherica"], "perhaps spherical"),
        (["--epochs", "0"], "must be positive"),
        (["--k-begin", "41"], "must lie between 0 and 1"),
        (["--backbone", "swin_bse"], "no model is called"),
        (["--scale", "full", "--backbone", "tiny-swin"], "python data.py --prepare spherical"),
        (["--lr", "1e30", "--clip", "0", "--n-train", "320"], "lower --lr"),
    ],
)
def test_a_mistake_costs_two_lines_and_exit_code_2(script, tmp_path, options, words):
    error = script("pare.py", *options, *([] if "--scale" in options else ["--scale", "tiny"]), out=tmp_path, code=2)
    lines = [line for line in error.splitlines() if "%|" not in line]  # without the progress bar
    assert words in error and len(lines) <= 2 and "Traceback" not in error
    assert not list(tmp_path.glob("*/result.json"))


def test_an_unknown_option_is_answered_with_the_nearest(script, tmp_path):
    assert "--task" in script("pare.py", "--tsk", "spherical", out=tmp_path, code=2)


@pytest.mark.parametrize("method", METHODS)
def test_help_and_a_mistyped_task_answer_at_once(method):
    for options, code in ((["--help"], 0), (["--task", "spherica"], 2)):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, ROOT / f"{method}.py", *options], capture_output=True, text=True)
        assert done.returncode == code and time.perf_counter() - start < 2


def test_neither_git_nor_a_compiler_is_needed(script, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    script("finetune.py", *SHORT, "--mode", "probe", out=tmp_path)
    assert result(tmp_path / "spherical-probe-tiny-swin-s0-toy")["commit"] is None
    assert "needs a C++ compiler" in script("finetune.py", *SHORT, "--compile", out=tmp_path / "compiled", code=2)


def test_no_room_on_the_disk_is_said_and_nothing_is_lost(script, tmp_path):
    folder = tmp_path / "spherical-naive-tiny-swin-s0-toy"
    folder.mkdir(parents=True)
    (folder / "last.pt.part").symlink_to("/dev/full")
    error = script("finetune.py", *SHORT, out=tmp_path, code=2)
    assert "no space left" in error and "last.pt" in error and "Traceback" not in error
    script("finetune.py", *SHORT, "--resume", out=tmp_path)  # the disk has room again


def test_a_run_that_diverges_is_told_and_keeps_nothing(tmp_path):
    wild = ["--task", "advection1d", "--scale", "tiny", "--n-train", 32, "--epochs", 1, "--clip", 0]
    with pytest.raises(cli.UserError, match="the error on validation is nan"):  # after its last step
        here("finetune.py", *wild, "--lr", 1e30, out=tmp_path)
    with pytest.raises(cli.UserError, match="Lower --embedder-lr"):
        here("orca.py", *wild, "--embedder-lr", 1e30, "--objective", "mmd", "--embedder-epochs", 3, out=tmp_path)
    assert not [*tmp_path.glob("*/last.pt"), *tmp_path.glob("*/stage1.safetensors")]


def test_a_forbidden_folder_costs_two_lines(capsys):
    def forbidden():
        raise PermissionError(errno.EACCES, "Permission denied", "/somewhere")

    with pytest.raises(SystemExit) as stop:
        cli.guarded(forbidden)
    assert stop.value.code == 2 and "/somewhere: Permission denied" in capsys.readouterr().err
