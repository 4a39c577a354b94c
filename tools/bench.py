"""Benchmarks: each claim about speed is measured together with its baseline, in one run.

    python tools/bench.py step        a training step of each method and stage, from the setup of the official code to ours
    python tools/bench.py curve       training loss over the first 200 steps on both paths, as docs/fast-path.png
    python tools/bench.py data        data loading, and the projection of images onto the sphere
    python tools/bench.py topk        the relaxed top-k of PaRe's gate against the N softmaxes of the official code
    python tools/bench.py distance    ORCA's dataset distance against the computation of the official code
    python tools/bench.py profile     the ten largest operations of a training step, and how long the device waits
    python tools/bench.py meta        a step of MoNA's stage 1, by finite differences and exact, against a fine-tuning step

`curve`, `data` and `profile` run in this process. Elsewhere each candidate runs in a new one. The candidates take turns, so
that neither memory use nor other jobs on the machine favour one of them.
"""

import itertools
import multiprocessing
import os
import platform
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, get_args

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cli
import common
import data
import finetune
import mona
import orca
import pare
from run import choose_device, embed_all, make_optimizer
from tasks import images

matplotlib.use("Agg")


Method = Literal["pare", "orca", "mona", "finetune"]
Change = Literal["bf16", "fused attention", "compile", "data on the device", "stacked pass"]


@dataclass(frozen=True)
class Args:
    what: Annotated[Literal["step", "profile", "curve", "data", "topk", "distance", "meta"], tyro.conf.Positional]
    """what to measure"""
    device: Literal["cuda", "cpu"] | None = None
    """default: cuda if available"""
    scale: Literal["tiny", "full"] = "tiny"
    """step, profile: full is Swin-B at 224 x 224 with random weights; each row takes minutes on a CPU"""
    methods: tuple[Method, ...] = get_args(Method)
    """step, profile: the methods to measure"""
    changes: tuple[Change, ...] = get_args(Change)
    """step: what is added to the official setup, one after the other; fewer for a quick look"""
    steps: int | None = None
    """step: timed steps per process; default 20, at full scale on a CPU 1. curve: training steps; default 200"""
    workers: int = min(4, os.cpu_count())
    """step, data: worker processes of the DataLoader"""
    data_dir: str = "datasets"
    """curve: folder with CIFAR-100 and Tiny-ImageNet"""
    out: str = "."
    """curve: output folder of the figure"""
    backbone: str = "tiny-swin"
    """meta: backbone of the model. random:swin_base has the size used in the papers"""
    batch_size: int | None = None
    """step, meta: batch size of target and source. Default: that of the recipe; meta: 32"""
    samples: tuple[int, ...] = (1000, 5000)
    """distance: numbers of source samples"""
    rounds: int = 3
    """repetitions of each candidate; the median is reported"""


def n_softmaxes(scores, k, temperature=0.9):
    """The relaxed top-k of the official code (Xie and Ermon 2019), reimplemented: k softmaxes in sequence. (B, N) -> (B, N)

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
    """Hard top-k only, without a gradient for the selection: a lower bound on the cost. (B, N) -> (B, N)"""
    return torch.zeros_like(scores).scatter(1, scores.topk(k).indices, 1.0) * scores


def peak():
    """Peak memory so far in MB, of the GPU or else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


OPERATORS = {"N softmaxes (official)": n_softmaxes, "threshold (ours)": pare.top_k_mask, "plain top-k": plain_top_k}
B, N, K = 16, 3136, 2000


def one_step(operator):
    """Time both masks of a PaRe step (k source tokens, N - k target tokens), forward and backward.

    Returns: seconds (median), additional memory in MB.
    """
    device, _ = choose_device()
    torch.manual_seed(0)
    scores = [torch.rand(B, N, device=device, requires_grad=True) for _ in range(2)]
    weights = torch.randn(B, N, device=device)
    fast = operator != "N softmaxes (official)"

    def step():
        for s, k in zip(scores, (K, N - K), strict=True):
            s.grad = None
            (OPERATORS[operator](s, k) * weights).sum().backward()
        wait()

    times, before = [], peak()
    step()  # not timed: a GPU loads its kernels
    for _ in range(20 if fast else 1):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return statistics.median(times), peak() - before


