"""Figures and measurements for README and docs, most of them from finished runs.

    python tools/figures.py idea                  the idea of PaRe on a toy image
    python tools/figures.py pde                   one simulated sample of each PDE task

Figures of the PaRe paper (RUN: a run of pare.py, except for landscape):

    python tools/figures.py landscape RUN RUN     1a: training loss around the weights of two runs of any method
    python tools/figures.py path RUN              1b: distance of intermediate samples to the source and to the target
    python tools/figures.py embeddings RUN        1c: t-SNE of source, intermediate and target samples
    python tools/figures.py patches RUN           4: the patches that the gate keeps

Figures of the MoNA paper: how much knowledge of the source (CIFAR-10; discrepancy: Tiny-ImageNet) is left after a run

    python tools/figures.py probe RUN...          linear-probe error, as a table
    python tools/figures.py source RUN...         2: t-SNE of CIFAR-10 before and after fine-tuning
    python tools/figures.py forgetting RUN...     3: linear-probe error by task, epochs and method
    python tools/figures.py discrepancy TASK...   4: knowledge discrepancy between tasks and source; needs no run

Of the slides' proposal, on test images of CIFAR-100, without a run:

    python tools/figures.py scores                which scores find the patches that matter, as a table
"""

import itertools
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from scipy.optimize import linear_sum_assignment
from sklearn.linear_model import LogisticRegression
from sklearn.manifold import TSNE
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import backbones
import cli
import common
import data
import pare
from tasks import images, pde, toys
from tools.charts import COLOURS, MANY, SOURCE, TARGET, dispatch, dots, errors_of, finished, plain, save
from tools.reproduce import spread


@dataclass(frozen=True)
class Args:
    what: Annotated[
        Literal["idea", "pde", "landscape", "path", "embeddings", "patches", "probe", "source", "forgetting", "discrepancy",
                "scores"],
        tyro.conf.Positional,
    ]  # fmt: skip
    """the figure or measurement"""
    runs: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """folders of finished runs. discrepancy: tasks; default cifar100 spherical darcy shallow_water2d"""
    data_dir: str = "datasets"
    """folder with the data of the runs and CIFAR-10; discrepancy: Tiny-ImageNet and the tasks; scores: CIFAR-100"""
    out: str = "."
    """output folder; the file name is WHAT.png"""
    out_dir: str = "runs"
    """discrepancy: prepared data are written to its cache/"""


PICK_S, PICK_T = 10, 16  # indices of the toy images
SIDE, PATCH = 64, 8  # side of the image and of a patch in pixels: 8 x 8 patches
BETWEEN = LinearSegmentedColormap.from_list("between", [SOURCE, "#e3c9b8", TARGET])  # 0: source, 1: target
DEPTH = LinearSegmentedColormap.from_list("depth", ["#06313a", TARGET, "#9cc8cd", "#f6f1e7"])  # low to high loss


# ---------------------------------------------------------------------------------------------------------------------
# Without runs
# ---------------------------------------------------------------------------------------------------------------------


def patches(picture):
    """Cut an image into patches, the tokens of the embedder. (3, 64, 64) -> (1, 64, 192)"""
    return F.unfold(picture[None], PATCH, stride=PATCH).transpose(1, 2)


def picture(tokens):
    """Inverse of `patches`, channels last. (1, 64, 192) -> (64, 64, 3)"""
    return F.fold(tokens.transpose(1, 2), (SIDE, SIDE), PATCH, stride=PATCH)[0].permute(1, 2, 0)


def idea(args):
    flat, sphere = toys.images(40, 7, 64)[0], toys.spherical(40, 3, 60)[0]
    calm = flat[:, :, :8].astype(float).std((2, 3)).sum(1).argsort()  # uniform backgrounds first
    tokens_s = patches(torch.from_numpy(flat[calm[PICK_S]]).float() / 255)
    target = F.interpolate(torch.from_numpy(sphere).float() / 255, (SIDE, SIDE), mode="bilinear")
    tokens_t = patches(target[PICK_T])
    untie = 1e-4 * torch.rand(1, 64, generator=torch.Generator().manual_seed(0))
    scores_t, scores_s = tokens_t.std(2) + untie, tokens_s.std(2)  # contrast instead of the scores of a trained gate
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
    axes[6].set_title("target\nan unseen modality", color=TARGET, fontsize=11)
    for axis, text in ((axes[1], "the k most\nimportant"), (axes[5], "all but the k\nleast important")):
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
    save(figure, args)


