"""RECRAFT: align the target embedder's features with the source, then its labels, then fine-tune.

Tran et al., "Rethinking Cross-Modal Fine-Tuning: Optimizing the Interaction between Feature Alignment and Target Fitting",
AISTATS 2026. Written from its abstract, its figure and its released code: the paper's equations could not be read.

Aligning features alone ignores labels: two target classes may be mapped to one source class, and relabelling the source model's
predictions then cannot separate them. RECRAFT also trains the embedder so that the source model's own labels say as much as
possible about the target's.

    stage 0:
    1  p_s(z | x) = softmax(h_s(mean over tokens of g(source embedder(x))))       h_s trained on source labels, then frozen
    stage 1, feature alignment, in each align epoch:
    2  u_s, u_t = mean over tokens of the embedded samples; one step on the embedder down the gradient of
       OT(u_s, u_t) = min over plans pi of sum_ij pi_ij 1/2 |u_i - u_j|^2         OTDD without labels
    stage 1, feature-label distortion, in each label step:
    3  P(z', z) <- 0.9 P(z', z) + 0.1 mean over i of 1{y_i = z'} p_s(z | g(embedder(x_i)))     running mean over the steps,
       from the first mean on: joint table of target label and predicted source label; only the new term has a gradient
    4  one step on the embedder up the gradient of I(Z; Z') = H(Z) - H(Z | Z') of P
    stage 2:
    5  L = L(h(g(embedder(x_t))), y_t), step on embedder, encoder g and a new predictor h

Why line 4: relabel what the source model predicts by any Q, p_Q(z' | x) = sum_z p_s(z | x) Q(z' | z). By Jensen's inequality
min over Q of E[-log p_Q(z' | x)] <= H(Z' | Z) = H(Z') - I(Z; Z'), so line 4 lowers a bound on the target log-loss that
the unchanged source model can reach. The released code instead lowers H(Z | Z') alone, which is 0 when every target sample is
predicted as one source class: `--distortion entropy`.

    python recraft.py --task spherical

Measured with 1,000 real samples, tiny scale, 5 seeds (satellite: 3), last epoch, naive fine-tuning in parentheses: error on
cifar100 0.788 ± 0.007 (0.784 ± 0.004), on satellite 0.376 ± 0.010 (0.417 ± 0.012). docs/results.md has the commands and more.

The released code differs from the abstract and the figure: docs/paper-vs-code.md, R1 to R13. `--as-released` follows it in R3
to R6 and R9.
"""

import functools
import math
import time
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

import cli
import common
import data
from run import LOG_EVERY, Run, embed_all, make_optimizer, make_schedule, mean_loss, seed_everything, take_step


@dataclass(frozen=True)
class Args(cli.Args):
    """The options of RECRAFT; those that all methods share are in cli.Args."""

    align_epochs: int | None = None
    """steps of feature alignment. Default: 60 (full, official), on OpenML tables and at the tiny scale 20"""
    label_epochs: int | None = None
    """epochs of feature-label distortion. Default: 2 to 6, by task (official); tiny scale 3. 0, with --align-epochs 0: naive
    fine-tuning"""
    distortion: Literal["mutual", "entropy"] = "mutual"
    """mutual: maximise I(Z; Z'). entropy: minimise H(Z | Z'), whose minimum is collapse; always with --as-released"""
    embedder_lr: float | None = None
    """learning rate of feature alignment, divided by 5 after 21, 41 and 61 epochs. Default (official): 10 times --lr, or --lr
    itself where it is above 1e-3; --lr before its scaling for gradient accumulation"""
    label_lr: float = 1e-4
    """learning rate of feature-label distortion"""
    reg: float | None = None
    """entropic strength of OT. Default: 0.1 (full, official; with --as-released), for GPUs; 0 (tiny): a linear program, faster
    on CPUs"""
    align_samples: int | None = None
    """target samples in a step of feature alignment, drawn anew in each. Default: 128; psicov and deepsea (full) 64"""
    label_samples: int | None = None
    """target samples in a step of feature-label distortion. Default: 128; as released, of one class: 16 to 32"""
    source_samples: int | None = None
    """source samples, for the source predictor and the alignment. Default: 5,000; tiny scale 1,000"""
    freeze_embedder: bool = False
    """freeze the embedder in stage 2, as in the paper's figure; the released code trains everything"""


