"""What keeps a run: optimizer and schedule, files, resuming, many processes and machines, a disk without room."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import METHODS, NOISE, ROOT, SHORT, here, result, rows, weights
from pair import alignments, meta_gradients, shared_sums

import cli
import common
import data
import mona
import run
from run import Run, make_optimizer, make_schedule, mean_loss, write
from tasks import images, text

# ---- optimizer and schedule


class Recipe:
    optimizer, lr, weight_decay, warmup_epochs, decay_epochs = "adamw", 1.0, 0.0, 2, 10


def test_schedule_is_linear_up_then_linear_down_in_optimizer_steps():
    optimizer = make_optimizer(torch.nn.Linear(2, 2), Recipe)
    schedule = make_schedule(optimizer, Recipe, steps=5)  # W = 10, T = 50
    rates = []
    for _ in range(60):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1.0
    assert rates[30] == pytest.approx(0.5) and rates[49] == pytest.approx(1 / 40) and rates[50:] == [0.0] * 10


@pytest.mark.parametrize("warmup", [0.0, 1.25, 2.5, 51.67 / 20])
def test_the_rate_never_exceeds_its_peak(warmup):
    args = SimpleNamespace(warmup_epochs=warmup, decay_epochs=10)
    schedule = make_schedule(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0), args, steps=1)
    factors = [schedule.lr_lambdas[0](t) for t in range(12)]
    assert max(factors) <= 1 and max(factors) > 0.8 and factors[10:] == [0, 0]


# ---- random streams


def test_streams_of_other_names_or_numbers_are_others():
    names = ("initial weights", "epoch", "batches of cifar10")
    numbers = [n for k in (1, 2, 3) for n in product((0, 1, 2**32), repeat=k)]
    seeds = [cli.stream(name, *n) for name in names for n in numbers]
    assert len(set(seeds)) == len(seeds) == 3 * (3 + 9 + 27)  # numpy alone takes (0,), (0, 0) and (0, 0, 0) for one
    first = [np.random.default_rng(seed).integers(2**62) for seed in seeds]
    assert len(set(first)) == len(first)


@pytest.mark.parametrize("method", ["orca", "mona", "pare"])
def test_no_two_uses_in_a_run_draw_the_same_numbers(tmp_path, monkeypatch, method):
    sites, seeds, original = {}, {}, cli.stream

    def spy(name, *numbers):
        caller = sys._getframe(1)
        seed = original(name, *numbers)
        sites.setdefault((name, numbers), set()).add((caller.f_code.co_filename, caller.f_lineno))
        seeds.setdefault(seed, set()).add((name, numbers))
        return seed

    for module in (cli, data, run, images, text):
        monkeypatch.setattr(module, "stream", spy)
    few = ["--n-train", 64, *(["--embedder-epochs", 3] if method == "orca" else [])]
    here(f"{method}.py", *SHORT[:-1], 2, *few, out=tmp_path)
    assert all(len(uses) == 1 for uses in (*sites.values(), *seeds.values()))
    names = {name for name, _ in sites}
    assert {"initial weights", "epoch", "validation split", "batches of spherical"} <= names
    assert ("alignment" in names) == (method == "orca")
    stages = {numbers[2] for name, numbers in sites if name == "batches of spherical"}
    assert stages == ({1, 2} if method == "mona" else {2})  # the two stages of MoNA see other batches


# ---- files


def test_a_file_is_whole_or_not_there(tmp_path):
    write(tmp_path / "a", b"one")
    write(tmp_path / "a", b"two")
    assert (tmp_path / "a").read_bytes() == b"two" and len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_keeps_what_was_saved(tmp_path):
    write(tmp_path / "a", b"one")
    (tmp_path / "a.part").symlink_to("/dev/full")
    with pytest.raises(SystemExit) as end, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pare.py"])
        cli.guarded(write, tmp_path / "a", b"two")
    assert end.value.code == 2 and (tmp_path / "a").read_bytes() == b"one"


def test_no_room_on_the_disk_is_said_and_nothing_is_lost(script, tmp_path):
    folder = tmp_path / "spherical-naive-tiny-swin-s0-toy"
    folder.mkdir(parents=True)
    (folder / "last.pt.part").symlink_to("/dev/full")
    error = script("finetune.py", *SHORT[:-1], 1, out=tmp_path, code=2)
    assert "no space left" in error and "last.pt" in error and "Traceback" not in error
    script("finetune.py", *SHORT[:-1], 1, "--resume", out=tmp_path)  # the disk has room again


def test_neither_git_nor_a_compiler_is_needed(script, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    script("finetune.py", *SHORT[:-1], 1, "--mode", "probe", out=tmp_path)
    assert result(tmp_path / "spherical-probe-tiny-swin-s0-toy")["commit"] is None
    assert "needs a C++ compiler" in script("finetune.py", *SHORT, "--compile", out=tmp_path / "compiled", code=2)


# ---- losses that are not finite


def test_a_loss_that_is_not_finite_names_its_step_and_batch():
    split = data.Split(
        data.np.zeros((30, 3, 4, 4), "uint8"), data.np.zeros(30, "int64"), 2, "toy", data.PROXIES["cifar10"], "cpu"
    )

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
    wild = ["--task", "advection1d", "--scale", "tiny", "--n-train", 32, "--epochs", 1, "--clip", 0]
    with pytest.raises(cli.UserError, match="the error on validation is nan"):  # after its last step
        here("finetune.py", *wild, "--lr", 1e30, out=tmp_path)
    with pytest.raises(cli.UserError, match="Lower --embedder-lr"):
        here("orca.py", *wild, "--embedder-lr", 1e30, "--objective", "mmd", "--embedder-epochs", 3, out=tmp_path)
    assert not [*tmp_path.glob("*/last.pt"), *tmp_path.glob("*/stage1.safetensors")]


# ---- compiled


def test_a_compiled_encoder_is_one_graph_and_is_compiled_once_for_every_use():
    from torch._dynamo.testing import CompileCounter


    counter, source = CompileCounter(), common.load_source("tiny-swin")
    embedder = common.initialise(common.Embedder2d(3, source.token_width, source.size), source, "copy")
    model = common.Model(embedder, source.encoder, common.ClassPredictor(source.feature_width, 10))
    model.encoder.compile(dynamic=False, backend=counter)
    x, y, tokens_s = torch.randn(4, 3, 60, 60), torch.arange(4), torch.randn(4, 64, 64)
    loss = torch.nn.functional.cross_entropy
    for _ in range(2):
        loss(model(x), y).backward()
        split = data.Split(x[:3].numpy(), y[:3].numpy(), 10, "toy", data.TASKS["spherical"], "cpu")
        run = SimpleNamespace(rank=0, world=1, device=torch.device("cpu"), autocast=torch.no_grad)
        run.args = SimpleNamespace(batch_size=4, compile=True)
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
    command = [sys.executable, str(ROOT / "tests/pair.py"), str(tmp_path)]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (folder / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.02)
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
    assert "last.pt is empty or cut short" in script("finetune.py", *SHORT[:-1], 1, "--resume", out=tmp_path, code=2)


# ---- many processes

SGD = "--task spherical --scale tiny --n-train 96 --epochs 1 --optimizer sgd --lr 0.05".split()
FIRST = {"orca": ["--embedder-epochs", 3], "mona": ["--meta-epochs", 1]}  # stages
FEW = "--task spherical --scale tiny --n-train 96 --epochs 2 --optimizer sgd --lr 0.05".split()
UNUSED = [*SGD, "--epochs", 2, "--k-begin", 0.02]  # PaRe's gate has no gradient once k is 0
WARMUP = [*SGD, "--epochs", 2, "--mode", "warmup", "--warmup-share", 0.5, "--batch-size", 16, "--accumulate", 2]


def torchrun(*command, before=(), **launch):
    """A command under torchrun, in the background."""
    torchrun = [*before, sys.executable, "-m", "torch.distributed.run", *(f"--{k}={v}" for k, v in launch.items())]
    return subprocess.Popen([*torchrun, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ended(process):
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder with what two processes make of several commands: a folder for each."""
    out = tmp_path_factory.mktemp("two")
    commands = {method: [f"{method}.py", *SGD, "--clip", 0, *FIRST.get(method, ())] for method in METHODS}
    commands |= {"unused": ["pare.py", *UNUSED], "warmup": ["finetune.py", *WARMUP], "epochs": ["pare.py", *FEW]}
    commands = [[*map(str, command), "--data-dir", "none", "--out-dir", str(out / name)] for name, command in commands.items()]
    (out / "commands.json").write_text(json.dumps(commands))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ended(torchrun(ROOT / "tests/pair.py", out, nproc_per_node=2, master_port=port))
    return out


