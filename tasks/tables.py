"""Tables: OpenML classification tables, from the files that scikit-learn's `fetch_openml` downloads. Shapes: n rows, F columns.

The files are read here, not by `fetch_openml`, which deletes and downloads again what it cannot read, and refuses a table that
has a text column. A run only reads them; `prepare_table` downloads them, to the same places.
"""

import functools
import gzip
import hashlib
import http.client
import itertools
import json
import re
import urllib.parse
import urllib.request
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cli import Missing, UserError
from tasks.files import check, check_shape, reading, replacing
from tasks.scores import cross_entropy

SKLEARN_COPIES = {61: "load_iris", 187: "load_wine", 1510: "load_breast_cancer", 28: "load_digits"}
# iris: two values differ from OpenML's (samples 35 and 38); wine and wdbc: the same tables; optdigits: its test part, 1,797 of
# 5,620 rows
TABLE_NUMBERS = 2**29  # numbers in the array of a table: 2 GiB, and two to three times that while it is split


# ---------------------------------------------------------------------------------------------------------------------
# The files of a table
# ---------------------------------------------------------------------------------------------------------------------


SITE = "https://www.openml.org"
ABOUT, FEATURES = "api/v1/json/data/{}", "api/v1/json/data/features/{}"  # what OpenML says about a table, and its columns


class Column(NamedTuple):
    index: int  # in the ARFF file
    name: str
    kind: str  # numeric, nominal, string or date
    is_target: bool
    is_ignored: bool  # to be ignored, or a row identifier


def local(data_dir, path):
    """Where `fetch_openml` keeps a file of OpenML's site."""
    return Path(data_dir) / "openml" / "openml.org" / f"{path.strip('/')}.gz"


def path_of(url):
    """The path of a URL in OpenML's answer. Raises ValueError if it is of a local file, or leads out of a folder."""
    parts = urllib.parse.urlparse(url)
    if parts.scheme not in ("http", "https") or ".." in parts.path.split("/"):
        raise ValueError(f"it names {url}")
    return parts.path


def open_table(number, data_dir):
    """The format of a table, its columns (list of Column), and the path of its ARFF file.

    Raises Missing if one of the three files is missing, UserError if one is damaged.
    """
    folder = Path(data_dir) / "openml"
    paths = [local(data_dir, name.format(number)) for name in (ABOUT, FEATURES)]
    if not all(path.exists() for path in paths):
        raise Missing(f"no table {number} in {folder}.")
    with reading(paths[0], f"description of table {number}"), gzip.open(paths[0]) as file:
        about = json.load(file)["data_set_description"]
        form = about["format"].lower()
        arff = local(data_dir, path_of(about["url"]))
        older = local(data_dir, f"data/v1/download/{int(about['file_id'])}")  # where older versions of scikit-learn kept it
    with reading(paths[1], f"description of table {number}"), gzip.open(paths[1]) as file:
        columns = [
            Column(int(c["index"]), c["name"], c["data_type"], c["is_target"] == "true",
                   "true" in (c["is_ignore"], c["is_row_identifier"]))
            for c in json.load(file)["data_features"]["feature"]
        ]  # fmt: skip
    path = arff if arff.exists() else older
    if not path.exists():
        raise Missing(f"no table {number} in {folder}: {arff} is missing.")
    with reading(path, f"table {number}"), gzip.open(path) as file:
        md5 = hashlib.file_digest(file, "md5").hexdigest()
    if md5 != about.get("md5_checksum", md5):
        raise UserError(
            f"{path} has checksum {md5}; OpenML says {about['md5_checksum']}.\n"
            f"`python data.py --prepare openml{number} --data-dir {data_dir}` downloads it again."
        )
    return form, columns, path


def download(url, number):
    """The content at `url`, in bytes. Raises UserError if the server does not answer, or has no such table."""
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return answer.read()
    except (OSError, http.client.HTTPException) as error:
        if getattr(error, "code", None) == 412:
            raise UserError(f"OpenML has no table {number}.") from error
        raise UserError(f"{url} cannot be downloaded ({error}).\nCheck the connection and repeat the command.") from error


def save(path, content):
    """Write `content` gzip-compressed; what was at `path` before is replaced only by the complete file."""
    with replacing(path) as file:
        file.write(gzip.compress(content))