RATE = 0.1  # weight of a batch in the running mean of the table, which averages over about ten batches
MEASURED = 512  # target samples on which each epoch of stage 1 is measured


def encode(encoder, autocast, embedder, split, index):
    """Features of samples `index` of a data.Split, the mean over tokens of the encoder's output: (m,) -> (m, F)"""

    def tokens(x):
        with autocast():
            return encoder(embedder(x)).float()  # (B, n, F)

    return embed_all(tokens, split, index)


def train_source_predictor(features_s, y_s, args, text):
    """Line 1: train h_s, a linear layer on source features (n, F) with labels y_s (n,), for 300 steps on all samples.

    As released: 20 epochs in batches of 4 at a constant rate; for text 30, with softmax applied twice: predictions are nearly
    uniform (R9).
    """
    with torch.random.fork_rng(devices=[]):
        seed_everything("source predictor", args.seed)
        h_s = nn.Linear(features_s.shape[1], int(y_s.max()) + 1).to(features_s.device)
        released = args.as_released
        epochs, batch_size, lr = ((30 if text else 20), 4, 1e-4) if released else (300, len(y_s), 1e-2)
        optimizer = torch.optim.AdamW(h_s.parameters(), lr=lr, weight_decay=0.05)
        for _ in range(epochs):
            for index in torch.randperm(len(y_s)).to(y_s.device).split(batch_size):
                out = h_s(features_s[index])  # (B, K_s)
                out = out.softmax(1) if released and text else out  # R9: a second softmax
                F.cross_entropy(out, y_s[index]).backward()  # line 1: -mean over i of log p_s(y_i | x_i)
                optimizer.step()
                optimizer.zero_grad()
    return h_s.requires_grad_(False)


def joint_table(p, y, classes):
    """Line 3: P(z', z) = 1/B sum_i 1{y_i = z'} p_i(z). p (B, K_s), y (B,) -> (K_t, K_s)"""
    return p.new_zeros(classes, p.shape[1]).index_add(0, y, p) / len(p)


def entropies(joint):
    """H(Z), H(Z | Z') and I(Z; Z') = H(Z) - H(Z | Z') of a joint table P(z', z), (K_t, K_s): three scalars, in nats."""
    entropy = lambda p: -torch.xlogy(p, p.clamp(min=1e-30)).sum()  # -sum p log p, and 0 log 0 = 0 with a gradient
    h_z, h_z_given = entropy(joint.sum(0)), entropy(joint) - entropy(joint.sum(1))  # H(Z | Z') = H(Z, Z') - H(Z')
    return h_z, h_z_given, h_z - h_z_given


