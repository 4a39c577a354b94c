"""LSG: a graph of the class names, encoded by a language model, guides the features of another modality.

Ma, Li, Cai and Kang, "Language Semantic Graph Guided Data-Efficient Learning", NeurIPS 2023. Written from its abstract, its
figure and its released code: the paper's equations could not be read.

Class names have a meaning, and a language model knows some of it. The nodes of a graph are prompts that contain a class name;
similar ones are joined. A graph convolutional network (GCN) learns to classify the nodes and is frozen. Then each sample is
joined to the nodes of its own class, and the output of the GCN for it guides the encoder.

    stage 1:
    1  t_cp = unit(mean of the text encoder's outputs at the tokens of the name, in prompt p of class c)       T: n = K P nodes
    2  A_ij = <t_i, t_j> if i and j have the same class, or if it is one of the r n^2 largest between classes; else 0
    3  N(A) = D^-1/2 A D^-1/2,  O = N(A) LeakyReLU(N(A) T W1) W2;  W1, W2 <- argmin L(O, class), then frozen
    stage 2:
    4  h = H(mean over tokens of encoder(embedder(x))), H linear
    5  A_a = [[A, S], [S^T, M]]: S (the figure's P) = 1 where a sample has the class of a node; M = 1 where two samples share
       a class, and on its diagonal. G = LeakyReLU(N(A_a) [T; h] W1),  O = N(A_a) G W2;  g_i and o_i are the rows of sample i
    6  L = L(model(x), y) + w_a L(o, y) + w_r mean over i of |unit(h_i) - unit(g_i)|, g_i taken as constant

    K classes, P prompts for each, n nodes of width d (that of the text encoder), B samples

By line 5, all samples of a class have the same neighbours and therefore the same g_i and o_i: the last term of line 6 pulls
them to one vector, which comes from the name of the class. Three controls test whether the graph and the language matter:
`--prototypes text` uses neither graph nor GCN, `random` and `simplex` use no language at all.

    python lsg.py --task spherical

Measured on cifar100, 10,000 real images, tiny scale, 4,000 steps, 3 seeds, last epoch: error 0.566 ± 0.003 with the graph of
MiniLM, 0.563 ± 0.006 with random vectors, 0.568 ± 0.004 without either (naive fine-tuning): no significant
difference. docs/measurements.md has the table.

Names come with the task (`names` of data.Task); none are made up. `--as-released` follows the code where it differs from these
lines: docs/paper-vs-code.md, L1 and L2.
"""

import hashlib
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

import cli
import common
import data
from run import LOG_EVERY, Run, gather, make_optimizer, make_schedule, mean_loss, seed_everything


@dataclass(frozen=True)
class Args(cli.Args):
    """The options of LSG; those that all methods share are in cli.Args."""

    text_encoder: str | None = None
    """model that embeds the names: BERT-like, as --backbone of a 1D task. Default: roberta_base (full), tiny-roberta (tiny)"""
    prototypes: Literal["graph", "text", "random", "simplex"] = "graph"
    """graph: the method. Controls with a fixed vector for each class, and no L(o, y): text: the mean of its prompts; random:
    random orthogonal vectors; simplex: all cosines equal, as small as possible. The last two need no names"""
    align_weight: float = 1.0
    """w_a. With --align-weight 0 --regularise-weight 0: naive fine-tuning"""
    regularise_weight: float | None = None
    """w_r. Default: 8 (full, official), 0.5 (tiny: docs/measurements.md)"""
    edge_ratio: float = 0.003
    """r of line 2: fraction of the n^2 entries of A that are edges between classes"""
    gcn_steps: int | None = None
    """steps of stage 1. Default: 200, of Adam; as released 5005, of SGD"""


TEMPLATES = [  # {x} is what a sample is, "a photo"; {c} the name
    "{x} of {c}", "{x} that shows {c}", "{x} with {c} in it", "{x} of {c} and little else", "this is {x} of {c}",
    "here we have {x} of {c}", "{c} as {x} shows it", "{c}", "this is {c}", "an instance of {c}", "a typical case of {c}",
    "an unusual kind of {c}", "one more example of {c}", "a clear example of {c}", "a doubtful case of {c}", "it is called {c}",
    "everyone would say {c}", "people call this {c}", "the answer is {c}", "we are looking for {c}",
]  # fmt: skip
P = len(TEMPLATES)
activation = lambda x: F.leaky_relu(x, 0.2)


