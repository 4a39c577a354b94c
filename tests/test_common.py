"""Embedders, backbones, schedule and run keeping."""

import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import timm
import torch
from conftest import ROOT

import backbones
import cli
import common
import data
from run import Run, make_optimizer, make_schedule, mean_loss, write


@pytest.fixture(scope="module")
def tiny():
    return common.load_source("tiny-swin")


def test_copied_embedder_and_encoder_are_the_pretrained_swin(tiny):
    swin = backbones.read_swin(backbones.WEIGHTS / "tiny-swin.safetensors").eval()
    embedder = common.initialise(common.Embedder2d(3, tiny.token_width, tiny.size), tiny, "copy")
    x = torch.randn(2, 3, 32, 32)
    assert torch.allclose(embedder(x), swin.patch_embed(x).flatten(1, 2), atol=1e-5)
    assert embedder(x).shape == (2, 64, 64) and embedder.tokens == 64
    features = tiny.encoder.eval()(embedder(x))
    assert torch.allclose(features, swin.forward_features(x).flatten(1, 2), atol=1e-4)
    assert features.shape == (2, 16, tiny.feature_width) == (2, 16, 128)


def test_swin_base_has_the_papers_shapes():
    source = common.load_source("random:swin_base")
    assert (source.token_width, source.feature_width, source.size) == (128, 1024, 224)
    with torch.no_grad():
        tokens = common.Embedder2d(3, 128, 224)(torch.randn(1, 3, 60, 60))
        features = source.encoder(tokens)
    assert tokens.shape == (1, 3136, 128) and features.shape == (1, 49, 1024)
    assert common.ClassPredictor(1024, 100)(features).shape == (1, 100)


@pytest.mark.parametrize("channels", [1, 2, 5, 7])
def test_copy_tiles_the_three_input_slices(tiny, channels):
    embedder = common.initialise(common.Embedder2d(channels, tiny.token_width, tiny.size), tiny, "copy")
    for c in range(channels):
        assert torch.equal(embedder.project.weight[:, c], tiny.embedder.project.weight[:, c % 3])
    assert torch.equal(embedder.project.bias, tiny.embedder.project.bias)
    assert torch.equal(embedder.norm.weight, tiny.embedder.norm.weight)


def test_random_and_truncated_starts(tiny):
    random = common.initialise(common.Embedder2d(3, 64, 32), tiny, "random")
    bound = math.sqrt(2) * math.sqrt(6 / (3 * 16 + 64 * 16))  # Xavier: fan_in + fan_out of a 4 x 4 convolution
    assert 0.9 * bound < random.project.weight.abs().max() <= bound
    assert random.project.bias.abs().sum() == 0 and (random.norm.weight == 1).all()
    truncated = common.initialise(common.Embedder2d(3, 64, 32), tiny, "truncated")
    assert abs(truncated.project.weight.std().item() - 0.02) < 0.002


def test_pictures_of_any_size_are_resized_and_shrinking_does_not_alias():
    embedder = common.Embedder2d(1, 8, 32)
    assert embedder(torch.randn(2, 1, 16, 52)).shape == (2, 64, 8)
    stripes = torch.zeros(1, 1, 64, 64)
    stripes[..., ::2] = 1  # the finest stripes become even grey
    small = torch.nn.functional.interpolate(stripes, (32, 32), mode="bilinear", antialias=True)
    assert torch.allclose(embedder(stripes), embedder(small)) and small[..., 2:-2].std() < 0.01


@pytest.mark.parametrize("name, width", [("tiny-swin", 64), ("tiny-roberta", 128)])
def test_checkpointing_keeps_less_and_changes_no_gradient(name, width):
    def saved_and_gradients(checkpointing):
        encoder, saved = common.load_source(name).encoder.train(), []
        if checkpointing:
            common.checkpoint_activations(encoder)
        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            loss = encoder(torch.randn(4, 64, width)).square().mean()
        loss.backward()
        return sum(saved), [p.grad for p in encoder.parameters()]

    everything, expected = saved_and_gradients(False)
    less, gradients = saved_and_gradients(True)
    assert less < everything / 4 and all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True) if b is not None)


