"""Every command that the README shows works: each is run here, on a tiny configuration."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.patience import PATIENCE_S
from tests.unit.synthetic import small, write

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
TINY = {
    "model": {"num_layers": 2, "hidden_size": 16, "num_heads": 2, "seq_len": 16},
    "parallel": {"tp": 2, "sequence_parallel": True},
    "train": {"steps": 2, "global_batch": 2, "eval_batches": 1},
}


def shown() -> list[str]:
    """Command lines of the README's code blocks, comments cut off."""
    blocks = re.findall(r"```\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if re.match(r"(make|dist-gpt|torchrun|python) ", line)]


def test_the_readme_shows_the_commands_we_think() -> None:
    words = {" ".join(line.split()[:2]) for line in shown()}
    verbs = {f"dist-gpt {verb}" for verb in ("launch", "report", "plan", "dryrun", "verify", "flops")}
    assert words == {"make demo", "make test", *verbs, "torchrun --nproc-per-node"}


@pytest.mark.parametrize("line", [line for line in shown() if line.startswith("make ")])
def test_make_targets_exist(line: str) -> None:
    """The targets themselves are run by continuous integration, each on a fresh clone."""
    done = subprocess.run(["make", "-n", *line.split()[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("line", [line for line in shown() if not line.startswith("make ")])
def test_command_runs(line: str, tmp_path: Path) -> None:
    config = tmp_path / "tiny.yaml"
    document = {**TINY, "name": "tiny", "data": {"cache": str(tmp_path / "cache"), "source": str(ROOT / "README.md")}}
    config.write_text(yaml.safe_dump(document))
    if "RUN_DIR" in line:
        write(tmp_path / "run", small("parallel.tp=2"))
    names = {"CONFIG": str(config), "RUN_DIR": str(tmp_path / "run")}
    words = [names.get(word, word) for word in shlex.split(line)]
    if words[0] == "torchrun":  # two ranks do what eight would
        words[words.index("--nproc-per-node") + 1] = "2"
    if words[0] == "dist-gpt" and words[1] == "launch":
        words += ["--set", "parallel.dp=1"]
    words[0] = str(BIN / words[0])
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning" not in done.stdout + done.stderr or words[0].endswith("torchrun")
