"""Mistakes on the command line print at most two lines and exit with code 2."""

import errno
import importlib
import os
import subprocess
import sys
from typing import get_args, get_type_hints

import pytest
from helpers import METHODS, ROOT, here

import cli


@pytest.mark.parametrize(
    "options, words",
    [
        (["--task", "spherica"], "perhaps spherical"),
        (["--epochs", "0"], "must be positive"),
        (["--k-begin", "41"], "must lie between 0 and 1"),
        (["--backbone", "swin_bse"], "no model is called"),
        (["--scale", "full", "--backbone", "tiny-swin"], "python data.py --prepare spherical"),
        (["--lr", "1e30", "--clip", "0", "--n-train", "96"], "lower --lr"),
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
def test_help_and_a_mistyped_task_are_answered_by_every_method(script, tmp_path, method):
    said = script(f"{method}.py", "--help", out=tmp_path)
    fields = importlib.import_module(method).Args.__dataclass_fields__
    assert len(fields) > 20 and all(f"--{cli.option(name)}" in said for name in fields)
    assert "perhaps spherical" in script(f"{method}.py", "--task", "spherica", out=tmp_path, code=2)


@pytest.mark.parametrize("method", METHODS)
def test_every_number_of_a_method_has_bounds(method):
    hints = get_type_hints(importlib.import_module(method).Args)
    numbers = {name for name, kind in hints.items() if {int, float} & {kind, *get_args(kind)}}
    assert len(numbers) > 10 and numbers <= {*cli.POSITIVE, *cli.LARGEST}, numbers - {*cli.POSITIVE, *cli.LARGEST}


def test_numbers_out_of_bounds_cost_a_line(script, tmp_path):
    for name, value in (
        ("align-samples", -1),
        ("label-samples", 0),
        ("label-lr", 0),
        ("label-epochs", -2),
        ("align-epochs", -1),
    ):
        said = script("recraft.py", f"--{name}={value}", out=tmp_path, code=2)
        assert f"--{name} {value}" in said and len(said.splitlines()) == 1


def test_a_process_ends_with_exit_code_2_two_lines_and_no_import_that_takes_seconds(tmp_path):
    command = [sys.executable, "-X", "importtime", ROOT / "pare.py", "--task", "spherica"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    lines = done.stderr.splitlines()
    imported = {line.split("|")[-1].strip() for line in lines if line.startswith("import time:")}
    said = [line for line in lines if not line.startswith("import time:")]
    assert done.returncode == 2 and len(said) <= 2 and "perhaps spherical" in said[0] and not done.stdout
    assert "torch" in imported and not imported & {"timm", "transformers", "sklearn", "matplotlib", "ot"}


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENAMETOOLONG])
def test_a_forbidden_folder_costs_two_lines(capsys, number):
    def forbidden():
        raise OSError(number, os.strerror(number), "/somewhere")

    with pytest.raises(SystemExit) as stop:
        cli.guarded(forbidden)
    assert stop.value.code == 2 and f"/somewhere: {os.strerror(number)}.\nCheck its permissions" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [PermissionError, FileNotFoundError])
def test_a_library_may_set_no_file_name(capsys, kind):
    def forbidden():
        raise kind("unable to open x.h5")  # as h5py and safetensors do

    with pytest.raises(SystemExit) as stop:
        cli.guarded(forbidden)
    assert stop.value.code == 2 and "unable to open x.h5.\nCheck the permissions" in capsys.readouterr().err


def test_an_option_of_several_numbers_needs_one(script, tmp_path):
    assert "--sigmas needs at least one number" in script("contrast.py", "--sigmas", out=tmp_path, code=2)


def test_full_memory_costs_two_lines_and_other_errors_are_shown(capsys):
    class OutOfMemoryError(RuntimeError):
        pass

    def raises(error):
        raise error

    with pytest.raises(SystemExit) as stop:
        cli.guarded(raises, OutOfMemoryError("CUDA out of memory"))
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "out of GPU memory.\nHalve --batch-size and double --accumulate" in said
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")):
        with pytest.raises(SystemExit):
            cli.guarded(raises, error)
        assert "out of memory.\nHalve --batch-size" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="another"):
        cli.guarded(raises, RuntimeError("another"))


def test_a_batch_larger_than_the_training_set_is_refused(tmp_path):
    options = ["--task", "satellite", "--scale", "tiny", "--n-train", 80, "--epochs", 1]
    with pytest.raises(cli.UserError, match="--batch-size 1,000,000 is more than the 80 training samples"):
        here("finetune.py", *options, "--batch-size", 10**6, out=tmp_path)  # it would take 20 GB
    assert not list(tmp_path.iterdir())


def test_an_empty_folder_name_is_refused(script, tmp_path):
    assert "--data-dir is empty" in script("pare.py", "--data-dir", "", out=tmp_path, code=2)


@pytest.mark.parametrize("buffered", ["", "1"])
def test_a_closed_pipe_ends_quietly(buffered):
    code = "import cli, time; cli.guarded(lambda: [time.sleep(1), print('x' * 3000)])"
    command = f"PYTHONUNBUFFERED={buffered} {sys.executable} -c {code!r} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (141, "", "")


@pytest.mark.parametrize("stream", [1, 2])
def test_a_closed_stream_changes_nothing_else(stream, tmp_path):
    code = "import cli, sys; cli.command_line(cli.Args, 'doc'); print('out'); print('err', file=sys.stderr)"
    command = f"{sys.executable} -c {code!r} --task spherical {stream}>&-"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == ((0, "", "err\n") if stream == 1 else (0, "out\n", ""))


def test_a_broken_connection_is_shown():
    with pytest.raises(BrokenPipeError):  # stdout is open
        cli.guarded(lambda: exec("raise BrokenPipeError(32, 'of a server')"))
