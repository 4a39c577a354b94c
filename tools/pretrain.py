"""Pretrain the tiny backbones: a small Swin on images and a small RoBERTa on text, for use without a GPU or a network.

    python tools/pretrain.py images --data-dir DIR         Tiny-ImageNet: weights/tiny-swin.safetensors and its card
    python tools/pretrain.py text --data-dir DIR           English text: weights/tiny-roberta.safetensors and its card

The file contains the architecture (and the vocabulary), so `--backbone PATH` of the method files loads models of any size.

Shapes: B batch, C channels, H W sizes; T tokens of a sequence, M of them masked, V entries of the vocabulary.
"""

import io
import json
import math
import sys
import time
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save as to_safetensors
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import backbones
import cli
import data
from run import write
from tasks.files import read_text, reading
from tasks.images import read_tiny_imagenet, resized_crop_and_flip


@dataclass(frozen=True)
class Images:
    """Train a Swin on Tiny-ImageNet classification."""

    data_dir: str = "datasets"
    """folder with tiny-imagenet-200/ or its zip files"""
    n_train: int | None = None
    """this many training images, drawn at random. Default: all"""
    out: str = "weights/tiny-swin"
    """OUT.safetensors (fp16) and OUT.md are written after each epoch; an interrupted training resumes from OUT.part"""
    size: int = 32
    """input size in pixels; Tiny-ImageNet images have 64"""
    window: int = 4
    """size of the attention windows in tokens"""
    width: int = 64
    """token width D of the first stage; doubles with each stage"""
    depths: tuple[int, ...] = (2, 4)
    """blocks per stage; each stage after the first has a quarter of the tokens of the one before"""
    epochs: int = 80
    """more epochs help a little; without --cutmix, top-1 stayed at 0.28 between epochs 44 and 56 of 100"""
    batch_size: int = 256
    """samples per step"""
    lr: float = 2e-3
    """peak learning rate of AdamW; linear warm-up, then cosine decay to 0"""
    weight_decay: float = 0.05
    """weight decay of AdamW, on matrices only"""
    label_smoothing: float = 0.1
    """share of the label that is distributed over all classes"""
    crop: float = 0.25
    """smallest area of the random crop; small models benefit from gentle crops"""
    cutmix: float = 0.5
    """share of the batches with CutMix: a box of each image, and the same share of its label, comes from another image"""
    seed: int = 0
    """seed of weights, order and augmentation"""
    compile: bool = True
    """torch.compile; needs a C++ compiler on the CPU"""


@dataclass(frozen=True)
class Text:
    """Train a RoBERTa by masked language modelling."""

    data_dir: str = "datasets"
    """folder with text/ (zips of plain text, CoNLL columns or word/tag pairs), conll2003/train.txt, or both"""
    out: str = "weights/tiny-roberta"
    """OUT.safetensors (fp16) and OUT.md are written; an interrupted training resumes from OUT.part"""
    vocabulary: int = 3072
    """size of the byte-level BPE vocabulary, which is trained first"""
    width: int = 128
    """token width D"""
    layers: int = 4
    """transformer layers"""
    heads: int = 4
    """attention heads; the width of the feed-forward layers is four times the token width"""
    length: int = 64
    """tokens of a training sequence; it starts at varying positions, so that all 512 are trained"""
    mask: float = 0.25
    """share of masked tokens; RoBERTa uses 0.15, a larger share is better for a short training"""
    steps: int = 6000
    """optimizer steps; the loss still decreases slowly at the end"""
    batch_size: int = 16
    """sequences per step"""
    lr: float = 1.5e-3
    """peak learning rate of AdamW; linear warm-up, then cosine decay to 0"""
    weight_decay: float = 0.01
    """weight decay of AdamW, on matrices only"""
    seed: int = 0
    """seed of weights, order and masks"""
    save_every: int = 1000
    """steps between checkpoints"""
    compile: bool = True
    """torch.compile; needs a C++ compiler on the CPU"""


def weights_file(args):
    """OUT.safetensors, whether or not --out has the suffix."""
    return Path(args.out.removesuffix(".safetensors") + ".safetensors")


def make_training(model, args, total, warmup, **more):
    """AdamW with weight decay on matrices only; linear warm-up, then cosine decay to 0 after `total` steps."""
    groups = [{"params": [p for p in model.parameters() if (p.ndim > 1) == matrix], "weight_decay": args.weight_decay * matrix}
              for matrix in (True, False)]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=args.lr, fused=True, **more)
    decay = lambda t: 0.5 + 0.5 * math.cos(math.pi * max(0, t - warmup) / max(1, total - warmup))
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min((t + 1) / max(1, warmup), decay(t)))


