"""The baselines: each trains what it says."""

import copy
import re

import pytest
import timm
import torch
from helpers import SHORT, here, result, rows, weights
from safetensors.torch import load_file

import cli
import common
import finetune
import run


@pytest.mark.parametrize("mode", ["naive", "scratch", "frozen", "warmup", "lora", "norms", "probe"])
def test_each_baseline_learns_and_trains_what_it_says(tmp_path, mode):
    share = ["--warmup-share", 1] if mode == "warmup" else []
    here("finetune.py", *SHORT, "--n-train", 96, "--mode", mode, *share, out=tmp_path)
    folder = tmp_path / f"spherical-{mode}-tiny-swin-s0-toy"
    assert rows(folder)[-1]["loss"] < rows(folder)[0]["loss"]
    assert result(folder)["method"] == mode and result(folder)["source"] is None
    after, source = load_file(folder / "best.safetensors"), common.load_source("tiny-swin")
    before = {f"encoder.{k}": v for k, v in source.encoder.state_dict().items()}
    before |= {f"embedder.{k}": v for k, v in source.embedder.state_dict().items()}
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    parameters = {f"encoder.{k}" for k, _ in source.encoder.named_parameters()} | {
        k for k in before if k.startswith("embedder")
    }
    body = {name for name in parameters if any(part in name for part in ("qkv", "attn.proj", "mlp"))}
    expected = {"naive": parameters, "scratch": parameters, "frozen": parameters - body, "probe": set()}
    expected["norms"] = {name for name in parameters if "norm" in name or name.startswith("embedder")}
    expected["lora"] = {name for name in parameters if name.startswith("embedder")} | {n for n in body if n.endswith("weight")}
    expected["warmup"] = {name for name in parameters if name.startswith("embedder")}  # all three epochs are warm-up here
    assert changed == expected[mode]


def test_on_a_text_model_frozen_and_norms_train_the_same():
    names = [f"encoder.{name}" for name, _ in common.load_source("tiny-roberta").encoder.named_parameters()]
    trained = {mode: {name for name in names if finetune.trains(mode, name)} for mode in ("frozen", "norms", "naive")}
    assert trained["frozen"] == trained["norms"] and 0 < len(trained["norms"]) < len(trained["naive"]) == len(names)


def test_frozen_leaves_the_attention_of_swin_v2_and_trains_every_predictor():
    swin = timm.create_model("swinv2_tiny_window8_256")
    attention = [name for name, _ in swin.named_parameters() if ".attn." in name and "cpb_mlp" not in name]  # position bias
    frozen = {name.rpartition(".attn.")[2] for name in attention if not finetune.trains("frozen", f"encoder.{name}")}
    assert frozen == {"q_bias", "v_bias", "logit_scale", "qkv.weight", "proj.weight", "proj.bias"}
    assert finetune.trains("frozen", "predictor.mlp.0.weight")  # of a method of one's own


def test_warmup_needs_an_epoch_for_the_rest(tmp_path):
    with pytest.raises(cli.UserError, match="--mode warmup needs two epochs"):
        here("finetune", *SHORT[:-1], 1, "--mode", "warmup", out=tmp_path)
    assert not list(tmp_path.glob("*/metrics.jsonl"))


@pytest.fixture(scope="module")
def naive(tmp_path_factory):
    """Naive fine-tuning, one short epoch: its options, and its folder."""
    out = tmp_path_factory.mktemp("naive")
    options = ["--task", "satellite", "--scale", "tiny", "--n-train", 64, "--epochs", 1, "--dropout", 0.3]
    here("finetune.py", *options, "--mode", "naive", out=out)
    return options, out / "satellite-naive-tiny-roberta-s0-toy"


@pytest.mark.parametrize(
    "method, without",
    [
        ("orca", ["--embedder-epochs"]),
        ("mona", ["--meta-epochs"]),
        ("recraft", ["--align-epochs", "--label-epochs"]),
        ("contrast", ["--contrast-epochs", "--k-begin"]),
        ("lsg", ["--align-weight", "--regularise-weight"]),
    ],
    ids=["orca", "mona", "recraft", "contrast", "lsg"],
)
def test_a_method_without_its_first_stage_is_naive_fine_tuning(naive, tmp_path, method, without):
    options, folder = naive
    here(method, *options, *(word for name in without for word in (name, 0)), out=tmp_path)
    ours = tmp_path / f"satellite-{method}-tiny-roberta-s0-toy"
    expected, found = rows(folder), rows(ours)
    assert [{key: row[key] for key in expected[0]} for row in found] == expected
    trained = {name.removeprefix("model."): value for name, value in weights(ours).items()}  # beside a source predictor
    assert all(torch.equal(value, trained[name]) for name, value in weights(folder).items())