def test_both_first_stages_and_their_gradients_are_those_of_one_process(two):
    alone = [shared_sums(), meta_gradients(), alignments()]
    for rank in range(2):
        for ours, one in zip(torch.load(two / f"{rank}.pt"), alone, strict=True):
            for a, b in zip(ours, one, strict=True):
                assert torch.allclose(a.detach(), b.detach(), rtol=1e-6, atol=1e-9)
    everything, slope, curvature = alone[0]  # f = sum w (2 x)^3, f' = 24 w x^2, and of sum w f': 48 w^2 x
    x, w = torch.arange(7).double(), torch.linspace(1, 2, 7).double()
    assert torch.equal(everything, 2 * x) and torch.allclose(slope, 24 * w * x**2) and torch.allclose(curvature, 48 * w**2 * x)


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_and_accumulation_give_the_weights_of_one(two, tmp_path, method):
    name = f"spherical-{'naive' if method == 'finetune' else method}-tiny-swin-s0-toy"
    options = [*SGD, "--clip", 0, *FIRST.get(method, ())]
    here(method, *options, out=tmp_path / "one")
    one, others = weights(tmp_path / "one" / name), {"two": two / method / name}
    if method != "mona":  # a micro-batch is a step of its stage 1
        here(method, *options, "--batch-size", 16, "--accumulate", 2, out=tmp_path / "accumulated")
        others["accumulated"] = tmp_path / "accumulated" / name
    for way, folder in others.items():
        other = weights(folder)
        assert rows(folder)[-1]["val"] == pytest.approx(rows(tmp_path / "one" / name)[-1]["val"], abs=0.01)
        for key, value in one.items():
            assert torch.allclose(value, other[key], atol=2e-5), (way, key)
    prefix = "model." if method == "pare" else ""
    start = {f"{prefix}encoder.{k}": v for k, v in common.load_source("tiny-swin").encoder.named_parameters()}
    assert start.keys() <= one.keys()
    moved = sum((one[key] - value).abs().sum().item() for key, value in start.items())
    assert moved > 1  # the weights that agree have left their start