def fetch_table(number, data_dir):
    """Download the three files of a table. Raises UserError if the server does not answer."""
    about, columns = (download(f"{SITE}/{name.format(number)}", number) for name in (ABOUT, FEATURES))
    with reading(f"{SITE}/{ABOUT.format(number)}", f"description of table {number}"):
        url = json.loads(about)["data_set_description"]["url"]
        path = path_of(url)
    table = download(url, number)
    save(local(data_dir, ABOUT.format(number)), about)
    save(local(data_dir, FEATURES.format(number)), columns)
    save(local(data_dir, path), table)


def prepare_table(number, data_dir):
    """Download a table if a file of it is missing or damaged, and print its size. Raises UserError if that fails."""
    try:
        open_table(number, data_dir)
    except UserError:
        try:
            fetch_table(number, data_dir)
        except UserError as error:
            if number not in SKLEARN_COPIES:
                raise
            print(f"openml{number}: {error}\nWithout it, scikit-learn's own copy is used ({SKLEARN_COPIES[number]}).")
            return
    table = read_table(number, data_dir)
    print(f"openml{number}: present, {len(table.labels):,} rows, {len(table.names)} columns, {len(set(table.labels))} classes")


# ---------------------------------------------------------------------------------------------------------------------
# Their content
# ---------------------------------------------------------------------------------------------------------------------


class Table(NamedTuple):
    values: np.ndarray  # (n, F) float64: numbers, or which category; NaN: missing
    categories: dict[int, int]  # categorical column -> how many categories it has
    names: list[str]  # of the columns (F)
    labels: np.ndarray  # (n,) str


ATTRIBUTE = re.compile(r"""@attribute\s+("(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|\S+)\s+(.+)""", re.IGNORECASE)


def read_arff(lines):
    """An ARFF file as numbers (n, F) float64, and for each column its list of categories, "REAL" or "STRING".

    A number is itself, a category is its place in the list; what is missing, and all text, is NaN.

    Args:
        lines: of the file, in bytes.
    """
    from sklearn.externals import _arff  # scikit-learn's copy of liac-arff, which itself is no longer developed

    at = 0  # number of the line

    def simplified():
        """Rewrite what the parser rejects or changes: dates become text, integers become numbers that may be infinite."""
        nonlocal at
        place, header = itertools.count(), True
        for line in lines:
            at, line = at + 1, line.decode()
            if header and (match := ATTRIBUTE.match(line.strip())):
                kind = match[2]
                if not kind.startswith("{"):
                    kind = "REAL" if kind.split()[0].upper() in ("NUMERIC", "REAL", "INTEGER") else "STRING"
                line = f"@ATTRIBUTE {next(place)} {kind}"
            header = header and not line.upper().startswith("@DATA")
            yield line

    try:
        content = _arff.load(simplified(), encode_nominal=True, return_type=_arff.DENSE_GEN)
        kinds = [kind for _, kind in content["attributes"]]
        text = [kind == "STRING" for kind in kinds]
        cells = (zip(row, text, strict=True) for row in content["data"])
        numbers = (np.nan if skip or cell is None else cell for cell, skip in itertools.chain.from_iterable(cells))
        values = np.fromiter(numbers, np.float64)  # (n F,)
    except _arff.ArffException as error:  # its own message fails if the line contains a %
        raise ValueError((error.message or "").replace("%d", str(at), 1)) from error
    return values.reshape(-1, len(kinds)), kinds


def listed(names):
    """a, b, c, d, e and 7 more"""
    return ", ".join(names[:5]) + f" and {len(names) - 5} more" * (len(names) > 5)


