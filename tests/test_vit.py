"""Vision transformers of timm as backbones: cut, they are timm's own model; every method trains them; others are refused."""

import json
import shutil

import pytest
import timm
import torch
from helpers import METHODS, here, result, rows, weights
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from torch import nn

import cli
import common
import run

SMALL = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 3, "num_classes": 3}
FAMILIES = {  # timm's name -> P, tokens that are no patches
    "vit_base_patch16_224": 1, "vit_base_patch16_224.mae": 1, "deit_base_patch16_224": 1, "deit3_base_patch16_224": 1,
    "deit_base_distilled_patch16_224": 2, "vit_base_patch14_dinov2": 1, "vit_base_patch14_reg4_dinov2": 5,
    "vit_base_patch16_clip_224.openai": 1, "vit_base_patch16_siglip_224": 0, "vit_medium_patch16_reg4_gap_256": 4,
}  # fmt: skip


def save(folder, name="vit_base_patch16_224", **changes):
    """A small model of the family `name`, in a folder of timm; no weight is 0 or 1, which would hide that it is missing."""
    torch.manual_seed(0)
    arguments = {k: v for k, v in (SMALL | changes).items() if v is not None}
    model = timm.create_model(name, **arguments).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, parameter.mean().item(), 0.5 / max(1, parameter[0].numel()) ** 0.5)
    timm.models.save_for_hf(model, folder, model_args=arguments, safe_serialization=True)
    return model


def edit_weights(folder, change):
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})


def renamed(old, new):
    return lambda weights: {key.replace(old, new): value for key, value in weights.items()}


def without(part):
    return lambda weights: {key: value for key, value in weights.items() if part not in key}


def refused(path, words, lines=2):
    with pytest.raises(cli.UserError, match=words) as error:
        common.load_source(str(path))
    assert len(str(error.value).splitlines()) == lines


# ---- cut into embedder and encoder


@pytest.mark.parametrize("name", FAMILIES)
def test_embedder_and_encoder_are_timms_model(name, tmp_path):
    vit, P = save(tmp_path, name), FAMILIES[name]
    assert vit.num_prefix_tokens == P
    source = common.load_source(str(tmp_path))
    assert (source.token_width, source.feature_width, source.size, source.tokens((3, 32, 32))) == (24, 24, 32, 16)
    x = torch.randn(2, 3, 32, 32)
    expected = vit.forward_features(x)[:, P:]  # (B, N, F)
    tokens = source.embedder(x)
    features = source.encoder.eval()(tokens)
    assert tokens.shape == features.shape == (2, 16, 24) and torch.allclose(features, expected, atol=1e-5)
    embedder = common.make_embedder((3, 60, 60), source, "copy")
    assert torch.equal(embedder(x), tokens) and all(p.requires_grad for p in embedder.parameters())
    assert not any(p.requires_grad for p in source.embedder.parameters())
    assert all(p.requires_grad for p in source.encoder.parameters())
    other = common.make_embedder((5, 60, 60), source, "copy").project.weight  # the 3 slices again, cut to 5
    assert torch.equal(other, torch.cat([vit.patch_embed.proj.weight] * 2, 1)[:, :5])
    fields = common.make_predictor((9, 9), "field", source, embedder)
    assert fields(features).shape == (2, 9, 9) and fields.factor == 8
    features.sum().backward()  # nothing in the encoder lies idle
    assert all(p.grad is not None for p in source.encoder.parameters())


def test_a_random_embedder_has_positions_too(tmp_path):
    save(tmp_path)
    source = common.load_source(str(tmp_path))
    embedder = common.make_embedder((3, 60, 60), source, "random")
    assert not torch.equal(embedder.project.weight, source.embedder.project.weight)
    assert embedder.positions.shape == (16, 24) and abs(embedder.positions.std() / 0.02 - 1) < 0.2
    x = torch.ones(1, 3, 32, 32)
    assert torch.allclose(embedder(x)[0] - embedder(x)[0, :1], embedder.positions - embedder.positions[:1], atol=1e-6)


