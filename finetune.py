"""Fine-tune a pretrained encoder on another modality: the baselines that every method has to beat.

    model = predictor(encoder(embedder(x))),   L = L(model(x), y)

    naive     everything trains (NFT in the papers)
    scratch   the same network with random weights: what is the pretraining worth?
    frozen    attention and feed-forward of the encoder stay as pretrained (FPT, frozen pretrained transformer)
    warmup    first only the embedder trains, then everything (Emb, the baseline of MoNA)
    lora      W = W_0 + alpha / r B A for each linear map of attention and feed-forward; only A, B, embedder and predictor train
    norms     LayerNorms, embedder and predictor train; with a text model the same as frozen
    probe     only the predictor trains

    python finetune.py --task spherical --mode naive

Measured with 1,000 real samples, tiny scale, 5 seeds (satellite: 3), last epoch: error on cifar100 0.784 ± 0.004 (naive),
0.939 ± 0.005 (scratch), 0.782 ± 0.011 (norms), 0.780 ± 0.004 (lora); on satellite 0.417 ± 0.012 (naive), 0.411 ± 0.025
(scratch). docs/results.md has the commands and more.

All modes use ORCA's settings at the full scale and the common settings at the tiny scale. --init has no effect on scratch. In
ORCA's release, naive fine-tuning starts from a worse embedder than ORCA does; on cifar100 that matters more than the choice of
the method. `--as-released` reproduces this start: docs/paper-vs-code.md, O2.
"""

import copy
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
    """The options of the baselines; those that all methods share are in cli.Args."""

    mode: Literal["naive", "scratch", "frozen", "warmup", "lora", "norms", "probe"] = "naive"
    """what trains, and from where: see above"""
    warmup_share: float = 1 / 6
    """warmup: share of --epochs that trains only the embedder"""
    rank: int = 8
    """lora: r, the rank of each update"""
    alpha: float = 16.0
    """lora: updates are scaled by alpha / r"""


# attention and feed-forward of Swin and ViT, what Swin V2 keeps outside of its linear layers, BERT
BODY = (".attn.qkv.", ".attn.proj.", ".mlp.", "attn.q_bias", "attn.v_bias", "attn.logit_scale", ".attention.self.", ".dense.")


def trains(mode, name, warming=False):
    """Whether the parameter `name` trains: embedder.*, encoder.* or predictor.*; `warming`: in the warm-up epochs."""
    part = name.split(".")[0]
    if mode == "frozen":  # FPT: LayerNorms, position biases, the class token ... train
        return part != "encoder" or not any(layer in name for layer in BODY)
    if mode == "warmup":  # at first the embedder alone; the predictor is frozen too: the paper says "all else frozen"
        return part == "embedder" or not warming
    if mode == "lora":  # A and B are parameters of LoRA, not of the model
        return part != "encoder"
    if mode == "norms":
        return part != "encoder" or "norm" in name.lower()
    return mode != "probe" or part == "predictor"  # naive, scratch: everything


def set_trainable(model, mode, warming=False):
    """Set requires_grad of every parameter; no gradient is computed for frozen ones."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains(mode, name, warming))


class LoRA(nn.Module):
    """Low-rank updates of a frozen encoder (Hu et al. 2022, equation 3): W = W_0 + alpha / r B A, A (r, in), B (out, r).

    B starts at 0: training starts from the pretrained model. Saves memory of the optimizer, not time: the gradient of W is
    computed, then projected.
    """

    def __init__(self, model, rank, alpha):
        super().__init__()
        self.model, self.scale = model, alpha / rank
        # the linear maps of attention and feed-forward, (out, in) each
        body = {name: p for name, p in model.named_parameters() if not trains("frozen", name) and p.ndim == 2}
        self.names = list(body)
        self.A = nn.ParameterList(torch.empty(rank, p.shape[1]).uniform_(-1, 1) / p.shape[1] ** 0.5 for p in body.values())
        self.B = nn.ParameterList(torch.zeros(p.shape[0], rank) for p in body.values())

    def merged(self):
        """name -> W_0 + alpha / r B A, (out, in)"""
        updates = zip(self.names, self.A, self.B, strict=True)
        with common.autocast_off(self.A[0]):  # W is the same in training as when it is saved
            return {name: self.model.get_parameter(name) + self.scale * (B @ A) for name, A, B in updates}

    def merge_into(self, model):
        """Load W into a plain model."""
        model.load_state_dict(self.model.state_dict() | self.merged())

    def forward(self, x):
        return torch.func.functional_call(self.model, self.merged(), (x,))  # (B, ...)


def main(args):
    # ---- set up: processes, device, seed, data, run folder
    if args.as_released and args.init == "random":  # finetune
        raise cli.UserError("--as-released sets the initial embedder itself.\nLeave out --init random.")  # finetune
    run = Run(args, args.mode)  # finetune
    args, device = run.args, run.device
    with run.first_process_first():
        source = common.load_source(args.backbone, pretrained=args.mode != "scratch")  # finetune
        loaded = data.load(
            args.task, args.data_dir, f"{args.out_dir}/cache", args.scale, args.n_train, args.seed, device, args.as_released
        )
    task, train = loaded.task, loaded.train
    if not run.start(train):  # finetune
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
    set_trainable(model, args.mode)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise cli.UserError("the released head of 1D fields has nothing to train.\nLeave out --as-released or --mode probe.")
    warming_epochs = 0
    if args.mode == "warmup" and args.warmup_share > 0:  # at least one epoch, and one for the rest unless the share is 1
        if args.epochs == 1 and args.warmup_share < 1:
            raise cli.UserError("--mode warmup needs two epochs, one for the embedder alone.\nGive --epochs 2 or more.")
        warming_epochs = min(max(1, round(args.epochs * args.warmup_share)), args.epochs - (args.warmup_share < 1))
    if args.mode == "lora":
        if args.checkpoint:
            raise cli.UserError("--checkpoint does not work with --mode lora.\nLeave it out, and lower --batch-size.")
        net = lora = LoRA(model, args.rank, args.alpha)
        model = copy.deepcopy(model).to(device)  # with the merged weights: evaluated and saved

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
        set_trainable(model, args.mode, epoch < warming_epochs)  # finetune
        start, losses = time.perf_counter(), torch.zeros(steps, device=device)
        batches = train.batches(steps, args.batch_size, args.seed, epoch, run.rank, run.world)
        for step, (x, y) in enumerate(bar := run.progress(batches, steps, f"epoch {epoch + 1}/{args.epochs}")):
            window = min(args.accumulate, steps - step // args.accumulate * args.accumulate)  # the last one may be short
            step_follows = (step + 1) % args.accumulate == 0 or step + 1 == steps
            with run.no_sync_unless(step_follows, net):
                with run.autocast():
                    out = net(x)  # finetune: (B, ...)
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
        if args.mode == "lora":  # finetune
            lora.merge_into(model)  # finetune
        seconds = time.perf_counter() - start
        val = run.evaluate(model, loaded.val, task)
        row = {"loss": run.mean(losses), "val": val, "lr": scheduler.get_last_lr()[0], "seconds": seconds}  # the next step's lr
        run.end_epoch(net, model, optimizer, scheduler, row)

    # ---- test: the last epoch, and the epoch that was best on validation
    if args.mode == "lora":  # finetune: a resumed run may have no epoch left
        lora.merge_into(model)  # finetune
    return run.finish(model, loaded)  # finetune


if __name__ == "__main__":
    cli.guarded(main, cli.command_line(Args, __doc__, data.find_task))