def tokenise(source, names, sample):
    """The K P prompts, class by class: token ids, and the slice of them that is the name. `sample`: what to call a sample.

    Raises UserError if a name has no token, or more than the text encoder can take.
    """
    spoken = {name: name.replace("_", " ") for name in names}
    if silent := [name for name in names if not source.tokenizer(spoken[name].split())]:
        raise cli.UserError(f"--text-encoder: {source.name} has no token for the class name {silent[0]!r}.")
    around = [template.replace("{x}", sample).split("{c}") for template in TEMPLATES]
    prompts = [source.tokenizer.in_context(before, spoken[name], after) for name in names for before, after in around]
    if (n := max(len(ids) for ids, _ in prompts)) > source.positions:
        raise cli.UserError(f"--text-encoder: {source.name} takes {source.positions} tokens, the longest class name needs {n}.")
    return prompts


@torch.no_grad()
def embed_prompts(source, prompts, device):
    """Line 1: T (n, d), unit vectors. Prompts of one length form a batch: no padding."""
    encode = nn.Sequential(source.embedder, source.encoder).to(device).eval()
    t = torch.empty(len(prompts), source.token_width)  # (n, d)
    for length in {len(ids) for ids, _ in prompts}:
        for rows in torch.tensor([i for i, (ids, _) in enumerate(prompts) if len(ids) == length]).split(128):
            hidden = encode(torch.tensor([prompts[i][0] for i in rows], device=device)).cpu()  # (at most 128, N, d)
            for i, tokens in zip(rows, hidden, strict=True):
                t[i] = tokens[prompts[i][1]].mean(0)  # (N, d) -> (d,)
    return F.normalize(t, dim=1)


def label_graph(t, ratio, released=False):
    """Line 2: A (n, n) of the nodes T (n, d), P of each class in a row. Negative cosines are no edges.

    released: row L1, what the official code has in stage 2: the r n^2 largest of all entries, of the same class or not.
    """
    A = t @ t.T  # (n, d) -> (n, n)
    A = ((A + A.T) / 2).clamp(min=0)  # rounding may have made it asymmetric
    node_class = torch.arange(len(t), device=t.device) // P  # (n,)
    same = (node_class[:, None] == node_class) & (not released)  # (n, n)
    between, count = A.masked_fill(same, -1), int(ratio * len(t) ** 2)  # (n, n)
    least = between.flatten().kthvalue(len(t) ** 2 - count + 1)[0] if count else float("inf")  # the count-th largest
    return A * (same | (between >= least)).fill_diagonal_(True)


def normalised(A):
    """N(A) = D^-1/2 A D^-1/2, D = row sums of A (n, n)"""
    root = A.sum(1, keepdim=True).rsqrt()  # (n, 1)
    return root * A * root.T


def label_nodes(loaded, args, device):
    """Lines 1 and 2: T (n, d) and A (n, n), cached under a hash of everything that they depend on.

    Returns None, None if no names are needed. Raises UserError if the task has no names, or the encoder is no text model.
    """
    if args.prototypes in ("random", "simplex"):
        return None, None
    names = data.class_names(loaded, args.data_dir)
    with torch.random.fork_rng(devices=[]):  # building a model draws random numbers: those of the run stay as they are
        try:
            source = common.load_source(args.text_encoder)
        except cli.UserError as error:
            raise cli.UserError(str(error).replace("--backbone", "--text-encoder")) from error
    if source.modality != "1d":
        raise cli.UserError(f"--text-encoder: {source.name} is a Swin or ViT, not a text model.\nGive a BERT-like model.")
    if source.name == "tiny-roberta":
        print("LSG     tiny-roberta hardly knows what the names mean. For real results, give another --text-encoder")
    prompts = tokenise(source, names, loaded.task.sample)
    key = hashlib.sha256(f"{prompts} {args.edge_ratio} {source.name} {source.encoder.architecture}".encode())
    for weight in (*source.embedder.parameters(), *source.encoder.parameters()):
        key.update(weight.detach().numpy())

    def make():
        t = embed_prompts(source, prompts, device)
        return t.numpy(), label_graph(t, args.edge_ratio).numpy()

    what = f"{source.name} embeds {len(names)} class names in {P} prompts each"
    kept = data.kept(Path(args.out_dir) / "cache", f"names-{key.hexdigest()[:12]}", what, make)
    return tuple(torch.tensor(array, device=device) for array in kept)


class GCN(nn.Module):
    """W1 (d, d) and W2 (d, K) of line 3, drawn as in the official code."""

    def __init__(self, d, K):
        super().__init__()
        self.W1 = nn.Parameter(torch.empty(d, d).uniform_(-(d**-0.5), d**-0.5))
        self.W2 = nn.Parameter(torch.empty(d, K).uniform_(-(K**-0.5), K**-0.5))


