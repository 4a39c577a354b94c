"""ORCA: align the target embedder with the source by a distance between data sets, then fine-tune.

Shen et al., "Cross-Modal Fine-Tuning: Align then Refine", ICML 2023.

A pretrained encoder expects tokens distributed like those of its own modality. ORCA first trains the new embedder, alone, to
bring the joint distribution of embedded target data and labels close to that of the source; then it fine-tunes everything.

    stage 1, in each embedder epoch:
    1  u_s = mean over tokens of source embedder(x_s), with labels y_s       once: the source embedder is frozen
    2  u_t = mean over tokens of embedder(x_t), with labels y_t              at most max_samples of each class
    3  OTDD = min over plans pi of sum_ij pi_ij (1/2 |u_i - u_j|^2 + 1/2 W^2(y_i, y_j))
       W^2(y, y') the transport cost between the samples of class y and those of class y'
    4  one step on the embedder down the gradient of OTDD, or of sum_p n_p / n OTDD_p with several problems p
    stage 2:
    5  L = L(h(g(embedder(x_t))), y_t), step on embedder, encoder g and predictor h

    python orca.py --task spherical

Measured with 1,000 real samples, tiny scale, 5 seeds (satellite: 3), last epoch, naive fine-tuning in parentheses: error on
cifar100 0.785 ± 0.004 (0.784 ± 0.004), on satellite 0.378 ± 0.012 (0.417 ± 0.012). docs/results.md has the commands and more.
Published, spherical, full scale: 0.299.

Line 3 puts all target classes into one problem, as OTDD is defined; this is the default at the tiny scale. At the full scale
each problem has ten target classes and n_p of the n samples (`--classes-per-problem`), and both transport costs are entropic
and debiased (`--reg`).
The official code has one problem for each target class, and its W^2 has no gradient: source labels then have no effect, and
target labels only decide which samples share a problem. `--as-released` optimises the same objective. See
docs/paper-vs-code.md, O1 to O8.
"""

import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

import cli
import common
import data
from run import LOG_EVERY, Run, average_gradients, embed_all, make_optimizer, make_schedule, mean_loss, seed_everything


@dataclass(frozen=True)
class Args(cli.Args):
    """The options of ORCA; those that all methods share are in cli.Args."""

    embedder_epochs: int | None = None
    """steps of stage 1; each visits every class. 0: naive fine-tuning. Default: 60 (ninapro 100, OpenML 20); tiny scale 20"""
    embedder_lr: float | None = None
    """learning rate of stage 1, divided by 5 after 21, 41 and 61 epochs. Default (official): 10 times --lr, or --lr itself
    where it is above 1e-3; --lr before its scaling for gradient accumulation"""
    objective: Literal["otdd", "otdd-gaussian", "mmd", "l2"] = "otdd"
    """the distance to minimise. otdd-gaussian: W^2 between normal distributions. mmd, l2: distance of each target class to
    source samples drawn at random, whatever their labels"""
    reg: float | None = None
    """entropic strength of OTDD, in squared units of the features. Default: 0.1 (full, official; with --as-released), for GPUs;
    0 (tiny): exact linear programs, faster on CPUs"""
    classes_per_problem: int | None = None
    """target classes in one transport problem. Default: all, as OTDD is defined (tiny); 10 (full), to save time and memory.
    Always 1 with --as-released, mmd and l2"""
    max_samples: int | None = None
    """samples of a target class in an embedder epoch, drawn anew in each. Default: 128 (psicov, deepsea 64); tiny scale 32"""
    source_samples: int | None = None
    """source samples in the distance. Default: 5,000; tiny scale 1,000"""


