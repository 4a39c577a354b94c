"""Backbones read and cut: Swins of timm, text models of transformers, the two tiny ones."""

import builtins
import json
import sys

import pytest
import timm
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save as to_safetensors

import backbones
import cli
import common

# ---- Swins


def test_copied_embedder_and_encoder_are_the_pretrained_swin(swin):
    whole = backbones.read_swin(backbones.WEIGHTS / "tiny-swin.safetensors").eval()
    embedder = common.initialise(common.Embedder2d(3, swin.token_width, swin.size), swin, "copy")
    x = torch.randn(2, 3, 32, 32)
    assert torch.allclose(embedder(x), whole.patch_embed(x).flatten(1, 2), atol=1e-5)
    assert embedder(x).shape == (2, 64, 64) and embedder.tokens == 64
    features = swin.encoder.eval()(embedder(x))
    assert torch.allclose(features, whole.forward_features(x).flatten(1, 2), atol=1e-4)
    assert features.shape == (2, 16, swin.feature_width) == (2, 16, 128)


@pytest.mark.matrix
def test_swin_base_has_the_papers_shapes():
    source = common.load_source("random:swin_base")
    assert (source.token_width, source.feature_width, source.size) == (128, 1024, 224)
    with torch.no_grad():
        tokens = common.Embedder2d(3, 128, 224)(torch.randn(1, 3, 60, 60))
        features = source.encoder(tokens)
    assert tokens.shape == (1, 3136, 128) and features.shape == (1, 49, 1024)
    assert common.ClassPredictor(1024, 100)(features).shape == (1, 100)


def test_source_embedder_is_frozen_and_the_weight_file_is_small(swin):
    assert not any(p.requires_grad for p in swin.embedder.parameters())
    assert all(p.requires_grad for p in swin.encoder.parameters())
    assert (backbones.WEIGHTS / "tiny-swin.safetensors").stat().st_size <= 4e6
    assert "top-1" in (backbones.WEIGHTS / "tiny-swin.md").read_text()


def test_mistaken_backbones_are_named(tmp_path):
    with pytest.raises(cli.UserError, match="no model is called 'swin_bse'"):
        common.load_source("swin_bse")
    with pytest.raises(cli.UserError, match="only Swin transformers"):
        common.load_source("random:convnext_atto")
    with pytest.raises(cli.UserError, match="there is no file"):
        common.load_source(str(tmp_path / "none.safetensors"))
    (tmp_path / "half.safetensors").write_bytes((backbones.WEIGHTS / "tiny-swin.safetensors").read_bytes()[:1000])
    with pytest.raises(cli.UserError, match="not a complete safetensors file"):
        common.load_source(str(tmp_path / "half.safetensors"))
    (tmp_path / "other.safetensors").write_bytes(to_safetensors({"a": torch.zeros(1)}))
    with pytest.raises(cli.UserError, match="does not say its architecture"):
        common.load_source(str(tmp_path / "other.safetensors"))


def test_a_folder_saved_by_timm_is_a_backbone(tmp_path):
    arguments = {"img_size": 16, "window_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2]}
    swin = timm.create_model("swin_tiny_patch4_window7_224", num_classes=3, **arguments)
    timm.models.save_for_hf(swin, tmp_path, model_args=arguments)
    source = common.load_source(str(tmp_path))
    assert (source.token_width, source.feature_width, source.size) == (8, 16, 16)
    assert torch.equal(source.embedder.project.weight, swin.patch_embed.proj.weight)


@pytest.mark.parametrize("name", ["swin_base", "roberta_base"])
def test_a_hub_out_of_reach_costs_two_lines(name, capsys):
    with pytest.raises(SystemExit) as end:
        cli.guarded(common.load_source, name)
    complained = capsys.readouterr().err
    assert end.value.code == 2 and "cannot be loaded" in complained and len(complained.splitlines()) == 2, complained


def test_torch_and_torchvision_that_do_not_fit_cost_two_lines(monkeypatch):
    real = builtins.__import__

    def broken(name, *rest):
        if name == "timm":
            raise RuntimeError("operator torchvision::nms does not exist")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", broken)
    with pytest.raises(cli.UserError, match="do not match") as error:
        backbones.import_timm()
    assert len(str(error.value).splitlines()) == 2


# ---- text models


IDS = torch.randint(5, 300, (3, 32), generator=torch.Generator().manual_seed(0))


def small_model(kind):
    """A BERT-like model with random weights, of a kind that transformers knows."""
    config = transformers.AutoConfig.for_model(
        kind, vocab_size=300, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=40, pad_token_id=0 if kind == "bert" else 1,
    )  # fmt: skip
    return transformers.AutoModel.from_config(config)


@pytest.mark.parametrize("kind", backbones.BERT_LIKE)
def test_embedder_and_encoder_are_the_model(kind, tmp_path):
    """From a folder: ids -> embedder -> encoder is the last hidden state of transformers' own model."""
    model = small_model(kind).eval()
    model.save_pretrained(tmp_path)
    source = common.load_source(str(tmp_path))
    expected = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).last_hidden_state
    assert torch.allclose(source.encoder.eval()(source.embedder(IDS)), expected, atol=1e-5)
    assert (source.modality, source.token_width, source.feature_width, source.size) == ("1d", 16, 16, None)
    assert source.positions == (40 if kind == "bert" else 38)
    embedder, table = common.make_embedder((1, 20), source, "copy"), model.embeddings.position_embeddings.weight
    assert torch.equal(embedder.positions, table[:20] if kind == "bert" else table[2:22])


