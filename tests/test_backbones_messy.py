"""Backbones that are damaged, incomplete or unusual: they work or are refused in two lines, never trained as "pretrained"."""

import json

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file

import backbones
import cli
import common

SWIN = {"img_size": 16, "window_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2]}
TEXT = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
BERT, ROBERTA = transformers.BertConfig, transformers.RobertaConfig


def save_swin(folder, arch="swin_tiny_patch4_window7_224", **changes):
    """A small Swin in a folder of timm."""
    model = timm.create_model(arch, num_classes=3, **SWIN | changes)
    timm.models.save_for_hf(model, folder, model_args=SWIN | changes, safe_serialization=True)
    return model


def save_text(folder, config=BERT, **changes):
    """A small text model, with its language model's head, in a folder of transformers."""
    kind = transformers.BertForMaskedLM if config is BERT else transformers.RobertaForMaskedLM
    kind(config(**TEXT | changes)).save_pretrained(folder)


def edit_weights(folder, change):
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def without(part):
    return lambda weights: {k: v for k, v in weights.items() if part not in k}


def under(prefix):
    return lambda weights: {prefix + k: v for k, v in weights.items()}


def reshaped(part):
    return lambda weights: {k: v[:, :3].contiguous() if part in k else v for k, v in weights.items()}


def one_layer_more(weights):
    """Every layer 1 once more, as layer 2."""
    return weights | {k.replace("r.1.", "r.2.").replace("s.1.", "s.2."): v.clone() for k, v in weights.items()}


def refused(path, words):
    with pytest.raises(cli.UserError, match=words) as error:
        common.load_source(str(path))
    assert len(str(error.value).splitlines()) == 2


# ---- weights that do not fill the network


@pytest.mark.parametrize(
    "change, words",
    [
        (without("layers.1."), "layers.1.*is missing"),
        (under("backbone."), "is missing"),
        (under("model.encoder."), "is missing"),
        (without("patch_embed.norm.weight"), "patch_embed.norm.weight is missing"),
        (reshaped("0.mlp.fc1.weight"), "layers.0.blocks.0.mlp.fc1.weight has another shape"),
        (one_layer_more, "layers.2.* has no place"),
    ],
)
@pytest.mark.parametrize("classes", [3, 7])  # with another number of classes timm itself accepts whatever is missing
def test_a_swin_that_is_not_all_in_its_folder_is_refused(tmp_path, change, words, classes):
    save_swin(tmp_path)
    edit_weights(tmp_path, change)
    edit_config(tmp_path, num_classes=classes)
    refused(tmp_path, words)
    common.load_source(f"random:{tmp_path}")  # random weights were asked for


@pytest.mark.parametrize("config", [BERT, ROBERTA])
@pytest.mark.parametrize(
    "change, words",
    [
        (under("module."), "embeddings.LayerNorm.bias is missing"),
        (under("backbone."), "is missing"),
        (without("layer.1."), "encoder.layer.1.*is missing"),
        (without("embeddings.position"), "position_embeddings.weight is missing"),
        (reshaped("layer.0.output.dense.weight"), "layer.0.output.dense.weight has another shape"),
        (one_layer_more, "encoder.layer.2.* has no place"),
    ],
)
def test_a_text_model_that_is_not_all_in_its_folder_is_refused(tmp_path, config, change, words):
    save_text(tmp_path, config)
    edit_weights(tmp_path, change)
    refused(tmp_path, words)


def test_what_is_not_used_may_be_missing_and_the_rest_is_read(tmp_path):
    """Poolers and heads; module.* of a Swin, which timm removes itself."""
    for config, name in ((BERT, "bert"), (ROBERTA, "roberta")):
        save_text(tmp_path / name, config)  # has no pooler
        edit_weights(tmp_path / name, lambda w: {k: v for k, v in w.items() if "cls." not in k and "lm_head" not in k})
        weights, encoder = load_file(tmp_path / name / "model.safetensors"), common.load_source(str(tmp_path / name)).encoder
        key = "encoder.layer.1.output.dense.weight"
        assert torch.equal(encoder.layers.layer[1].output.dense.weight, weights[f"{name}.{key}"])
    swin = save_swin(tmp_path / "swin")
    edit_weights(tmp_path / "swin", lambda w: under("module.")(without("head.")(w)))
    source = common.load_source(str(tmp_path / "swin"))
    for name, parameter in source.encoder.named_parameters():
        assert torch.equal(parameter, swin.get_parameter(name)), name


@pytest.mark.parametrize("name", ["tiny-swin", "tiny-roberta"])
def test_a_file_of_pretrain_that_lacks_a_layer_is_refused(tmp_path, name):
    architecture, vocabulary, weights = backbones.read_file(backbones.WEIGHTS / f"{name}.safetensors")
    metadata = {"architecture": json.dumps(architecture), "tokenizer": vocabulary or ""}
    lacking = without("layers.1.blocks.0" if "swin" in name else "layer.1.")(weights)
    save_file(lacking, tmp_path / "x.safetensors", metadata)
    refused(tmp_path / "x.safetensors", "is missing, and")
    save_file(reshaped("qkv.weight" if "swin" in name else "query.weight")(weights), tmp_path / "x.safetensors", metadata)
    refused(tmp_path / "x.safetensors", "has another shape")


# ---- decoders


@pytest.mark.parametrize("config", [BERT, ROBERTA])
def test_decoders_are_refused_and_encoders_see_every_token(tmp_path, config):
    save_text(tmp_path, config, is_decoder=True)
    refused(tmp_path, "is a decoder")
    edit_config(tmp_path, is_decoder=False)  # the advice
    encoder = common.load_source(str(tmp_path)).encoder.eval()
    x = torch.randn(1, 6, 16)
    changed = torch.cat([x[:, :5], x[:, 5:] + torch.randn(16)], 1)
    assert (encoder(x)[:, 0] - encoder(changed)[:, 0]).abs().max() > 1e-6


# ---- unusual Swins


@pytest.mark.parametrize(
    "arch, changes, tokens, features",
    [
        ("swin_tiny_patch4_window7_224", {"patch_size": 2}, 64, 16),
        ("swin_tiny_patch4_window7_224", {"patch_size": 8, "img_size": 32}, 16, 4),
        ("swinv2_tiny_window8_256", {"patch_size": 2}, 64, 16),
    ],
)
def test_other_patch_sizes_work_and_are_copied(tmp_path, arch, changes, tokens, features):
    swin = save_swin(tmp_path, arch, **changes).eval()
    source = common.load_source(str(tmp_path))
    embedder = common.make_embedder((3, 16, 16), source, "copy")
    side = source.size
    x = torch.randn(2, 3, side, side)
    assert embedder.tokens == source.tokens((3, side, side)) == tokens
    out = source.encoder.eval()(embedder(x))
    assert out.shape[1] == features
    assert torch.allclose(out, swin.forward_features(x).flatten(1, 2), atol=1e-5)  # timm's own result
    assert common.make_predictor((9, 9), "field", source, embedder)(out).shape == (2, 9, 9)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"in_chans": 1}, "1 x 16 x 16"),
        ({"in_chans": 6}, "6 x 16 x 16"),
        ({"img_size": [64, 32]}, "3 x 64 x 32"),
        ({"patch_size": [4, 2]}, "patches of 4 x 2"),
    ],
)
def test_swins_for_other_images_are_refused(tmp_path, changes, words):
    save_swin(tmp_path, **changes)
    refused(tmp_path, words)
    refused(f"random:{tmp_path}", words)