def wait():
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def new_processes():
    """A context for processes that begin with the libraries imported, and nothing else of this one.

    Without a GPU, forking this process is enough: it computes nothing before the last one has started.
    """
    if not torch.cuda.is_available() and "fork" in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("fork")
    context = multiprocessing.get_context("forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn")
    context.set_forkserver_preload(("torch", "timm", "transformers", "matplotlib.pyplot", "tyro", "ot"))
    return context


def machine():
    cpu = f"{torch.get_num_threads()} CPU cores ({platform.machine()})"
    return f"{torch.cuda.get_device_name() if torch.cuda.is_available() else cpu}, torch {torch.__version__}"


def topk(args):
    seconds, memory = {name: [] for name in OPERATORS}, {name: [] for name in OPERATORS}
    context = new_processes()
    for _ in range(args.rounds):
        for name in OPERATORS:
            with context.Pool(1) as pool:
                took, megabytes = pool.apply(one_step, (name,))
            seconds[name].append(took)
            memory[name].append(megabytes)
    print(f"Both masks of a PaRe step: batch {B}, {N} tokens, k = {K}, forward and backward,", machine())
    print(f"median of {args.rounds} processes (fastest to slowest in brackets)\n")
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
    """The debiased Sinkhorn divergence that the official code takes from geomloss, reimplemented. (n, D), (m, D) -> scalar

    Simultaneous, averaged updates. eps starts at the squared diameter d^2 (used twice) and is divided by 4 until it reaches its
    final value: about 2 + log_4(d^2 / eps) updates, without a test for convergence. One more update carries the gradient.
    """
    a, b = torch.full_like(x[:, 0], 1 / len(x)).detach(), torch.full_like(y[:, 0], 1 / len(y)).detach()
    both = torch.cat([x, y]).detach()
    at = float((both.amax(0) - both.amin(0)).square().sum())  # d^2
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
    """ORCA's distance as computed by its official code: the problems are solved one by one, and all of them in every call.

    The label distances are constants without a gradient. The label of a sample is an additional column of its features.
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
    """Random features, about as far apart as embedded images: n source samples of 10 classes, m target samples of one class.

    Returns: x_s (n, D), y_s (n,), x_t (m, D), y_t (m,).
    """
    generator = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, generator=generator)
    y_s = torch.arange(n) % 10
    x_s, x_t = 0.3 * randn(10, D)[y_s] + 0.4 * randn(n, D), 0.3 * randn(1, D) + 0.4 * randn(m, D)
    return [t.to(device) for t in (x_s, y_s, x_t, torch.zeros(m, dtype=torch.long))]


DISTANCES = {  # name: (inner, reg, whether the source terms are precomputed)
    "the official way": None,
    "ours, exact": ("exact", 0.0, False),
    "ours, Sinkhorn 0.1": ("exact", 0.1, False),
    "ours, Sinkhorn 0.1, source terms once": ("exact", 0.1, True),
    "the same, features only (--as-released)": ("none", 0.1, True),
}


def one_distance(name, n, D):
    """Time one distance and its gradient with respect to the target.

    Returns: seconds (median), value, gradient (m, D).
    """
    device, _ = choose_device()
    x_s, y_s, x_t, y_t = clouds(n, D, device)
    x_t.requires_grad_()
    way = DISTANCES[name]

    def once(x_s, y_s, terms=None):
        if way is None:
            return plain_otdd(x_s, y_s, x_t, y_t)
        return common.otdd(x_s, y_s, x_t, y_t, *way[:2], terms_s=terms)

    once(x_s[:20], y_s[:20]).backward()  # not timed: imports POT, and a GPU loads its kernels
    terms = common.OtddTerms(x_s, y_s, *way[:2]) if way and way[2] else None
    times = []
    for _ in range(5 if n == 1000 and way else 1):
        x_t.grad, start = None, time.perf_counter()
        value = once(x_s, y_s, terms)
        value.backward()
        value = value.item()
        times.append(time.perf_counter() - start)
    return statistics.median(times), value, x_t.grad.cpu().numpy()


def distance(args):
    print("OTDD and its gradient, 10 source classes, 128 target samples of one class,", machine())
    print(f"median of {args.rounds} processes (fastest to slowest in brackets)\n")
    print(
        "| source samples | width | distance | seconds | times faster | value | against exact | gradient: cosine with exact |"
    )
    print("|---|---|---|---|---|---|---|---|")
    context, sizes = new_processes(), list(itertools.product(args.samples, (128, 768)))
    measured = {size: {name: [] for name in DISTANCES} for size in sizes}
    for (n, D), _, name in itertools.product(sizes, range(args.rounds), DISTANCES):
        with context.Pool(1) as pool:
            measured[n, D][name].append(pool.apply(one_distance, (name, n, D)))
    for (n, D), results in measured.items():
        x_s, y_s, x_t, y_t = clouds(n, D, "cpu")
        exact = {}  # inner -> value, gradient. With one target class, constant label distances have the gradient of "none"
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
    """Time a step of stage 1 or of fine-tuning on random images.

    Returns: seconds (median), memory in MB in addition to the model and its data.
    """
    device, _ = choose_device()
    torch.manual_seed(0)
    source = common.load_source(backbone)
    embedder = common.make_embedder((3, 60, 60), source, "random")
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
                parameter.grad = gradient.contiguous()
        optimizer.step()
        optimizer.zero_grad()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times), peak() - before


def meta(args):
    ways, B = ("fine-tuning step", "finite-difference", "exact"), args.batch_size or 32
    results = {way: [] for way in ways}
    context = new_processes()
    for _ in range(args.rounds):
        for way in ways:
            with context.Pool(1) as pool:
                results[way].append(pool.apply(one_meta_step, (way, args.backbone, B)))
    print(f"A step of MoNA's stage 1 and one of fine-tuning, {args.backbone}, batch {B}, fp32,", machine())
    print(f"median of {args.rounds} processes (fastest to slowest in brackets)\n")
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
# Training steps
# ---------------------------------------------------------------------------------------------------------------------

LADDER = get_args(Change)  # cumulative: each adds to those before
FIRST = "fp32, eager, DataLoader"
METHODS = {"pare": pare, "orca": orca, "mona": mona, "finetune": finetune}
PARTS = {"pare": "pare", "orca": "orca, stage 1", "mona": "mona, stage 1", "finetune": "finetune, stage 2 of orca and mona"}


class Samples(torch.utils.data.Dataset):
    """A split as a map-style dataset for a DataLoader: single samples, prepared on the CPU."""

    def __init__(self, split):
        self.split = split

    def __len__(self):
        return len(self.split)

    def __getitem__(self, i):
        index, u = torch.tensor([i]), torch.rand(1, self.split.draws)
        return self.split.inputs(index, u)[0], self.split.targets(index)[0]


def make_splits(method, device, n=2048, classes=100):
    """Random images with the shapes of the task spherical and of the method's source: two data.Split."""
    rng, task = np.random.default_rng(0), data.TASKS["spherical"]
    splits = []
    for like in (task, data.PROXIES["tiny_imagenet" if method == "pare" else "cifar10"]):
        K = min(classes, like.output[0])
        x, y = rng.integers(0, 256, (n, *like.shape), dtype=np.uint8), np.arange(n) % K
        splits.append(data.Split(x, y, K, "toy", like, device))
    return splits