PDES = {
    "advection1d": "advection", "burgers1d": "Burgers", "diffusion_reaction1d": "diffusion-reaction",
    "diffusion_sorption1d": "diffusion-sorption", "navier_stokes1d": "compressible flow", "darcy": "Darcy",
    "darcy2d": "Darcy, PDEBench's", "shallow_water2d": "shallow water", "diffusion_reaction2d": "FitzHugh-Nagumo",
}  # fmt: skip
SHOWN = {"advection1d": 2, "navier_stokes1d": 10}  # index of the sample; default: the first


def fields(args):
    """One sample of each PDE task, the target below the input.

    In 1D, input and target have the same scale. Each field of the compressible flow is scaled separately.
    """
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
            both = np.stack([x, y]).reshape(2, 3 if name == "navier_stokes1d" else 1, -1)  # (2, fields, n): input and target
            both = both / abs(both).max((0, 2))[:, None]
            for line, style in zip(both[int(values is y)], ("-", "--", ":"), strict=False):
                axis.plot(line, style, color=colour, linewidth=1.4)
            axis.set(ylim=(both.min() - 0.1, both.max() + 0.1))
            axis.set_box_aspect(1)
    axes[1, 4].legend(["density", "pressure", "velocity"], fontsize=7.5, loc="lower left", frameon=False, handlelength=1.6)
    for axis, text, colour in zip(axes[:, 0], ("input", "target"), (SOURCE, TARGET), strict=True):
        axis.set_ylabel(text, fontsize=12, color=colour)
    save(figure, args)


# ---------------------------------------------------------------------------------------------------------------------
# Finished runs
# ---------------------------------------------------------------------------------------------------------------------


def weights(run):
    """The weights after the last epoch: embedder.*, encoder.*, predictor.*; for PaRe also gate.* and predictor_s.*

    Raises: UserError if last.pt is missing, or if it holds the updates of LoRA instead.
    """
    if not (Path(run) / "last.pt").exists():
        raise cli.UserError(f"{run} has no last.pt, which holds its weights.\nGive a run that has kept it.")
    net = torch.load(Path(run) / "last.pt", map_location="cpu", weights_only=True)["net"]
    if "A.0" in net:
        raise cli.UserError(f"{run} is a LoRA run: its encoder is not changed, but added to.\nGive runs of other methods.")
    return {name.removeprefix("model."): value for name, value in net.items()}  # in PaRe the model is a part of the net


def part(net, name):
    return {k.removeprefix(f"{name}."): value for k, value in net.items() if k.startswith(f"{name}.")}


@dataclass
class Rebuilt:
    """A finished run with the weights of the last epoch. gate and source_set: PaRe only."""

    result: dict
    options: dict  # args.json
    source: common.Source
    loaded: data.Loaded
    model: common.Model
    gate: Any = None
    source_set: Any = None


def rebuild(run, args, method=None):
    """Load the data of a run and its model with the weights of the last epoch; method="pare" adds the gate and the source.

    Raises: UserError if the run is not finished, if it is not a run of `method` (None: any method), or if --data-dir gives
        other data than those it was trained on.
    """
    result, net = finished(run), weights(run)
    if method not in (None, result["method"]):
        raise cli.UserError(f"{run} is a run of {result['method']}; {args.what} needs one of {method}.")
    options = json.loads((Path(run) / "args.json").read_text())
    source = common.load_source(options["backbone"])
    wanted = options["scale"], options["n_train"], options["seed"], "cpu", options["as_released"]
    loaded = data.load(options["task"], args.data_dir, Path(run).parent / "cache", *wanted)
    task, train = loaded.task, loaded.train
    embedder = common.make_embedder(task.shape, source, "random", task.tokens)
    predictor = common.make_predictor(train.output, task.target, source, embedder, pooling=options["as_released"])
    rebuilt = Rebuilt(result, options, source, loaded, common.Model(embedder, source.encoder, predictor))
    modules, splits = {"embedder": embedder, "encoder": source.encoder, "predictor": predictor}, [train]
    if method == "pare":
        rebuilt.gate = modules["gate"] = pare.Gate(source.token_width)
        of_source = options["source"], args.data_dir, options["scale"], data.SOURCE_SAMPLES, options["seed"], "cpu"
        rebuilt.source_set = data.load_proxy(*of_source, source.tokenizer)
        splits.append(rebuilt.source_set)
    for split, seen in zip(splits, options["data"], strict=False):  # runs of ORCA and MoNA list the data of their source, too
        if split.kind != seen:
            raise cli.UserError(f"{run} was trained on {seen} data; {args.data_dir} has {split.kind}.\nUse its --data-dir.")
    for name, module in modules.items():
        module.load_state_dict(part(net, name))
        module.eval()
    return rebuilt


