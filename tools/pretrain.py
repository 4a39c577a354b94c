"""Pretrain a small Swin on Tiny-ImageNet: the pretrained model of everybody without a GPU or a network.

    python tools/pretrain.py images --data-dir DIR         writes weights/tiny-swin.safetensors and its card

The file carries its architecture, so `--backbone PATH` of the method files loads what this writes, at any size.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data


@dataclass(frozen=True)
class Args:
    kind: Annotated[Literal["images"], tyro.conf.Positional]
    """what to pretrain"""
    data_dir: str = "datasets"
    """where tiny-imagenet-200/ or its zips lie"""
    out: str = "weights/tiny-swin"
    """writes OUT.safetensors (fp16) and OUT.md, at the end of every epoch"""
    size: int = 32
    """side of the input, in pixels; Tiny-ImageNet has 64"""
    window: int = 4
    """side of an attention window, in tokens"""
    width: int = 64
    """token width D; every later stage has twice the width of the one before"""
    depths: tuple[int, ...] = (2, 4)
    """blocks in each stage; each stage after the first has a quarter of the tokens"""
    epochs: int = 80
    """more helps a little; without --cutmix the top-1 stood still at 0.28 from 44 to 56 of 100"""
    batch_size: int = 256
    """samples in a step"""
    lr: float = 2e-3
    """peak learning rate of AdamW, warmed up linearly, then a half cosine to 0"""
    weight_decay: float = 0.05
    """of AdamW, on matrices only"""
    label_smoothing: float = 0.1
    """share of the label spread over all classes"""
    crop: float = 0.25
    """smallest area of the random crop; small models want gentle crops"""
    cutmix: float = 0.5
    """share of the batches in which every picture carries a box of another one, and its label in proportion"""
    seed: int = 0
    """of weights, order and augmentation"""
    compile: bool = True
    """torch.compile; needs a C++ compiler on the CPU"""


if __name__ == "__main__":
    args = data.command_line(Args, __doc__)

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tqdm import tqdm

import common

CARD = """# {name}

A Swin transformer of {parameters:.2f}M parameters for {size} x {size} pictures: {tokens} tokens of width {width}, depths
{depths}.

| | |
|---|---|
| data | Tiny-ImageNet, {n_train:,} training images ({per_class} a class), 200 classes |
| command | `{command}` |
| trained | {epoch} of {epochs} epochs, {hours:.2f} hours, {device}, torch {torch}, bf16 autocast |
| top-1 | {top1:.1%} of {n_val:,} images of the official validation folder, measured on the fp16 file |
| size | {megabytes:.1f} MB, fp16 |
| licence | the weights are ours (MIT); Tiny-ImageNet is for non-commercial research |
"""


def cutmix(x, y):
    """CutMix (Yun et al. 2019), one box for the batch: the pictures, the labels in the box, and the box's share of the area."""
    size = x.shape[-1]
    side = round(size * (1 - torch.rand(()).item()) ** 0.5)
    top, left = torch.randint(size - side + 1, (2,)).tolist()
    x = x.clone()
    x[:, :, top : top + side, left : left + side] = x.roll(1, 0)[:, :, top : top + side, left : left + side]
    return x, y.roll(1), (side / size) ** 2


def main(args):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    proxy, start = data.PROXIES["tiny_imagenet"], time.time()
    splits = {
        s: data.Split(*data.read_tiny_imagenet(Path(args.data_dir), s), 200, "official", proxy, device)
        for s in ("train", "val")
    }
    train, val = splits["train"], splits["val"]
    train.augment = lambda x, u: resized(data.resized_crop_and_flip(x, u, scale=(args.crop, 1)))
    print(f"{len(train):,} training and {len(val):,} validation images read in {time.time() - start:.0f} s")

    def resized(x):  # (B, 3, 64, 64) -> (B, 3, size, size)
        return F.interpolate(x, args.size, mode="bilinear", antialias=True)

    heads = [max(1, args.width * 2**stage // 32) for stage in range(len(args.depths))]
    architecture = dict(img_size=args.size, patch_size=4, window_size=args.window, embed_dim=args.width,
                        depths=args.depths, num_heads=heads, num_classes=200, drop_path_rate=0.0)  # fmt: skip
    model = common.build_swin(**architecture).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    groups = [{"params": [p for p in model.parameters() if (p.ndim > 1) == matrix], "weight_decay": args.weight_decay * matrix}
              for matrix in (True, False)]  # fmt: skip
    steps = len(train) // args.batch_size
    total, warmup = args.epochs * steps, 3 * steps
    optimizer = torch.optim.AdamW(groups, lr=args.lr, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min((t + 1) / warmup, 0.5 + 0.5 * np.cos(np.pi * max(0, t - warmup) / (total - warmup)))
    )
    forward = torch.compile(model) if args.compile else model

    @torch.no_grad()
    def top1(model):
        model.eval()
        with torch.autocast(device.type, torch.bfloat16):
            right = [
                model(resized(val.inputs(i))).argmax(1) == val.y[i] for i in torch.arange(len(val), device=device).split(500)
            ]
        return torch.cat(right).float().mean().item()

    def save(epoch):
        """Weights and card, together; the top-1 is that of the rounded weights."""
        weights = {k: v.half() for k, v in model.state_dict().items()}
        rounded = common.build_swin(**architecture).to(device)
        rounded.load_state_dict({k: v.float() for k, v in weights.items()}, strict=False)
        path = Path(args.out).with_suffix(".safetensors")
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(weights, path, metadata={"architecture": json.dumps(architecture)})
        score = top1(rounded)
        card = asdict(args) | {
            "name": path.stem,
            "depths": tuple(args.depths),
            "parameters": parameters / 1e6,
            "tokens": (args.size // 4) ** 2,
            "n_train": len(train),
            "per_class": len(train) // 200,
            "n_val": len(val),
            "command": "python " + " ".join(sys.argv),
            "epoch": epoch + 1,
            "hours": (time.time() - start) / 3600,
            "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU cores",
            "torch": torch.__version__,
            "top1": score,
            "megabytes": path.stat().st_size / 1e6,
        }
        path.with_suffix(".md").write_text(CARD.format(**card))
        return score

    for epoch in range(args.epochs):
        model.train()
        losses = torch.zeros(steps, device=device)
        for step, (x, y) in enumerate(
            tqdm(train.batches(steps, args.batch_size, args.seed, epoch), f"epoch {epoch + 1}", steps, leave=False)
        ):
            other, share = y, 0.0
            if torch.rand(()) < args.cutmix:
                x, other, share = cutmix(x, y)
            with torch.autocast(device.type, torch.bfloat16):
                out = forward(x).float()
            losses_of = [F.cross_entropy(out, label, label_smoothing=args.label_smoothing) for label in (y, other)]
            loss = (1 - share) * losses_of[0] + share * losses_of[1]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses[step] = loss.detach()
        print(
            f"epoch {epoch + 1:3d}  loss {losses.mean():.3f}  top-1 {save(epoch):.3f}  {time.time() - start:.0f} s", flush=True
        )


if __name__ == "__main__":
    data.guarded(main, args)
