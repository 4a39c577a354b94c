"""Does `main` do what the paper says? Each method trains for two epochs, and its steps are computed again here.

The second computation is written from the papers, as loops and formulas: embedder, gate, replacement, losses, clipping,
schedule, gradient accumulation, SGD, and the first stages of ORCA and MoNA. It shares with `main` only the initial weights, the
samples and draws of each batch (`Split.plan`), the state of torch's generator at the start of each epoch, and the layers of
timm's Swin, which has dropout and drop path here, so that training mode and evaluation mode differ.
"""

import copy
import importlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import here, rows, weights
from safetensors.torch import load_file, save_file
from scipy.optimize import linprog
from tokenizers import Tokenizer as Rules
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedTokenizerFast

import backbones
import cli
import common
import data
import orca
import run
from tasks import scores

SIDE, N, D = 16, 16, 8  # images, their tokens, token width
LSG_CLIP = {"graph": 1.4, "released": 3.3, "text": 1.4}
STEPS = 3  # micro-batches of 8 of the 31 samples in an epoch: with --accumulate 2 the last window is short
MEANS = {"cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
         "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))}  # fmt: skip
LOOP = ["--task", "cifar100", "--scale", "tiny", "--n-train", 31, "--batch-size", 8, "--accumulate", 2, "--epochs", 2,
        "--optimizer", "sgd", "--momentum", 0.8, "--weight-decay", 0.02, "--dropout", 0.2]  # fmt: skip
RATE = ["--lr", 0.1, "--warmup-epochs", 0.75, "--decay-epochs", 2.5]
SETTING = [*RATE, "--clip", 1.4]


# ---------------------------------------------------------------------------------------------------------------------
# A run of main, and what is recorded of it
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A Swin of three blocks with drop path 0.5, in a file as tools/pretrain.py writes it."""
    torch.manual_seed(0)
    architecture = dict(img_size=SIDE, patch_size=4, window_size=2, embed_dim=D, depths=(1, 2), num_heads=(2, 2),
                        num_classes=0, drop_path_rate=0.5)  # fmt: skip
    swin = backbones.build_swin(**architecture)
    for parameter in swin.parameters():  # initial values of 0 and 1 would hide what is missing
        nn.init.normal_(parameter, parameter.mean().item(), 0.3 / max(1, parameter[0].numel()) ** 0.5)
    path = tmp_path_factory.mktemp("backbone") / "droppy.safetensors"
    save_file(swin.state_dict(), path, metadata={"architecture": json.dumps(architecture)})
    return path


def recorded(method, backbone, folder, *options, pretend=()):
    """Run main of a method. Returns what it started from, read, drew and evaluated. `pretend`: errors to report instead."""
    seen = SimpleNamespace(plans={}, evaluations=[], sources=[], problems=[])
    module = importlib.import_module(method)

    def spy(patch, owner, name, note):
        """Call note(original's result, *its arguments) after each call of owner.name."""
        original = getattr(owner, name)

        def noted(*args, **more):
            result = original(*args, **more)
            note(result, *args)
            return result

        patch.setattr(owner, name, noted)

    def plan(result, split, *_):
        seen.plans.setdefault(id(split), []).append((*result, torch.get_rng_state()))

    def source(result, *_):
        seen.sources.append(result)

    def problem(result, embedder, split, index, *_):
        seen.problems.append((split, index))

    original_distribute, original_start, original_evaluate = run.Run.distribute, run.Run.start, run.Run.evaluate
    pretended = iter(pretend)

    def distribute(self, net):  # stage 2 begins
        seen.run, seen.net = self, copy.deepcopy(net)
        return original_distribute(self, net)

    def start(self, *splits):
        seen.args, seen.splits = self.args, splits
        return original_start(self, *splits)

    def evaluate(self, model, split, task):
        score = original_evaluate(self, model, split, task)
        state = {k: v.clone() for k, v in model.state_dict().items()}
        seen.evaluations.append(SimpleNamespace(split=split, state=state, score=score))
        return next(pretended, score)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "TOY_TEST", 40)
        spy(patch, data.Split, "plan", plan)
        spy(patch, common, "load_source", source)
        patch.setattr(run.Run, "distribute", distribute)
        patch.setattr(run.Run, "start", start)
        patch.setattr(run.Run, "evaluate", evaluate)
        if method == "orca":
            spy(patch, orca, "embed_all", problem)
        for name in ("align", "meta_train"):  # stage 1 begins
            if hasattr(module, name):
                original = getattr(module, name)

                def stage1(first, *args, original=original):
                    seen.before = copy.deepcopy(first)
                    return original(first, *args)

                patch.setattr(module, name, stage1)
        seen.result = here(f"{method}.py", *LOOP, "--backbone", backbone, *options, out=folder)
    seen.train, seen.source_set = seen.splits[0], seen.splits[-1]
    seen.folder = next(path.parent for path in folder.glob("*/result.json"))
    seen.rows = [row for row in rows(seen.folder) if "stage" not in row]
    seen.pretrained = load_file(backbone)
    return seen


# ---------------------------------------------------------------------------------------------------------------------
# The same from the papers
# ---------------------------------------------------------------------------------------------------------------------


def images(split, name, index, draws=None):
    """Samples of a split as the embedder takes them: zero padding by 4, crop, flip, then standardised."""
    batch = []
    for i, sample in enumerate(index.tolist()):
        x = split.x[sample].float() / 255  # (3, 32, 32)
        if draws is not None:
            padded = F.pad(x, (4, 4, 4, 4))  # (3, 40, 40)
            row, column = int(draws[i, 0] * 9), int(draws[i, 1] * 9)
            x = padded[:, row : row + 32, column : column + 32]
            x = x if draws[i, 2] < 0.5 else x.flip(2)
        batch.append(torch.stack([(x[c] - MEANS[name][0][c]) / MEANS[name][1][c] for c in range(3)]))
    return torch.stack(batch)  # (B, 3, 32, 32)


def embed(x, weight, bias, gain, shift):
    """Resize, a linear map of each patch, LayerNorm: (B, 3, 32, 32) -> (B, N, D)"""
    x = F.interpolate(x, (SIDE, SIDE), mode="bilinear", antialias=True)
    patches = F.unfold(x, 4, stride=4).transpose(1, 2)  # (B, N, 3 * 4 * 4)
    tokens = patches @ weight.flatten(1).T + bias  # (B, N, D)
    centred = tokens - tokens.mean(2, keepdim=True)
    return centred / (centred.square().mean(2, keepdim=True) + 1e-5).sqrt() * gain + shift


def embed_target(embedder, x):
    return embed(x, embedder.project.weight, embedder.project.bias, embedder.norm.weight, embedder.norm.bias)


def embed_source(seen, x):
    """By the pretrained embedder as it stands in the file."""
    return embed(x, *(seen.pretrained[f"patch_embed.{k}"] for k in ("proj.weight", "proj.bias", "norm.weight", "norm.bias")))


def encode(encoder, tokens):
    """The layers of the Swin and its LayerNorm: (B, N, D) -> (B, n, F)"""
    return encoder.norm(encoder.layers(tokens.unflatten(1, (4, 4)))).flatten(1, 2)


def predict(predictor, features):
    """Mean over the tokens, one linear map: (B, n, F) -> (B, K)"""
    return sum(features.unbind(1)) / features.shape[1] @ predictor.linear.weight.T + predictor.linear.bias


def cross_entropy(out, y):
    return torch.stack([out[b].logsumexp(0) - out[b, y[b]] for b in range(len(y))]).mean()


def error(model, split, index):
    """Share of wrong answers in evaluation mode, without augmentation."""
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        out = predict(model.predictor, encode(model.encoder, embed_target(model.embedder, images(split, "cifar100", index))))
    return (out.argmax(1) != split.y[index]).float().mean().item()


def batches(seen, split, name, plan, step, augmented=True):
    order, draws, _ = seen.plans[id(split)][plan]
    return images(split, name, order[step], draws[step] if augmented else None), split.y[order[step]]


def clip_by_hand(gradients, largest):
    norm = sum(g.square().sum() for g in gradients.values() if g is not None).sqrt()
    if largest > 0 and norm > largest:
        gradients = {k: None if g is None else g * (largest / norm) for k, g in gradients.items()}
    return gradients, norm.item()


def sgd_by_hand(parameters, gradients, velocity, rate, args):
    """v = momentum v + g + weight_decay w,   w = w - rate v;   what has no gradient stays"""
    with torch.no_grad():
        for name, w in parameters.items():
            if gradients[name] is not None:
                g = gradients[name] + args.weight_decay * w
                velocity[name] = args.momentum * velocity[name] + g if name in velocity else g
                w -= rate * velocity[name]


def follow(seen, net, loss, trains=lambda name, epoch: True, first=0):
    """Train `net`, a copy of what main trains, for the epochs of the run. `first`: plans of stage 1 that come before.

    Returns a namespace: the state after each epoch, the mean loss and the last rate of each, the gradient norm of every step.
    """
    args, done = seen.args, SimpleNamespace(states=[], losses=[], norms=[], rates=[])
    parameters, velocity, t = dict(net.named_parameters()), {}, 0
    windows = [[0, 1], [2]]  # micro-batches of an optimizer step
    W, T = args.warmup_epochs * len(windows), args.decay_epochs * len(windows)
    for epoch in range(2):
        torch.set_rng_state(seen.plans[id(seen.train)][first + epoch][2])
        net.train()
        values = []
        for window in windows:
            total = dict.fromkeys(parameters)
            for step in window:
                value = loss(net, epoch, step)
                some = [name for name in parameters if trains(name, epoch)]
                found = torch.autograd.grad(value, [parameters[name] for name in some], allow_unused=True)
                for name, g in zip(some, found, strict=True):
                    if g is not None:
                        total[name] = g / len(window) if total[name] is None else total[name] + g / len(window)
                values.append(value.item())
            total, norm = clip_by_hand(total, args.clip)
            done.norms.append(norm)
            sgd_by_hand(parameters, total, velocity, args.lr * min(1, (t + 1) / W, (T - t) / (T - W)), args)
            t += 1
        done.states.append({k: v.clone() for k, v in net.state_dict().items()})
        done.losses.append(sum(values) / len(values))
        done.rates.append(args.lr * min(1, (t + 1) / W, (T - t) / (T - W)))
    return done


def same(ours, theirs, tolerance=2e-5):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.allclose(value.float(), theirs[name].float(), rtol=1e-4, atol=tolerance), (
            name, (value.float() - theirs[name].float()).abs().max())  # fmt: skip


def check(seen, done):
    """What main ends with and reports is what was computed here, and the run could have shown the difference."""
    start = seen.net.state_dict()
    same(done.states[-1], weights(seen.folder))
    moved = {k: (v.float() - start[k].float()).abs().max().item() for k, v in done.states[-1].items()}
    assert sum(distance > 1e-2 for distance in moved.values()) > len(moved) / 3
    assert [row["loss"] for row in seen.rows] == pytest.approx(done.losses, rel=1e-4)
    assert [row["lr"] for row in seen.rows] == pytest.approx(done.rates)
    # a short window whose step is longer without clipping, and would be shorter if its gradient were halved;
    # a whole window that is not clipped: the step along the sum of its gradients would be longer
    assert any(1.05 * seen.args.clip < norm < 1.9 * seen.args.clip for norm in done.norms[1::2]), done.norms
    assert any(norm < 0.95 * seen.args.clip for norm in done.norms[0::2]), done.norms
    states = [state for _, _, state in seen.plans[id(seen.train)]]
    assert not torch.equal(states[-1], states[-2])  # each epoch draws its own numbers
    orders = [order for order, _, _ in seen.plans[id(seen.train)]]
    assert all(not torch.equal(a, b) for i, a in enumerate(orders) for b in orders[:i])


def check_evaluation(seen, done, model_of=lambda net: net):
    """Validation after each epoch, test of the last epoch; scores are those of the weights above, in evaluation mode."""
    splits = [e.split for e in seen.evaluations]
    for epoch in (0, 1):
        evaluated, net = seen.evaluations[epoch], copy.deepcopy(seen.net)
        net.load_state_dict(done.states[epoch])
        split = evaluated.split
        assert split is splits[0] and split is not seen.train
        assert evaluated.score == pytest.approx(error(model_of(net), split, torch.arange(len(split))))
    last = seen.evaluations[2]
    assert last.split is not splits[0] and last.split is not seen.train and len(last.split) == 40
    assert seen.result["test_last"] == last.score == pytest.approx(error(model_of(net), last.split, torch.arange(40)))


def starts_as_pretrained(embedder, seen):
    return torch.equal(embedder.project.weight, seen.pretrained["patch_embed.proj.weight"])


def check_options(seen):
    """Encoder as pretrained, --dropout in each of its layers, source embedder as before."""
    encoder = getattr(seen.net, "model", seen.net).encoder
    assert all(torch.equal(v, seen.pretrained[k]) for k, v in encoder.state_dict().items())
    dropouts = [m for m in encoder.modules() if isinstance(m, nn.Dropout)]
    assert len(dropouts) >= 9 and all(m.p == 0.2 for m in dropouts)
    assert starts_as_pretrained(seen.sources[0].embedder, seen)


# ---------------------------------------------------------------------------------------------------------------------
# PaRe
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pare_run(backbone, tmp_path_factory):
    options = ["--clip", 1.6, "--init", "random", "--k-begin", 0.5, "--mix-weight", 0.3, "--temperature", 0.2]
    return recorded("pare", backbone, tmp_path_factory.mktemp("pare"), *RATE, *options)


@pytest.fixture(scope="module")
def pare_released_run(backbone, tmp_path_factory):
    options = ["--clip", 2.2, "--as-released", "--k-begin", 0.5, "--k-end", 0.25, "--mix-weight", 0.7]
    return recorded("pare", backbone, tmp_path_factory.mktemp("pare"), *RATE, *options)


def relaxed(scores, k, temperature):
    """p = sigmoid(s / tau - t), sum p = k, with dp_i / ds_j = w_i (delta_ij - w_j / sum w) / tau: one sample, (N,) -> (N,)"""
    s = scores.detach().double() / temperature
    low, high = s.min() - 20, s.max() + 20
    for _ in range(100):
        t = (low + high) / 2
        low, high = (t, high) if torch.sigmoid(s - t).sum() > k else (low, t)
    p = torch.sigmoid(s - t)
    w = (p * (1 - p)).float()
    linear = w * (scores - (w * scores).sum() / w.sum()) / temperature
    return linear - linear.detach()  # 0, with the gradient of p


def mix(tokens_t, tokens_s, scores_t, scores_s, k, temperature):
    """Line 4 for one sample: (N, D), (N_s, D) -> (N, D)"""
    by_t = sorted(range(N), key=lambda i: scores_t[i].item())
    by_s = sorted(range(N), key=lambda i: scores_s[i].item())
    replaced, chosen = sorted(by_t[:k]), sorted(by_s[-k:])
    p_t, p_s = relaxed(scores_t, N - k, temperature), relaxed(scores_s, k, temperature)
    mixed = []
    for i in range(N):
        if i in replaced:
            j = chosen[replaced.index(i)]
            mixed.append(tokens_s[j] * (1 + p_s[j]))
        else:
            mixed.append(tokens_t[i] * (1 + p_t[i]))
    return torch.stack(mixed)


def mix_as_released(tokens_t, tokens_s, scores_t, scores_s, k):
    """The official second phase: the k highest target tokens are replaced, the lowest of them by the highest source token."""
    by_t = sorted(range(N), key=lambda i: scores_t[i].item())
    by_s = sorted(range(N), key=lambda i: -scores_s[i].item())
    mixed = list(tokens_t)
    for place, i in zip(by_t[-k:], by_s[:k], strict=True):
        mixed[place] = tokens_s[i]
    return torch.stack(mixed)


def pare_loss(seen, schedule, weight, noise=0.0, phase2=2):
    """Lines 1 to 6. schedule: (k, lambda) of each epoch."""

    def loss(net, epoch, step):
        (x_t, y_t), (x_s, y_s) = (batches(seen, split, name, epoch, step)
                                  for split, name in ((seen.train, "cifar100"), (seen.source_set, "cifar10")))  # fmt: skip
        k, lam = schedule[epoch]
        X_t, X_s = embed_target(net.model.embedder, x_t), embed_source(seen, x_s)  # (B, N, D)
        score = lambda X: 1 / (1 + torch.exp(-(X @ net.gate.linear.weight[0] + net.gate.linear.bias)))  # (B, N)
        S_t, S_s = score(X_t), score(X_s)
        if epoch >= phase2:
            X_m = [mix_as_released(*sample, k) for sample in zip(X_t, X_s, S_t, S_s, strict=True)]
        else:
            if noise:  # Gumbel: the distribution of the largest of many
                S_t = S_t + noise * -torch.log(-torch.log(torch.rand(8, N)))
                S_s = S_s + noise * -torch.log(-torch.log(torch.rand(8, N)))
            X_m = [mix(*sample, k, seen.args.temperature) for sample in zip(X_t, X_s, S_t, S_s, strict=True)]
        F_t, F_m = encode(net.model.encoder, torch.cat([X_t, torch.stack(X_m)])).chunk(2)  # main's order of drawing
        of_target = cross_entropy(predict(net.model.predictor, F_m), y_t)
        of_source = cross_entropy(predict(net.predictor_s, F_m), y_s)
        L_mix = (1 - lam) * of_target + lam * of_source
        return cross_entropy(predict(net.model.predictor, F_t), y_t) + weight * L_mix

    return loss


def test_pare_takes_the_steps_of_the_paper(pare_run):
    seen = pare_run
    done = follow(seen, copy.deepcopy(seen.net), pare_loss(seen, [(8, 1.0), (4, 0.5)], 0.3))
    check(seen, done)
    check_evaluation(seen, done, lambda net: net.model)
    assert [(row["k"], row["lambda"]) for row in seen.rows] == [(8, 1.0), (4, 0.5)]


def test_pare_as_released_draws_noise_and_enters_its_second_phase(pare_released_run):
    seen = pare_released_run
    done = follow(seen, copy.deepcopy(seen.net), pare_loss(seen, [(8, 8 / N), (6, 6 / N)], 0.7, noise=1.0, phase2=1))
    check(seen, done)
    gate = [state["gate.linear.weight"] for state in done.states]
    assert torch.equal(*gate) and not torch.equal(gate[0], seen.net.gate.linear.weight)  # no gradient in the second phase


def test_pare_starts_as_told(pare_run, pare_released_run):
    for seen in (pare_run, pare_released_run):
        check_options(seen)
    assert not starts_as_pretrained(pare_run.net.model.embedder, pare_run)
    assert starts_as_pretrained(pare_released_run.net.model.embedder, pare_released_run)
    assert pare_run.net.model.predictor.linear.out_features == pare_run.train.classes
    assert pare_run.net.predictor_s.linear.out_features == pare_run.source_set.classes


# ---------------------------------------------------------------------------------------------------------------------
# LSG
# ---------------------------------------------------------------------------------------------------------------------


def lsg_loss(seen, nodes, edges, weights, vectors=None):
    """Lines 4 to 6, with the matrix A_a. nodes: T (n, d); edges: A (n, n); vectors: of a control, instead of the graph."""

    def loss(net, epoch, step):
        x, y = batches(seen, seen.train, "cifar100", epoch, step)
        features = encode(net.model.encoder, embed_target(net.model.embedder, x))
        h = sum(features.unbind(1)) / features.shape[1] @ net.projector.weight.T + net.projector.bias  # (B, d)
        if vectors is None:
            n, number = len(nodes), torch.arange(len(nodes)) // 20
            P, M = (number[:, None] == y).float(), (y[:, None] == y).float()  # (n, B), (B, B)
            A_a = torch.cat([torch.cat([edges, P], 1), torch.cat([P.T, M], 1)])
            root = torch.diag(A_a.sum(1) ** -0.5)
            G = F.leaky_relu(root @ A_a @ root @ torch.cat([nodes, h]) @ net.guide.gcn.W1, 0.2)
            align, g = cross_entropy((root @ A_a @ root @ G @ net.guide.gcn.W2)[n:], y), G[n:].detach()
        else:
            align, g = torch.zeros(()), vectors[y]
        distance = (h / h.norm(dim=1, keepdim=True) - g / g.norm(dim=1, keepdim=True)).square().sum(1).sqrt()
        return cross_entropy(predict(net.model.predictor, features), y) + weights[0] * align + weights[1] * distance.mean()

    return loss


@pytest.mark.parametrize("kind", ["graph", "released", "text"])
def test_lsg_guides_by_the_graph_or_by_vectors(backbone, tmp_path, kind):
    weights, options = {"graph": (0.7, 0.4), "released": (3, 0.2), "text": (0.7, 0.4)}[kind], ["--gcn-steps", 40]
    options += {"graph": [], "released": ["--as-released"], "text": ["--prototypes", "text"]}[kind]
    options += ["--align-weight", weights[0], "--regularise-weight", weights[1], "--clip", LSG_CLIP[kind]]
    seen = recorded("lsg", backbone, tmp_path, *RATE, *options)
    nodes, edges = (torch.from_numpy(np.load(next(tmp_path.glob(f"cache/names-*-{part}.npy")))) for part in "xy")
    if kind == "released":
        cosines = nodes @ nodes.T
        edges = cosines * (cosines >= cosines.flatten().sort(descending=True).values[int(0.003 * cosines.numel()) - 1])
        edges.fill_diagonal_(1)
    vectors = nodes.unflatten(0, (9, 20)).mean(1) if kind == "text" else None
    loss = lsg_loss(seen, nodes, edges, weights, vectors)
    done = follow(seen, copy.deepcopy(seen.net), loss, trains=lambda name, epoch: not name.startswith("guide."))
    check(seen, done)
    check_evaluation(seen, done, lambda net: net.model)
    check_options(seen)
    assert starts_as_pretrained(seen.net.model.embedder, seen)
    first, last = seen.rows
    assert {"align", "regularise"} <= first.keys() and last["regularise"] < first["regularise"]
    assert (last["align"] == 0) == (kind == "text")


# ---------------------------------------------------------------------------------------------------------------------
# The baselines
# ---------------------------------------------------------------------------------------------------------------------


def plain_loss(seen, first=0):
    def loss(net, epoch, step):
        x, y = batches(seen, seen.train, "cifar100", first + epoch, step)
        return cross_entropy(predict(net.predictor, encode(net.encoder, embed_target(net.embedder, x))), y)

    return loss


@pytest.fixture(scope="module")
def naive_run(backbone, tmp_path_factory):
    return recorded("finetune", backbone, tmp_path_factory.mktemp("naive"), *SETTING, pretend=[0.25, 0.75, 0.5, 0.375])


def test_naive_fine_tuning_takes_plain_steps(naive_run):
    check(naive_run, follow(naive_run, copy.deepcopy(naive_run.net), plain_loss(naive_run)))
    check_options(naive_run)
    assert starts_as_pretrained(naive_run.net.embedder, naive_run)


def body(name):
    return name.startswith("encoder.layers.") and any(part in name for part in ("attn.qkv.", "attn.proj.", "mlp.fc"))


TRAINS = {
    "warmup": lambda name, epoch: epoch == 1 or name.startswith("embedder."),  # the predictor waits, too
    "frozen": lambda name, epoch: not body(name),
    "probe": lambda name, epoch: name in ("predictor.linear.weight", "predictor.linear.bias"),
}


@pytest.mark.parametrize("mode", TRAINS)
def test_baselines_train_the_parts_they_say(backbone, tmp_path, mode):
    options = ["--mode", mode, "--init", "random", *(["--warmup-share", 0.5] if mode == "warmup" else [])]
    seen = recorded("finetune", backbone, tmp_path, *SETTING, *options)
    done = follow(seen, copy.deepcopy(seen.net).requires_grad_(), plain_loss(seen), TRAINS[mode])
    same(done.states[-1], weights(seen.folder))
    check_evaluation(seen, done)
    assert not starts_as_pretrained(seen.net.embedder, seen)


def test_the_test_error_is_that_of_the_epoch_that_was_best_on_validation(naive_run):
    seen = naive_run
    done = follow(seen, copy.deepcopy(seen.net), plain_loss(seen))
    tests = seen.evaluations[2:]  # validation was said to be 0.25, then 0.75; the tests 0.5, then 0.375
    assert seen.result["best_epoch"] == 1 and seen.result["val"] == 0.25 and len(tests) == 2
    assert seen.result["test_last"] == 0.5 and seen.result["test"] == 0.375
    same(done.states[1], tests[0].state)
    same(done.states[0], tests[1].state)
    same(done.states[0], load_file(seen.folder / "best.safetensors"))
    assert tests[0].split is tests[1].split and len(tests[0].split) == 40


def test_of_equal_epochs_the_first_is_the_best(backbone, tmp_path):
    assert recorded("finetune", backbone, tmp_path, *SETTING, pretend=[0.25, 0.25, 0.5, 0.375]).result["best_epoch"] == 1


def test_scratch_keeps_nothing_of_the_pretrained_weights(backbone, tmp_path):
    seen = recorded("finetune", backbone, tmp_path, *SETTING, "--mode", "scratch", "--epochs", 1)
    encoder = seen.net.encoder.state_dict()
    kept = [k for k, v in encoder.items() if v.is_floating_point() and torch.equal(v, seen.pretrained[k])]
    assert len(encoder) > 30 and not kept
    embedder = seen.net.embedder
    assert not starts_as_pretrained(embedder, seen) and not starts_as_pretrained(seen.sources[0].embedder, seen)
    assert not torch.equal(embedder.project.weight, seen.sources[0].embedder.project.weight)  # the random source's is no start


def test_naive_as_released_starts_truncated(backbone, tmp_path):
    seen = recorded("finetune", backbone, tmp_path, *SETTING, "--as-released", "--epochs", 1)
    start = seen.net.embedder.project.weight
    assert start.std().item() == pytest.approx(0.02, rel=0.15) and start.abs().max() < 0.1
    with pytest.raises(cli.UserError, match="Leave out --init random"):
        here("finetune", "--as-released", "--init", "random", out=tmp_path)


def test_evaluation_is_repeatable_and_training_is_not(naive_run):
    seen = naive_run
    net, split = copy.deepcopy(seen.net), seen.evaluations[2].split
    task = SimpleNamespace(score=lambda out, y: float(np.abs(out - y[:, None]).sum()))
    values = [seen.run.evaluate(net.train(), split, task) for _ in range(2)]
    assert values[0] == values[1] and not net.training
    x = images(split, "cifar100", torch.arange(40))
    assert values[0] == pytest.approx((net(x) - split.y[:, None]).abs().sum().item(), rel=1e-5)
    assert not torch.allclose(net.train()(x), net(x))  # dropout and drop path: the runs above tell the modes apart


# ---------------------------------------------------------------------------------------------------------------------
# ORCA
# ---------------------------------------------------------------------------------------------------------------------


ORCA = [*SETTING, "--embedder-epochs", 2, "--max-samples", 2]


@pytest.fixture(scope="module")
def orca_run(backbone, tmp_path_factory):
    return recorded("orca", backbone, tmp_path_factory.mktemp("orca"), *ORCA, "--classes-per-problem", 4, "--init", "random")


@pytest.fixture(scope="module")
def orca_released_run(backbone, tmp_path_factory):
    return recorded("orca", backbone, tmp_path_factory.mktemp("orca"), *ORCA, "--as-released", "--reg", 0)


def transport(cost, a, b):
    """min over plans pi of <pi, cost> by scipy's general linear program, the plan held constant."""
    n, m = cost.shape
    marginals = np.concatenate([np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))])
    pi = linprog(cost.detach().double().numpy().ravel(), A_eq=marginals, b_eq=np.concatenate([a, b])).x
    return (torch.from_numpy(pi.reshape(n, m)).float() * cost).sum()