def draw(values, n, seed=0):
    """n values at random without replacement, at most all of them. (m, ...) -> (min(n, m), ...)"""
    return values[torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))[:n]]


def draw_of_classes(split, n, classes, seed=0):
    """At most n random samples of random classes, or pseudo-classes if the task has no classes.

    Returns: indices and classes of the samples, both (n,).
    """
    y = data.class_labels(split, seed=seed)
    index = draw(torch.nonzero(torch.isin(y, draw(y.unique(), classes, seed))).squeeze(1), n, seed)
    return index, y[index]


def plane(x):
    """t-SNE, initialised by PCA, deterministic. (n, D) array -> (n, 2)"""
    return TSNE(init="pca", random_state=0).fit_transform(x)


# ---------------------------------------------------------------------------------------------------------------------
# PaRe: figures 1, 4 and 5
# ---------------------------------------------------------------------------------------------------------------------


def directions(model, seed=0):
    """Two random directions with filter normalisation (Li et al. 2018); 1-d weights are not moved."""
    generator = torch.Generator().manual_seed(seed)
    length = lambda w: w.flatten(1).norm(dim=1).view(-1, *[1] * (w.ndim - 1))  # (filters, 1, ...)

    def random(w):
        d = torch.randn(w.shape, generator=generator)
        return d * length(w) / length(d) if w.ndim > 1 else torch.zeros_like(w)

    return [{name: random(w.detach()) for name, w in model.named_parameters()} for _ in range(2)]


@torch.no_grad()
def surface(model, loss, x, y, steps):
    """loss(model(x), y) at the weights moved by `steps` (S,) along two random directions: (S, S) array."""
    here, (d1, d2) = dict(model.named_parameters()), directions(model)
    moved = lambda a, b: {name: w + a * d1[name] + b * d2[name] for name, w in here.items()}
    return np.array([[float(loss(torch.func.functional_call(model, moved(a, b), x), y)) for a in steps] for b in steps])


def landscape(args, side=15, n=256):
    """Target loss on n training samples without augmentation, over a plane through the weights of the last epoch.

    Both runs use the same random numbers for the directions and the same contour levels. A step of 0.5 moves each filter by
    half its norm.
    """
    steps, surfaces, titles = np.linspace(-0.5, 0.5, side), [], []
    for run in args.runs:
        rebuilt = rebuild(run, args)
        train = rebuilt.loaded.train
        index = draw(torch.arange(len(train)), n)
        surfaces.append(surface(rebuilt.model, rebuilt.loaded.task.loss, train.inputs(index), train.targets(index), steps))
        centre = surfaces[-1][side // 2, side // 2]
        titles.append(f"{rebuilt.result['task']}, {rebuilt.result['variant']}: {centre:.3g} at the centre")
        print(f"{run}: loss {centre:.4f}, in the corners {surfaces[-1][[0, 0, -1, -1], [0, -1, 0, -1]].mean():.4f}")
    levels = np.geomspace(0.999 * max(np.min(surfaces), 1e-3), 1.001 * np.max(surfaces), 16)
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.4), layout="compressed", sharey=True)
    for axis, values, title in zip(axes, surfaces, titles, strict=True):
        shown = axis.contourf(steps, steps, values, levels, cmap=DEPTH, norm="log")
        axis.contour(steps, steps, values, levels, colors="white", linewidths=0.6)
        axis.plot(0, 0, "+", color="white", markersize=9, markeredgewidth=1.8)
        axis.set(aspect="equal", xlabel="first direction", xticks=[-0.5, 0, 0.5], yticks=[-0.5, 0, 0.5])
        axis.set_title(title, fontsize=11)
    axes[0].set_ylabel("second direction")
    figure.colorbar(shown, ax=axes, label="training loss", ticks=levels[::3], format="%.2g")
    save(figure, args)
    return surfaces