def test_the_tiny_roberta_is_the_model_in_its_file(roberta):
    path = backbones.WEIGHTS / "tiny-roberta.safetensors"
    with safe_open(path, "pt") as file:
        config = transformers.RobertaConfig(**json.loads(file.metadata()["architecture"]))
        weights = {k: file.get_tensor(k).float() for k in file.keys()}
    model = transformers.RobertaForMaskedLM(config).eval()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.decoder.weight", "lm_head.decoder.bias"}  # tied, or another name
    expected = model.roberta(IDS).last_hidden_state
    assert torch.allclose(roberta.encoder.eval()(roberta.embedder(IDS)), expected, atol=1e-5)
    assert path.stat().st_size + path.with_suffix(".md").stat().st_size <= 4e6
    assert "unigram" in path.with_suffix(".md").read_text()


def test_the_tiny_roberta_fills_in_words():
    """It is a language model: a masked function word is found among the likeliest few, in several sentences."""
    path = backbones.WEIGHTS / "tiny-roberta.safetensors"
    architecture, vocabulary, weights = backbones.read_file(path)
    model = transformers.RobertaForMaskedLM(transformers.RobertaConfig(**architecture)).eval()
    model.load_state_dict(weights, strict=False)
    _, tokenizer = backbones.read_roberta(path)
    found = 0
    sentences = ["the president of ? United States said", "he did not want ? go back to the city", "one of ? best films",
                 "they have ? able to see it", "I do n't know ? it is"]  # fmt: skip
    for sentence, answer in zip(sentences, ("the", "to", "the", "been", "what"), strict=True):
        words = sentence.split()
        ids = [i for word in words for i in (tokenizer([word]) if word != "?" else [4])]
        best = model(torch.tensor([ids])).logits[0, ids.index(4)].topk(10).indices
        found += tokenizer([answer])[0] in best
    assert found >= 4


def test_words_become_ids_without_special_tokens(roberta):
    ids = roberta.tokenizer(["The", "commission", "said", "so"])
    assert ids == [i for word in ("The", "commission", "said", "so") for i in roberta.tokenizer([word])]
    assert len(ids) >= 4 and not set(ids) & {0, 1, 2, 3, 4} and roberta.tokenizer.pad == 1 and roberta.tokenizer([]) == []
    assert roberta.tokenizer.vocabulary.decode(ids).split() == ["The", "commission", "said", "so"]
    with torch.no_grad():  # padding takes RoBERTa's own padding position, and leaves the rest as it was
        alone, padded = roberta.embedder(torch.tensor([ids])), roberta.embedder(torch.tensor([[*ids, 1, 1]]))
    assert torch.equal(padded[:, : len(ids)], alone)


def test_the_source_embedder_is_frozen_and_the_encoder_trains_without_dropout_and_positions(roberta):
    assert not any(p.requires_grad for p in roberta.embedder.parameters())
    assert all(p.requires_grad for p in roberta.encoder.parameters())
    assert roberta.encoder.layers.config._attn_implementation == "sdpa"
    tokens = torch.randn(2, 7, roberta.token_width)
    assert torch.equal(roberta.encoder.train()(tokens), roberta.encoder.eval()(tokens))  # no dropout
    moved = torch.cat([tokens[:, 3:], tokens[:, :3]], 1)  # no positions of its own either
    assert torch.allclose(roberta.encoder(moved).mean(1), roberta.encoder(tokens).mean(1), atol=1e-5)


def test_random_and_scratch_backbones_have_the_same_names_and_other_weights(roberta):
    scratch, again = common.load_source("tiny-roberta", pretrained=False), common.load_source("random:tiny-roberta")
    for source in (scratch, again):
        names = dict(source.encoder.named_parameters())
        assert names.keys() == dict(roberta.encoder.named_parameters()).keys()
        name = next(n for n in names if n.endswith("query.weight"))
        assert not torch.equal(names[name], roberta.encoder.get_parameter(name))


@pytest.mark.matrix
def test_roberta_base_has_the_papers_shapes_and_needs_no_network():
    source = common.load_source("random:roberta_base")
    assert (source.token_width, source.feature_width, source.positions) == (768, 768, 512)
    assert sum(p.numel() for p in source.encoder.parameters()) == 12 * (4 * (768**2 + 768) + 2 * 768 * 3072 + 3072 + 5 * 768)
    embedder = common.make_embedder((4, 1000), source, "copy")
    with torch.no_grad():
        assert source.encoder(embedder(torch.randn(1, 4, 1000))).shape == (1, 500, 768)
        assert source.embedder(torch.tensor([source.tokenizer(["a", "word"])])).shape[2] == 768


def test_mistaken_text_backbones_are_named(tmp_path, monkeypatch):
    config = transformers.GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=1)
    transformers.GPT2Model(config).save_pretrained(tmp_path / "gpt")
    with pytest.raises(cli.UserError, match="is a gpt2 model"):
        common.load_source(str(tmp_path / "gpt"))
    with pytest.raises(cli.UserError, match="there is no folder"):
        common.load_source(str(tmp_path / "nothing"))
    small_model("bert").save_pretrained(tmp_path / "bert")
    with pytest.raises(cli.UserError, match="without its tokenizer"):
        common.load_source(str(tmp_path / "bert")).tokenizer(["a"])
    (tmp_path / "bert/model.safetensors").write_bytes(b"broken")
    with pytest.raises(cli.UserError, match="cannot be loaded"):
        common.load_source(str(tmp_path / "bert"))


def test_transformers_is_imported_only_for_text(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)  # importing it is an error
    assert common.load_source("tiny-swin").modality == "2d"
    with pytest.raises(ImportError):
        common.load_source("tiny-roberta")
