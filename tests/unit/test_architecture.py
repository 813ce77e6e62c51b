"""The project keeps its architecture (see architecture.py), and the walker that says so finds planted violations."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.architecture import (
    RULES,
    TORCH_FREE,
    TORCH_FREE_FILES,
    Rule,
    breaks_import_order,
    communicates_outside_comm,
    declares_global,
    drags_torch,
    has_circles,
    is_too_long,
    leads_nowhere,
    runs_untrusted_text,
    sources,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_no_file_of_the_project(rule: Rule) -> None:
    violations = list(rule(ROOT))
    assert not violations, "\n" + "\n".join(violations)


def test_torch_free_rooms_import_where_torch_cannot_be_imported() -> None:
    """Also what third-party packages import in turn: in a process in which `import torch` fails."""
    modules = [
        source.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for source in sources(ROOT)
        if source.room in TORCH_FREE or source.path in TORCH_FREE_FILES
    ]
    code = "import sys, importlib\nsys.modules['torch'] = None\nfor m in sys.argv[1:]: importlib.import_module(m)"
    ran = subprocess.run([sys.executable, "-c", code, *modules], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


# --- the walker itself, on planted violations ------------------------------------------------------

PLANTED = [
    (breaks_import_order, "dist_gpt/config/a.py", "from dist_gpt.layout import Layout", "config may not import layout"),
    (breaks_import_order, "dist_gpt/layout.py", "def f():\n    from .plan import x", "layout may not import plan"),
    (breaks_import_order, "dist_gpt/plan/a.py", "from ..comm.group import Group", "plan may not import comm"),
    (breaks_import_order, "dist_gpt/comm.py", "from dist_gpt import layout, model", "comm may not import model"),
    (breaks_import_order, "dist_gpt/report/a.py", "import dist_gpt.params", "report may not import params"),
    (breaks_import_order, "dist_gpt/verify.py", "import launch.starters.local", "verify may not import launch"),
    (breaks_import_order, "launch/a.py", "import dist_gpt.data.tokens", "launch may not import data"),
    (breaks_import_order, "dist_gpt/cli.py", "import dist_gpt.train.trainer", "import it inside a function"),
    (breaks_import_order, "dist_gpt/cli.py", "class A:\n    import launch", "import it inside a function"),
    (breaks_import_order, "dist_gpt/__init__.py", "from .config import a", "dist_gpt may not import config"),
    (breaks_import_order, "dist_gpt/model.py", "__import__('dist_gpt.train.trainer')", "model may not import train"),
    (breaks_import_order, "dist_gpt/model.py", "import importlib as i\ni.import_module(n)", "computed import"),
    (breaks_import_order, "dist_gpt/events.py", "import pydantic", "standard library alone"),
    (breaks_import_order, "dist_gpt/events/a.py", "import dist_gpt.layout", "events may not import layout"),
    (breaks_import_order, "dist_gpt/attic/a.py", "", "no place in the order"),
    (
        breaks_import_order,
        "dist_gpt/train/trainer.py",
        "import dist_gpt.attic\nimport dist_gpt.cli",
        "train may not import cli",
    ),
    (drags_torch, "dist_gpt/schedule/a.py", "if x:\n    from torch import nn", "schedule is torch-free"),
    (drags_torch, "launch/a.py", "def f():\n    import torch.cuda", "launch is torch-free"),
    (drags_torch, "dist_gpt/report/a.py", "from safetensors.torch import load", "imports safetensors.torch.load"),
    (communicates_outside_comm, "dist_gpt/model/a.py", "import torch.distributed as dist", "belongs under"),
    (communicates_outside_comm, "dist_gpt/model.py", "from torch import distributed", "belongs under"),
    (communicates_outside_comm, "dist_gpt/train/a.py", "import torch\ntorch.distributed.barrier()", "belongs under"),
    (communicates_outside_comm, "dist_gpt/optim/a.py", "from torch.distributed import ReduceOp", "belongs under"),
    (communicates_outside_comm, "dist_gpt/train/a.py", "torch.nn.parallel.DistributedDataParallel(m)", "belongs under"),
    (declares_global, "dist_gpt/layout.py", "def f():\n    global x", "global x"),
    (runs_untrusted_text, "dist_gpt/a.py", "from pickle import loads", "imports pickle.loads"),
    (runs_untrusted_text, "launch/a.py", "eval(x)", "eval runs text"),
    (runs_untrusted_text, "launch/a.py", "subprocess.run(x, shell=True)", "shell="),
    (runs_untrusted_text, "launch/a.py", "subprocess.Popen(x, shell=flag)", "shell="),
    (runs_untrusted_text, "launch/a.py", "os.system(x)", "starts a shell"),
    (runs_untrusted_text, "dist_gpt/config/a.py", "yaml.load(x)", "needs a loader"),
    (runs_untrusted_text, "dist_gpt/config/a.py", "yaml.load(x, Loader=yaml.FullLoader)", "needs a loader"),
    (runs_untrusted_text, "dist_gpt/config/a.py", "yaml.load(x, yaml.Loader)", "needs a loader"),
    (runs_untrusted_text, "dist_gpt/config/a.py", "yaml.unsafe_load(x)", "safe loader"),
    (runs_untrusted_text, "dist_gpt/checkpoint.py", "torch.load(x, weights_only=False)", "torch.load pickles"),
    (runs_untrusted_text, "dist_gpt/data.py", "np.load(x, allow_pickle=True)", "allow_pickle"),
    (runs_untrusted_text, "dist_gpt/comm/a.py", "dist.all_gather_object(a, b)", "pickles what it sends"),
    (is_too_long, "dist_gpt/a.py", "x = 1\n" * 601, "601 lines, 600 are allowed"),
    (is_too_long, "tests/a.py", "def f():\n" + "    x = 1\n" * 60, "f has 61 lines"),
    (leads_nowhere, "dist_gpt/cli.py", "def f():\n    from dist_gpt.report.html import write", "does not exist"),
]
FINE = [
    ("dist_gpt/config/a.py", "import yaml\nclass Mine(yaml.SafeLoader): ...\nyaml.load(x, Loader=Mine)\nre.compile(x)"),
    ("dist_gpt/layout.py", "from dist_gpt import __version__\nfrom dist_gpt.config.schema import Config"),
    ("dist_gpt/schedule/a.py", "from . import b\nfrom .b import c\nfrom ..params import table"),
    ("dist_gpt/comm/a.py", "import torch.distributed as dist\nfrom dist_gpt.events import Counts"),
    ("dist_gpt/parallel.py", "from dist_gpt.plan import steps\nmodel.eval()\nsubprocess.run([x], shell=False)"),
    ("dist_gpt/integrations/deepspeed/engine.py", "import torch.distributed\ntorch.load(x, weights_only=True)"),
    ("dist_gpt/data.py", "from dist_gpt.checkpoint import x\nfrom torch.utils.data import Dataset"),
    (
        "dist_gpt/cli.py",
        "def f():\n    from dist_gpt.data import x\n    import importlib\n    importlib.import_module(n)",
    ),
    ("launch/a.py", "import dist_gpt.report.read.load\n" + "x = 1\n" * 599),
]


def plant(root: Path, path: str, text: str) -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


@pytest.mark.parametrize(("rule", "path", "text", "message"), PLANTED)
def test_walker_finds(rule: Rule, path: str, text: str, message: str, tmp_path: Path) -> None:
    plant(tmp_path, path, text)
    found = list(rule(tmp_path))
    assert any(message in line and line.startswith(path) for line in found), found


def test_walker_finds_circles(tmp_path: Path) -> None:
    plant(tmp_path, "dist_gpt/optim/a.py", "import dist_gpt.checkpoint")
    assert not list(has_circles(tmp_path))
    plant(tmp_path, "dist_gpt/data.py", "import dist_gpt.optim.a")
    plant(tmp_path, "dist_gpt/checkpoint.py", "def f():\n    import dist_gpt.data")
    assert list(has_circles(tmp_path)) == ["these rooms import each other in a circle: checkpoint, data, optim"]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_walker_lets_good_code_pass(rule: Rule, tmp_path: Path) -> None:
    for path, text in FINE:
        plant(tmp_path, path, text)
    assert not list(rule(tmp_path))
