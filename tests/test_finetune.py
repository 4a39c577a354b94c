"""The baselines: each trains what it says."""

import pytest
import torch
from helpers import SHORT, here, result, rows, weights

import common


@pytest.mark.parametrize("mode", ["naive", "scratch", "frozen", "warmup", "probe"])
def test_each_baseline_learns_and_trains_what_it_says(tmp_path, mode):
    here(
        "finetune.py",
        *SHORT,
        "--n-train",
        96,
        "--mode",
        mode,
        *(["--warmup-share", 1] if mode == "warmup" else []),
        out=tmp_path,
    )
    folder = tmp_path / f"spherical-{mode}-tiny-swin-s0-toy"
    assert rows(folder)[-1]["loss"] < rows(folder)[0]["loss"]
    assert result(folder)["method"] == mode and result(folder)["source"] is None
    after, source = weights(folder), common.load_source("tiny-swin")
    before = {f"encoder.{k}": v for k, v in source.encoder.state_dict().items()}
    before |= {f"embedder.{k}": v for k, v in source.embedder.state_dict().items()}
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    parameters = {f"encoder.{k}" for k, _ in source.encoder.named_parameters()} | {
        k for k in before if k.startswith("embedder")
    }
    body = {name for name in parameters if any(part in name for part in ("qkv", "attn.proj", "mlp"))}
    expected = {"naive": parameters, "scratch": parameters, "frozen": parameters - body, "probe": set()}
    expected["warmup"] = {name for name in parameters if name.startswith("embedder")}  # all three epochs are warm-up here
    assert changed == expected[mode]


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
    assert rows(ours) == rows(folder)
    assert all(torch.equal(value, weights(folder)[name]) for name, value in weights(ours).items())
