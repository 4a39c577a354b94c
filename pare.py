"""PaRe: fine-tune on patches of the source and of the target together, from easy to hard.

Cai et al., "Enhancing Cross-Modal Fine-Tuning with Gradually Intermediate Modality Generation", ICML 2024.

Target samples look unlike anything that the encoder was pretrained on. PaRe trains it, next to them, on an intermediate
modality: target samples in which the patches that matter least are replaced by the source patches that matter most. It begins
close to the source, on which the encoder was pretrained, and moves to the target.

    in epoch ep of EP:   k = k0 (1 - ep / EP),   lambda = k / k0
    1  X_t = embedder(x_t)                       N target tokens of width D
    2  X_s = source embedder(x_s)                N_s source tokens (images: N; text: 32), the pretrained embedder, frozen
    3  S   = sigmoid(FC(X))                      the gate: one score for each token, shared by source and target
    4  X_m = X_t, its k lowest-scored tokens replaced one by one by the k highest-scored of X_s
    5  L_mix = (1 - lambda) L(h_t(g(X_m)), y_t) + lambda L(h_s(g(X_m)), y_s)        g the encoder, h the predictors
    6  L = L(h_t(g(X_t)), y_t) + mix_weight L_mix
    7  step on embedder, encoder, gate and both predictors

    python pare.py --task spherical

Measured with 1,000 real samples, tiny scale, 5 seeds (satellite: 3), last epoch, naive fine-tuning in parentheses: error on
cifar100 0.775 ± 0.005 (0.784 ± 0.004), on satellite 0.408 ± 0.016 (0.417 ± 0.012). docs/results.md has the commands and more.

With 10,000 images, 3 seeds: cifar100 0.559 ± 0.002 (0.568 ± 0.004), spherical 0.836 ± 0.004 (0.848 ± 0.003). Published, full
scale: 0.063 (0.077) and 0.256 (0.553).

The paper's abstract and slides do not say how L_mix and the loss on unmixed samples are combined: line 6 follows the official
code. The target embedder starts as a copy, also as in the code; the paper's is random (`--init`). The gate's gradient is
straight-through, as in the code, but of another relaxation, and it trains in every epoch (P5, P23). k0 of each task, mix_weight
and the temperature are the code's. All other defaults follow the paper; `--as-released` follows the code in P2 to P6 and P8:
docs/paper-vs-code.md.
"""

import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

import cli
import common
import data
from run import LOG_EVERY, Run, make_optimizer, make_schedule, mean_loss, seed_everything


@dataclass(frozen=True)
class Args(cli.Args):
    """The options of PaRe; those that all methods share are in cli.Args."""

    k_begin: float | None = None
    """k0 as a fraction of the N target tokens, at most N_s tokens. Default (official): 0.64 (2D classification), 0.32 (fields;
    cosmic 0.16), 1 (1D). Try less if images are far from the target"""
    k_end: float | None = None
    """fraction that k falls to. Default: 0, as in the paper; with --as-released that of the official configuration, 500 of 3136
    for images"""
    ratio: Literal["k/k0", "k/N"] | None = None
    """lambda, the weight of the source label: k/k0 (default, paper) starts at 1, k/N (code; default with
    --as-released) is the share of source tokens"""
    mix_weight: float | None = None
    """weight of L_mix in the total loss. Default: the official 1 (2D classification), 0.3 (2D fields), 0.1 (1D)"""
    temperature: float = 0.9
    """temperature of the relaxed top-k that gives the gate its gradient; lower is closer to the hard top-k"""
    gate_noise: float | None = None
    """scale of Gumbel noise on the scores. Default: 0; with --as-released the official 1, whose standard deviation is 1.28: as
    the scores are in (0, 1), the choice is nearly random"""


