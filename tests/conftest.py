"""The tests need no network, no GPU and no data: everything runs on toy images and on small files made here.

The process that starts the workers reads this file, too: imports that take seconds are in helpers.py.
"""

import io
import os
import runpy
import sys
import threading
from contextlib import redirect_stderr, redirect_stdout
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# two tests run at a time (pyproject.toml), each on one core; nothing is asked of a network
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent"}
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # tools/gpu.sh gives one

SLOWEST = "run_processes reproduce run matrix mona wiring fuzz recraft contrast figures run_folder orca pde oracle pare".split()


def pytest_collection_modifyitems(items):
    """Slow files come first, so that no worker is left with a slow one at the end."""
    place = {f"test_{name}": i for i, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))  # stable: a file stays in its order


@pytest.fixture(autouse=True)
def same_files():
    """Reset the random numbers of official.py: its files do not depend on the order of the tests."""
    import helpers  # noqa: F401  short runs, in every test
    import numpy as np
    import official

    official.RNG.bit_generator.state = np.random.default_rng(0).bit_generator.state


@pytest.fixture(scope="session")
def script(tmp_path_factory):
    """Runs a script of the project by its command line, in this process, which saves the seconds of the imports.

    Returns what it said on stdout, or on stderr if an exit code is expected; asserts the exit code.
    """
    folder = tmp_path_factory.mktemp("work")  # no datasets/ in here: toy data

    def run(file, *options, out, option=None, code=0):
        option = option or ("--out" if "pretrain" in str(file) else "--out-dir")
        said, complained, ended = io.StringIO(), io.StringIO(), 0
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(said), redirect_stderr(complained):
            patch.setattr(sys, "argv", [str(file), *map(str, options), option, str(out)])
            patch.chdir(folder)
            try:
                runpy.run_path(str(ROOT / file), run_name="__main__")
            except SystemExit as end:
                ended = end.code or 0
        assert ended == code, f"exit code {ended}\n{said.getvalue()}\n{complained.getvalue()}"
        return (complained if code else said).getvalue()

    return run


@pytest.fixture(scope="session")
def uninterrupted(script, tmp_path_factory):
    """PaRe, three short epochs; several tests compare with it."""
    from helpers import NOISE, SHORT

    out = tmp_path_factory.mktemp("uninterrupted")
    return script("pare.py", *SHORT, *NOISE, out=out), out / "spherical-pare-tiny-swin-s0-toy"


@pytest.fixture(scope="session")
def swin():
    import common

    return common.load_source("tiny-swin")


@pytest.fixture(scope="session")
def roberta():
    import common

    return common.load_source("tiny-roberta")


@pytest.fixture
def server():
    """Serves `content` from any path, with byte ranges unless told not to; keeps what was asked for."""

    class Handler(BaseHTTPRequestHandler):
        content, ranges, cut, asked = b"", True, None, []

        def do_GET(self):
            begin = int(self.headers.get("Range", "bytes=0-")[6:-1]) if self.ranges else 0
            Handler.asked.append(begin)
            if self.path.endswith("missing"):
                return self.send_error(404)
            if begin >= len(self.content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(self.content)}")
                return self.end_headers()
            body = self.content[begin:]
            self.send_response(206 if begin else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: self.cut])

        def log_message(self, *_):
            pass

    web = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    Handler.url = f"http://127.0.0.1:{web.server_port}"
    yield Handler
    web.shutdown()
