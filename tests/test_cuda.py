"""What only a GPU shows: precision, synchronisation, memory. For `tools/gpu.sh`; on a CPU with CUDA_TESTS_ON=cpu."""

import contextlib
import os
import warnings

import pytest
import torch
from helpers import here, result, weights
from torch.nn.attention import SDPBackend, sdpa_kernel

import common
import contrast
import data
import mona
import pare
from run import LOG_EVERY

pytestmark = pytest.mark.cuda
CUDA = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not CUDA, reason="no GPU")


@pytest.fixture(autouse=True)
def device():
    if not CUDA and os.environ.get("CUDA_TESTS_ON") != "cpu":
        pytest.skip("no GPU")
    torch.manual_seed(0)
    return torch.device("cuda" if CUDA else "cpu")


KINDS = {"cifar100": "tiny-swin", "fsd50k": "tiny-swin", "darcy2d": "tiny-swin", "satellite": "tiny-roberta",
         "deepsea": "tiny-roberta", "advection1d": "tiny-roberta"}  # fmt: skip
FEW = ["--scale", "tiny", "--n-train", 48, "--batch-size", 16, "--epochs", 2]


def parts(task, device):
    """A model with the predictor of a task, and a batch of it."""
    task, source = data.TASKS[task], common.load_source(KINDS[task])
    shape = (task.shape[0], 64, 64) if task.modality == "2d" else (task.shape[0], 256)
    output = task.output if task.target != "field" else (task.output[0], 256) if task.modality == "1d" else shape[1:]
    embedder = common.make_embedder(shape, source, "copy", 64)
    predictor = common.make_predictor(output, task.target, source, embedder)
    model = common.Model(embedder, source.encoder, predictor).to(device).eval()
    x = torch.rand(8, *shape, device=device)
    y = {"class": torch.arange(8, device=device) % output[0]}.get(task.target)
    y = torch.rand(8, *output, device=device).round() if y is None else y
    loss = torch.nn.functional.cross_entropy if task.target == "class" else torch.nn.functional.mse_loss
    return source, model, x, y, loss


@pytest.mark.parametrize("method", ["naive", "pare", "mona", "contrast"])  # ORCA's second stage is naive
@pytest.mark.parametrize("task", KINDS)
def test_bf16_follows_fp32(task, method, device):
    source, model, x, y, loss = parts(task, device)
    shape = (3, 64, 64) if source.modality == "2d" else (32,)
    x_s = torch.rand(8, *shape, device=device) if len(shape) == 3 else torch.randint(5, 900, (8, *shape), device=device)
    y_s, source_embedder = torch.arange(8, device=device) % 4, source.embedder.to(device)
    found = {}
    for bf16 in (False, True):
        model.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            tokens_s = source_embedder(x_s)
            if method == "naive":
                out = model(x)
            elif method == "pare":
                net = pare.PaRe(model, pare.Gate(source.token_width).to(device),
                                common.ClassPredictor(source.feature_width, 4).to(device))  # fmt: skip
                out, _, _ = net(x, tokens_s, 4)
            elif method == "contrast":
                net = contrast.Replacement(model, common.ClassPredictor(source.feature_width, 4).to(device), "rollout", 0)
                out, _, _ = net(x, tokens_s, None, 4)
        if method == "mona":
            g_e, _, log = mona.meta_gradient(model, loss, x, y, tokens_s.float(), y_s, 0.1, 1.0, "finite-difference")
            found[bf16] = log[0], torch.cat([g.flatten() for g in g_e])
            continue
        value = loss(out.float(), y)
        value.backward()
        assert all(p.grad is not None for p in model.encoder.parameters())
        found[bf16] = value, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    (value, gradient), (rounded, rough) = found[False], found[True]
    assert rounded.item() == pytest.approx(value.item(), rel=0.03)
    assert torch.nn.functional.cosine_similarity(gradient, rough, 0) > 0.97


@pytest.mark.parametrize("bf16", [False, True])  # another kernel on some GPUs
@pytest.mark.parametrize("task", ["cifar100", "satellite"])
def test_fused_attention_changes_nothing(task, bf16, device):
    _, model, x, _, _ = parts(task, device)
    out = []
    for fused in (False, True):
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = fused
        kernel = contextlib.nullcontext() if fused else sdpa_kernel(SDPBackend.MATH)
        with torch.no_grad(), kernel, torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            out.append(model(x).float())
    apart = (out[0] - out[1]).abs().max() / out[0].abs().max()
    assert apart < (0.03 if bf16 else 1e-3)