def train_gcn(gcn, t, A, task, args):
    """Line 3: trains `gcn` on all nodes T (n, d) at once, with the loss of `task`. Returns at most ten rows of metrics; their
    epoch is the number of steps, since each step uses all nodes.

    As released: by SGD, and the rows of O are scaled to unit norm before the loss, which then stays above a floor (row L2).
    """
    N_A = normalised(A).to_sparse()  # (n, n)
    N_A_t = N_A @ t  # (n, d)
    node_class = torch.arange(len(t), device=t.device) // P  # (n,)
    y = F.one_hot(node_class).float() if task.target == "labels" else node_class  # (n, K) or (n,)
    if args.as_released:
        optimizer = torch.optim.SGD(gcn.parameters(), lr=1e-2, momentum=0.9, weight_decay=1e-4, nesterov=True)
    else:
        optimizer = torch.optim.Adam(gcn.parameters(), lr=1e-3)
    steps, rows, begin = args.gcn_steps or (5005 if args.as_released else 200), [], time.perf_counter()
    for step in range(1, steps + 1):
        o = N_A @ (activation(N_A_t @ gcn.W1) @ gcn.W2)  # (n, K)
        loss = task.loss(F.normalize(o, dim=1) if args.as_released else o, y)  # line 3: L(O, class)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()  # also after the last step: stage 2 clips the norm of all gradients in net
        if step % -(-steps // 10) == 0 or step == steps:
            wrong, end = (o.argmax(1) != node_class).float().mean().item(), time.perf_counter()
            rows.append({"epoch": step, "GCN loss": loss.item(), "GCN error": wrong, "seconds": end - begin})
            begin = end
    return rows


class LabelGraph(nn.Module):
    """Line 5 for the rows of the samples: the frozen GCN, computed without building A_a."""

    def __init__(self, t, A, gcn):
        super().__init__()
        self.gcn, self.width = gcn.requires_grad_(False), t.shape[1]  # d
        self.register_buffer("t", t @ gcn.W1, persistent=False)  # (n, d): T W1, since (N(A) T) W1 = N(A) (T W1)
        self.register_buffer("A", A.to_sparse(), persistent=False)  # (n, n)
        self.register_buffer("degree", A.sum(1, keepdim=True), persistent=False)  # (n, 1)

    def forward(self, h, Y):
        """Features h (B, d) of samples with labels Y (B, K), 0 or 1 -> g (B, d), o (B, K)"""
        by_class = lambda nodes: nodes.unflatten(0, (-1, P)).sum(1)  # (n, d) -> (K, d): Y by_class(t) is S^T t
        M = (Y @ Y.T + torch.eye(len(Y), device=Y.device) > 0).float()  # (B, B)
        root_t = (self.degree + Y.sum(0).repeat_interleave(P)[:, None]).rsqrt()  # (n, 1): D^-1/2 of the nodes ...
        root_i = (P * Y.sum(1, keepdim=True) + M.sum(1, keepdim=True)).rsqrt()  # (B, 1): ... and of the samples
        t, i = root_t * self.t, root_i * (h @ self.gcn.W1)  # (n, d), (B, d)
        g_t = activation(root_t * (self.A @ t + (Y.T @ i).repeat_interleave(P, 0)))  # (n, d): A t + S i
        g_i = activation(root_i * (Y @ by_class(t) + M @ i))  # (B, d): S^T t + M i
        o = root_i * (Y @ by_class(root_t * g_t) + M @ (root_i * g_i)) @ self.gcn.W2  # (B, K)
        return g_i, o


class Prototypes(nn.Module):
    """The controls: g is a fixed vector p_c of the class, whatever else is in the batch; there is no o. p (K, d)"""

    def __init__(self, p):
        super().__init__()
        self.width = p.shape[1]  # d
        self.register_buffer("p", p, persistent=False)

    def forward(self, h, Y):
        return Y @ self.p, None  # (B, K) -> (B, d): of several labels, the sum


def class_vectors(kind, t, K, seed):
    """Unit vectors of the K classes. text: means of the nodes T (n, d) -> (K, d). Without language, (K, K): random, orthogonal;
    simplex, with all cosines -1 / (K - 1).
    """
    if kind == "text":
        return F.normalize(t.unflatten(0, (K, P)).mean(1), dim=1)
    if kind == "simplex":
        return F.normalize(torch.eye(K) - 1 / K, dim=1)
    return torch.linalg.qr(torch.randn(K, K, generator=torch.Generator().manual_seed(cli.stream("prototypes", seed))))[0]


def regularisation(h, g):
    """Line 6: mean of |unit(h_i) - unit(g_i)| = sqrt(2 - 2 cos), from 0 to 2; g is constant. (B, d), (B, d) -> scalar"""
    return (F.normalize(h, dim=1) - F.normalize(g.detach(), dim=1)).norm(dim=1).mean()


class Guided(nn.Module):
    """The model, its projector H, and what guides it, a LabelGraph or Prototypes. `loss`: that of the task."""

    def __init__(self, model, projector, guide, loss):
        super().__init__()
        self.model, self.projector, self.guide, self.loss = model, projector, guide, loss

    def forward(self, x, y):
        """Class scores (B, K), and the two losses of line 6 over the samples of all processes, which may be neighbours."""
        features = self.model.encoder(self.model.embedder(x))  # (B, n, F)
        out = self.model.predictor(features)  # (B, K)
        with common.autocast_off(features):
            h, y = gather(self.projector(features.float().mean(1))), gather(y)  # line 4: (B, n, F) -> (B, F) -> (B, d)
            g, o = self.guide(h, F.one_hot(y, out.shape[1]).float() if y.ndim == 1 else y)  # line 5: (B, d), (B, K)
            return out, h.new_zeros(()) if o is None else self.loss(o, y), regularisation(h, g)


def main(args):
    # ---- set up: processes, device, seed, data, run folder
    run = Run(args, "lsg")  # LSG
    run.args = replace(run.args, text_encoder=args.text_encoder or common.DEFAULT_BACKBONE["1d", run.args.scale])  # LSG
    args, device = run.args, run.device
    guided = args.align_weight + args.regularise_weight > 0  # LSG
    if guided and data.find_task(args.task).target == "field":  # LSG
        raise cli.UserError(f"{args.task} predicts a field: there are no classes that could have names.")  # LSG
    with run.first_process_first():
        source = common.load_source(args.backbone)  # LSG
        loaded = data.load(
            args.task, args.data_dir, f"{args.out_dir}/cache", args.scale, args.n_train, args.seed, device, args.as_released
        )
        if guided:  # LSG
            t, A = label_nodes(loaded, args, device)  # LSG
    task, train = loaded.task, loaded.train
    if not run.start(train):  # LSG
        return

    # ---- the model
    embedder = common.make_embedder(task.shape, source, args.init, task.tokens)  # LSG
    predictor = common.make_predictor(train.output, task.target, source, embedder, pooling=args.as_released)
    model = common.Model(embedder, common.set_dropout(source.encoder, args.dropout), predictor)
    if args.compile:
        run.compile(model.encoder)

    # ---- LSG: stage 1, the GCN alone, and what guides
    net = model
    if guided:
        if args.prototypes == "graph":
            with torch.random.fork_rng(devices=[]):
                seed_everything("GCN", args.seed)
                gcn = GCN(t.shape[1], train.classes).to(device)
            if not run.restore_stage1(gcn=gcn):
                run.keep_stage1(train_gcn(gcn, t, A, task, args), gcn=gcn)
                node_class = torch.arange(len(t), device=device) // P  # (n,)
                edges = ((A > 0) & (node_class[:, None] < node_class)).sum().item()
                print(f"LSG     {len(t):,} nodes, {edges:,} pairs of different classes joined")
            guide = LabelGraph(t, label_graph(t, args.edge_ratio, released=True) if args.as_released else A, gcn)  # row L1
        else:
            guide = Prototypes(class_vectors(args.prototypes, t, train.classes, args.seed))
        net = Guided(model, nn.Linear(source.feature_width, guide.width), guide, task.loss)

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
        totals = torch.zeros(2, device=device)  # LSG: of the losses of line 6
        start, losses = time.perf_counter(), torch.zeros(steps, device=device)
        batches = train.batches(steps, args.batch_size, args.seed, epoch, run.rank, run.world)
        for step, (x, y) in enumerate(bar := run.progress(batches, steps, f"epoch {epoch + 1}/{args.epochs}")):
            window = min(args.accumulate, steps - step // args.accumulate * args.accumulate)  # the last one may be short
            step_follows = (step + 1) % args.accumulate == 0 or step + 1 == steps
            with run.no_sync_unless(step_follows, net):
                with run.autocast():
                    out, align, regularise = net(x, y) if guided else (net(x), 0.0, 0.0)  # LSG: (B, K), and two scalars
                loss = task.loss(out, y)
                loss = loss + args.align_weight * align + args.regularise_weight * regularise  # LSG: line 6
                if guided:  # LSG
                    totals += torch.stack([align, regularise]).detach()  # LSG
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
        seconds = time.perf_counter() - start
        val = run.evaluate(model, loaded.val, task)
        row = {"loss": run.mean(losses), "val": val, "lr": scheduler.get_last_lr()[0], "seconds": seconds}  # the next step's lr
        row |= dict(zip(("align", "regularise"), (totals / steps).tolist(), strict=True)) if guided else {}  # LSG
        run.end_epoch(net, model, optimizer, scheduler, row)

    # ---- test: the last epoch, and the epoch that was best on validation
    return run.finish(model, loaded)  # LSG


if __name__ == "__main__":
    cli.guarded(main, cli.command_line(Args, __doc__, data.find_task))
