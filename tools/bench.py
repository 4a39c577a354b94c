"""Claims about speed, each measured against what it is compared with, in one run; and what errors on PDE tasks compare with.

    python tools/bench.py topk        the relaxed top-k of PaRe's gate against the official code's N softmaxes
    python tools/bench.py distance    ORCA's distance between data sets against the way the official code works it out
    python tools/bench.py meta        MoNA's step of stage 1, by finite difference and exact, against a plain fine-tuning step
    python tools/bench.py references  test errors of a mean, of the input and of a small specialist on the PDE tasks, tiny scale

Every candidate for speed runs in a process of its own, the candidates in turn, so that neither memory nor a busy machine
favours one.
"""

import contextlib
import itertools
import multiprocessing
import platform
import resource
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data


@dataclass(frozen=True)
class Args:
    what: Annotated[Literal["topk", "distance", "meta", "references"], tyro.conf.Positional]
    """what to measure"""
    backbone: str = "tiny-swin"
    """meta: of the model. random:swin_base has the papers' size"""
    batch_size: int = 32
    """meta: of target and source"""
    samples: tuple[int, ...] = (1000, 5000)
    """distance: of the source"""
    rounds: int = 3
    """times each candidate runs, in turn; the median counts"""
    data_dir: str = "datasets"
    """references: where the official files are read from; missing ones are simulated"""
    cache: str = "runs/cache"
    """references: where simulated data are kept, the methods' own place"""


if __name__ == "__main__":
    args = data.command_line(Args, __doc__)

import torch

import common
import mona
import pare


def n_softmaxes(scores, k, temperature=0.9):
    """The relaxed top-k of the official code, restated (Xie and Ermon 2019): k softmaxes in sequence.

    a_0 = 0;   for i = 1..k:  s <- s + log(1 - a_{i-1}),  a_i = softmax(s / tau);   khot = sum_i a_i
    """
    tiny = torch.finfo(scores.dtype).tiny
    onehot, khot = torch.zeros_like(scores), torch.zeros_like(scores)
    for _ in range(k):
        scores = scores + torch.log((1 - onehot).clamp(min=tiny))
        onehot = torch.softmax(scores / temperature, dim=1)
        khot = khot + onehot
    hard = torch.zeros_like(khot).scatter(1, khot.topk(k).indices, 1.0)
    return hard - khot.detach() + khot


def plain_top_k(scores, k):
    """The hard choice alone, which has no gradient: the least that any of them can cost."""
    return torch.zeros_like(scores).scatter(1, scores.topk(k).indices, 1.0) * scores


def peak():
    """Most memory so far, in MB: of the device, or of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


OPERATORS = {"N softmaxes (official)": n_softmaxes, "threshold (ours)": pare.top_k_mask, "plain top-k": plain_top_k}
B, N, K = 16, 3136, 2000


def one_step(operator):
    """Both masks of a PaRe step, k of the source tokens and N - k of the target's, forward and backward: seconds, MB."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    scores = [torch.rand(B, N, device=device, requires_grad=True) for _ in range(2)]
    weights = torch.randn(B, N, device=device)
    fast = operator != "N softmaxes (official)"

    def step():
        for s, k in zip(scores, (K, N - K), strict=True):
            s.grad = None
            (OPERATORS[operator](s, k) * weights).sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()

    times, before = [], peak()
    for _ in range(20 if fast else 1):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return statistics.median(times), peak() - before


def machine():
    cpu = f"{torch.get_num_threads()} CPU cores ({platform.machine()})"
    return f"{torch.cuda.get_device_name() if torch.cuda.is_available() else cpu}, torch {torch.__version__}"


def topk(args):
    seconds, memory = {name: [] for name in OPERATORS}, {name: [] for name in OPERATORS}
    context = multiprocessing.get_context("spawn")
    for _ in range(args.rounds):
        for name in OPERATORS:
            with context.Pool(1) as pool:
                took, megabytes = pool.apply(one_step, (name,))
            seconds[name].append(took)
            memory[name].append(megabytes)
    print(f"Both masks of a PaRe step: batch {B}, {N} tokens, k = {K}, forward and backward,", machine())
    print(f"median of {args.rounds} processes (from fastest to slowest in brackets)\n")
    print(f"| {'operator':22} | {'seconds':27} | extra MB | times faster |\n|---|---|---|---|")
    reference = statistics.median(seconds["N softmaxes (official)"])
    for name, taken in seconds.items():
        middle = statistics.median(taken)
        spread = f"{middle:.4f} ({min(taken):.4f} to {max(taken):.4f})"
        print(f"| {name:22} | {spread:27} | {max(statistics.median(memory[name]), 0):8.0f} | {reference / middle:12.0f} |")


