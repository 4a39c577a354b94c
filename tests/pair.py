"""What the tests do in two processes at once: `main` in a forked process, or this file under torchrun.

    torchrun --nproc_per_node=2 tests/pair.py FOLDER

FOLDER/commands.json lists commands, which are run one after the other. Each run is copied as it stands after its first epoch,
to NAME.1 beside it.
"""

import contextlib
import json
import os
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from helpers import ROOT

import backbones
import common
import data
import mona
import orca
import run

LABEL_WEIGHTS = torch.tensor([1.0, 5.0, 0.2], dtype=torch.float64)  # a loss that is no mean over the shares' losses


def shared_sums():
    """Gather and average with their first and second derivatives."""
    x = torch.arange(7, dtype=torch.float64).requires_grad_()
    w = torch.linspace(1, 2, 7, dtype=torch.float64)
    everything = run.gather(run.shard(x) * 2, 7)
    (slope,) = run.average(torch.autograd.grad((w * everything**3).sum(), x, create_graph=True))
    (curvature,) = run.average(torch.autograd.grad((run.gather(run.shard(slope), 7) * w).sum(), x))
    return everything, slope, curvature


def meta_gradients():
    """MoNA's gradient, both ways, of a small Swin in double precision."""
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
        g_e, g_h, log = mona.meta_gradient(model, loss, *map(run.shard, batch), 0.5, 0.7, way)
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
        train = SimpleNamespace(inputs=lambda index, x=x: RefusesEmptyBatches()(x[index]), chunk=256)
        u_s, y = torch.randn(30, 8, dtype=torch.float64), torch.arange(90) % 7
        history = orca.align(embedder, u_s, torch.arange(30) % 4, train, y, args)
        found += [torch.tensor([row["distance"] for row in history]), *embedder.state_dict().values()]
    return found


class Numbers(list):
    """A split whose inputs are these numbers, and its targets their negatives."""

    chunk = 2
    in_order = lambda self, parts: ((torch.tensor(self)[index], -torch.tensor(self)[index]) for index in parts)


class RefusesEmptyBatches(torch.nn.Identity):
    """Fails on an empty batch, as transformers do."""

    def forward(self, x):
        assert len(x) > 0
        return x


def answers():
    """What evaluation keeps, of seven samples and of one, of which the second process has none."""
    rank, world = run.processes()
    args = SimpleNamespace(compile=False, batch_size=2)
    nothing = contextlib.nullcontext
    this = SimpleNamespace(rank=rank, world=world, args=args, device="cpu", autocast=nothing, eager=nothing)
    found = []
    for n in (7, 1):
        run.Run.evaluate(this, RefusesEmptyBatches(), Numbers(range(n)), SimpleNamespace(score=lambda out, y: 0.0))
        found += map(torch.from_numpy, this.answers)
    return found


def copy_after_first_epoch(end_epoch):
    def ended(self, *arguments):
        end_epoch(self, *arguments)
        if self.rank == 0 and len(self.history) == 1:
            shutil.copytree(self.folder, f"{self.folder}.1")

    return ended


def main(folder, sums=False):
    """sums: write what gather and average, the first stages and evaluation give this process."""
    run.Run.end_epoch = copy_after_first_epoch(run.Run.end_epoch)
    os.chdir(folder)
    commands = json.loads((folder / "commands.json").read_text())
    port = int(os.environ.get("MASTER_PORT", 0))
    if sums:
        torch.distributed.init_process_group("gloo")
        torch.save([shared_sums(), meta_gradients(), alignments(), answers()], folder / f"{os.environ['RANK']}.pt")
        torch.distributed.destroy_process_group()
    for i, (script, *options) in enumerate(commands):
        # each new process group needs a port of its own, and a store other than torchrun's
        os.environ |= {"MASTER_PORT": str(port + 1 + i), "TORCHELASTIC_USE_AGENT_STORE": "False"}
        sys.argv = [script, *options]
        runpy.run_path(str(ROOT / script), run_name="__main__")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
