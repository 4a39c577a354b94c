"""tools/pretrain.py writes both kinds of backbone, and continues after a stop."""

import zipfile

import numpy as np
import pytest
import torch
from official import write_pictures
from safetensors.torch import load_file

import cli
import common
from tools import pretrain

# ---- images


@pytest.fixture
def pictures(tmp_path):
    write_pictures(tmp_path, 2)
    return tmp_path


def test_pretraining_writes_weights_that_are_a_backbone_and_their_card(script, pictures, tmp_path):
    small = ["--size", 16, "--window", 2, "--width", 32, "--depths", 1, 1, "--epochs", 1, "--batch-size", 100, "--no-compile"]
    script("tools/pretrain.py", "images", "--data-dir", pictures, *small, out=tmp_path / "small0.5")
    card = (tmp_path / "small0.5.md").read_text()
    assert "400 training images (2 a class)" in card and "1 of 1 epochs" in card and not (tmp_path / "small0.5.part").exists()
    source = common.load_source(str(tmp_path / "small0.5.safetensors"))
    assert (source.size, source.token_width, source.feature_width) == (16, 32, 64)
    assert source.encoder(source.embedder(torch.randn(2, 3, 64, 64))).shape == (2, 4, 64)


def stop_at(patch, call):
    """Interrupt a training in the loss of this call."""
    cross_entropy, calls = pretrain.F.cross_entropy, []

    def stops(*arguments, **kwargs):
        calls.append(0)
        if len(calls) == call:
            raise KeyboardInterrupt
        return cross_entropy(*arguments, **kwargs)

    patch.setattr(pretrain.F, "cross_entropy", stops)


@pytest.mark.matrix
def test_pretraining_images_resumes_after_an_interruption(pictures, tmp_path, monkeypatch):
    options = dict(data_dir=str(pictures), size=16, window=2, width=32, depths=(1, 1), epochs=3, batch_size=200, compile=False)
    pretrain.images(pretrain.Images(out=str(tmp_path / "whole"), **options))
    parted = pretrain.Images(out=str(tmp_path / "parted"), **options)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, 2 * 2 * 2 + 1)  # two losses a step, two steps an epoch: in the third
        pretrain.images(parted)
    assert (tmp_path / "parted.part").exists() and "2 of 3 epochs" in (tmp_path / "parted.md").read_text()
    pretrain.images(parted)
    whole, parted = (load_file(tmp_path / f"{name}.safetensors") for name in ("whole", "parted"))
    assert all(torch.equal(whole[k], parted[k]) for k in whole)


# ---- text


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
    texts = pretrain.read_texts(corpus)
    assert list(texts) == ["plain", "tagged", "conll2003"] and "zebra" not in " ".join(texts.values())
    assert texts["tagged"] == texts["plain"] and texts["conll2003"].startswith("plum grows here plum")
    with pytest.raises(cli.UserError, match="no text in"):
        pretrain.read_texts(corpus / "text")


def test_a_quarter_is_hidden_and_most_of_it_masked():
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


def test_pretraining_text_resumes_after_an_interruption(corpus, tmp_path, monkeypatch):
    """A run stopped between two checkpoints and started again ends with the weights of a run in one go."""
    options = dict(data_dir=str(corpus), vocabulary=300, width=16, layers=1, heads=2, length=16, batch_size=4, steps=20,
                   save_every=10, compile=False)  # fmt: skip
    pretrain.text(pretrain.Text(out=str(tmp_path / "whole"), **options))
    parted = pretrain.Text(out=str(tmp_path / "parted"), **options)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, 18)
        pretrain.text(parted)
    assert (tmp_path / "parted.part").exists()
    with pytest.raises(cli.UserError, match="belongs to other options"):
        pretrain.text(pretrain.Text(out=str(tmp_path / "parted"), **options | {"steps": 30}))
    pretrain.text(parted)
    whole, parted = (load_file(tmp_path / f"{name}.safetensors") for name in ("whole", "parted"))
    assert all(torch.equal(whole[k], parted[k]) for k in whole)


def test_weights_that_are_not_finite_are_not_written(corpus, tmp_path):
    options = dict(data_dir=str(corpus), vocabulary=300, width=16, layers=1, heads=2, length=16, batch_size=4, steps=20,
                   save_every=10, compile=False, lr=1e30)  # fmt: skip
    (tmp_path / "t.safetensors").write_bytes(b"earlier")
    with pytest.raises(cli.UserError, match="the training diverged"):
        pretrain.text(pretrain.Text(out=str(tmp_path / "t"), **options))
    assert (tmp_path / "t.safetensors").read_bytes() == b"earlier"


def test_finished_weights_are_not_trained_again(corpus, tmp_path):
    args = pretrain.Text(data_dir=str(corpus), out=str(tmp_path / "t"))
    (tmp_path / "t.safetensors").write_bytes(b"finished")
    with pytest.raises(cli.UserError, match="t.safetensors is a finished backbone"):
        pretrain.main(args)
    (tmp_path / "t.part").write_bytes(b"")  # a training in progress is continued
    with pytest.raises(EOFError):
        pretrain.main(args)


@pytest.mark.parametrize("wrong", [{"depths": ()}, {"depths": (1, 0)}, {"size": 2}, {"size": 20, "depths": (1, 1, 1)}])
def test_depths_and_sizes_that_no_swin_has_are_refused(wrong, tmp_path):
    with pytest.raises(cli.UserError, match="depths are positive, the size a multiple of"):
        pretrain.main(pretrain.Images(out=str(tmp_path / "s"), **wrong))


def test_an_unknown_kind_and_its_options_are_refused(script, tmp_path):
    assert "images" in script("tools/pretrain.py", "sounds", out=tmp_path / "x", code=2)
    mistakes = script("tools/pretrain.py", "text", "--steps", "many", out=tmp_path / "x", code=2)
    assert "many" in mistakes
    odd = script("tools/pretrain.py", "text", "--width", 30, "--heads", 4, "--data-dir", tmp_path, out=tmp_path / "x", code=2)
    assert "--width 30 must be a multiple of twice --heads 4." in odd
    assert "no text in" in script("tools/pretrain.py", "text", "--data-dir", tmp_path, out=tmp_path / "x", code=2)
