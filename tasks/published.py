"""The recipes: all published hyperparameters, and those of the tiny scale."""

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters of a method on a task: defaults of the command line options."""

    epochs: int
    batch_size: int
    accumulate: int
    optimizer: Literal["sgd", "adam", "adamw"]
    lr: float
    weight_decay: float
    warmup_epochs: float
    decay_epochs: float  # epoch at which the linear decay of the learning rate reaches 0; often beyond the last epoch
    clip: float = 0.0
    momentum: float = 0.9  # SGD
    dropout: float = 0.0  # text encoders: hidden states and attention
    source: str = "cifar10"
    k_begin: float = 0.0  # PaRe: share of target tokens replaced in the first epoch, at most the number of source tokens
    k_end: float = 0.0  # PaRe as released: share at the end of the schedule
    mix_weight: float = 1.0  # PaRe: weight of the loss on mixed samples
    ratio: str = "k/k0"  # PaRe: lambda
    gate_noise: float = 0.0  # PaRe: scale of the noise on the scores of the gate
    embedder_epochs: int = 60  # ORCA: alignment steps
    max_samples: int = 128  # ORCA: samples per target class and alignment step
    classes_per_problem: int = 10  # ORCA: target classes per transport problem
    source_samples: int = 5000  # ORCA: source samples in the distance
    reg: float = 0.1  # ORCA: entropic regularisation of the distance
    meta_epochs: int = 5  # MoNA: epochs of stage 1
    align_epochs: int = 60  # RECRAFT: steps of feature alignment
    align_samples: int = 128  # RECRAFT: target samples in such a step
    label_epochs: int = 4  # RECRAFT: passes over the training samples
    label_samples: int = 28  # RECRAFT as released: of one class, in a step
    regularise_weight: float = 8.0  # LSG
    n_train: int | None = None


def published(optimizer, lr, weight_decay, batch_size, epochs, warmup=5, decay=None, accumulate=1, **more):
    """Convert an official configuration. The official code sums the gradients of accumulated batches; here they are averaged:

    sgd    lr (sum g + wd w) = (accumulate lr) (mean g + wd / accumulate w): the same step with these values
    adam   invariant to the scale of the gradient, but weight decay is added to the gradient: wd / accumulate
    adamw  invariant to the scale of the gradient, weight decay is decoupled: no change
           (except that eps = 1e-8 matters more where gradients are that small)
    clip   clipping the sum to clip is clipping the mean to clip / accumulate
    """
    lr = accumulate * lr if optimizer == "sgd" else lr
    weight_decay = weight_decay if optimizer == "adamw" else weight_decay / accumulate
    clip = more.pop("clip", 0.0) / accumulate
    return Recipe(epochs, batch_size, accumulate, optimizer, lr, weight_decay, warmup, decay or epochs, clip, **more)


def both(orca, **pare):
    """Recipes of ORCA, also used by MoNA, LSG and the baselines, and of PaRe and contrast: `pare` overrides ORCA's values."""
    return {"orca": orca, "pare": replace(orca, **pare), "contrast": replace(orca, **pare)}


# PaRe's configurations are released for NAS-Bench-360 only. Other tasks use ORCA's, with the mixing of tasks of the same kind.
IMAGE = dict(k_begin=2000 / 3136, k_end=500 / 3136)
DENSE = dict(source="voc", k_begin=1000 / 3136, k_end=500 / 3136, mix_weight=0.3)
SEQUENCE = dict(k_begin=1.0, mix_weight=0.1)  # all 32 source tokens, or all target tokens if there are fewer
TEXT = dict(source="conll2003")

OURS = dict(k_end=0.0, label_samples=128)  # both scales, unless --as-released, which keeps the recipe's values: P2, R5
RELEASED = dict(ratio="k/N", gate_noise=1.0, reg=0.1)  # both scales, with --as-released: P3, P6, O6

