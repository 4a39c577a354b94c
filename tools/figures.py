"""Pictures and measurements for README and docs, made by the project's own code.

python tools/figures.py idea            docs/idea.png: what PaRe does, on a toy picture
python tools/figures.py pde             docs/pde.png: one sample of each PDE task, solved here
python tools/figures.py probe RUN...    what finished runs left of the source: linear-probe error on CIFAR-10 (MoNA, section 2)
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data


@dataclass(frozen=True)
class Args:
    what: Annotated[Literal["idea", "pde", "probe"], tyro.conf.Positional]
    """which picture or measurement"""
    runs: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """probe: folders of finished runs"""
    data_dir: str = "datasets"
    """probe: where CIFAR-10 lies"""
    out: str = str(ROOT / "docs")
    """folder it is written to, as WHAT.png"""


if __name__ == "__main__":
    args = data.command_line(Args, __doc__)

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

import common
import pare
import pde
from tools.reproduce import spread

PICK_S, PICK_T = 10, 16  # which toy pictures
SIDE, PATCH = 64, 8  # the picture in pixels, a patch: 8 x 8 patches
SOURCE, TARGET = "#d1495b", "#00798c"


def patches(picture):
    """(3, 64, 64) -> (1, 64, 192): what the embedder sees as tokens."""
    return F.unfold(picture[None], PATCH, stride=PATCH).transpose(1, 2)


def picture(tokens):
    """(1, 64, 192) -> (64, 64, 3)"""
    return F.fold(tokens.transpose(1, 2), (SIDE, SIDE), PATCH, stride=PATCH)[0].permute(1, 2, 0)


def idea(args):
    flat, sphere = data.toy_pictures(40, 64, seed=7)[0], data.toy_spherical(40, 60, seed=3)[0]
    calm = flat[:, :, :8].astype(float).std((2, 3)).sum(1).argsort()  # plain backgrounds first
    tokens_s = patches(torch.from_numpy(flat[calm[PICK_S]]).float() / 255)
    target = F.interpolate(torch.from_numpy(sphere).float() / 255, (SIDE, SIDE), mode="bilinear")
    tokens_t = patches(target[PICK_T])
    untie = 1e-4 * torch.rand(1, 64, generator=torch.Generator().manual_seed(0))
    scores_t, scores_s = tokens_t.std(2) + untie, tokens_s.std(2)  # contrast stands in for a trained gate
    epochs, k0 = 5, 41

    figure, axes = plt.subplots(1, 7, figsize=(13.5, 3.5), width_ratios=[1, 0.22, 1, 1, 1, 0.22, 1])
    figure.subplots_adjust(left=0.01, right=0.99, top=0.83, bottom=0.30, wspace=0.08)
    for axis in axes:
        axis.axis("off")
    axes[0].imshow(picture(tokens_s))
    axes[0].set_title("source\nthe pretraining modality", color=SOURCE, fontsize=11)
    for axis, epoch in zip(axes[2:5], (0, 2, 4), strict=True):
        k = pare.schedule(epoch, epochs, k0)
        axis.imshow(picture(pare.replace_patches(tokens_t, tokens_s, scores_t, scores_s, k)))
        for i in scores_t[0].argsort()[:k].tolist():
            axis.add_patch(
                Rectangle(
                    (i % 8 * PATCH - 0.5, i // 8 * PATCH - 0.5), PATCH, PATCH, fill=False, edgecolor=SOURCE, linewidth=1.1
                )
            )
        axis.set_title(f"epoch {epoch} of {epochs}\nk = {k} of 64 patches", fontsize=11)
    axes[6].imshow(picture(tokens_t))
    axes[6].set_title("target\na modality never seen", color=TARGET, fontsize=11)
    for axis, text in ((axes[1], "the k that\nmatter most"), (axes[5], "all but the k that\nmatter least")):
        axis.set(xlim=(0, 1), ylim=(0, 1))
        begin, end = ((0.0, 0.5), (1.0, 0.5)) if axis is axes[1] else ((1.0, 0.5), (0.0, 0.5))
        axis.add_patch(FancyArrowPatch(begin, end, arrowstyle="-|>", mutation_scale=14, color="0.3", clip_on=False))
        axis.text(0.5, 0.56, text, ha="center", va="bottom", fontsize=8, color="0.3")

    strip = figure.add_axes([0.01, 0.0, 0.98, 0.26])
    strip.set(xlim=(0, 100), ylim=(0, 10))
    strip.axis("off")
    boxes = [
        (17, "embedder", "patches to tokens,\nnew for the target"),
        (39, "gate", "scores patches,\nreplaces k of them"),
        (61, "encoder", "the pretrained transformer,\nfine-tuned"),
        (83, "predictors", "target label (1 - λ) + source label λ,\nλ = k / k0"),
    ]
    strip.text(3, 6.3, "target, source", fontsize=10, ha="center", va="center")
    for x, name, what in boxes:
        strip.add_patch(FancyBboxPatch((x - 7, 4.6), 14, 3.4, boxstyle="round,pad=0.3", facecolor="0.94", edgecolor="0.3"))
        strip.text(x, 6.3, name, ha="center", va="center", fontsize=11, weight="bold")
        strip.text(x, 3.4, what, ha="center", va="top", fontsize=8.5, color="0.3")
    for x in (7.2, 24.7, 46.7, 68.7):
        strip.add_patch(
            FancyArrowPatch((x, 6.3), (x + (2.2 if x < 10 else 6.8), 6.3), arrowstyle="-|>", mutation_scale=12, color="0.3")
        )
    path = Path(args.out) / "idea.png"
    figure.savefig(path, dpi=110)
    print(path)


PDES = {
    "advection1d": "advection", "burgers1d": "Burgers", "diffusion_reaction1d": "diffusion-reaction",
    "diffusion_sorption1d": "diffusion-sorption", "navier_stokes1d": "compressible flow", "darcy": "Darcy",
    "darcy2d": "Darcy, PDEBench's", "shallow_water2d": "shallow water", "diffusion_reaction2d": "FitzHugh-Nagumo",
}  # fmt: skip
SHOWN = {"advection1d": 2, "navier_stokes1d": 10}  # which sample, if not the first


def fields(args):
    """One sample of each PDE task, the target below the input. Lines keep their scale; the gas's fields have one each."""
    figure, axes = plt.subplots(2, len(PDES), figsize=(15, 3.7))
    figure.subplots_adjust(left=0.025, right=0.995, top=0.9, bottom=0.02, wspace=0.08, hspace=0.06)
    for column, (name, title) in zip(axes.T, PDES.items(), strict=True):
        of, shown = pde.SETS[name], SHOWN.get(name, 0)
        x, y = (part[shown] for part in next(pde.simulate(name, shown + 1, of.n, of.every)))
        column[0].set_title(title, fontsize=11)
        for axis, values, colour in zip(column, (x, y), (SOURCE, TARGET), strict=True):
            axis.set(xticks=[], yticks=[])
            if values.ndim == 2:
                axis.imshow(values, cmap="RdBu_r" if name == "diffusion_reaction2d" else "viridis")
                continue
            both = np.stack([x, y]).reshape(2, 3 if name == "navier_stokes1d" else 1, -1)  # (input and target, fields, n)
            both = both / abs(both).max((0, 2))[:, None]
            for line, style in zip(both[int(values is y)], ("-", "--", ":"), strict=False):
                axis.plot(line, style, color=colour, linewidth=1.4)
            axis.set(ylim=(both.min() - 0.1, both.max() + 0.1))
            axis.set_box_aspect(1)
    axes[1, 4].legend(["density", "pressure", "velocity"], fontsize=7.5, loc="lower left", frameon=False, handlelength=1.6)
    for axis, text, colour in zip(axes[:, 0], ("input", "target"), (SOURCE, TARGET), strict=True):
        axis.set_ylabel(text, fontsize=12, color=colour)
    path = Path(args.out) / "pde.png"
    figure.savefig(path, dpi=110)
    print(path)


