"""MoNA: meta-learn the target embedder so that fine-tuning keeps what the encoder knows of its source, then fine-tune.

Ma et al., "Learning Modality Knowledge Alignment for Cross-Modality Transfer", ICML 2024.

Fine-tuning on a distant modality damages what the encoder knew. MoNA looks one step ahead: it trains the target embedder so
that a step of fine-tuning on embedded target data leaves the encoder good at telling source classes apart. Then it fine-tunes
everything, from that embedder.

    stage 1, in each step:
    1  L_inner = L(h(f(e(x_t))), y_t)                             e embedder, f encoder as pretrained, h predictor
    2  theta* = theta_0 - alpha grad_theta L_inner                one virtual step of the encoder; theta_0 itself never moves
    3  F_i = f(e_s(x_s,i); theta*), mean over tokens, |F_i| = 1   e_s the pretrained embedder, frozen
    4  L_outer = E_{i != j, y_i = y_j} |F_i - F_j|^2 + log E_{i != j} exp(-2 |F_i - F_j|^2)
    5  step of beta on e down grad_e (lambda L_outer + L_inner), on h down grad_h L_inner
    stage 2:
    6  L = L(h(f(e(x_t))), y_t), step on e, f and h

    python mona.py --task spherical

Measured with 1,000 real samples, tiny scale, 5 seeds (satellite: 3), last epoch, naive fine-tuning in parentheses: error on
cifar100 0.784 ± 0.004 (0.784 ± 0.004), on satellite 0.400 ± 0.014 (0.417 ± 0.012). docs/results.md has the commands and more.
Published, spherical, full scale: 0.271.

No official code was found. Signs in line 4 are Wang and Isola's (lecture slides on MoNA, Tran 2024, print both terms negated,
which would reward collapse); alpha, beta, lambda, the length of stage 1 and what happens to h are not in the texts that were
available: docs/paper-vs-code.md, M1 to M6, and docs/mona.md for how the defaults were found.
"""

import math
import time
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
import tyro
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import cli
import common
import data
from run import LOG_EVERY, Run, average, gather, make_optimizer, make_schedule, mean_loss, processes, seed_everything


@dataclass(frozen=True)
class Args(cli.Args):
    """The options of MoNA; those that all methods share are in cli.Args."""

    meta_epochs: int | None = None
    """epochs of stage 1. A step takes one micro-batch, without accumulation: half the --batch-size means twice the steps.
    Default: 5 (not tried; tiny scale 2). 0: naive fine-tuning"""
    meta_lr: float | None = None
    """beta, the learning rate of stage 1. Default: --lr, without its factor for gradient accumulation"""
    inner_lr: float = 0.1
    """alpha, the learning rate of the virtual step, chosen for tiny-swin. lambda alpha scales the outer gradient (`ratio` in
    the log). `step` in the log is |theta* - theta_0| / |theta_0|, 0.0025 for tiny-swin; with another backbone, choose alpha so
    that it is of that order"""
    lambda_: Annotated[float, tyro.conf.arg(name="lambda")] = 1.0
    """lambda, the weight of L_outer. 0: warm-up of embedder and predictor, or only of the embedder with --predictor frozen"""
    gradient: Literal["finite-difference", "exact"] = "finite-difference"
    """how the gradient of L_outer is computed. exact: double backward, which needs more memory"""
    predictor: Literal["trained", "frozen"] = "trained"
    """whether the predictor trains in stage 1; the texts do not say"""


def pair_distances(f):
    """|F_i - F_j|^2 = 2 - 2 <F_i, F_j> of unit vectors, and the mask of i != j. (n, F) -> (n, n), (n, n) bool"""
    return 2 - 2 * f @ f.T, ~torch.eye(len(f), dtype=torch.bool, device=f.device)


def alignment(f, y):
    """Mean of |F_i - F_j|^2 over pairs of the same class, to be minimised; 0 if no class has two samples.

    f (n, F) unit vectors, y (n,) classes -> scalar in [0, 4] (Wang and Isola 2020, alpha = 2; same class = positive pair).
    """
    d, off_diagonal = pair_distances(f)
    pairs = (y[:, None] == y[None]) & off_diagonal  # (n, n)
    return (d * pairs).sum() / pairs.sum().clamp(min=1)


