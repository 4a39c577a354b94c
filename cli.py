"""The command line: the options that all methods share, the random streams of --seed, and how mistakes are reported.

Imports neither torch nor another module of this repository.
"""

import errno
import os
import sys
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

# options with bounds, checked by name in every script, also in a method of your own: those that must be positive, and those
# that may be 0, with their largest value
POSITIVE = ("epochs", "steps_per_epoch", "n_train", "batch_size", "accumulate", "lr", "decay_epochs", "temperature", "tau",
            "embedder_lr", "meta_lr", "inner_lr", "label_lr", "max_samples", "align_samples", "label_samples",
            "contrast_samples", "noise_steps", "rank", "alpha", "classes_per_problem", "source_samples", "gcn_steps",
            "jobs", "rounds", "steps", "save_every", "size", "window", "width", "layers", "heads", "length",
            "vocabulary")  # fmt: skip
LARGEST = {"k_begin": 1, "k_end": 1, "seed": 2**32 - 1, "gate_noise": 1e3, "clip": 1e9, "weight_decay": 1e6, "warmup_share": 1,
           "embedder_epochs": 1e6, "meta_epochs": 1e6, "align_epochs": 1e6, "label_epochs": 1e6, "contrast_epochs": 1e6,
           "reg": 1e9, "lambda_": 1e9, "sigmas": 1, "momentum": 1, "dropout": 1, "mix_weight": 1e6, "warmup_epochs": 1e6,
           "align_weight": 1e6, "regularise_weight": 1e6, "edge_ratio": 1, "seeds": 1e6, "workers": 1024, "mask": 1,
           "cutmix": 1, "crop": 1, "label_smoothing": 1}  # fmt: skip


NO_ACCESS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENOENT,
             errno.ELOOP, errno.ENAMETOOLONG, errno.EFBIG}  # fmt: skip


class UserError(Exception):
    """A mistake the user can fix: one or two lines that say what, where and what to do; exit code 2."""


class Missing(UserError):
    """Files that a task needs are missing."""


@dataclass(frozen=True)
class Args:
    """The options that all method files share; each adds its own. Options left at None are filled in from the task's recipe."""

    task: str = "spherical"
    """what to adapt to; `python data.py` lists the tasks"""
    scale: Literal["auto", "tiny", "full"] = "auto"
    """full: the paper's setting, for a GPU. tiny: a small backbone and few samples, for a laptop. auto: full on a GPU"""
    backbone: str | None = None
    """2D: tiny-swin, swin_base, a Swin or ViT of timm. 1D: tiny-roberta, roberta_base, a BERT-like Hub id. Or a path"""
    source: Literal["cifar10", "tiny_imagenet", "voc", "conll2003", "conll2000"] | None = None
    """labelled data of the pretraining modality, for the methods that use them. Default: the published choice"""
    data_dir: str = "datasets"
    """where the official files are read from; nothing is written there"""
    out_dir: str = "runs"
    """results go to <out-dir>/<task>-<method>-<backbone>-s<seed>/ (-toy with toy data), prepared data to <out-dir>/cache/"""
    seed: int = 0
    """random seed. Results of one seed are not reliable: report at least three"""
    init: Literal["copy", "random"] = "copy"
    """initial target embedder: copied from the pretrained one, or random. On cifar100 it matters more than any method"""
    as_released: bool = False
    """follow the official code where it differs from the paper"""
    resume: bool = False
    """continue after the last finished epoch; the result is that of an uninterrupted run. An unfinished stage 1 restarts"""
    track: Literal["tensorboard", "wandb"] | None = None
    """also log metrics.jsonl to TensorBoard or W&B, in the run's folder; needs pip install tensorboard, or pip install wandb"""
    compile: bool = False
    """torch.compile the encoder: faster from the second epoch on; needs a C++ compiler"""
    checkpoint: bool = False
    """activation checkpointing, for small GPUs: recompute activations in the backward pass. Not in first stages,
    and not with finetune.py --mode lora"""
    steps_per_epoch: int | None = None
    """optimizer steps in an epoch. Default: one pass over the samples (full), as many as the kind of task needs (tiny)"""
    epochs: int | None = None
    """epochs of training, each followed by validation. Default, as for those below: the task's recipe (full: published)"""
    n_train: int | None = None
    """training samples, besides those held out for validation. Default: at most 10,000 (tiny), nine tenths of all (full)"""
    batch_size: int | None = None
    """samples in a forward pass, over all processes. Out of memory: halve it and double --accumulate"""
    accumulate: int | None = None
    """gradient accumulation: forward passes averaged into one optimizer step"""
    optimizer: Literal["sgd", "adam", "adamw"] | None = None
    """optimizer; Adam and AdamW use betas (0.9, 0.98)"""
    momentum: float | None = None
    """momentum of SGD"""
    dropout: float | None = None
    """probability in every dropout layer of the encoder; 0 in most published settings"""
    lr: float | None = None
    """peak learning rate. Halve it if the loss jumps, double it if the loss hardly falls; tune every method alike"""
    weight_decay: float | None = None
    """weight decay, on all parameters"""
    clip: float | None = None
    """gradient clipping: largest norm of all gradients together; 0: off. Try 1 if the loss is not finite"""
    warmup_epochs: float | None = None
    """epochs of linear warm-up of the learning rate"""
    decay_epochs: float | None = None
    """epoch at which the linear decay of the learning rate reaches 0; may lie beyond the last epoch"""


