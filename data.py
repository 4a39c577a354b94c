"""Task definitions and data loading: TASKS, PROXIES (the sources), load, load_proxy.

    python data.py                       the table of tasks, and what is present in --data-dir
    python data.py --prepare spherical   download what the task and its source need (checksum; resumes an interrupted download)

tasks/ contains the readers, the augmentation, the losses and the metrics. A run reads --data-dir and writes only under
--out-dir. result.json ("data") says where the data come from: "official" the benchmark's own files; "simulated"
made here by the benchmark's procedure (PDEs: solved by tasks/pde.py; spherical: real CIFAR-100 images, projected here);
"sklearn" scikit-learn's copy of an OpenML table; "toy" a generated stand-in of the same shape, at the tiny scale only.

Shapes: n samples, B batch, C channels, H W L sizes, K classes. torch is imported where it is used, so that this file's command
answers at once.
"""

import dataclasses
import difflib
import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from cli import Missing, UserError, command_line, guarded, stream
from tasks import fields, files, images, published, scores, signals, tables, text, toys
from tasks.files import DOWNLOADS, NINAPRO, Lazy, check, fetch, kept, locate, numbers, present, read_npy, replacing
from tasks.published import RECIPES, TINY_RECIPES, TINY_STEPS, TOY_STEPS, Recipe
from tasks.signals import read_wav
from tasks.tables import read_openml

# Includes what the reader of a task of your own needs (docs/your-own.md)
__all__ = ["PROXIES", "TASKS", "Missing", "Task", "UserError", "check", "class_names", "find_task", "kept", "load",
           "load_proxy", "locate", "numbers", "read_npy", "read_openml", "read_wav", "replacing"]  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------------
# The table of tasks
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """Everything that is specific to a task. No method file branches on the name of a task."""

    name: str
    about: str
    shape: tuple[int, ...]  # of a sample: (C, H, W) or (C, L)
    target: Literal["class", "labels", "field"]  # y: a class (n,), labels 0 or 1 (n, K), or real numbers (n, *output)
    output: tuple[int, ...]  # of a prediction: (K,), (H, W) or (C, L)
    read: Callable  # (data_dir, cache) -> (x, y) train, (x, y) test, origin of the data; perhaps a dict of fields to replace
    toy: Callable | None  # (n, seed) -> x, y; None if the task can be simulated, or nothing can replace missing files
    downloads: tuple[tuple[str, ...], ...]  # keys of DOWNLOADS: all tuples are needed, of each the first key that is available
    recipes: dict[str, Recipe] = dataclasses.field(repr=False)  # method -> published settings, full scale
    loss: Callable = scores.cross_entropy  # (out, y) of a batch -> scalar
    score: Callable = scores.zero_one  # (out, y) of all samples, numpy -> error, lower is better
    metric: str = "error"
    stored: tuple[int, ...] | None = None  # of a sample as `read` returns it, where `augment` changes the shape
    mean: tuple[float, ...] | None = None  # per channel, after images (uint8) are scaled to [0, 1]
    std: tuple[float, ...] = ()
    augment: Callable | None = None  # (x, u or None) -> x: training batches come with draws u
    draws: int = 5  # number of draws u of a sample
    tokens: int = 512  # 1D: the most tokens that a sequence is cut into
    simulate: Callable | None = None  # (cache, scale, n_train, as_released, device) -> as read; where the files are missing
    read_released: Callable | None = None  # instead of `read` where the official code reads other targets
    kind: str = ""  # of the tiny recipes; default: by modality and target
    # what the classes are called, in the order of their numbers: names, or (data_dir) -> names; or why there are none
    names: tuple[str, ...] | Callable | str = ""
    toy_names: tuple[str, ...] = ()  # what the classes of `toy` are
    sample: str = "an example"  # what a sample is: "a photo" of a class
    statistics: dict = dataclasses.field(default_factory=dict, repr=False, compare=False)  # of the training set: name -> array
    of_statistics: Callable | None = None  # statistics -> fields that depend on them; `read` returns them, too
    prepare: Callable | None = None  # (where, x of new samples, checked here) -> x as `read` returns it, by the statistics
    restore: Callable | None = None  # predicted fields -> in the units of the files; masks -> probabilities
    normalised: bool = False  # y is normalised as predictions are: `restore` applies to both
    pixels: bool = False  # x are images in uint8

    def __post_init__(self):
        files.check_record(self)
        kinds = {"2d": ("images", "2D fields"), "1d": ("series", "1D fields")}[self.modality]
        object.__setattr__(self, "kind", self.kind or kinds[self.target == "field"])
        if self.target != "class" and (self.loss is scores.cross_entropy or self.score is scores.zero_one):
            raise UserError(f"task {self.name}: {self.target} targets need a loss, a score and a metric of their own.")

    @property
    def modality(self):
        return "1d" if len(self.shape) == 2 else "2d"


