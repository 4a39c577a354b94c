"""run.py: devices, optimizer and schedule, random streams, files, resuming, a full disk."""

import errno
import functools
import json
import os
import subprocess
import sys
import time
from itertools import product
from types import SimpleNamespace

import joblib
import numpy as np
import pair
import pytest
import torch
from helpers import NOISE, SHORT, fork, here, result, rows, weights

import backbones
import cli
import common
import data
import mona
import run
from run import Run, make_optimizer, make_schedule, mean_loss, write
from tasks import files, images

# ---- processes


def test_a_process_without_a_gpu_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(cli.UserError, match="process 1 has no GPU, 1 can be seen.\nStart with torchrun --nproc_per_node=1"):
        run.choose_device(1)


def test_a_container_gets_no_more_threads_than_cores(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(joblib, "cpu_count", lambda: 2)
    try:
        for given, used in ((64, 2), (1, 1)):
            torch.set_num_threads(given)
            run.choose_device()
            assert torch.get_num_threads() == used
    finally:
        torch.set_num_threads(threads)


# ---- optimizer and schedule


def test_steps_are_those_of_the_optimizer(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "TOY_TEST", 20)
    few = ["--task", "satellite", "--scale", "tiny", "--n-train", 31, "--batch-size", 8, "--epochs", 2]
    assert here("finetune", *few, "--accumulate", 2, out=tmp_path)["steps"] == 4  # of three micro-batches an epoch


class Recipe:
    optimizer, lr, weight_decay, warmup_epochs, decay_epochs, accumulate = "adamw", 1.0, 0.0, 2, 10, 3


def test_schedule_is_linear_up_then_linear_down_in_optimizer_steps():
    optimizer = make_optimizer(torch.nn.Linear(2, 2), Recipe)
    schedule = make_schedule(optimizer, Recipe, steps=13)  # 5 optimizer steps in an epoch: W = 10, T = 50
    rates = []
    for _ in range(60):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1.0
    assert rates[30] == pytest.approx(0.5) and rates[49] == pytest.approx(1 / 40) and rates[50:] == [0.0] * 10


@pytest.mark.parametrize("name, end", [("adam", 1 - 0.1), ("adamw", 1 - 0.1 * 0.5)])
def test_weight_decay_is_a_part_of_the_gradient_or_of_the_weight(name, end):
    layer = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(layer.weight)
    optimizer = make_optimizer(layer, SimpleNamespace(optimizer=name, lr=0.1, weight_decay=0.5))
    layer.weight.grad = torch.zeros(1, 1)
    optimizer.step()
    assert layer.weight.item() == pytest.approx(end) and optimizer.param_groups[0]["betas"] == (0.9, 0.98)


@pytest.mark.parametrize("warmup", [0.0, 1.25, 2.5, 51.67 / 20])
def test_the_rate_never_exceeds_its_peak(warmup):
    args = SimpleNamespace(warmup_epochs=warmup, decay_epochs=10, accumulate=1)
    schedule = make_schedule(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0), args, steps=1)
    factors = [schedule.lr_lambdas[0](t) for t in range(12)]
    assert max(factors) <= 1 and max(factors) > 0.8 and factors[10:] == [0, 0]


def test_a_batch_that_processes_cannot_share_is_refused(monkeypatch):
    monkeypatch.setattr(run, "torchrun", lambda: (0, 2, 0))
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: None)
    with pytest.raises(cli.UserError, match="7 cannot be shared by 2 processes"):
        Run(cli.Args(scale="tiny", batch_size=7), "naive")


# ---- random streams


def test_streams_of_other_names_or_numbers_are_others():
    names = ("initial weights", "epoch", "batches of cifar10")
    numbers = [n for k in (1, 2, 3) for n in product((0, 1, 2**32), repeat=k)]
    seeds = [cli.stream(name, *n) for name in names for n in numbers]
    assert len(set(seeds)) == len(seeds) == 3 * (3 + 9 + 27)  # numpy alone takes (0,), (0, 0) and (0, 0, 0) for one
    first = [np.random.default_rng(seed).integers(2**62) for seed in seeds]
    assert len(set(first)) == len(first)