def uniformity(f):
    """Log of the mean of exp(-2 |F_i - F_j|^2) over pairs i != j, to be minimised: 0 if all are equal, near -4 if spread out.

    f (n, F) unit vectors, n > 1 -> scalar (Wang and Isola 2020, t = 2).
    """
    d, off_diagonal = pair_distances(f)
    return torch.log((torch.exp(-2 * d) * off_diagonal).sum() / off_diagonal.sum())


def outer_loss(encoder, theta, tokens_s, y_s):
    """Lines 3 and 4: alignment and uniformity of the source features of the encoder with the weights `theta`, two scalars.

    Pairs are formed over all samples. Of G processes, each passes its part of the tokens, and the classes y_s of all.
    """
    features = functional_call(encoder, theta, (tokens_s,)).mean(1)  # (B_s / G, n, F) -> (B_s / G, F)
    f = gather(F.normalize(features, dim=1))  # (B_s, F)
    return alignment(f, y_s), uniformity(f)


def meta_gradient(model, loss, x_t, y_t, tokens_s, y_s, inner_lr, lambda_, gradient="finite-difference"):
    """Lines 1 to 5: the gradient of lambda L_outer + L_inner with respect to the embedder, through one virtual step.

    L_outer depends on the embedder e only through theta* = theta_0 - alpha grad_theta L_inner. With v = grad L_outer at theta*,
    held constant,

        grad_e (lambda L_outer) = -lambda alpha grad_e <v, grad_theta L_inner>                                        exact
                                = -lambda alpha (grad_e L_inner(theta_0 + c v) - grad_e L_inner(theta_0 - c v)) / 2c + O(c^2)

    The finite difference needs two more gradients of L_inner, and 1.2 to 1.3 times the memory of ordinary training. Treating
    theta* as a constant (first-order MAML) would remove this gradient: stage 1 would be a plain warm-up. The virtual step moves
    only the encoder: L_outer uses neither the target embedder nor the predictor.

    Args:
        model: a common.Model; its encoder is left untouched, bit for bit.
        loss: (out, y) -> scalar. x_t, y_t: a target batch.
        tokens_s (B_s, N_s, D), y_s (B_s,): an embedded source batch and its classes. Of G processes each gives its part.
        inner_lr, lambda_: alpha and lambda.
        gradient: "finite-difference" or "exact".
    Returns: gradients of the embedder's parameters (a list), of the predictor's (a list; of L_inner alone), and a tensor (5,):
        L_inner, alignment, uniformity, |outer part| / |inner part| of the embedder's gradient, |theta* - theta_0| / |theta_0|.
    """
    gradients = {"finite-difference": finite_difference, "exact": exact}[gradient]
    y_t, y_s = gather(y_t), gather(y_s)  # losses are of the batches of all processes

    def inner_loss(theta, tokens):  # L(h(f(e(x_t); theta)), y_t)
        return loss(gather(model.predictor(functional_call(model.encoder, theta, (tokens,)))), y_t)

    with common.autocast_off(x_t):  # a difference of nearly equal numbers needs full precision
        inner_e, inner_h, outer_e, losses, step = gradients(model, inner_loss, x_t, tokens_s, y_s, inner_lr, lambda_)
    inner_e, inner_h, outer_e = average(inner_e), average(inner_h), average(outer_e)
    log = torch.stack([*losses, norm(outer_e) / norm(inner_e).clamp(min=1e-30), step]).detach()
    return [a + b for a, b in zip(inner_e, outer_e, strict=True)], inner_h, log


def norm(tensors):
    """Euclidean norm of a list of tensors taken as one vector: scalar."""
    return torch.stack(torch._foreach_norm(tensors)).norm()


