"""LSG's graph, its GCN and what they say of samples; the names of classes; LSG end to end."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import SHORT, here, rows, weights
from official import full, write_cifar100, write_ecg, write_fsd50k, write_openml
from safetensors.torch import load_file
from tokenizers import Tokenizer as Rules
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

import cli
import common
import data
import lsg
from lsg import P
from tools import names

K, D = 6, 16
ARGS = SimpleNamespace(as_released=False, gcn_steps=None)
TASK = data.TASKS["cifar100"]


def nodes(seed=0, spread=0.15, classes=K):
    """Unit vectors (classes P, D) around a direction for each class."""
    generator = torch.Generator().manual_seed(seed)
    centres = F.normalize(torch.randn(classes, D, generator=generator), dim=1).repeat_interleave(P, 0)
    return F.normalize(centres + spread * torch.randn(classes * P, D, generator=generator), dim=1)


def trained(t, A, seed=0, task=TASK, args=ARGS):
    torch.manual_seed(seed)
    gcn = lsg.GCN(D, len(t) // P)
    return gcn, lsg.train_gcn(gcn, t, A, task, args)


# ---- the graph


def test_the_graph_is_symmetric_with_cliques_self_loops_and_so_many_edges_between_classes():
    t, number = nodes(), torch.arange(K * P) // P
    same, n, before = number[:, None] == number, K * P, torch.zeros(K * P, K * P, dtype=torch.bool)
    cosines = (t @ t.T).clamp(min=0)
    for ratio in (0, 0.003, 0.02, 0.1, 1):
        A = lsg.label_graph(t, ratio)
        assert torch.equal(A, A.T) and A.min() >= 0 and torch.allclose(A.diag(), torch.ones(n))
        assert torch.allclose(A[same], cosines[same], atol=1e-6)
        between = (A > 0) & ~same
        possible = int((cosines[~same] > 0).sum())
        assert abs(between.sum().item() - min(int(ratio * n * n), possible)) <= 1  # an edge has two entries
        assert (between | ~before).all()  # monotone in r
        kept, left_out = cosines[between], cosines[~same & ~between]
        assert not len(kept) or not len(left_out) or kept.min() >= left_out.max() - 1e-6
        before = between
        if not ratio:
            assert not between.any()


def test_the_released_graph_of_stage_2_asks_for_no_class():
    """Row L1: where prompts of a class are closest, no edge between classes is left, and some nodes have only themselves."""
    t = nodes(spread=0.05)
    A = lsg.label_graph(t, 0.03, released=True)
    number = torch.arange(len(t)) // P
    assert torch.equal(A, A.T) and (A.diag() > 0.99).all() and not A[number[:, None] != number].any()
    assert abs((A > 0).sum().item() - int(0.03 * len(t) ** 2)) <= 1
    assert torch.allclose(lsg.label_graph(t, 0, released=True), torch.eye(len(t)))
    assert ((A > 0).sum(1) == 1).any() and ((lsg.label_graph(t, 0.03) > 0).sum(1) >= P).all()


def test_a_clique_averages():
    clique = torch.block_diag(torch.ones(3, 3), torch.ones(5, 5))
    spread = lsg.normalised(clique)
    assert torch.allclose(spread.sum(1), torch.ones(8)) and torch.allclose(spread[0, :3], torch.full((3,), 1 / 3))
    A = lsg.label_graph(nodes(), 0.02)
    assert torch.allclose(lsg.normalised(A), A / (A.sum(1)[:, None] * A.sum(0)).sqrt())


# ---- the GCN


@pytest.mark.parametrize("released", [False, True])
def test_the_gcn_learns_as_in_a_plain_loop(released):
    t, steps = nodes(spread=0.4), 3
    A = lsg.label_graph(t, 0.02)
    gcn, found = trained(t, A, args=SimpleNamespace(as_released=released, gcn_steps=steps))
    torch.manual_seed(0)
    start = lsg.GCN(D, K)
    W1, W2 = (w.detach().clone().requires_grad_() for w in (start.W1, start.W2))
    assert W1.abs().max() <= D**-0.5 and 0.9 * K**-0.5 < W2.abs().max() <= K**-0.5
    D_root = torch.diag(1 / A.sum(1).sqrt())
    spread, y = D_root @ A @ D_root, torch.arange(K * P) // P
    sgd = torch.optim.SGD([W1, W2], lr=0.01, momentum=0.9, weight_decay=1e-4, nesterov=True)
    optimizer = sgd if released else torch.optim.Adam([W1, W2], lr=1e-3)
    for _ in range(steps):
        before = spread @ t @ W1
        out = spread @ torch.where(before > 0, before, 0.2 * before) @ W2
        out = out / out.norm(dim=1, keepdim=True) if released else out
        loss = -(out.softmax(1)[torch.arange(K * P), y]).log().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.allclose(gcn.W1, W1, atol=1e-5) and torch.allclose(gcn.W2, W2, atol=1e-5)
    assert found[-1]["GCN loss"] == pytest.approx(loss.item(), rel=1e-4) and [row["epoch"] for row in found] == [1, 2, 3]
    assert found[-1]["GCN error"] == pytest.approx((out.argmax(1) != y).float().mean().item())


def test_the_gcn_learns_orthogonal_classes_and_its_released_loss_has_a_floor():
    t = torch.eye(D)[:K].repeat_interleave(P, 0)
    A = lsg.label_graph(t, 0)
    _, found = trained(t, A)
    assert len(found) == 10 and (found[-1]["epoch"], found[-1]["GCN error"]) == (200, 0)
    assert found[-1]["GCN loss"] < 1.2
    _, released = trained(t, A, args=SimpleNamespace(as_released=True, gcn_steps=600))
    floor = math.log(1 + (K - 1) * math.exp(-((K / (K - 1)) ** 0.5)))  # L2: 0.98; of 100 classes 3.617
    assert floor - 1e-4 < released[-1]["GCN loss"] < floor + 0.2


def test_the_order_of_the_classes_does_not_matter():
    t, order = nodes(spread=0.3), torch.randperm(K)
    by_class = lambda v: v.unflatten(0, (K, P))[order].flatten(0, 1)
    A, gcn = lsg.label_graph(t, 0.02), trained(t, lsg.label_graph(t, 0.02))[0]
    moved = lsg.GCN(D, K)
    moved.load_state_dict({"W1": gcn.W1, "W2": gcn.W2[:, order]})
    assert torch.equal(lsg.label_graph(by_class(t), 0.02), by_class(by_class(A).T))
    h, y = torch.randn(10, D), torch.randint(K, (10,))
    g, o = lsg.LabelGraph(t, A, gcn)(h, F.one_hot(order[y], K).float())  # class order[y] is number y of the moved
    g_moved, o_moved = lsg.LabelGraph(by_class(t), by_class(by_class(A).T), moved)(h, F.one_hot(y, K).float())
    assert torch.allclose(g, g_moved, atol=1e-6) and torch.allclose(o[:, order], o_moved, atol=1e-5)


# ---- samples in the graph


def dense(t, A, gcn, h, Y):
    """Line 5 with the matrix A_a."""
    B, n, number = len(h), len(t), torch.arange(len(t)) // P
    A_a = torch.zeros(n + B, n + B)
    A_a[:n, :n] = A
    for j in range(B):
        for node in range(n):
            A_a[node, n + j] = A_a[n + j, node] = Y[j, number[node]]
        for i in range(B):
            A_a[n + i, n + j] = float(i == j or bool((Y[i] * Y[j]).any()))
    A_hat = A_a / (A_a.sum(1)[:, None] * A_a.sum(0)).sqrt()
    G = F.leaky_relu(A_hat @ torch.cat([t, h]) @ gcn.W1, 0.2)
    return G[n:], (A_hat @ G @ gcn.W2)[n:]


@pytest.mark.parametrize("labels", [1, 2])
def test_the_closed_form_is_the_dense_graph_and_samples_of_a_class_are_one(labels):
    t = nodes(spread=0.3)
    A = lsg.label_graph(t, 0.03)
    gcn, _ = trained(t, A)
    y = torch.tensor([0, 0, 3, 5, 0, 5, 1, 3])
    Y = F.one_hot(y, K).float()
    if labels == 2:
        Y = Y + F.one_hot((y + torch.arange(8) % 2 + 1) % K, K)
        Y[7] = 0  # a sample without a label is alone
    h = (2 * torch.randn(8, D)).requires_grad_()
    g, o = lsg.LabelGraph(t, A, gcn)(h, Y)
    for ours, theirs in zip((g, o), dense(t, A, gcn, h, Y), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
        slopes = [torch.autograd.grad(v.square().sum(), h, retain_graph=True)[0] for v in (ours, theirs)]
        assert torch.allclose(*slopes, atol=1e-4)
    if labels == 1:  # L3 and L4
        assert torch.equal(g[0], g[1]) and torch.equal(o[0], o[4]) and not torch.allclose(g[0], g[2], atol=0.1)
        g_0, o_0 = lsg.LabelGraph(t, A, gcn)(torch.zeros(8, D), Y)
        assert (o_0.argmax(1) == y).all()  # features of 0 are classified: the label is in the graph


def test_equal_names_have_equal_vectors():
    t = nodes(spread=0.3)
    t[P : 2 * P] = t[:P]
    A = lsg.label_graph(t, 0.02)
    gcn, _ = trained(t, A)
    g, _ = lsg.LabelGraph(t, A, gcn)(torch.zeros(K, D), torch.eye(K))
    assert torch.allclose(g[0], g[1], atol=1e-6) and not torch.allclose(g[0], g[2], atol=0.05)
    p = lsg.class_vectors("text", t, K, 0)
    assert torch.allclose(p[0], p[1], atol=1e-6) and torch.allclose(p[2], F.normalize(t[2 * P : 3 * P].mean(0), dim=0))


def test_random_and_simplex_prototypes_treat_all_classes_alike():
    for kind, cosine in (("random", 0), ("simplex", -1 / (K - 1))):
        p = lsg.class_vectors(kind, None, K, 0)
        wanted = torch.full((K, K), float(cosine)).fill_diagonal_(1)
        assert torch.allclose(p @ p.T, wanted, atol=1e-6)
    assert not torch.equal(p, lsg.class_vectors("random", None, K, 0))
    assert not torch.allclose(*(lsg.class_vectors("random", None, K, seed) for seed in (0, 1)), atol=0.1)
    g, o = lsg.Prototypes(p)(torch.randn(2, K), torch.tensor([[0, 0, 1.0, 0, 0, 0], [1, 1, 0, 0, 0, 0]]))
    assert torch.equal(g[0], p[2]) and torch.allclose(g[1], p[0] + p[1]) and o is None


def test_regularisation_is_a_distance_and_its_target_is_constant():
    e = torch.eye(3)
    for h, g, value in ((e[0], 5 * e[0], 0), (e[0], -e[0], 2), (3 * e[0], e[1], 2**0.5)):
        assert lsg.regularisation(h[None], g[None]).item() == pytest.approx(value)
    h = torch.randn(4, 3, requires_grad=True)
    weight = torch.randn(3, 3)
    slope = torch.autograd.grad(lsg.regularisation(h, h @ weight), h)[0]
    constant = torch.autograd.grad(lsg.regularisation(h, (h @ weight).detach()), h)[0]
    cosine = F.cosine_similarity(h, (h @ weight).detach())
    by_hand = torch.autograd.grad((2 - 2 * cosine).sqrt().mean(), h)[0]
    assert torch.equal(slope, constant) and torch.allclose(slope, by_hand, atol=1e-6)
    assert torch.isfinite(torch.autograd.grad(lsg.regularisation(h, h), h)[0]).all()


# ---- names, and what reads them


def small_bert():
    """A BERT of two layers, with words of its own, and [CLS] and [SEP] around a text."""
    words = "[UNK] [PAD] [CLS] [SEP] a photo of plain ring that shows with in it and little else this is".split()
    vocabulary = PreTrainedTokenizerFast(
        tokenizer_object=Rules(WordLevel({word: i for i, word in enumerate(words)}, "[UNK]")), unk_token="[UNK]",
        pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
    )  # fmt: skip
    vocabulary.backend_tokenizer.pre_tokenizer = Whitespace()
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, max_position_embeddings=40)
    config = BertConfig(vocab_size=len(words), **sizes)
    torch.manual_seed(0)
    model = BertModel(config, add_pooling_layer=False).eval()
    tokenizer = common.Tokenizer(lambda: vocabulary)
    encoder = common.TextEncoder(model)
    source = common.Source("small", "1d", model.embeddings, encoder, 32, 32, positions=40, tokenizer=tokenizer)
    return source, model, vocabulary


def test_the_tokens_of_a_name_are_found_wherever_it_stands(roberta):
    vocabulary = roberta.tokenizer.vocabulary
    several = ["dog", "sweet_pepper", "wave of 4.5 periods", "Zipper_(clothing)", "skyscraper"]
    prompts = lsg.tokenise(roberta, several, "a photo")
    assert len(prompts) == len(several) * P
    pieces = {len(vocabulary.tokenize(" " + name)) for name in several}
    assert 1 in pieces and max(pieces) >= 4
    for i, name in enumerate(several):
        found = [(vocabulary.decode(ids), vocabulary.decode(ids[where]), where.start) for ids, where in prompts[i * P :][:P]]
        spoken = name.replace("_", " ")
        text = lambda words: " ".join(words.replace(" (", "(").replace("( ", "(").split())
        for template, (whole, part, _) in zip(lsg.TEMPLATES, found, strict=True):
            assert text(part) == text(spoken)
            assert text(whole) == text(template.replace("{x}", "a photo").replace("{c}", spoken))
        assert 0 in {start for *_, start in found}  # at the start of a sentence, too
        assert len({tuple(ids[where]) for ids, where in prompts[i * P :][:P]}) == 1
    source, *_ = small_bert()
    ids, where = lsg.tokenise(source, ["plain_ring"], "a photo")[0]
    assert source.tokenizer.vocabulary.convert_ids_to_tokens(ids) == "[CLS] a photo of plain ring [SEP]".split()
    assert (where.start, where.stop) == (4, 6)
    with pytest.raises(cli.UserError, match="small has no token for the class name '_'"):
        lsg.tokenise(source, ["_"], "a photo")
    with pytest.raises(cli.UserError, match=f"small takes {source.positions} tokens, the longest class name needs "):
        lsg.tokenise(source, ["ring", "plain " * source.positions], "a photo")


def test_a_prompt_is_the_mean_over_its_names_tokens():
    source, model, vocabulary = small_bert()
    prompts = lsg.tokenise(source, ["plain_ring", "ring"], "a photo")
    t = lsg.embed_prompts(source, prompts, "cpu")
    assert t.shape == (2 * P, 32) and torch.allclose(t.norm(dim=1), torch.ones(2 * P))
    model.eval()
    for i in (0, 1, 7, P, 2 * P - 1):
        ids, where = prompts[i]
        with torch.no_grad():
            hidden = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        mean = sum(hidden[j] for j in range(where.start, where.stop)) / (where.stop - where.start)
        assert torch.allclose(t[i], mean / mean.norm(), atol=1e-5)


def test_nodes_and_edges_are_computed_once(tmp_path, monkeypatch, capsys):
    loaded = SimpleNamespace(task=replace(TASK, names=("ring", "cross")), train=SimpleNamespace(kind="official", classes=2))
    args = lsg.Args(text_encoder="tiny-roberta", out_dir=str(tmp_path), edge_ratio=0.1)
    torch.manual_seed(0)
    t, A = lsg.label_nodes(loaded, args, "cpu")
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(1))  # what the model is built from is not taken from the run
    assert torch.equal(A, lsg.label_graph(t, 0.1)) and len(t) == 2 * P
    assert "hardly knows what the names mean" in capsys.readouterr().out
    files = set(tmp_path.glob("cache/*"))
    assert len(files) == 2

    def never(*_):
        raise AssertionError

    with monkeypatch.context() as patch:
        patch.setattr(lsg, "embed_prompts", never)
        again = lsg.label_nodes(loaded, args, "cpu")
        assert all(torch.equal(ours, theirs) for ours, theirs in zip((t, A), again, strict=True))
        load = common.load_source

        def another(name):
            source = load(name)
            with torch.no_grad():
                source.encoder.layers.layer[0].output.dense.bias[0] += 1e-3
            return source

        changes = [(loaded, replace(args, edge_ratio=0.2))]
        changes += [(SimpleNamespace(task=replace(loaded.task, **change), train=loaded.train), args)
                    for change in (dict(sample="a recording"), dict(names=("ring", "star")))]  # fmt: skip
        for change in changes:
            with pytest.raises(AssertionError):
                lsg.label_nodes(*change, "cpu")
        patch.setattr(common, "load_source", another)
        with pytest.raises(AssertionError):
            lsg.label_nodes(loaded, args, "cpu")
    for kind in ("random", "simplex"):
        assert lsg.label_nodes(loaded, replace(args, prototypes=kind), "cpu") == (None, None)
    with pytest.raises(cli.UserError, match="--text-encoder: tiny-swin is a Swin"):
        lsg.label_nodes(loaded, replace(args, text_encoder="tiny-swin"), "cpu")
    with pytest.raises(cli.UserError, match="--text-encoder: no model is called 'bert'"):
        lsg.label_nodes(loaded, replace(args, text_encoder="bert"), "cpu")


def test_names_come_from_the_official_files(tmp_path):
    write_cifar100(tmp_path)
    assert data.class_names(full("cifar100", tmp_path), tmp_path) == tuple(f"name_{i}" for i in range(100))
    spherical = full("spherical", tmp_path)  # projected from the same images
    assert data.class_names(spherical, tmp_path)[99] == "name_99"
    (tmp_path / "cifar-100-python/meta").unlink()
    with pytest.raises(cli.Missing, match=r"no .*meta.*\n`python data.py --prepare cifar100`"):
        data.class_names(spherical, tmp_path)
    (tmp_path / "cifar-100-python/meta").write_bytes(b"")
    with pytest.raises(cli.UserError, match="meta is not a readable pickle"):
        data.class_names(spherical, tmp_path)
    write_ecg(tmp_path)
    assert data.class_names(full("ecg", tmp_path), tmp_path)[1] == "atrial fibrillation"
    write_fsd50k(tmp_path)
    assert data.class_names(full("fsd50k", tmp_path), tmp_path) == tuple(f"class{i}" for i in range(200))


def test_a_table_has_names_if_its_categories_are_words(tmp_path):
    for number, categories in ((31, ["good", "bad"]), (37, ["1", "2"]), (44, ["class_0", "class_1"]), (38, ["yes", "no"])):
        table = [[i, categories[i % 2]] for i in range(40)]
        write_openml(tmp_path, number, [("a", None), ("class", categories)], table)
        loaded = full(f"openml{number}", tmp_path)
        if number == 31:
            assert data.class_names(loaded, tmp_path) == ("bad", "good")  # sorted, as the labels are numbered
        else:
            with pytest.raises(cli.UserError, match=f"openml{number} has no class names: the categories"):
                data.class_names(loaded, tmp_path)
    assert data.class_names(full("openml1510", tmp_path), tmp_path) == ("malignant", "benign")  # scikit-learn's order
    with pytest.raises(cli.UserError, match="openml187 has no class names"):
        data.class_names(full("openml187", tmp_path), tmp_path)


def test_a_task_without_names_says_why():
    def asked(task, origin, classes=9, **changes):
        train = SimpleNamespace(kind=origin, classes=classes)
        return data.class_names(SimpleNamespace(task=replace(data.find_task(task), **changes), train=train), "none")

    assert asked("spherical", "toy") == data.TASKS["cifar100"].toy_names and asked("cifar100", "toy", 4)[3] == "plain triangle"
    assert asked("ecg", "toy", 4)[2] == "wave of 4.5 periods" and asked("fsd50k", "toy", 6)[1] == "wave of 300 periods"
    for task, why in (("satellite", "no list says which is which"), ("deepsea", "is not recorded"), ("ninapro", "which order")):
        with pytest.raises(cli.UserError, match=f"{task} has no class names: .*{why}"):
            asked(task, "official")
    with pytest.raises(cli.UserError, match="satellite has no class names: its toy data have none"):
        asked("satellite", "toy")
    with pytest.raises(cli.UserError, match="darcy predicts a field"):
        lsg.main(lsg.Args(task="darcy", scale="tiny", prototypes="random"))  # before the data are read, or simulated
    with pytest.raises(cli.UserError, match="cifar100: 2 class names for 100 classes"):
        asked("cifar100", "official", 100, names=("a", "b"))
    mine = data.Task("mine", "", (3, 8), "class", (2,), None, None, (), {})
    with pytest.raises(cli.UserError, match="mine has no class names: its files have none"):
        data.class_names(SimpleNamespace(task=mine, train=SimpleNamespace(kind="official", classes=2)), "none")


# ---- end to end


def test_lsg_trains_with_a_frozen_gcn_and_resumes(script, tmp_path):
    options = [*SHORT[:-1], 2, "--n-train", 96, "--gcn-steps", 30]
    said = script("lsg.py", *options, out=tmp_path)
    folder = tmp_path / "spherical-lsg-tiny-swin-s0-toy"
    lines = rows(folder)
    assert "180 nodes" in said and "tiny-roberta embeds 9 class names" in said
    assert [row.get("stage") for row in lines] == [1] * 10 + [None] * 2
    assert set(lines[0]) == {"stage", "epoch", "GCN loss", "GCN error"}
    assert lines[-1]["loss"] < lines[10]["loss"] and lines[-1]["regularise"] < lines[10]["regularise"] < 2
    kept, after = load_file(folder / "stage1.safetensors"), weights(folder)
    assert kept.keys() == {"gcn.W1", "gcn.W2"}
    assert all(torch.equal(value, after[f"guide.{name}"]) for name, value in kept.items())  # bit for bit, and no other buffer
    assert {name.split(".")[0] for name in after} == {"model", "projector", "guide"} and len(after) > 50
    assert not any(name.startswith("guide") for name in load_file(folder / "best.safetensors"))
    for name in ("last.pt", "result.json", "best.safetensors", "metrics.jsonl"):
        (folder / name).unlink()
    again = script("lsg.py", *options, "--resume", out=tmp_path)
    assert "resumed after stage 1" in again and "class names" not in again
    assert all(torch.equal(value, after[name]) for name, value in weights(folder).items())


@pytest.mark.matrix
def test_the_controls_and_the_released_version_run(tmp_path):
    last = {}
    short = ["--task", "cifar100", *SHORT[2:-1], 1, "--gcn-steps", 30]
    for name, options in (("text", ["--prototypes", "text"]), ("simplex", ["--prototypes", "simplex"]),
                          ("released", ["--as-released"])):  # fmt: skip
        here("lsg.py", *short, *options, out=tmp_path / name)
        last[name] = rows(tmp_path / name / "cifar100-lsg-tiny-swin-s0-toy")
    assert all(lines[-1]["align"] == 0 and len(lines) == 1 for lines in (last["text"], last["simplex"]))
    assert len({lines[-1]["regularise"] for lines in last.values()}) == 3
    assert not list((tmp_path / "simplex/cache").glob("names-*"))
    here("lsg.py", "--task", "satellite", *SHORT[2:-1], 1, "--prototypes", "random", out=tmp_path)  # needs no names
    with pytest.raises(cli.UserError, match="satellite has no class names"):
        here("lsg.py", "--task", "satellite", *SHORT[2:], out=tmp_path / "named")
    assert not list((tmp_path / "named").glob("*lsg*"))


def test_lsg_learns_sounds_with_several_labels(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "TOY_TEST", 6)
    options = ["--task", "fsd50k", "--scale", "tiny", "--n-train", 8, "--batch-size", 4, "--epochs", 1, "--steps-per-epoch", 2]
    here("lsg.py", *options, "--gcn-steps", 30, out=tmp_path)
    line = rows(tmp_path / "fsd50k-lsg-tiny-swin-s0-toy")[-1]
    assert 0 < line["align"] < 20 and 0 < line["regularise"] < 2


def test_the_weight_of_the_pull_is_the_official_one_at_full_scale():
    for scale, weight in (("full", 8), ("tiny", 0.5)):
        assert data.complete(lsg.Args(), "lsg", scale).regularise_weight == weight
    assert data.complete(lsg.Args(regularise_weight=0), "lsg", "tiny").regularise_weight == 0


def test_lsg_passes_its_options_on(tmp_path, monkeypatch):
    found, make = {}, common.make_embedder
    monkeypatch.setattr(common, "make_embedder", lambda *a, **k: found.setdefault("embedder", make(*a, **k)))
    monkeypatch.setattr(lsg.Run, "distribute", lambda run, net: found.setdefault("net", net))
    monkeypatch.setattr(lsg, "make_optimizer", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    start = {}
    for init in ("copy", "random"):
        found.clear()
        out = tmp_path / init
        args = lsg.Args(task="ecg", scale="tiny", data_dir=str(out), out_dir=str(out), n_train=64, init=init, dropout=0.25,
                        gcn_steps=1)  # fmt: skip
        with pytest.raises(KeyboardInterrupt):
            lsg.main(args)
        start[init] = found["embedder"].positions.clone()
        encoder = found["net"].model.encoder
        assert any(m.p == 0.25 for m in encoder.modules() if isinstance(m, nn.Dropout))
    assert not torch.equal(start["copy"], start["random"])
    frozen = {name for name, p in found["net"].named_parameters() if not p.requires_grad}
    assert frozen == {"guide.gcn.W1", "guide.gcn.W2"}


# ---- tools/names.py


def test_precision_counts_neighbours_of_the_same_superclass():
    p = F.normalize(torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1], [1, 0.8], [0.8, 1]]), dim=1)
    assert names.precision(p, 1, torch.tensor([0, 0, 1, 1, 0, 1])) == pytest.approx(4 / 6)  # the last two are each other's
    assert len(names.NAMES) == 100 and np.bincount(list(names.OF.values())).tolist() == [5] * 20


def test_the_table_of_encoders_has_a_row_for_each(script, tmp_path):
    said = script("tools/names.py", "--gcn-steps", 2, out=tmp_path)
    head, _, row = said.splitlines()[-3:]
    assert head.startswith("| encoder | cosine within a class | between classes | text P@1 |")
    assert row.startswith("| tiny-roberta | 0.89 | 0.49 | 0.11 |")