# ---------------------------------------------------------------------------------------------------------------------
# Distances
# ---------------------------------------------------------------------------------------------------------------------


def square(x, y):
    return (x * x).sum(1)[:, None] - 2 * x @ y.T + (y * y).sum(1)[None]


def plain_divergence(x, y, cost, eps=0.1):
    """A debiased Sinkhorn divergence as the official code gets it from geomloss, restated. (n, D), (m, D) -> scalar

    Simultaneous, averaged updates while eps falls from the squared diameter D^2 (twice) by quarters to its last value: about
    2 + log_4(D^2 / eps) of them, with no look at whether that was enough. Then one more, with a gradient.
    """
    a, b = torch.full_like(x[:, 0], 1 / len(x)).detach(), torch.full_like(y[:, 0], 1 / len(y)).detach()
    both = torch.cat([x, y]).detach()
    at = float((both.amax(0) - both.amin(0)).square().sum())  # D^2
    annealing = [at]
    while at > eps:
        annealing.append(at)
        at /= 4
    annealing.append(eps)
    softmin = lambda eps, C, weights, g: -eps * ((g - C) / eps + weights.log()).logsumexp(1)
    C_xy, C_yx, C_xx, C_yy = cost(x, y.detach()), cost(y, x.detach()), cost(x, x.detach()), cost(y, y.detach())
    with torch.no_grad():
        f, f_own = (softmin(annealing[0], C, w, torch.zeros_like(w)) for C, w in ((C_xy, b), (C_xx, a)))
        g, g_own = (softmin(annealing[0], C, w, torch.zeros_like(w)) for C, w in ((C_yx, a), (C_yy, b)))
        for at in annealing:
            f, g = (f + softmin(at, C_xy, b, g)) / 2, (g + softmin(at, C_yx, a, f)) / 2
            f_own, g_own = (f_own + softmin(at, C_xx, a, f_own)) / 2, (g_own + softmin(at, C_yy, b, g_own)) / 2
    f, g = softmin(eps, C_xy, b, g), softmin(eps, C_yx, a, f)
    return (a * (f - softmin(eps, C_xx, a, f_own))).sum() + (b * (g - softmin(eps, C_yy, b, g_own))).sum()


def plain_otdd(x_s, y_s, x_t, y_t, eps=0.1):
    """ORCA's distance as its official code works it out: one problem after the other, all of them again in every call.

    The label distances are numbers, without a gradient; a sample carries its label as one more column.
    """
    y_s, y_t = y_s.unique(return_inverse=True)[1], y_t.unique(return_inverse=True)[1]
    clouds = [x[y == c].detach() for x, y in ((x_s, y_s), (x_t, y_t)) for c in y.unique()]
    w = torch.zeros(len(clouds), len(clouds), device=x_s.device)
    for i in range(len(clouds)):
        for j in range(i):
            w[i, j] = w[j, i] = plain_divergence(clouds[i], clouds[j], square, eps).item()

    def cost(x, y):
        return square(x[:, :-1], y[:, :-1]) / 2 + w[x[:, -1].long()][:, y[:, -1].long()] / 2

    labelled = (torch.cat([x, y[:, None]], 1) for x, y in ((x_s, y_s), (x_t, y_t + len(y_s.unique()))))
    return plain_divergence(*labelled, cost, eps)


def clouds(n, D, device, m=128):
    """n source samples in 10 classes and m target samples in one, about as far apart as embedded pictures."""
    generator = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, generator=generator)
    y_s = torch.arange(n) % 10
    x_s, x_t = 0.3 * randn(10, D)[y_s] + 0.4 * randn(n, D), 0.3 * randn(1, D) + 0.4 * randn(m, D)
    return [t.to(device) for t in (x_s, y_s, x_t, torch.zeros(m, dtype=torch.long))]


DISTANCES = {  # name: (inner, reg, source terms given)
    "the official way": None,
    "ours, exact": ("exact", 0.0, False),
    "ours, Sinkhorn 0.1": ("exact", 0.1, False),
    "ours, Sinkhorn 0.1, source terms once": ("exact", 0.1, True),
    "the same, features only (--as-released)": ("none", 0.1, True),
}