@torch.no_grad()
def features(source, encoder, x):
    """CIFAR-10 pictures (n, 3, 32, 32) uint8 through the source embedder and `encoder`, mean over tokens: (n, F) array."""
    proxy = data.PROXIES["cifar10"]
    mean, std = (torch.tensor(values)[:, None, None] for values in (proxy.mean, proxy.std))
    encoder.eval()
    parts = torch.from_numpy(x).split(250)
    return torch.cat([encoder(source.embedder((part / 255 - mean) / std)).mean(1) for part in parts]).numpy()


def probe_error(source, encoder, train, test):
    """0-1 test error of a logistic regression on standardised features of the encoder, which stays as it is."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    probe.fit(features(source, encoder, train[0]), train[1])
    return 1 - probe.score(features(source, encoder, test[0]), test[1])


def probe(args):
    """The paper's measurement of source knowledge: a linear probe on the encoder after its last epoch on the target, fed by the
    SOURCE embedder, beside the same probe on the encoder as it was pretrained."""
    folder = Path(args.data_dir)
    train = data.subset(*data.read_cifar10(folder), 5000, seed=0)
    test = data.read_cifar(folder / "cifar-10-batches-py", ["test_batch"], "labels", 10)
    before, found = {}, {}  # backbone -> error; (task, method, backbone) -> [(target's error, probe error)] over seeds
    for name in args.runs:
        run = Path(name)
        if not (run / "result.json").exists():
            raise data.UserError(f"{run} holds no finished run (result.json).")
        result = json.loads((run / "result.json").read_text())
        source = common.load_source(backbone := result["backbone"])
        if backbone not in before:
            before[backbone] = probe_error(source, source.encoder, train, test)
        net = torch.load(run / "last.pt", map_location="cpu", weights_only=True)["net"]
        net = {name.removeprefix("model."): value for name, value in net.items()}  # PaRe's net holds the model
        source.encoder.load_state_dict({k.removeprefix("encoder."): v for k, v in net.items() if k.startswith("encoder.")})
        errors = result["test_last"], probe_error(source, source.encoder, train, test)
        print(f"{run}: {errors[1]:.4f}", file=sys.stderr, flush=True)
        found.setdefault((result["task"], result["method"], backbone), []).append(errors)
    print(f"Probe error on {len(test[1]):,} CIFAR-10 test images, features of {len(train[1]):,} training images\n")
    print("| task | method | target's test error, last epoch | probe error | pretrained | n |\n|---|---|---|---|---|---|")
    for (task, method, backbone), errors in found.items():
        target, left = (spread(column) for column in zip(*errors, strict=True))
        print(f"| {task} | {method} | {target} | {left} | {before[backbone]:.4f} | {len(errors)} |")


if __name__ == "__main__":
    data.guarded({"idea": idea, "pde": fields, "probe": probe}[args.what], args)