def stream(name, *numbers):
    """The seed of a separate random stream: the name says what is drawn, the numbers (seed, epoch, process) when.

    The count is included because SeedSequence pads up to four words with zeros: [s], [s, 0] and [s, 0, 0] are one seed.
    """
    words = [word for number in numbers for word in (number % 2**32, number >> 32)]
    entropy = [zlib.crc32(name.encode()), len(numbers), *words]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)


def command_line(Args, doc, check_task=None):
    """Read the command line into the dataclass `Args`, whose field docstrings are the help; exit code 2 for a bad value.

    A leading ~ in a path becomes the home directory, which the shell does not do in --out-dir=~/runs.
    `check_task(name)` raises UserError for an unknown task.
    """
    import tyro

    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell: >&-
            setattr(sys, name, open(os.devnull, "w"))
    for output in (sys.stdout, sys.stderr):
        if hasattr(output, "reconfigure"):  # a notebook's streams are not files
            output.reconfigure(errors="replace")  # an ASCII terminal prints ± as ?

    def read():
        args = tyro.cli(Args, description=doc)
        if check_task and hasattr(args, "task"):
            check_task(args.task)
        for name in POSITIVE:
            if (value := getattr(args, name, None)) is not None and not 0 < value < float("inf"):
                raise UserError(f"--{option(name)} {value} must be positive" + " and finite" * (value > 0) + ".")
        for name, most in LARGEST.items():
            value = getattr(args, name, None)
            if value == ():
                raise UserError(f"--{option(name)} needs at least one number.")
            for number in value if isinstance(value, tuple) else (value or 0,):
                if not 0 <= number <= most:
                    raise UserError(f"--{option(name)} {number} must lie between 0 and {most:g}.")
        if empty := [name for name in ("data_dir", "out_dir") if getattr(args, name, None) == ""]:
            raise UserError(f"--{option(empty[0])} is empty.\nGive a folder; . is the current one.")
        home = {k: os.path.expanduser(v) for k, v in vars(args).items() if isinstance(v, str) and v.startswith("~")}
        return replace(args, **home)

    return guarded(read)


def option(name):
    """lambda_ -> lambda, batch_size -> batch-size"""
    return name.strip("_").replace("_", "-")


def reason(error):
    """The first line of an exception's message, cut to 90 characters."""
    message = f"no {error}" if isinstance(error, KeyError) else str(error)
    return (message or type(error).__name__).splitlines()[0][:90]


def closed(stream):
    """Whether the reader of this stream has closed it."""
    try:
        stream.write("\n")  # flushing an empty buffer raises no error
        stream.flush()
    except BrokenPipeError:
        return True
    return False


def guarded(main, *args):
    """Call `main`; report a UserError, an unreadable file, a full disk or a full GPU in one or two lines, exit code 2."""
    try:
        result = main(*args)
        sys.stdout.flush()
        return result
    except UserError as error:
        message = str(error)
    except KeyboardInterrupt:
        print(f"\n{Path(sys.argv[0]).name}: stopped. Repeat the command to go on (training: with --resume).", file=sys.stderr)
        raise SystemExit(130) from None
    except (MemoryError, RuntimeError) as error:
        on_gpu = type(error).__name__ == "OutOfMemoryError" or "CUDA error: out of memory" in str(error)  # torch's
        if not (on_gpu or isinstance(error, MemoryError) or "can't allocate memory" in str(error)):
            raise
        message = (f"out of {'GPU ' * on_gpu}memory.\n"
                   "Halve --batch-size and double --accumulate, or add --checkpoint; stage 1: fewer samples.")  # fmt: skip
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = f"no space left to write {error.filename or 'a file'}.\nFree some space and repeat; resume with --resume."
        elif error.filename and error.errno in NO_ACCESS:
            message = f"{error.filename}: {error.strerror}.\nCheck its permissions, or give another path."
        elif error.errno == errno.EPIPE and closed(sys.stdout):  # e.g. head has ended
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # discard the rest of the output
            raise SystemExit(141) from None
        elif isinstance(error, (PermissionError, FileNotFoundError)):  # of h5py and safetensors, which set no filename
            message = f"{reason(error)}.\nCheck the permissions of the file, or give another path."
        else:
            raise
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(2)
