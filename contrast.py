"""contrast, proposed in lecture slides: a contrastive target embedder, then PaRe with attention scores instead of the gate.

Tran Trong Khiem, "Cross-Modal Fine-Tuning: Align then Refine", lecture slides 43 to 46 (2024). No paper or code was found, and
the printed loss is undefined for some inputs. This file has a corrected version; `--as-printed` uses the printed one.

    stage 1, contrastive embedder, in each step:
    1  x' = a^t x + sqrt(1 - a^(2t)) eps,  a = sqrt(1 - sigma^2)     two noisy views of each sample, with random sigma and t
    2  z = mean over tokens of g(embedder(x'))                       g the pretrained encoder, frozen
    3  L_i = mean over positives p of [ -s_ip / tau + log( sum_q exp(s_iq / tau) + sum_n lambda_in exp(s_in / tau) ) ]
       s_ij = cos(z_i, z_j); p, q: the other samples with the label of i; n: those with another label; lambda_in is larger the
       less alike the labels are
    4  step on the embedder alone down the gradient of the mean of L_i
    stage 2, PaRe with other scores; in epoch ep of EP: k = k0 (1 - ep / EP), lambda = k / k0 (not lambda_in of line 3):
    5  S = attention rollout: how much of the mean output token comes from each input token, of source and target samples
    6  X_m = X_t, its k lowest-scored tokens replaced one by one by the k highest-scored of X_s
    7  L = L(h_t(g(X_t)), y_t) + mix_weight [(1 - lambda) L(h_t(g(X_m)), y_t) + lambda L(h_s(g(X_m)), y_s)]

The printed loss of a class Y is -log(N_Y / D_Y): N_Y is the sum of cos(z_i, z_j) over i and j in Y, D_Y the sum of
lambda_ij cos(z_i, z_j) over i in Y and all j, with lambda_ij proportional to 1 / (correlation of the labels + eps), or 1 for j
in Y. It has four defects, each shown by a test:

    D_Y can be negative, since cosines have either sign: then the logarithm is undefined;
    D_Y falls to 0 at the simplex of K classes, the optimum (lambda > 1: before it): the loss is -infinity, then undefined;
    only sums over classes enter: orthogonal clusters and "every sample on its own axis" both give 0;
    one-hot labels of different classes all correlate by -1/(K - 1), so lambda is one constant, which may be negative.

    python contrast.py --task spherical

Measured with 1,000 real samples, tiny scale, 3 or 5 seeds, last epoch, naive fine-tuning in parentheses: error on satellite
0.388 ± 0.023 (0.417 ± 0.012), on cifar100 0.833 ± 0.004 (0.784 ± 0.004); there stage 2 alone 0.777 ± 0.004,
with random scores 0.773 ± 0.004, stage 1 alone 0.832 ± 0.002. docs/measurements.md has the commands and more.

What the slides leave open, and what was chosen: docs/paper-vs-code.md, C1 to C12.
"""

import time
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

import cli
import common
import data
from pare import Gate, limits, replace_patches, schedule
from run import LOG_EVERY, Run, embed_all, make_optimizer, make_schedule, mean_loss, seed_everything, take_step


@dataclass(frozen=True)
class Args(cli.Args):
    """The options of the proposal; those that all methods share are in cli.Args."""

    contrast_epochs: int = 5
    """passes over the training samples in stage 1. 0, with --k-begin 0 --k-end 0: naive fine-tuning, with PaRe's recipe"""
    contrast_samples: int = 128
    """samples in a step of stage 1, two views of each. 128 views pass the encoder at once: only values below 64 save memory"""
    sigmas: tuple[float, ...] = (0.1, 0.2, 0.4)
    """scales of the noise of a view, in standard deviations of each channel (of at most 256 training samples)"""
    noise_steps: int = 2
    """T: the noise is added t times, t = 1 ... T with equal chance"""
    tau: float = 0.1
    """temperature of the contrastive loss"""
    label_weights: Literal["targets", "none"] = "targets"
    """lambda of fields and multi-label targets: by the correlation of the targets, or 1. Classes: always 1"""
    features: Literal["encoder", "embedder"] | None = None
    """whose tokens z is the mean of; those of the embedder are cheaper. Default: encoder; with --as-printed embedder"""
    embedder_lr: float | None = None
    """learning rate of stage 1. Default, ORCA's rule: 10 times the lr of one batch, or that lr itself if it is above 1e-3"""
    as_printed: bool = False
    """the slides' loss, literally; the run stops when it is undefined"""
    freeze_embedder: bool = False
    """freeze the embedder in stage 2; the slides mention both"""
    scores: Literal["rollout", "received", "gate", "random"] = "rollout"
    """scores of the patches. rollout: attention, followed from the output; received: attention received in the first block;
    gate: PaRe's gate; random: random numbers"""
    k_begin: float | None = None
    """k0 as a fraction of the N target tokens, as in PaRe"""
    k_end: float | None = None
    """fraction that k falls to. Default: 0; with --as-released that of PaRe's official configuration"""
    ratio: Literal["k/k0", "k/N"] | None = None
    """lambda of line 7, as in PaRe"""
    mix_weight: float | None = None
    """weight of the bracket in line 7, which is L_mix in PaRe"""