def exact(model, inner_loss, x_t, tokens_s, y_s, alpha, lambda_):
    """The gradients of `meta_gradient` by double backward: dL_inner/de, dL_inner/dh, d(lambda L_outer)/de; losses; step."""
    theta = dict(model.encoder.named_parameters())
    e, h = list(model.embedder.parameters()), list(model.predictor.parameters())
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        L_inner = inner_loss(theta, model.embedder(x_t))  # line 1
        g_theta = average(torch.autograd.grad(L_inner, list(theta.values()), create_graph=True))
        theta_star = {name: p - alpha * g for (name, p), g in zip(theta.items(), g_theta, strict=True)}  # line 2
        align, uniform = outer_loss(model.encoder, theta_star, tokens_s, y_s)  # lines 3 and 4
        outer_e = torch.autograd.grad(lambda_ * (align + uniform), e, retain_graph=True)  # line 5
        inner = torch.autograd.grad(L_inner, [*e, *h])
    step = alpha * norm(g_theta) / norm(list(theta.values()))
    return inner[: len(e)], inner[len(e) :], outer_e, (L_inner, align, uniform), step


def finite_difference(model, inner_loss, x_t, tokens_s, y_s, alpha, lambda_):
    """As `exact`, but by a central difference: two more gradients of L_inner, at theta_0 + c v and theta_0 - c v."""
    theta = {name: p.detach().requires_grad_() for name, p in model.encoder.named_parameters()}
    e, h = list(model.embedder.parameters()), list(model.predictor.parameters())
    embedded = model.embedder(x_t)  # (B, N, D)
    tokens = embedded.detach().requires_grad_()  # cut the graph: each gradient goes through the embedder only once
    L_inner = inner_loss(theta, tokens)  # line 1
    g_tokens, *g = torch.autograd.grad(L_inner, [tokens, *h, *theta.values()])  # (B, N, D), ...
    inner_h, g_theta = g[: len(h)], average(g[len(h) :])
    theta_star = {name: (p.detach() - alpha * d).requires_grad_() for (name, p), d in zip(theta.items(), g_theta, strict=True)}
    step = alpha * norm(g_theta) / norm(list(theta.values()))
    del g, g_theta  # line 2 is done; each is as large as the encoder
    align, uniform = outer_loss(model.encoder, theta_star, tokens_s, y_s)  # lines 3 and 4
    v = average(torch.autograd.grad(align + uniform, list(theta_star.values())))
    del theta_star
    c = 0.01 / norm(v).clamp(min=1e-30)  # |c v| = 0.01; if v = 0, both sides are equal and the outer gradient is 0
    sides = []
    for shift in (c, -c):  # a one-sided difference is cheaper but too inaccurate: docs/performance.md
        moved = {name: p.detach() + shift * d for (name, p), d in zip(theta.items(), v, strict=True)}
        sides += torch.autograd.grad(inner_loss(moved, tokens), tokens)  # (B, N, D)
        del moved
    inner_e = torch.autograd.grad(embedded, e, g_tokens, retain_graph=True)
    outer_e = torch.autograd.grad(embedded, e, -lambda_ * alpha * (sides[0] - sides[1]) / (2 * c))  # line 5
    return inner_e, inner_h, outer_e, (L_inner, align, uniform), step


