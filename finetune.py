"""Fine-tune a pretrained encoder on another modality: the baselines that every method has to beat.

    model = predictor(encoder(embedder(x))),   L = L(model(x), y)

    naive     everything trains (NFT in the papers)
    scratch   the same network with random weights: what is the pretraining worth?
    frozen    attention and feed-forward of the encoder stay as pretrained (FPT, frozen pretrained transformer)
    warmup    first only the embedder trains, then everything (Emb, the baseline of MoNA)
    probe     only the predictor trains

    python finetune.py --task spherical --mode naive

Measured on real images projected here, tiny scale, 5,000 samples, 12 epochs, 3 seeds: test error 0.864 ± 0.004 (naive) and
0.929 ± 0.002 (scratch), 2.2 minutes on one CPU core. docs/results.md has the commands and the other modes.

All modes share the recipe of ORCA's configuration, and the option --init: in ORCA's release the naive baseline also starts
from another embedder than ORCA, which is worth more than most methods. `--as-released` reproduces that start:
docs/paper-vs-code.md, O2.
"""

from dataclasses import dataclass
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

    # ---- finetune
    mode: Literal["naive", "scratch", "frozen", "warmup", "probe"] = "naive"
    """what trains, and from where: see above"""
    warmup_share: float = 1 / 6
    """warmup: share of --epochs that trains only the embedder"""


if __name__ == "__main__":  # the command line comes first: --help and mistakes answer before torch is imported
    args = data.command_line(Args, __doc__)

import torch
from torch import nn

import common

# ---------------------------------------------------------------------------------------------------------------------
# The method
# ---------------------------------------------------------------------------------------------------------------------


def trains(mode, name, warming):
    """Does the parameter `name` train? They are called embedder.*, encoder.* and predictor.*"""
    if mode == "frozen":  # LayerNorms, position biases and patch merging train: FPT freezes attention and feed-forward only
        swin, text = (".attn.qkv.", ".attn.proj.", ".mlp."), (".attention.self.", ".dense.")
        return not any(part in name for part in swin + text)
    if mode == "warmup" and warming:  # the embedder alone; the random predictor waits too, as the text says "all else frozen"
        return name.startswith("embedder.")
    return mode != "probe" or name.startswith("predictor.")


def choose(model, mode, warming=False):
    """Switch gradients on or off by parameter, so that what is frozen costs no gradient either."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains(mode, name, warming))


def main(args):
    # ---- set up: processes, device, seed, data, run folder
    run = common.Run(args, "finetune")  # finetune
    args, device = run.args, run.device
    with run.first():
        source = common.load_source(args.backbone, pretrained=args.mode != "scratch")  # finetune
        loaded = data.load(
            args.task, args.data_dir, f"{args.out_dir}/cache", args.scale, args.n_train, args.seed, device, args.as_released
        )
    task, train = loaded.task, loaded.train
    if not run.open(train):  # finetune
        return

    # ---- the model
    init = "truncated" if args.as_released else "random" if args.mode == "scratch" else args.init  # finetune
    embedder = common.make_embedder(task.shape, source, init, task.tokens)  # finetune
    predictor = common.make_predictor(train.output, task.target, source, embedder, pooling=args.as_released)
    model = common.Model(embedder, common.set_dropout(source.encoder, args.dropout), predictor)
    if args.compile:
        run.compile(model.encoder)

    # ---- finetune: what trains
    net = model
    choose(model, args.mode)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise data.UserError("the released head of 1D fields has nothing to train.\nLeave out --as-released or --mode probe.")
    warms = args.mode == "warmup" and args.warmup_share > 0
    warming_epochs = max(1, round(args.epochs * args.warmup_share)) if warms else 0

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
        choose(model, args.mode, epoch < warming_epochs)  # finetune
        start, losses = common.now(), torch.zeros(steps, device=device)
        batches = train.batches(steps, args.batch_size, args.seed, epoch, run.rank, run.world)
        for step, (x, y) in enumerate(bar := run.progress(batches, steps, f"epoch {epoch + 1}/{args.epochs}")):
            window = min(args.accumulate, steps - step // args.accumulate * args.accumulate)  # the last one may be short
            step_follows = (step + 1) % args.accumulate == 0 or step + 1 == steps
            with run.accumulating(net, step_follows):
                with run.autocast():
                    out = net(x)  # finetune: (B, K)
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
    return run.finish(model, loaded)  # finetune


if __name__ == "__main__":
    data.guarded(main, args)
