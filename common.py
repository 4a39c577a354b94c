"""What the method files share: embedders, predictors, backbones, run keeping. Maths lives here once; loops do not.

    model = predictor(encoder(embedder(x)))

Shapes: B batch, N tokens, D token width, n encoder output tokens, F feature width, K classes, C channels, H W sizes.
`_s` source, `_t` target, `_m` mixed.
"""

import contextlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import nn

import data
from data import UserError

# ---------------------------------------------------------------------------------------------------------------------
# Embedder and predictor
# ---------------------------------------------------------------------------------------------------------------------


class Embedder2d(nn.Module):
    """Pictures to tokens: resize, one linear map of each patch, LayerNorm; what a Swin does with its own pictures.

    Starts random as the official codes do: Xavier-uniform with gain sqrt(2), zero bias.

    Args:
        channels: C of the pictures.
        width: D of the tokens.
        size: side the pictures are resized to, bilinear, aspect ratio not kept; smoothed first when they shrink.
        patch: side of a patch; N = (size / patch)^2.
    """

    def __init__(self, channels, width, size, patch=4):
        super().__init__()
        self.size, self.tokens = size, (size // patch) ** 2  # N
        self.project = nn.Conv2d(channels, width, patch, stride=patch)
        self.norm = nn.LayerNorm(width)
        nn.init.xavier_uniform_(self.project.weight, gain=2**0.5)
        nn.init.zeros_(self.project.bias)

    def forward(self, x):
        if x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)  # (B, C, size, size)
        return self.norm(self.project(x).flatten(2).transpose(1, 2))  # (B, N, D)