def loader(split, batch_size, steps, workers, device):
    """Batches as in the official code: samples are fetched one by one, collated and copied to the device."""
    drawn = torch.utils.data.RandomSampler(Samples(split), replacement=True, num_samples=batch_size * steps)
    batches = torch.utils.data.DataLoader(
        Samples(split), batch_size, sampler=drawn, num_workers=workers, pin_memory=device.type == "cuda"
    )
    return ((x.to(device), y.to(device)) for x, y in batches)


def in_two_passes(net, x, tokens_s, k, mix):
    """PaRe's forward pass as in the official code: first the unmixed samples, then the mixed ones."""
    tokens_t = net.model.embedder(x)
    out = net.model.predictor(net.model.encoder(tokens_t))
    features = net.model.encoder(mix(tokens_t, tokens_s, net.gate(tokens_t), net.gate(tokens_s), k))
    return out, net.model.predictor(features), net.predictor_s(features)


def one_by_one(tokens_t, tokens_s, scores_t, scores_s, k):
    """A Python loop over the samples, as in the official code from the tenth epoch on, where the gate is no longer trained."""
    each = zip(*(part.split(1) for part in (tokens_t, tokens_s, scores_t, scores_s)), strict=True)
    return torch.cat([pare.replace_as_released(*sample, k) for sample in each])


