"""tools/gpu.sh goes through all its steps on a CPU, goes on after a kill, and says what is wrong."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT
from official import write_cifar100, write_pictures

STEPS = {"tests", "topk", "distance", "meta", "profile-pare", "profile-mona", "run-pare", "run-orca", "run-mona", "pretrain",
         *(f"step-{method}" for method in ("finetune", "pare", "mona", "orca"))}  # fmt: skip


def start(*options, **environment):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", str(ROOT / "tools/gpu.sh"), *map(str, options)]
    environment = os.environ | {"PATH": path} | environment
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    )


@pytest.mark.matrix
def test_all_steps_run_on_a_cpu_and_a_killed_script_goes_on(tmp_path):
    write_cifar100(tmp_path)
    write_pictures(tmp_path, 1)
    out = tmp_path / "a folder"
    options = ["--device", "cpu", "--smallest", "--data-dir", tmp_path, out]
    process = start(*options)
    while not (out / "tests.json").exists() and process.poll() is None:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = (out / "tests.json").stat().st_mtime_ns
    process = start(*options)
    said, wrong = process.communicate(timeout=900)
    assert said.splitlines()[-1] == "left: nothing" and process.returncode == 0, said + wrong
    assert (out / "tests.json").stat().st_mtime_ns == before and "tests            done" in said
    rows = {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}
    assert rows.keys() == STEPS and all(row["device"] == "cpu" and row["output"] for row in rows.values())
    assert any("| pare | fp32, eager" in line for line in rows["step-pare"]["output"])
    assert any(line.startswith("test error") for line in rows["run-mona"]["output"])


@pytest.mark.skipif(sys.platform == "win32", reason="no bash")
def test_mistakes_cost_a_line_or_two(tmp_path):
    for options, wrong in (
        (["--fast"], "no option --fast"), ([], "give a folder"), ([tmp_path], "no GPU is available"),
        ([tmp_path, "--minutes", "1.5"], "whole number"), ([tmp_path, "--data-dir", tmp_path / "a/b"], "No such file"),
    ):  # fmt: skip
        process = start(*options)
        said = process.communicate(timeout=120)[1]
        assert process.returncode == 2 and wrong in said and len(said.splitlines()) <= 2, said