EPS = 0.1  # in lambda = 1 / (correlation + eps): weights of negatives differ by a factor of 11 at most
MEASURED = 512  # target samples whose cosines are measured after each epoch of stage 1


def views(x, sigmas, T, mean=0.0, std=1.0):
    """Line 1: a noisy view of each sample, one of `sigmas` (S,) and t = 1 ... T drawn with equal chance. (B, ...) -> (B, ...)

    One draw takes the place of t steps of x <- sqrt(1 - sigma^2) x + sigma eps. What is noised is (x - mean) / std, so that x
    keeps its mean and standard deviation, `mean` and `std` (C, 1, ...). sigma = 0: x, bit for bit; sigma = 1: pure noise.
    """
    shape = (len(x), *[1] * (x.ndim - 1))
    sigma = sigmas[torch.randint(len(sigmas), shape, device=x.device)]  # (B, 1, ...)
    log_a2t = torch.randint(1, T + 1, shape, device=x.device) * torch.log1p(-(sigma**2))  # log a^(2t), a = sqrt(1 - sigma^2)
    a_t, scale = (log_a2t / 2).exp(), (-torch.expm1(log_a2t)).sqrt()  # a^t and sqrt(1 - a^(2t)), (B, 1, ...)
    return a_t * x + (1 - a_t) * mean + scale * std * torch.randn_like(x)


def correlation(targets):
    """Pearson correlation of the samples' targets; 0 for a constant one. (B, ...) -> (B, B)"""
    flat = targets.flatten(1).nan_to_num().double()  # (B, everything)
    unit = F.normalize(flat - flat.mean(1, keepdim=True), dim=1)
    return (unit @ unit.T).float()


def label_weights(targets, y):
    """lambda_ij of line 3: r_ij / mean over negatives n of r_in,  r_ij = 1 / (max(correlation_ij, 0) + eps). -> (B, B)

    Targets that are less alike are pushed apart harder; the mean weight of the negatives of each sample is 1. One-hot classes,
    whose correlation is negative, all get 1.
    """
    r, other = 1 / (correlation(targets).clamp(min=0) + EPS), y[:, None] != y  # (B, B)
    return r * (other.sum(1) / (r * other).sum(1).clamp(min=1e-9))[:, None]


def contrastive_loss(z, y, weights=None, tau=0.1):
    """Line 3: supervised contrastive loss (Khosla et al. 2020, L_out) with weighted negatives. (B, D), (B,) -> scalar

    weights (B, B): lambda, positive; only those of negatives are used; None: 1. Samples without positives are left out.
    Check values for K classes of n, lambda = 1: collapse log(nK - 1); orthogonal clusters log(n - 1 + n (K - 1) e^(-1/tau)).
    """
    unit = F.normalize(z, dim=1, eps=1e-8)  # (B, D)
    logits, itself = unit @ unit.T / tau, torch.eye(len(z), dtype=torch.bool, device=z.device)  # s / tau, (B, B)
    positive = (y[:, None] == y) & ~itself  # (B, B)
    weighted = logits if weights is None else logits + weights.log().masked_fill(positive, 0)  # log(lambda e^(s / tau))
    count = positive.sum(1)  # of the positives of each sample, (B,)
    # L_i = log( sum_q e^(s_iq / tau) + sum_n lambda_in e^(s_in / tau) ) - mean over p of s_ip / tau, (B,)
    loss = weighted.masked_fill(itself, -1e9).logsumexp(1) - (logits * positive).sum(1) / count.clamp(min=1)
    return (loss * (count > 0)).sum() / (count > 0).sum().clamp(min=1)  # mean of L_i; 0 if no sample has a positive