def one_distance(name, n, D):
    """Value and gradient of one distance: seconds, value, gradient."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x_s, y_s, x_t, y_t = clouds(n, D, device)
    x_t.requires_grad_()
    common.otdd(x_s[:20], y_s[:20], x_t, y_t)  # imports POT
    way = DISTANCES[name]
    terms = common.OtddTerms(x_s, y_s, *way[:2]) if way and way[2] else None
    times = []
    for _ in range(5 if n == 1000 and way else 1):
        x_t.grad, start = None, time.perf_counter()
        value = plain_otdd(x_s, y_s, x_t, y_t) if way is None else common.otdd(x_s, y_s, x_t, y_t, *way[:2], terms_s=terms)
        value.backward()
        value = value.item()
        times.append(time.perf_counter() - start)
    return statistics.median(times), value, x_t.grad.cpu().numpy()


def distance(args):
    import numpy as np

    print("OTDD and its gradient, 10 source classes, 128 target samples of one class,", machine())
    print(f"median of {args.rounds} processes (from fastest to slowest in brackets)\n")
    print(
        "| source samples | width | distance | seconds | times faster | value | against exact | gradient: cosine with exact |"
    )
    print("|---|---|---|---|---|---|---|---|")
    context = multiprocessing.get_context("spawn")
    for n, D in itertools.product(args.samples, (128, 768)):
        results = {name: [] for name in DISTANCES}
        for _ in range(args.rounds):
            for name in DISTANCES:
                with context.Pool(1) as pool:
                    results[name].append(pool.apply(one_distance, (name, n, D)))
        x_s, y_s, x_t, y_t = clouds(n, D, "cpu")
        exact = {}  # inner -> value, gradient; "none" is what remains where label distances are constants
        for inner in ("exact", "none"):
            x = x_t.clone().requires_grad_()
            value = common.otdd(x_s, y_s, x, y_t, inner)
            value.backward()
            exact[inner] = value.item(), x.grad.numpy()
        reference = statistics.median(r[0] for r in results["the official way"])
        for name, rows in results.items():
            seconds = [row[0] for row in rows]
            way, (_, value, gradient) = DISTANCES[name], rows[0]
            true_value = exact["none" if way and way[0] == "none" else "exact"][0]
            true = exact["exact" if way and way[0] == "exact" else "none"][1]
            cosine = (gradient * true).sum() / np.sqrt((gradient**2).sum() * (true**2).sum())
            middle = statistics.median(seconds)
            spread = f"{middle:.4f} ({min(seconds):.4f} to {max(seconds):.4f})"
            print(f"| {n:,} | {D} | {name} | {spread} | {reference / middle:.0f} |",
                  f"{value:.4g} | {value / true_value - 1:+.2%} | {cosine:.3f} |", flush=True)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# MoNA's meta-gradient
# ---------------------------------------------------------------------------------------------------------------------


def one_meta_step(way, backbone, B):
    """A step of stage 1, or of plain fine-tuning, on random pictures: seconds, MB above the model and its data."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    source = common.load_source(backbone)
    embedder = common.Embedder2d(3, source.token_width, source.size)
    model = common.Model(embedder, source.encoder, common.ClassPredictor(source.feature_width, 100)).to(device)
    source.embedder.to(device)
    x, y, x_s, y_s = (t.to(device) for t in (torch.randn(B, 3, 60, 60), torch.arange(B) % 100, torch.randn(B, 3, 32, 32),
                                             torch.arange(B) % 10))  # fmt: skip
    plain = way == "fine-tuning step"
    trained = list(model.parameters()) if plain else [*embedder.parameters(), *model.predictor.parameters()]
    optimizer = torch.optim.AdamW(trained, 1e-4, fused=True)
    loss = torch.nn.functional.cross_entropy
    before, times = peak(), []
    for _ in range(3 if source.size > 100 else 20):
        start = time.perf_counter()
        if plain:
            loss(model(x), y).backward()
        else:
            with torch.no_grad():
                tokens_s = source.embedder(x_s)
            g_e, g_h, _ = mona.meta_gradient(model, loss, x, y, tokens_s, y_s, 1.0, 1.0, way)
            for parameter, gradient in zip(trained, g_e + g_h, strict=True):
                parameter.grad = gradient
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times), peak() - before


def meta(args):
    ways = ("fine-tuning step", "first-order", "finite-difference", "exact")
    results = {way: [] for way in ways}
    context = multiprocessing.get_context("spawn")
    for _ in range(args.rounds):
        for way in ways:
            with context.Pool(1) as pool:
                results[way].append(pool.apply(one_meta_step, (way, args.backbone, args.batch_size)))
    print(f"A step of MoNA's stage 1 and one of fine-tuning, {args.backbone}, batch {args.batch_size}, fp32,", machine())
    print(f"median of {args.rounds} processes (from fastest to slowest in brackets)\n")
    print(
        "| step | seconds | times a fine-tuning step | MB above the model | times a fine-tuning step |\n|---|---|---|---|---|"
    )
    seconds_of, memory_of = ([statistics.median(column) for column in zip(*results[ways[0]], strict=True)][k] for k in (0, 1))
    for way, rows in results.items():
        seconds, memory = zip(*rows, strict=True)
        middle, extra = statistics.median(seconds), statistics.median(memory)
        print(f"| {way} | {middle:.3f} ({min(seconds):.3f} to {max(seconds):.3f}) | {middle / seconds_of:.2f} |",
              f"{extra:.0f} | {extra / memory_of:.2f} |")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# What errors on PDE tasks compare with