@torch.no_grad()
def between(run, index_t, index_s, ks):
    """Intermediate samples of pairs of target and source samples, for each k, as in line 4 of the algorithm in pare.py.

    Returns: means over tokens (1 + len(ks), n, D), first the source samples, then the intermediate samples of each k.
    """
    parts = []
    for i, j in zip(index_t.split(64), index_s.split(64), strict=True):
        tokens_t = run.model.embedder(run.loaded.train.inputs(i))  # (B, N, D)
        tokens_s = run.source.embedder(run.source_set.inputs(j))  # (B, N_s, D)
        scores = run.gate(tokens_t), run.gate(tokens_s)
        mixed = [pare.replace_patches(tokens_t, tokens_s, *scores, k) for k in ks]
        parts.append(torch.stack([tokens.mean(1) for tokens in (tokens_s, *mixed)]))  # (1 + len(ks), B, D)
    return torch.cat(parts, 1)


def pairs_of(run, n):
    """Indices of n random training samples and of as many source samples; fewer if one of the two has fewer."""
    splits = run.loaded.train, run.source_set
    return [draw(torch.arange(len(split)), n)[: min(map(len, splits))] for split in splits]


def token_numbers(run):
    """The number N of target tokens and the largest k, which is limited by the number of source tokens."""
    N = run.model.embedder.tokens
    return N, min(N, run.source.tokens(run.source_set.shape))


def path(args, n=500, classes=10):
    """OTDD of intermediate samples to the source and to the target, for nine k from 0 to the largest possible.

    At most n samples of ten target classes and as many of ten source classes, without augmentation; a sample is the mean of its
    tokens, as in ORCA. Intermediate samples have the labels of the target: their distance to the target is 0 at k = 0, but
    their distance to the source does not reach 0, because its labels are different.
    """
    run = rebuild(args.runs[0], args, "pare")
    (index_t, y_t), (index_s, y_s) = (draw_of_classes(split, n, classes) for split in (run.loaded.train, run.source_set))
    pairs = min(len(y_t), len(y_s))
    y_t, y_s = y_t[:pairs], y_s[:pairs]
    N, most = token_numbers(run)
    ks = sorted({round(most * i / 8) for i in range(9)})
    u_s, *mixed = between(run, index_t[:pairs], index_s[:pairs], ks)  # (pairs, D) each
    terms_s = common.OtddTerms(u_s, y_s, "exact", 0.0)
    to_source = [float(common.otdd(u_s, y_s, u, y_t, terms_s=terms_s)) for u in mixed]
    to_target = [float(common.otdd(mixed[0], y_t, u, y_t)) for u in mixed]
    print("    k  to the source  to the target")
    for k, a, b in zip(ks, to_source, to_target, strict=True):
        print(f"{k:5}  {a:13.4f}  {b:13.4f}")
    figure, axis = plt.subplots(figsize=(6.6, 4), layout="constrained")
    for values, colour, name in ((to_source, SOURCE, "to the source"), (to_target, TARGET, "to the target")):
        axis.plot(ks, values, "o-", color=colour, linewidth=2)
        axis.annotate(name, (ks[-1], values[-1]), (8, 0), textcoords="offset points", color=colour, va="center")
    k0 = min(round(run.options["k_begin"] * N), most)
    axis.axvline(k0, color="0.5", linestyle=":")
    axis.annotate("first epoch", (k0, 0.02), (-5, 0), xycoords=("data", "axes fraction"), textcoords="offset points",
                  color="0.4", fontsize=9, ha="right")  # fmt: skip
    axis.set(xlabel=f"k, source tokens among the {N}", ylabel="OTDD of intermediate samples", ylim=(0, None))
    axis.set_title(f"{run.result['task']}, {len(y_t)} samples a side", fontsize=11)
    plain(axis)
    save(figure, args)
    return ks, to_source, to_target


