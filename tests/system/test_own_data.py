"""docs/own_data.md, followed by copy and paste: its files and its commands, with fewer steps."""

from __future__ import annotations

import re
import shlex
import subprocess

import pytest
from forked_commands import run_forked
from small_pipeline import ROOT

PAGE = (ROOT / "docs" / "own_data.md").read_text(encoding="utf-8")
FILES = re.findall(r'^```yaml title="(.+?)"\n(.*?)^```', PAGE, re.DOTALL | re.MULTILINE)
COMMANDS = [
    line
    for block in re.findall(r"^```sh\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    for line in block.splitlines()
]
SHORTER = {
    "data_tools/images_to_mds.py": ["--workers", "0"],
    "data_tools/encode_latents.py": ["--workers", "0"],
    "lgm_scale/train.py": ["train.max_duration=2ba", "data.num_workers=0"],
    "eval/sweep.py": ["num_images=20", "sampler.num_steps=3", "cells=[{num_tokens: 16}]"],
}
"""What the test adds: the page's run takes minutes."""


@pytest.mark.slow
@pytest.mark.system
def test_the_page_works_as_it_stands(tmp_path):
    for name in ("data_tools", "eval", "lgm_scale", "yamls"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name, text in FILES:
        (tmp_path / name).write_text(text)
    said = ""
    for command in COMMANDS:
        words = shlex.split(command)
        if words[0] in ("python", "composer"):
            done = run_forked([*words[1:], *SHORTER.get(words[1], [])], tmp_path)
        else:
            shell = ["bash", "-euc", command]
            done = subprocess.run(shell, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stderr[-3000:]}"
        said += done.stdout
    for line in (
        "runs/mine/images/train: 256 images of 64 x 64 in 4 classes",
        "runs/mine/latents: 256 images as 64 x 16 latents, both flips",
        "parameters   0.6 M (601,200)",
    ):
        assert line in said
        assert line in PAGE
    for name in ("samples.png", "report/index.html", "reconstructions/reconstruction.png"):
        assert (tmp_path / "runs" / "mine" / name).stat().st_size > 1000


def test_there_are_files_and_commands_on_the_page():
    assert [name for name, _ in FILES] == ["my_tokenizer.yaml", "my_generator.yaml"]
    assert sum(line.startswith(("python ", "composer ")) for line in COMMANDS) >= 10