def test_two_processes_may_leave_parameters_unused(two, tmp_path):
    """PaRe's gate once k is 0, and all but the embedder in the warm-up, have no gradient to average."""
    assert [row["k"] for row in rows(two / "unused/spherical-pare-tiny-swin-s0-toy")] == [1, 0]
    name = "spherical-warmup-tiny-swin-s0-toy"
    here("finetune", *WARMUP, out=tmp_path)
    one, other = weights(tmp_path / name), weights(two / "warmup" / name)
    assert all(torch.allclose(value, other[key], atol=2e-5) for key, value in one.items())


def same(folder, other):
    one, two = weights(folder), weights(other)
    assert all(torch.allclose(value, two[key], atol=2e-5) for key, value in one.items())
    assert rows(folder)[-1]["loss"] == pytest.approx(rows(other)[-1]["loss"], rel=1e-4)
    assert result(folder)["test"] == pytest.approx(result(other)["test"], abs=0.01)


def test_a_run_continues_with_another_number_of_processes(script, two, tmp_path):
    name = "spherical-pare-tiny-swin-s0-toy"
    shutil.copytree(two / f"epochs/{name}.1", tmp_path / name)  # as a run leaves it that is killed in its second epoch
    assert "resumed after epoch 1" in script("pare.py", *FEW, "--resume", out=tmp_path)
    same(two / "epochs" / name, tmp_path / name)


@contextlib.contextmanager
def two_nodes():
    """Two network namespaces with a cable between them; skipped where they cannot be made. Gives their names."""
    names = [f"node{i}-{os.getpid()}" for i in (0, 1)]
    ip = lambda *words: subprocess.run(["ip", *words], check=True, capture_output=True)
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "cable0", "netns", names[0], "type", "veth", "peer", "name", "cable0", "netns", names[1])
        for i, name in enumerate(names):
            ip("-n", name, "address", "add", f"10.77.0.{i + 1}/24", "dev", "cable0")
            ip("-n", name, "link", "set", "cable0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces here: {getattr(error, 'stderr', error)}")
    finally:
        for name in names:
            if shutil.which("ip"):
                subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def test_two_nodes_give_the_result_of_one(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "cable0")
    options = [*FEW, "--n-train", 64, "--meta-epochs", 1]
    with two_nodes() as names:
        launch = dict(nnodes=2, nproc_per_node=1, master_addr="10.77.0.1", master_port=29512)
        (tmp_path / "commands.json").write_text(json.dumps([[*map(str, ["mona.py", *options, "--out-dir", tmp_path / "two"])]]))
        command = ROOT / "tests/pair.py", tmp_path
        nodes = [
            torchrun(*command, before=["ip", "netns", "exec", name], node_rank=i, **launch) for i, name in enumerate(names)
        ]
        for node in nodes:
            ended(node)
    here("mona", *options, out=tmp_path / "one")
    name = "spherical-mona-tiny-swin-s0-toy"
    same(tmp_path / "one" / name, tmp_path / "two" / name)
