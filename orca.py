"""ORCA: align the target embedder with the source by a distance between data sets, then fine-tune.

Shen et al., "Cross-Modal Fine-Tuning: Align then Refine", ICML 2023.

A pretrained encoder expects tokens distributed like those of its own modality. ORCA first trains the new embedder, alone,
until embedded target data lie close to embedded source data of the same kind of label; then it fine-tunes everything.

    stage 1, in each embedder epoch:
    1  u_s = mean over tokens of source embedder(x_s), with labels y_s       once: both are frozen
    2  u_t = mean over tokens of embedder(x_t), with labels y_t              at most max_samples of each class
    3  OTDD = min over plans pi of sum_ij pi_ij (1/2 |u_i - u_j|^2 + 1/2 W^2(y_i, y_j))
       W^2(y, y') the transport cost between the samples of class y and those of class y'
    4  one step on the embedder along the gradient of the sum over classes (n_c / n) OTDD
    stage 2:
    5  L = L(h(g(embedder(x_t))), y_t), step on embedder, encoder g and predictor h

    python orca.py --task spherical

Measured on real images projected here, tiny scale, 5,000 samples, 12 epochs, 3 seeds: test error 0.876 ± 0.010 (naive
fine-tuning 0.864 ± 0.004; OTDD falls from 29.8 to 9.3), 3.9 minutes on one CPU core. Published, full scale: 0.299.
docs/results.md has the commands.

In line 3 the text has all classes in one problem; here as many as fit, `--classes-per-problem`. The official code has one
class in each and holds W^2 constant: then labels change neither the plan nor the gradient, and what it optimises is
`--as-released`. docs/paper-vs-code.md, O1 to O8, says more.
"""

from dataclasses import dataclass, replace
from typing import Literal

import data


@dataclass(frozen=True)
class Args:
    # ---- the same in every method file
    task: str = "spherical"
    """what to adapt to; `python data.py` lists the tasks"""
    scale: Literal["auto", "tiny", "full"] = "auto"
    """full: the paper's setting, for a GPU. tiny: a small backbone and few samples, for a laptop. auto: full on a GPU"""
    backbone: str | None = None
    """2D: tiny-swin, swin_base, any timm Swin. 1D: tiny-roberta, roberta_base, any BERT-like Hugging Face id. Or a path"""
    source: Literal["cifar10", "tiny_imagenet", "voc", "conll2003", "conll2000"] | None = None
    """labelled data of the pretraining modality, for the methods that use them. Default: the published choice"""
    data_dir: str = "datasets"
    """where the official files are read from; nothing is written there"""
    out_dir: str = "runs"
    """runs/<task>-<method>-<backbone>-s<seed>/ gets the results, runs/cache/ the prepared data"""
    seed: int = 0
    """of every random draw. One seed is an anecdote: report at least three"""
    init: Literal["copy", "random"] = "copy"
    """how the target embedder starts: from the pretrained projection, or random. Worth more than most methods: vary it first"""
    as_released: bool = False
    """do what the official code does where it differs from the paper"""
    resume: bool = False
    """go on after the last finished epoch, exactly as if nothing had happened; a first stage cut short begins again"""
    compile: bool = False
    """torch.compile the encoder: faster from the second epoch on; needs a C++ compiler on the CPU"""
    checkpoint: bool = False
    """for small GPUs: work out the encoder's activations again when gradients are due. Not in MoNA's first stage"""
    epochs: int | None = None
    """passes over the training samples. This and the following are the recipe's (full: the published one) unless given"""
    n_train: int | None = None
    """training samples used; fewer is where methods differ most"""
    batch_size: int | None = None
    """samples in a forward pass, over all processes. Out of memory: halve it and double --accumulate"""
    accumulate: int | None = None
    """forward passes averaged into one optimizer step"""
    optimizer: Literal["sgd", "adam", "adamw"] | None = None
    """the Adams have betas (0.9, 0.98)"""
    momentum: float | None = None
    """of sgd"""
    dropout: float | None = None
    """of a text encoder's hidden states and attention; 0 in most published settings"""
    lr: float | None = None
    """peak learning rate. Halve it if the loss jumps, double it if the loss crawls; tune every method alike"""
    weight_decay: float | None = None
    """on all parameters"""
    clip: float | None = None
    """largest norm of the whole gradient; 0: off. Try 1 if the loss is not finite"""
    warmup_epochs: float | None = None
    """the learning rate rises linearly for so long"""
    decay_epochs: float | None = None
    """and falls linearly to 0 until here, which may lie beyond the last epoch"""

    # ---- ORCA
    embedder_epochs: int | None = None
    """steps of stage 1, which each visit every class. 0: naive fine-tuning. Default: 60, at the tiny scale 20"""
    embedder_lr: float | None = None
    """of stage 1, falling to a fifth after 21, 41 and 61 epochs. Default (official): 10 times the lr of one batch, or lr if
    that is above 1e-3"""
    objective: Literal["otdd", "otdd-gaussian", "mmd", "l2"] = "otdd"
    """what brings target and source together. otdd-gaussian takes classes for normal distributions; mmd, l2 ignore labels"""
    reg: float | None = None
    """entropic strength of OTDD, in squared units of the features. Default: 0.1 (full, official), for GPUs; 0 (tiny): exact
    linear programmes, faster on CPUs"""
    classes_per_problem: int = 10
    """target classes that OTDD sees at once. More is closer to the text; time and memory grow with the samples in a problem"""
    max_samples: int | None = None
    """samples of a target class in an embedder epoch, drawn anew in each"""
    source_samples: int | None = None
    """source samples that the target is brought to"""