def make_distance(u_s, y_s, objective="otdd", inner="exact", reg=0.0):
    """The objective of stage 1 as a function (u_t, y_t, mass_t, generator) -> scalar, differentiable in u_t (m, D).

    u_s (n, D), y_s (n,): the embedded source, which stays constant: its own terms are computed once, here.
    """
    if objective.startswith("otdd"):
        terms_s = common.OtddTerms(u_s, y_s, inner, reg)
        return lambda u_t, y_t, mass_t, generator: common.otdd(u_s, y_s, u_t, y_t, inner, reg, mass_t, terms_s)

    def mmd(u_t, y_t, mass_t, generator):  # against as many source samples, drawn with replacement
        return common.mmd(u_s[torch.randint(len(u_s), (len(u_t),), generator=generator)], u_t)  # (m, D), (m, D)

    def l2(u_t, y_t, mass_t, generator):  # mean over max(1, n // m) random pairings of source and target
        n, m = len(u_s), len(u_t)
        rounds = max(1, n // m)
        order = torch.cat([torch.randperm(n, generator=generator) for _ in range(-(-rounds * m // n))])  # (>= rounds m,)
        return common.l2(u_s[order[: rounds * m]].view(rounds, m, -1), u_t)  # (rounds, m, D), (m, D)

    return {"mmd": mmd, "l2": l2}[objective]


def draw(members, max_samples, n, generator):
    """Draw at most `max_samples` samples of each class. Returns index (m,), and mass (m,): that of class c sums to n_c / n."""
    chosen = [index[torch.randperm(len(index), generator=generator)[:max_samples]] for index in members]
    mass = [torch.full((len(c),), len(index) / len(c) / n) for index, c in zip(members, chosen, strict=True)]
    return torch.cat(chosen), torch.cat(mass)  # (m,), (m,)


def align(embedder, u_s, y_s, train, y_t, args, progress=iter):
    """Stage 1: trains `embedder`, and nothing else, to bring the target to the source (lines 2 to 4).

    Args:
        u_s (n, D), y_s (n,): the embedded source and its labels.
        train: the target's training samples, a data.Split. y_t (len(train),): their labels or pseudo-labels.
        args: the options.
        progress: wraps the embedder epochs.
    Returns: a row for each embedder epoch: its number, the distance before its step, seconds.
    Raises: UserError if the embedder diverges.
    """
    # as released: each class is a problem of its own, in which the label term W^2 is constant and therefore left out
    otdd, released = args.objective.startswith("otdd"), args.as_released
    inner = "gaussian" if args.objective == "otdd-gaussian" else "none" if released else "exact"
    per_problem = args.classes_per_problem if otdd and not released else 1
    distance = make_distance(u_s, y_s, args.objective, inner, args.reg)
    optimizer = make_optimizer(embedder, data.of_embedder(args, "orca"))  # --embedder-lr
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [21, 41, 61], 0.2)
    members = [torch.nonzero(y_t == c).squeeze(1) for c in y_t.unique()]  # the samples of each class
    rows = []
    for epoch in progress(range(args.embedder_epochs)):
        generator = torch.Generator().manual_seed(cli.stream("alignment", args.seed, epoch))
        start, total = time.perf_counter(), 0.0
        for classes in torch.randperm(len(members), generator=generator).split(per_problem):
            index, mass = draw([members[c] for c in classes.tolist()], args.max_samples, len(y_t), generator)
            mass = mass.to(u_s.device)
            u_t = embed_all(embedder, train, index)  # line 2: (m, D)
            if not torch.isfinite(u_t).all():
                raise cli.UserError(f"the embedder diverged in epoch {epoch + 1} of stage 1.\nLower --embedder-lr.")
            loss = mass.sum() * distance(u_t, y_t[index], mass, generator)  # line 4: n_p / n OTDD_p
            loss.backward()
            total += loss.detach()
        average_gradients(embedder.parameters())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        rows.append({"epoch": epoch + 1, "distance": float(total), "seconds": time.perf_counter() - start})
    return rows


def main(args):
    # ---- set up: processes, device, seed, data, run folder
    run = Run(args, "orca")  # ORCA
    args, device = run.args, run.device
    with run.first_process_first():
        source = common.load_source(args.backbone)  # ORCA
        loaded = data.load(
            args.task, args.data_dir, f"{args.out_dir}/cache", args.scale, args.n_train, args.seed, device, args.as_released
        )
        source_set = data.load_proxy(  # ORCA
            args.source, args.data_dir, args.scale, args.source_samples, args.seed, device, source.tokenizer  # ORCA
        )  # ORCA
    task, train = loaded.task, loaded.train
    if not run.start(train, source_set):  # ORCA
        return

    # ---- the model
    embedder = common.make_embedder(task.shape, source, args.init, task.tokens)  # ORCA
    predictor = common.make_predictor(train.output, task.target, source, embedder, pooling=args.as_released)
    model = common.Model(embedder, common.set_dropout(source.encoder, args.dropout), predictor)
    if args.compile:
        run.compile(model.encoder)

    # ---- ORCA: stage 1, the embedder alone
    net = model
    if args.embedder_epochs > 0 and not run.restore_stage1(embedder=embedder):
        embedder.to(device)
        source.embedder.to(device)
        with torch.no_grad():
            u_s = embed_all(source.embedder, source_set, torch.arange(len(source_set), device=device))  # line 1: (n, D)
        y_s, y_t = (data.class_labels(split, seed=args.seed) for split in (source_set, train))
        rows = align(embedder, u_s, y_s, train, y_t, args, run.progress)
        run.keep_stage1(rows, embedder=embedder)

    # ---- optimizer and schedule
    if args.checkpoint:
        common.checkpoint_activations(model.encoder)
    net = run.distribute(net)
    steps = train.batches_in_epoch(args)
    optimizer = make_optimizer(net, args)
    scheduler = make_schedule(optimizer, args, steps)
    print(f"train   {args.epochs} epochs of {steps} x {args.batch_size} samples, {args.optimizer} at {args.lr:g}")

    # ---- train
    for epoch in range(run.resume(net, optimizer, scheduler), args.epochs):
        seed_everything("epoch", args.seed, epoch, run.rank)
        net.train()
        start, losses = time.perf_counter(), torch.zeros(steps, device=device)
        batches = train.batches(steps, args.batch_size, args.seed, epoch, run.rank, run.world)
        for step, (x, y) in enumerate(bar := run.progress(batches, steps, f"epoch {epoch + 1}/{args.epochs}")):
            window = min(args.accumulate, steps - step // args.accumulate * args.accumulate)  # the last one may be short
            step_follows = (step + 1) % args.accumulate == 0 or step + 1 == steps
            with run.no_sync_unless(step_follows, net):
                with run.autocast():
                    out = net(x)  # ORCA: line 5, (B, ...)
                loss = task.loss(out, y)
                (loss / window).backward()  # averaged over the window; the official code sums
            if step_follows:
                if args.clip > 0:
                    nn.utils.clip_grad_norm_(net.parameters(), args.clip)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            losses[step] = loss.detach()
            if (step + 1) % LOG_EVERY == 0 or step + 1 == steps:
                bar.set_postfix(loss=mean_loss(losses, train, step, epoch, args))
        seconds = time.perf_counter() - start
        val = run.evaluate(model, loaded.val, task)
        row = {"loss": run.mean(losses), "val": val, "lr": scheduler.get_last_lr()[0], "seconds": seconds}  # the next step's lr
        run.end_epoch(net, model, optimizer, scheduler, row)

    # ---- test: the last epoch, and the epoch that was best on validation
    return run.finish(model, loaded, args.source)  # ORCA


if __name__ == "__main__":
    cli.guarded(main, cli.command_line(Args, __doc__, data.find_task))