def meta_train(model, source, train, source_set, task, args, progress):
    """Stage 1: trains the embedder (and the predictor), never the encoder. Returns a row of numbers for each meta-epoch.

    Dropout and stochastic depth are off: the gradients of a step have to belong to one network. Each process has its part of
    both batches.
    """
    model.eval()
    trained = nn.ModuleList([model.embedder, model.predictor] if args.predictor == "trained" else [model.embedder])
    lr, weight_decay = data.of_one_batch(args, "mona")
    optimizer = make_optimizer(trained, replace(args, lr=args.meta_lr or lr, weight_decay=weight_decay))
    steps = train.batches_in_epoch(args)
    size_s = args.batch_size * math.ceil(32 / args.batch_size)  # B_s >= 32: in smaller batches few pairs share a class
    rows = []
    for epoch in range(args.meta_epochs):
        start, logs = time.perf_counter(), torch.zeros(steps, 5, device=train.device)
        batches = train.batches(steps, args.batch_size, args.seed, epoch, *processes(), stage=1)
        batches_s = source_set.batches(steps, size_s, args.seed, epoch, *processes(), stage=1)
        for step, (x_t, y_t) in enumerate(progress(batches, steps, f"stage 1, epoch {epoch + 1}/{args.meta_epochs}")):
            x_s, y_s = next(batches_s)
            with torch.no_grad():
                tokens_s = source.embedder(x_s)  # (B_s, N_s, D)
            g_e, g_h, logs[step] = meta_gradient(
                model, task.loss, x_t, y_t, tokens_s, y_s, args.inner_lr, args.lambda_, args.gradient
            )
            for parameter, gradient in zip(trained.parameters(), [*g_e, *g_h], strict=False):  # a frozen predictor gets none
                parameter.grad = gradient.contiguous()  # as the parameter is; fused Adam misreads another order of axes
            if args.clip > 0:
                nn.utils.clip_grad_norm_(trained.parameters(), args.clip)
            optimizer.step()
            optimizer.zero_grad()  # stage 2 begins without them
        names = ("L_inner", "alignment", "uniformity", "ratio", "step")
        row = {"epoch": epoch + 1, **dict(zip(names, logs.mean(0).tolist(), strict=True))}
        row["seconds"] = time.perf_counter() - start
        if not all(map(math.isfinite, row.values())):
            raise cli.UserError(f"stage 1 gives inf or NaN in epoch {epoch + 1}: {row}.\nStart again with a lower --meta-lr.")
        print("MoNA    " + "  ".join(f"{k} {v:.4g}" for k, v in row.items()), flush=True)
        rows.append(row)
    if args.lambda_ > 0 and rows[-1]["ratio"] < 0.01:
        print(
            "MoNA    the outer gradient is below 1 % of the inner one: this was a plain warm-up. Raise --inner-lr or --lambda."
        )
    return rows


def main(args):
    # ---- set up: processes, device, seed, data, run folder
    run = Run(args, "mona")  # MoNA
    args, device = run.args, run.device
    with run.first_process_first():
        source = common.load_source(args.backbone)  # MoNA
        loaded = data.load(
            args.task, args.data_dir, f"{args.out_dir}/cache", args.scale, args.n_train, args.seed, device, args.as_released
        )
        source_set = data.load_proxy(  # MoNA
            args.source, args.data_dir, args.scale, data.SOURCE_SAMPLES, args.seed, device, source.tokenizer  # MoNA
        )  # MoNA
    task, train = loaded.task, loaded.train
    if not run.start(train, source_set):  # MoNA
        return

    # ---- the model
    embedder = common.make_embedder(task.shape, source, args.init, task.tokens)  # MoNA
    predictor = common.make_predictor(train.output, task.target, source, embedder, pooling=args.as_released)
    model = common.Model(embedder, common.set_dropout(source.encoder, args.dropout), predictor)
    if args.compile:
        run.compile(model.encoder)

    # ---- MoNA: stage 1, embedder and predictor
    net = model
    if args.compile and args.gradient == "exact" and args.meta_epochs > 0:
        raise cli.UserError("--compile has no second derivatives, which --gradient exact needs.\nLeave out one of them.")
    if args.meta_epochs > 0 and not run.restore_stage1(embedder=embedder, predictor=model.predictor):
        model.to(device)
        source.embedder.to(device)
        source_set.y = data.class_labels(source_set, seed=args.seed)  # voc has masks, no classes: clusters take their place
        rows = meta_train(model, source, train, source_set, task, args, run.progress)
        run.keep_stage1(rows, embedder=embedder, predictor=model.predictor)

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
                    out = net(x)  # MoNA: line 6, (B, ...)
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
    return run.finish(model, loaded, args.source)  # MoNA


if __name__ == "__main__":
    cli.guarded(main, cli.command_line(Args, __doc__, data.find_task))
