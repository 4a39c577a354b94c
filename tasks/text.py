"""Text: CoNLL-2003 and CoNLL-2000, the sources of 1D tasks."""

import functools
import itertools
import zipfile
from collections import Counter

import numpy as np

from cli import Missing, UserError
from tasks.files import drawn, locate, read_text, reading

WORDS = 32  # words in a piece of text, and tokens of it that a model reads


def read_conll(data_dir, n, seed, tokenizer, files, relative=False):
    """Text in pieces of 32 words, [[str]], and the label of each (n,): the type that most of its words have, 0 if none.

    A model reads 32 tokens, which are fewer words: only words that it reads completely count for the label. Columns: the word
    first, its tag last (B-PER, I-PER, O); empty lines separate sentences. Types of fewer than 100 chunks count as none.
    `relative`: the type that is most frequent relative to its share of the whole text, since in CoNLL-2000 noun phrases are the
    majority of 99 % of the pieces.

    Returns: the pieces, their labels, the number of labels.
    """
    for name in files:
        try:
            path = locate(data_dir, name)
            break
        except Missing:
            if name == files[-1]:
                raise
    if path.suffix == ".zip":
        with reading(path, "zip file with conll2000/train.txt"), zipfile.ZipFile(path) as archive:
            text = archive.read("conll2000/train.txt").decode("utf-8-sig")
    else:
        text = read_text(path)
    lines = [line.split() for line in text.splitlines()]
    lines = [line for line in lines if len(line) > 1 and line[0] != "-DOCSTART-"]
    tags = [line[-1].partition("-")[2] for line in lines]  # "B-PER" -> "PER", "O" -> ""
    begins = [line[-1].startswith("B-") or tag != before for line, tag, before in zip(lines, tags, ["", *tags], strict=False)]
    count = Counter(tag for tag, new in zip(tags, begins, strict=True) if new and tag)  # eng.train: B- only between like chunks
    types = sorted(tag for tag in count if count[tag] >= 100)
    if len(lines) < WORDS or not types:
        raise UserError(f"{path}: {len(lines)} words with the tags {sorted(count)}; expected words with B- and I- tags, or O.")
    tokens = functools.cache(lambda word: len(tokenizer([word])))
    pieces, labels = [], []
    for i in WORDS * drawn(len(lines) // WORDS, n, seed):
        pieces.append([line[0] for line in lines[i : i + WORDS]])
        ends = itertools.accumulate(map(tokens, pieces[-1]))  # number of tokens up to the end of each word
        here = Counter(tag for tag, end in zip(tags[i : i + WORDS], ends, strict=True) if tag in types and end <= WORDS)
        best = max(here, key=lambda tag: (here[tag] / (count[tag] if relative else 1), tag)) if here else None
        labels.append(types.index(best) + 1 if here else 0)
    return pieces, np.array(labels), len(types) + 1


def read_conll2003(data_dir, n, seed, tokenizer):
    return read_conll(data_dir, n, seed, tokenizer, ("conll2003/train.txt", "eng.train"))


def read_conll2000(data_dir, n, seed, tokenizer):
    return read_conll(data_dir, n, seed, tokenizer, ("conll2000/train.txt", "conll2000.zip"), relative=True)


def token_ids(pieces, tokenizer):
    """The first WORDS tokens of each piece, (n, WORDS) int64; shorter ones are padded with `tokenizer.pad`."""
    ids = [tokenizer(words)[:WORDS] for words in pieces]
    return np.array([row + [tokenizer.pad] * (WORDS - len(row)) for row in ids], np.int64)  # (n, WORDS)