@dataclass(frozen=True)
class Proxy:
    """A labelled data set of the modality the backbone was pretrained on: the source."""

    name: str
    shape: tuple[int, ...]  # of an image, or (words,)
    target: Literal["class", "field"]
    output: tuple[int, ...]
    read: Callable  # (data_dir, n, seed) -> x, y; of text: (data_dir, n, seed, tokenizer) -> x, y, number of labels
    toy: Callable  # (n, seed) -> the same
    download: str
    loss: Callable = scores.cross_entropy
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] = ()
    augment: Callable | None = None
    draws: int = 5

    @property
    def modality(self):
        return "1d" if len(self.shape) == 1 else "2d"


def pdebench(name, about, shape, output, loss=scores.nrmse, tokens=512, y_test=None, normalise=False, **read):
    """A task of PDEBench: from the first snapshot to a later one. PDEBench's own scores are for prediction step by step."""
    finish = functools.partial(fields.pde_fields, normalise=normalise)
    read = functools.partial(fields.read_pde, **read, normalise=normalise)
    return Task(
        name, about, shape, "field", output, read, None, ((name,),), RECIPES[name],
        loss=loss, score=scores.score_of(scores.nrmse), metric="nRMSE", tokens=tokens,
        simulate=functools.partial(fields.simulate, name, finish, tokens=tokens),
        of_statistics=fields.of_normalised_training, normalised=normalise,
        read_released=functools.partial(read, y_test=y_test) if y_test else None,
    )  # fmt: skip


TASKS = {task.name: task for task in (
    Task(
        "cifar100", "natural images, the control", (3, 32, 32), "class", (100,), images.read_cifar100,
        functools.partial(toys.images, size=32), (("cifar100",),), RECIPES["cifar100"],
        mean=(0.5071, 0.4867, 0.4408), std=(0.2675, 0.2565, 0.2761), augment=images.crop_and_flip,
        names=images.cifar100_names, toy_names=toys.IMAGE_NAMES, sample="a photo",
    ),
    Task(
        "spherical", "CIFAR-100 projected onto a rotated sphere", (3, 60, 60), "class", (100,), images.read_spherical,
        functools.partial(toys.spherical, size=60), (("s2_cifar100", "cifar100"),), RECIPES["spherical"],
        names=images.cifar100_names, toy_names=toys.IMAGE_NAMES, sample="a photo",
    ),
    Task(
        "darcy", "flow through a porous medium", (3, 85, 85), "field", (85, 85), fields.read_darcy,
        None, (("darcy_train",), ("darcy_test",)), RECIPES["darcy"],
        loss=scores.relative_l2, score=scores.score_of(scores.relative_l2), metric="rel. L2",
        simulate=functools.partial(fields.simulate, "darcy", fields.darcy_fields), of_statistics=fields.of_darcy_training,
    ),
    Task(
        "psicov", "distances in a protein, from its sequence", (57, fields.SIDE, fields.SIDE), "field",
        (fields.SIDE, fields.SIDE), fields.read_psicov, toys.proteins, (("protein",),), RECIPES["psicov"],
        loss=scores.squared, score=scores.protein_mae, metric="MAE8",
    ),
    Task(
        "cosmic", "cosmic rays in Hubble images", (1, 128, 128), "field", (128, 128), fields.read_cosmic,
        toys.hits, (("cosmic_train",), ("cosmic_test",)), RECIPES["cosmic"],
        loss=scores.mask_loss, score=scores.balanced_error, metric="1-bal.acc", augment=fields.add_sky,
        stored=(1, 129, 128), restore=scores.sigmoid,
    ),
    Task(
        "ninapro", "hand movements from muscle signals", (1, 16, 52), "class", (18,), signals.read_ninapro,
        functools.partial(toys.signals, shape=(1, 16, 52), classes=6), tuple((key,) for key in NINAPRO), RECIPES["ninapro"],
        names="the movements are known, but not in which order NAS-Bench-360 numbers them",
    ),
    Task(
        "fsd50k", "sound events, from a log-mel image", (1, 96, 102), "labels", (200,), signals.read_fsd50k,
        toys.sounds, (("audio",),), RECIPES["fsd50k"],
        loss=functools.partial(scores.presence, positive=10.0), score=scores.clip_map_error, metric="1-mAP",
        augment=signals.log_mel_image, draws=25, stored=(2, signals.RATE),
        names=signals.fsd50k_names, toy_names=toys.wave_names(6, 200.0), sample="a recording",
    ),
    Task(
        "ecg", "heart rhythm from an electrocardiogram", (1, 1000), "class", (4,), signals.read_ecg,
        functools.partial(toys.signals, shape=(1, 1000), classes=4), (("ecg",),), RECIPES["ecg"],
        score=scores.macro_f1_error, metric="1-F1", tokens=64,
        names=signals.ECG_NAMES, toy_names=toys.wave_names(4), sample="an electrocardiogram",
    ),
    Task(
        "satellite", "land cover from 46 dates of a pixel", (1, 46), "class", (24,), signals.read_satellite,
        functools.partial(toys.signals, shape=(1, 46), classes=6), (("satellite_train",), ("satellite_test",)),
        RECIPES["satellite"], names="its files number the 24 land covers, and no list says which is which",
    ),
    Task(
        "deepsea", "chromatin features from DNA", (4, 1000), "labels", (36,), signals.read_deepsea,
        toys.dna, (("deepsea",),), RECIPES["deepsea"],
        loss=functools.partial(scores.presence, positive=4.0), score=scores.label_auroc_error, metric="1-AUROC",
        names="which 36 of the 919 chromatin features its file keeps is not recorded",
    ),
    pdebench(
        "advection1d", "a wave travels", (1, 256), (1, 256),
        file="1D_Advection_Sols_beta0.4.hdf5", x=[("tensor", 0)], y=[("tensor", 200)], every=4,
    ),
    pdebench(
        "burgers1d", "a viscous wave steepens and fades", (1, 1024), (1, 1024), scores.rmse,
        file="1D_Burgers_Sols_Nu1.0.hdf5", x=[("tensor", 0)], y=[("tensor", 200)],  # 512 tokens: the official 128 fits L = 256
    ),
    pdebench(
        "diffusion_reaction1d", "a concentration spreads and grows", (1, 1024), (1, 1024), tokens=256,
        file="ReacDiff_Nu0.5_Rho1.0.hdf5", x=[("tensor", 0)], y=[("tensor", 29)], y_test=[("tensor", 99)],
    ),
    pdebench(
        "diffusion_sorption1d", "a substance seeps into the ground", (1, 1024), (1, 1024), tokens=32,
        file="1D_diff-sorp_NA_NA.h5", x=[("data", 0, 0)], y=[("data", 100, 0)], y_test=[("data", 99, 0)],
    ),
    pdebench(
        "navier_stokes1d", "a compressible gas: density, pressure, velocity", (1, 3072), (1, 3072), scores.rmse, tokens=128,
        file="1D_CFD_Rand_Eta0.1_Zeta0.1_periodic_Train.hdf5", x=[("density", 0), ("pressure", 0), ("Vx", 0)],
        y=[("density", 100), ("pressure", 100), ("Vx", 100)], normalise=True,
    ),
    pdebench(
        "darcy2d", "flow through a porous medium, PDEBench's", (1, 64, 64), (64, 64),
        file="2D_DarcyFlow_beta0.1_Train.hdf5", x=[("nu", None)], y=[("tensor", 0)], every=2,
    ),
    pdebench(
        "shallow_water2d", "a round dam breaks", (1, 128, 128), (128, 128),
        file="2D_rdb_NA_NA.h5", x=[("data", 0, 0)], y=[("data", 100, 0)], y_test=[("data", 99, 0)],
    ),
    pdebench(
        "diffusion_reaction2d", "patterns form: the inhibitor from the activator", (1, 128, 128), (128, 128),
        file="2D_diff-react_NA_NA.h5", x=[("data", 0, 0)], y=[("data", 100, 1)], y_test=[("data", 99, 1)],
    ),
)}  # fmt: skip