@pytest.mark.parametrize("method", ["orca", "mona", "pare", "recraft"])
def test_no_two_uses_in_a_run_draw_the_same_numbers(tmp_path, monkeypatch, method):
    sites, seeds, original = {}, {}, cli.stream

    def spy(name, *numbers):
        caller = sys._getframe(1)
        seed = original(name, *numbers)
        sites.setdefault((name, numbers), set()).add((caller.f_code.co_filename, caller.f_lineno))
        seeds.setdefault(seed, set()).add((name, numbers))
        return seed

    for module in (cli, data, run, images, files):
        monkeypatch.setattr(module, "stream", spy)
    stages = {"orca": ["--embedder-epochs", 3], "recraft": ["--align-epochs", 2, "--label-epochs", 2]}
    few = ["--n-train", 64, "--seed", 5, *stages.get(method, [])]
    here(f"{method}.py", *SHORT[:-1], 2, *few, out=tmp_path)
    assert all(len(uses) == 1 for uses in (*sites.values(), *seeds.values()))
    assert {numbers[0] for _, numbers in sites} == {5}  # all follow from --seed
    names = {name for name, _ in sites}
    assert {"initial weights", "epoch", "validation split", "batches of spherical"} <= names
    assert ("alignment" in names) == (method in ("orca", "recraft")) and ("labels" in names) == (method == "recraft")
    stages = {numbers[2] for name, numbers in sites if name == "batches of spherical"}
    assert stages == ({1, 2} if method == "mona" else {2})  # the two stages of MoNA see other batches


# ---- files


def test_writing_replaces_a_file_and_leaves_no_temporary_file(tmp_path):
    write(tmp_path / "a", b"one")
    write(tmp_path / "a", b"two")
    assert (tmp_path / "a").read_bytes() == b"two" and len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_keeps_what_was_saved(tmp_path):
    write(tmp_path / "a", b"one")
    (tmp_path / f"a.{os.getpid()}.part").symlink_to("/dev/full")
    with pytest.raises(SystemExit) as end, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pare.py"])
        cli.guarded(write, tmp_path / "a", b"two")
    assert end.value.code == 2 and (tmp_path / "a").read_bytes() == b"one"


