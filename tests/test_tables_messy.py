"""OpenML tables as they come: columns and rows that a model cannot use, damaged files, and no network during a run."""

import gzip
import hashlib
import io
import json
import socket
import urllib.error

import numpy as np
import pytest

import cli
import data
from tasks import tables

SITE = "https://www.openml.org"


def answers(columns, rows, number=999, form="ARFF", targets=None, ignored=(), types=None):
    """The answers of OpenML for a table: path on its site -> bytes. columns: name -> type or list of categories."""
    kinds = {name: "{" + ",".join(kind) + "}" if isinstance(kind, list) else kind for name, kind in columns.items()}
    arff = "\n".join(["@RELATION t", *(f"@ATTRIBUTE {name} {kind}" for name, kind in kinds.items()), "@DATA",
                      *(",".join(map(str, row)) for row in rows)]) + "\n"  # fmt: skip
    said = {"STRING": "string", "REAL": "numeric", "INTEGER": "numeric"}
    targets = [list(columns)[-1]] if targets is None else targets
    features = [{"index": str(i), "name": name,
                 "data_type": "nominal" if isinstance(kind, list) else said.get(kind.upper(), "date"),
                 "is_target": str(name in targets).lower(), "is_ignore": str(name in ignored).lower(),
                 "is_row_identifier": "false", "number_of_missing_values": "0"}
                for i, (name, kind) in enumerate(columns.items())]  # fmt: skip
    about = {"id": str(number), "name": "t", "version": "1", "format": form, "status": "active", "file_id": "7",
             "url": f"{SITE}/data/v1/download/7/t.arff", "description": "",
             "md5_checksum": hashlib.md5(arff.encode()).hexdigest()}  # fmt: skip
    return {
        f"api/v1/json/data/{number}": json.dumps({"data_set_description": about}).encode(),
        f"api/v1/json/data/features/{number}": json.dumps({"data_features": {"feature": features}}).encode(),
        f"api/v1/json/data/qualities/{number}": json.dumps({"data_qualities": {"quality": []}}).encode(),
        "data/v1/download/7/t.arff": arff.encode(),
    }


def write(folder, *args, number=999, **options):
    for path, content in answers(*args, number=number, **options).items():
        path = folder / "openml/openml.org" / f"{path}.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(content))
    return folder


def read(folder):
    return tables.read_openml(folder, None, 999)


def equal(one, other):
    return all(np.array_equal(a, b) for first, second in zip(one[:2], other[:2], strict=True)
               for a, b in zip(first, second, strict=True)) and one[3]["shape"] == other[3]["shape"]  # fmt: skip


def files_of(folder):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


GOOD = {"age": "REAL", "sex": ["female", "male"], "fare": "INTEGER", "survived": ["0", "1"]}


def good_row(i):
    return [i * 37 % 80 / 2, "female" if i % 3 else "male", "?" if i % 9 == 0 else i * i, i % 2]


def test_what_is_read_equals_what_scikit_learn_reads(tmp_path):
    from sklearn.datasets import fetch_openml

    write(tmp_path, GOOD, [good_row(i) for i in range(50)])
    table = tables.read_table(999, tmp_path)
    theirs = fetch_openml(data_id=999, data_home=tmp_path, as_frame=False, parser="liac-arff")
    assert np.array_equal(table.values, theirs.data, equal_nan=True) and list(table.labels) == list(theirs.target)
    assert table.names == theirs.feature_names and table.categories == {1: 2}