def build(method, scale, have, device, mix=one_by_one):
    """Build the module that is trained and its training step. `have`: the rungs of the LADDER that are enabled.

    Returns: args, net, step(x, y, x_s, y_s) -> loss.
    """
    torch.manual_seed(0)
    args = METHODS[method].Args(scale=scale, backbone="tiny-swin" if scale == "tiny" else "random:swin_base")
    args = data.complete(args, method, scale)
    source = common.load_source(args.backbone)
    for module in source.encoder.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = "fused attention" in have
    embedder = common.make_embedder((3, 60, 60), source, "copy")
    model = common.Model(embedder, source.encoder, common.ClassPredictor(source.feature_width, 100)).to(device)
    source.embedder.to(device)
    if "compile" in have:
        model.encoder.compile(dynamic=False)
    loss, bf16 = nn.functional.cross_entropy, "bf16" in have
    if method == "pare":
        net = pare.PaRe(model, pare.Gate(source.token_width), common.ClassPredictor(source.feature_width, 200)).to(device)
        k = round(args.k_begin / 2 * embedder.tokens)
        k = min(k, source.tokens((3, 64, 64)))
    else:
        net = nn.ModuleList([embedder, model.predictor]) if method == "mona" else model
    optimizer = make_optimizer(net, args)

    def step(x, y, x_s, y_s):
        if method == "mona":  # stage 1
            with torch.no_grad():
                tokens_s = source.embedder(x_s)
            way = "finite-difference" if "finite difference" in have else "exact"
            g_e, g_h, log = mona.meta_gradient(model.eval(), loss, x, y, tokens_s, y_s, args.inner_lr, args.lambda_, way)
            for parameter, gradient in zip(net.parameters(), g_e + g_h, strict=True):
                parameter.grad = gradient.contiguous()
            total = log[0]
        else:
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                if method != "pare":
                    out = net(x)
                else:
                    tokens_s = source.embedder(x_s)
                    stacked = "stacked pass" in have
                    out, out_m, out_ms = net(x, tokens_s, k) if stacked else in_two_passes(net, x, tokens_s, k, mix)
            total = loss(out.float(), y)
            if method == "pare":
                total = total + 0.5 * loss(out_m.float(), y) + 0.5 * loss(out_ms.float(), y_s)
            total.backward()
        if args.clip > 0:
            nn.utils.clip_grad_norm_(net.parameters(), args.clip)
        optimizer.step()
        optimizer.zero_grad()
        return total.detach()

    return args, net, step


class Operations(TorchDispatchMode):
    """Counts the floating point operations of matrix products and convolutions.

    torch's FlopCounterMode does not work here: it also tracks modules, and this fails with torch.autograd.grad.
    """

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if count := flop_registry.get(function.overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


def most_arithmetic(device, dtype):
    """Floating point operations per second of a large matrix product: the peak of the machine that is reached in practice."""
    n = 8192 if device.type == "cuda" else 2048
    a, b, times = torch.randn(n, n, device=device, dtype=dtype), torch.randn(n, n, device=device, dtype=dtype), []
    for _ in range(8):
        start = time.perf_counter()
        a @ b
        wait()
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times)