# ---------------------------------------------------------------------------------------------------------------------


class Fourier(torch.nn.Module):
    """A small Fourier neural operator (Li et al. 2021) in one or two dimensions: v <- v + gelu(W v + F^-1 R F v), three times.

    R is a complex matrix for each of the lowest frequencies. They are so few that the transform F is a product with their
    waves, axis by axis. Places are additional inputs.
    """

    def __init__(self, task, width=16, modes=12, layers=3):
        super().__init__()
        self.space, self.output, self.layers = task.shape[1:], task.output, layers
        frequencies = [torch.arange(-modes, modes), torch.arange(modes)][-len(self.space) :]
        R = torch.randn(layers, width, width, *map(len, frequencies), 2) / width
        self.R = torch.nn.Parameter(R)
        self.waves = [
            torch.exp(-2j * torch.pi * torch.arange(n)[:, None] * k / n) for n, k in zip(self.space, frequencies, strict=True)
        ]
        conv = torch.nn.Conv1d if len(self.space) == 1 else torch.nn.Conv2d
        self.W = torch.nn.ModuleList(conv(width, width, 1) for _ in range(layers))
        self.lift, self.project = conv(task.shape[0] + len(self.space), width, 1), conv(width, 1, 1)

    def forward(self, x):
        places = torch.stack(torch.meshgrid(*(torch.linspace(0, 1, n) for n in self.space), indexing="ij"))
        v = self.lift(torch.cat([x, places.expand(len(x), *places.shape)], 1))  # (B, width, *space)
        for R, W in zip(torch.view_as_complex(self.R), self.W, strict=True):
            f = v.to(R.dtype)
            for axis, wave in enumerate(self.waves, 2):
                f = (f.movedim(axis, -1) @ wave / len(wave)).movedim(-1, axis)
            f = torch.einsum("bi...,io...->bo...", f, R)  # (B, width, modes)
            for axis, wave in enumerate(self.waves, 2):
                f = (f.movedim(axis, -1) @ wave.conj().T).movedim(-1, axis)
            v = v + torch.nn.functional.gelu(W(v) + f.real)
        return self.project(v).reshape(-1, *self.output)  # (B, 1, *space) -> (B, *output)


def specialist(loaded, epochs=10, batch_size=10):
    """Test predictions of a Fourier operator trained on the task's loss with AdamW, 2e-3 falling to 0 linearly."""
    torch.manual_seed(0)
    net, train, test = Fourier(loaded.task), loaded.train, loaded.test
    steps = len(train) // batch_size
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, epochs * steps)
    for epoch in range(epochs):
        for x, y in train.batches(steps, batch_size, 0, epoch):
            loaded.task.loss(net(x), y).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    with torch.no_grad():
        return torch.cat([net(test.inputs(part)) for part in torch.arange(len(test)).split(batch_size)])


def references(args):
    """The errors that a method has to beat, on the test set of the tiny scale."""
    print(f"Test errors, tiny scale, {machine()}\n")
    print("| task | data | metric | the mean | the input | Fourier operator | its seconds |\n|---|---|---|---|---|---|---|")
    for task in (task for task in data.TASKS.values() if task.simulate):
        with contextlib.redirect_stdout(sys.stderr):
            loaded = data.load(task.name, args.data_dir, args.cache, "tiny")
        train, test = loaded.train, loaded.test
        index = torch.arange(len(test))
        y = test.targets(index)
        same = test.inputs(index)[:, 0].reshape(y.shape)  # darcy: the normalised coefficient taken for the normalised pressure
        mean = (train.y.mean(0) * (task.name != "darcy")).expand_as(y)  # darcy's score adds the mean itself
        errors = [loaded.task.score(out.numpy(), y.numpy()) for out in (mean, same)]
        start = time.perf_counter()
        errors.append(loaded.task.score(specialist(loaded).numpy(), y.numpy()))
        seconds, columns = time.perf_counter() - start, " | ".join(f"{error:.4f}" for error in errors)
        print(f"| {task.name} | {train.kind}, {len(train)} | {task.metric} | {columns} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    ways = {"topk": topk, "distance": distance, "meta": meta, "references": references}
    data.guarded(ways[args.what], args)
