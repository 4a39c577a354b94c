"""The methods to compare, and variants that differ from a method in one respect.

Most variants are options. Changes that are only of use in this comparison are not options but patches: functions that modify
the imported method file before it runs. `tools/reproduce.py` runs both and writes each variant to its own folder. It knows
finished runs by the name of their variant: a variant whose command or patch changes needs a new name.
"""

import os
import shlex
from dataclasses import replace

import torch

MINILM = shlex.quote(os.environ.get("MINILM", "minilm"))
METHODS = {
    "pare": "pare.py",
    "orca": "orca.py",
    "mona": "mona.py",
    "mona-e10": "mona.py --meta-epochs 10",  # five times the default at the tiny scale: better, slower (docs/mona.md)
    "recraft": "recraft.py",
    "contrast": "contrast.py",
    "lsg": "lsg.py",
    **{mode: f"finetune.py --mode {mode}" for mode in ("naive", "warmup", "frozen", "lora", "norms", "probe", "scratch")},
    "pare-released": "pare.py --as-released",
    "orca-released": "orca.py --as-released --reg 0",  # its objective by linear programs: faster on a CPU
    "recraft-released": "recraft.py --as-released --reg 0",  # its distance by a linear program: faster on a CPU
    "recraft-entropy": "recraft.py --distortion entropy",  # R3
    "recraft-align": "recraft.py --label-epochs 0",
    "recraft-labels": "recraft.py --align-epochs 0",
    "recraft-freeze-embedder": "recraft.py --freeze-embedder",  # R2
    # ---- contrast: stage 1 alone, stage 2 alone, and what the slides leave open (C5, C9)
    "contrast-stage1": "contrast.py --k-begin 0",  # to be compared with naive
    "contrast-stage1-init-random": "contrast.py --k-begin 0 --init random",  # C7, to be compared with naive-random
    "contrast-stage1-e20": "contrast.py --k-begin 0 --contrast-epochs 20",
    "contrast-stage2": "contrast.py --contrast-epochs 0",
    "contrast-stage2-gate": "contrast.py --contrast-epochs 0 --scores gate",
    "contrast-stage2-random": "contrast.py --contrast-epochs 0 --scores random",
    "contrast-embedder": "contrast.py --features embedder",
    "contrast-freeze-embedder": "contrast.py --freeze-embedder",
    **{f"contrast-{scores}": f"contrast.py --scores {scores}" for scores in ("received", "gate", "random")},
    # ---- LSG: is language worth anything? `MINILM` names a folder of a BERT-like model that knows more than tiny-roberta
    "lsg-text": "lsg.py --prototypes text",
    "lsg-random": "lsg.py --prototypes random",
    "lsg-simplex": "lsg.py --prototypes simplex",
    "lsg-pull": "lsg.py --align-weight 0",  # L3: without the loss that knows the label
    "lsg-released": "lsg.py --as-released",  # L1, L2
    "lsg-minilm": f"lsg.py --text-encoder {MINILM}",
    "lsg-minilm-pull": f"lsg.py --text-encoder {MINILM} --align-weight 0",  # what lsg-minilm-text is to be compared with
    "lsg-minilm-text": f"lsg.py --text-encoder {MINILM} --prototypes text",
    "naive-released": "finetune.py --mode naive --as-released",  # O2: different initial embedder
    # ---- initial embedder (P1, O1), and equal compute
    "pare-random": "pare.py --init random",
    "orca-random": "orca.py --init random",
    "mona-random": "mona.py --init random",
    "naive-random": "finetune.py --mode naive --init random",
    "naive-bias": "finetune.py --mode naive",  # 1D: the projection starts with a bias (why ORCA helps on series)
    "orca-bias": "orca.py",  # the same: does stage 1 help beyond that?
    "naive-80": "finetune.py --mode naive --epochs 80",  # tiny scale: encodes as many samples as PaRe in 40 epochs
    "naive-47": "finetune.py --mode naive --epochs 47",  # as many as MoNA: 40 epochs and 2 of stage 1, of 10/3 times the work
    # ---- MoNA: its constants, of which the text gives none (docs/mona.md)
    "mona-plain": "mona.py --lambda 0",  # embedder and predictor are warmed up, nothing else
    "mona-alpha1": "mona.py --inner-lr 1",
    "mona-plain-e10": "mona.py --meta-epochs 10 --lambda 0",
    # ---- PaRe: rows of docs/paper-vs-code.md
    "pare-end": "pare.py --k-end 0.16",  # P2: k decreases to 500 of 3136, as in the official code
    "pare-share": "pare.py --ratio k/N",  # P3
    "pare-highest": "pare.py",  # P4: the highest-scored target patches are replaced
    "pare-frozen-gate": "pare.py",  # P5
    "pare-noise": "pare.py --gate-noise 1",  # P6
    # ---- PaRe: the gate against random selection, which is the same as very large noise on the scores
    "pare-k0.2": "pare.py --k-begin 0.2",
    "pare-k0.4": "pare.py --k-begin 0.4",
    "pare-k0.9": "pare.py --k-begin 0.9",
    "pare-chance": "pare.py --gate-noise 1000",
    "pare-chance0.2": "pare.py --gate-noise 1000 --k-begin 0.2",
    "pare-chance0.4": "pare.py --gate-noise 1000 --k-begin 0.4",
    "pare-chance0.9": "pare.py --gate-noise 1000 --k-begin 0.9",
    # ---- ORCA: "What explains the success of cross-modal fine-tuning with ORCA?"
    "orca-one-class": "orca.py --classes-per-problem 1",  # O3
    "orca-e5": "orca.py --embedder-epochs 5",
    "orca-e60": "orca.py --embedder-epochs 60",
    "orca-proxy": "orca.py --source tiny_imagenet",
    "orca-proxy1d": "orca.py --source conll2000",
    "orca-shuffled": "orca.py",  # stage 1 with the target's labels in another, random order, the same in all steps
    "orca-freeze-embedder": "orca.py",  # stage 2 only
    "orca-freeze-encoder": "orca.py",
    "orca-freeze-both": "orca.py",
    # ---- protocol
    "naive-test": "finetune.py --mode naive",  # O11: the best epoch is selected on the test set
    # O14: four gradients are averaged or summed: lr (sum g + wd w) = 4 lr (mean g + wd / 4 w)
    "naive-mean": "finetune.py --mode naive --optimizer sgd --lr 0.003 --batch-size 8 --accumulate 4 --clip 0",
    "naive-sum": "finetune.py --mode naive --optimizer sgd --lr 0.012 --weight-decay 0.0125 --batch-size 8 --accumulate 4"
    " --clip 0",
}