def stage1_of_orca(seen, labels=True):
    """Lines 1 to 4 on the samples that main drew. Returns the embedder, and the distance before each step."""
    embedder = copy.deepcopy(seen.before)
    parameters, velocity, distances = dict(embedder.named_parameters()), {}, []
    with torch.no_grad():
        x_s = images(seen.source_set, "cifar10", torch.arange(len(seen.source_set)))
        u_s, y_s = embed_source(seen, x_s).mean(1), seen.source_set.y  # (n, D)
    squared = lambda a, b: (a[:, None] - b[None]).square().sum(2)
    uniform = lambda n: np.full(n, 1 / n)
    n = len(seen.train)
    for problems in problems_of_epochs(seen):
        total = 0
        for index in problems:
            u_t = embed_target(embedder, images(seen.train, "cifar100", index)).mean(1)  # (m, D)
            y_t = seen.train.y[index]
            C = squared(u_s, u_t) / 2
            if labels:  # + W^2 / 2
                W = {(a, b): transport(squared(u_s[y_s == a], u_t[y_t == b]), uniform(sum(y_s == a)), uniform(sum(y_t == b)))
                     for a in y_s.unique().tolist() for b in y_t.unique().tolist()}  # fmt: skip
                C = C + torch.stack([torch.stack([W[a, b] for b in y_t.tolist()]) for a in y_s.tolist()]) / 2
            mass = np.array([(seen.train.y == c).sum().item() / n / (y_t == c).sum().item() for c in y_t])  # n_c / n a class
            total = total + float(mass.sum()) * transport(C, uniform(len(u_s)), mass / mass.sum())
        gradients = torch.autograd.grad(total, list(parameters.values()))
        sgd_by_hand(parameters, dict(zip(parameters, gradients, strict=True)), velocity, seen.args.lr, seen.args)  # lr > 1e-3
        distances.append(total.item())
    return embedder, distances