class Gate(nn.Module):
    """S = sigmoid(FC(X)): how much each token matters. (B, N, D) -> (B, N), in fp32, where scores seldom tie."""

    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, 1)

    def forward(self, tokens):
        with common.autocast_off(tokens):
            return self.linear(tokens.float()).squeeze(-1).sigmoid()  # (B, N)


def top_k_mask(scores, k, temperature=0.9):
    """1 for the k highest scores, 0 for the rest, with a gradient (straight-through). (B, N) -> (B, N)

    Forward pass: the hard choice. Backward pass: the gradient of the relaxed one:

        p_i = sigmoid(s_i / tau - t),   t such that sum_i p_i = k
        dp_i / ds_j = w_i (delta_ij - w_j / sum_l w_l) / tau,   w = p (1 - p)

    The threshold t is found by 30 bisections, whatever N and k. They have no gradient. A last Newton step changes t by
    rounding only and gives it the gradient of the implicit function theorem. (The official code iterates N softmaxes:
    tools/bench.py topk.)
    """
    N = scores.shape[1]
    hard = torch.zeros_like(scores).scatter(1, scores.topk(k).indices, 1.0)  # (B, N)
    if k in (0, N) or not scores.requires_grad:
        return hard  # no choice, or no gradient
    s = scores / temperature  # s_i / tau
    with torch.no_grad():
        offset = torch.logit(torch.tensor(k / N))  # t = min s - offset: each p_i >= k / N, sum p >= k; max s - offset: <= k
        low, high = s.amin(1, keepdim=True) - offset, s.amax(1, keepdim=True) - offset  # (B, 1)
        for _ in range(30):
            threshold = (low + high) / 2
            too_many = torch.sigmoid(s - threshold).sum(1, keepdim=True) > k
            low, high = torch.where(too_many, threshold, low), torch.where(too_many, high, threshold)
        p = torch.sigmoid(s - threshold)
        slope = (p * (1 - p)).sum(1, keepdim=True)  # sum_l w_l
    # Newton's step for f(t) = sum p - k, f' = -sum w
    threshold = threshold + (torch.sigmoid(s - threshold).sum(1, keepdim=True) - k) / slope
    p = torch.sigmoid(s - threshold)
    return hard + (p - p.detach())  # (B, N): the value of hard, the gradient of p


def replace_patches(tokens_t, tokens_s, scores_t, scores_s, k, temperature=0.9):
    """Line 4: the intermediate sample X_m.

    The N - k highest-scored target tokens stay in place. The positions of the other k are filled, from left to right, with the
    k highest-scored source tokens in their original order. The gate gets its gradient through both masks.

    Args:
        tokens_t (B, N, D), tokens_s (B, N_s, D): embedded target and source samples.
        scores_t (B, N), scores_s (B, N_s): the gate's scores.
        k: tokens to replace; 0 returns the target unchanged.
    Returns: tokens_m (B, N, D).
    Raises: ValueError for unequal batches, or a k larger than N or N_s.
    """
    (B, N, D), N_s = tokens_t.shape, tokens_s.shape[1]
    if len(tokens_s) != B:
        raise ValueError(f"{B} target samples but {len(tokens_s)} source samples: pair them one to one")
    if not 0 <= k <= min(N, N_s):
        raise ValueError(f"k = {k} does not fit {N} target and {N_s} source tokens")
    if k == 0:
        return tokens_t
    mask_t = top_k_mask(scores_t, N - k, temperature)  # (B, N), 1 is keep
    mask_s = top_k_mask(scores_s, k, temperature)  # (B, N_s), 1 is insert
    dropped_t = mask_t.argsort(dim=1, stable=True)[:, :k, None].expand(-1, -1, D)  # (B, k, D) left to right
    chosen_s = mask_s.argsort(dim=1, stable=True, descending=True)[:, :k, None].expand(-1, -1, D)  # (B, k, D) left to right
    return (tokens_t * mask_t[..., None]).scatter(1, dropped_t, (tokens_s * mask_s[..., None]).gather(1, chosen_s))