@pytest.mark.parametrize("name", ["tiny-swin", "tiny-roberta"])
def test_lora_starts_at_the_pretrained_model_and_adds_updates_of_rank_r(name):
    torch.manual_seed(0)
    source, shape = common.load_source(name), (3, 32, 32) if name == "tiny-swin" else (3, 64)
    embedder = common.make_embedder(shape, source, "copy")
    model = common.Model(embedder, source.encoder, common.make_predictor((4,), "class", source, embedder)).eval()
    finetune.set_trainable(model, "lora")
    net, x = finetune.LoRA(model, 3, 6.0).eval(), torch.randn(5, *shape)
    assert torch.equal(net(x), model(x))
    encoder = {n for n, _ in source.encoder.named_parameters() if not {"A", "B"} & set(n.split("."))}
    linears = {n for n, m in source.encoder.named_modules() if isinstance(m, torch.nn.Linear) and "reduction" not in n}
    assert set(net.names) == {f"encoder.{n}.weight" for n in linears} and len(linears) >= 24  # attention and feed-forward
    assert encoder and not any(p.requires_grad for p in source.encoder.parameters())
    for B in net.B:
        torch.nn.init.normal_(B)
    before, plain = copy.deepcopy(model.state_dict()), copy.deepcopy(model)
    plain.load_state_dict(before | net.merged())
    assert torch.allclose(net(x), plain(x), atol=1e-4) and not torch.allclose(net(x), model(x), atol=0.1)
    for i, n in enumerate(net.names):
        update = net.merged()[n] - before[n]
        assert torch.allclose(update, 6.0 / 3 * net.B[i] @ net.A[i], atol=1e-5) and torch.linalg.matrix_rank(update) == 3
    net(x).sum().backward()
    assert all(p.grad is not None for p in (*net.A, *net.B, *model.embedder.parameters(), *model.predictor.parameters()))


def test_lora_evaluates_and_saves_the_merged_weights(tmp_path, monkeypatch):
    seen, evaluate = [], run.Run.evaluate

    def spy(self, model, split, task):
        seen.append({k: v.clone() for k, v in model.state_dict().items()})
        return evaluate(self, model, split, task)

    monkeypatch.setattr(run.Run, "evaluate", spy)
    options = [*SHORT[:-1], 2, "--mode", "lora", "--rank", 2, "--alpha", 4]
    here("finetune", *options, out=tmp_path)
    (folder,) = tmp_path.glob("*-lora-*")
    net, best = weights(folder), load_file(folder / "best.safetensors")
    assert result(folder)["best_epoch"] in (1, 2) and best.keys() == seen[0].keys()
    assert all(torch.equal(value, seen[result(folder)["best_epoch"] - 1][name]) for name, value in best.items())
    bodies = [name for name in seen[0] if not finetune.trains("frozen", name) and seen[0][name].ndim == 2]
    for i, name in enumerate(bodies):  # last.pt: W_0, A and B; evaluated: W_0 + alpha / r B A
        assert torch.allclose(seen[1][name], net[f"model.{name}"] + 2 * net[f"B.{i}"] @ net[f"A.{i}"], atol=1e-6)
        assert net[f"A.{i}"].shape[0] == 2 and net[f"B.{i}"].abs().max() > 0
    assert torch.equal(seen[1]["embedder.norm.bias"], net["model.embedder.norm.bias"])
    before = result(folder)
    (folder / "result.json").unlink()  # stopped after its last epoch
    here("finetune", *options, "--resume", out=tmp_path)
    assert all(result(folder)[name] == before[name] for name in ("test", "test_last"))
    assert all(torch.equal(value, seen[1][name]) for name, value in seen[-2 if before["best_epoch"] < 2 else -1].items())
    with pytest.raises(cli.UserError, match="--checkpoint does not work with --mode lora"):
        here("finetune", *options, "--checkpoint", out=tmp_path / "checkpoint")


def test_a_lora_run_trains_a_small_share(tmp_path, capsys):
    here("finetune", *SHORT[:-1], 1, "--mode", "lora", out=tmp_path)
    said = capsys.readouterr().out
    trained, whole = map(float, re.search(r"model   ([\d.]+)M of ([\d.]+)M parameters train", said).groups())
    assert 0.01 < trained < 0.25 * whole < 0.3