def embeddings(args, n=200):
    """t-SNE of n source, target and intermediate samples each, with 3/4, 1/2 and 1/4 of the tokens from the source."""
    run = rebuild(args.runs[0], args, "pare")
    index_t, index_s = pairs_of(run, n)
    N, most = token_numbers(run)
    ks = [most * 3 // 4, most // 2, most // 4, 0]
    u = between(run, index_t, index_s, ks)  # (5, n, D), from source to target
    points = plane(u.flatten(0, 1).numpy()).reshape(*u.shape[:2], 2)
    figure, axis = plt.subplots(figsize=(7.6, 5.2), layout="constrained")
    for i, name in enumerate(("source", *(f"k = {k} of {N}" for k in ks[:-1]), "target")):
        size = 18 if name in ("source", "target") else 9
        axis.scatter(*points[i].T, s=size, color=BETWEEN(i / (len(u) - 1)), label=name, linewidths=0)
    axis.set(xticks=[], yticks=[])
    axis.set_title(f"{run.result['task']}: samples as means of their tokens, t-SNE", fontsize=11)
    figure.legend(loc="outside right center", frameon=False, markerscale=2)
    save(figure, args)
    return points


def to_look_at(split, index, size):
    """Samples as images in [0, 1], resized as in the embedder: (B, size, size, 3). Unless C = 3, only the first channel."""
    x = split.inputs(index)
    if split.mean is not None:
        x = x * split.std + split.mean
    x = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
    x = x if x.shape[1] == 3 else x[:, :1].expand(-1, 3, -1, -1)
    low, high = x.amin((1, 2, 3), keepdim=True).clamp(max=0), x.amax((1, 2, 3), keepdim=True).clamp(min=1)
    return ((x - low) / (high - low)).permute(0, 2, 3, 1)


def dimmed(pictures, mask, colour):
    """Fade the patches where mask (B, N) is 0 to a pale colour. (B, size, size, 3) -> the same shape"""
    side, veil = round(mask.shape[1] ** 0.5), torch.tensor(to_rgb(colour))
    mask = F.interpolate(mask.unflatten(1, (side, side))[:, None], pictures.shape[1:3]).permute(0, 2, 3, 1)
    return torch.where(mask > 0.5, pictures, 0.1 * pictures + 0.15 * veil + 0.75)


@torch.no_grad()
def chosen_patches(args, n=8):
    """The patches of n target images that the gate keeps, and of n source images that it takes, for k = N / 2.

    The figure also shows a random selection. Returns: k and the masks (n, N): kept, random, taken.
    """
    run = rebuild(args.runs[0], args, "pare")
    if run.source.modality != "2d":
        raise cli.UserError(f"{args.runs[0]} is a run on a 1D task, which has no image patches.\nGive a run on a 2D task.")
    index_t, index_s = pairs_of(run, n)
    pictures_t = to_look_at(run.loaded.train, index_t, run.source.size)  # (n, size, size, 3)
    pictures_s = to_look_at(run.source_set, index_s, run.source.size)
    scores_t = run.gate(run.model.embedder(run.loaded.train.inputs(index_t)))  # (n, N)
    scores_s = run.gate(run.source.embedder(run.source_set.inputs(index_s)))
    N = scores_t.shape[1]
    k = N // 2
    chance = torch.rand(scores_t.shape, generator=torch.Generator().manual_seed(0))
    masks = pare.top_k_mask(scores_t, N - k), pare.top_k_mask(chance, N - k), pare.top_k_mask(scores_s, k)  # (n, N)
    rows = (
        ("target", pictures_t, TARGET),
        (f"the {N - k} patches\nthat the gate keeps", dimmed(pictures_t, masks[0], TARGET), TARGET),
        (f"{N - k} at random", dimmed(pictures_t, masks[1], TARGET), TARGET),
        ("source", pictures_s, SOURCE),
        (f"the {k} patches\nthat the gate takes", dimmed(pictures_s, masks[2], SOURCE), SOURCE),
    )
    figure, axes = plt.subplots(len(rows), n, figsize=(1.35 * n + 1.6, 1.4 * len(rows)), layout="constrained", squeeze=False)
    for row, (name, pictures, colour) in zip(axes, rows, strict=True):
        for axis, shown in zip(row, pictures.numpy(), strict=True):
            axis.imshow(shown)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_color("0.8")
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", color=colour, labelpad=8, fontsize=10)
    save(figure, args)
    return k, masks


# ---------------------------------------------------------------------------------------------------------------------
# MoNA: knowledge of the source after a run, and knowledge discrepancy
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def features(embedder, encoder, split, index=None):
    """Features of embedder and encoder, mean over tokens: (n, F) array."""
    encoder.eval()
    index = torch.arange(len(split)) if index is None else index
    return torch.cat([encoder(embedder(split.inputs(i))).mean(1) for i in index.split(250)]).numpy()


def classifier():
    """Logistic regression on standardised features."""
    return make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))