def test_columns_that_a_model_cannot_use_are_left_out_and_printed(tmp_path, capsys):
    """Titanic (40945) has text in name, ticket, cabin, boat and home.dest."""
    rows = [good_row(i) for i in range(60)]
    expected = read(write(tmp_path / "good", GOOD, rows))
    messy = {"name": "STRING", "'home dest'": "string", "when": 'DATE "yyyy-MM-dd HH:mm"', "empty": "REAL", "none": ["a", "b"],
             "ticket": [f"t{i}" for i in range(60)], "row": "REAL", **GOOD}  # fmt: skip
    more = [[f"'Mrs. {i}, 50% \"M.\"'", "?", f"'2020-01-{i % 28 + 1:02d} 10:00'", "?", "?", f"t{i}", i] for i in range(60)]
    write(tmp_path / "messy", messy, [[*a, *b] for a, b in zip(more, rows, strict=True)], ignored=["row"])
    capsys.readouterr()
    assert equal(read(tmp_path / "messy"), expected)
    said = capsys.readouterr().out
    reasons = {"name": "string", "'home dest'": "string", "when": "date", "empty": "no values", "none": "no values",
               "ticket": "no value occurs twice", "row": "marked by OpenML"}  # fmt: skip
    for name, why in reasons.items():
        assert any(name in line and why in line for line in said.splitlines()), name


def test_a_whole_number_that_differs_in_every_row_is_a_feature(tmp_path, capsys):
    write(tmp_path, {"n": "INTEGER", "class": ["x", "y"]}, [[i * i, "xy"[i % 2]] for i in range(40)])
    (x, _), *_ = read(tmp_path)
    assert x.shape == (36, 1, 1) and len(np.unique(x)) == 36 and capsys.readouterr().out == ""


def test_a_whole_number_column_keeps_its_fractions(tmp_path):
    write(tmp_path, {"n": "INTEGER", "class": ["x", "y"]}, [[i / 4, "xy"[i % 2]] for i in range(40)])
    assert np.array_equal(tables.read_table(999, tmp_path).values[:, 0], np.arange(40) / 4)


@pytest.mark.parametrize("target", [["x", "y"], "REAL"])
def test_rows_without_a_label_are_left_out(tmp_path, capsys, target):
    names = {"x": "1", "y": "2"} if target == "REAL" else {"x": "x", "y": "y"}
    rows = [[i, "uv"[i % 3 == 0], names["xy"[i % 2]]] for i in range(60)]
    columns = {"a": "REAL", "b": ["u", "v"], "class": target}
    gaps = [row if i % 10 else [*row[:2], "?"] for i, row in enumerate(rows)]
    expected = read(write(tmp_path / "good", columns, [row for row in gaps if row[2] != "?"]))
    assert equal(read(write(tmp_path / "gaps", columns, gaps)), expected)
    assert "left out 6 of 60 rows, which have no label" in capsys.readouterr().out


def test_classes_may_be_negative_numbers_and_an_infinite_one_is_no_label(tmp_path, capsys):
    rows = [[i, [-1, 1, -2][i % 3]] for i in range(60)]
    write(tmp_path, {"a": "REAL", "class": "REAL"}, [*rows, [60, "inf"]])
    (_, y), (_, y_test), _, changes = read(tmp_path)
    assert changes["output"] == (3,) and list(np.bincount(np.concatenate([y, y_test]))) == [20] * 3
    assert "left out 1 of 61 rows, which have no label" in capsys.readouterr().out


def test_classes_may_be_called_none_nan_or_a_question_mark(tmp_path, capsys):
    names = ["None", "nan", "'?'", "''"]
    write(tmp_path, {"a": "REAL", "class": names}, [[i, names[i % 4]] for i in range(80)])
    (_, y), (_, y_test), _, changes = read(tmp_path)
    assert changes["output"] == (4,) and list(np.bincount(np.concatenate([y, y_test]))) == [20] * 4
    assert "left out" not in capsys.readouterr().out


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("value", ["inf", "-Infinity", "1e999"])
def test_rows_with_infinite_values_are_left_out(tmp_path, capsys, mixed, value):
    columns = {"a": "INTEGER", "b": "REAL", **({"c": ["u", "v"]} if mixed else {}), "class": ["x", "y"]}
    rows = [[i, 3 * i, *("u" for _ in range(mixed)), "xy"[i % 2]] for i in range(60)]
    expected = read(write(tmp_path / "good", columns, rows[:7] + rows[8:]))
    rows[7][0] = value
    assert equal(read(write(tmp_path / "infinite", columns, rows)), expected)
    assert "left out 1 of 60 rows, which have infinite values (a)" in capsys.readouterr().out


