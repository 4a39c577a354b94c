"""Does a text encoder place the names of CIFAR-100 classes of one superclass close together? There are 20 superclasses.

    python tools/names.py                                a table in Markdown, of tiny-roberta
    python tools/names.py tiny-roberta path/to/folder    of these encoders; a folder is one saved by transformers

P@k is the share of the k nearest other classes that lie in the same superclass, 0.04 by chance; near means a large cosine.
`text` are the means of a class's prompts (lsg.py --prototypes text), `graph` the vectors that lsg.py pulls samples to: with a
GCN that is not trained, trained, and trained and joined as released. "Loss" is that of the GCN, "between" the mean cosine of
two of these vectors. "Edges in a superclass" is their share of all edges between classes; "released: edges between classes"
their share of all edges in the graph of the official stage 2 (row L1).
"""

import copy
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import torch
import torch.nn.functional as F
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import cli
import data
import lsg

# the 20 superclasses of CIFAR-100, five classes each
SUPERCLASSES = """
beaver dolphin otter seal whale | aquarium_fish flatfish ray shark trout | orchid poppy rose sunflower tulip
bottle bowl can cup plate | apple mushroom orange pear sweet_pepper | clock keyboard lamp telephone television
bed chair couch table wardrobe | bee beetle butterfly caterpillar cockroach | bear leopard lion tiger wolf
bridge castle house road skyscraper | cloud forest mountain plain sea | camel cattle chimpanzee elephant kangaroo
fox porcupine possum raccoon skunk | crab lobster snail spider worm | baby boy girl man woman
crocodile dinosaur lizard snake turtle | hamster mouse rabbit shrew squirrel
maple_tree oak_tree palm_tree pine_tree willow_tree | bicycle bus motorcycle pickup_truck train
lawn_mower rocket streetcar tank tractor
"""
OF = {name: i for i, line in enumerate(SUPERCLASSES.strip().replace("\n", " | ").split("|")) for name in line.split()}
NAMES = tuple(sorted(OF))  # in the order of their numbers


@dataclass(frozen=True)
class Args:
    encoders: Annotated[tuple[str, ...], tyro.conf.Positional] = ("tiny-roberta",)
    """text encoders, as lsg.py --text-encoder"""
    gcn_steps: int | None = None
    """as in lsg.py"""
    out_dir: str = "runs"
    """OUT_DIR/cache keeps what was read"""
    seed: int = 0
    """of the GCN"""


def precision(p, k, group):
    """P@k of class vectors p (K, d) whose superclasses are `group` (K,)."""
    p = F.normalize(p, dim=1)
    near = (p @ p.T).fill_diagonal_(-2).topk(k).indices  # (K, k)
    return (group[near] == group[:, None]).float().mean().item()


def measure(encoder, args):
    """The numbers of a row of the table, by their heading."""
    group, K = torch.tensor([OF[name] for name in NAMES]), len(NAMES)
    task = replace(data.TASKS["cifar100"], names=NAMES)
    loaded = data.Loaded(task, SimpleNamespace(kind="official", classes=K), None, None)
    options = lsg.Args(text_encoder=encoder, gcn_steps=args.gcn_steps, out_dir=args.out_dir)
    t, A = lsg.label_nodes(loaded, options, "cpu")
    text = lsg.class_vectors("text", t, K, 0)
    number = torch.arange(len(t)) // lsg.P
    same, cosines = number[:, None] == number, t @ t.T
    apart = (A > 0) & ~same
    released = lsg.label_graph(t, options.edge_ratio, released=True) > 0
    kin = group[number][:, None] == group[number]
    found = {
        "cosine within a class": cosines[same].mean(), "between classes": cosines[~same].mean(),
        "text P@1": precision(text, 1, group), "P@4": precision(text, 4, group),
        "edges in a superclass": (kin & apart).sum() / apart.sum(),
        "released: edges between classes": (released & ~same).sum() / released.fill_diagonal_(False).sum(),
    }  # fmt: skip
    torch.manual_seed(args.seed)
    gcn = lsg.GCN(t.shape[1], K)
    start = copy.deepcopy(gcn.state_dict())
    for name, as_released in (("untrained", None), ("trained", False), ("as released", True)):
        gcn.load_state_dict(start)
        if as_released is not None:
            rows = lsg.train_gcn(gcn.requires_grad_(), t, A, task, replace(options, as_released=as_released))
        graph = lsg.LabelGraph(t, lsg.label_graph(t, options.edge_ratio, True) if as_released else A, gcn)
        g, _ = graph(torch.zeros(K, t.shape[1]), torch.eye(K))  # one sample of each class, whose feature is 0
        found[f"graph P@1, {name}"] = precision(g, 1, group)
        if as_released is not None:
            g = F.normalize(g, dim=1)
            found |= {f"loss, {name}": rows[-1]["GCN loss"], f"between, {name}": ((g @ g.T).sum() - K) / (K * (K - 1))}
    return {name: float(value) for name, value in found.items()}


def main(args):
    for i, encoder in enumerate(args.encoders):
        with torch.random.fork_rng():
            found = measure(encoder, args)
        if i == 0:
            print(f"| encoder | {' | '.join(found)} |\n|---{'|---' * len(found)}|")
        print(f"| {Path(encoder).name} |", " | ".join(f"{value:.2f}" for value in found.values()), "|", flush=True)


if __name__ == "__main__":
    cli.guarded(main, cli.command_line(Args, __doc__))