def one_rung(method, scale, have, batch_size, timed, workers):
    """Time training steps.

    Returns: batch size, seconds per step, memory in MB in addition to imports and data, operations per step, and operations per
        second that the machine reaches in the same precision.
    """
    device, _ = choose_device()
    on_device, warm = "data on the device" in have, 3
    splits = make_splits(method, device if on_device else "cpu")
    before = peak()
    args, _, step = build(method, scale, have, device)
    B, total = batch_size or args.batch_size, warm + timed
    if on_device:
        batches = [split.batches(total, B, 0, 0) for split in splits]
    else:  # more batches than are timed, so that the workers do not stop early
        batches = [loader(split, B, total + 2 * workers, workers, device) for split in splits]
    for i in range(total):
        if i == warm:
            if device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("warn" if on_device else "default")  # our steps do not synchronise
            start = time.perf_counter()
        (x, y), (x_s, y_s) = map(next, batches)
        step(x, y, x_s, y_s)
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    seconds, memory = (time.perf_counter() - start) / timed, peak() - before
    plain = tuple(name for name in have if name in ("stacked pass", "finite difference"))
    with Operations() as counter:  # eager, not fused: every product is counted
        build(method, scale, plain, device)[2](x, y, x_s, y_s)
    dtype = torch.bfloat16 if "bf16" in have else torch.float32
    return B, seconds, memory, counter.total, most_arithmetic(device, dtype)


def one_alignment(way, scale, timed):
    """Time ORCA's stage 1 on ten target classes.

    Returns: samples and seconds (median) per embedder epoch, memory in MB in addition to imports, data and model.
    """
    device, _ = choose_device()
    args = data.complete(orca.Args(scale=scale, backbone="tiny-swin" if scale == "tiny" else "random:swin_base"), "orca", scale)
    train, source_set = (make_splits("orca", device, n, 10)[side] for side, n in ((0, 2048), (1, args.source_samples)))
    source = common.load_source(args.backbone)
    embedder = common.make_embedder((3, 60, 60), source, "copy").to(device)
    source.embedder.to(device)
    everything, before = torch.arange(len(source_set), device=device), peak()
    with torch.no_grad():
        u_s = embed_all(source.embedder, source_set, everything)
    if way == "ours":
        rows = orca.align(embedder, u_s, source_set.y, train, train.y, replace(args, embedder_epochs=1 + timed))
        return 10 * args.max_samples, statistics.median(row["seconds"] for row in rows[1:]), peak() - before
    optimizer = make_optimizer(embedder, args)
    times = []
    for _ in range(timed):
        start = time.perf_counter()
        for c in range(10):  # class by class, each with a complete distance
            drawn = torch.nonzero(train.y == c)[: args.max_samples, 0].cpu()
            one_class = torch.utils.data.Subset(Samples(train), drawn.tolist())
            batches = torch.utils.data.DataLoader(one_class, 32)
            u_t = torch.cat([embedder(x.to(device)).mean(1) for x, _ in batches])
            (0.1 * plain_otdd(u_s, source_set.y, u_t, torch.zeros(len(u_t), dtype=torch.long, device=device))).backward()
        optimizer.step()
        optimizer.zero_grad()
        wait()
        times.append(time.perf_counter() - start)
    return 10 * args.max_samples, statistics.median(times), peak() - before