def probe_error(source, train, test):
    """0-1 test error of a linear classifier on the features of source embedder and encoder, both frozen."""
    fitted = classifier().fit(features(source.embedder, source.encoder, train), train.y.numpy())
    return 1 - fitted.score(features(source.embedder, source.encoder, test), test.y.numpy())


def cifar10(args):
    """5000 training images and the test images of CIFAR-10: two data.Split."""
    folder = Path(args.data_dir)
    train = images.subset(*images.read_cifar10(folder), 5000, seed=0)
    test = images.read_cifar(folder / "cifar-10-batches-py", ["test_batch"], "labels", 10)
    return [data.Split(*arrays, 10, "official", data.PROXIES["cifar10"], "cpu") for arrays in (train, test)]


def adapted(runs):
    """For each run, its result and its source with the encoder weights of the last epoch.

    Raises: UserError if a run has a 1D backbone.
    """
    for run in runs:
        result = finished(run)
        source = common.load_source(result["backbone"])
        if source.modality != "2d":
            raise cli.UserError(f"{run} has a text encoder, which cannot process CIFAR-10.\nGive runs on 2D tasks.")
        source.encoder.load_state_dict(part(weights(run), "encoder"))
        yield result, source


def probes(args):
    """For each run, its result, its probe error, and the probe error of the pretrained encoder.

    This is how the paper measures source knowledge: a linear probe on the encoder after the last epoch on the target, with the
    SOURCE embedder.
    """
    (train, test), before = cifar10(args), {}  # backbone -> error
    print(f"Probe error on {len(test):,} CIFAR-10 test images, features of {len(train):,} training images\n")
    for run, (result, source) in zip(args.runs, adapted(args.runs), strict=True):
        if (backbone := result["backbone"]) not in before:
            before[backbone] = probe_error(common.load_source(backbone), train, test)
        error = probe_error(source, train, test)
        print(f"{run}: {error:.4f}", file=sys.stderr, flush=True)
        yield result, error, before[backbone]


def probe(args):
    """The probe errors as a table, mean ± standard deviation over seeds.

    Raises: UserError if runs of one task and method have the same seed or different options.
    """
    found = {}  # (task, method, samples) -> [(result, probe error, that of the pretrained encoder)]
    for result, error, before in probes(args):
        key = result["task"], result["variant"], result["n_train"]
        found.setdefault(key, []).append((result, error, before))
    print("| task | method | samples | target test error, last epoch | probe error | pretrained | n |\n" + "|---" * 7 + "|")
    for (task, method, samples), runs in found.items():
        results, left, (before, *_) = zip(*runs, strict=True)
        target = spread(errors_of(results))
        print(f"| {task} | {method} | {samples:,} | {target} | {spread(left)} | {before:.4f} | {len(runs)} |")