if __name__ == "__main__":  # the command line comes first: --help and mistakes answer before torch is imported
    args = data.command_line(Args, __doc__)

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import common

# ---------------------------------------------------------------------------------------------------------------------
# The method
# ---------------------------------------------------------------------------------------------------------------------


def embed(embedder, split, index):
    """Samples `index` as one vector each, the mean of their tokens: (m, D)."""
    return embedder(split.inputs(index)).mean(1)  # (m, N, D) -> (m, D)


def distance(args, u_s, y_s, u_t, y_t, mass_t, terms_s, generator):
    """How far embedded target samples u_t (m, D) are from the embedded source u_s (n, D): scalar, differentiable in u_t."""
    if args.objective.startswith("otdd"):
        inner = inner_of(args)
        return common.otdd(u_s, y_s, u_t, y_t, inner, args.reg, mass_t, terms_s)
    m = len(u_t)
    if args.objective == "mmd":  # as many source samples, drawn with replacement
        return common.mmd(u_s[torch.randint(len(u_s), (m,), generator=generator)], u_t)
    rounds = max(1, len(u_s) // m)  # l2: the whole source, paired at random
    order = torch.cat([torch.randperm(len(u_s), generator=generator) for _ in range(-(-rounds * m // len(u_s)))])
    return common.l2(u_s[order[: rounds * m]].view(rounds, m, -1), u_t)


def inner_of(args):
    """The label term of OTDD. As released it is a constant for each class, and left out."""
    return "none" if args.as_released else "gaussian" if args.objective == "otdd-gaussian" else "exact"


def align(embedder, u_s, y_s, train, y_t, args, progress=iter):
    """Stage 1: trains `embedder`, and nothing else, to bring the target to the source (lines 2 to 4).

    Args:
        u_s (n, D), y_s (n,): the embedded source and its labels.
        train: the target's training samples, a data.Split. y_t (len(train),): their labels or pseudo-labels.
        args: objective, reg, max_samples, classes_per_problem, as_released, embedder_epochs, embedder_lr, optimizer,
            weight_decay, task, scale, seed.
        progress: wraps the embedder epochs.
    Returns: a row for each embedder epoch: its number, the distance before its step, seconds.
    Each process embeds its share of a problem's samples; all of them solve the whole problem, for all samples.
    """
    parameters = list(embedder.parameters())
    lr, weight_decay = data.of_one_batch(args)
    lr = args.embedder_lr or (10 * lr if lr <= 1e-3 else lr)
    optimizer = common.make_optimizer(embedder, replace(args, lr=lr, weight_decay=weight_decay))
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [21, 41, 61], 0.2)
    otdd = args.objective.startswith("otdd")
    terms_s = common.OtddTerms(u_s, y_s, inner_of(args), args.reg) if otdd else None  # constant: worked out once
    per_problem = args.classes_per_problem if otdd and not args.as_released else 1
    members = [torch.nonzero(y_t == c).squeeze(1) for c in y_t.unique()]
    rows = []
    for epoch in progress(range(args.embedder_epochs)):
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence([args.seed, epoch]).generate_state(1)[0]))
        start, total = common.now(), 0.0
        for classes in torch.randperm(len(members), generator=generator).split(per_problem):
            index, mass = [], []
            for c in classes.tolist():
                chosen = torch.randperm(len(members[c]), generator=generator)[: args.max_samples]
                index.append(members[c][chosen])
                mass.append(torch.full((len(chosen),), len(members[c]) / len(chosen) / len(y_t)))  # a class weighs n_c / n
            index, mass = torch.cat(index), torch.cat(mass).to(u_s.device)
            # embedded again when gradients are due, 128 samples at a time: memory does not grow with the problem
            parts = common.share(index).split(128)
            u_t = torch.cat([checkpoint(embed, embedder, train, part, use_reentrant=False) for part in parts])  # (m / G, D)
            u_t = common.gather(u_t, len(index))  # (m, D), of all G processes
            if not torch.isfinite(u_t).all():
                raise data.UserError(f"the embedder diverged in epoch {epoch + 1} of stage 1.\nLower --embedder-lr.")
            share = mass.sum()  # of the problem's classes
            loss = share * distance(args, u_s, y_s, u_t, y_t[index], mass, terms_s, generator)
            loss.backward()
            total += loss.detach()
        for parameter, gradient in zip(parameters, common.average([p.grad for p in parameters]), strict=True):
            parameter.grad = gradient
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        rows.append({"epoch": epoch + 1, "distance": float(total), "seconds": common.now() - start})
    return rows


def main(args):
    # ---- set up: processes, device, seed, data, run folder
    run = common.Run(args, "orca")  # ORCA
    args, device = run.args, run.device
    with run.first():
        source = common.load_source(args.backbone)  # ORCA
        loaded = data.load(
            args.task, args.data_dir, f"{args.out_dir}/cache", args.scale, args.n_train, args.seed, device, args.as_released
        )
        wanted = args.source, args.data_dir, args.scale, args.source_samples, args.seed, device  # ORCA
        source_set = data.load_proxy(*wanted, source.tokenizer)  # ORCA
    task, train = loaded.task, loaded.train
    if not run.open(train, source_set):  # ORCA
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
            everything = torch.arange(len(source_set), device=device)
            u_s = torch.cat([embed(source.embedder, source_set, part) for part in everything.split(128)])  # (n, D)
        y_s, y_t = (common.class_labels(split, seed=args.seed) for split in (source_set, train))
        rows = align(embedder, u_s, y_s, train, y_t, args, lambda epochs: run.progress(epochs, len(epochs), "stage 1"))
        run.keep_stage1(rows, embedder=embedder)
        first, last = rows[0]["distance"], rows[-1]["distance"]
        print(f"ORCA    {args.objective} from {first:.4g} to {last:.4g} in {len(rows)} embedder epochs,",
              f"{sum(row['seconds'] for row in rows):.0f} s")  # fmt: skip

    # ---- optimizer and schedule
    if args.checkpoint:
        common.checkpoint_blocks(model.encoder)
    net = run.distribute(net)
    steps = max(1, len(train) // args.batch_size)  # micro-batches in an epoch
    optimizer = common.make_optimizer(net, args)
    scheduler = common.make_schedule(optimizer, args, -(-steps // args.accumulate))
    print(f"train   {args.epochs} epochs of {steps} x {args.batch_size} samples, {args.optimizer} at {args.lr:g}")

    # ---- train
    for epoch in range(run.resume(net, optimizer, scheduler), args.epochs):
        common.seed_everything(args.seed, epoch, run.rank)
        net.train()
        start, losses = common.now(), torch.zeros(steps, device=device)
        batches = train.batches(steps, args.batch_size, args.seed, epoch, run.rank, run.world)
        for step, (x, y) in enumerate(bar := run.progress(batches, steps, f"epoch {epoch + 1}/{args.epochs}")):
            window = min(args.accumulate, steps - step // args.accumulate * args.accumulate)  # the last one may be short
            step_follows = (step + 1) % args.accumulate == 0 or step + 1 == steps
            with run.accumulating(net, step_follows):
                with run.autocast():
                    out = net(x)  # ORCA: line 5, (B, K)
                loss = task.loss(out, y)
                (loss / window).backward()  # averaged over the window; the official codes sum
            if step_follows:
                if args.clip > 0:
                    nn.utils.clip_grad_norm_(net.parameters(), args.clip)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            losses[step] = loss.detach()
            if (step + 1) % common.LOG_EVERY == 0 or step + 1 == steps:
                bar.set_postfix(loss=common.mean_loss(losses, train, step, epoch, args))
        seconds = common.now() - start
        val = run.evaluate(model, loaded.val, task)
        row = {"loss": run.mean(losses), "val": val, "lr": scheduler.get_last_lr()[0], "seconds": seconds}
        run.end_epoch(net, model, optimizer, scheduler, row)

    # ---- test: the last epoch, and the epoch that was best on validation
    return run.finish(model, loaded, args.source)  # ORCA


if __name__ == "__main__":
    data.guarded(main, args)