def steps(args):
    """Print the table of training steps. Each round measures all rungs, each in a new process."""
    cuda = torch.cuda.is_available()
    timed = args.steps or (1 if args.scale == "full" and not cuda else 20)
    jobs = {}  # (part, rung) -> function, arguments
    for method in args.methods:
        if method == "orca":
            for way in ("the official way", "ours"):
                jobs[PARTS[method], way] = one_alignment, (way, args.scale, min(timed, 3))
            continue
        have = ()
        # no bf16 in stage 1 of MoNA, which subtracts nearly equal numbers
        rungs = {"pare": LADDER, "mona": ("finite difference", *LADDER[1:-1]), "finetune": LADDER[:-1]}[method]
        for rung in (FIRST, *(rung for rung in rungs if rung not in LADDER or rung in args.changes)):
            label = rung if rung == FIRST else f"+ {rung}"
            with_it = have if rung == FIRST else (*have, rung)
            jobs[PARTS[method], label] = one_rung, (method, args.scale, with_it, args.batch_size, timed, args.workers)
            if not cuda and rung in ("bf16", "fused attention"):  # the method files use neither on a CPU
                jobs[PARTS[method], f"{label} (dropped again)"] = jobs.pop((PARTS[method], label))
            else:
                have = with_it
    results = {job: [] for job in jobs}
    context = new_processes()
    for _ in range(args.rounds):
        for job, (function, arguments) in jobs.items():
            with ProcessPoolExecutor(1, context) as pool:  # unlike Pool, allows the workers of a DataLoader
                results[job].append(pool.submit(function, *arguments).result())
    print(f"Training steps, {args.scale} scale, DataLoader with {args.workers} workers,", machine())
    print(f"median of {args.rounds} processes (fastest to slowest in brackets)\n")
    print(
        "| method | step | batch | samples/s | ms a step | peak MB | share of the peak | times the first |\n" + "|---" * 8 + "|"
    )
    first = {}
    for (name, label), rows in results.items():
        B, seconds, memory, *arithmetic = (statistics.median(column) for column in zip(*rows, strict=True))
        taken = [1e3 * row[1] for row in rows]
        share = f"{arithmetic[0] / seconds / arithmetic[1]:.0%}" if arithmetic else "-"
        print(f"| {name} | {label} | {B:.0f} | {B / seconds:.1f} | {1e3 * seconds:.1f} ({min(taken):.1f} to {max(taken):.1f})",
              f"| {memory:.0f} | {share} | {first.setdefault(name, seconds) / seconds:.2f} |", flush=True)  # fmt: skip


def curve(args):
    """PaRe's first 200 steps at the tiny scale, same weights and batches: fp32 eager in two passes against our path.

    Rounding errors alone make two runs diverge, because they change which patches are selected. To show how far, the reference
    path is repeated from weights with a relative perturbation of 1e-6.
    """
    device, _ = choose_device()
    train = data.load("spherical", args.data_dir, "runs/cache", "tiny", 5000, 0, device).train
    source_set = data.load_proxy("tiny_imagenet", args.data_dir, "tiny", 5000, 0, device)
    n, losses = args.steps or 200, {}
    eager = "fp32, eager, two passes"
    ways = {
        eager: (),
        "the same, weights off by 1e-6": (),
        "compile, stacked": LADDER[2:],
        "compile, stacked, bf16": ("bf16", *LADDER[2:]),
    }
    for way, have in ways.items():
        recipe, net, step = build("pare", "tiny", have, device, pare.replace_patches)
        plans = (split.batches(n, recipe.batch_size, 0, 0) for split in (train, source_set))
        if "off" in way:
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter *= 1 + 1e-6
        losses[way] = torch.stack([step(*target, *source) for target, source in zip(*plans, strict=True)]).cpu()
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 5.5), sharex=True, layout="constrained", height_ratios=(2, 1))
    reference = losses[eager]
    spread = (reference - torch.nn.functional.avg_pool1d(reference[None], 21, 1, 10, count_include_pad=False)[0]).std().item()
    print(f"PaRe, {train.kind} data, {machine()}: {n} steps; the standard deviation between batches is {spread:.4f}")
    for way, loss in losses.items():
        above.plot(loss, label=way, linewidth=1)
        if loss is not reference:
            off = loss - reference
            below.plot(off, label=way, color=above.lines[-1].get_color(), linewidth=1)
            print(f"{way:24} mean difference {off.mean():+.5f}, largest {off.abs().max():.5f},",
                  f"last 50 steps {off[-50:].mean():+.5f}")  # fmt: skip
    below.axhspan(-spread, spread, color="0.9", label="standard deviation between batches")
    above.set(
        ylabel="loss", title=f"PaRe, spherical ({train.kind} data), tiny scale, {device.type}: the same batches on each path"
    )
    below.set(ylabel="difference", xlabel="step")
    for axis in (above, below):
        axis.legend(loc="upper left" if axis is below else "upper right", fontsize=8)
        axis.grid(alpha=0.3)
    figure.savefig(Path(args.out) / "fast-path.png", dpi=110)
    print(Path(args.out) / "fast-path.png")