def test_a_swin_of_transformers_is_refused(tmp_path):
    config = transformers.SwinConfig(image_size=16, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2)
    transformers.SwinModel(config).save_pretrained(tmp_path)
    refused(tmp_path, "is a swin model(.|\n)*a Swin of timm")


# ---- damaged files and other formats


@pytest.mark.parametrize("save", [save_swin, save_text])
def test_damaged_folders_are_refused(tmp_path, save):
    save(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    whole, described = weights.read_bytes(), config.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"junk"):
        weights.write_bytes(content)
        refused(tmp_path, "cannot be loaded")
    weights.unlink()
    refused(tmp_path, "cannot be loaded")
    for content in (b"junk junk junk", b"", b"PK\x03\x04"):  # the older format, a pickle
        (tmp_path / "pytorch_model.bin").write_bytes(content)
        refused(tmp_path, "cannot be loaded")
    for content in (described[:20], b"", b"[1]", b"\xff\xfe"):
        config.write_bytes(content)
        refused(tmp_path, "no readable config.json")
    config.write_text("{}")
    refused(tmp_path, "cannot be loaded")
    config.unlink()
    refused(tmp_path, "no readable config.json")


def test_a_config_that_cannot_be_built_is_refused(tmp_path):
    for changes in ({"num_attention_heads": 5}, {"vocab_size": "many"}, {"hidden_size": None}, {"hidden_act": "x"}):
        save_text(tmp_path / "text")
        edit_config(tmp_path / "text", **changes)
        refused(tmp_path / "text", "cannot be loaded")
    save_swin(tmp_path / "swin")
    edit_config(tmp_path / "swin", model_args=SWIN | {"nonsense": 1})
    refused(tmp_path / "swin", "cannot be loaded")


@pytest.mark.parametrize("name", ["swin.pth", "swin.pt", "pytorch_model.bin", "notes.txt"])
def test_files_without_an_architecture_are_refused(tmp_path, name):
    torch.save(timm.create_model("swin_tiny_patch4_window7_224", **SWIN).state_dict(), tmp_path / name)
    refused(tmp_path / name, "does not say its architecture")
    if name != "notes.txt":
        refused(tmp_path / "none" / name, "does not say its architecture")


def test_a_tilde_is_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_swin(tmp_path / "swin")
    for name in ("~/swin", "random:~/swin"):
        assert common.load_source(name).size == 16