def replace_as_released(tokens_t, tokens_s, scores_t, scores_s, k):
    """The second phase of the official code (P4, P5, P8): the k HIGHEST-scored target tokens are replaced, the lowest of
    them by the highest-scored source token and so on, and the gate gets no gradient."""
    D = tokens_t.shape[2]
    dropped_t = scores_t.argsort(dim=1)[:, scores_t.shape[1] - k :, None].expand(-1, -1, D)  # (B, k, D) ascending
    chosen_s = scores_s.topk(k).indices[..., None].expand(-1, -1, D)  # (B, k, D) descending
    return tokens_t.scatter(1, dropped_t, tokens_s.gather(1, chosen_s))


def released_phase2_begins(args, modality):
    """First epoch of the official second phase: 10 (2D) or 5 (1D) of any number; tiny scale: after 10/60 or 5/60 of the run."""
    official = 10 if modality == "2d" else 5
    return max(1, args.epochs * official // 60) if args.scale == "tiny" else official


def schedule(epoch, epochs, k_begin, k_end=0):
    """Tokens replaced in epoch ep from 0:  k = int(k0 - (k0 - k_end) ep / EP), for k_end = 0 int(k0 (1 - ep / EP))."""
    return int(k_begin - (k_begin - k_end) * epoch / epochs)


def limits(args, N, N_s):
    """k0 and k_end as numbers of tokens, at most N_s. Raises UserError if k would rise, or would not fall because of N_s."""
    if args.k_end > args.k_begin:
        raise cli.UserError(f"--k-end {args.k_end} is larger than --k-begin {args.k_begin}: k must fall.\nLower --k-end.")
    k0, k_end = (min(round(share * N), N_s) for share in (args.k_begin, args.k_end))
    if k_end == k0 == N_s and args.k_end < args.k_begin:
        raise cli.UserError(f"k would stay at {N_s}, all tokens of the source (the target has {N}).\nLower --k-end.")
    return k0, k_end


def gumbel(like):
    """Samples of Gumbel(0, 1), of the shape of `like`. Added to the scores, they make a top-k a random choice."""
    return -torch.log(-torch.log(torch.rand_like(like).clamp(1e-20, 1 - 1e-7)))


class PaRe(nn.Module):
    """Everything that trains: the model, the gate, and the source predictor h_s, which is dropped in the end."""

    def __init__(self, model, gate, predictor_s, temperature=0.9, noise=0.0):
        super().__init__()
        self.model, self.gate, self.predictor_s = model, gate, predictor_s
        self.temperature, self.noise = temperature, noise

    def forward(self, x, tokens_s, k, released_phase2=False):
        """Predictions h_t(g(X_t)), h_t(g(X_m)), h_s(g(X_m)), in one pass of the encoder; if k = 0, the last two are None."""
        tokens_t = self.model.embedder(x)  # (B, N, D)
        if k == 0:
            return self.model.predictor(self.model.encoder(tokens_t)), None, None
        scores_t, scores_s = self.gate(tokens_t), self.gate(tokens_s)  # (B, N), (B, N_s)
        if released_phase2:
            tokens_m = replace_as_released(tokens_t, tokens_s, scores_t, scores_s, k)  # (B, N, D)
        else:
            if self.noise > 0:
                scores_t, scores_s = (s + self.noise * gumbel(s) for s in (scores_t, scores_s))
            tokens_m = replace_patches(tokens_t, tokens_s, scores_t, scores_s, k, self.temperature)  # (B, N, D)
        features, features_m = self.model.encoder(torch.cat([tokens_t, tokens_m])).chunk(2)  # (2B, N, D) -> 2 x (B, n, F)
        return self.model.predictor(features), self.model.predictor(features_m), self.predictor_s(features_m)


def main(args):
    # ---- set up: processes, device, seed, data, run folder
    run = Run(args, "pare")  # PaRe
    args, device = run.args, run.device
    with run.first_process_first():
        source = common.load_source(args.backbone)  # PaRe
        loaded = data.load(
            args.task, args.data_dir, f"{args.out_dir}/cache", args.scale, args.n_train, args.seed, device, args.as_released
        )
        source_set = data.load_proxy(  # PaRe
            args.source, args.data_dir, args.scale, data.SOURCE_SAMPLES, args.seed, device, source.tokenizer  # PaRe
        )  # PaRe
    task, train = loaded.task, loaded.train
    if not run.start(train, source_set):  # PaRe
        return

    # ---- the model
    embedder = common.make_embedder(task.shape, source, args.init, task.tokens)  # PaRe
    predictor = common.make_predictor(train.output, task.target, source, embedder, pooling=args.as_released)
    model = common.Model(embedder, common.set_dropout(source.encoder, args.dropout), predictor)
    if args.compile:
        run.compile(model.encoder)

    # ---- PaRe: gate and source predictor; the source embedder stays frozen, outside of what trains
    # fields (H, W) and masks share one predictor, as in the official code
    shared = task.target == source_set.target == "field" and len(train.output) == 2
    predictor_s = predictor if shared else common.make_predictor(source_set.output, source_set.target, source, embedder)
    gate = Gate(source.token_width)
    net = PaRe(model, gate, predictor_s, args.temperature, args.gate_noise)
    source.embedder.to(device)
    N, N_s = embedder.tokens, source.tokens(source_set.shape)
    k0, k_end = limits(args, N, N_s)
    phase2 = released_phase2_begins(args, task.modality) if args.as_released else args.epochs  # P4, P5
    print(f"PaRe    k from {k0} to {schedule(args.epochs - 1, args.epochs, k0, k_end)} of {N} tokens, lambda = {args.ratio}")

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
        batches_s = source_set.batches(steps, args.batch_size, args.seed, epoch, run.rank, run.world)  # PaRe
        k = schedule(epoch, args.epochs, k0, k_end)  # PaRe
        lam = k / max(1, k0 if args.ratio == "k/k0" else N)  # PaRe: lambda
        for step, (x, y) in enumerate(bar := run.progress(batches, steps, f"epoch {epoch + 1}/{args.epochs}")):
            window = min(args.accumulate, steps - step // args.accumulate * args.accumulate)  # the last one may be short
            step_follows = (step + 1) % args.accumulate == 0 or step + 1 == steps
            with run.no_sync_unless(step_follows, net):
                x_s, y_s = next(batches_s)  # PaRe
                with run.autocast():
                    tokens_s = source.embedder(x_s)  # PaRe: (B, N_s, D), frozen
                    out, out_m, out_ms = net(x, tokens_s, k, epoch >= phase2)  # PaRe: (B, ...), (B, ...), (B, ...)
                loss = task.loss(out, y)
                if k > 0:  # PaRe: L_mix = (1 - lambda) L(h_t(g(X_m)), y_t) + lambda L(h_s(g(X_m)), y_s)
                    loss_mix = (1 - lam) * task.loss(out_m, y) + lam * source_set.loss(out_ms, y_s)  # PaRe: line 5
                    loss = loss + args.mix_weight * loss_mix  # PaRe: line 6
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
        row |= {"k": k, "lambda": lam}  # PaRe
        run.end_epoch(net, model, optimizer, scheduler, row)

    # ---- test: the last epoch, and the epoch that was best on validation
    ks = {epoch + 1: schedule(epoch, args.epochs, k0, k_end) for epoch in (0, args.epochs // 2, args.epochs - 1)}  # PaRe
    if not args.as_released:  # PaRe: the picture shows the paper's choice, not the released one
        run.draw_patches(loaded.test, lambda x: gate(model.embedder(x)), ks)  # PaRe
    return run.finish(model, loaded, args.source)  # PaRe


if __name__ == "__main__":
    cli.guarded(main, cli.command_line(Args, __doc__, data.find_task))
