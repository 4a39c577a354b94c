"""The tests need no network, no GPU and no data: everything runs on toy images and on small files made here."""

import importlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402

METHODS = ["pare", "orca", "mona", "finetune"]

# Two tests run at a time (pyproject.toml), each on one core.
os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def script(tmp_path_factory):
    """Runs a script of the project as a user does; its stdout is returned, its exit code asserted."""
    folder = tmp_path_factory.mktemp("work")  # no datasets/ in here: toy data

    def run(*command, out, option=None, code=0, processes=1, timeout=120):
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
        option = option or ("--out" if "pretrain" in command[0] else "--out-dir")
        done = subprocess.run(
            [*launcher, str(ROOT / command[0]), *map(str, command[1:]), option, str(out)],
            cwd=folder, capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip
        assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stderr if code else done.stdout

    return run


def here(name, *command, out):
    """The same in this process, which saves the imports: for what a process of its own has no part in."""
    module = importlib.import_module(name.removesuffix(".py"))
    options = [*map(str, command), "--data-dir", str(out / "none"), "--out-dir", str(out)]
    return module.main(tyro.cli(module.Args, args=options))


SHORT = ["--task", "spherical", "--scale", "tiny", "--n-train", 320, "--epochs", 3]


def result(folder):
    return json.loads((folder / "result.json").read_text())


def weights(folder):
    return torch.load(folder / "last.pt", weights_only=True)["net"]


def rows(folder):
    """metrics.jsonl without the times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in lines]


NOISE = ["--gate-noise", 1]  # random numbers that a resumed run has to draw again


@pytest.fixture(scope="session")
def uninterrupted(script, tmp_path_factory):
    """PaRe, three short epochs; several tests compare with it."""
    out = tmp_path_factory.mktemp("uninterrupted")
    return script("pare.py", *SHORT, *NOISE, out=out), out / "spherical-pare-tiny-swin-s0-toy"


@pytest.fixture(scope="session")
def swin():
    return common.load_source("tiny-swin")


@pytest.fixture(scope="session")
def roberta():
    return common.load_source("tiny-roberta")


@pytest.fixture
def server():
    """Serves `content` from any path, with byte ranges unless told not to; keeps what was asked for."""

    class Handler(BaseHTTPRequestHandler):
        content, ranges, cut, asked = b"", True, None, []

        def do_GET(self):
            begin = int(self.headers.get("Range", "bytes=0-")[6:-1]) if self.ranges else 0
            Handler.asked.append(begin)
            if self.path.endswith("missing") or begin >= len(self.content):
                return self.send_error(404 if self.path.endswith("missing") else 416)
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
