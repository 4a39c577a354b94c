"""The commands of docs/reading-group.md run, from its first to its last, and print what it says."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT

GUIDE = (ROOT / "docs/reading-group.md").read_text()
SESSIONS = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", GUIDE, re.S | re.M))
SAYS = {  # by a distinctive part of the command
    "for epoch in range(10)": "9 text: k = 4, lambda = 0.10   code: k = 13, lambda = 0.20",
    "for k in (0, 1, 3, 8)": "3 [0.0, 105.0, 2.0, 106.0, 4.0, 107.0, 6.0, 7.0]",
    "top_k_mask(scores, 3).sum()": "tensor([[0., 0., 0., 0., 0., 0., 0., 0.]])",
    "for s in (0 * shift, shift)": "none [0.0, 4.5]",
    "for labels in (y, y[torch.randperm(60)])": "exact [0.0, 241.8]\ngaussian [0.0, 245.2]\nnone [0.0, 0.0]",
    "mona.alignment(f, y) + mona.uniformity(f)": "clusters   with plus  -1.41   as printed   1.41",
}


@pytest.mark.matrix
@pytest.mark.parametrize("session", SESSIONS)
def test_the_commands_of_a_session_run_and_print_what_it_says(session, tmp_path):
    for path in ROOT.iterdir():  # run folders are made in a folder of the test's own
        if path.name not in ("runs", ".git"):
            (tmp_path / path.name).symlink_to(path)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    blocks = re.findall(r"```bash\n(.*?)```", SESSIONS[session], re.S)
    assert len(blocks) >= 5
    for block in blocks:
        begin = time.monotonic()
        done = subprocess.run(["bash", "-ec", block], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, block + done.stderr
        print(f"{time.monotonic() - begin:.0f} s\n{block}{done.stdout[-3000:]}")
        for part, said in SAYS.items():
            assert part not in block or said in done.stdout, block + done.stdout
    assert all(any(part in text for text in SESSIONS.values()) for part in SAYS)