def test_no_room_on_the_disk_is_said_and_nothing_is_lost(script, tmp_path):
    def full(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", lambda state, file: patch.setattr(os, "fsync", full) or file.write(b"state"))
        error = script("finetune.py", *SHORT[:-1], 1, out=tmp_path, code=2)
    assert "no space left" in error and "last.pt" in error and "Traceback" not in error
    script("finetune.py", *SHORT[:-1], 1, "--resume", out=tmp_path)  # the disk has room again


@pytest.mark.parametrize("method", ["mona", "contrast"])
def test_activation_checkpointing_changes_no_weight(tmp_path, method):
    few = [*SHORT[:-1], 1, "--n-train", 32]
    for name, options in (("plain", []), ("checkpointed", ["--checkpoint"])):
        here(method, *few, *options, out=tmp_path / name)
    plain, other = (weights(tmp_path / name / f"spherical-{method}-tiny-swin-s0-toy") for name in ("plain", "checkpointed"))
    assert all(torch.equal(value, other[key]) for key, value in plain.items())


def test_neither_git_nor_a_compiler_is_needed(script, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(run, "commit", run.commit.__wrapped__)  # as in a process that starts now
    script("finetune.py", *SHORT[:-1], 1, "--mode", "probe", out=tmp_path)
    assert result(tmp_path / "spherical-probe-tiny-swin-s0-toy")["commit"] is None
    assert "needs a C++ compiler" in script("finetune.py", *SHORT, "--compile", out=tmp_path / "compiled", code=2)


# ---- losses that are not finite


def test_a_loss_that_is_not_finite_names_its_step_and_batch():
    split = data.Split(np.zeros((30, 3, 4, 4), "uint8"), np.zeros(30, "int64"), 2, "toy", data.PROXIES["cifar10"], "cpu")

    class Args:
        batch_size, seed = 4, 0

    losses = torch.ones(7)
    assert mean_loss(losses, split, 6, 0, Args) == 1.0
    losses[5] = float("nan")
    samples = split.plan(7, 4, 0, 0)[0][5].tolist()
    with pytest.raises(cli.UserError, match="nan at step 5 of epoch 1") as error:
        mean_loss(losses, split, 6, 0, Args)
    assert str(samples) in str(error.value).replace("...", "")


def test_a_run_that_diverges_is_told_and_keeps_nothing(tmp_path):
    wild = ["--task", "advection1d", "--scale", "tiny", "--n-train", 32, "--epochs", 1, "--steps-per-epoch", 1, "--clip", 0]
    with pytest.raises(cli.UserError, match="the error on validation is nan"):  # after its last step
        here("finetune.py", *wild, "--lr", 1e30, out=tmp_path)
    with pytest.raises(cli.UserError, match="Lower --embedder-lr"):
        here("orca.py", *wild, "--embedder-lr", 1e30, "--objective", "mmd", "--embedder-epochs", 3, out=tmp_path)
    with pytest.raises(cli.UserError, match="the last step of stage 1 diverged"):
        here("orca.py", *wild, "--embedder-lr", 1e39, "--objective", "mmd", "--embedder-epochs", 1, out=tmp_path)
    for rate in ("--embedder-lr", "--label-lr"):
        with pytest.raises(cli.UserError, match="Lower --embedder-lr or --label-lr"):
            here("recraft.py", *wild, rate, 1e39, "--align-epochs", 1, out=tmp_path)
    assert not [*tmp_path.glob("*/last.pt"), *tmp_path.glob("*/stage1.safetensors")]


# ---- compiled


def test_a_compiled_encoder_is_one_graph_and_is_compiled_once_for_every_use():
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    swin = backbones.build_swin(
        img_size=32, patch_size=4, window_size=4, embed_dim=8, depths=(2,), num_heads=(2,), num_classes=0
    )
    model = common.Model(common.Embedder2d(3, 8, 32), backbones.SwinEncoder(swin), common.ClassPredictor(8, 10))
    model.encoder.compile(dynamic=False, backend=counter)
    x, y, tokens_s = torch.randn(4, 3, 32, 32), torch.arange(4), torch.randn(4, 64, 8)
    loss = torch.nn.functional.cross_entropy
    for _ in range(2):
        loss(model(x), y).backward()
        split = data.Split(x[:3].numpy(), y[:3].numpy(), 10, "toy", data.TASKS["spherical"], "cpu")
        run = SimpleNamespace(rank=0, world=1, device=torch.device("cpu"), autocast=torch.no_grad)
        run.args = SimpleNamespace(batch_size=4, compile=True)
        run.eager = functools.partial(Run.eager, run)
        Run.evaluate(run, model, split, data.TASKS["spherical"])  # another batch size: not compiled
        model.train()
    assert counter.frame_count == 1  # a graph break would make two
    for _ in range(2):
        mona.meta_gradient(model.eval(), loss, x, y, tokens_s, y // 2, 0.1, 1.0)
    assert counter.frame_count <= 4  # theta_0, theta* and theta_0 +- c v differ in what needs a gradient


# ---- killed, resumed, continued


def test_killed_in_the_middle_and_resumed_is_bit_identical(script, uninterrupted, tmp_path):
    command = ["pare.py", *map(str, SHORT + NOISE), "--out-dir", str(tmp_path)]
    (tmp_path / "commands.json").write_text(json.dumps([command]))
    folder = tmp_path / "spherical-pare-tiny-swin-s0-toy"
    process = fork(pair.main, tmp_path)
    while not (folder / "metrics.jsonl").exists() and process.is_alive():
        time.sleep(0.02)
    process.kill()
    process.join()
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
    assert (folder / "result.json").read_bytes() == before and not (folder / ".lock").exists()


def test_the_commit_is_that_of_this_code_and_says_if_it_was_changed(tmp_path, monkeypatch):
    git = lambda *words: subprocess.run(["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a", *words],
                                        check=True, capture_output=True, text=True).stdout.strip()  # fmt: skip
    monkeypatch.setattr(run, "__file__", str(tmp_path / "run.py"))
    commit = run.commit.__wrapped__  # not cached
    assert commit() is None
    git("init", "-q")
    (tmp_path / "run.py").write_text("1")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    git("tag", "v1")
    assert commit() == git("rev-parse", "--short", "HEAD")
    (tmp_path / "run.py").write_text("2")
    assert commit() == git("rev-parse", "--short", "HEAD") + "-dirty"
    assert run.commit() != commit()  # it is that of the code which was imported
    monkeypatch.setattr(run, "__file__", str(tmp_path / "inside" / "run.py"))  # a copy in the repository of something else
    assert commit() is None


def test_a_checkpoint_of_another_run_is_refused(script, uninterrupted, tmp_path):
    said = script("finetune.py", *SHORT[:-1], 1, out=tmp_path)
    folder = tmp_path / "spherical-naive-tiny-swin-s0-toy"
    assert "toy data" in said
    (folder / "result.json").unlink()
    own = (folder / "best.safetensors").read_bytes()
    (folder / "best.safetensors").write_bytes((uninterrupted[1] / "best.safetensors").read_bytes())
    error = script("finetune.py", *SHORT[:-1], 1, "--resume", out=tmp_path, code=2)
    assert "best.safetensors belongs to spherical-pare-tiny-swin-s0-toy" in error and len(error.splitlines()) == 2
    (folder / "best.safetensors").write_bytes(own)
    (folder / "last.pt").write_bytes((uninterrupted[1] / "last.pt").read_bytes())
    error = script("finetune.py", *SHORT[:-1], 1, "--resume", out=tmp_path, code=2)
    assert "is not a checkpoint of this run" in error and "spherical-pare" in error
    (folder / "last.pt").write_bytes((uninterrupted[1] / "last.pt").read_bytes()[:5000])
    assert "last.pt is empty or cut short" in script("finetune.py", *SHORT[:-1], 1, "--resume", out=tmp_path, code=2)