def problems_of_epochs(seen):
    drawn = [index for split, index in seen.problems if split is seen.train]
    return [drawn[: len(drawn) // 2], drawn[len(drawn) // 2 :]]


@pytest.mark.parametrize("released", [False, True])
def test_orca_aligns_the_embedder_then_refines_from_it(released, request):
    seen = request.getfixturevalue("orca_released_run" if released else "orca_run")
    embedder, distances = stage1_of_orca(seen, labels=not released)
    start = {k: v.clone() for k, v in seen.before.state_dict().items()}
    assert all((v - start[k]).abs().max() > 1e-3 for k, v in embedder.state_dict().items())
    same(embedder.state_dict(), seen.net.embedder.state_dict())
    same({f"embedder.{k}": v for k, v in embedder.state_dict().items()}, load_file(seen.folder / "stage1.safetensors"))
    stage1 = [row["distance"] for row in rows(seen.folder) if "stage" in row]
    assert stage1 == pytest.approx(distances, rel=1e-4)
    net = copy.deepcopy(seen.net)
    net.embedder.load_state_dict(embedder.state_dict())
    done = follow(seen, net, plain_loss(seen))
    check(seen, done)
    check_evaluation(seen, done)
    check_options(seen)
    assert starts_as_pretrained(seen.before, seen) == released  # --init


def test_orca_draws_classes_and_samples_as_told(orca_run, orca_released_run):
    sizes = orca_run.train.y.unique(return_counts=True)[1].tolist()
    assert max(sizes) > 2 and len(set(sizes)) > 1  # classes of several sizes, some above --max-samples 2
    for seen, most in ((orca_run, 4), (orca_released_run, 1)):
        epochs = problems_of_epochs(seen)
        for problems in epochs:
            classes = [seen.train.y[index].unique().tolist() for index in problems]
            assert sorted(c for group in classes for c in group) == seen.train.y.unique().tolist()  # each class once
            assert len(classes) == -(-len(sizes) // most) and all(len(group) == most for group in classes[:-1])
            drawn = torch.cat(problems)
            assert len(drawn.unique()) == len(drawn) == sum(min(2, size) for size in sizes)
        assert set(torch.cat(epochs[0]).tolist()) != set(torch.cat(epochs[1]).tolist())  # drawn anew


class Fixed:
    """Stands in for the embedded target: what `align` hands to a distance can be seen without embedding anything."""

    def __init__(self, patch, n=12, classes=2):
        self.y, self.calls, self.rates = torch.arange(n) % classes, [], []
        self.embedder = nn.Linear(3, 3)
        self.x = torch.randn(n, 3, generator=torch.Generator().manual_seed(0))
        patch.setattr(orca, "embed_all", lambda embedder, train, index: embedder(self.x[index]))
        original = orca.make_optimizer

        def make_optimizer(*args):
            optimizer = original(*args)
            optimizer.register_step_pre_hook(lambda optimizer, *_: self.rates.append(optimizer.param_groups[0]["lr"]))
            return optimizer

        patch.setattr(orca, "make_optimizer", make_optimizer)

    def align(self, **options):
        args = data.complete(orca.Args(scale="tiny", backbone="tiny-swin", **options), "orca", "tiny")
        return orca.align(self.embedder, torch.randn(20, 3), torch.arange(20) % 4, None, self.y, args)


def test_the_rate_of_orcas_first_stage_falls_to_a_fifth_after_21_41_and_61_epochs(monkeypatch):
    fixed = Fixed(monkeypatch)
    fixed.align(embedder_epochs=62, objective="l2", embedder_lr=0.5)
    expected = [0.5] * 21 + [0.1] * 20 + [0.02] * 20 + [0.004]
    assert fixed.rates == pytest.approx(expected)


@pytest.mark.parametrize("lr, expected", [(0.002, 0.002), (0.0005, 0.005)])
def test_the_rate_of_orcas_first_stage_is_ten_times_a_small_one(monkeypatch, lr, expected):
    fixed = Fixed(monkeypatch)
    fixed.align(embedder_epochs=1, objective="l2", lr=lr)
    assert fixed.rates == pytest.approx([expected])


def test_mmd_is_to_as_many_source_samples_of_all_of_them(monkeypatch):
    sizes, rows_, original = [], set(), common.mmd

    def mmd(u_s, u_t):
        sizes.append((len(u_s), len(u_t)))
        rows_.update(map(tuple, u_s.tolist()))
        return original(u_s, u_t)

    monkeypatch.setattr(common, "mmd", mmd)
    Fixed(monkeypatch).align(embedder_epochs=5, objective="mmd", max_samples=5)
    assert sizes == [(5, 5)] * 10 and len(rows_) > 10


# ---------------------------------------------------------------------------------------------------------------------
# MoNA
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mona_run(backbone, tmp_path_factory):
    return recorded("mona", backbone, tmp_path_factory.mktemp("mona"), *SETTING, "--init", "random", "--meta-epochs", 1,
                    "--meta-lr", 0.05, "--inner-lr", 0.2, "--lambda", 0.7, "--gradient", "exact")  # fmt: skip


def stage1_of_mona(seen):
    """Lines 1 to 5, differentiated through the virtual step. Returns the model."""
    args, model, velocity = seen.args, copy.deepcopy(seen.before), {}
    model.eval()
    moving = {k: p for k, p in model.named_parameters() if not k.startswith("encoder.")}
    theta = {k: p for k, p in model.named_parameters() if k.startswith("encoder.")}
    whole = nn.Module()  # the encoder as a function of its weights
    whole.encoder, whole.forward = model.encoder, lambda tokens: encode(whole.encoder, tokens)
    for step in range(STEPS):
        x_t, y_t = batches(seen, seen.train, "cifar100", 0, step)
        x_s, y_s = batches(seen, seen.source_set, "cifar10", 0, step)
        assert len(y_s) == 32
        with sdpa_kernel(SDPBackend.MATH):
            features = functional_call(whole, theta, embed_target(model.embedder, x_t))
            L_inner = cross_entropy(predict(model.predictor, features), y_t)
            slope = torch.autograd.grad(L_inner, list(theta.values()), create_graph=True)
            theta_star = {k: p - 0.2 * g for (k, p), g in zip(theta.items(), slope, strict=True)}
            f = functional_call(whole, theta_star, embed_source(seen, x_s)).mean(1)  # (32, F)
            f = f / f.norm(dim=1, keepdim=True)
            d = {(i, j): (f[i] - f[j]).square().sum() for i in range(32) for j in range(i)}
            close = torch.stack([v for (i, j), v in d.items() if y_s[i] == y_s[j]])
            L_outer = close.mean() + torch.stack([torch.exp(-2 * v) for v in d.values()]).mean().log()
            names = list(moving)
            inner = dict(zip(names, torch.autograd.grad(L_inner, moving.values(), retain_graph=True), strict=True))
            outer = torch.autograd.grad(L_outer, moving.values(), allow_unused=True)
        outer = dict(zip(names, outer, strict=True))
        gradients = {k: g + 0.7 * outer[k] if k.startswith("embedder.") else g for k, g in inner.items()}
        gradients, _ = clip_by_hand(gradients, args.clip)
        sgd_by_hand(moving, gradients, velocity, 0.05, args)
    return model


def test_mona_looks_one_step_ahead_then_refines_from_there(mona_run):
    seen = mona_run
    model = stage1_of_mona(seen)
    start = seen.before.state_dict()
    assert (model.embedder.project.weight - start["embedder.project.weight"]).abs().max() > 1e-3
    same(model.state_dict(), seen.net.state_dict())
    kept = load_file(seen.folder / "stage1.safetensors")
    same({k: v for k, v in model.state_dict().items() if k in kept}, kept)
    done = follow(seen, model, plain_loss(seen, first=1), first=1)
    check(seen, done)
    check_evaluation(seen, done)
    check_options(seen)
    assert not starts_as_pretrained(seen.before.embedder, seen)  # --init


# ---------------------------------------------------------------------------------------------------------------------
# What the runs share
# ---------------------------------------------------------------------------------------------------------------------


def seconds_of(folder):
    return sum(json.loads(line)["seconds"] for line in (folder / "metrics.jsonl").read_text().splitlines())


def test_a_stopped_run_resumes_with_the_weights_of_an_uninterrupted_one(naive_run, backbone, tmp_path, monkeypatch):
    original = run.Run.end_epoch

    def stop_after_the_first(self, *args):
        original(self, *args)
        if len(self.history) == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run.Run, "end_epoch", stop_after_the_first)
        recorded("finetune", backbone, tmp_path, *SETTING, pretend=[0.25])
    again = recorded("finetune", backbone, tmp_path, *SETTING, "--resume", pretend=[0.75, 0.5, 0.375])
    assert all(torch.equal(v, weights(naive_run.folder)[k]) for k, v in weights(again.folder).items())
    assert again.rows == naive_run.rows
    assert again.result["seconds"] == pytest.approx(seconds_of(again.folder), abs=0.06)
    kept = ("test", "test_last", "val", "best_epoch")
    assert [again.result[k] for k in kept] == [naive_run.result[k] for k in kept] == [0.375, 0.5, 0.25, 1]


def test_training_validation_and_test_are_disjoint(naive_run):
    train, val, test = naive_run.train, naive_run.evaluations[0].split, naive_run.evaluations[2].split
    images_of = [{x.numpy().tobytes() for x in split.x} for split in (train, val, test)]
    assert [len(part) for part in images_of] == [31, 3, 40] == [len(split) for split in (train, val, test)]
    assert len(set.union(*images_of)) == 31 + 3 + 40


def test_classes_are_counted_from_0():
    assert data.count_classes("class", np.array([0, 3, 1])) == 4
    assert data.count_classes("labels", np.zeros((2, 5))) == 5 and data.count_classes("field", np.zeros((2, 5))) is None


def test_the_first_chunk_does_not_stand_for_its_clip():
    out = np.array([[1.0], [-4.0], [0.0]])  # logits of one label in two chunks of clip 0, in one of clip 1
    y = np.array([[0.0, 0], [0, 0], [1, 1]])  # label, clip
    assert scores.clip_map_error(out, y) == 0  # means -1.5 and 0: the clip with the label comes first


def test_words_get_no_start_and_end_tokens():
    rules = Rules(WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2, "word": 3}, unk_token="<unk>"))
    rules.pre_tokenizer = Whitespace()
    rules.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    vocabulary = PreTrainedTokenizerFast(tokenizer_object=rules)
    assert vocabulary("word")["input_ids"] == [0, 3, 1]
    assert backbones.Tokenizer(lambda: vocabulary)(["word", "other"]) == [3, 2]
