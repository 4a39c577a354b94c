"""1D embedders, predictors of every kind, text backbones, and the pretraining of the small one."""

import json
import math
import os
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT
from safetensors import safe_open

import backbones
import cli
import common

IDS = torch.randint(5, 300, (3, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def tiny():
    return common.load_source("tiny-roberta")


@pytest.fixture(scope="module")
def swin():
    return common.load_source("tiny-swin")


def small_model(kind):
    """A BERT-like model with random weights, of a kind that transformers knows."""
    config = transformers.AutoConfig.for_model(
        kind, vocab_size=300, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=40, pad_token_id=0 if kind == "bert" else 1,
    )  # fmt: skip
    return transformers.AutoModel.from_config(config)


# ---- 1D embedder


@pytest.mark.parametrize(
    ("length", "most", "stack", "tokens"),
    [(1000, 512, 2, 500), (1000, 64, 20, 50), (46, 512, 1, 46), (256, 512, 1, 256), (256, 128, 2, 128), (1024, 512, 2, 512),
     (1024, 256, 4, 256), (1024, 32, 32, 32), (3072, 128, 24, 128), (3840, 32, 120, 32), (521, 512, 521, 1), (1, 512, 1, 1)],
)  # fmt: skip
def test_stack_number_of_the_papers_tasks(length, most, stack, tokens):
    assert common.stack_number(length, most) == stack
    embedder = common.Embedder1d(1, length, 8, most)
    assert (embedder.stack, embedder.tokens) == (stack, tokens) and embedder(torch.randn(2, 1, length)).shape == (2, tokens, 8)


def test_a_token_sees_its_own_time_steps_and_the_positions_come_after_the_norm():
    embedder = common.Embedder1d(3, 12, 8, max_tokens=4)  # k = 3
    x = torch.randn(2, 3, 12)
    tokens = embedder(x)
    weight = embedder.project.weight.flatten(1)  # (D, C k)
    for i in range(4):
        block = x[:, :, 3 * i : 3 * i + 3].flatten(1)  # (B, C k)
        z = block @ weight.T
        z = (z - z.mean(1, keepdim=True)) / (z.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        assert torch.allclose(tokens[:, i], z + embedder.positions[i], atol=1e-5)


def test_what_is_copied_in_1d(tiny):
    table, norm = tiny.embedder.position_embeddings.weight, tiny.embedder.LayerNorm
    copied, truncated, random = (common.make_embedder((2, 1000), tiny, init) for init in ("copy", "truncated", "random"))
    for embedder in (copied, truncated):
        assert torch.equal(embedder.positions, table[2:502])  # RoBERTa's rows 0 and 1 belong to the padding
    assert torch.equal(copied.norm.weight, norm.weight) and torch.equal(copied.norm.bias, norm.bias)
    for embedder in (truncated, random):
        assert (embedder.norm.weight == 1).all() and (embedder.norm.bias == 0).all()
    assert abs(random.positions.std().item() - 0.02) < 1e-3
    bound = math.sqrt(2) * math.sqrt(6 / (2 * 2 + 128 * 2))  # Xavier of a convolution: C k + D k
    for embedder in (copied, truncated, random):
        assert 0.9 * bound < embedder.project.weight.abs().max() <= bound and embedder.project.bias.abs().sum() == 0
    with torch.no_grad():
        copied.positions.add_(1)
    assert not torch.equal(copied.positions, table[2:502])  # no memory is shared


def test_never_more_tokens_than_the_backbone_has_positions(tiny):
    embedder = common.make_embedder((1, 2048), tiny, "copy", max_tokens=2048)
    assert tiny.positions == 512 and embedder.tokens == 512
    assert tiny.encoder(embedder(torch.randn(1, 1, 2048))).shape == (1, 512, tiny.feature_width)


def test_modalities_that_do_not_fit_are_told_what_does(tiny, swin):
    with pytest.raises(cli.UserError, match="tiny-swin is a Swin.*1 x 1000(.|\n)*Give tiny-roberta or roberta_base") as error:
        common.make_embedder((1, 1000), swin, "copy")
    assert len(str(error.value).splitlines()) == 2
    with pytest.raises(cli.UserError, match="tiny-roberta is a text model.*3 x 60 x 60(.|\n)*Give tiny-swin or swin_base"):
        common.make_embedder((3, 60, 60), tiny, "copy")
    assert isinstance(common.make_embedder((5, 60, 60), swin, "copy"), common.Embedder2d)


# ---- predictors


@pytest.mark.parametrize("out", [(85, 85), (128, 128), (2, 24, 24), (4, 16, 40), (3, 100, 7)])
def test_2d_fields_are_pixels_of_the_tokens_averaged(out):
    """Against loops over pixels: feature 3 f^2 -> (channel, row, column) of the token's square, then means of windows."""
    f, side, width = 4, 6, 10
    predictor = common.DensePredictor2d(width, out, f)
    features = torch.randn(2, side * side, width)
    values = (features @ predictor.linear.weight.T + predictor.linear.bias).detach().numpy()  # (B, n, 3 f^2)
    picture = np.zeros((2, 3, side * f, side * f))
    for token in range(side * side):
        row, column = divmod(token, side)
        square = values[:, token].reshape(2, 3, f, f)
        picture[:, :, row * f : row * f + f, column * f : column * f + f] = square
    for axis, size in zip((1, 2, 3), (1, *out)[-3:], strict=True):
        n = picture.shape[axis]
        windows = [np.arange(i * n // size, -(-(i + 1) * n // size)) for i in range(size)]
        picture = np.stack([picture.take(w, axis).mean(axis) for w in windows], axis)
    assert np.allclose(predictor(features).detach().numpy(), picture.reshape(2, *out), atol=1e-5)


def test_swin_base_predicts_fields_as_the_papers_do():
    source = common.load_source("random:swin_base")
    predictor = common.make_predictor((512, 512), "field", source, None)
    assert predictor.factor == 32 and predictor.linear.weight.shape == (3 * 32**2, 1024)
    assert predictor(torch.randn(1, 49, 1024)).shape == (1, 512, 512)


def test_the_tiny_swin_has_squares_that_cover_its_pictures(swin):
    predictor = common.make_predictor((2, 9, 9), "field", swin, None)
    features = swin.encoder(swin.embedder(torch.randn(2, 3, 32, 32)))
    assert predictor.factor == 8 and features.shape[1] * 8**2 == 32**2
    assert predictor(features).shape == (2, 2, 9, 9)


def test_1d_fields_are_the_values_of_each_tokens_time_steps():
    predictor = common.DensePredictor1d(10, (2, 15), stack=3)
    features = torch.randn(4, 5, 10)
    out = predictor(features)
    assert out.shape == (4, 2, 15)
    values = features @ predictor.head.weight.T + predictor.head.bias  # (B, N, c k)
    for c in range(2):
        for t in range(15):
            assert torch.allclose(out[:, c, t], values[:, t // 3, c * 3 + t % 3])


def test_the_released_1d_head_averages_groups_of_features():
    predictor = common.DensePredictor1d(12, (1, 20), stack=4, pooling=True)
    features = torch.randn(2, 5, 12)
    assert not list(predictor.parameters())
    assert torch.allclose(predictor(features), features.unflatten(2, (4, 3)).mean(3).flatten(1)[:, None])


def test_which_predictor_a_task_gets(tiny):
    embedder = common.make_embedder((1, 1024), tiny, "copy", 32)
    for target in ("class", "labels"):
        assert isinstance(common.make_predictor((36,), target, tiny, embedder), common.ClassPredictor)
    predictor = common.make_predictor((1, 1024), "field", tiny, embedder)
    out = predictor(tiny.encoder(embedder(torch.randn(2, 1, 1024))))
    assert predictor.stack == embedder.stack == 32 and out.shape == (2, 1, 1024)
    assert common.make_predictor((3, 512), "field", tiny, embedder, pooling=True)(torch.randn(1, 32, 128)).shape == (1, 3, 512)
    with pytest.raises(ValueError, match="32 tokens cannot predict 1000"):
        common.make_predictor((1, 1000), "field", tiny, embedder)


# ---- text backbones


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


def test_the_tiny_roberta_is_the_model_in_its_file(tiny):
    path = backbones.WEIGHTS / "tiny-roberta.safetensors"
    with safe_open(path, "pt") as file:
        config = transformers.RobertaConfig(**json.loads(file.metadata()["architecture"]))
        weights = {k: file.get_tensor(k).float() for k in file.keys()}
    model = transformers.RobertaForMaskedLM(config).eval()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.decoder.weight", "lm_head.decoder.bias"}  # tied, or another name
    expected = model.roberta(IDS).last_hidden_state
    assert torch.allclose(tiny.encoder.eval()(tiny.embedder(IDS)), expected, atol=1e-5)
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


def test_words_become_ids_without_special_tokens(tiny):
    ids = tiny.tokenizer(["The", "commission", "said", "so"])
    assert ids == [i for word in ("The", "commission", "said", "so") for i in tiny.tokenizer([word])]
    assert len(ids) >= 4 and not set(ids) & {0, 1, 2, 3, 4} and tiny.tokenizer.pad == 1 and tiny.tokenizer([]) == []
    assert tiny.tokenizer.vocabulary.decode(ids).split() == ["The", "commission", "said", "so"]
    with torch.no_grad():  # padding takes RoBERTa's own padding position, and leaves the rest as it was
        alone, padded = tiny.embedder(torch.tensor([ids])), tiny.embedder(torch.tensor([[*ids, 1, 1]]))
    assert torch.equal(padded[:, : len(ids)], alone)


def test_source_parts_are_frozen_and_free(tiny):
    assert not any(p.requires_grad for p in tiny.embedder.parameters())
    assert all(p.requires_grad for p in tiny.encoder.parameters())
    assert tiny.encoder.layers.config._attn_implementation == "sdpa"
    tokens = torch.randn(2, 7, tiny.token_width)
    assert torch.equal(tiny.encoder.train()(tokens), tiny.encoder.eval()(tokens))  # no dropout
    moved = torch.cat([tokens[:, 3:], tokens[:, :3]], 1)  # no positions of its own either
    assert torch.allclose(tiny.encoder(moved).mean(1), tiny.encoder(tokens).mean(1), atol=1e-5)


def test_random_weights_and_scratch(tiny):
    scratch, again = common.load_source("tiny-roberta", pretrained=False), common.load_source("random:tiny-roberta")
    for source in (scratch, again):
        names = dict(source.encoder.named_parameters())
        assert names.keys() == dict(tiny.encoder.named_parameters()).keys()
        name = next(n for n in names if n.endswith("query.weight"))
        assert not torch.equal(names[name], tiny.encoder.get_parameter(name))


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
    with pytest.raises(cli.UserError, match="cannot be had"):
        common.load_source(str(tmp_path / "bert"))


def test_a_hub_out_of_reach_costs_two_lines():
    code = "import common, data; cli.guarded(common.load_source, 'roberta_base')"
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "cannot be had" in done.stderr and len(done.stderr.splitlines()) == 2, done.stderr


def test_transformers_is_imported_only_for_text():
    code = "import sys, common; common.load_source('tiny-swin'); assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# ---- tools/pretrain.py text


SMALL = ["--vocabulary", 300, "--width", 16, "--layers", 1, "--heads", 2, "--length", 16, "--batch-size", 4, "--no-compile"]


@pytest.fixture
def corpus(tmp_path):
    """Two zips in the formats at hand, and CoNLL-2003's columns; test files that must not be read."""
    rng = np.random.default_rng(0)
    text = [" ".join(rng.choice(["apple", "pear", "plum", "grows", "falls", "here"], 12)) + " ." for _ in range(300)]
    (tmp_path / "text").mkdir()
    with zipfile.ZipFile(tmp_path / "text/plain.zip", "w") as file:
        file.writestr("plain/README", "zebra")
        file.writestr("plain/a.txt", "\n".join(text))
    with zipfile.ZipFile(tmp_path / "text/tagged.zip", "w") as file:
        file.writestr("tagged/ca01", "\n\n".join(" ".join(f"{word}/nn" for word in line.split()) for line in text))
    (tmp_path / "conll2003").mkdir()
    for split, word in (("train", "plum"), ("test", "zebra")):
        (tmp_path / f"conll2003/{split}.txt").write_text(f"{word} - - B-ORG\ngrows - - O\n\nhere - - O\n" * 5)
    return tmp_path


def test_texts_of_every_format_become_words(corpus):
    from tools import pretrain

    texts = pretrain.read_texts(corpus)
    assert list(texts) == ["plain", "tagged", "conll2003"] and "zebra" not in " ".join(texts.values())
    assert texts["tagged"] == texts["plain"] and texts["conll2003"].startswith("plum grows here plum")
    with pytest.raises(cli.UserError, match="no text in"):
        pretrain.read_texts(corpus / "text")


def test_a_quarter_is_hidden_and_most_of_it_masked():
    from tools import pretrain

    x = torch.randint(5, 300, (50, 128))
    seen, places = pretrain.hide(x, 0.25, 300, torch.Generator().manual_seed(0))
    hidden = torch.zeros(50 * 128, dtype=torch.bool)
    hidden[places] = True
    assert (hidden.view(50, 128).sum(1) == 32).all() and torch.equal(seen.flatten()[~hidden], x.flatten()[~hidden])
    masked, kept = (seen.flatten()[hidden] == pretrain.MASK).float(), (seen == x).flatten()[hidden].float()
    assert abs(masked.mean() - 0.8) < 0.04 and abs(kept.mean() - 0.1) < 0.03


def test_pretraining_text_learns_and_writes_a_backbone_and_its_card(script, corpus, tmp_path):
    out = script(
        "tools/pretrain.py", "text", "--data-dir", corpus, *SMALL, "--steps", 60, "--save-every", 30, out=tmp_path / "t"
    )
    losses = [float(line.split()[3]) for line in out.splitlines() if line.startswith("step")]
    assert len(losses) == 2 and losses[1] < losses[0]
    card = (tmp_path / "t.md").read_text()
    assert "60 of 60 steps" in card and "plain, tagged, conll2003" in card and not (tmp_path / "t.part").exists()
    source = common.load_source(str(tmp_path / "t.safetensors"))
    assert source.tokenizer(["apple"]) == [source.tokenizer.vocabulary.get_vocab()["Ġapple"]] and source.positions == 512
    assert source.encoder(source.embedder(torch.tensor([source.tokenizer(["apple", "falls"])]))).shape == (1, 2, 16)


def test_pretraining_text_goes_on_after_a_stop(corpus, tmp_path, monkeypatch):
    """A run stopped between two checkpoints and started again ends with the weights of a run in one go."""
    from tools import pretrain

    options = dict(data_dir=str(corpus), vocabulary=300, width=16, layers=1, heads=2, length=16, batch_size=4, steps=20,
                   save_every=10, compile=False)  # fmt: skip
    pretrain.text(pretrain.Text(out=str(tmp_path / "whole"), **options))
    cross_entropy, calls = pretrain.F.cross_entropy, []

    def stops(out, y, **kwargs):
        calls.append(0)
        if len(calls) == 18:
            raise KeyboardInterrupt
        return cross_entropy(out, y, **kwargs)

    parted = pretrain.Text(out=str(tmp_path / "parted"), **options)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pretrain.F, "cross_entropy", stops)
        pretrain.text(parted)
    assert (tmp_path / "parted.part").exists()
    with pytest.raises(cli.UserError, match="belongs to other options"):
        pretrain.text(pretrain.Text(out=str(tmp_path / "parted"), **options | {"steps": 30}))
    pretrain.text(parted)
    whole, parted = (common.load_file(tmp_path / f"{name}.safetensors") for name in ("whole", "parted"))
    assert all(torch.equal(whole[k], parted[k]) for k in whole)


def test_an_unknown_kind_and_its_options_are_refused(script, tmp_path):
    assert "images" in script("tools/pretrain.py", "sounds", out=tmp_path / "x", code=2)
    mistakes = script("tools/pretrain.py", "text", "--steps", "many", out=tmp_path / "x", code=2)
    assert "many" in mistakes
    assert "no text in" in script("tools/pretrain.py", "text", "--data-dir", tmp_path, out=tmp_path / "x", code=2)