def check_finite(model):
    """Raise UserError if a weight is inf or NaN: it must not replace the weights of an earlier training."""
    if not all(weight.isfinite().all() for weight in model.state_dict().values()):
        raise cli.UserError("the training diverged.\nLower --lr.")


def keep(path, args, model, optimizer, schedule, done, seconds):
    """Write what `resume` needs: the state after `done` epochs or steps, which took `seconds`."""
    state = {"args": asdict(args), "done": done, "seconds": seconds}
    state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write(path, buffer.getvalue())


def resume(path, args, model, optimizer, schedule, device):
    """Load what `keep` wrote, if there is any: epochs or steps done, seconds they took.

    Raises UserError if the file belongs to other options.
    """
    if not path.exists():
        return 0, 0.0
    state = torch.load(path, map_location=device, weights_only=True)
    if state["args"] != asdict(args):
        raise cli.UserError(f"{path} belongs to other options.\nUse the same options, or remove it to start over.")
    for part, name in ((model, "model"), (optimizer, "optimizer"), (schedule, "schedule")):
        part.load_state_dict(state[name])
    print(f"resumed after {state['done']}")
    return state["done"], state["seconds"]


# ---------------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------------

CARD = """# {name}

A Swin transformer of {parameters:.2f}M parameters for {size} x {size} images: {tokens} tokens of width {width}, depths
{depths}.

| | |
|---|---|
| data | Tiny-ImageNet, {n_train:,} training images ({per_class} a class), 200 classes |
| command | `{command}` |
| trained | {epoch} of {epochs} epochs, {hours:.2f} hours on {device}, torch {torch}, bf16 autocast |
| top-1 | {top1:.1%} of {n_val:,} images of the official validation folder, measured on the fp16 file |
| size | {megabytes:.1f} MB, fp16 |
| licence | weights: MIT; Tiny-ImageNet: non-commercial research |
"""


def cutmix(x, y):
    """CutMix (Yun et al. 2019) with one box for the whole batch. x (B, C, size, size), y (B,)

    Returns: mixed images (B, C, size, size), labels of the images in the box (B,), area of the box as a share of the image.
    """
    size = x.shape[-1]
    side = round(size * (1 - torch.rand(()).item()) ** 0.5)
    top, left = torch.randint(size - side + 1, (2,)).tolist()
    x = x.clone()
    x[:, :, top : top + side, left : left + side] = x.roll(1, 0)[:, :, top : top + side, left : left + side]
    return x, y.roll(1), (side / size) ** 2