def test_a_compiled_encoder_is_one_graph_and_is_compiled_once_for_every_use():
    from torch._dynamo.testing import CompileCounter

    import mona

    counter, source = CompileCounter(), common.load_source("tiny-swin")
    embedder = common.initialise(common.Embedder2d(3, source.token_width, source.size), source, "copy")
    model = common.Model(embedder, source.encoder, common.ClassPredictor(source.feature_width, 10))
    model.encoder.compile(dynamic=False, backend=counter)
    x, y, tokens_s = torch.randn(4, 3, 60, 60), torch.arange(4), torch.randn(4, 64, 64)
    loss = torch.nn.functional.cross_entropy
    for _ in range(2):
        loss(model(x), y).backward()
        split = data.Split(x[:3].numpy(), y[:3].numpy(), 10, "toy", data.TASKS["spherical"], "cpu")
        run = SimpleNamespace(rank=0, world=1, device=torch.device("cpu"), autocast=torch.no_grad)
        run.args = SimpleNamespace(batch_size=4)
        Run.evaluate(run, model, split, data.TASKS["spherical"])  # another batch size: not compiled
        model.train()
    assert counter.frame_count == 1  # a graph break would make two
    for _ in range(2):
        mona.meta_gradient(model.eval(), loss, x, y, tokens_s, y // 2, 0.1, 1.0)
    assert counter.frame_count <= 4  # theta_0, theta* and theta_0 +- c v differ in what needs a gradient


def test_source_embedder_is_frozen_and_the_weights_are_small(tiny):
    assert not any(p.requires_grad for p in tiny.embedder.parameters())
    assert all(p.requires_grad for p in tiny.encoder.parameters())
    assert (backbones.WEIGHTS / "tiny-swin.safetensors").stat().st_size <= 4e6
    assert "top-1" in (backbones.WEIGHTS / "tiny-swin.md").read_text()


def test_no_weights_of_the_source_are_shared_with_the_target(tiny):
    embedder = common.initialise(common.Embedder2d(3, tiny.token_width, tiny.size), tiny, "copy")
    before = tiny.embedder.project.weight.clone()
    with torch.no_grad():
        embedder.project.weight.add_(1)
    assert torch.equal(tiny.embedder.project.weight, before)


def test_mistaken_backbones_are_named(tmp_path):
    with pytest.raises(cli.UserError, match="no model is called 'swin_bse'"):
        common.load_source("swin_bse")
    with pytest.raises(cli.UserError, match="only Swin transformers"):
        common.load_source("random:vit_tiny_patch16_224")
    with pytest.raises(cli.UserError, match="there is no file"):
        common.load_source(str(tmp_path / "none.safetensors"))
    (tmp_path / "half.safetensors").write_bytes((backbones.WEIGHTS / "tiny-swin.safetensors").read_bytes()[:1000])
    with pytest.raises(cli.UserError, match="not a whole safetensors file"):
        common.load_source(str(tmp_path / "half.safetensors"))
    (tmp_path / "other.safetensors").write_bytes(common.to_safetensors({"a": torch.zeros(1)}))
    with pytest.raises(cli.UserError, match="does not say its architecture"):
        common.load_source(str(tmp_path / "other.safetensors"))


def test_a_hub_out_of_reach_costs_two_lines():
    code = "import common, data; cli.guarded(common.load_source, 'swin_base')"
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "cannot be had" in done.stderr and len(done.stderr.splitlines()) == 2, done.stderr


def test_a_folder_saved_by_timm_is_a_backbone(tmp_path):
    arguments = {"img_size": 16, "window_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2]}
    swin = timm.create_model("swin_tiny_patch4_window7_224", num_classes=3, **arguments)
    timm.models.save_for_hf(swin, tmp_path, model_args=arguments)
    source = common.load_source(str(tmp_path))
    assert (source.token_width, source.feature_width, source.size) == (8, 16, 16)
    assert torch.equal(source.embedder.project.weight, swin.patch_embed.proj.weight)


class Recipe:
    optimizer, lr, weight_decay, warmup_epochs, decay_epochs = "adamw", 1.0, 0.0, 2, 10


def test_schedule_is_linear_up_then_linear_down_in_optimizer_steps():
    optimizer = make_optimizer(torch.nn.Linear(2, 2), Recipe)
    schedule = make_schedule(optimizer, Recipe, steps=5)  # W = 10, T = 50
    rates = []
    for _ in range(60):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1.0
    assert rates[30] == pytest.approx(0.5) and rates[49] == pytest.approx(1 / 40) and rates[50:] == [0.0] * 10


def test_a_file_is_whole_or_not_there(tmp_path):
    write(tmp_path / "a", b"one")
    write(tmp_path / "a", b"two")
    assert (tmp_path / "a").read_bytes() == b"two" and len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_keeps_what_was_saved(tmp_path):
    write(tmp_path / "a", b"one")
    (tmp_path / "a.part").symlink_to("/dev/full")
    with pytest.raises(SystemExit) as end, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pare.py"])
        cli.guarded(write, tmp_path / "a", b"two")
    assert end.value.code == 2 and (tmp_path / "a").read_bytes() == b"one"


def test_a_loss_that_is_not_finite_names_its_step_and_batch():
    split = data.Split(
        data.np.zeros((30, 3, 4, 4), "uint8"), data.np.zeros(30, "int64"), 2, "toy", data.PROXIES["cifar10"], "cpu"
    )

    class Args:
        batch_size, seed = 4, 0

    losses = torch.ones(7)
    assert mean_loss(losses, split, 6, 0, Args) == 1.0
    losses[5] = float("nan")
    samples = split.plan(7, 4, 0, 0)[0][5].tolist()
    with pytest.raises(cli.UserError, match="nan at step 5 of epoch 1") as error:
        mean_loss(losses, split, 6, 0, Args)
    assert str(samples) in str(error.value).replace("...", "")


def test_fields_are_not_rounded_by_autocast():
    """bf16 keeps 8 bits: 2e-3 of a field would be lost, whatever is learned."""
    torch.manual_seed(0)
    parts = [
        (common.DensePredictor1d(8, (1, 32), 4), torch.randn(2, 8, 8)),
        (common.DensePredictor2d(8, (16, 16), 8), torch.randn(2, 4, 8)),
        (common.Embedder1d(1, 32, 8), torch.randn(2, 1, 32)), (common.Embedder2d(3, 8, 16), torch.randn(2, 3, 16, 16)),
    ]  # fmt: skip
    for module, x in parts:
        exact = module(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(module(x), exact), module