def test_a_column_of_infinite_values_alone_is_left_out(tmp_path, capsys):
    write(tmp_path, {"a": "REAL", "b": "REAL", "class": ["x", "y"]}, [["inf", i, "xy"[i % 2]] for i in range(60)])
    assert read(tmp_path)[3]["shape"] == (1, 1) and "left out a (no values)" in capsys.readouterr().out


NOTHING = {
    "gaps": ({"a": "REAL", "b": "REAL"}, lambda i: ["?" if i % 7 == 0 else i, "?" if i % 11 == 0 else i]),
    "text": ({"a": "STRING", "b": "STRING"}, lambda i: [f"t{i}", f"u{i}"]),
    "identifier": ({"a": [f"i{i}" for i in range(60)]}, lambda i: [f"i{i}"]),
}


@pytest.mark.parametrize("kind", NOTHING)
def test_a_table_without_usable_columns_is_refused(tmp_path, capsys, kind):
    columns, row = NOTHING[kind]
    write(tmp_path, {**columns, "class": ["x", "y"]}, [[*row(i), "xy"[i % 2]] for i in range(60)])
    with pytest.raises(cli.UserError, match="OpenML 999: no column remains"):
        read(tmp_path)
    assert "left out a" in capsys.readouterr().out


def test_thousands_of_categories_are_read_or_refused_by_size(tmp_path, monkeypatch):
    columns = {"who": [f"w{i}" for i in range(5000)], "a": "REAL", "class": ["x", "y"]}
    write(tmp_path, columns, [[f"w{i % 100 * 50}", i, "xy"[i % 2]] for i in range(200)])
    (x, _), *_ = read(tmp_path)
    assert x.shape == (180, 4951, 2) and (x[:, :, 0].sum(1) == 1).all()
    monkeypatch.setattr(tables, "TABLE_NUMBERS", 200 * 5001 * 2 - 1)
    with pytest.raises(cli.UserError, match="column who has 5,000 categories, so 200 rows of 2 columns"):
        read(tmp_path)