def read_table(number, data_dir):
    """A table of OpenML, without the rows and columns that a model cannot use; these are printed.

    Left out are rows without a label or with an infinite number, and columns that OpenML marks as row identifier or to be
    ignored, text, dates, columns without values, and categorical columns that only identify a row: no value occurs twice.

    Raises Missing, or UserError if a file is damaged, is not a classification table, would be too large one-hot, or has no
    column that remains.
    """
    form, columns, path = open_table(number, data_dir)
    if form != "arff":
        raise UserError(f"OpenML {number} is stored as {form}; only tables in dense ARFF are read.")
    targets = [column for column in columns if column.is_target]
    if len(targets) != 1:
        raise UserError(f"OpenML {number} has {len(targets)} target columns; a classification table has one.")
    with reading(path, f"table {number}"), gzip.open(path) as file:
        values, kinds = read_arff(file)  # (n, all columns)
        if sorted(column.index for column in columns) != list(range(len(kinds))):
            raise ValueError(f"{len(kinds)} columns; OpenML describes {len(columns)}")
    target = targets[0].index
    if kinds[target] == "STRING":
        raise UserError(f"OpenML {number}: its target, {targets[0].name}, is {targets[0].kind}, not classes.")
    known = np.isfinite(values[:, target])  # (n,)
    if not known.any():
        raise UserError(f"OpenML {number}: none of its {len(known):,} rows has a label in {targets[0].name}.")
    if not known.all():
        print(f"openml{number}: left out {np.sum(~known):,} of {len(known):,} rows, which have no label")
    values, labels = values[known], values[known, target]
    if isinstance(kinds[target], list):
        labels = np.array(kinds[target], dtype=object)[labels.astype(int)]

    kept, left_out = [], {}
    for column in columns:
        kind, all_values = kinds[column.index], values[:, column.index]
        present = all_values[np.isfinite(all_values)]
        reason = None
        if column.is_target:
            continue
        if column.is_ignored:
            reason = "marked by OpenML as identifier or to be ignored"
        elif kind == "STRING":
            reason = f"{column.kind}, not numbers or categories"
        elif len(present) == 0:
            reason = "no values"
        elif isinstance(kind, list):
            check_size(number, column.name, len(kind), len(values), len(columns) - 1)
            if len(np.unique(present)) == len(present) > len(values) / 2:
                reason = "no value occurs twice, so it only identifies the row"
        if reason:
            left_out.setdefault(reason, []).append(column.name)
        else:
            kept.append(column)
    for reason, names in left_out.items():
        print(f"openml{number}: left out {listed(names)} ({reason})")
    check_any(number, kept)
    kinds, names, values = [kinds[c.index] for c in kept], [c.name for c in kept], values[:, [c.index for c in kept]]  # (n, F)
    if (infinite := np.isinf(values)).any():
        rows, where = infinite.any(1), listed([names[i] for i in np.flatnonzero(infinite.any(0))])
        print(f"openml{number}: left out {rows.sum():,} of {len(rows):,} rows, which have infinite values ({where})")
        values, labels = values[~rows], labels[~rows]
    categories = {i: len(kind) for i, kind in enumerate(kinds) if isinstance(kind, list)}
    return Table(values, categories, names, labels.astype(str))


def check_size(number, name, categories, rows, columns):
    """Raises UserError if a table with this column would have more than TABLE_NUMBERS numbers, one-hot."""
    if (numbers := rows * (categories + 1) * columns) > TABLE_NUMBERS:
        raise UserError(
            f"OpenML {number}: column {name} has {categories:,} categories, so {rows:,} rows of {columns:,} columns would take "
            f"{numbers * 4 / 2**30:,.0f} GiB one-hot.\nAt most {TABLE_NUMBERS * 4 / 2**30:.0f} GiB are read: choose another."
        )


def check_any(number, columns):
    """Raises UserError if no column remains."""
    if not columns:
        raise UserError(f"OpenML {number}: no column remains that a model can use.\nChoose another table.")


# ---------------------------------------------------------------------------------------------------------------------
# The task
# ---------------------------------------------------------------------------------------------------------------------


def are_words(categories):
    """Whether the names differ in their letters and each has three or more: 1, 2, ... and class_0, class_1 are not words."""
    letters = {re.sub("[^a-z]", "", str(name).lower()) for name in categories}
    return len(letters) == len(categories) and min(map(len, letters)) > 2


