"""A run in several processes, on one machine or two: the result of one process."""

import contextlib
import ctypes
import functools
import json
import os
import shutil
import socket
import subprocess
import sys

import pair
import pytest
import torch
from helpers import METHODS, ROOT, ended, fork, here, result, rows, weights

import common

SGD = "--task spherical --scale tiny --n-train 64 --epochs 1 --optimizer sgd --lr 0.05".split()
FIRST = {  # stages
    "orca": ["--embedder-epochs", 3], "mona": ["--meta-epochs", 1], "recraft": ["--align-epochs", 2, "--label-epochs", 1],
    "contrast": ["--contrast-epochs", 1, "--sigmas", 0],  # each process draws its own noise
    "lsg": ["--gcn-steps", 20, "--regularise-weight", 1],
}  # fmt: skip
UNUSED = [*SGD, "--epochs", 2, "--k-begin", 0.02]  # PaRe's gate has no gradient once k is 0
WARMUP = [*SGD, "--epochs", 2, "--mode", "warmup", "--warmup-share", 0.5, "--batch-size", 16, "--accumulate", 2]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


RARE = ("orca", "finetune")  # their sums over processes are those of the others
EACH = [pytest.param(method, marks=pytest.mark.matrix if method in RARE else ()) for method in METHODS]


@pytest.fixture(scope="module")
def two(tmp_path_factory, request):
    """A folder with what two processes make of several commands: a folder for each."""
    out, asked = tmp_path_factory.mktemp("two"), " ".join(item.name for item in request.session.items)
    methods = [method for method in METHODS if f"give_the_weights_of_one[{method}]" in asked or "test_torchrun" in asked]
    commands = {method: [f"{method}.py", *SGD, "--clip", 0, *FIRST.get(method, ())] for method in methods}
    commands |= {"unused": ["pare.py", *UNUSED], "warmup": ["finetune.py", *WARMUP]}
    commands = [[*map(str, command), "--data-dir", "none", "--out-dir", str(out / name)] for name, command in commands.items()]
    (out / "commands.json").write_text(json.dumps(commands))
    torchrun = dict(WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())  # as torchrun sets them
    for process in [fork(pair.main, out, True, RANK=rank, LOCAL_RANK=rank, **torchrun) for rank in (0, 1)]:
        ended(process)
    return out


@pytest.mark.matrix
def test_torchrun_gives_what_processes_of_ours_give(two, tmp_path):
    command = ["finetune.py", *SGD, "--clip", 0, "--data-dir", "none", "--out-dir", tmp_path]
    (tmp_path / "commands.json").write_text(json.dumps([[*map(str, command)]]))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    done = subprocess.run([*torchrun, str(ROOT / "tests/pair.py"), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    same(two / "finetune/spherical-naive-tiny-swin-s0-toy", tmp_path / "spherical-naive-tiny-swin-s0-toy")


def test_every_process_refuses_a_run_that_is_there_already(two, tmp_path):
    command = ["pare.py", *map(str, UNUSED), "--data-dir", "none", "--out-dir", str(two / "unused")]
    (tmp_path / "commands.json").write_text(json.dumps([command]))
    torchrun = dict(WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    processes = [fork(pair.main, tmp_path, RANK=rank, LOCAL_RANK=rank, **torchrun) for rank in (0, 1)]
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [2, 2]  # not a traceback


def test_first_stages_their_gradients_and_evaluation_are_those_of_one_process(two):
    alone = [pair.shared_sums(), pair.meta_gradients(), pair.alignments(), pair.answers()]
    for rank in range(2):
        for ours, one in zip(torch.load(two / f"{rank}.pt"), alone, strict=True):
            for a, b in zip(ours, one, strict=True):
                assert torch.allclose(a.detach(), b.detach(), rtol=1e-6, atol=1e-9)
    assert [part.tolist() for part in alone[3]] == [[*range(7)], [-i for i in range(7)], [0], [0]]
    everything, slope, curvature = alone[0]  # f = sum w (2 x)^3, f' = 24 w x^2, and of sum w f': 48 w^2 x
    x, w = torch.arange(7).double(), torch.linspace(1, 2, 7).double()
    assert torch.equal(everything, 2 * x) and torch.allclose(slope, 24 * w * x**2) and torch.allclose(curvature, 48 * w**2 * x)


@pytest.mark.parametrize("method", EACH)
def test_two_processes_and_accumulation_give_the_weights_of_one(two, tmp_path, method):
    name = f"spherical-{'naive' if method == 'finetune' else method}-tiny-swin-s0-toy"
    options = [*SGD, "--clip", 0, *FIRST.get(method, ())]
    here(method, *options, out=tmp_path / "one")
    one, others = weights(tmp_path / "one" / name), {"two": two / method / name}
    if method not in ("mona", "lsg"):  # a micro-batch is a step of its stage 1; samples of a batch are neighbours
        here(method, *options, "--batch-size", 16, "--accumulate", 2, out=tmp_path / "accumulated")
        others["accumulated"] = tmp_path / "accumulated" / name
    for way, folder in others.items():
        other = weights(folder)
        assert rows(folder)[-1]["val"] == pytest.approx(rows(tmp_path / "one" / name)[-1]["val"], abs=0.01)
        for key, value in one.items():
            assert torch.allclose(value, other[key], atol=2e-5), (way, key)
    prefix = "model." if method in ("pare", "contrast", "lsg") else ""
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
    shutil.copytree(two / f"unused/{name}.1", tmp_path / name)  # as a run leaves it that is killed in its second epoch
    assert "resumed after epoch 1" in script("pare.py", *UNUSED, "--resume", out=tmp_path)
    same(two / "unused" / name, tmp_path / name)


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


def enter(name):
    """Move this process into a network namespace, as `ip netns exec` does."""
    with open(f"/run/netns/{name}") as namespace:
        assert ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), 0) == 0, os.strerror(ctypes.get_errno())


@pytest.mark.matrix
def test_two_nodes_give_the_result_of_one(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "cable0")
    options = [*SGD, "--n-train", 64, "--epochs", 2, "--meta-epochs", 1]
    launch = dict(WORLD_SIZE=2, LOCAL_RANK=0, MASTER_ADDR="10.77.0.1", MASTER_PORT=29512)  # as torchrun --nnodes=2 sets them
    with two_nodes() as names:
        (tmp_path / "commands.json").write_text(json.dumps([[*map(str, ["mona.py", *options, "--out-dir", tmp_path / "two"])]]))
        move = [functools.partial(enter, name) for name in names]
        for node in [fork(pair.main, tmp_path, before=move[i], RANK=i, **launch) for i in (0, 1)]:
            ended(node)
    here("mona", *options, out=tmp_path / "one")
    name = "spherical-mona-tiny-swin-s0-toy"
    same(tmp_path / "one" / name, tmp_path / "two" / name)