# published settings, full scale: task -> method -> recipe; OpenML tables below
RECIPES = {
    "cifar100": both(published("sgd", 1e-4, 1e-3, 32, 60, decay=200, accumulate=32), **IMAGE),
    "spherical": both(
        published("adamw", 1e-4, 0.1, 32, 60, accumulate=4), batch_size=16, accumulate=8, source="tiny_imagenet", **IMAGE
    ),
    "darcy": both(published("adamw", 1e-3, 5e-3, 4, 100), **DENSE),
    "psicov": both(published("adam", 5e-6, 1e-5, 1, 10, decay=100, accumulate=32, max_samples=64), **DENSE),
    "cosmic": both(published("adamw", 1e-3, 0, 4, 60), **DENSE | dict(k_begin=500 / 3136, k_end=0.0)),
    "ninapro": both(
        published("adam", 1e-4, 1e-5, 32, 60, clip=1.0, embedder_epochs=100),
        batch_size=16, accumulate=2, weight_decay=1e-5 / 2, clip=1.0 / 2, **IMAGE,
    ),
    "fsd50k": both(published("adam", 1e-4, 5e-5, 32, 100), lr=3e-5, **IMAGE),
    "ecg": both(
        published("sgd", 1e-6, 0.1, 4, 15, decay=200, accumulate=16, momentum=0.99, **TEXT),
        optimizer="adamw", lr=3e-5, weight_decay=0.1, batch_size=64, accumulate=1, **SEQUENCE,
    ),
    "satellite": both(
        published("adamw", 3e-5, 3e-6, 16, 60, accumulate=4, **TEXT), batch_size=64, accumulate=1, **SEQUENCE
    ),
    "deepsea": both(
        published("adam", 1e-5, 0, 16, 13, warmup=10, decay=25, clip=1.0, max_samples=64, **TEXT), epochs=25, **SEQUENCE
    ),
    "advection1d": both(published("adam", 1e-4, 1e-5, 4, 200, clip=1.0, **TEXT), **SEQUENCE),
    "burgers1d": both(published("adam", 1e-5, 1e-5, 4, 200, clip=1.0, **TEXT), **SEQUENCE),
    "diffusion_reaction1d": both(published("sgd", 1e-3, 1e-5, 4, 200, clip=1.0, momentum=0.99, **TEXT), **SEQUENCE),
    "diffusion_sorption1d": both(published("adamw", 1e-4, 0, 4, 200, clip=1.0, **TEXT), **SEQUENCE),
    "navier_stokes1d": both(published("adamw", 1e-4, 1e-3, 4, 200, clip=1.0, **TEXT), **SEQUENCE),
    "darcy2d": both(published("adamw", 1e-4, 1e-5, 4, 100, decay=200), **DENSE),
    "shallow_water2d": both(published("adamw", 1e-4, 0, 4, 200, warmup=10, clip=1.0), **DENSE),
    "diffusion_reaction2d": both(published("adam", 1e-4, 1e-3, 4, 200, clip=1.0), **DENSE),
}  # fmt: skip

# RECRAFT, released configurations: task -> samples of a class in a step of label matching, epochs; PDEBench: 28, 4
for task, samples, epochs in (
    ("cifar100", 16, 5), ("spherical", 16, 3), ("ninapro", 16, 4), ("fsd50k", 16, 6), ("darcy", 20, 5), ("cosmic", 28, 2),
    ("psicov", 16, 4), ("ecg", 28, 2), ("satellite", 32, 3), ("deepsea", 16, 2),
):  # fmt: skip
    RECIPES[task]["recraft"] = replace(RECIPES[task]["orca"], label_samples=samples, label_epochs=epochs)
for task, changes in (
    ("spherical", dict(batch_size=28)), ("ninapro", dict(batch_size=28)),
    ("psicov", dict(align_samples=64)), ("deepsea", dict(align_samples=64)),
):  # fmt: skip
    RECIPES[task]["recraft"] = replace(RECIPES[task]["recraft"], **changes)

