"""metrics.jsonl, progress lines and Weights & Biases (the real library, offline)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dist_gpt.config.errors import ConfigError
from dist_gpt.config.load import load
from dist_gpt.config.schema import Config
from dist_gpt.protocol import ERROR_FILE, record_failure
from dist_gpt.train.metrics import ExitRecord, Tracker, clock, require_wandb, step_line
from tests.patience import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]
RECORD = {"step": 12, "loss": 3.12341, "grad_norm": 1.234, "lr": 3e-4, "tokens_per_s": 12345.4, "step_s": 0.5}


def config(*overrides: str) -> Config:
    return load("demo", ["train.steps=200", "log.every=1", *overrides])


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_step_line() -> None:
    expected = "step  12/200  loss 3.1234  norm 1.23  lr 3.0e-04  12345 tokens/s  eta 0:35"
    assert step_line(RECORD, 200, 35.2) == expected
    assert "tokens/s  epoch 1.50  eta" in step_line({**RECORD, "epoch": 1.5}, 200, 35.2)
    assert step_line({"step": 3, "loss": float("nan")}, 200, None) == "step   3/200  loss nan"


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (725, "12:05"), (3723, "1:02:03")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


class TestMetrics:
    def test_one_flushed_line_per_step_with_its_validation(self, tmp_path: Path) -> None:
        with Tracker(config(), tmp_path, 0) as tracker:
            tracker.validation(0, 5.5)
            assert rows(tmp_path) == [{"step": 0, "val_loss": 5.5}], "flushed at once"
            tracker.step({"step": 1, "loss": 5.0})
            tracker.step({"step": 2, "loss": 4.0})
            tracker.validation(2, 4.5)
            tracker.validation(3, 4.4)  # a validation may come before its step's record
            tracker.step({"step": 3, "loss": 3.0, "val_loss": 4.4})
        assert rows(tmp_path) == [
            {"step": 0, "val_loss": 5.5},
            {"step": 1, "loss": 5.0},
            {"step": 2, "loss": 4.0, "val_loss": 4.5},
            {"step": 3, "val_loss": 4.4, "loss": 3.0},
        ]

    def test_a_later_attempt_appends(self, tmp_path: Path) -> None:
        for step in (1, 2):
            with Tracker(config(), tmp_path, 0) as tracker:
                tracker.step({"step": step, "loss": 1.0})
        assert [row["step"] for row in rows(tmp_path)] == [1, 2]

    @pytest.mark.parametrize(("after", "left"), [(2, [0, 1, 2]), (-1, []), (9, [0, 1, 2, 3])])
    def test_a_resumed_run_cuts_it_back(self, after: int, left: list[int], tmp_path: Path) -> None:
        """The validation of the step itself stays; what is cut off or no line of ours goes."""
        with Tracker(config(), tmp_path, 0) as tracker:
            tracker.validation(0, 5.5)
            for step in (1, 2, 3):
                tracker.step({"step": step, "loss": 1.0})
                tracker.validation(step, 1.5)
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('"no object"\n{"step": 4, "lo')
        with Tracker(config(), tmp_path, 0, after) as tracker:
            assert [row["step"] for row in rows(tmp_path)] == left
            assert all("val_loss" in row for row in rows(tmp_path))
            tracker.step({"step": after + 1, "loss": 2.0})
            tracker.sync()
        assert [row["step"] for row in rows(tmp_path)] == [*left, after + 1]
        assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]

    def test_not_finite_is_null(self, tmp_path: Path) -> None:
        with Tracker(config(), tmp_path, 0) as tracker:
            tracker.step({"step": 1, "loss": float("nan"), "grad_norm": float("inf")})
        assert rows(tmp_path) == [{"step": 1, "loss": None, "grad_norm": None}]

    def test_other_ranks_write_nothing_but_messages(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        with Tracker(config("log.wandb.mode=offline"), tmp_path, 1) as tracker:
            tracker.step(dict(RECORD))
            tracker.validation(12, 1.0)
            tracker.message("hello")
        assert list(tmp_path.iterdir()) == []
        assert capsys.readouterr().out == "hello\n"


class TestConsole:
    def test_plain_lines_without_a_terminal(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        with Tracker(config("log.every=10"), tmp_path, 0) as tracker:
            for step in range(1, 201):
                tracker.step({**RECORD, "step": step})
            tracker.validation(200, 2.25)
            tracker.message("done")
        lines = capsys.readouterr().out.splitlines()
        assert [int(line[4:9].split("/")[0]) for line in lines[:-2]] == [1, *range(10, 201, 10)]
        assert lines[0].endswith("eta 1:40") and lines[-3].endswith("eta 0:00")
        assert lines[-2:] == ["step 200  validation loss 2.2500", "done"]
        assert "\x1b" not in "".join(lines)

    def test_bar_where_the_launcher_has_a_terminal(self, tmp_path: Path) -> None:
        """Through the launcher's pipe: colours and the bar reach the terminal, the log gets the same lines as ever."""
        from launch.monitor.tee import plain

        code = (
            "import sys; from pathlib import Path; from dist_gpt.config.load import load; "
            "from dist_gpt.train.metrics import Tracker; "
            "config = load('demo', ['log.every=1', 'train.steps=5', 'optim.warmup=0'])\n"
            f"with Tracker(config, Path({str(tmp_path)!r}), 0) as tracker:\n"
            "    for step in range(1, 6): tracker.step({'step': step, 'loss': 1.5, 'step_s': 0.1})\n"
            "    tracker.message('[bold]done')\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "DIST_GPT_TERMINAL": "100"},
            capture_output=True, check=True,
        )  # fmt: skip
        assert b"\x1b[2K" in done.stdout, "a bar was drawn"
        logged = [plain(line).decode() for line in done.stdout.split(b"\n")]
        steps = [f"step {k}/5  loss 1.5000  eta {clock((5 - k) * 0.1)}" for k in range(1, 6)]
        assert [line for line in logged if line.startswith(("step", "["))] == [*steps, "[bold]done"]