def test_another_size_than_the_trained_one_resamples_the_positions(tmp_path):
    vit = save(tmp_path, "vit_base_patch14_reg4_dinov2")
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_args"]["img_size"] = 48
    (tmp_path / "config.json").write_text(json.dumps(config))
    source = common.load_source(str(tmp_path))
    expected = resample_abs_pos_embed(vit.pos_embed, (6, 6), num_prefix_tokens=0)[0]  # (36, D)
    assert source.size == 48 and torch.allclose(source.embedder.positions, expected, atol=1e-6)


def test_an_image_that_is_no_whole_number_of_patches_is_cut_as_timm_cuts_it(tmp_path):
    vit = save(tmp_path, "vit_so400m_patch14_siglip_384", img_size=29)
    source = common.load_source(str(tmp_path))
    x = torch.randn(1, 3, 29, 29)
    assert source.embedder.tokens == 9
    assert torch.allclose(source.encoder.eval()(source.embedder(x)), vit.forward_features(x), atol=1e-5)


# ---- attention scores


def rollout_by_hand(encoder, tokens, P, alpha):
    """From the attention of timm's own unfused path: (B, N, D) -> (B, N), and the attention between patches of each block."""
    maps = []
    for block in encoder.eval().blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda module, args, out: maps.append(out))  # (B, heads, P + N, P + N)
    with torch.no_grad():
        encoder(tokens)
    B, N, _ = tokens.shape
    r, between = torch.full((B, N), 1 / N), []
    for A in maps:
        assert A.shape[2] == P + N
        A = A.sum(1)[:, P:, P:]
        between.append(A / A.sum(2)[:, :, None])
    for A in between[::-1]:
        r = (1 - alpha) * r + alpha * torch.einsum("bi,bij->bj", r, A)
    return r, between


@pytest.mark.parametrize(
    "name, changes", [("vit_base_patch14_reg4_dinov2", {}), ("vit_base_patch16_siglip_224", {"qk_norm": True})]
)
def test_attention_scores_of_a_vit_are_those_of_timms_unfused_path(name, changes, tmp_path):
    save(tmp_path, name, **changes)
    source = common.load_source(str(tmp_path))
    tokens = source.embedder(torch.randn(2, 3, 32, 32))
    found = common.attention_rollout(source.encoder, tokens, 0.7)
    received = common.received_attention(source.encoder, tokens)
    expected, between = rollout_by_hand(source.encoder, tokens, FAMILIES[name], 0.7)
    assert torch.allclose(found, expected, atol=1e-6) and torch.allclose(found.sum(1), torch.ones(2)) and (found >= 0).all()
    assert found.std() > 0.05 * found.mean()
    assert torch.allclose(received, between[0].mean(1), atol=1e-6)


