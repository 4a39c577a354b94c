"""Many processes: stage 1 alone, at full precision; runs that go on with another number of them; two machines."""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, result, rows, weights

import backbones
import common
import data
import mona
import orca
from run import average, gather, shard

# ---- the maths, shared between processes

LABEL_WEIGHTS = torch.tensor([1.0, 5.0, 0.2], dtype=torch.float64)  # a loss that is no mean over the shares' losses


def shared_sums():
    """Gather and average with their first and second derivatives."""
    x = torch.arange(7, dtype=torch.float64).requires_grad_()
    w = torch.linspace(1, 2, 7, dtype=torch.float64)
    everything = gather(shard(x) * 2, 7)
    (slope,) = average(torch.autograd.grad((w * everything**3).sum(), x, create_graph=True))
    (curvature,) = average(torch.autograd.grad((gather(shard(slope), 7) * w).sum(), x))
    return everything, slope, curvature


def meta_gradients():
    """MoNA's gradient in its three forms, of a small Swin in double precision."""
    torch.manual_seed(0)
    swin = backbones.build_swin(
        img_size=16, patch_size=4, window_size=2, embed_dim=8, depths=(1, 1), num_heads=(2, 2), num_classes=0
    )
    embedder, predictor = common.Embedder2d(3, 8, 16), common.ClassPredictor(16, 3)
    model = common.Model(embedder, backbones.SwinEncoder(swin), predictor).double().eval()
    batch = torch.randn(6, 3, 16, 16).double(), torch.arange(6) % 3, torch.randn(8, 16, 8).double(), torch.arange(8) % 3
    loss = lambda out, y: F.cross_entropy(out, y, LABEL_WEIGHTS)
    found = []
    for way in ("finite-difference", "exact"):
        g_e, g_h, log = mona.meta_gradient(model, loss, *map(shard, batch), 0.5, 0.7, way)
        found += [*g_e, *g_h, log]
    return found


def alignments():
    """ORCA's stage 1 on problems of 15 samples, and of one, which leave a process without any."""
    found = []
    for options in (dict(classes_per_problem=3, max_samples=5), dict(as_released=True, max_samples=1)):
        torch.manual_seed(0)
        args = data.complete(orca.Args(scale="tiny", backbone="tiny-swin", embedder_epochs=2, **options), "orca", "tiny")
        embedder = common.Embedder2d(3, 8, 16).double()
        x = torch.rand(90, 3, 16, 16, dtype=torch.float64)
        train = SimpleNamespace(inputs=lambda index, x=x: x[index])
        u_s, y = torch.randn(30, 8, dtype=torch.float64), torch.arange(90) % 7
        history = orca.align(embedder, u_s, torch.arange(30) % 4, train, y, args)
        found += [torch.tensor([row["distance"] for row in history]), *embedder.state_dict().values()]
    return found


def worker(rank, world, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=world)
    torch.save([shared_sums(), meta_gradients(), alignments()], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_both_first_stages_and_their_gradients_are_those_of_one_process(tmp_path):
    torch.multiprocessing.spawn(worker, (2, tmp_path), nprocs=2)
    alone = [shared_sums(), meta_gradients(), alignments()]
    for rank in range(2):
        for ours, one in zip(torch.load(tmp_path / f"{rank}.pt"), alone, strict=True):
            for a, b in zip(ours, one, strict=True):
                assert torch.allclose(a.detach(), b.detach(), rtol=1e-6, atol=1e-9)
    everything, slope, curvature = alone[0]  # f = sum w (2 x)^3, f' = 24 w x^2, and of sum w f': 48 w^2 x
    x, w = torch.arange(7).double(), torch.linspace(1, 2, 7).double()
    assert torch.equal(everything, 2 * x) and torch.allclose(slope, 24 * w * x**2) and torch.allclose(curvature, 48 * w**2 * x)


# ---- runs

SGD = ["--task", "spherical", "--scale", "tiny", "--n-train", 96, "--epochs", 2, "--optimizer", "sgd", "--lr", 0.05]


def same(folder, other):
    one, two = weights(folder), weights(other)
    assert all(torch.allclose(value, two[key], atol=2e-5) for key, value in one.items())
    assert rows(folder)[-1]["loss"] == pytest.approx(rows(other)[-1]["loss"], rel=1e-4)
    assert result(folder)["test"] == pytest.approx(result(other)["test"], abs=0.01)


def start(command, *options, out, before=(), **launch):
    """A script under torchrun, in the background."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", *(f"--{k}={v}" for k, v in launch.items())]
    command = [*before, *torchrun, str(ROOT / command), *map(str, options), "--out-dir", str(out)]
    return subprocess.Popen(command, cwd=out, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ended(process):
    said, _ = process.communicate(timeout=180)
    assert process.returncode == 0, said


def test_a_run_goes_on_with_another_number_of_processes(script, tmp_path):
    name = "spherical-pare-tiny-swin-s0-toy"
    copy = tmp_path / "one" / name
    process = start("pare.py", *SGD, out=tmp_path, nproc_per_node=2, rdzv_backend="c10d", rdzv_endpoint="localhost:0")
    while not (tmp_path / name / "last.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    shutil.copytree(tmp_path / name, copy, ignore=shutil.ignore_patterns("*.part"))  # what a killed run leaves behind
    ended(process)
    assert "resumed after epoch 1" in script("pare.py", *SGD, "--resume", out=copy.parent)
    same(tmp_path / name, copy)


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


def test_two_nodes_give_the_result_of_one(script, tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "cable0")
    (tmp_path / "two").mkdir()
    options = [*SGD, "--meta-epochs", 1]
    with two_nodes() as names:
        launch = dict(nnodes=2, nproc_per_node=1, master_addr="10.77.0.1", master_port=29512)
        nodes = [
            start("mona.py", *options, out=tmp_path / "two", before=["ip", "netns", "exec", name], node_rank=i, **launch)
            for i, name in enumerate(names)
        ]
        for node in nodes:
            ended(node)
    script("mona.py", *options, out=tmp_path / "one")
    name = "spherical-mona-tiny-swin-s0-toy"
    same(tmp_path / "one" / name, tmp_path / "two" / name)