# ORCA's configurations for OpenML tables: id, optimizer, learning rate, weight decay, momentum, batch size, epochs, warm-up,
# decay, dropout, clip, samples per class and alignment step, tokens
OPENML = """
   11 adamw 1e-06 1e-05 0.9    4 60  5  60 0    1.0 128  16
   12 adamw 1e-05 1e-05 0.9   64 60  5  60 0.05 1.0 128   8
   14 adam  1e-05 1e-05 0.9    4 25  5  60 0.05   0 128 512
   15 sgd   1e-04 1e-01 0.99   4 20  5  60 0.05 1.0 128 512
   16 adamw 1e-05 1e-05 0.9   64 60  5  60 0.05   0 128 512
   18 adam  1e-05 1e-03 0.9    4 60  5  60 0.05   0 128 512
   22 sgd   1e-04 1e-01 0.99  32 60  5  60 0      0 128 512
   23 adam  1e-05 0e+00 0.9   64 25  5  60 0.1  1.0  64   4
   28 sgd   1e-04 0e+00 0.999  4 60  5  60 0    1.0 128 512
   29 adamw 1e-05 1e-05 0.9   64 12  5  60 0.05 1.0 128   4
   31 adam  1e-05 1e-03 0.9   64 20  5  20 0.05 1.0 128   8
   37 adam  1e-05 0e+00 0.9   64 20  5  60 0.1  1.0 128 512
   44 adamw 1e-06 1e-05 0.9    4 40 10 100 0.05 1.0 128 512
   48 adamw 1e-05 1e-05 0.9   64 60  5  60 0.05 1.0 128   4
   50 adam  1e-06 0e+00 0.9   64 30  5  60 0.05 1.0 128 512
   54 adam  1e-03 1e-03 0.9    4 60  5  60 0.05 1.0 128 512
   61 adam  1e-03 1e-03 0.9    4 60  5  60 0.05 1.0 128 512
  187 adamw 1e-06 1e-05 0.9    4 20  5  60 0.05 1.0 128 512
  188 adam  1e-04 1e-01 0.9   64 60  5  60 0.05 1.0 128  16
  458 sgd   1e-04 1e-05 0.99  32 60 10  60 0      0 128 512
  469 adam  1e-06 0e+00 0.9   64 10  5  60 0.05 1.0 128 512
  882 sgd   1e-03 1e-03 0.99   4 60  5  60 0    1.0 128 512
 1049 sgd   1e-04 1e-01 0.99  32 60 10  60 0      0 512 512
 1050 adam  1e-05 0e+00 0.9   64 60  5  60 0.05 1.0 128 512
 1063 adam  1e-04 1e-01 0.9   64 40  5  60 0.1  1.0 128  16
 1068 sgd   1e-04 1e-05 0.99  32 44  5  60 0      0 128 512
 1462 sgd   1e-04 1e-05 0.99  32 60  5  60 0      0 128 512
 1464 adamw 1e-05 1e-03 0.9   64 60  5  60 0.05 0.1 128  16
 1479 adamw 1e-06 1e-05 0.9    4 60  5  60 0    1.0 128  16
 1480 adamw 1e-06 1e-05 0.9   64 60  5  60 0.05 1.0 128 512
 1491 adam  1e-04 1e-03 0.9   16 30  5  60 0    1.0 128 512
 1493 adam  1e-04 1e-03 0.9   16 30  5  60 0    1.0 128 512
 1494 adam  1e-06 1e-03 0.9    4 60  5  60 0.05   0 128 512
 1510 adamw 1e-05 1e-05 0.9   64 60  5  60 0    0.1 128  16
 1511 adamw 1e-06 1e-05 0.9    4 60  5  60 0.05 1.0 128 512
 6332 adamw 1e-05 1e-03 0.9   64 60  5  60 0.05 1.0 128  16
23381 sgd   1e-05 1e-03 0.99  32 25  5  60 0.05 1.0 128  16
40496 adamw 1e-06 1e-05 0.9    4 30  5  60 0.05 1.0 128 512
40966 adamw 1e-04 0e+00 0.9   64 60  5  60 0.05 1.0 128   8
40975 adamw 1e-04 0e+00 0.9   64 60  5  60 0.05 1.0 128  16
40982 sgd   1e-04 1e-05 0.999 16 60  5  60 0.05 1.0 128 512
40994 sgd   1e-04 1e-01 0.99  32 60  5  60 0      0 128 512
"""


def openml(number):
    """The recipes of an OpenML table, and its maximal number of tokens. Unlisted tables use the settings of credit-g."""
    rows = {row[0]: row[1:] for row in map(str.split, OPENML.strip().splitlines())}
    row = rows.get(str(number), rows["31"])
    lr, weight_decay, momentum, batch_size, epochs, warmup, decay, dropout, clip, max_samples, tokens = map(float, row[1:])
    recipe = published(
        row[0], lr, weight_decay, int(batch_size), int(epochs), int(warmup), int(decay),
        momentum=momentum, dropout=dropout, clip=clip, max_samples=int(max_samples),
        embedder_epochs=20, align_epochs=20, **TEXT,
    )  # fmt: skip
    return both(recipe, **SEQUENCE), int(tokens)


# The tiny scale has one recipe for each kind of task, the same for all methods; only MoNA's stage 1 and LSG's weight were
# chosen separately. An epoch is a fixed number of optimizer steps, whatever the number of samples. docs/measurements.md.
TINY = Recipe(40, 32, 1, "adamw", 3e-3, 0.05, warmup_epochs=2, decay_epochs=40, clip=1.0, embedder_epochs=20,
              max_samples=32, classes_per_problem=1000, source_samples=1000, reg=0.0, meta_epochs=2, align_epochs=20,
              label_epochs=3, regularise_weight=0.5, n_train=10_000)  # fmt: skip
TINY_RECIPES = {
    "images": TINY,
    "2D fields": TINY,
    "series": replace(TINY, lr=1e-3),
    "1D fields": TINY,
    "tables": replace(TINY, lr=1e-4),
}
TINY_STEPS = {"images": 100, "2D fields": 100, "series": 150, "1D fields": 100, "tables": 10}
TOY_STEPS = 13  # a demonstration: PaRe ends within two minutes