class TestFailureRecord:
    def test_the_first_call_counts(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(ERROR_FILE, str(tmp_path / "error.json"))
        record_failure(ValueError("cause"))
        record_failure(RuntimeError("consequence"))
        found = json.loads((tmp_path / "error.json").read_text())
        assert found["error"] == "ValueError: cause" and isinstance(found["time"], float)

    def test_without_a_launcher(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv(ERROR_FILE, raising=False)
        record_failure(ValueError("nobody listens"))


class TestExitRecord:
    def test_rank_0_says_how_it_ended(self, tmp_path: Path) -> None:
        record = ExitRecord(tmp_path, 0)
        record.write(75, "SIGTERM received", 12)
        found = json.loads((tmp_path / "exit.json").read_text())
        assert (found["code"], found["why"], found["step"]) == (75, "SIGTERM received", 12)
        assert isinstance(found["time"], float)
        ExitRecord(tmp_path, 1).write(1, "of rank 1", 13)
        assert json.loads((tmp_path / "exit.json").read_text()) == found
        ExitRecord(tmp_path, 0)
        assert list(tmp_path.iterdir()) == [], "another attempt has begun"

    def test_a_failure_to_write_hides_nothing(self, tmp_path: Path) -> None:
        ExitRecord(tmp_path / "nowhere", 0).write(1, "why", 0)


class TestWandb:
    def test_offline_run_in_the_run_directory(self, tmp_path: Path) -> None:
        pytest.importorskip("wandb")
        code = (
            "from pathlib import Path; from dist_gpt.config.load import load\n"
            "from dist_gpt.train.metrics import Tracker\n"
            f"with Tracker(load('demo', ['log.wandb.mode=offline']), Path({str(tmp_path)!r}), 0) as tracker:\n"
            "    tracker.step({'step': 1, 'loss': 1.5, 'marker_7391': 2.0}); tracker.validation(1, 2.5)\n"
        )
        environ = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environ, check=True, timeout=PATIENCE_S)
        [file] = tmp_path.glob("wandb/offline-run-*/*.wandb")
        assert b"marker_7391" in file.read_bytes()
        assert rows(tmp_path) == [{"step": 1, "loss": 1.5, "marker_7391": 2.0, "val_loss": 2.5}]

    def test_disabled_does_not_import_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "wandb", None)  # an import would raise
        with Tracker(config(), tmp_path, 0) as tracker:
            tracker.step(dict(RECORD))
        assert len(rows(tmp_path)) == 1

    def test_missing_package_names_the_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ConfigError, match=r"dist-gpt\[wandb\].*log.wandb.mode=disabled"):
            require_wandb("offline")
        require_wandb("disabled")
