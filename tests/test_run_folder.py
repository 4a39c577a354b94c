"""Run folders whose files are missing or damaged, results that are not finite, launchers, paths with ~, ASCII terminals."""

import importlib
import io
import json
import math
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import tyro
from helpers import METHODS, ROOT, here, result, weights
from official import write_satellite
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import backbones
import cli
import data
import run

SMALL = ["--task", "spherical", "--scale", "tiny", "--n-train", 32, "--batch-size", 16]
PROBE = ["finetune.py", *SMALL, "--mode", "probe", "--epochs", 2]
MONA = ["mona.py", *SMALL, "--meta-epochs", 1, "--epochs", 1]
FILES = ["args.json", "best.safetensors", "last.pt", "metrics.jsonl", "result.json", "stage1.safetensors"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two finished runs, of one stage and of two: name -> (command, folder)."""
    out = tmp_path_factory.mktemp("finished")
    for command in (PROBE, MONA):
        here(*command, out=out)
    folders = [next(out.glob(f"spherical-{name}-*")) for name in ("probe", "mona")]
    return {"probe": (PROBE, folders[0]), "mona": (MONA, folders[1])}


def copy(finished, out, name, *removed):
    """(command, a copy of the folder of a finished run without some of its files)"""
    command, folder = finished[name]
    shutil.copytree(folder, out / folder.name)
    for file in removed:
        (out / folder.name / file).unlink()
    return command, out / folder.name


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def damage(path, how):
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "cut short": content[: len(content) * 2 // 3], "first bytes": content[:5]}[how])


class Split:
    """All that Run.start asks of a data.Split."""

    def __init__(self, origin, n):
        self.kind, self.n, self.x, self.y, self.device = origin, n, None, None, "cpu"

    def rows(self, part, index):
        return torch.zeros(len(index))

    def __len__(self):
        return self.n


def start(finished, out, name, *options):
    """Run.start of the command of a finished run, without its model and its data."""
    (script, *arguments), folder = finished[name]
    module = importlib.import_module(script.removesuffix(".py"))
    before = json.loads((folder / "args.json").read_text())
    options = [*map(str, arguments), *options, "--data-dir", str(out / "none"), "--out-dir", str(out)]
    args = tyro.cli(module.Args, args=options)
    splits = map(Split, before["data"], before["samples"])
    return run.Run(args, getattr(args, "mode", script.removesuffix(".py"))).start(*splits)


# ---- files that are missing or damaged


@pytest.mark.parametrize("how", ["missing", "empty", "cut short", "first bytes"])
@pytest.mark.parametrize("name", ["probe", "mona"])
@pytest.mark.parametrize("state", ["finished", "unfinished"])
def test_damage_is_noticed_at_the_start(finished, tmp_path, capsys, state, name, how):
    """Unfinished: killed after the last epoch, before the test."""
    for file in FILES:
        out = tmp_path / file
        _, folder = copy(finished, out, name, *(["result.json"] if state == "unfinished" else []))
        if not (folder / file).exists():
            continue
        damage(folder / file, how)
        if how == "missing" and (file in ("result.json", "metrics.jsonl") or (state == "finished" and file != "args.json")):
            finished_still = state == "finished" and file != "result.json"
            assert start(finished, out, name, "--resume") is not finished_still
            assert ("finished before" in capsys.readouterr().out) is finished_still
            continue
        before = content(folder)
        for options in ([], ["--resume"]):
            with pytest.raises(cli.UserError) as error:
                start(finished, out, name, *options)
            message = str(error.value)
            assert f"{folder / file} is {'missing' if how == 'missing' else 'empty'}" in message
            assert len(message.splitlines()) == 2
        assert content(folder) == before


def test_damage_costs_two_lines_before_anything_trains(finished, tmp_path, monkeypatch):
    """The best checkpoint, which is read after all the training, and the first stage, which would train again."""
    for name, file in (("probe", "best.safetensors"), ("mona", "stage1.safetensors")):
        command, folder = copy(finished, tmp_path, name, "result.json", file)
        monkeypatch.setattr(run.Run, "distribute", None)
        with pytest.raises(cli.UserError, match=f"{file} is missing"):
            here(*command, "--resume", out=tmp_path)


def test_a_missing_history_and_result_are_written_again(finished, tmp_path):
    command, folder = copy(finished, tmp_path, "mona", "metrics.jsonl", "result.json")
    here(*command, "--resume", out=tmp_path)
    whole = finished["mona"][1]
    assert (folder / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    assert result(folder)["test"] == result(whole)["test"]
    assert all(torch.equal(value, weights(folder)[key]) for key, value in weights(whole).items())


def test_a_run_killed_in_its_first_epoch_may_start_over(finished, tmp_path):
    """best.safetensors is written before last.pt: without it, the epoch has not ended."""
    copy(finished, tmp_path, "probe", "metrics.jsonl", "result.json", "last.pt")
    assert start(finished, tmp_path, "probe") is True


def test_a_best_epoch_that_the_checkpoint_does_not_know_is_repeated(finished, tmp_path, monkeypatch):
    """Killed between best.safetensors and last.pt, where the repeated epoch may differ in rounding: it counts as the best."""
    command, folder = copy(finished, tmp_path, "probe", "result.json")
    state = torch.load(folder / "last.pt", weights_only=True)
    kept = load_file(folder / "best.safetensors")
    epochs = len(state["history"])
    save_file(kept, folder / "best.safetensors", {"epoch": str(epochs)})
    torch.save(state | {"history": state["history"][:-1], "best": -1.0, "best_epoch": 1}, folder / "last.pt")
    here(*command, "--resume", out=tmp_path)
    assert result(folder)["best_epoch"] == epochs
    save_file(kept, folder / "best.safetensors", {"epoch": "1"})
    (folder / "result.json").unlink()
    torch.save(state | {"history": state["history"][:-1], "best": -1.0, "best_epoch": 1}, folder / "last.pt")
    here(*command, "--resume", out=tmp_path)
    assert result(folder)["best_epoch"] == 1


def test_a_checkpoint_that_lacks_a_part_is_refused(finished, tmp_path):
    command, folder = copy(finished, tmp_path, "probe", "result.json")
    state = torch.load(folder / "last.pt", weights_only=True)
    for other in ({k: v for k, v in state.items() if k != "history"}, [1], state | {"net": {}}):
        torch.save(other, folder / "last.pt")
        with pytest.raises(cli.UserError, match="not a checkpoint of this run"):
            here(*command, "--resume", out=tmp_path)
    command, folder = copy(finished, tmp_path, "mona", "result.json", "last.pt", "metrics.jsonl")
    kept = load_file(folder / "stage1.safetensors")
    (folder / "stage1.safetensors").write_bytes(run.to_safetensors(kept, {"rows": "["}))
    with pytest.raises(cli.UserError, match="not a first stage of this run"):
        here(*command, "--resume", out=tmp_path)


# ---- results that are not finite


@pytest.mark.parametrize("last", [False, True])
def test_a_test_error_that_is_not_finite_is_no_result(finished, tmp_path, monkeypatch, last):
    """Of the last epoch, or of the best one."""
    command, folder = copy(finished, tmp_path, "probe", "result.json")
    state = torch.load(folder / "last.pt", weights_only=True)
    torch.save(state | {"best_epoch": 1}, folder / "last.pt")
    errors = iter([math.inf, 0.5] if last else [0.5, math.nan])
    monkeypatch.setattr(run.Run, "evaluate", lambda *_: next(errors))
    with pytest.raises(
        cli.UserError, match=r"the error on test is (nan|0.5) \(epoch 1\) and (0.5|inf) \(last epoch\)"
    ) as error:
        here(*command, "--resume", out=tmp_path)
    assert len(str(error.value).splitlines()) == 2 and not (folder / "result.json").exists()


def test_predictions_that_are_not_finite_have_no_score(finished, tmp_path, monkeypatch):
    """argmax of NaN is a class: a model of NaN would be right in one case of 100."""
    command, folder = copy(finished, tmp_path, "probe", "result.json")
    state = torch.load(folder / "last.pt", weights_only=True)
    for value in state["net"].values():
        value.fill_(math.nan)
    torch.save(state | {"best_epoch": 2}, folder / "last.pt")
    with pytest.raises(cli.UserError, match="the error on test is nan"):
        here(*command, "--resume", out=tmp_path)


def test_results_are_json(finished):
    def refuse(token):
        raise AssertionError(token)

    for _, folder in finished.values():
        for file in ("result.json", "args.json"):
            json.loads((folder / file).read_text(), parse_constant=refuse)


# ---- launchers


@pytest.mark.parametrize(
    "given, words",
    [
        ({"WORLD_SIZE": "2"}, "RANK is not set, WORLD_SIZE is 2"),
        ({"RANK": "1"}, "RANK is 1, WORLD_SIZE is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, "MASTER_PORT is not set"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, "RANK is 2, WORLD_SIZE is 2"),
        ({"RANK": "x", "WORLD_SIZE": "1"}, "RANK is x"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is two"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE is -1"),
    ],
)
def test_an_incomplete_launcher_environment_is_refused_in_one_line(tmp_path, monkeypatch, given, words):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    stdout = sys.stdout
    with pytest.raises(cli.UserError, match=words) as error:
        here(*PROBE, out=tmp_path)
    assert len(str(error.value).splitlines()) == 1 and "torchrun" in str(error.value)
    assert sys.stdout is stdout and not list(tmp_path.iterdir())


@pytest.mark.parametrize("given", [{}, {"WORLD_SIZE": "1"}, {"RANK": "0"}, {"MASTER_ADDR": "node1"}, {"RANK": ""}])
def test_a_single_process_needs_no_launcher(monkeypatch, given):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert run.torchrun() == (0, 1, 0)


# ---- the command line


def command_line(monkeypatch, module, *options):
    module = importlib.import_module(module)
    monkeypatch.setattr(sys, "argv", ["x.py", *options])
    return cli.command_line(module.Args, module.__doc__)


def test_a_tilde_in_a_path_is_the_home_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    args = command_line(monkeypatch, "pare", "--data-dir=~/d", "--out-dir=~", "--backbone=~/b")
    assert (args.data_dir, args.out_dir, args.backbone) == (f"{tmp_path}/d", str(tmp_path), f"{tmp_path}/b")
    assert command_line(monkeypatch, "data", "--data-dir=~/d").data_dir == f"{tmp_path}/d"
    assert command_line(monkeypatch, "pare", "--data-dir=a~b").data_dir == "a~b"


@pytest.mark.parametrize("value", ["inf", "nan", "0", "-1"])
def test_a_rate_must_be_positive_and_finite(monkeypatch, capsys, value):
    with pytest.raises(SystemExit) as stop:
        command_line(monkeypatch, "pare", "--lr", value)
    assert stop.value.code == 2 and "must be positive" in capsys.readouterr().err


def test_help_and_the_table_of_tasks_in_an_ascii_terminal(monkeypatch):
    scripts = [*(ROOT / f"{method}.py" for method in METHODS), ROOT / "data.py", *sorted((ROOT / "tools").glob("*.py"))]
    scripts = [script for script in scripts if "__main__" in script.read_text()]
    assert {script.stem for script in scripts} >= {*METHODS, "data", "bench", "pretrain", "figures", "reproduce"}
    for script in scripts:
        for options in [["--help"], []] if script.stem == "data" else [["--help"]]:
            terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
            monkeypatch.setattr(sys, "stdout", terminal)
            monkeypatch.setattr(sys, "argv", [str(script), *options])
            try:
                runpy.run_path(str(script), run_name="__main__")
            except SystemExit as stop:
                assert not stop.code, script
            terminal.flush()
            assert ("--help" if options else "spherical") in terminal.buffer.getvalue().decode("ascii"), script


# ---- one run, one process, one data set


def test_a_second_process_does_not_write_to_the_folder_of_a_run(tmp_path):
    folder = tmp_path / "spherical-probe-tiny-swin-s0-toy"
    folder.mkdir()
    code = f"import fcntl; f = open({str(folder / '.lock')!r}, 'w'); fcntl.lockf(f, 2); print(1, flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(cli.UserError, match="another process is training this run"):
            here(*PROBE, out=tmp_path)
        assert [path.name for path in folder.iterdir()] == [".lock"]
        other.communicate(b"\n")
    (folder / "last.pt.1.part").write_bytes(b"half, of a killed process")
    here(*PROBE, out=tmp_path)
    assert (folder / "result.json").exists() and not list(folder.glob("*.part"))


def test_other_data_of_the_same_size_are_noticed(tmp_path):
    command = ["finetune.py", "--task", "satellite", "--scale", "tiny", "--mode", "probe", "--epochs", 1, "--batch-size", 8]
    (tmp_path / "none").mkdir()
    write_satellite(tmp_path / "none")
    here(*command, out=tmp_path)
    (folder,) = tmp_path.glob("satellite-*")
    (folder / "result.json").unlink()
    here(*command, "--resume", out=tmp_path)  # the same data
    (folder / "result.json").unlink()
    write_satellite(tmp_path / "none")  # drawn anew
    with pytest.raises(cli.UserError, match=r"checksums was \["):
        here(*command, "--resume", out=tmp_path)
    options = json.loads((folder / "args.json").read_text())
    del options["checksums"]  # as an earlier version wrote it
    (folder / "args.json").write_text(json.dumps(options))
    here(*command, "--resume", out=tmp_path)


@pytest.mark.parametrize("name", ["a path", "tiny-mine"])
def test_another_backbone_in_the_same_file_is_noticed(name, tmp_path, monkeypatch):
    monkeypatch.setattr(backbones, "WEIGHTS", tmp_path)  # the folder of the backbones of this project
    backbone = tmp_path / "tiny-mine.safetensors"
    shutil.copy(ROOT / "weights/tiny-roberta.safetensors", backbone)
    command = ["finetune.py", "--task", "satellite", "--mode", "probe", "--n-train", 40, "--epochs", 1]
    command += ["--backbone", backbone if name == "a path" else name]
    here(*command, "--scale", "tiny", out=tmp_path)
    here(*command, "--scale", "tiny", "--resume", out=tmp_path)
    weights = load_file(backbone)
    with safe_open(backbone, "pt") as file:
        about = file.metadata()
    save_file({name: weight + 1 for name, weight in weights.items()}, backbone, about)
    with pytest.raises(cli.UserError, match=r"weights was \["):
        here(*command, "--scale", "tiny", "--resume", out=tmp_path)
    (options,) = tmp_path.glob("satellite-*/args.json")
    options.write_text(json.dumps(json.loads(options.read_text()) | {"weights": []}))  # as an earlier version wrote it
    here(*command, "--scale", "tiny", "--resume", out=tmp_path)


@pytest.mark.parametrize("change", ["first input", "last target"])
def test_a_checksum_sees_all_targets(change):
    x, y = torch.randn(40, 1, 46).numpy(), torch.arange(40).numpy() % 24
    split = lambda: data.Split(x.copy(), y.copy(), 24, "official", data.TASKS["satellite"], "cpu")
    before = run.checksum(split())
    assert run.checksum(split()) == before
    if change == "first input":
        x[0, 0, 0] += 1
    else:
        y[-1] += 1
    assert run.checksum(split()) != before


def test_a_task_of_ones_own_may_hold_numbers_of_numpy(tmp_path):
    task = replace(data.TASKS["cifar100"], output=(np.int64(5),), mean=tuple(np.float32([0.5, 0.4, 0.3])), std=np.ones(3))
    x, y = np.zeros((8, 3, 32, 32), np.uint8), np.arange(8) % 5
    loaded = data.Loaded(task, *[data.Split(x, y, 5, "official", task, "cpu")] * 3)
    best = tmp_path / "best.safetensors"
    run.Run.write_best(SimpleNamespace(best_file=best, folder=tmp_path), {"w": torch.ones(1)}, task=data.remember(loaded))
    with safe_open(best, "pt") as file:
        task = data.recall("cifar100", json.loads(file.metadata()["task"]))
    assert task.output == (5,) and task.mean == pytest.approx((0.5, 0.4, 0.3)) and task.std == (1.0, 1.0, 1.0)