def loading(args):
    """Time loading batches of 32 images of PaRe's source (random crops), and the projection onto the sphere."""
    (device, _), n = choose_device(), 40
    times = {
        name: [] for name in ("load: DataLoader", "load: data on the device", "project: one by one", "project: 500 at once")
    }

    def take(name, count, work):
        start = time.perf_counter()
        work()
        wait()
        times[name].append(count / (time.perf_counter() - start))

    on_cpu, on_device = make_splits("pare", "cpu")[1], make_splits("pare", device)[1]
    x, turns = np.random.default_rng(0).integers(0, 256, (500, 3, 32, 32), dtype=np.uint8), images.random_rotations(500, 0)
    for _ in range(args.rounds):
        take("load: DataLoader", 32 * n, lambda: [None for _ in loader(on_cpu, 32, n, args.workers, device)])
        take("load: data on the device", 32 * n, lambda: [None for _ in on_device.batches(n, 32, 0, 0)])
        take(
            "project: one by one",
            100,
            lambda: [images.project_to_sphere(x[i : i + 1], turns[i : i + 1]) for i in range(100)],
        )
        take("project: 500 at once", 500, lambda: images.project_to_sphere(x, turns))
    print(f"{args.workers} workers, {machine()}, median of {args.rounds}\n\n| what | images/s | times faster |\n|---|---|---|")
    for name, rates in times.items():
        slow = statistics.median(times["load: DataLoader" if "load" in name else "project: one by one"])
        print(f"| {name} | {statistics.median(rates):.0f} | {statistics.median(rates) / slow:.1f} |")


def profile(args, steps=3):
    """Print the largest operations of a step of each method as its file runs it, and the time in which the device waits."""
    device, _ = choose_device()
    have = ("data on the device", "stacked pass", "finite difference") + ("bf16",) * (device.type == "cuda")
    kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * (device.type == "cuda")
    own = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    for method in args.methods:
        settings, _, step = build(method, args.scale, have, device)
        B = args.batch_size or settings.batch_size
        batches = zip(*(split.batches(3 + steps, B, 0, 0) for split in make_splits(method, device)), strict=True)
        for _ in range(3):
            step(*itertools.chain(*next(batches)))
        with torch.profiler.profile(activities=kinds) as profiler:
            start = time.perf_counter()
            for _ in range(steps):
                step(*itertools.chain(*next(batches)))
            wait()
            wall = 1e3 * (time.perf_counter() - start) / steps
        # of operations: the time of a GPU's kernels is part of the operation that started them, and in rows of its own
        rows = [row for row in profiler.key_averages() if row.device_type == torch.autograd.DeviceType.CPU]
        rows.sort(key=lambda row: -getattr(row, own))
        busy = sum(getattr(row, own) for row in rows) / 1e3 / steps
        print(f"A step of {PARTS[method]}, {args.scale} scale, batch {B}, eager, {machine()}: {wall:.1f} ms,",
              f"of which the device waits {max(0, wall - busy):.1f}\n")  # fmt: skip
        print("| operation | calls | ms | share |\n|---|---|---|---|")
        for row in rows[:10]:
            ms = getattr(row, own) / 1e3 / steps
            print(f"| {row.key[:60]} | {row.count / steps:.0f} | {ms:.2f} | {ms / busy:.1%} |")
        print()


COMMANDS = {
    "step": steps, "profile": profile, "curve": curve, "data": loading, "topk": topk, "distance": distance, "meta": meta,
}  # fmt: skip


def main(args):
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # early enough: imports do not initialise CUDA. Child processes inherit it
    if args.device == "cuda" and not torch.cuda.is_available():
        raise cli.UserError("--device cuda: no GPU is available.\nOmit --device.")
    COMMANDS[args.what](args)


if __name__ == "__main__":
    cli.guarded(main, cli.command_line(Args, __doc__))