def initialise(embedder, source, init):
    """Start the target embedder: the one option that means the same in every method.

    "copy" takes projection, bias and LayerNorm from the pretrained embedder; for C != 3 channels its 3 input slices are
    tiled and cut to C, not rescaled (the official codes' way). "random" leaves the constructor's values.
    "truncated" is normal(0, 0.02) cut at two units, which ORCA's release gives to its naive fine-tuning only.
    """
    if init == "copy":
        weight = source.embedder.project.weight  # (D, 3, patch, patch)
        channels = embedder.project.in_channels
        tiled = weight.repeat(1, -(-channels // 3), 1, 1)[:, :channels]  # (D, C, patch, patch)
        embedder.load_state_dict(source.embedder.state_dict() | {"project.weight": tiled})
    elif init == "truncated":
        nn.init.trunc_normal_(embedder.project.weight, std=0.02)
    return embedder


class ClassPredictor(nn.Module):
    """Mean over the tokens, then one linear map: (B, n, F) -> (B, K)."""

    def __init__(self, width, classes):
        super().__init__()
        self.linear = nn.Linear(width, classes)

    def forward(self, features):
        return self.linear(features.mean(1))  # (B, n, F) -> (B, F) -> (B, K)


class Model(nn.Module):
    """predictor(encoder(embedder(x)))"""

    def __init__(self, embedder, encoder, predictor):
        super().__init__()
        self.embedder, self.encoder, self.predictor = embedder, encoder, predictor

    def forward(self, x):
        return self.predictor(self.encoder(self.embedder(x)))


# ---------------------------------------------------------------------------------------------------------------------
# Backbones: a pretrained Swin, cut into its embedder and its encoder. The only place that knows timm's insides.
# ---------------------------------------------------------------------------------------------------------------------

WEIGHTS = Path(__file__).parent / "weights"
SHORT_NAMES = {
    "swin_base": "swin_base_patch4_window7_224.ms_in22k",  # the papers' backbone
    "swin_tiny": "swin_tiny_patch4_window7_224.ms_in22k",
}
DEFAULT_BACKBONE = {"tiny": "tiny-swin", "full": "swin_base"}


class SwinEncoder(nn.Module):
    """The stages of a Swin and its last LayerNorm: (B, N, D) -> (B, n, F)."""

    def __init__(self, swin):
        super().__init__()
        self.grid = swin.patch_embed.grid_size
        self.layers, self.norm = swin.layers, swin.norm

    def forward(self, tokens):
        x = tokens.unflatten(1, self.grid)  # (B, N, D) -> (B, H/4, W/4, D)
        return self.norm(self.layers(x)).flatten(1, 2)  # (B, n, F)


@dataclass
class Source:
    """A pretrained model in two parts: its own embedder, frozen, and the encoder that is going to be adapted."""

    name: str
    embedder: Embedder2d
    encoder: nn.Module
    token_width: int  # D
    feature_width: int  # F
    size: int  # side of the pictures it was built for


def reason(error):
    """The first line of an exception's message."""
    return (str(error) or type(error).__name__).splitlines()[0][:90]


def build_swin(**architecture):
    """A timm SwinTransformer with random weights; `architecture` are its constructor's arguments."""
    import_timm()
    from timm.models.swin_transformer import SwinTransformer

    return SwinTransformer(**architecture)


def import_timm():
    """timm, or two lines of advice where torch and torchvision do not belong together."""
    try:
        import timm
    except RuntimeError as error:  # "operator torchvision::nms does not exist"
        from importlib.metadata import version

        raise UserError(f"torch {version('torch')} and torchvision {version('torchvision')} do not fit together ({error}).\n"
                        "Install both from one index: pip install --force-reinstall torch torchvision") from error  # fmt: skip
    return timm


def read_swin(path, pretrained=True):
    """A Swin from a file of tools/pretrain.py, which carries its architecture."""
    try:
        with safe_open(path, "pt") as file:
            architecture = json.loads((file.metadata() or {}).get("architecture", "null"))
        weights = load_file(path)
    except SafetensorError as error:
        raise UserError(
            f"{path} is not a whole safetensors file ({error}).\nRestore it, or write it again with tools/pretrain.py."
        ) from error
    if architecture is None:
        raise UserError(
            f"{path} does not say its architecture.\nGive a file of tools/pretrain.py, a timm name, or a folder saved by timm."
        )
    swin = build_swin(**architecture)
    if pretrained:
        swin.load_state_dict({k: v.float() for k, v in weights.items()})
    return swin


def load_source(name, pretrained=True):
    """The backbone `name` as a Source.

    Args:
        name: "tiny-swin" or another file in weights/; "swin_base", "swin_tiny"; any timm Swin; a .safetensors file of
            tools/pretrain.py; a folder saved by timm (config.json, model.safetensors). "random:NAME" is NAME with random
            weights, for measuring speed where no weights can be had.
        pretrained: False builds the same network with random weights.
    Raises: UserError for a name nobody knows, a damaged file, a model that is no Swin, a hub that does not answer.
    """
    timm = import_timm()
    short = name.removeprefix("random:")
    pretrained = pretrained and short == name
    path = Path(short)
    if (WEIGHTS / f"{short}.safetensors").exists():
        path = WEIGHTS / f"{short}.safetensors"
    if path.suffix == ".safetensors":
        if not path.exists():
            raise UserError(f"--backbone: there is no file {path}.")
        swin = read_swin(path, pretrained)
    else:
        wanted = f"local-dir:{path}" if path.is_dir() else SHORT_NAMES.get(short, short)
        if not path.is_dir() and not timm.is_model(wanted) and not short.startswith("hf-hub:"):
            known = ", ".join([p.stem for p in WEIGHTS.glob("*.safetensors")] + list(SHORT_NAMES))
            raise UserError(f"--backbone: no model is called {short!r}. Known here: {known}; any timm Swin; a path.")
        try:
            swin = timm.create_model(wanted, pretrained=pretrained)
        except (OSError, ValueError, RuntimeError) as error:  # no such tag, no weights, no network
            raise UserError(
                f"--backbone: the weights of {wanted} cannot be had ({reason(error)}).\n"
                f"Give a folder that holds them, tiny-swin, or random:{short} to measure speed only."
            ) from error
    if not hasattr(swin, "layers") or not hasattr(swin, "patch_embed"):
        raise UserError(
            f"--backbone: {name} is a {type(swin).__name__}; only Swin transformers can be cut into embedder and encoder."
        )
    patches, size = swin.patch_embed, swin.patch_embed.img_size[0]
    embedder = Embedder2d(3, swin.embed_dim, size, patches.patch_size[0])
    embedder.project.load_state_dict(patches.proj.state_dict())
    embedder.norm.load_state_dict(patches.norm.state_dict())
    return Source(name, embedder.requires_grad_(False), SwinEncoder(swin), swin.embed_dim, swin.num_features, size)


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer and schedule
# ---------------------------------------------------------------------------------------------------------------------


def make_optimizer(module, args):
    """The recipe's optimizer on the parameters that train: one learning rate, weight decay on all, as the official codes."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    if args.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=args.lr, momentum=0.9, weight_decay=args.weight_decay)
    Adam = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[args.optimizer]
    return Adam(parameters, lr=args.lr, betas=(0.9, 0.98), weight_decay=args.weight_decay, fused=True)


def make_schedule(optimizer, args, steps):
    """Linear warm-up, then linear to 0 at decay_epochs; advanced once per optimizer step, `steps` of them in an epoch.

        factor(t) = min((t + 1) / W, (T - t) / (T - W)),   W = warmup_epochs steps,  T = decay_epochs steps

    The official WarmupLR counts micro-batches and spends its first one at rate 0.
    """
    W, T = args.warmup_epochs * steps, args.decay_epochs * steps
    factor = lambda t: max(0.0, min((t + 1) / max(W, 1), (T - t) / max(T - W, 1)))
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


# ---------------------------------------------------------------------------------------------------------------------
# Run keeping: processes, device, seeds, folder, checkpoints
# ---------------------------------------------------------------------------------------------------------------------

LOG_EVERY = 20  # steps between two looks at the loss: each look waits for the device


def write(path, content):
    """Write bytes under a temporary name, then rename: a killed run never leaves half a file."""
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
    part.replace(path)


def seed_everything(*numbers):
    """Seed torch from (seed, epoch, process). Each epoch draws from its own seed, so a resumed run repeats it exactly."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


def mean_loss(losses, split, step, epoch, args):
    """Mean of the last LOG_EVERY losses up to `step`: the one place in the loop where the host waits for the device.

    Raises UserError when one is not finite, naming the step and the training samples of its batch.
    """
    first = step // LOG_EVERY * LOG_EVERY
    recent = losses[first : step + 1].tolist()
    for i, loss in enumerate(recent):
        if loss - loss != 0:  # inf or nan
            order, _ = split.plan(len(losses), args.batch_size, args.seed, epoch)
            samples = order[first + i].tolist()
            raise UserError(
                f"the loss is {loss} at step {first + i} of epoch {epoch + 1}, on training samples {samples[:8]}...\n"
                "Start again in another --out-dir with a lower --lr or --clip 1: a resumed run would meet it again."
            )
    return sum(recent) / len(recent)


class Run:
    """One run: its processes and device, its options filled in, and its folder.

    `torchrun` sets RANK and WORLD_SIZE; without them the same lines describe a single process.
    """

    def __init__(self, args, method):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
        if self.world > 1:
            torch.distributed.init_process_group("nccl" if cuda else "gloo")
        if self.rank > 0:
            sys.stdout = open(os.devnull, "w")  # one voice
        scale = ("full" if cuda else "tiny") if args.scale == "auto" else args.scale
        args = replace(args, scale=scale, backbone=args.backbone or DEFAULT_BACKBONE[scale])
        self.args, self.method = data.complete(args, method, scale), getattr(args, "mode", method)
        if self.args.batch_size % self.world:
            raise UserError(f"--batch-size {self.args.batch_size} cannot be shared by {self.world} processes.")
        bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        self.precision = "bf16 autocast" if bf16 else "fp32"
        self.history, self.best, self.best_epoch, self.seconds = [], float("inf"), -1, 0.0
        seed_everything(self.args.seed)

    def open(self, *splits):
        """Make the run's folder; False if the run there is finished. `splits` it trains on: toy runs say so in their name.

        Raises UserError if the folder holds another run, or this one without --resume.
        """
        args, kinds = self.args, [split.kind for split in splits]
        identity = asdict(args) | {"data": kinds, "samples": [len(split) for split in splits]}
        self.kind = "toy" if "toy" in kinds else kinds[0]
        toy = "-toy" if self.kind == "toy" else ""
        backbone = Path(args.backbone).name.replace(":", "_").removesuffix(".safetensors")
        self.folder = Path(args.out_dir) / f"{args.task}-{self.method}-{backbone}-s{args.seed}{toy}"
        self.result_file, self.last, self.best_file = (self.folder / n for n in ("result.json", "last.pt", "best.safetensors"))
        if self.last.exists() or self.result_file.exists():
            if not args.resume:
                raise UserError(
                    f"{self.folder} holds a run already.\nGo on with --resume, choose another --out-dir, or remove the folder."
                )
            before = json.loads((self.folder / "args.json").read_text())
            free = ("resume", "out_dir", "data_dir")  # what may change without changing the result
            other = [
                f"{k} was {before.get(k)!r}, now {v!r}"
                for k, v in identity.items()
                if k not in free and before.get(k) != json.loads(json.dumps(v))
            ]
            if other:
                raise UserError(
                    f"{self.folder} holds another run: {'; '.join(other[:4])}.\n"
                    "Repeat its options, or choose another --out-dir."
                )
        if self.result_file.exists():
            print(f"{self.result_file.read_text()}\nfinished before: {self.result_file}")
            return False
        if self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            write(self.folder / "args.json", json.dumps(identity, indent=1).encode())
        processes = f", {self.world} processes" * (self.world > 1)
        print(f"run     {self.folder}  ({args.scale} scale, {self.device.type}, {self.precision}{processes})")
        return True

    @contextlib.contextmanager
    def first(self):
        """The first process goes ahead (it fills caches), the others follow."""
        if self.rank > 0:
            torch.distributed.barrier()
        yield
        if self.rank == 0 and self.world > 1:
            torch.distributed.barrier()

    def autocast(self):
        """bf16 for the matrix products on CUDA; losses and distances stay in fp32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision != "fp32")

    def distribute(self, module):
        """On the device, and gradients averaged over the processes if there are several.

        Parameters may go unused (PaRe's gate once k is 0), which DistributedDataParallel has to be told.
        """
        trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
        print(f"model   {trained / 1e6:.2f}M of {sum(p.numel() for p in module.parameters()) / 1e6:.2f}M parameters train")
        module = module.to(self.device)
        if self.world == 1:
            return module
        return nn.parallel.DistributedDataParallel(module, find_unused_parameters=True)

    def accumulating(self, module, step_follows):
        """Gradients travel between processes only on the micro-batch that an optimizer step follows."""
        return contextlib.nullcontext() if self.world == 1 or step_follows else module.no_sync()

    @torch.no_grad()
    def evaluate(self, model, split, task):
        """The task's metric of `model` on a whole split, each process its share, computed once on all samples."""
        model.eval()
        out, y = [], []
        for index in torch.arange(self.rank, len(split), self.world, device=self.device).split(256):
            with self.autocast():
                out.append(model(split.inputs(index)).float())
            y.append(split.y[index])
        out, y = torch.cat(out).cpu().numpy(), torch.cat(y).cpu().numpy()
        if self.world > 1:
            shares = [None] * self.world
            torch.distributed.all_gather_object(shares, (out, y))
            out, y = (np.concatenate(parts) for parts in zip(*shares, strict=True))
        return task.score(out, y)

    def resume(self, net, optimizer, schedule):
        """Load the last finished epoch if there is one; the number of the epoch to go on with."""
        if not self.last.exists():
            return 0
        try:
            state = torch.load(io.BytesIO(self.last.read_bytes()), map_location=self.device, weights_only=True)
            if state["run"] != self.folder.name:
                raise ValueError(f"it belongs to {state['run']}")
            getattr(net, "module", net).load_state_dict(state["net"])
            optimizer.load_state_dict(state["optimizer"])
            schedule.load_state_dict(state["schedule"])
        except (RuntimeError, KeyError, ValueError, EOFError, pickle.UnpicklingError) as error:
            raise UserError(
                f"{self.last} is no checkpoint of this run ({reason(error)}).\nRemove the folder to start over."
            ) from error
        self.history, self.best, self.best_epoch, self.seconds = (
            state[k] for k in ("history", "best", "best_epoch", "seconds")
        )
        print(f"resumed after epoch {len(self.history)}")
        return len(self.history)

    def end_epoch(self, net, model, optimizer, schedule, row):
        """Print and keep one line of metrics.jsonl; keep the best model by `val` and everything that is needed to go on."""
        epoch = len(self.history)
        self.history.append({"epoch": epoch + 1, **row})
        self.seconds += row["seconds"]
        print(
            "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in self.history[-1].items()), flush=True
        )
        improved = row["val"] < self.best  # every metric is an error
        if improved:
            self.best, self.best_epoch = row["val"], epoch + 1
        if self.rank > 0:
            return
        if improved:
            write(self.best_file, to_safetensors({k: v.contiguous() for k, v in model.state_dict().items()}))
        state = {
            "run": self.folder.name,
            "net": getattr(net, "module", net).state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "history": self.history,
            "best": self.best,
            "best_epoch": self.best_epoch,
            "seconds": self.seconds,
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write(self.last, buffer.getvalue())
        self.write_history()

    def write_history(self):
        write(self.folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in self.history).encode())

    def finish(self, model, loaded, source=None):
        """Test the last and the best checkpoint; write result.json and curves.png. Returns the result."""
        args, task = self.args, loaded.task
        test_last = self.evaluate(model, loaded.test, task)
        if self.world > 1:
            torch.distributed.barrier()  # the best checkpoint is on disk
        model.load_state_dict(load_file(self.best_file, device=str(self.device)))
        test = self.evaluate(model, loaded.test, task)
        seen = len(self.history) * (len(loaded.train) // args.batch_size or 1) * args.batch_size
        root = Path(__file__).parent
        git = shutil.which("git")
        head = [git, "-C", root, "rev-parse", "--short", "HEAD"]
        commit = git and subprocess.run(head, capture_output=True, text=True).stdout.strip()
        result = {
            "task": args.task, "method": self.method, "scale": args.scale, "backbone": args.backbone, "source": source,
            "data": self.kind, "seed": args.seed, "metric": task.metric, "direction": task.direction,
            "test": test, "test_last": test_last,
            "val": self.best, "best_epoch": self.best_epoch, "epochs": args.epochs, "n_train": len(loaded.train),
            "seconds": round(self.seconds, 1), "samples_per_second": round(seen / self.seconds, 1),
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
            "precision": self.precision, "torch": torch.__version__, "commit": commit or None,
        }  # fmt: skip
        if self.rank == 0:
            self.write_history()  # a run killed after its last checkpoint lacks a line
            self.plot(result)
            write(self.result_file, json.dumps(result, indent=1).encode())
        print(f"test {task.metric} {test:.4f} (epoch {self.best_epoch}, chosen on validation), {test_last:.4f} (last epoch)")
        print(self.result_file)
        if self.world > 1:
            torch.distributed.destroy_process_group()
        return result

    def plot(self, result):
        """curves.png: training loss, validation metric, and every other number the method logs, over the epochs."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        names = [k for k in self.history[0] if k not in ("epoch", "seconds", "lr")]
        figure, axes = plt.subplots(1, len(names), figsize=(3.4 * len(names), 2.8), layout="constrained", squeeze=False)
        for axis, name in zip(axes[0], names, strict=True):
            axis.plot([row["epoch"] for row in self.history], [row[name] for row in self.history], ".-")
            axis.set(xlabel="epoch", title=name)
            axis.locator_params(axis="x", integer=True)
            axis.grid(alpha=0.3)
            if name == "val":
                axis.plot(self.best_epoch, result["test"], "r*", markersize=10, label=f"test {result['test']:.3f}")
                axis.set_title(f"{result['metric']} on validation")
                axis.legend()
        figure.suptitle(f"{self.folder.name}  ({self.kind} data)")
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=110)
        plt.close(figure)
        write(self.folder / "curves.png", buffer.getvalue())

    def mean(self, losses):
        """Mean over the steps of all processes."""
        if self.world > 1:
            torch.distributed.all_reduce(losses)
        return losses.mean().item() / self.world

    def compile(self, encoder):
        """torch.compile the encoder, which does nearly all the work, in place: its parameters keep their names."""
        if not any(map(shutil.which, ("g++", "clang++", "cl"))):
            raise UserError(
                "--compile needs a C++ compiler (g++ or clang++), and none was found.\nInstall one, or leave --compile out."
            )
        encoder.compile()

    def progress(self, batches, steps, epoch):
        """A bar over the steps of an epoch, on the first process, where somebody watches."""
        from tqdm import tqdm

        return tqdm(
            batches, f"epoch {epoch + 1}/{self.args.epochs}", steps, leave=False, disable=None if self.rank == 0 else True
        )


def now():
    return time.perf_counter()