def released_groups(y_t, args, generator):
    """A label epoch of the official code: yields groups of one class, index (m,), and the weights of their losses (R5, R6).

    A group consists of whole batches of `batch_size`, at least label_samples in all. A last group of less than half of
    label_samples is left out. weight = n_c / n * m / (number of batches of class c).
    """
    size = args.batch_size * math.ceil(args.label_samples / args.batch_size)
    classes = y_t.unique()
    for c in classes[torch.randperm(len(classes), generator=generator)]:
        members = torch.nonzero(y_t == c).squeeze(1)
        groups = members[torch.randperm(len(members), generator=generator)].split(size)
        batches = -(-len(members) // args.batch_size)
        yield from ((g, len(members) / len(y_t) * len(g) / batches) for g in groups if 2 * len(g) >= args.label_samples)


def learn_embedder(embedder, features, h_s, u_s, train, y_t, args, progress=iter):
    """Stage 1: trains `embedder`, and nothing else (lines 2 to 4).

    Args:
        features: (embedder, split, index (m,)) -> (m, F), `encode` with its encoder, in evaluation mode.
        h_s: the source predictor. u_s (n, D): the embedded source.
        train: the target's training samples, a data.Split. y_t (len(train),): their labels or pseudo-labels.
        args: the options. progress: wraps the epochs.
    Returns: a row for each epoch and one before the first step: distance, H(Z), H(Z|Z') and I(Z;Z') of fixed samples; the mean
        I(Z;Z') with permuted labels, an estimate of its bias with so few samples; seconds.
    Raises: UserError if the embedder diverges, or if no class has enough samples for --as-released.
    """
    parameters, classes, n = list(embedder.parameters()), int(y_t.max()) + 1, len(train)
    y_t, one_class = y_t.cpu(), lambda u: torch.zeros(len(u), dtype=torch.long, device=u.device)
    terms_s = common.OtddTerms(u_s, one_class(u_s), "none", args.reg)
    distance = lambda u_t: common.otdd(u_s, one_class(u_s), u_t, one_class(u_t), "none", args.reg, terms_s=terms_s)
    predict = lambda index: h_s(features(embedder, train, index)).softmax(1)  # line 1: (m, K_s)
    table = lambda index: joint_table(predict(index), y_t[index].to(u_s.device), classes)  # line 3: (K_t, K_s)
    fixed = torch.randperm(n, generator=torch.Generator().manual_seed(cli.stream("measured", args.seed)))[:MEASURED]
    rows = []

    def finite(values):
        if not values.isfinite().all():
            raise cli.UserError(f"the embedder diverged in epoch {len(rows)} of stage 1.\nLower --embedder-lr or --label-lr.")
        return values

    def measure(start):
        parameters[0].sum().item()  # waits for the device
        seconds = time.perf_counter() - start  # of training, without what follows
        with torch.no_grad():
            p, y = predict(fixed), y_t[fixed].to(u_s.device)  # (m, K_s), (m,)
            chance = [entropies(joint_table(p, y.roll(i), classes))[2] for i in range(1, min(11, len(y)))]
            of_labels = entropies(joint_table(p, y, classes))
            found = distance(finite(embed_all(embedder, train, fixed))), *of_labels, sum(chance) / max(1, len(chance))
        found = finite(torch.tensor([float(value) for value in found])).tolist()
        row = dict(zip(("distance", "H(Z)", "H(Z|Z')", "I(Z;Z')", "I, other labels"), found, strict=True))
        rows.append({"epoch": len(rows), **row, "seconds": seconds})

    measure(time.perf_counter())
    # ---- feature alignment
    of_embedder = data.of_embedder(args, "recraft")  # ORCA's rule: 10 times --lr
    optimizer = make_optimizer(embedder, of_embedder)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [21, 41, 61], 0.2)
    for epoch in progress(range(args.align_epochs)):
        generator = torch.Generator().manual_seed(cli.stream("alignment", args.seed, epoch))
        start, index = time.perf_counter(), torch.randperm(n, generator=generator)[: args.align_samples]
        take_step(optimizer, parameters, distance(finite(embed_all(embedder, train, index))))  # line 2: OT(u_s, u_t)
        scheduler.step()
        measure(start)

    # ---- feature-label distortion
    trained = nn.ModuleList([embedder, h_s.requires_grad_(args.as_released)])  # R4: as released, h_s is trained as well
    parameters = [p for p in trained.parameters() if p.requires_grad]
    optimizer = make_optimizer(trained, replace(of_embedder, lr=args.label_lr))
    P, steps = None, -(-n // args.label_samples)
    for epoch in progress(range(args.label_epochs)):
        generator = torch.Generator().manual_seed(cli.stream("labels", args.seed, epoch))
        start = time.perf_counter()
        if args.as_released:
            groups = list(released_groups(y_t, args, generator))
            if not groups:
                raise cli.UserError("No class has enough samples for a step of --as-released.\nLower --label-samples.")
            for index, weight in groups:
                _, h_group, _ = entropies(predict(index).mean(0)[None])  # of the group's mean prediction, (1, K_s)
                take_step(optimizer, parameters, weight * h_group)  # R5, R6: n_c / n * m / batches * H(mean prediction)
        else:
            for index in torch.randperm(n, generator=generator).tensor_split(steps):
                rate = 1.0 if P is None else RATE
                P = rate * table(index) + (1 - rate) * (0 if P is None else P.detach())  # line 3: (K_t, K_s)
                _, h_z_given, information = entropies(P)
                loss = -information if args.distortion == "mutual" else h_z_given  # line 4: -I(Z; Z'), or H(Z | Z')
                take_step(optimizer, parameters, loss / rate)  # only this batch has a gradient, scaled by rate: undone
        measure(start)
    h_s.requires_grad_(False)
    return rows


def main(args):
    # ---- set up: processes, device, seed, data, run folder
    run = Run(args, "recraft")  # RECRAFT
    args, device = run.args, run.device
    with run.first_process_first():
        source = common.load_source(args.backbone)  # RECRAFT
        loaded = data.load(
            args.task, args.data_dir, f"{args.out_dir}/cache", args.scale, args.n_train, args.seed, device, args.as_released
        )
        source_set = data.load_proxy(  # RECRAFT
            args.source, args.data_dir, args.scale, args.source_samples, args.seed, device, source.tokenizer  # RECRAFT
        )  # RECRAFT
    task, train = loaded.task, loaded.train
    if not run.start(train, source_set):  # RECRAFT
        return

    # ---- the model
    embedder = common.make_embedder(task.shape, source, args.init, task.tokens)  # RECRAFT
    predictor = common.make_predictor(train.output, task.target, source, embedder, pooling=args.as_released)
    model = common.Model(embedder, common.set_dropout(source.encoder, args.dropout), predictor)
    if args.compile:
        run.compile(model.encoder)

    # ---- RECRAFT: the source predictor, and stage 1, the embedder alone
    net = model
    if args.align_epochs + args.label_epochs > 0 and not run.restore_stage1(embedder=embedder):
        embedder.to(device)
        source.embedder.to(device)
        frozen = model.encoder.to(device).eval().requires_grad_(False)  # 0.6 times the activations (docs/performance.md)
        features = functools.partial(encode, frozen, run.autocast)
        every = torch.arange(len(source_set), device=device)
        y_s, y_t = (data.class_labels(split, seed=args.seed) for split in (source_set, train))
        with torch.no_grad(), run.eager():
            u_s = embed_all(source.embedder, source_set, every)  # (n, D)
            features_s = features(source.embedder, source_set, every)  # (n, F)
        h_s = train_source_predictor(features_s, y_s, args, source.modality == "1d")
        held_out = every % 5 == 4  # a second predictor, trained on the others, shows what such a predictor knows
        probe = train_source_predictor(features_s[~held_out], y_s[~held_out], args, source.modality == "1d")
        right = (probe(features_s[held_out]).argmax(1) == y_s[held_out]).float().mean().item()
        chance = y_s.bincount().max().item() / len(y_s)
        print(f"RECRAFT a source predictor is right for {right:.2f} of held-out samples, the most frequent label {chance:.2f}")
        if right < chance + 0.1:
            print("        That is near chance: such predictions say little about target labels.")
        with run.eager():
            rows = learn_embedder(embedder, features, h_s, u_s, train, y_t, args, run.progress)
        model.encoder.requires_grad_(True)
        run.keep_stage1(rows, embedder=embedder)
    if args.freeze_embedder:
        embedder.requires_grad_(False)

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
                    out = net(x)  # RECRAFT: line 5, (B, ...)
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
    return run.finish(model, loaded, args.source)  # RECRAFT


if __name__ == "__main__":
    cli.guarded(main, cli.command_line(Args, __doc__, data.find_task))