def forgetting(args):
    """Probe error by task, by epochs and by method. A panel varies one of them; the others have their most frequent value."""
    found = list(probes(args))
    if len({result["backbone"] for result, *_ in found}) > 1:
        raise cli.UserError("forgetting needs runs with the same backbone.")
    usual = {key: statistics.mode(result[key] for result, *_ in found) for key in ("task", "epochs", "variant", "method")}
    panels = {}  # title -> value -> probe errors
    for key, by, held in (("task", "task", ("variant", "epochs")), ("epochs", "epochs", ("task", "method")),
                          ("variant", "method", ("task", "epochs"))):  # fmt: skip
        groups = {}
        for result, error, _ in found:
            if all(result[other] == usual[other] for other in held):
                groups.setdefault(result[key], []).append(error)
        rest = ", ".join(f"{usual[other]} epochs" if other == "epochs" else usual[other] for other in held)
        if len(groups) > 1:
            panels[f"by {by}\n({rest})"] = {str(k): groups[k] for k in (sorted(groups) if key == "epochs" else groups)}
    if not panels:
        raise cli.UserError("forgetting needs runs that differ in their task, their epochs or their method.")
    shares = [len(groups) + 1 for groups in panels.values()]
    figure = plt.figure(figsize=(min(13.5, 1.5 + 0.85 * sum(shares)), 4), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False, width_ratios=shares)
    values = {}
    for axis, (title, groups), colour in zip(axes[0], panels.items(), COLOURS, strict=False):
        values[title.split("\n")[0]] = dots(axis, groups, colour)
        axis.axhline(found[0][2], color="0.4", linestyle="--", linewidth=1.2)
        axis.set_title(title, fontsize=11)
    axes[0, 0].set_ylabel("probe error on CIFAR-10")
    axes[0, 0].annotate("pretrained", (0.02, found[0][2]), (0, 3), xycoords=("axes fraction", "data"),
                        textcoords="offset points", color="0.4", fontsize=9)  # fmt: skip
    save(figure, args)
    return values


CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def source_features(args, n=1000):
    """t-SNE of n CIFAR-10 test images by source embedder and encoder, for the pretrained encoder and that of each run."""
    train, test = cifar10(args)
    index = draw(torch.arange(len(test)), n)
    before = None, common.load_source(finished(args.runs[0])["backbone"])
    columns = min(4, 1 + len(args.runs))
    lines = -(-(1 + len(args.runs)) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(3.2 * columns, 3.4 * lines + 0.5), layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (result, source) in zip(axes.flat, itertools.chain([before], adapted(args.runs)), strict=False):
        name = f"{result['task']}, {result['variant']}" if result else "pretrained"
        points, error = plane(features(source.embedder, source.encoder, test, index)), probe_error(source, train, test)
        for c, label in enumerate(CIFAR10):
            axis.scatter(*points[test.y[index] == c].T, s=6, color=plt.cm.tab10(c), linewidths=0, label=label)
        axis.set_title(f"{name}\nprobe error {error:.3f}", fontsize=11)
        print(f"{name}: probe error {error:.4f}")
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2 * columns + 2, frameon=False, markerscale=3, fontsize=9,
                  handletextpad=0.1, columnspacing=1.2)  # fmt: skip
    save(figure, args)


def mismatch(P):
    """Modality knowledge discrepancy of P (K_t, K_s), the mean source probabilities of each target class, K_s >= K_t.

        D = 1 - mean_c P'_{c, pi(c)}     pi: one-to-one from target to source classes, maximises the sum of P_{c, pi(c)}
                                         P' = P on the matched source classes, each row normalised to sum to 1

    0: each target class corresponds to one source class. 1 - 1 / K_t: the source model cannot distinguish the target classes.
    """
    _, chosen = linear_sum_assignment(P, maximize=True)
    P = P[:, chosen]  # (K_t, K_t)
    return 1 - (P.diagonal() / P.sum(1)).mean()


def discrepancy(args, classes=10, n=500, draws=5):
    """Mismatch of p(source class | x) and p(target class | x), by our own approximation.

    The source model is the pretrained backbone with a logistic regression on 5000 Tiny-ImageNet images of 200 classes. Its
    input from the target comes from the copied embedder. Since D depends on the number of classes, each task is reduced to ten
    random classes, or clusters if it has fields. Mean and standard deviation are those of five draws of at most n training
    samples.
    """
    source = common.load_source(backbones.DEFAULT_BACKBONE["2d", "tiny"])
    pictures = images.read_tiny_imagenet(Path(args.data_dir), n=data.SOURCE_SAMPLES)
    proxy = data.Split(*pictures, 200, "official", data.PROXIES["tiny_imagenet"], "cpu")
    fitted, found = classifier().fit(features(source.embedder, source.encoder, proxy), proxy.y.numpy()), {}
    for name in args.runs or ("cifar100", "spherical", "darcy", "shallow_water2d"):
        loaded = data.load(name, args.data_dir, f"{args.out_dir}/cache", "tiny", 5000)
        embedder, values = common.make_embedder(loaded.task.shape, source, "copy"), []
        for seed in range(draws):
            index, y = draw_of_classes(loaded.train, n, classes, seed)
            seen = fitted.predict_proba(features(embedder, source.encoder, loaded.train, index))  # (n, K_s)
            values.append(mismatch(np.stack([seen[y == c].mean(0) for c in y.unique()])))
        found[f"{name}\n({loaded.train.kind})"] = values
        print(f"{name}: D = {spread(values)}, of {len(y.unique())} classes")
    figure, axis = plt.subplots(figsize=(1.6 + 1.5 * len(found), 4), layout="constrained")
    means, deviations = ([f(values) for values in found.values()] for f in (np.mean, lambda v: np.std(v, ddof=1)))
    axis.bar(list(found), means, 0.55, yerr=deviations, capsize=4, color=TARGET, ecolor="0.3")
    for x, mean in enumerate(means):
        axis.text(x, 0.03, f"{mean:.2f}", ha="center", color="white", weight="bold")
    axis.axhline(1 - 1 / classes, color="0.4", linestyle="--", linewidth=1.2)
    axis.set(ylim=(0, 1), ylabel="knowledge discrepancy D")
    axis.set_title(f"{classes} classes each; dashed: indistinguishable classes", fontsize=11)
    plain(axis, grid="y")
    save(figure, args)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The slides' proposal
