"""What the tests share besides the fixtures of conftest.py, and what they change so that a run takes a second."""

import importlib
import json
import multiprocessing
import os

import numpy as np
import torch
import tyro
from conftest import ROOT  # which puts the project on the path

import data
import plots

__all__ = ["DRAWN", "METHODS", "NAIVE", "NOISE", "PARE", "ROOT", "SHORT", "ended", "fork", "here", "result", "rows", "score",
           "two_runs", "weights"]  # fmt: skip
METHODS = ["pare", "orca", "mona", "recraft", "contrast", "lsg", "finetune"]
SHORT = ["--task", "spherical", "--scale", "tiny", "--n-train", 64, "--epochs", 3]
NOISE = ["--gate-noise", 1]  # random numbers that a resumed run has to draw again

torch.set_num_threads(1)
data.TOY_TEST = 100  # toy images to test on: 500 take longer than the training
data.TINY_STEPS = dict.fromkeys(data.TINY_STEPS, 2)  # optimizer steps in an epoch
DRAWN = {name: getattr(plots, name) for name in ("curves", "predictions", "replaced")}
for name in DRAWN:  # drawing takes a third of a short run; test_plots.py tests it
    setattr(plots, name, lambda *_: b"a picture")


def here(name, *command, out):
    """Like the fixture `script`, but without the command line: calls `main`, so that a UserError is raised, not printed."""
    module = importlib.import_module(name.removesuffix(".py"))
    options = [*map(str, command), "--data-dir", str(out / "none"), "--out-dir", str(out)]
    return module.main(tyro.cli(module.Args, args=options))


PARE, NAIVE = "cifar100-pare-tiny-swin-s0-toy", "cifar100-naive-tiny-swin-s0-toy"


def two_runs(out):
    """The folders PARE and NAIVE in `out`: toy runs of PaRe and of naive fine-tuning."""
    few = ["--task", "cifar100", "--scale", "tiny", "--n-train", 64, "--epochs", 2]
    here("pare", *few, out=out)
    here("finetune", *few, out=out)


def fork(function, *arguments, before=lambda: None, **environment):
    """A process that runs `function`, a copy of this one: a new one would take ten seconds for its imports."""

    def work():
        os.environ.update({name: str(value) for name, value in environment.items()})
        before()
        function(*arguments)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def ended(process):
    process.join(300)
    assert process.exitcode == 0


def result(folder):
    return json.loads((folder / "result.json").read_text())


def weights(folder):
    return torch.load(folder / "last.pt", weights_only=True)["net"]


def rows(folder):
    """metrics.jsonl without the times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in lines]


def score(task, answers, y):
    """The error of what `predict` answers: its probabilities are taken back to logits, fields count as they are."""
    p = answers.astype(np.float64)
    with np.errstate(divide="ignore"):
        if task.target == "class":
            return task.score(np.log(p), y)
        if task.target == "labels" or task.name == "cosmic":
            return task.score(np.log(p) - np.log1p(-p), y)
    return data.TASKS[task.name].score(answers, y)