def openml_task(number):
    """The OpenML table with this number; its shape and classes come with its files."""
    recipes, tokens = published.openml(number)
    return Task(
        f"openml{number}", "a table", (1, 12), "class", (3,), functools.partial(read_openml, number=number),
        toys.table, (), recipes, score=scores.auroc_error, metric="1-AUROC", tokens=tokens, kind="tables",
        names="the categories of its target are numbers, codes or shorter than three letters, not words",
        of_statistics=tables.of_training_rows,
    )  # fmt: skip


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PROXIES = {proxy.name: proxy for proxy in (
    Proxy(
        "cifar10", (3, 32, 32), "class", (10,), images.read_cifar10, functools.partial(toys.images, size=32), "cifar10",
        mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010), augment=images.crop_and_flip,
    ),
    Proxy(
        "tiny_imagenet", (3, 64, 64), "class", (200,), images.read_tiny_imagenet, functools.partial(toys.images, size=64),
        "tiny_imagenet", mean=IMAGENET_MEAN, std=IMAGENET_STD, augment=images.resized_crop_and_flip,
    ),
    Proxy(
        "voc", (3, 224, 224), "field", (128, 128), images.read_voc, toys.masks, "voc",
        loss=scores.mask_loss, mean=IMAGENET_MEAN, std=IMAGENET_STD,
    ),
    Proxy("conll2003", (text.WORDS,), "class", (5,), text.read_conll2003, toys.text, "conll2003"),
    Proxy("conll2000", (text.WORDS,), "class", (8,), text.read_conll2000, toys.text, "conll2000"),
)}  # fmt: skip

