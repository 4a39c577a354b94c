"""Text: the two CoNLL corpora as sources."""

import zipfile

import pytest
import torch

import cli
import data
from tasks import text


class Tokenizer:
    """Words to the numbers of their letters: more tokens than words."""

    pad = 0

    def __call__(self, words):
        return [ord(letter) for word in words for letter in word]


def test_conll2003_is_cut_into_32_words_with_the_type_that_most_have(tmp_path):
    (tmp_path / "conll2003").mkdir()
    lines = ["-DOCSTART- -X- O O", ""]
    for piece in range(210):
        tags = [["B-LOC", "B-PER", "I-PER"], ["B-PER", "I-PER", "B-LOC"], ["O", "O", "O"], ["B-LOC", "O", "I-LOC"]][piece % 4]
        lines += [f"w{i % 10} NN I-NP {tag}" for i, tag in enumerate(tags + ["O"] * 29)] + [""] * (piece % 2)
    (tmp_path / "conll2003/train.txt").write_text("\n".join([*lines, "left over O O"]))
    source = data.load_proxy("conll2003", tmp_path, "full", tokenizer=Tokenizer())
    assert len(source) == 210 and source.classes == 3 and source.output == (3,)
    assert source.y.tolist()[:8] == [2, 2, 0, 1] * 2  # 1 LOC, 2 PER
    x = source.inputs(torch.tensor([0]))
    assert x.dtype == torch.int64 and x[0, :4].tolist() == [ord(c) for c in "w0w1"] and x.shape == (1, 32)
    few = data.load_proxy("conll2003", tmp_path, "full", n=7, seed=1, tokenizer=Tokenizer())
    assert len(few) == 7


def test_the_label_is_that_of_the_words_that_are_read_to_their_end(tmp_path):
    (tmp_path / "conll2003").mkdir()
    tags = ["B-PER"] + ["O"] * 14 + ["B-LOC", "B-LOC"] + ["B-LOC"] * 15  # LOC from the 16th word on
    words = ["ab"] * 15 + ["abc"] + ["ab"] * 16  # 32 tokens end within the 16th word
    lines = [f"{w} x x {t}" for w, t in zip(words, tags, strict=True)]
    (tmp_path / "conll2003/train.txt").write_text("\n".join(lines * 100))
    source = data.load_proxy("conll2003", tmp_path, "full", tokenizer=Tokenizer())
    assert source.classes == 3 and source.y.tolist() == [2] * 100  # PER, though LOC has more words


def test_a_part_of_the_text_is_drawn_with_its_labels(tmp_path):
    (tmp_path / "conll2003").mkdir()
    tags = ("LOC", "PER", "ORG")
    lines = [f"w{piece} NN I-NP B-{tags[piece % 3]}" for piece in range(300) for _ in range(32)]
    (tmp_path / "conll2003/train.txt").write_text("\n".join(lines))
    pieces, labels, _ = text.read_conll2003(tmp_path, 20, 1, Tokenizer())
    numbers = [int(piece[0][1:]) for piece in pieces]
    assert [tags[n % 3] for n in numbers] == [sorted(tags)[label - 1] for label in labels] and numbers != list(range(20))


def test_conll2000_from_its_file_or_its_zip_prefers_what_is_rare(tmp_path):
    tags = ["B-NP"] * 6 + ["B-VP"] * 2 + ["O"] * 24, ["B-NP"] * 8 + ["O"] * 24, ["B-XX"] + ["O"] * 31
    pieces = [tags[i % 2] for i in range(100)] + [tags[2]]
    text = "\n".join(f"w NN {tag}" for piece in pieces for tag in piece)
    with zipfile.ZipFile(tmp_path / "conll2000.zip", "w") as archive:
        archive.writestr("conll2000/train.txt", text)
    source = data.load_proxy("conll2000", tmp_path, "full", tokenizer=Tokenizer())
    assert source.y.tolist() == [2, 1] * 50 + [0] and source.classes == 3  # VP, NP; XX occurs too seldom
    (tmp_path / "conll2000.zip").write_bytes(b"PK\x03\x04 half")
    with pytest.raises(cli.UserError, match="conll2000.zip is not a readable"):
        data.load_proxy("conll2000", tmp_path, "full", tokenizer=Tokenizer())
    (tmp_path / "conll2000").mkdir()
    (tmp_path / "conll2000/train.txt").write_text(text[:100])
    with pytest.raises(cli.UserError, match="expected words with B- and I- tags"):
        data.load_proxy("conll2000", tmp_path, "full", tokenizer=Tokenizer())


def test_text_whose_chunks_begin_with_b_only_inside_runs_is_read_alike(tmp_path):
    words = [("a", "ORG"), ("b", "ORG"), ("c", ""), ("d", "PER"), ("e", "LOC")] * 130
    begins = ["B-", "I-", "", "B-", "B-"] * 130
    new = [f"{word} x x {begin + tag or 'O'}" for (word, tag), begin in zip(words, begins, strict=True)]
    old = [f"{word} x x {'I-' + tag if tag else 'O'}" for word, tag in words]  # of different types: B- is not needed
    for name, lines in (("new", new), ("old", old)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "eng.train").write_text("\n".join(lines))
    (x, y, n), (x_old, y_old, n_old) = (
        text.read_conll(tmp_path / name, 99, 0, Tokenizer(), ("eng.train",)) for name in ("new", "old")
    )
    assert x == x_old and (y == y_old).all() and n == n_old == 4


def test_pieces_with_few_tokens_are_padded(tmp_path):
    one = lambda words: [5]
    one.pad = 9
    source = data.load_proxy("conll2003", tmp_path, "tiny", n=3, tokenizer=one)
    assert source.inputs(torch.tensor([1])).tolist() == [[5] + [9] * 31] and source.kind == "toy"