@pytest.mark.parametrize("inner, reg", [("exact", 0.0), ("exact", 0.1), ("gaussian", 0.1), ("none", 0.1)])
def test_a_distance_on_the_device_is_that_of_the_cpu(inner, reg, device):
    x, y, x2, y2 = torch.randn(60, 8), torch.arange(60) % 3, torch.randn(40, 8) + 1, torch.arange(40) % 4
    ours = common.otdd(*(part.to(device) for part in (x, y, x2, y2)), inner, reg)
    assert ours.device.type == device.type and ours.item() == pytest.approx(
        common.otdd(x, y, x2, y2, inner, reg).item(), rel=2e-3
    )


RESUMED = {"naive": ["finetune"], "lora": ["finetune", "--mode", "lora"], "orca": ["orca"], "mona": ["mona"], "pare": ["pare"],
           "recraft": ["recraft"], "contrast": ["contrast", "--contrast-epochs", 1], "lsg": ["lsg", "--gcn-steps", 20],
           "a simulated field": ["recraft", "--task", "advection1d"], "files": ["pare", "--task", "fsd50k"]}  # fmt: skip


@pytest.mark.parametrize("method, options", [(method, options) for method, *options in RESUMED.values()], ids=RESUMED)
def test_a_stopped_run_resumes_on_the_device(method, options, tmp_path, monkeypatch):
    few = [*FEW, *options]
    here(method, *few, out=tmp_path / "whole")

    def stops(self, *arguments):
        end(self, *arguments)
        if len(self.history) == 1:
            raise KeyboardInterrupt

    module = __import__(method)
    end = module.Run.end_epoch
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module.Run, "end_epoch", stops)
        here(method, *few, out=tmp_path / "parted")
    here(method, *few, "--resume", out=tmp_path / "parted")
    whole, parted = (next((tmp_path / name).glob("*-s0-toy")) for name in ("whole", "parted"))
    assert result(parted)["test"] == pytest.approx(result(whole)["test"], abs=0.05)
    apart = sum((v.float() - weights(parted)[k].float()).abs().sum() for k, v in weights(whole).items())
    size = sum(v.float().abs().sum() for v in weights(whole).values())
    assert apart <= (2e-3 * size if CUDA else 0)  # sums of a GPU are in no fixed order


@needs_gpu
@pytest.mark.parametrize("method, task", [("finetune", "spherical"), ("finetune", "fsd50k"), ("pare", "spherical")])
def test_the_loop_waits_for_the_device_where_it_says_so(method, task, tmp_path, monkeypatch):
    """Synchronisations between the first and the last step of an epoch: one for each LOG_EVERY steps, in mean_loss.

    The samples of fsd50k are read from files, those of spherical are on the device.
    """
    steps, seen = 3 * LOG_EVERY, []
    module = __import__(method)
    mean_loss = module.mean_loss

    def counted(*arguments):
        torch.cuda.set_sync_debug_mode("default")
        seen.append("counted")
        value = mean_loss(*arguments)
        torch.cuda.set_sync_debug_mode("warn")
        return value

    monkeypatch.setattr(module, "mean_loss", counted)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        few = ["--scale", "tiny", "--n-train", 128, "--epochs", 1, "--steps-per-epoch", steps]
        here(method, "--task", task, *few, out=tmp_path)
    torch.cuda.set_sync_debug_mode("default")
    within = [w for w in said if "synchron" in str(w.message) and w.filename.endswith((f"{method}.py", "common.py", "data.py"))]
    assert len(seen) == 3 and len(within) <= 2, [str(w) for w in within]  # the mode stays on after the last step: evaluation


@needs_gpu
def test_a_step_is_compiled_once_and_memory_stays_as_it_is():
    from torch._dynamo.utils import counters

    _, model, x, y, loss = parts("cifar100", torch.device("cuda"))
    model.encoder.compile(dynamic=False)
    optimizer, used = torch.optim.AdamW(model.parameters(), fused=True), []
    counters.clear()
    for _ in range(13):
        with torch.autocast("cuda", torch.bfloat16):
            out = model.train()(x)
        loss(out.float(), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        used.append(torch.cuda.memory_allocated())
    assert counters["stats"]["unique_graphs"] == 1 and used[12] <= used[2]