def read_openml(data_dir, cache, number):
    """A classification table as a sequence of columns: x (n, channels, columns), standardised by the training rows.

    With categorical columns: each is one-hot (a missing value is a category of its own), the others follow with their value in
    channel 0, a missing one as 0 before scaling. Without: columns with missing values are left out, and all the others are the
    channels of a single position. A tenth of the rows, drawn by class, is the test set.
    """
    from sklearn import datasets
    from sklearn.model_selection import train_test_split

    try:
        (values, categories, column_names, labels), origin = read_table(number, data_dir), "official"
    except Missing:
        if number not in SKLEARN_COPIES:
            raise
        copy = getattr(datasets, SKLEARN_COPIES[number])()
        values, categories, column_names, labels = copy.data, {}, copy.feature_names, copy.target.astype(str)
        origin = "sklearn"
    names, y = np.unique(labels, return_inverse=True)
    called = names if origin == "official" else copy.target_names  # scikit-learn's copies have numbers as labels
    rarest = np.bincount(y).min(initial=len(y))
    if len(names) < 2 or rarest < 2 or len(y) < 10 * len(names):
        raise UserError(
            f"OpenML {number}: {len(y)} rows, {len(names)} classes, the rarest with {rarest}: too few for a test set."
        )
    train, test = train_test_split(np.arange(len(y)), test_size=0.1, random_state=0, stratify=y)
    counts = np.array([categories.get(i, 0) for i in range(values.shape[1])])  # (F,)
    if not categories:
        gaps = np.isnan(values).any(0)  # (F,)
        if gaps.any():
            print(f"openml{number}: left out {listed([column_names[i] for i in np.flatnonzero(gaps)])} (missing values)")
        values, counts = values[:, ~gaps], counts[~gaps]  # (n, columns without gaps)
        check_any(number, list(counts))
    numbers = np.nan_to_num(values[:, counts == 0])  # (n, numeric columns)
    mean, std, spread = numbers[train].mean(0), numbers[train].std(0), np.ptp(numbers[train], axis=0)  # (numeric columns,)
    statistics = {"categories": counts, "mean": mean, "std": np.where(spread > 0, std, 1)}  # std of 0.1, 0.1, ... is not 0
    x = encode_rows(values, **statistics)
    if categories:
        x = x[:, : max(1, np.flatnonzero(x.any((0, 2))).max() + 1)]  # the last channel only if a value is missing
    K = len(names)
    weights = len(train) / (K * np.bincount(y[train], minlength=K))  # n / (K n_c): mean 1 over the training rows
    statistics |= {"channels": x.shape[1], "weights": weights}
    changes = {"shape": x.shape[1:], "output": (len(names),), "statistics": statistics, **of_training_rows(statistics)}
    changes |= {"names": tuple(map(str, called))} if are_words(called) else {}
    return (x[train], y[train]), (x[test], y[test]), origin, changes


def encode_rows(values, categories, mean, std):
    """Rows of a table as `read_openml` describes them, with all channels: (n, F) -> (n, channels, F), or (n, F, 1).

    Args:
        values: (n, F) numbers, categories as whole numbers from 0, NaN where a value is missing.
        categories: (F,) how many there are in a column; 0: it holds numbers.
        mean, std: (numeric columns,) of the training rows.
    """
    numbers = (np.nan_to_num(values[:, categories == 0]) - mean) / std  # (n, numeric columns)
    if not categories.any():
        return numbers.astype(np.float32)[:, :, None]  # (n, F, 1)
    x = np.zeros((len(values), categories.max() + 1, len(categories)), np.float32)  # (n, channels, F)
    columns = np.flatnonzero(categories)
    for position, column in enumerate(columns):
        code = np.nan_to_num(values[:, column], nan=categories[column]).astype(int)
        x[np.arange(len(values)), code, position] = 1
    x[:, 0, len(columns) :] = numbers
    return x


def of_training_rows(statistics):
    """The fields of Task set by the statistics of the training rows: the weights of its classes, and how new rows are prepared.

    New rows are (n, F), without the label and the columns that were left out, in the order of the table.
    """
    categories, mean, std, channels, weights = (statistics[k] for k in ("categories", "mean", "std", "channels", "weights"))

    def prepare(where, values):
        values = np.float64(check_shape(where, values, (None, len(categories))))  # as the numbers of a table are read
        known = np.where(np.isnan(values) & categories.any(), 0, values)  # only tables with categories may have missing values
        check(where, known, (len(categories),))
        for column in np.flatnonzero(categories):
            check(f"{where}: column {column}", known[:, column], (), "class", categories[column])
        x = encode_rows(values, categories, mean, std)
        beyond = x[:, channels:].any((1, 2))  # (n,)
        if beyond.any():
            raise UserError(
                f"{where}: sample {beyond.argmax()} lacks a category, or has one that no row of the table had.\n"
                f"Wrong in {beyond.sum():,} of {len(x):,} samples: correct them, or leave these samples out."
            )
        return x[:, :channels]  # (n, C, F); without categories (n, F, 1)

    return {"loss": functools.partial(cross_entropy, weights=tuple(weights)), "prepare": prepare}
