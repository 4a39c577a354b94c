"""--track: TensorBoard and W&B get the numbers of metrics.jsonl, the arguments and the result; nothing else changes.

Neither package is needed: modules made here note what they are given.
"""

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from helpers import here, result, rows, weights

import cli
import plots
import run

MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}
SMALL = ["finetune.py", "--task", "satellite", "--scale", "tiny", "--n-train", 16, "--mode", "probe", "--steps-per-epoch", 1,
         "--batch-size", 8, "--epochs", 3]  # fmt: skip
FOLDER = "satellite-probe-tiny-roberta-s0-toy"


@pytest.fixture
def given(monkeypatch):
    """What both packages are given, one entry for each record that begins; `given.step`: the next step of W&B's record."""
    noted = SimpleNamespace(records=[], step=0)

    class Record:
        def __init__(self, folder, arguments=None):
            self.folder, self.arguments, self.rows, self.result, self.open = folder, arguments, {}, {}, True
            noted.records.append(self)

    class SummaryWriter(Record):
        def __init__(self, folder):
            super().__init__(folder)
            folder.mkdir(exist_ok=True)
            (folder / f"events.out.tfevents.{len(noted.records)}").touch()

        def add_text(self, name, text):
            setattr(self, {"args": "arguments"}.get(name, name), json.loads(text))

        def add_scalar(self, name, value, step):
            assert name not in self.rows.setdefault(step, {})
            self.rows[step][name] = value

        def flush(self):
            pass

        def close(self):
            self.open = False

    class Run(Record):
        step = property(lambda self: noted.step)
        summary = property(lambda self: self.result)

        def log(self, numbers, step):
            assert step not in self.rows
            self.rows[step] = numbers

        def finish(self):
            self.open = False

    tensorboard, wandb = ModuleType("tensorboard"), ModuleType("wandb")
    tensorboard.SummaryWriter, wandb.Error = SummaryWriter, type("Error", (Exception,), {})
    wandb.init = lambda dir, name, config, resume: Run(dir / name, config) if resume == "auto" else None
    for package, module in (("tensorboard", tensorboard), ("wandb", wandb)):
        monkeypatch.setitem(sys.modules, MODULES[package], module)
    return noted


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The run without --track."""
    out = tmp_path_factory.mktemp("plain")
    here(*SMALL, out=out)
    return out / FOLDER


def stopped(monkeypatch, *options, out):
    """The run is stopped after its second epoch."""
    end_epoch = run.Run.end_epoch

    def stop(self, *arguments):
        end_epoch(self, *arguments)
        if len(self.history) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run.Run, "end_epoch", stop)
        here(*SMALL, *options, out=out)


def without_times(record):
    return [{k: v for k, v in record.rows[step].items() if k != "seconds"} for step in sorted(record.rows)]


@pytest.mark.parametrize("package", MODULES)
def test_tracked_numbers_are_those_of_the_run_which_stays_the_same(tmp_path, given, plain, package):
    here(*SMALL, "--track", package, out=tmp_path)
    folder, (record,) = tmp_path / FOLDER, given.records
    assert list(record.rows) == [1, 2, 3] and without_times(record) == rows(folder) == rows(plain)
    assert record.arguments == json.loads((folder / "args.json").read_text()) and record.arguments["track"] == package
    assert record.result == result(folder) and not record.open
    assert all(torch.equal(value, weights(plain)[name]) for name, value in weights(folder).items())
    assert folder in record.folder.parents


@pytest.mark.parametrize("package", MODULES)
def test_a_resumed_run_has_no_step_twice(tmp_path, monkeypatch, given, plain, package):
    stopped(monkeypatch, "--track", package, out=tmp_path)
    given.step = 3  # the next of W&B
    here(*SMALL, "--track", package, "--resume", out=tmp_path)
    first, second = given.records
    assert list(first.rows) == [1, 2] and second.result["test"] == result(plain)["test"]
    if package == "wandb":
        assert list(second.rows) == [3] and without_times(second) == rows(plain)[2:]
    else:  # its files are written anew
        assert without_times(second) == rows(plain)
        assert [path.name[-1] for path in second.folder.iterdir()] == ["2"]


def test_a_run_may_be_tracked_from_its_middle_on(tmp_path, monkeypatch, given, plain):
    stopped(monkeypatch, out=tmp_path)
    here(*SMALL, "--track", "wandb", "--resume", out=tmp_path)
    assert without_times(given.records[0]) == rows(plain)


@pytest.mark.parametrize("package", MODULES)
def test_rows_of_the_first_stage_come_under_their_own_names(tmp_path, given, package):
    tracker = plots.Tracker(package)
    tracker.begin(tmp_path, {})
    stage1 = [{"stage": 1, "epoch": e, "distance": 1 / e} for e in (1, 2)]
    tracker.log(stage1)
    tracker.log([*stage1, {"epoch": 1, "loss": 0.5}])
    names = {step: set(row) for step, row in given.records[0].rows.items()}
    first = {"stage1/stage", "stage1/epoch", "stage1/distance"}
    assert names == {1: first, 2: first, 3: {"epoch", "loss"}}


@pytest.mark.parametrize("package", MODULES)
def test_a_package_that_is_missing_costs_two_lines_before_anything_is_read(script, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, MODULES[package], None)
    error = script(*SMALL, "--track", package, out=tmp_path, code=2)
    assert f"pip install {package}" in error and len(error.splitlines()) == 2 and not list(tmp_path.iterdir())
    here(*SMALL[:-1], 1, out=tmp_path)  # without --track it is not imported


def test_what_wandb_refuses_costs_two_lines(tmp_path, given, monkeypatch):
    def refuse(**_):
        raise sys.modules["wandb"].Error("No API key configured.")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    with pytest.raises(cli.UserError, match="--track wandb: No API key configured.*\n.*WANDB_MODE=offline"):
        here(*SMALL, "--track", "wandb", out=tmp_path)
    assert not list(tmp_path.glob("*/last.pt"))


def test_only_the_first_process_tracks(monkeypatch, given):
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # which other processes close
    monkeypatch.setattr(run, "torchrun", lambda: (1, 1, 0))
    assert run.Run(cli.Args(scale="tiny", track="wandb"), "finetune").tracker is None
    monkeypatch.setattr(run, "torchrun", lambda: (0, 1, 0))
    assert run.Run(cli.Args(scale="tiny", track="wandb"), "finetune").tracker.package == "wandb"