# ---------------------------------------------------------------------------------------------------------------------


def without_half(encoder, tokens, scores):
    """Mean output token when the lower-scored half of the tokens are replaced by their mean. (B, N, D), (B, N) -> (B, F)"""
    lowest = scores.argsort(1)[:, : scores.shape[1] // 2]
    replaced = torch.zeros_like(scores).scatter(1, lowest, 1)[..., None]  # (B, N, 1)
    return encoder(torch.where(replaced > 0, tokens.mean(1, keepdim=True), tokens)).mean(1)


@torch.no_grad()
def scores_that_matter(args, n=500):
    """A table: similarity of the pretrained encoder's mean output with half of the patches and with all of them.

    Cosine of both, centred over the n test images, with the standard error of its mean. If a score is good, the
    similarity is high where the higher-scored half is kept, and low where the lower-scored half is kept.
    """
    source = common.load_source(backbones.DEFAULT_BACKBONE["2d", "tiny"])
    test = data.load("cifar100", args.data_dir, f"{args.out_dir}/cache", "tiny", 1000).test
    x, encoder = test.inputs(draw(torch.arange(len(test)), n)), source.encoder.eval()
    tokens = source.embedder(x)  # (n, N, D)
    N, whole = tokens.shape[1], encoder(tokens).mean(1)
    cut = F.unfold(F.interpolate(x, source.size), source.size // round(N**0.5), stride=source.size // round(N**0.5))
    torch.manual_seed(0)
    scores = {"attention rollout": common.attention_rollout(encoder, tokens)}
    scores |= {f"attention received in block {b + 1}": common.received_attention(encoder, tokens, b) for b in (0, 1)}
    scores |= {"variance of the patch": cut.var(1), "chance": torch.rand(len(x), N)}
    print("| score | higher-scored half kept | lower-scored half kept |\n|---|---|---|")
    found = {}
    for name, score in scores.items():
        outs = (without_half(encoder, tokens, s) for s in (score, -score))
        cosines = [F.cosine_similarity(out - whole.mean(0), whole - whole.mean(0)) for out in outs]
        found[name] = [cosine.mean().item() for cosine in cosines]
        print(f"| {name} |", " | ".join(f"{c.mean():.3f} ± {c.std() / n**0.5:.3f}" for c in cosines), "|")
    return found


# what: smallest and largest number of arguments after it, function
COMMANDS = {
    "idea": (0, 0, idea), "pde": (0, 0, fields), "landscape": (2, 2, landscape), "path": (1, 1, path),
    "embeddings": (1, 1, embeddings), "patches": (1, 1, chosen_patches), "probe": (1, MANY, probe),
    "source": (1, MANY, source_features), "forgetting": (1, MANY, forgetting), "discrepancy": (0, MANY, discrepancy),
    "scores": (0, 0, scores_that_matter),
}  # fmt: skip


def main(args):
    return dispatch(args, COMMANDS, args.runs, "folder(s) of finished runs")


if __name__ == "__main__":
    cli.guarded(main, cli.command_line(Args, __doc__))