TOY_TRAIN, TOY_TEST = 3000, 500
SOURCE_SAMPLES = 5000  # as in the official code
TINY_BATCH_NUMBERS = 2**26  # numbers in a batch of the tiny scale: 256 MB. Only psicov has more in 32 samples


def find_task(name):
    """The Task called `name`. Raises UserError with the nearest names."""
    if table := re.fullmatch(r"openml([1-9]\d*)", name):
        return openml_task(int(table[1]))
    if name not in TASKS:
        near = difflib.get_close_matches(name, [*TASKS, "openml<ID>"], 3, 0.5) or TASKS
        raise UserError(f"there is no task {name!r}; perhaps {' or '.join(near)}. `python data.py` lists all.\n"
                        "A task of your own is known to the file that defines it: docs/your-own.md.")  # fmt: skip
    return TASKS[name]


def complete(args, method, scale):
    """`args` with every option that was left at None filled in from the recipe of its task, method and scale.

    Raises UserError for a source of another modality than the task's.
    """
    task = find_task(args.task)
    recipe = task.recipes.get(method) or task.recipes["pare" if hasattr(args, "k_begin") else "orca"]  # of a method of your own
    source = getattr(args, "source", None) or recipe.source
    if PROXIES[source].modality != task.modality:
        fitting = " or ".join(proxy.name for proxy in PROXIES.values() if proxy.modality == task.modality)
        raise UserError(f"--source {source} has another modality than {task.name}.\nUse {fitting}.")
    if scale == "tiny":
        tiny = TINY_RECIPES[task.kind]
        share = 2 ** max(0, math.ceil(math.log2(tiny.batch_size * math.prod(task.shape) / TINY_BATCH_NUMBERS)))
        recipe = replace(tiny, source=recipe.source, k_begin=recipe.k_begin, k_end=recipe.k_end, mix_weight=recipe.mix_weight,
                         batch_size=max(1, tiny.batch_size // share), accumulate=share)  # fmt: skip
    if scale == "full" and args.optimizer not in (None, recipe.optimizer) and None in (args.lr, args.weight_decay):
        raise UserError(f"The published learning rate and weight decay of {task.name} are those of {recipe.optimizer}.\n"
                        f"With --optimizer {args.optimizer}, give --lr and --weight-decay, too.")  # fmt: skip
    squeeze = (args.epochs or recipe.epochs) / recipe.epochs  # a shorter run has the same learning rate curve, squeezed
    more = published.RELEASED if args.as_released else published.OURS
    recipe = replace(recipe, warmup_epochs=recipe.warmup_epochs * squeeze, decay_epochs=recipe.decay_epochs * squeeze, **more)
    missing = [f.name for f in dataclasses.fields(recipe) if getattr(args, f.name, "") is None]
    return replace(args, **{name: getattr(recipe, name) for name in missing})


def of_embedder(args, method):
    """`args` for a first stage that trains the embedder alone: --embedder-lr, or ORCA's official rule."""
    lr, weight_decay = of_one_batch(args, method)
    return replace(args, lr=args.embedder_lr or (lr if lr > 1e-3 else 10 * lr), weight_decay=weight_decay)


def of_one_batch(args, method):
    """Learning rate and weight decay of a first stage, which does not accumulate gradients: undoes the scaling of `published`.

    By the recipe's `accumulate`: half the --batch-size and twice the --accumulate do not change them.
    """
    recipes = find_task(args.task).recipes
    recipe = recipes.get(method, recipes["orca"])
    if args.scale != "full" or args.optimizer == "adamw" or args.optimizer != recipe.optimizer:  # nothing was scaled by it
        return args.lr, args.weight_decay
    return args.lr / (recipe.accumulate if args.optimizer == "sgd" else 1), args.weight_decay * recipe.accumulate


# ---------------------------------------------------------------------------------------------------------------------
# Data on the device
# ---------------------------------------------------------------------------------------------------------------------


class Split:
    """One split: x (n, ...) and y (n, ...), whole on the device, or Lazy; prepared there, in batches.

    x and y have passed `validate`. Images (uint8) are scaled to [0, 1], token ids (int64) are left as they are, everything else
    is fp32. `like` is its Task or Proxy: name, target, output, loss, mean, std and augmentation. `classes`: how many classes or
    labels there are, None for fields. `kind`: what kind of data it is, official, simulated, sklearn or toy.
    """

    def __init__(self, x, y, classes, kind, like, device):
        import torch

        self.device = torch.device(device)
        self.x, self.y = (
            part if isinstance(part, Lazy) else torch.from_numpy(np.require(part, requirements="CWO")).to(device)
            for part in (x, y)
        )  # copied if it is the map of a file
        self.classes, self.kind, self.augment, self.draws = classes, kind, like.augment, like.draws
        self.target, self.shape, self.loss = like.target, like.shape, like.loss
        self.output = like.output if classes is None else (classes,)
        self.name = like.name  # target and source draw different numbers
        constants = lambda values: torch.tensor(values, device=device).view(-1, *[1] * (len(like.shape) - 1))  # (C, 1, ...)
        self.mean, self.std = (None if like.mean is None else constants(values) for values in (like.mean, like.std))

    def __len__(self):
        return len(self.y)

    @property
    def lazy(self):
        return isinstance(self.x, Lazy) or isinstance(self.y, Lazy)

    def rows(self, part, index, u=None):
        if not isinstance(part, Lazy):
            return part[index]
        import torch

        array = part.read(index.cpu().numpy(), None if u is None else u.cpu().numpy())
        array = torch.from_numpy(np.ascontiguousarray(array))
        array = array.pin_memory() if self.device.type == "cuda" else array  # else the copy waits for the work before it
        return array.to(self.device, non_blocking=True)

    def _prepare(self, x, u):
        import torch

        if x.dtype == torch.int64:
            return x
        x = x.float() / 255 if x.dtype == torch.uint8 else x.float()
        if self.augment is not None:
            x = self.augment(x, u)
        return x if self.mean is None else (x - self.mean) / self.std

    def inputs(self, index, u=None):
        """Samples `index`, as the embedder takes them (B, C, H, W) or (B, C, L) fp32, or token ids (B, words).

        Augmented by the draws u (B, draws) if there are any.
        """
        return self._prepare(self.rows(self.x, index, u), u)

    def targets(self, index):
        """y of the samples `index`: (B,) classes, (B, K) labels, (B, *output) fields."""
        return self.rows(self.y, index)

    @property
    def chunk(self):
        """How many samples may be evaluated at once: 256, or fewer where they are large (64 MB of inputs)."""
        return min(256, max(1, 2**24 // math.prod(self.shape)))

    def batches_in_epoch(self, args):
        """Micro-batches in an epoch: `steps_per_epoch` optimizer steps of `accumulate` each.

        Default: one pass over the training samples (full scale); as many as the kind of task needs (tiny scale); for toys one
        pass, but at most TOY_STEPS.
        """
        if args.steps_per_epoch:
            return args.accumulate * args.steps_per_epoch
        one_pass = max(1, len(self) // args.batch_size)
        if args.scale == "full":
            return one_pass
        if self.kind == "toy":
            return min(one_pass, args.accumulate * TOY_STEPS)
        return args.accumulate * TINY_STEPS[find_task(self.name).kind]

    def plan(self, steps, batch_size, seed, epoch, stage=2):
        """The samples of every step of an epoch (steps, batch_size) and the draws that augment them (steps, batch_size, draws).

        Shuffled; all batches have one size. Samples that do not fill a batch are left out of this epoch. A set smaller than the
        epoch is shuffled again and continued.
        """
        import torch

        generator = torch.Generator().manual_seed(stream(f"batches of {self.name}", seed, epoch, stage))
        rounds = -(-steps * batch_size // len(self))
        order = torch.cat([torch.randperm(len(self), generator=generator) for _ in range(rounds)])[: steps * batch_size]
        return order.view(steps, batch_size), torch.rand(steps, batch_size, self.draws, generator=generator)

    def batches(self, steps, batch_size, seed, epoch, rank=0, world=1, stage=2):
        """The augmented batches x (B, C, H, W) or (B, C, L), y (B, ...) of this process, B = batch_size / world.

        All processes follow one plan, and each takes its own columns: G processes see the batches of one. Samples in files are
        read a batch ahead, in a thread.
        """
        order, u = (part[:, rank::world] for part in self.plan(steps, batch_size, seed, epoch, stage))
        there, draws = order.to(self.device), u.to(self.device)  # once: a copy in each step would make the host wait
        index = lambda part, step: order[step] if isinstance(part, Lazy) else there[step]  # files: on the host
        read = lambda step: (self.rows(self.x, index(self.x, step), u[step]), self.rows(self.y, index(self.y, step)))
        for step, (x, y) in enumerate(files.read_ahead(read, steps) if self.lazy else map(read, range(steps))):
            yield self._prepare(x, draws[step]), y

    def in_order(self, parts):
        """x, y of the samples of each index in `parts`, not augmented. Samples in files are read a part ahead."""
        parts = [part.cpu() for part in parts] if self.lazy else parts  # now, while the device is free
        read = lambda i: (self.rows(self.x, parts[i]), self.targets(parts[i]))
        for x, y in files.read_ahead(read, len(parts)) if self.lazy else map(read, range(len(parts))):
            yield self._prepare(x, None), y


def validate(where, x, y, like, classes, rows=None):
    """Check the samples `rows` (None: all) and return them as a Split expects them: files, tables, your own arrays, sources.

    There are as many inputs as targets, and at least one. Shapes are those that `like`, a Task or Proxy, declares. Inputs are
    finite; targets are classes in range, labels 0 or 1, or finite fields (where the loss is `scores.mask_loss`: 0, 1, or NaN
    for pixels that are ignored). Lazy samples are checked when they are read, before they go to the device.

    Returns: x and y, in the dtypes of `files.check`.
    Raises: UserError that begins with `where` and names the sample and what was expected.
    """
    if len(x) != len(y) or len(y) == 0:
        raise UserError(f"{where}: {len(x):,} inputs and {len(y):,} targets; expected equally many, and at least one.")
    x, y = (part if rows is None else part[rows] for part in (x, y))
    kind = ("class", 2**31) if len(like.shape) == 1 else ("input",)  # token ids are whole numbers, too
    x = check(f"{where}: x", x, getattr(like, "stored", None) or like.shape, *kind, rows=rows)
    shape, values = {"class": ((), "class"), "labels": ((classes,), "labels"), "field": (like.output, "number")}[like.target]
    if getattr(like.loss, "func", like.loss) is scores.mask_loss:
        values = "mask"
    if getattr(like, "score", None) is scores.clip_map_error and getattr(y, "shape", ())[1:] == (classes + 1,):
        shape = (classes + 1,)  # the last column is the number of the clip that a sample is cut from
    return x, check(f"{where}: y", y, shape, values, classes, rows=rows)


@dataclass
class Loaded:
    task: Task  # with the fields known after reading: a table's shape and classes, darcy's units
    train: Split
    val: Split
    test: Split


def load(task, data_dir, cache, scale, n_train=None, seed=0, device="cpu", as_released=False):
    """Training, validation and test split of a task, on the device.

    A tenth of the training samples that are used is held out for validation, drawn with `seed`; the official code chooses
    the checkpoint on the test set. `n_train` remain for training (None: the other nine tenths of all there are).
    `as_released`: data of PDE tasks with the mistakes of the official files and of ORCA's loader (docs/pde.md).

    Where files are missing, PDE tasks are simulated; at the tiny scale others use toy data, and a printed line says so.
    Raises: Missing if files are missing and neither is possible. UserError if the data do not match the task, see `validate`.
    """
    import torch

    task, data_dir, cache = find_task(task), Path(data_dir), Path(cache)
    try:
        read = (as_released and task.read_released) or task.read
        train, test, origin, *changes = files.check_parts(task.name, read(data_dir, cache))
    except Missing as missing:
        advice = f"`python data.py --prepare {task.name} --data-dir {data_dir}` downloads the files."
        advice = advice if task.downloads or task.name.startswith("openml") else "Put it there."  # a task of one's own
        if task.simulate:
            print(f"SIMULATED: {missing}\n           The equation is solved here instead.")
            train, test, origin, *changes = task.simulate(cache, scale, n_train, as_released, device)
        elif scale != "tiny" or task.toy is None:
            without = " To try without: --scale tiny." * (task.toy is not None)
            raise Missing(f"{task.name}: {missing}\n{advice}{without}") from None
        else:
            print(f"TOY DATA: {missing}\n          Using generated data instead of {task.name}; {advice}")
            most = max(24, 2**25 // math.prod(task.shape))  # 128 MB
            n = min(n_train or TOY_TRAIN, TOY_TRAIN, most)
            train = task.toy(n + n // 9 + 1, seed=0)
            test = task.toy(min(TOY_TEST, most), seed=1)
            origin, changes = "toy", []
    task = replace(task, **changes[0]) if changes else task
    train, test = ([numbers(f"{task.name}, {name}", part) for part in (x, y)]
                   for name, (x, y) in (("training set", train), ("test set", test)))  # fmt: skip
    toy_classes = [count_classes(task.target, y) for _, y in (train, test)] if origin == "toy" else []  # of what is drawn
    classes = None if task.target == "field" else max(toy_classes, default=task.output[0])
    order = np.random.default_rng(stream("validation split", seed)).permutation(len(train[0]))
    n_train = min(n_train or len(order), len(order) - max(1, len(order) // 10))
    n_val = min(max(1, n_train // 9), len(order) - n_train)
    if (groups := getattr(train[0], "groups", None)) is not None:  # a tenth of the groups, whole, comes first
        shuffled = np.random.default_rng(stream("validation groups", seed)).permutation(np.unique(groups))
        held = np.isin(groups[order], shuffled[: max(1, len(shuffled) // 10)])  # (n,) in the order drawn
        n_val, n_train = min(n_val, int(held.sum())), min(n_train, int((~held).sum()))
        order = np.concatenate([order[held][:n_val], order[~held]])
    rows = {"train": np.sort(order[n_val : n_val + n_train]), "val": np.sort(order[:n_val])}
    passed = {name: validate(f"{task.name}, training set", *train, task, classes, part) for name, part in rows.items()}
    passed["test"] = validate(f"{task.name}, test set", *test, task, classes)
    if n_train < 1:
        raise UserError(f"{task.name}: {len(order)} training samples; expected two or more: some are held out for validation.")
    loaded = Loaded(task, **{name: Split(*part, classes, origin, task, device) for name, part in passed.items()})
    if (found := tuple(loaded.train.inputs(torch.zeros(1, dtype=torch.int64, device=device)).shape[1:])) != tuple(task.shape):
        raise UserError(f"{task.name}: {data_dir} has samples of {by_x(found)}; expected {by_x(task.shape)}.")
    if len({x.dtype == np.uint8 for x, _ in (train, test) if not isinstance(x, Lazy)}) > 1:  # only uint8 is divided by 255
        raise UserError(f"{task.name}: training or test images are uint8, the others are not.\nGive both in the same type.")
    what = f"{classes} {'classes' if task.target == 'class' else 'labels'}" if classes else f"fields {by_x(task.output)}"
    print(f"target  {task.name}: {origin} data, {n_train:,} samples for training and {n_val:,} for validation of",
          f"{len(order):,}, {len(loaded.test):,} for test, {what}")  # fmt: skip
    return loaded


def remember(loaded):
    """What a model needs of its task as it was in training, for `recall`: JSON values."""
    task, x = loaded.task, loaded.train.x
    pixels = str((x.read(np.zeros(1, int)) if isinstance(x, Lazy) else x).dtype).endswith("uint8")
    same = {name: getattr(task, name) for name in ("shape", "stored", "mean", "std", "tokens")}
    statistics = {name: np.asarray(value).tolist() for name, value in task.statistics.items()}
    return same | {"output": loaded.train.output, "pixels": pixels, "statistics": statistics}


def recall(name, facts):
    """The Task called `name` as it was in training; its data are not read. Raises UserError for an unknown name."""
    statistics = {k: np.asarray(value) for k, value in facts["statistics"].items()}
    facts = {k: tuple(value) if isinstance(value, list) else value for k, value in facts.items()}
    task = replace(find_task(name), **facts | {"statistics": statistics})
    return replace(task, **task.of_statistics(statistics)) if statistics else task


def count_classes(target, y):
    """How many classes or labels there are in y; None for fields."""
    if target == "class":
        return int(y.max()) + 1
    return y.shape[1] if target == "labels" else None


def class_names(loaded, data_dir):
    """What the classes or labels of a `Loaded` are called, in the order of their numbers: K str.

    Toy data have names of their own. Raises UserError, with the reason, if there are no names; Missing if the file with the
    names is missing.
    """
    task, toy, K = loaded.task, loaded.train.kind == "toy", loaded.train.classes
    names = task.toy_names[:K] if toy else task.names(Path(data_dir)) if callable(task.names) else task.names
    if not isinstance(names, tuple) or not names:
        why = "its toy data have none" if toy else names or "its files have none"
        raise UserError(f"{task.name} has no class names: {why}.")
    if len(names) != K:
        raise UserError(f"{task.name}: {len(names)} class names for {K} classes.")
    return names


def load_proxy(name, data_dir, scale, n=SOURCE_SAMPLES, seed=0, device="cpu", tokenizer=None):
    """n labelled samples of the source modality, as a Split; toy data at the tiny scale if the files are missing.

    Text becomes the ids of its first 32 tokens, (n, 32) int64, by `tokenizer`, the backbone's: list[str] -> list[int], and
    `tokenizer.pad`, the id that fills a shorter piece.
    """
    proxy, data_dir = PROXIES[name], Path(data_dir)
    try:
        x, y, *count = proxy.read(data_dir, n, seed, *[tokenizer] * (proxy.modality == "1d"))
        origin, classes = "official", None if proxy.target == "field" else [*proxy.output, *count][-1]
    except Missing as missing:
        advice = f"`python data.py --prepare {name} --data-dir {data_dir}` downloads the files."
        if scale != "tiny":
            raise Missing(f"source {name}: {missing}\n{advice} To try without: --scale tiny.") from None
        print(f"TOY DATA: {missing}\n          Using generated data instead of {name}; {advice}")
        x, y, *count = proxy.toy(min(n, TOY_TEST), seed=2)
        origin, classes = "toy", count_classes(proxy.target, y)
    if proxy.modality == "1d":
        x = text.token_ids(x, tokenizer)  # (n, words)
    what = f"{classes} classes" if classes else f"fields {by_x(proxy.output)}"
    x, y = validate(f"source {name}", x, y, proxy, classes)
    print(f"source  {name}: {origin} data, {len(y):,} samples, {what}")
    return Split(x, y, classes, origin, proxy, device)


def class_labels(split, k=10, seed=0):
    """The class of every sample of a Split; where there are no classes, the cluster of its target by k-means.

    Fields and multi-label targets are flattened, as in the official code; unknown values (NaN) count as 0. More than 10,000
    samples, or targets read from files, go through mini-batch k-means, a chunk at a time.

    Returns: (n,) int64 on the split's device.
    """
    if split.target == "class":
        return split.y
    import torch
    from sklearn.cluster import KMeans, MiniBatchKMeans
    from threadpoolctl import threadpool_limits

    chunks = torch.arange(len(split), device=split.device).split(min(1000, max(1, 2**26 // math.prod(split.output))))  # 256 MB
    flat = lambda index: split.targets(index).flatten(1).nan_to_num().float().cpu().numpy()  # (1000 or fewer, everything)
    with threadpool_limits(1):  # one order of summation: all processes find the same clusters
        if len(split) <= 10_000 and not split.lazy:
            kmeans = KMeans(min(k, len(split)), n_init=3, random_state=seed).fit(np.concatenate(list(map(flat, chunks))))
        else:
            kmeans = MiniBatchKMeans(min(k, len(split)), random_state=seed)
            for index in chunks:
                kmeans.partial_fit(flat(index))
    return torch.from_numpy(np.concatenate([kmeans.predict(flat(index)) for index in chunks])).long().to(split.device)


def by_x(shape):
    return " x ".join(map(str, shape))


# ---------------------------------------------------------------------------------------------------------------------
# python data.py
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Args:
    prepare: str | None = None
    """download what this task and its sources (or this source) need"""
    data_dir: str = "datasets"
    """where the official files are, or are downloaded to"""


def prepare(name, data_dir):
    """Download the files of a task and of its sources, or of one source.

    Raises UserError if a download fails; for a task that can be simulated, prints that instead.
    """
    if name in PROXIES:
        wanted = [(PROXIES[name].download,)]
    else:
        task = find_task(name)
        sources = sorted({recipe.source for recipe in task.recipes.values()})
        wanted = [*task.downloads] + [(PROXIES[source].download,) for source in sources]
        if table := re.fullmatch(r"openml(\d+)", name):
            tables.prepare_table(int(table[1]), data_dir)
    failed = {}
    for keys in wanted:
        if here := [key for key in keys if present(DOWNLOADS[key], data_dir)]:
            print(f"{here[0]}: present")
            continue
        for key in keys:
            try:
                fetch(DOWNLOADS[key], data_dir)
                print(f"{key}: downloaded")
                break
            except UserError as error:
                if key == keys[-1]:
                    failed[key] = error
                else:
                    print(f"{key}: {error}\nTrying {keys[1]} instead, from which it can be made.")
    simulated = name in TASKS and TASKS[name].simulate
    if len(failed) == 1 and not simulated:
        raise failed.popitem()[1]
    for key, error in failed.items():
        print(f"{key}: {error}")
    if failed and simulated:
        own = {key for keys in TASKS[name].downloads for key in keys}
        if own & failed.keys():
            print(f"{name} will be simulated: its equation is solved here when a run needs it (docs/pde.md).")
        if failed := sorted(failed.keys() - own):
            print(f"Without {' and '.join(failed)}, methods that use a source run at the tiny scale only, with toy data.")
    elif failed:
        raise UserError(f"{', '.join(failed)} could not be downloaded; see above where each is available and where it goes.")


def print_tasks(data_dir):
    """The table of tasks: shapes, metric, source, what is present locally."""
    print(f"{'task':21}{'input':16}{'output':11}{'metric':10}{'source (PaRe)':14}{'in ' + str(data_dir):13}about")
    for task in TASKS.values():
        here = sum(any(present(DOWNLOADS[key], data_dir) for key in keys) for keys in task.downloads)
        rest = "solved here" if task.simulate else "in part" if here else "missing"
        state = "present" if here == len(task.downloads) else rest
        print(f"{task.name:21}{by_x(task.shape):16}{by_x(task.output):11}{task.metric:10}",
              f"{task.recipes['pare'].source:14}{state:13}{task.about}", sep="")  # fmt: skip
    example = openml_task(31)
    tables = len(list(Path(data_dir).glob("openml/openml.org/api/v1/json/data/[0-9]*.gz")))
    print(f"{'openml<ID>':21}{'as the table':16}{'classes':11}{example.metric:10}{example.recipes['pare'].source:14}",
          f"{f'{tables} tables':13}61, 187, 1510 and part of 28 are always here", sep="")  # fmt: skip
    print()
    for proxy in PROXIES.values():
        here = "present" if present(DOWNLOADS[proxy.download], data_dir) else "missing"
        what = f"{proxy.output[0]} classes" if proxy.target == "class" else f"masks {by_x(proxy.output)}"
        print(f"source {proxy.name}: {by_x(proxy.shape)}{' words' * (proxy.modality == '1d')}, {what}, {here}")
    print(f"\n`python data.py --prepare NAME --data-dir {data_dir}` downloads what is missing.")


def main(args):
    if args.prepare:
        prepare(args.prepare, args.data_dir)
    print_tasks(args.data_dir)


if __name__ == "__main__":
    guarded(main, command_line(Args, __doc__))
