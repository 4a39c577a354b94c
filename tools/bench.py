"""Claims about speed, each measured against what it is compared with, in one run.

    python tools/bench.py topk      the relaxed top-k of PaRe's gate against the official code's N softmaxes

Every candidate runs in a process of its own, the candidates in turn, so that neither memory nor a busy machine favours one.
"""

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
    what: Annotated[Literal["topk"], tyro.conf.Positional]
    """what to measure"""
    rounds: int = 3
    """times each candidate runs, in turn; the median counts"""


if __name__ == "__main__":
    args = data.command_line(Args, __doc__)

import torch

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

    def peak():
        return (
            torch.cuda.max_memory_allocated() / 1e6
            if device.type == "cuda"
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        )

    times, before = [], peak()
    for _ in range(20 if fast else 1):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return statistics.median(times), peak() - before


def topk(args):
    seconds, memory = {name: [] for name in OPERATORS}, {name: [] for name in OPERATORS}
    context = multiprocessing.get_context("spawn")
    for _ in range(args.rounds):
        for name in OPERATORS:
            with context.Pool(1) as pool:
                took, megabytes = pool.apply(one_step, (name,))
            seconds[name].append(took)
            memory[name].append(megabytes)
    machine = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{torch.get_num_threads()} CPU cores ({platform.machine()})"
    )
    print(
        f"Both masks of a PaRe step: batch {B}, {N} tokens, k = {K}, forward and backward, {machine}, torch {torch.__version__}"
    )
    print(f"median of {args.rounds} processes (from fastest to slowest in brackets)\n")
    print(f"| {'operator':22} | {'seconds':27} | extra MB | times faster |\n|---|---|---|---|")
    reference = statistics.median(seconds["N softmaxes (official)"])
    for name, taken in seconds.items():
        middle = statistics.median(taken)
        spread = f"{middle:.4f} ({min(taken):.4f} to {max(taken):.4f})"
        print(f"| {name:22} | {spread:27} | {max(statistics.median(memory[name]), 0):8.0f} | {reference / middle:12.0f} |")


if __name__ == "__main__":
    data.guarded({"topk": topk}[args.what], args)
