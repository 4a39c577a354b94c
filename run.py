"""Run management: optimizer and schedule, processes, seeds, the run folder with its checkpoints, evaluation, tracking."""

import contextlib
import functools
import io
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
import zlib
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as from_safetensors
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import common
import data
import plots
from cli import UserError, reason, stream

# ---------------------------------------------------------------------------------------------------------------------
# Optimizer and schedule
# ---------------------------------------------------------------------------------------------------------------------


def make_optimizer(module, args):
    """The recipe's optimizer on the parameters that train: one learning rate, weight decay on all, as in the official code."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    if args.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=args.lr, momentum=args.momentum, weight_decay=args.weight_decay)
    Adam = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[args.optimizer]
    return Adam(parameters, lr=args.lr, betas=(0.9, 0.98), weight_decay=args.weight_decay, fused=True)


def make_schedule(optimizer, args, steps):
    """Linear warm-up, then linear to 0 at decay_epochs, advanced once per optimizer step; `steps` micro-batches in an epoch.

        factor(t) = min(1, (t + 1) / W, (T - t) / (T - W)),   W = warmup_epochs n,  T = decay_epochs n

    The official WarmupLR counts micro-batches and spends its first one at rate 0.
    """
    n = math.ceil(steps / args.accumulate)  # optimizer steps in an epoch
    W, T = args.warmup_epochs * n, args.decay_epochs * n
    factor = lambda t: max(0.0, min(1.0, (t + 1) / max(W, 1), (T - t) / max(T - W, 1)))
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


# ---------------------------------------------------------------------------------------------------------------------
# Several processes (torchrun): each has a part of the samples, and gradients are those of the loss on all samples
# ---------------------------------------------------------------------------------------------------------------------


def processes():
    """This process's number and how many there are: (rank, G), (0, 1) without torchrun."""
    initialised = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if initialised else (0, 1)


class SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes. Its gradient is summed in the same way and can be differentiated again."""

    @staticmethod
    def forward(ctx, x):
        total = x.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient):
        return SumOverProcesses.apply(gradient)


def shard(x):
    """The rows of x (n, ...) that this process works on: every G-th, as in `data.Split.batches`."""
    rank, world = processes()
    return x[rank::world]


def gather(x, n=None):
    """The inverse of `shard`, with a gradient: (n / G, ...) -> (n, ...). n: needed where G does not divide it.

    A loss on the gathered rows is the loss on all samples, the same in every process. In the backward pass each process gets G
    times the gradient of its own rows. Averaging over the processes then gives the full gradient, as in
    DistributedDataParallel.
    """
    rank, world = processes()
    if world == 1:
        return x
    rows = x.new_zeros(n or len(x) * world, *x.shape[1:])
    rows[rank::world] = x
    return SumOverProcesses.apply(rows)  # the others' rows are 0 here: the sum is exact


def average(tensors):
    """The means of tensors over the processes, with a gradient."""
    world = processes()[1]
    return list(tensors) if world == 1 else [SumOverProcesses.apply(x) / world for x in tensors]


def average_gradients(parameters):
    """Replace the gradients of `parameters` by their means over the processes."""
    parameters = list(parameters)
    for parameter, gradient in zip(parameters, average([p.grad for p in parameters]), strict=True):
        parameter.grad = gradient


def take_step(optimizer, parameters, loss):
    """One step on `parameters`, and nothing else, down the gradient of a loss on samples of all processes."""
    loss.backward(inputs=parameters)  # other weights in the graph get no gradient
    average_gradients(parameters)
    optimizer.step()
    optimizer.zero_grad()


def embed_all(embedder, split, index):
    """Samples `index` of a data.Split as one vector each, the mean over their tokens, with a gradient: (m,) -> (m, D)

    Embedded 128 at a time, or fewer if samples are large. If there are several chunks, the backward pass recomputes them, so
    that memory does not grow with m. Each process embeds its part.
    """

    def embed(index):
        return embedder(split.inputs(index)).mean(1)  # (chunk, N, D) -> (chunk, D)

    own = shard(index)
    parts = (own if len(own) else index[:1]).split(min(128, split.chunk))  # more processes than samples: one that is not used
    parts = [checkpoint(embed, part, use_reentrant=False) if len(parts) > 1 else embed(part) for part in parts]
    return gather(torch.cat(parts)[: len(own)], len(index))  # (m, D)


# ---------------------------------------------------------------------------------------------------------------------
# The run: processes, device, seeds, folder, checkpoints
# ---------------------------------------------------------------------------------------------------------------------


LOG_EVERY = 20  # steps between two readings of the loss: each one waits for the device


def write(path, content):
    """Write bytes under a temporary name, then rename: a killed run never leaves half a file."""
    with data.replacing(path) as file:
        file.write(content)


@functools.cache
def commit():
    """The commit of this code, with "-dirty" if it was changed since; None if it is not the root of a git repository."""
    root, git = Path(__file__).parent, shutil.which("git")
    if not (git and (root / ".git").exists()):
        return None
    describe = [git, "-C", root, "describe", "--always", "--dirty", "--exclude", "*"]
    return subprocess.run(describe, capture_output=True, text=True).stdout.strip() or None


commit()  # of the code that is imported now, whatever is committed while it runs: reproduce.py imports it once for all runs


def checksum(split):
    """CRC-32 of all targets and the first inputs of a Split, by which --resume notices other data of the same size."""
    crc = 0 if isinstance(split.y, data.Lazy) else zlib.crc32(split.y.cpu().numpy())
    for index in torch.arange(min(8, len(split)), device=split.device).split(1):  # one at a time: psicov's have 57 MB
        for part in (split.x, split.y):
            crc = zlib.crc32(split.rows(part, index).cpu().numpy(), crc)
    return crc


def seed_everything(name, *numbers):
    """Seed torch with a named stream of (seed, epoch, process): each epoch has its own, so a resumed run repeats it."""
    torch.manual_seed(stream(name, *numbers))


def mean_loss(losses, split, step, epoch, args):
    """Mean of the last LOG_EVERY losses up to `step`: the one place in the loop where the host waits for the device.

    Raises UserError when one is not finite, naming the step and the training samples of its batch.
    """
    first = step // LOG_EVERY * LOG_EVERY
    recent = losses[first : step + 1].tolist()
    for i, loss in enumerate(recent):
        if not math.isfinite(loss):
            order, _ = split.plan(len(losses), args.batch_size, args.seed, epoch)
            samples = order[first + i].tolist()
            where = f"at step {first + i} of epoch {epoch + 1}, samples {samples[:8]}... of the split"
            advice = "Start again in another --out-dir with a lower --lr or --clip 1: a resumed run would fail again."
            advice = advice if epoch + first + i else "No step was taken yet: check these samples and their targets."
            raise UserError(f"the loss is {loss} {where}.\n{advice}")
    return sum(recent) / len(recent)


def torchrun():
    """(rank, world size, local rank) as torchrun sets them; (0, 1, 0) without it.

    Raises UserError if only some of its variables are set, as clusters and notebooks do.
    """
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    given = {name: os.environ[name] for name in names if os.environ.get(name)}
    numbers = given.get("RANK", "0"), given.get("WORLD_SIZE", "1"), os.environ.get("LOCAL_RANK") or "0"
    rank, world, local = (int(n) if n.isdecimal() else -1 for n in numbers)
    alone, together = (rank, world) == (0, 1), len(given) == len(names) and 0 <= rank < world
    if not alone and not together:
        values = ", ".join(f"{name} is {given.get(name, 'not set')}" for name in names)
        raise UserError(f"{values}: start with torchrun, or unset RANK and WORLD_SIZE for a single process.")
    return rank, world, local


def choose_device(number=0):
    """The GPU with this number, or the CPU, and the precision there: bf16 autocast where a GPU has it, else fp32."""
    if not torch.cuda.is_available():
        import joblib

        torch.set_num_threads(min(torch.get_num_threads(), joblib.cpu_count()))  # a container may use fewer than torch sees
        return torch.device("cpu"), "fp32"
    if number >= torch.cuda.device_count():
        gpus = torch.cuda.device_count()
        raise UserError(f"process {number} has no GPU, {gpus} can be seen.\nStart with torchrun --nproc_per_node={gpus}.")
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    torch.backends.cudnn.allow_tf32 = False  # on by default: the embedder's convolution would be off by 1.6e-4
    return device, "bf16 autocast" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def autocast(device, precision):
    """bf16 for the encoder's matrix products on CUDA; losses, distances, and layers that read or write fields stay in fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision != "fp32")


