"""Mistakes on the command line cost two lines and exit code 2."""

import errno
import subprocess
import sys
import time

import pytest
from conftest import METHODS, ROOT

import cli


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


def test_a_forbidden_folder_costs_two_lines(capsys):
    def forbidden():
        raise PermissionError(errno.EACCES, "Permission denied", "/somewhere")

    with pytest.raises(SystemExit) as stop:
        cli.guarded(forbidden)
    assert stop.value.code == 2 and "/somewhere: Permission denied" in capsys.readouterr().err
