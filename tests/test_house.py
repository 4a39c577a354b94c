"""Structure of the project: the training loop is the same text in every method file, imports go one way, files stay short."""

import ast
import difflib
import re

import pytest
from helpers import METHODS, ROOT

# what each file may import of ours, from the bottom up
ROOMS = {f"tasks.{room}": {"cli", "tasks.files"} for room in ("files", "scores", "published", "pde")}
READERS = {f"tasks.{room}": {"cli", *ROOMS} for room in ("images", "signals", "fields", "tables", "text")}
ALLOWED = {
    "cli": set(), **ROOMS, **READERS, "tasks.toys": {"cli", "tasks.files", *READERS},
    "backbones": {"cli"}, "common": {"cli", "backbones"}, "data": {"cli", *ROOMS, *READERS, "tasks.toys"},
    "plots": {"cli"}, "run": {"cli", "common", "data", "plots"},
}  # fmt: skip
FILES = {name: ROOT / f"{name.replace('.', '/')}.py" for name in (*ALLOWED, *METHODS, "predict")}  # and no file of a user's own
NAMES = {"pare": "PaRe", "orca": "ORCA", "mona": "MoNA", "recraft": "RECRAFT", "contrast": "contrast", "lsg": "LSG",
         "finetune": "finetune"}  # fmt: skip


def shared_lines(method):
    """main without the lines and blocks that are marked as the method's."""
    text = (ROOT / f"{method}.py").read_text()
    main = text[text.index("def main(args):") :]
    main = re.sub(rf"    # ---- {NAMES[method]}:.*?(?=    # ---- )", "", main, flags=re.S)
    return [line for line in main.splitlines() if f"# {NAMES[method]}" not in line and line.strip()]


@pytest.mark.parametrize("method", [m for m in METHODS if m != "pare"])
def test_the_loop_is_the_same_text_in_every_method_file(method):
    main_pare, main = shared_lines("pare"), shared_lines(method)
    assert len(main) > 40 and main == main_pare, "\n".join(difflib.unified_diff(main_pare, main, lineterm=""))


@pytest.mark.parametrize("method", METHODS)
def test_options_that_all_methods_share_are_declared_once(method):
    tree = ast.parse(FILES[method].read_text())
    (options,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args"]
    shared = re.findall(r"^    (\w+): ", FILES["cli"].read_text(), re.M)
    own = {node.target.id for node in options.body if isinstance(node, ast.AnnAssign)}
    assert ast.unparse(options.bases[0]) == "cli.Args" and "batch_size" in shared and not own & set(shared)


def imports(file):
    """The modules that a file imports, anywhere in it: `from tasks import pde` is tasks.pde."""
    for node in ast.walk(ast.parse(FILES[file].read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            yield from (f"tasks.{name.name}" for name in node.names) if node.module == "tasks" else (node.module,)


@pytest.mark.parametrize("file", FILES)
def test_a_file_imports_only_what_lies_below(file):
    ours = {name for name in imports(file) if name in FILES or name.split(".")[0] in ("tasks", "tools", "tests")}
    allowed = ALLOWED.get(file, {"cli", "common", "data", "run"}) | ({"pare"} if file == "contrast" else set())
    assert ours <= allowed - {file}, f"{file}.py imports {ours - allowed}"
    assert file not in METHODS or ours == allowed


@pytest.mark.parametrize("file", FILES)
def test_no_file_is_longer_than_650_lines_and_data_py_than_700(file):
    assert len(FILES[file].read_text().splitlines()) <= (700 if file == "data" else 650)


def test_libraries_that_take_seconds_to_import_wait_until_they_are_used():
    slow = {"timm", "transformers", "matplotlib", "ot", "sklearn"}
    for file, path in FILES.items():
        top = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {name.split(".")[0] for node in top for name in [getattr(node, "module", None) or node.names[0].name]}
        assert not names & slow, f"{file}: {names & slow}"