def damage(path):
    """What is wrong with a file of a run folder, as text; None if it is complete. Reads headers, not the weights."""
    if not path.exists():
        return "is missing"
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt"):  # its header says how long the file is
                return None
        if path.suffix == ".pt":
            zipfile.ZipFile(path).close()  # its table of contents comes last
            return None
        rows = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        return None if rows and all(isinstance(json.loads(row), dict) for row in rows) else "is empty"
    except (SafetensorError, zipfile.BadZipFile, ValueError) as error:
        return f"is empty or cut short ({reason(error)})"


class Run:
    """One run: its processes and device, its options filled in, and its folder."""

    def __init__(self, args, method):
        self.rank, self.world, local = torchrun()
        self.tracker = plots.Tracker(args.track) if args.track and self.rank == 0 else None
        self.device, self.precision = choose_device(local)
        cuda = self.device.type == "cuda"
        if self.world > 1:
            torch.distributed.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=2))  # for downloads
        if self.rank > 0:
            sys.stdout = open(os.devnull, "w")  # only process 0 prints
        scale = ("full" if cuda else "tiny") if args.scale == "auto" else args.scale
        default = common.DEFAULT_BACKBONE[data.find_task(args.task).modality, scale]
        args = replace(args, scale=scale, backbone=args.backbone or default)
        self.args, self.method = data.complete(args, method, scale), method
        if self.args.batch_size % self.world:
            raise UserError(f"--batch-size {self.args.batch_size} cannot be shared by {self.world} processes.")
        self.history, self.best, self.best_epoch, self.seconds = [], float("inf"), -1, 0.0
        self.stage1 = []  # a row for each epoch of a method's first stage
        self.commit = commit()
        seed_everything("initial weights", self.args.seed)

    def start(self, *splits):
        """Create the run's folder; its name ends in -toy if one of `splits` is toy data. Returns False if the run has finished.

        Args: splits: the data that it trains on, the target first.
        Raises: UserError if the folder holds another run, a damaged run, or this run and --resume is not given.
        """
        args, origins, n = self.args, [split.kind for split in splits], len(splits[0])
        if args.batch_size > max(64, n):  # 64 is the largest published batch; small sets are repeated to fill one
            raise UserError(f"--batch-size {args.batch_size:,} is more than the {n:,} training samples.\nGive a smaller one.")
        identity = asdict(args) | {"data": origins, "samples": [len(split) for split in splits]}
        self.origin = "toy" if "toy" in origins else origins[0]
        toy = "-toy" if self.origin == "toy" else ""
        backbone = Path(args.backbone).name.replace(":", "_").removesuffix(".safetensors")
        self.folder = Path(args.out_dir) / f"{args.task}-{self.method}-{backbone}-s{args.seed}{toy}"
        self.result_file, self.last, self.best_file = (self.folder / n for n in ("result.json", "last.pt", "best.safetensors"))
        self.stage1_file = self.folder / "stage1.safetensors"
        found = [False, None, []]  # the first process checks for all: the others may see an older state of a network drive
        if self.rank == 0:
            try:
                found[0] = self.finished_before(identity, splits)
                found[2] = [path for path in (self.stage1_file, self.last) if path.exists()]
            except UserError as error:
                found[1] = str(error)
        if self.world > 1:
            torch.distributed.broadcast_object_list(found)
        finished, wrong, self.saved = found
        if wrong:
            raise UserError(wrong)
        if not (self.folder / "args.json").exists():
            raise UserError(f"{args.out_dir} is another folder here than on the first node: give one that all nodes share.")
        processes = f", {self.world} processes" * (self.world > 1)
        if not finished:
            print(f"run     {self.folder}  ({args.scale} scale, {self.device.type}, {self.precision}{processes})")
        return not finished

    def finished_before(self, identity, splits):
        """Take the folder for this run; True if the run is finished already. Raises UserError as `start` does."""
        self.folder.mkdir(parents=True, exist_ok=True)
        busy = f"{self.folder}: another process is training this run.\nWait for it, or give another --out-dir."
        self.lock = None if self.result_file.exists() else data.files.lock(self.folder / ".lock", busy)  # finished: read only
        identity["checksums"] = [checksum(split) if split.kind == "official" else None for split in splits]
        identity["weights"] = common.weights_checksums(self.args.backbone, getattr(self.args, "text_encoder", None))
        if self.begun():
            if not self.args.resume:
                state = (
                    "a finished run: see result.json" if self.result_file.exists() else "a run already: continue with --resume"
                )
                raise UserError(f"{self.folder} holds {state}.\nOtherwise choose another --out-dir, or remove the folder.")
            before = {k: identity[k] for k in ("checksums", "weights")}  # runs of earlier versions have none, or []
            before |= dict(x for x in json.loads((self.folder / "args.json").read_text()).items() if x != ("weights", []))
            free = ("resume", "out_dir", "data_dir", "track")  # options that do not change the result
            other = [
                f"{k} was {before.get(k)!r}, now {v!r}"
                for k, v in identity.items()
                if k not in free and before.get(k) != json.loads(json.dumps(v))
            ]
            if other:
                same = "data" if other[0].startswith("checksums") else "options"
                raise UserError(
                    f"{self.folder} holds another run: {'; '.join(other[:4])}.\nRepeat its {same}, or choose another --out-dir."
                )
        if self.result_file.exists():
            print(f"{self.result_file.read_text()}\nfinished before: {self.result_file}")
            return True
        for part in self.folder.glob("*.part"):  # of a killed process
            part.unlink()
        write(self.folder / "args.json", json.dumps(identity, indent=1).encode())
        if self.tracker:
            self.tracker.begin(self.folder, identity)
        return False

    def begun(self):
        """Does the folder hold a run, finished or not? Raises UserError if one of its files is missing, empty or cut short.

        A finished run may lack its checkpoints, which are large. A missing metrics.jsonl is no loss: --resume writes it again.
        """
        history = self.folder / "metrics.jsonl"
        files = [self.folder / "args.json", self.result_file, self.last, self.best_file, self.stage1_file, history]
        here = {file for file in files if file.exists()}
        if here <= {self.folder / "args.json", self.best_file}:  # stopped in its first epoch, or never started
            return False
        needed = {self.folder / "args.json"}
        if self.result_file not in here:
            rows = [] if history not in here or damage(history) else map(json.loads, history.read_text().splitlines())
            needed |= {self.stage1_file if "stage" in row else self.last for row in rows}
            needed |= {self.best_file} if self.last in needed | here else set()
        for file in files:
            if file in needed | here and (wrong := damage(file)):
                way = "Restore it, or remove the folder to start over."
                if file in (self.result_file, history):
                    way = "Remove it, and result.json if it is there, and repeat with --resume: they are written again."
                raise UserError(f"{file} {wrong}.\n{way}")
        return True

    @contextlib.contextmanager
    def first_process_first(self):
        """The first process fills the caches, then the others read them."""
        if self.rank > 0:
            torch.distributed.barrier()
        yield
        if self.rank == 0 and self.world > 1:
            torch.distributed.barrier()

    def autocast(self):
        return autocast(self.device, self.precision)

    def eager(self):
        """Turns --compile off, where batches of many sizes would be compiled again and again."""
        return torch.compiler.set_stance("force_eager") if self.args.compile else contextlib.nullcontext()

    def distribute(self, module):
        """Move `module` to the device; with several processes, wrap it so that gradients are averaged over them.

        Parameters may go unused (PaRe's gate once k is 0), which DistributedDataParallel has to be told. Buffers are constants
        (window indices): they need not be sent before every step. (torch 2.14 warns that broadcast_buffers will be replaced by
        forward_sync_buffers, which sends them once: sparse ones, as LSG's graph, cannot be sent.)
        """
        trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
        print(f"model   {trained / 1e6:.2f}M of {sum(p.numel() for p in module.parameters()) / 1e6:.2f}M parameters train")
        module = module.to(self.device)
        if self.world == 1:
            return module
        return nn.parallel.DistributedDataParallel(module, broadcast_buffers=False, find_unused_parameters=True)

    def keep_stage1(self, rows, **modules):
        """Save weights and metrics of a finished first stage, print how the latter changed. Raises UserError if it diverged."""
        weights = {f"{name}.{k}": v.contiguous() for name, m in modules.items() for k, v in m.state_dict().items()}
        if not all(weight.isfinite().all() for weight in weights.values()):
            raise UserError("the last step of stage 1 diverged.\nStart again with a lower learning rate of stage 1.")
        self.stage1, first, last = rows, rows[0], rows[-1]
        changes = (f"{name} {first[name]:.3g} -> {last[name]:.3g}" for name in first if name not in ("epoch", "seconds"))
        print(f"stage 1 {'; '.join(changes)}; {sum(row['seconds'] for row in rows):.0f} s")
        if self.rank == 0:
            write(self.stage1_file, to_safetensors(weights, {"rows": json.dumps(rows)}))
            self.write_history()

    def restore_stage1(self, **modules):
        """Load what `keep_stage1` saved; False if there is nothing yet."""
        if self.stage1_file not in self.saved:
            return False
        try:
            with safe_open(self.stage1_file, "pt") as file:
                self.stage1 = json.loads(file.metadata()["rows"])
            weights = load_file(self.stage1_file)
            for name, module in modules.items():
                module.load_state_dict({k.removeprefix(f"{name}."): v for k, v in weights.items() if k.startswith(f"{name}.")})
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"{self.stage1_file} is not a first stage of this run ({reason(error)}).\nRemove the folder to start over."
            ) from error
        print(f"resumed after stage 1, with its {len(self.stage1)} rows of metrics")
        return True

    def no_sync_unless(self, step_follows, module):
        """Exchange gradients between processes only on the micro-batch that an optimizer step follows."""
        return contextlib.nullcontext() if self.world == 1 or step_follows else module.no_sync()

    @torch.no_grad()
    def evaluate(self, model, split, task):
        """The task's metric of `model` on a whole split, each process its share, computed once on all samples.

        NaN if a prediction is not finite: the largest of NaN scores would still be some class. Predictions and targets are kept
        as `answers`, in the order of the split, until the next call.
        """
        model.eval()
        out, y = [], []
        chunk = min(split.chunk, max(1, 4 * self.args.batch_size // self.world))  # no more memory than a training step needs
        every = torch.arange(len(split), device=self.device)
        own = every[self.rank :: self.world]
        parts = (own if len(own) else every[:1]).split(chunk)  # more processes than samples: a prediction that is not used
        for x, targets in split.in_order(parts):
            with self.autocast(), self.eager():
                out.append(model(x).float().cpu())
            y.append(targets.cpu())
        out, y = (torch.cat(parts)[: len(own)].numpy() for parts in (out, y))
        if self.world > 1:
            shares = [None] * self.world
            torch.distributed.all_gather_object(shares, (out, y))
            order = np.concatenate([np.arange(len(split))[rank :: self.world] for rank in range(self.world)]).argsort()
            out, y = (np.concatenate(parts)[order] for parts in zip(*shares, strict=True))  # as in the split
        self.answers = out, y
        return float(task.score(out, y)) if np.isfinite(out).all() else math.nan

    def resume(self, net, optimizer, schedule):
        """Load the last finished epoch if there is one. Returns the number of the next epoch, from 0."""
        if self.last not in self.saved:
            return 0
        try:
            state = torch.load(io.BytesIO(self.last.read_bytes()), map_location=self.device, weights_only=True)
            if state["run"] != self.folder.name:
                raise ValueError(f"it belongs to {state['run']}")
            getattr(net, "module", net).load_state_dict(state["net"])
            optimizer.load_state_dict(state["optimizer"])
            schedule.load_state_dict(state["schedule"])
            self.history, self.best, self.best_epoch, self.seconds = (
                state[k] for k in ("history", "best", "best_epoch", "seconds")
            )
            with safe_open(self.best_file, "pt") as best:
                about = {name: json.loads(value) for name, value in (best.metadata() or {}).items()}
                if about.get("run", self.folder.name) != self.folder.name:
                    raise ValueError(f"{self.best_file.name} belongs to {about['run']}")
                if about.get("epoch", 0) > len(self.history):
                    self.best = math.inf  # killed before last.pt was written: the repeated epoch was the best
        except (RuntimeError, KeyError, TypeError, ValueError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
            advice = "Remove the folder to start over."
            raise UserError(f"{self.last} is not a checkpoint of this run ({reason(error)}).\n{advice}") from error
        if self.rank == 0:
            self.write_history()  # a run killed right after its checkpoint lacks a line
        print(f"resumed after epoch {len(self.history)}")
        return len(self.history)

    def end_epoch(self, net, model, optimizer, schedule, row):
        """Print this epoch's metrics; save metrics.jsonl, the checkpoint for --resume and, if `val` is lower, the best model.

        Raises UserError, and saves nothing, if `val` is not finite.
        """
        epoch = len(self.history)
        if not math.isfinite(row["val"]):
            raise UserError(
                f"the error on validation is {row['val']} after epoch {epoch + 1}.\n"
                "Start again in another --out-dir with a lower --lr or --clip 1: a resumed run would fail again."
            )
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
            self.write_best(model.state_dict(), epoch=epoch + 1)
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

    def write_best(self, weights, **about):
        """best.safetensors: the weights of a model, and facts about it as JSON."""
        plain = lambda value: value.tolist()  # numbers and arrays of numpy, in a task of one's own
        about = {name: json.dumps(value, default=plain) for name, value in {"run": self.folder.name, **about}.items()}
        weights = {name: value.contiguous() for name, value in weights.items()}
        write(self.best_file, to_safetensors(weights, about))

    def write_history(self):
        rows = [{"stage": 1, **row} for row in self.stage1] + self.history
        write(self.folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
        if self.tracker:
            self.tracker.log(rows)

    def finish(self, model, loaded, source=None):
        """Test the last and the best checkpoint; write result.json, curves.png and predictions.png. Returns the result.

        Raises UserError, and writes nothing, when a test error is not finite.
        """
        args, task = self.args, loaded.task
        test = test_last = self.evaluate(model, loaded.test, task)
        if self.best_epoch < len(self.history):
            if self.world > 1:
                torch.distributed.barrier()  # the best checkpoint is on disk
            model.load_state_dict(from_safetensors(self.best_file.read_bytes()))
            test = self.evaluate(model, loaded.test, task)
        if not (math.isfinite(test) and math.isfinite(test_last)):
            raise UserError(
                f"the error on test is {test} (epoch {self.best_epoch}) and {test_last} (last epoch), validation {self.best}.\n"
                "Check the test samples, or start again in another --out-dir with a lower --lr or --clip 1."
            )
        batches = loaded.train.batches_in_epoch(args)
        steps = len(self.history) * math.ceil(batches / args.accumulate)  # the last window of an epoch may be short
        result = {
            "task": args.task, "method": self.method, "scale": args.scale, "backbone": args.backbone, "source": source,
            "data": self.origin, "seed": args.seed, "metric": task.metric, "direction": "min",
            "test": test, "test_last": test_last,
            "val": self.best, "best_epoch": self.best_epoch, "epochs": args.epochs, "steps": steps,
            "n_train": len(loaded.train),
            "seconds": round(self.seconds + sum(row["seconds"] for row in self.stage1), 1),
            "samples_per_second": round(len(self.history) * batches * args.batch_size / self.seconds, 1),
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
            "precision": self.precision, "torch": torch.__version__, "commit": self.commit,
        }  # fmt: skip
        if self.rank == 0:
            title = f"{self.folder.name}  ({self.origin} data)"
            write(self.folder / "curves.png", plots.curves(title, self.stage1, self.history, result))
            if task.target != "labels":
                x = self.first_inputs(loaded.test).cpu().numpy()
                shown = replace(task, names=task.toy_names if loaded.train.kind == "toy" else task.names)
                write(self.folder / "predictions.png", plots.predictions(title, shown, x, *self.answers))
            about = {"architecture": model.encoder.architecture, "facts": data.remember(loaded)}  # for `load`
            self.write_best(from_safetensors(self.best_file.read_bytes()), **about)  # Windows cannot replace a mapped file
            write(self.result_file, json.dumps(result, indent=1, allow_nan=False).encode())
            (self.folder / ".lock").unlink(missing_ok=True)
            if self.tracker:
                self.tracker.end(result)
        print(f"test {task.metric} {test:.4f} (epoch {self.best_epoch}, chosen on validation), {test_last:.4f} (last epoch)")
        print(self.result_file)
        if self.world > 1:
            torch.distributed.destroy_process_group()
        return result

    def first_inputs(self, split):
        """The first samples of a split, for a picture: (n, C, H, W) or (n, C, L)."""
        return split.inputs(torch.arange(min(plots.SHOWN, len(split)), device=self.device))

    @torch.no_grad()
    def draw_patches(self, split, score, ks):
        """Write patches.png: the patches replaced in each epoch of ks (epoch -> k), chosen by score(x) (n, N)."""
        if self.rank == 0 and max(ks.values()) > 0:
            x = self.first_inputs(split)
            title = f"{self.folder.name}: patches replaced by the source's"
            write(self.folder / "patches.png", plots.replaced(title, x.cpu().numpy(), score(x).cpu().numpy(), ks))

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
        encoder.compile(dynamic=False)  # batches have one size: PaRe's 2 B, and B once k is 0

    def progress(self, items, total=None, label="stage 1"):
        """A progress bar, on the first process, if stderr is a terminal."""
        return tqdm(items, label, total, leave=False, disable=None if self.rank == 0 else True)


def load(folder):
    """The model and the task of a finished run, from its folder alone: its data and its backbone are not needed any more.

    Returns: the common.Model of the epoch that was best on validation, in evaluation mode, on the GPU if there is one; the
        data.Task as it was in training.
    Raises: UserError if the folder holds no finished run, a damaged one, one of an earlier version, or one of an unknown task.
    """
    folder = Path(folder)
    arguments, best, result = (folder / name for name in ("args.json", "best.safetensors", "result.json"))
    if not result.exists():
        raise UserError(f"{folder} holds no finished run: there is no {result}.\nGive a run's folder; --resume finishes a run.")
    for file in (arguments, best, result):
        if wrong := damage(file):
            raise UserError(f"{file} {wrong}.\nRestore it, or repeat the run in another --out-dir.")
    with safe_open(best, "pt") as file:
        about = {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
    if not {"architecture", "facts"} <= about.keys():
        raise UserError(
            f"{best} does not say what its model needs: an earlier version wrote it.\n"
            f"With last.pt: remove {result} and repeat the command with --resume; it is not trained again. Without: repeat it."
        )
    args = json.loads(arguments.read_text())
    task = data.recall(args["task"], about["facts"])
    source = common.load_source(args["backbone"], architecture=about["architecture"])
    embedder = common.make_embedder(task.shape, source, "random", task.tokens)
    predictor = common.make_predictor(task.output, task.target, source, embedder, pooling=args["as_released"])
    model = common.Model(embedder, source.encoder, predictor)
    model.load_state_dict(load_file(best))
    return model.to(choose_device()[0]).eval(), task