def printed_loss(z, y, correlations):
    """The slides' loss: mean over classes Y of -log(N_Y / D_Y), not finite where undefined. (B, D), (B,), (B, B) -> scalar"""
    unit = F.normalize(z, dim=1, eps=1e-8)  # (B, D)
    same, (classes, index) = y[:, None] == y, y.unique(return_inverse=True)
    cosines, lam = unit @ unit.T, torch.where(same, 1.0, 1 / (correlations + EPS))  # (B, B)
    over_class = lambda rows: rows.new_zeros(len(classes)).index_add(0, index, rows)  # (B,) -> (K,)
    N, D = over_class((cosines * same).sum(1)), over_class((cosines * lam).sum(1))  # N_Y, D_Y: (K,), (K,)
    return -torch.log(N / D).mean()  # mean over Y of L_Y = -log(N_Y / D_Y)


def learn_embedder(embedder, encode, train, y, args, progress=iter, rank=0):
    """Stage 1: trains `embedder`, and nothing else (lines 1 to 4).

    Args:
        encode: samples (B, ...) to tokens (B, n, F), whose mean is z.
        train: the target's training samples, a data.Split. y (len(train),): their classes or pseudo-labels.
        progress: wraps the epochs. rank: the number of this process, each draws its own noise.
    Returns: a row for each epoch and one before the first step: loss of fixed views; mean cosine of fixed samples without
        noise, over pairs with equal labels and over the other pairs; seconds.
    Raises: UserError if a loss is not finite.
    """
    parameters, n, rows = list(embedder.parameters()), len(train), []
    fixed = torch.randperm(n, generator=torch.Generator().manual_seed(cli.stream("measured", args.seed)))
    fixed, size = fixed[:MEASURED].to(y.device), min(args.contrast_samples, n)  # (m,)
    x = train.inputs(fixed[: train.chunk]).transpose(0, 1)  # (C, at most 256, ...)
    # (C, 1, ...); the std of a single value is NaN
    mean, std = (f(x.flatten(1), 1).nan_to_num().view(-1, *[1] * (x.ndim - 2)) for f in (torch.mean, torch.std))
    sigmas = torch.tensor(args.sigmas, device=y.device)  # (S,), sent to the device once
    noised = lambda x: encode(views(x, sigmas, args.noise_steps, mean, std))  # lines 1 and 2: (B, n, F)

    def loss_of(index):
        twice = index.repeat_interleave(2)  # two views of each sample: (2 B,)
        z, labels = embed_all(noised, train, twice), y[twice]  # (2 B, F), (2 B,)
        targets = F.one_hot(labels, train.classes) if train.target == "class" else train.targets(twice)  # (2 B, ...)
        if args.as_printed:
            loss = printed_loss(z, labels, correlation(targets))
        else:
            weights = label_weights(targets, labels) if args.label_weights == "targets" else None
            loss = contrastive_loss(z, labels, weights, args.tau)  # line 3
        # isfinite() waits for the device: checked in each step with --as-printed, which may be undefined, else once an epoch
        if (args.as_printed or not torch.is_grad_enabled()) and not loss.isfinite():
            advice = "Leave out --as-printed: that loss may be undefined." if args.as_printed else "Lower --embedder-lr."
            raise cli.UserError(f"the loss is {loss.item()} in epoch {len(rows)} of stage 1.\n{advice}")
        return loss

    def measure(start):
        parameters[0].sum().item()  # waits for the device
        seconds = time.perf_counter() - start  # of training, without what follows
        with torch.no_grad():
            seed_everything("measured", args.seed + rank)  # the same views each time; those of another process differ
            loss, unit = loss_of(fixed[:size]), F.normalize(embed_all(encode, train, fixed), dim=1)  # scalar, (m, F)
            same, itself = y[fixed][:, None] == y[fixed], torch.eye(len(unit), dtype=torch.bool, device=y.device)  # (m, m)
            mean_of = lambda pairs: ((unit @ unit.T * pairs).sum() / pairs.sum().clamp(min=1)).item()
            row = {"contrast": loss.item(), "cosine, equal labels": mean_of(same & ~itself), "cosine, others": mean_of(~same)}
        rows.append({"epoch": len(rows), **row, "seconds": seconds})

    measure(time.perf_counter())
    optimizer = make_optimizer(embedder, data.of_embedder(args, "contrast"))  # ORCA's rule: 10 times --lr
    for epoch in progress(range(args.contrast_epochs)):
        seed_everything("contrast", args.seed, epoch, rank)
        start, (order, _) = time.perf_counter(), train.plan(n // size, size, args.seed, epoch, stage=1)
        for index in order.to(y.device):
            take_step(optimizer, parameters, loss_of(index))  # line 4
        measure(start)
    return rows


class Replacement(nn.Module):
    """Everything that trains in stage 2: the model and the source predictor h_s; a gate only with `--scores gate`."""

    def __init__(self, model, predictor_s, scores, width):
        super().__init__()
        self.model, self.predictor_s, self.scores = model, predictor_s, scores
        self.gate = Gate(width) if scores == "gate" else None

    def score(self, tokens):
        """Line 5: one score for each token, higher is more important. (B, N, D) -> (B, N)"""
        if self.scores == "random":
            return torch.rand(tokens.shape[:2], device=tokens.device)
        if self.scores == "gate":
            return self.gate(tokens)
        follow = common.attention_rollout if self.scores == "rollout" else common.received_attention
        return follow(self.model.encoder, tokens)

    def forward(self, x, tokens_s, scores_s, k):
        """As PaRe's: h_t(g(X_t)), h_t(g(X_m)), h_s(g(X_m)); k = 0: the last two are None. scores_s (B, N_s); None: computed."""
        tokens_t = self.model.embedder(x)  # (B, N, D)
        if k == 0:
            return self.model.predictor(self.model.encoder(tokens_t)), None, None
        scores_t, scores_s = self.score(tokens_t), self.score(tokens_s) if scores_s is None else scores_s  # (B, N), (B, N_s)
        tokens_m = replace_patches(tokens_t, tokens_s, scores_t, scores_s, k)  # line 6: (B, N, D)
        features, features_m = self.model.encoder(torch.cat([tokens_t, tokens_m])).chunk(2)  # (2B, N, D) -> 2 x (B, n, F)
        return self.model.predictor(features), self.model.predictor(features_m), self.predictor_s(features_m)


def main(args):
    # ---- set up: processes, device, seed, data, run folder
    run = Run(args, "contrast")  # contrast
    args, device = run.args, run.device
    with run.first_process_first():
        source = common.load_source(args.backbone)  # contrast
        loaded = data.load(
            args.task, args.data_dir, f"{args.out_dir}/cache", args.scale, args.n_train, args.seed, device, args.as_released
        )
        source_set = data.load_proxy(  # contrast
            args.source, args.data_dir, args.scale, data.SOURCE_SAMPLES, args.seed, device, source.tokenizer  # contrast
        )  # contrast
    task, train = loaded.task, loaded.train
    if not run.start(train, source_set):  # contrast
        return

    # ---- the model
    embedder = common.make_embedder(task.shape, source, args.init, task.tokens)  # contrast
    predictor = common.make_predictor(train.output, task.target, source, embedder, pooling=args.as_released)
    model = common.Model(embedder, common.set_dropout(source.encoder, args.dropout), predictor)
    if args.compile:
        run.compile(model.encoder)

    # ---- contrast: source predictor; scores of the source; stage 1, the embedder alone
    shared = task.target == source_set.target == "field" and len(train.output) == 2  # as in PaRe
    predictor_s = predictor if shared else common.make_predictor(source_set.output, source_set.target, source, embedder)
    net = Replacement(model, predictor_s, args.scores, source.token_width)
    N, N_s = embedder.tokens, source.tokens(source_set.shape)
    k0, k_end = limits(args, N, N_s)
    net.to(device)
    source.embedder.to(device)
    scores_s = None  # (n_s, N_s): of attention, by the pretrained encoder, once for each source sample
    if args.scores in ("rollout", "received") and k0 > 0:
        parts = torch.arange(len(source_set), device=device).split(64)
        with run.autocast(), torch.no_grad():
            scores_s = torch.cat([net.score(source.embedder(source_set.inputs(part))) for part in parts])  # (n_s, N_s)
    x = train.inputs(torch.arange(min(64, train.chunk, len(train)), device=device))  # for the checks below
    if args.contrast_epochs > 0 and not run.restore_stage1(embedder=embedder):
        model.encoder.eval().requires_grad_(False)  # 0.6 times the activations (docs/performance.md)
        deep = (args.features or ("embedder" if args.as_printed else "encoder")) == "encoder"
        if x.shape[1] > 1 and ((x == 0) | (x == 1)).all():
            print("contrast the inputs are one-hot. They are noised as others are: the views are not one-hot")

        def encode(x):
            with run.autocast():
                return (model.encoder(embedder(x)) if deep else embedder(x)).float()  # (B, n, F)

        y = data.class_labels(train, seed=args.seed)
        with run.eager():
            rows = learn_embedder(embedder, encode, train, y, args, run.progress, run.rank)
        model.encoder.requires_grad_(True)
        run.keep_stage1(rows, embedder=embedder)
    if scores_s is not None:
        with run.autocast(), torch.no_grad():
            both = net.score(embedder(x)), scores_s
        vary = [(s.std(1, correction=0) / s.mean(1)).mean().item() for s in both]  # coefficients of variation
        print(f"contrast scores vary by {vary[0]:.0%} of their mean (target) and {vary[1]:.0%} (source)")
    print(f"contrast k from {k0} to {schedule(args.epochs - 1, args.epochs, k0, k_end)} of {N} tokens, lambda = {args.ratio}")
    if args.freeze_embedder:
        embedder.requires_grad_(False)

    # ---- optimizer and schedule
    if args.checkpoint:
        common.checkpoint_activations(model.encoder)
    score = net.score  # contrast
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
        order_s = source_set.plan(steps, args.batch_size, args.seed, epoch)[0][:, run.rank :: run.world].to(device)  # contrast
        k = schedule(epoch, args.epochs, k0, k_end)  # contrast
        lam = k / max(1, k0 if args.ratio == "k/k0" else N)  # contrast: lambda
        for step, (x, y) in enumerate(bar := run.progress(batches, steps, f"epoch {epoch + 1}/{args.epochs}")):
            window = min(args.accumulate, steps - step // args.accumulate * args.accumulate)  # the last one may be short
            step_follows = (step + 1) % args.accumulate == 0 or step + 1 == steps
            with run.no_sync_unless(step_follows, net):
                x_s, y_s = source_set.inputs(order_s[step]), source_set.targets(order_s[step])  # contrast: not augmented
                with run.autocast():
                    tokens_s = source.embedder(x_s)  # contrast: (B, N_s, D), frozen
                    of_s = None if scores_s is None else scores_s[order_s[step]]  # contrast: (B, N_s)
                    out, out_m, out_ms = net(x, tokens_s, of_s, k)  # contrast: (B, ...), (B, ...), (B, ...)
                loss = task.loss(out, y)
                if k > 0:  # contrast: the bracket of line 7, L_mix in PaRe
                    loss_mix = (1 - lam) * task.loss(out_m, y) + lam * source_set.loss(out_ms, y_s)  # contrast: line 7
                    loss = loss + args.mix_weight * loss_mix  # contrast: line 7
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
        row |= {"k": k, "lambda": lam}  # contrast
        run.end_epoch(net, model, optimizer, scheduler, row)

    # ---- test: the last epoch, and the epoch that was best on validation
    ks = {epoch + 1: schedule(epoch, args.epochs, k0, k_end) for epoch in (0, args.epochs // 2, args.epochs - 1)}  # contrast
    run.draw_patches(loaded.test, lambda x: score(model.embedder(x)), ks)  # contrast
    return run.finish(model, loaded, args.source)  # contrast


if __name__ == "__main__":
    cli.guarded(main, cli.command_line(Args, __doc__, data.find_task))