def images(args):
    whole = 4 * 2 ** max(0, len(args.depths) - 1)  # each merging halves the sides of the grid of patches
    if min(args.depths, default=0) < 1 or args.size < 1 or args.size % whole:
        raise cli.UserError(f"--size {args.size} --depths {args.depths}: depths are positive, the size a multiple of {whole}.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    proxy, start = data.PROXIES["tiny_imagenet"], time.time()
    splits = {
        s: data.Split(*read_tiny_imagenet(Path(args.data_dir), n, split=s), 200, "official", proxy, device)
        for s, n in (("train", args.n_train), ("val", None))
    }
    train, val = splits["train"], splits["val"]
    train.augment = lambda x, u: resized(resized_crop_and_flip(x, u, scale=(args.crop, 1)))
    print(f"{len(train):,} training and {len(val):,} validation images read in {time.time() - start:.0f} s")

    def resized(x):  # (B, 3, 64, 64) -> (B, 3, size, size)
        return F.interpolate(x, args.size, mode="bilinear", antialias=True)

    heads = [max(1, args.width * 2**stage // 32) for stage in range(len(args.depths))]
    architecture = dict(img_size=args.size, patch_size=4, window_size=args.window, embed_dim=args.width,
                        depths=args.depths, num_heads=heads, num_classes=200, drop_path_rate=0.0)  # fmt: skip
    model = backbones.build_swin(**architecture).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    steps = len(train) // args.batch_size
    if not steps:
        raise cli.UserError(f"{len(train)} images do not fill a batch of {args.batch_size}.\nLower --batch-size.")
    total = args.epochs * steps
    optimizer, schedule = make_training(model, args, total, min(3 * steps, total // 2))
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
        """Write the weights and the card. Returns the top-1 accuracy of the fp16 weights."""
        check_finite(model)
        weights = {k: v.half() for k, v in model.state_dict().items()}
        rounded = backbones.build_swin(**architecture).to(device)
        rounded.load_state_dict({k: v.float() for k, v in weights.items()}, strict=False)
        write(path, to_safetensors(weights, {"architecture": json.dumps(architecture)}))
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
            "hours": (before + time.time() - start) / 3600,
            "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU cores",
            "torch": torch.__version__,
            "top1": score,
            "megabytes": path.stat().st_size / 1e6,
        }
        path.with_suffix(".md").write_text(CARD.format(**card))
        if epoch + 1 < args.epochs:
            keep(part, args, model, optimizer, schedule, epoch + 1, before + time.time() - start)
        return score

    path = weights_file(args)
    part = path.with_suffix(".part")
    first, before = resume(part, args, model, optimizer, schedule, device)
    for epoch in range(first, args.epochs):
        torch.manual_seed(args.seed * 1_000_003 + epoch)  # a resumed training draws the same
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
    part.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------

TEXT_CARD = """# {name}

A RoBERTa of {parameters:.2f}M parameters: {layers} layers of width {width}, {heads} heads, {positions} positions, a byte-level
BPE vocabulary of {entries:,} entries, stored in the same file.

| | |
|---|---|
| data | {sources}: {characters:.1f} million characters, {n_train:,} training tokens |
| command | `{command}` |
| trained | {step:,} of {steps:,} steps of {batch_size} x {length} tokens, {hours:.2f} h, {device}, torch {torch}, {precision} |
| held out | {n_val:,} tokens, every 50th block of {piece:,} characters; 15% are masked and predicted with the fp16 file |
| masked tokens | accuracy {accuracy:.1%}, loss {loss:.2f} nats |
| unigram baseline | accuracy {unigram_accuracy:.1%}, loss {unigram_loss:.2f} nats, from the token counts of the training text |
| size | {megabytes:.1f} MB, fp16 |
| licence | weights: MIT; the texts are not part of this file and remain under the terms of their owners (CoNLL: research) |
"""
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]  # as in RoBERTa; the first four have the same ids
MASK, PIECE = SPECIAL.index("<mask>"), 10_000


def plain(text):
    """Convert CoNLL columns, word/tag pairs (Brown) or plain text to words separated by single spaces."""
    lines = [line.split() for line in text.splitlines()]
    filled = [line for line in lines if line]
    if len({len(line) for line in filled[:1000]}) == 1 and len(filled[0]) in (3, 4):  # columns, one word per line
        return " ".join(line[0] for line in filled)
    words = [word for line in filled for word in line]
    if all("/" in word for word in words[:1000]):
        words = [word.rsplit("/", 1)[0] for word in words]
    return " ".join(words)


def read_texts(data_dir):
    """Read all zips in data_dir/text and data_dir/conll2003/train.txt; test files are skipped.

    Returns: name -> text.
    Raises: UserError if there is no text, or if a zip is damaged.
    """
    texts = {}
    for path in sorted(Path(data_dir).glob("text/*.zip")):
        with reading(path, "zip file"), zipfile.ZipFile(path) as file:
            names = [n for n in sorted(file.namelist()) if not n.endswith(("/", "README", "cats.txt", "test.txt"))]
            texts[path.stem] = " ".join(plain(file.read(name).decode("utf-8", "replace")) for name in names)
    conll = Path(data_dir) / "conll2003" / "train.txt"
    if conll.exists():
        texts["conll2003"] = plain(read_text(conll))
    if not any(texts.values()):
        raise cli.UserError(f"no text in {data_dir}.\nGive the folder with text/*.zip or conll2003/train.txt: --data-dir.")
    return texts


def train_tokenizer(texts, entries):
    """Train a byte-level BPE vocabulary (Sennrich et al. 2016) with the special tokens of RoBERTa."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=entries, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


@torch.no_grad()
def look_at_neighbours(model):
    """Initialise the heads of the first layer to attend to the neighbours -1, +1, -2, +2 ..., the best hints at a masked word.

    The position embeddings are initialised to sin(w p), cos(w p) (Vaswani et al. 2017), with w from pi downwards. The query of
    a head rotates those with the largest w by its shift d, and its key copies them, so their product
    sum_w cos(w (p + d - p')) is largest at p' = p + d. All of these weights are trained further. Random queries attend to the
    average of the whole sequence: after 3,000 steps they only reached 6.15 nats, a bag of words (unigrams: 6.80).
    """
    table, attention = model.embeddings.position_embeddings.weight, model.encoder.layer[0].attention.self
    n, width = table[2:].shape
    w = torch.pi * 1000 ** -torch.linspace(0, 1, width // 2)  # (D / 2,)
    angles = torch.arange(n)[:, None] * w  # (n, D / 2)
    table[2:] = 0.06 * torch.cat([angles.sin(), angles.cos()], 1)  # (n, D)
    half = width // attention.num_attention_heads // 2  # frequencies per head
    sines, cosines = torch.arange(half), width // 2 + torch.arange(half)
    for head in range(attention.num_attention_heads):
        shift = (head // 2 + 1) * (-1) ** (head + 1)  # d
        turned = w[:half] * shift
        rows = 2 * half * head + torch.arange(2 * half).view(2, half)
        for row, own, other, sign in ((rows[0], sines, cosines, 1), (rows[1], cosines, sines, -1)):
            attention.query.weight[row, own] += 1.4 * turned.cos()  # sin(wp + wd) = sin wp cos wd + cos wp sin wd
            attention.query.weight[row, other] += 1.4 * sign * turned.sin()  # cos(wp + wd) = cos wp cos wd - sin wp sin wd
            attention.key.weight[row, own] += 1.4


def hide(x, share, entries, generator):
    """Mask a `share` of the tokens of each sequence by BERT's 80/10/10 rule.

    Args:
        x (B, T): token ids.
    Returns: token ids with M = share * T hidden tokens per row (80% become <mask>, 10% a random entry, 10% are unchanged)
        (B, T); indices of the hidden tokens in the flattened batch (B * M,).
    """
    B, T = x.shape
    M = max(1, round(share * T))
    columns = torch.rand(B, T, generator=generator).topk(M).indices  # (B, M)
    places = (columns + T * torch.arange(B)[:, None]).flatten()  # (B * M,)
    u = torch.rand(B * M, generator=generator)
    random = torch.randint(len(SPECIAL), entries, (B * M,), generator=generator)
    seen = x.flatten().clone()  # (B * T,)
    seen[places] = torch.where(u < 0.8, MASK, torch.where(u < 0.9, random, seen[places]))
    return seen.view(B, T), places


def text(args):
    if args.width % (2 * args.heads):
        raise cli.UserError(f"--width {args.width} must be a multiple of twice --heads {args.heads}.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    start = time.time()
    texts = read_texts(args.data_dir)
    piece = min(PIECE, sum(map(len, texts.values())) // 100 + 1)  # characters per piece
    pieces = [t[i : i + piece] for t in texts.values() for i in range(0, len(t), piece)]
    path = weights_file(args)
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer([p for i, p in enumerate(pieces) if i % 50 != 49], args.vocabulary)
    entries = tokenizer.get_vocab_size()
    ids = [torch.tensor(tokenizer.encode(p).ids) for p in pieces]

    def packed(parts):
        """Concatenate the tokens of all parts and cut them into sequences: (n, T)."""
        stream = torch.cat(parts)
        if len(stream) < args.length:
            raise cli.UserError(f"{args.data_dir} has {len(stream)} tokens of text, too few for --length {args.length}.")
        return stream[: len(stream) // args.length * args.length].view(-1, args.length)

    val = packed(ids[49::50])
    train = packed([part for i, part in enumerate(ids) if i % 50 != 49])
    print(f"{train.numel():,} training and {val.numel():,} held-out tokens, made in {time.time() - start:.0f} s", flush=True)

    architecture = dict(model_type="roberta", vocab_size=entries, hidden_size=args.width, num_hidden_layers=args.layers,
                        num_attention_heads=args.heads, intermediate_size=4 * args.width, max_position_embeddings=514,
                        type_vocab_size=1, pad_token_id=1, initializer_range=0.04, hidden_dropout_prob=0.0,
                        attention_probs_dropout_prob=0.0)  # fmt: skip
    positions = architecture["max_position_embeddings"] - 2
    if args.length > positions:
        raise cli.UserError(f"--length {args.length} must be at most {positions}, the number of positions.")
    model = transformers.RobertaForMaskedLM(transformers.RobertaConfig(**architecture))
    look_at_neighbours(model.roberta)
    model = model.to(device)
    parameters = sum(p.numel() for p in model.parameters())
    optimizer, schedule = make_training(model, args, args.steps, max(1, args.steps // 20), betas=(0.9, 0.98))

    def logits(model, seen, places, offset):
        """Logits at the hidden tokens; the sequences start at position `offset`. seen (B, T) -> (B * M, V)"""
        position = 2 + offset + torch.arange(seen.shape[1], device=seen.device).expand_as(seen)  # (B, T)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):  # slower on a CPU at this width
            features = model.roberta(seen, position_ids=position).last_hidden_state  # (B, T, D)
            return model.lm_head(features.flatten(0, 1)[places]).float()

    forward = torch.compile(logits) if args.compile else logits

    @torch.no_grad()
    def score(model):
        """Accuracy and loss of the model and of the unigram distribution, on the same hidden tokens of the held-out text."""
        counts = torch.bincount(train.flatten(), minlength=entries).float() + 1  # (V,)
        unigram, right, losses, targets = (counts / counts.sum()).log(), [], [], []
        generator = torch.Generator().manual_seed(0)
        for x in val.split(64):
            seen, places = hide(x, 0.15, entries, generator)
            y, out = x.flatten()[places], logits(model, seen.to(device), places.to(device), 0).cpu()  # (B * M,), (B * M, V)
            right.append(out.argmax(1) == y)
            losses.append(F.cross_entropy(out, y, reduction="none"))
            targets.append(y)
        y = torch.cat(targets)
        return {
            "accuracy": torch.cat(right).float().mean().item(),
            "loss": torch.cat(losses).mean().item(),
            "unigram_accuracy": (y == counts.argmax()).float().mean().item(),
            "unigram_loss": -unigram[y].mean().item(),
        }

    def save(step):
        """Write the weights, the card and the checkpoint. Returns the scores of the fp16 weights."""
        check_finite(model)
        weights = {k: v.half().contiguous() for k, v in model.state_dict().items() if k != "lm_head.decoder.weight"}  # tied
        weights.pop("lm_head.decoder.bias", None)  # the same tensor as lm_head.bias
        rounded = transformers.RobertaForMaskedLM(transformers.RobertaConfig(**architecture)).to(device).eval()
        rounded.load_state_dict({k: v.half().float() for k, v in model.state_dict().items()})
        write(path, to_safetensors(weights, {"architecture": json.dumps(architecture), "tokenizer": tokenizer.to_str()}))
        scores = score(rounded)
        card = asdict(args) | scores | {
            "name": path.stem,
            "parameters": parameters / 1e6,
            "positions": positions,
            "piece": piece,
            "entries": entries,
            "sources": ", ".join(texts),
            "characters": sum(map(len, texts.values())) / 1e6,
            "n_train": train.numel(),
            "n_val": val.numel(),
            "command": "python " + " ".join(sys.argv),
            "step": step,
            "hours": (time.time() - start + before) / 3600,
            "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU cores",
            "torch": torch.__version__,
            "precision": "bf16 autocast" if device.type == "cuda" else "fp32",
            "megabytes": path.stat().st_size / 1e6,
        }  # fmt: skip
        path.with_suffix(".md").write_text(TEXT_CARD.format(**card))
        keep(part, args, model, optimizer, schedule, step, time.time() - start + before)
        return scores

    part = path.with_suffix(".part")
    first, before = resume(part, args, model, optimizer, schedule, device)
    model.train()
    losses = []
    for step in tqdm(range(first, args.steps), "steps", leave=False, disable=None):
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        epoch, place = divmod(step * args.batch_size, len(train))
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(args.seed + epoch))
        x = train[order[torch.arange(place, place + args.batch_size) % len(train)]]  # (B, T)
        seen, places = hide(x, args.mask, entries, generator)
        y = x.flatten()[places].to(device)  # (B * M,)
        # half of the sequences start at the first position, as they do when the model is used; the others anywhere
        offset = torch.randint(positions - args.length + 1, (len(x), 1), generator=generator)
        offset *= torch.rand(len(x), 1, generator=generator) < 0.5  # (B, 1)
        out = forward(model, seen.to(device), places.to(device), offset.to(device))  # (B * M, V)
        loss = F.cross_entropy(out, y)  # -log p(token | sequence with M hidden tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            scores = save(step + 1)
            print(f"step {step + 1:6d}  loss {torch.stack(losses).mean():.3f}  held out {scores['loss']:.3f}, accuracy "
                  f"{scores['accuracy']:.3f}  {time.time() - start + before:.0f} s", flush=True)  # fmt: skip
            losses = []
    part.unlink(missing_ok=True)


def main(args):
    path = weights_file(args)
    if path.exists() and not path.with_suffix(".part").exists():
        raise cli.UserError(f"{path} is a finished backbone.\nGive another --out, or remove it.")
    images(args) if isinstance(args, Images) else text(args)


if __name__ == "__main__":
    cli.guarded(main, cli.command_line(Images | Text, __doc__))