REFUSED = {
    "sparse": (dict(form="Sparse_ARFF"), {}, [], "stored as sparse_arff"),
    "two targets": (dict(targets=["a", "class"]), {}, [], "has 2 target columns"),
    "no target": (dict(targets=[]), {}, [], "has 0 target columns"),
    "a text target": ({}, {"class": "STRING"}, [], "its target, class, is string, not classes"),
    "all labels missing": ({}, {}, [[1, "?"]] * 40, "none of its 40 rows has a label in class"),
    "another category": ({}, {}, [[1, "z"]], "t.arff.gz is not a readable table 999 .*z not found.*line 45"),
    "text as a number": ({}, {}, [["12%s", "x"]], "t.arff.gz is not a readable table 999 .*numerical value, at line 45"),
    "a long row": ({}, {}, [["12%s", "x", "x"]], "t.arff.gz is not a readable table 999 .*line 45"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_classification_table_is_refused_in_two_lines(tmp_path, kind):
    options, changed, more, message = REFUSED[kind]
    rows = [] if kind == "all labels missing" else [[i, "xy"[i % 2]] for i in range(40)]
    write(tmp_path, {"a": "REAL", "class": ["x", "y"], **changed}, rows + more, **options)
    with pytest.raises(cli.UserError, match=message) as error:
        read(tmp_path)
    assert len(str(error.value).splitlines()) <= 2


def damage(folder, kind):
    root = folder / "openml/openml.org"
    arff, about = root / "data/v1/download/7/t.arff.gz", root / "api/v1/json/data/999.gz"
    if kind == "another content":
        arff.write_bytes(gzip.compress(gzip.decompress(arff.read_bytes()) + b"1,male,1,1\n"))
    elif kind == "half a file":
        arff.write_bytes(arff.read_bytes()[:60])
    elif kind == "no JSON":
        about.write_bytes(gzip.compress(b"<html>busy</html>"))
    elif kind == "no columns":
        (root / "api/v1/json/data/features/999.gz").unlink()
    else:
        arff.unlink()


DAMAGES = ["another content", "half a file", "no JSON", "no columns", "no table"]


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_run_deletes_writes_and_downloads_nothing(tmp_path, kind):
    write(tmp_path / "data", GOOD, [good_row(i) for i in range(60)])
    damage(tmp_path / "data", kind)
    before = files_of(tmp_path / "data")
    with pytest.raises(cli.UserError, match="checksum|not a readable|no table 999"):
        data.load("openml999", tmp_path / "data", tmp_path / "cache", "full")
    assert files_of(tmp_path / "data") == before


def serve(monkeypatch, content):
    """OpenML's server: answers with `content` (path -> bytes), or with its error for an unknown table. Returns the requests."""
    asked = []

    def urlopen(url, timeout):
        asked.append(url)
        path = url.removeprefix(f"{SITE}/")
        if path not in content:
            raise urllib.error.HTTPError(url, 412, "Precondition Failed", {}, io.BytesIO())
        return io.BytesIO(content[path])

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    return asked


@pytest.mark.parametrize("kind", [None, *DAMAGES])
def test_prepare_downloads_a_table_that_is_missing_or_damaged(tmp_path, monkeypatch, capsys, kind):
    rows = [good_row(i) for i in range(60)]
    asked = serve(monkeypatch, answers(GOOD, rows))
    expected = write(tmp_path / "expected", GOOD, rows)
    if kind:
        damage(write(tmp_path / "data", GOOD, rows), kind)
    tables.prepare_table(999, tmp_path / "data")
    assert len(asked) == 3 and "openml999: present, 60 rows, 3 columns, 2 classes" in capsys.readouterr().out
    assert equal(read(tmp_path / "data"), read(expected)) and not list(tmp_path.rglob("*.part"))
    tables.prepare_table(999, tmp_path / "data")
    assert len(asked) == 3  # it is present


@pytest.mark.parametrize("url", ["file:///etc/hostname", f"{SITE}/../../../t.arff", "t.arff"])
def test_a_url_of_a_local_file_or_out_of_the_folder_is_refused(tmp_path, monkeypatch, url):
    content = {
        path: answer.replace(f"{SITE}/data/v1/download/7/t.arff".encode(), url.encode())
        for path, answer in answers(GOOD, [good_row(i) for i in range(60)]).items()
    }
    asked = serve(monkeypatch, content)
    with pytest.raises(cli.UserError, match="description of table 999 .it names "):
        tables.prepare_table(999, tmp_path)
    assert len(asked) == 2 and not files_of(tmp_path)
    path = write(tmp_path, GOOD, [good_row(i) for i in range(60)]) / "openml/openml.org/api/v1/json/data/999.gz"
    path.write_bytes(gzip.compress(content["api/v1/json/data/999"]))
    with pytest.raises(cli.UserError, match="description of table 999 .it names "):
        read(tmp_path)


def test_prepare_without_an_answer_keeps_what_there_is(tmp_path, monkeypatch, capsys):
    def refuse(url, timeout):
        raise urllib.error.URLError("no route")

    write(tmp_path, GOOD, [good_row(i) for i in range(60)])
    damage(tmp_path, "half a file")
    before = files_of(tmp_path)
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(cli.UserError, match="api/v1/json/data/999 cannot be downloaded .*no route"):
        tables.prepare_table(999, tmp_path)
    assert files_of(tmp_path) == before
    tables.prepare_table(61, tmp_path)
    assert "scikit-learn's own copy is used (load_iris)" in capsys.readouterr().out
    serve(monkeypatch, {})
    with pytest.raises(cli.UserError, match="OpenML has no table 998"):
        tables.prepare_table(998, tmp_path)


def test_tables_that_older_versions_of_scikit_learn_downloaded_are_found(tmp_path):
    rows = [good_row(i) for i in range(60)]
    expected = read(write(tmp_path / "new", GOOD, rows))
    folder = write(tmp_path / "old", GOOD, rows) / "openml/openml.org/data/v1/download"
    (folder / "7/t.arff.gz").rename(folder / "7.gz")
    assert equal(read(tmp_path / "old"), expected)