def highest(pare):
    lowest = pare.replace_patches
    pare.replace_patches = lambda t, s, scores_t, *rest: lowest(t, s, 1 - scores_t, *rest)


def frozen_gate(pare):
    gate = pare.Gate
    pare.Gate = lambda width: gate(width).requires_grad_(False)


def freeze(*parts):
    """Freeze these parts of the model in stage 2."""

    def patch(method):
        class Run(method.Run):
            def distribute(self, module):
                for part in parts:
                    getattr(module, part).requires_grad_(False)
                return super().distribute(module)

        method.Run = Run

    return patch


def start_with_bias(method):
    """1D only: LayerNorm(w x) of one value x keeps only its sign. With b up to 0.1, tokens vary as after ORCA's stage 1."""
    make = method.common.make_embedder

    def made(*args):
        embedder = make(*args)
        torch.nn.init.uniform_(embedder.project.bias, -0.1, 0.1)
        return embedder

    method.common.make_embedder = made


def shuffle_labels(orca):
    align = orca.align

    def shuffled(embedder, u_s, y_s, train, y_t, *rest):
        return align(embedder, u_s, y_s, train, y_t[torch.randperm(len(y_t))], *rest)

    orca.align = shuffled


def choose_on_test(method):
    load = method.data.load

    def loaded(*args):
        splits = load(*args)
        return replace(splits, val=splits.test)

    method.data.load = loaded


# variant -> function that modifies the imported method file; each run has its own process
PATCHES = {
    "pare-highest": highest,
    "pare-frozen-gate": frozen_gate,
    "orca-shuffled": shuffle_labels,
    "orca-freeze-embedder": freeze("embedder"),
    "orca-freeze-encoder": freeze("encoder"),
    "orca-freeze-both": freeze("embedder", "encoder"),
    "naive-bias": start_with_bias,
    "orca-bias": start_with_bias,
    "naive-test": choose_on_test,
}