# ---- training


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A small DINOv2 with registers, for images of 32 x 32: 16 patches, 5 other tokens, LayerScale, and drop path."""
    folder = tmp_path_factory.mktemp("backbones") / "small-dino"
    save(folder, "vit_base_patch14_reg4_dinov2", drop_path_rate=0.3)
    return folder


def short(backbone, task="spherical", epochs=2):
    return ["--task", task, "--scale", "tiny", "--n-train", 32, "--batch-size", 16, "--epochs", epochs, "--backbone", backbone]


OPTIONS = {"pare": ["--k-begin", 0.5], "orca": ["--embedder-epochs", 1, "--source-samples", 40], "mona": ["--meta-epochs", 1],
           "recraft": ["--align-epochs", 1, "--label-epochs", 1, "--source-samples", 40],
           "contrast": ["--contrast-epochs", 1], "lsg": ["--gcn-steps", 10]}  # fmt: skip


FEW = ("pare", "contrast")  # the others differ in what does not see the backbone


@pytest.mark.parametrize("method", [pytest.param(m, marks=() if m in FEW else pytest.mark.matrix) for m in METHODS])
def test_every_method_trains_a_vit_and_resumes(method, backbone, tmp_path, monkeypatch):
    options, end_epoch = [*short(backbone), *OPTIONS.get(method, [])], run.Run.end_epoch

    def copied_after_the_first(self, *args):
        end_epoch(self, *args)
        if len(self.history) == 1:
            shutil.copytree(tmp_path, tmp_path / "again", dirs_exist_ok=True)

    with monkeypatch.context() as patch:
        patch.setattr(run.Run, "end_epoch", copied_after_the_first)
        here(method, *options, out=tmp_path)
    folder = f"spherical-{'naive' if method == 'finetune' else method}-small-dino-s0-toy"
    whole, resumed = tmp_path / folder, tmp_path / "again" / folder
    assert len(rows(whole)) == len(rows(resumed)) + 1
    here(method, *options, "--resume", out=tmp_path / "again")
    assert rows(whole) == rows(resumed) and result(whole)["test"] == result(resumed)["test"]
    after, again = weights(whole), weights(resumed)
    assert all(torch.equal(value, again[name]) for name, value in after.items())
    name = "encoder.prefix" if "encoder.prefix" in after else "model.encoder.prefix"
    assert after[name].shape == (1, 5, 24)
    assert not torch.equal(after[name], common.load_source(str(backbone)).encoder.prefix)  # it trains along
    assert method != "pare" or [row["k"] for row in rows(whole)] == [8, 4]  # of 16 patches


@pytest.mark.matrix
@pytest.mark.parametrize("method", [method for method in METHODS if method != "lsg"])  # which needs classes
def test_every_method_predicts_a_field_with_a_vit(method, backbone, tmp_path):
    here(method, *short(backbone, "darcy"), *OPTIONS.get(method, []), out=tmp_path)
    (folder,) = tmp_path.glob("darcy-*")
    losses = [row["loss"] for row in rows(folder) if "loss" in row]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("mode", ["frozen", "lora", "norms"])
def test_baselines_train_the_parts_of_a_vit_that_they_say(mode, backbone, tmp_path):
    here("finetune", *short(backbone, epochs=1), "--mode", mode, out=tmp_path)
    after = load_file(tmp_path / f"spherical-{mode}-small-dino-s0-toy/best.safetensors")
    before = dict(common.load_source(str(backbone)).encoder.named_parameters())
    changed = {name for name, value in before.items() if not torch.equal(value, after[f"encoder.{name}"])}
    parts = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    maps = {f"blocks.{i}.{part}.{kind}" for i in range(2) for part in parts for kind in ("weight", "bias")}
    assert maps < before.keys() and "prefix" in before
    assert changed == {
        "frozen": before.keys() - maps,
        "lora": {name for name in maps if name.endswith("weight")},
        "norms": {name for name in before if "norm" in name},
    }[mode]


@pytest.mark.matrix
def test_a_vit_of_full_size_takes_a_step():
    """Shapes of the full scale: images of 224, ViT-B; forward, backward, a step of SGD, 196 tokens of width 768."""
    source = common.load_source("random:vit_base_patch16_224")
    assert (source.token_width, source.feature_width, source.size, source.tokens((3, 32, 32))) == (768, 768, 224, 196)
    embedder = common.make_embedder((3, 60, 60), source, "copy")
    model = common.Model(embedder, source.encoder, common.ClassPredictor(768, 100))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    x, y, losses = torch.randn(2, 3, 60, 60), torch.tensor([3, 70]), []
    for _ in range(2):
        losses.append(nn.functional.cross_entropy(model(x), y))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert all(parameter.grad is not None for parameter in model.parameters()) and losses[1] < losses[0]


# ---- models and weights that do not fit


@pytest.mark.parametrize(
    "name, changes",
    [
        ("vit_tiny_r_s16_p8_224", {"patch_size": None}),  # a small ResNet before the patches
        ("vit_base_patch16_xp_224", {}),  # attention and feed-forward in parallel
        ("vit_base_patch16_18x2_224", {}),
        ("vit_dwee_patch16_reg1_gap_256", {"num_heads": 2}),  # another attention
        ("aimv2_large_patch14_224", {}),  # a norm in the patch embedding
        ("vit_base_patch16_224", {"pos_embed": "none"}),
    ],
)
def test_vits_that_are_not_plain_are_refused(name, changes, tmp_path):
    save(tmp_path, name, **changes)
    refused(tmp_path, "is no plain ViT")
    refused(f"random:{tmp_path}", "is no plain ViT")


@pytest.mark.parametrize("name", ["convnext_atto", "eva02_tiny_patch14_224", "resnet10t", "vit_relpos_small_patch16_224"])
def test_other_models_of_timm_are_refused(name, capsys):
    refused(f"random:{name}", "only Swin transformers and ViTs", lines=1)
    with pytest.raises(SystemExit) as end:
        cli.guarded(common.load_source, f"random:{name}")
    assert end.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    "changes, words",
    [({"in_chans": 1}, "1 x 32 x 32"), ({"img_size": [32, 16]}, "3 x 32 x 16"), ({"patch_size": [8, 4]}, "of 8 x 4")],
)
def test_vits_for_other_images_are_refused(changes, words, tmp_path):
    save(tmp_path, **changes)
    refused(tmp_path, words)


@pytest.mark.parametrize(
    "change, words",
    [
        (without("blocks.1."), "blocks.1.*is missing"),
        (renamed("", "backbone."), "is missing"),
        (without("cls_token"), "cls_token is missing"),
        (without("pos_embed"), "pos_embed is missing"),
        (lambda weights: weights | {"pos_embed": weights["pos_embed"][:, :7].contiguous()}, "pos_embed|cannot be loaded"),
        (lambda weights: weights | {"norm.bias": torch.zeros(3)}, "norm.bias has another shape"),
        (lambda weights: weights | {key.replace("s.1.", "s.2."): value.clone() for key, value in weights.items()}, "no place"),
    ],
)
def test_a_vit_that_is_not_all_in_its_folder_is_refused(change, words, tmp_path):
    save(tmp_path)
    edit_weights(tmp_path, change)
    refused(tmp_path, words)
    common.load_source(f"random:{tmp_path}")


def test_a_vit_that_cannot_be_built_is_refused(tmp_path):
    save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_args"]["num_heads"] = 5  # 24 is no multiple
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(tmp_path, "cannot be loaded")


@pytest.mark.parametrize("name", ["vit_base_patch16_siglip_224", "deit_base_distilled_patch16_224", "vit_base_patch16_rpn_224"])
def test_heads_of_a_vit_may_be_missing(name, tmp_path):
    vit = save(tmp_path, name)
    edit_weights(tmp_path, lambda w: {k: v for k, v in w.items() if not k.startswith(("head", "attn_pool.", "fc_norm."))})
    assert torch.equal(common.load_source(str(tmp_path)).encoder.blocks[1].mlp.fc1.weight, vit.blocks[1].mlp.fc1.weight)


def test_names_of_the_official_codes_are_read(tmp_path):
    """LayerScale of DeiT III; mask token (not used) and registers of DINOv2, whose class token has a position."""
    vit = save(tmp_path / "deit", "deit3_base_patch16_224")
    edit_weights(tmp_path / "deit", lambda w: renamed("ls2.gamma", "gamma_2")(renamed("ls1.gamma", "gamma_1")(w)))
    encoder = common.load_source(str(tmp_path / "deit")).encoder
    assert all(torch.equal(getattr(encoder.blocks[1], k).gamma, getattr(vit.blocks[1], k).gamma) for k in ("ls1", "ls2"))
    vit, first = save(tmp_path / "dino", "vit_base_patch14_reg4_dinov2"), torch.randn(1, 1, 24)
    official = lambda w: renamed("reg_token", "register_tokens")(w) | {
        "mask_token": torch.zeros(1, 24), "pos_embed": torch.cat([first, w["pos_embed"]], 1)
    }  # fmt: skip
    edit_weights(tmp_path / "dino", official)
    source = common.load_source(str(tmp_path / "dino"))
    assert torch.equal(source.encoder.prefix, torch.cat([vit.cls_token + first, vit.reg_token], 1))
    assert torch.equal(source.embedder.positions, vit.pos_embed[0])
