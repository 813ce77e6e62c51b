"""The command line: what it prints where, its exit codes, and that it starts fast and without torch."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dist_gpt import cli
from tests.patience import PATIENCE_S

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "x", "RANK": "3", "WORLD_SIZE": "16", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "16",
    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500",
}  # fmt: skip
ROOT = Path(__file__).resolve().parents[2]


def run(*argv: str) -> int:
    """Exit code of `dist-gpt argv`, in this process."""
    with pytest.raises(SystemExit) as left:
        cli.main(list(argv))
    code = left.value.code
    return 0 if code is None else int(code)


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **functions: Any) -> None:
    """Replace module `name` (a verb's own code, tested elsewhere) by these functions."""
    module = ModuleType(name)
    for key, value in functions.items():
        setattr(module, key, value)
    monkeypatch.setitem(sys.modules, name, module)
    parent, _, child = name.rpartition(".")
    monkeypatch.setattr(importlib.import_module(parent), child, module, raising=False)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stand-ins for every verb's code; holds what they were called with."""
    calls: dict[str, Any] = {}

    def document(config: Any, rank: int = 0) -> dict[str, Any]:
        print("noise")
        calls.update(config=config, rank=rank)
        return {"rank": rank, "steps": config.train.steps}

    stand_in(
        monkeypatch, "dist_gpt.plan.api",
        plan_document=lambda config, rank: calls.update(config=config, rank=rank) or {"rank": rank},
        plan_text=lambda doc, config: f"text of rank {doc['rank']}",
        flops_document=lambda config: calls.update(config=config) or {"matmuls": []},
        flops_text=lambda doc: "flops text",
    )  # fmt: skip
    stand_in(monkeypatch, "dist_gpt.dryrun", dryrun_document=document)
    stand_in(monkeypatch, "dist_gpt.data.tokens", prepare=lambda config, say: "tokens", describe=lambda tokens: tokens)
    return calls


class TestStart:
    @pytest.mark.parametrize("argv", [["--help"], ["plan", "demo"], ["flops", "gpt2-124m"], ["plan", "demo", "--json"]])
    def test_without_torch_or_numpy(self, argv: list[str]) -> None:
        """What these verbs import decides how fast they start; `python -m benchmarks start` measures it."""
        code = (
            "import sys, dist_gpt.cli as cli\n"
            f"try: cli.main({argv!r})\n"
            "except SystemExit as e: assert not e.code, e.code\n"
            "assert not {'torch', 'numpy'} & set(sys.modules), 'a slow import'"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def test_every_verb_is_listed(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run("--help") == 0
        shown = capsys.readouterr().out
        listed = {line.split()[0] for line in shown.partition("Commands:")[2].splitlines() if line.strip()}
        assert listed >= {"launch", "train", "plan", "dryrun", "verify", "flops"}

    def test_module_and_command_are_the_same(self) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "dist_gpt", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert done.stdout.startswith("Usage: dist-gpt")


class TestLaunchLeaves:
    """What `launch` does where nothing is started."""

    @pytest.fixture
    def tools(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """Slurm's sbatch, which refuses."""
        (tmp_path / "bin").mkdir()
        sbatch = tmp_path / "bin" / "sbatch"
        sbatch.write_text("#!/bin/sh\necho 'sbatch: error: no such account' >&2\nexit 1\n")
        sbatch.chmod(0o755)
        monkeypatch.setenv("PATH", f"{sbatch.parent}:{os.environ['PATH']}")
        monkeypatch.delenv("SLURM_JOB_ID", raising=False)
        return tmp_path

    def argv(self, folder: Path, *more: str) -> list[str]:
        sets = ("data.source=synthetic", "model.vocab_size=256", f"run_dir={folder / 'run'}")
        return ["launch", "demo", *(word for pair in sets for word in ("--set", pair)), *more]

    def test_a_refused_submission_leaves_nothing(self, tools: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(*self.argv(tools, "--via", "slurm")) == 2
        assert "Slurm refuses the job: no such account" in capsys.readouterr().err
        assert not (tools / "run").exists()

    def test_what_was_there_before_stays(self, tools: Path) -> None:
        (tools / "run").mkdir()
        assert run(*self.argv(tools, "--via", "slurm", "--resume", "auto")) == 2
        assert (tools / "run").is_dir()

    @pytest.mark.parametrize("via", ["local", "slurm"])
    @pytest.mark.parametrize(("code", "why"), [(0, None), (1, "the accounting differs")])
    def test_a_finished_run_is_left_alone(
        self, code: int, why: str | None, via: str, tools: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from dist_gpt.config.load import load
        from launch.run import create_run_dir

        argv = self.argv(tools, "--via", via, "--resume", "auto")
        config = load("demo", [argv[at + 1] for at, word in enumerate(argv) if word == "--set"])
        create_run_dir(config, {})
        steps = config.train.steps
        (tools / "run" / "metrics.jsonl").write_text(json.dumps({"step": steps, "loss": 1.0}) + "\n")
        (tools / "run" / "exit.json").write_text(json.dumps({"code": code, "why": why, "step": steps}))
        if code:
            from tests.unit.test_resume import checkpoint

            checkpoint(config, tools / "run", steps)
        before = {path: path.stat().st_mtime_ns for path in (tools / "run").rglob("*")}
        assert run(*argv) == code
        told = capsys.readouterr().out
        assert told.startswith(f"already finished at step {steps}; nothing is started")
        assert (f"exited with code 1: {why}" in told) == bool(code)
        assert {path: path.stat().st_mtime_ns for path in (tools / "run").rglob("*")} == before

    @pytest.mark.parametrize("begun", [False, True])
    def test_ranks_are_told_to_resume_only_what_has_begun(
        self, begun: bool, tools: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Else their log would say that there is no checkpoint yet."""
        if begun:
            (tools / "run").mkdir()
            (tools / "run" / "metrics.jsonl").write_text("")
        assert run(*self.argv(tools, "--resume", "auto", "--dry-run", "--json")) == 0
        assert ("--resume" in json.loads(capsys.readouterr().out)["argv"]) == begun

    def test_version(self, capsys: pytest.CaptureFixture[str]) -> None:
        from dist_gpt import __version__

        assert run("--version") == 0
        assert capsys.readouterr().out == f"dist-gpt {__version__}\n"


class TestVerbs:
    def test_plan(self, seen: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
        assert run("plan", "demo", "--rank", "5", "--set", "train.steps=27", "--set", "optim.lr=1e-4") == 0
        assert capsys.readouterr().out == "text of rank 5\n"
        assert (seen["config"].train.steps, seen["config"].optim.lr, seen["rank"]) == (27, 1e-4, 5)

    def test_plan_json_for_a_world(self, seen: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
        assert run("plan", "demo", "--json", "--gpus", "16", "--set", "parallel.dp=auto") == 0
        assert json.loads(capsys.readouterr().out) == {"rank": 0}
        assert seen["config"].world_size == 16

    def test_dryrun_keeps_stdout_for_the_document(
        self, seen: dict[str, Any], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run("dryrun", "demo", "--json", "--rank", "3") == 0
        shown = capsys.readouterr()
        assert json.loads(shown.out) == {"rank": 3, "steps": seen["config"].train.steps}
        assert shown.err == "noise\n"

    def test_flops(self, seen: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
        assert run("flops", "gpt2-124m") == 0
        assert capsys.readouterr().out == "flops text\n"
        assert seen["config"].model.num_layers == 12

    @pytest.mark.parametrize(("verdict", "code"), [("pass", 0), ("fail", 1)])
    def test_verify(
        self, verdict: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        stand_in(monkeypatch, "launch.verify", verify=lambda config, full: {"verdict": verdict, "full": full})
        assert run("verify", "demo", "--full", "--json") == code
        assert json.loads(capsys.readouterr().out) == {"verdict": verdict, "full": True}

    def test_train_takes_the_world_from_torchrun_and_returns_the_code(self, monkeypatch: pytest.MonkeyPatch) -> None:
        worlds = []
        main = lambda config, resume, _: worlds.append(config.world_size) or 75  # noqa: E731
        stand_in(monkeypatch, "dist_gpt.train.trainer", main=main)
        for name, value in TORCHRUN.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("DIST_GPT_RUN_DIR", raising=False)
        assert run("train", "demo", "--set", "parallel.dp=auto") == 75
        assert worlds == [16]


class TestLaunch:
    @pytest.fixture
    def ranks(self, seen: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
        """No process is started: the stand-in plays a job that ends with seen["code"]."""

        def launch_local(spec: Any) -> int:
            seen["spec"] = spec
            rows = [{"step": 0, "val_loss": 4.0}, {"step": 1, "loss": 3.0, "val_loss": 2.0}]
            (spec.log_dir.parent / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
            return int(seen.get("code", 0))

        monkeypatch.setattr("launch.backends.launch_local", launch_local)
        monkeypatch.setattr("launch.run.count_gpus", lambda: 0)
        return seen

    def test_whole_run(self, ranks: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        run_dir = tmp_path / "new" / "run"
        assert run("launch", "demo", "--set", f"run_dir={run_dir}") == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == "demo: 8 ranks on this machine. no GPU found: gloo on CPU"
        assert "validation loss  4.0000 -> 2.0000  (0.50 x the initial)" in lines
        assert lines[-1] == f"run_dir: {run_dir}"
        assert ranks["spec"].ranks == 8
        assert json.loads((run_dir / "plan.json").read_text()) == {"rank": 0}
        assert (run_dir / "config.yaml").is_file()

    def test_json(self, ranks: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert run("launch", "demo", "--json", "--set", f"run_dir={tmp_path / 'r'}") == 0
        document = json.loads(capsys.readouterr().out)
        assert document["run_dir"] == str(tmp_path / "r") and document["val_loss"] == [4.0, 2.0]
        assert ranks["spec"].live_on_stderr

    @pytest.mark.parametrize("code", [1, 75, 130])
    def test_the_runs_code_is_returned(
        self, code: int, ranks: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        ranks["code"] = code
        assert run("launch", "demo", "--set", f"run_dir={tmp_path / 'r'}") == code
        assert capsys.readouterr().out.splitlines()[-1] == f"run_dir: {tmp_path / 'r'}"

    def test_dry_run_starts_and_writes_nothing(
        self, ranks: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run("launch", "demo", "--dry-run", "--json", "--set", f"run_dir={tmp_path / 'r'}") == 0
        document = json.loads(capsys.readouterr().out)
        assert [e["RANK"] for e in document["env"]] == [str(rank) for rank in range(8)]
        config = str(tmp_path / "r" / "config.yaml")
        assert document["argv"][1:] == ["-m", "launch.rank.worker", "dist_gpt", "train", config]
        assert "spec" not in ranks and not (tmp_path / "r").exists()

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (["--via", "slrum"], "unknown launcher; choose local, torchrun, slurm, mpi"),
            (["--via", "torchrun", "--nodes", "2"], "not a Slurm allocation"),
            (["--nodes", "2"], "--via local starts every rank on this machine"),
            (["--ranks-per-node", "6"], "parallel.tp 2 x parallel.pp 2"),
            (["--set", "train.stepz=3"], "train.steps"),
            (["--set", "parallel.tp=3"], "divi"),
        ],
    )
    def test_bad_input_starts_nothing(
        self, options: list[str], words: str, ranks: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run("launch", "demo", "--set", f"run_dir={tmp_path / 'r'}", *options) == 2
        shown = capsys.readouterr()
        assert words in shown.err and shown.out == ""
        assert "spec" not in ranks and not (tmp_path / "r").exists()

    def test_bad_input_is_a_document_too(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run("plan", "demo", "--json", "--set", "optim.lr=0", "--set", "train.dtype=fp8") == 2
        shown = capsys.readouterr()
        problems = json.loads(shown.out)["problems"]
        assert [line.split(":")[0] for line in problems] == ["optim.lr", "train.dtype"]
        assert all(line in shown.err for line in problems)

    def test_existing_run_directory(
        self, ranks: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "r").mkdir()
        assert run("launch", "demo", "--set", f"run_dir={tmp_path / 'r'}") == 2
        assert f"--set run_dir={tmp_path / 'r'}-2" in capsys.readouterr().err
        assert "spec" not in ranks and not list((tmp_path / "r").iterdir())

    def test_missing_wandb_is_found_before_anything_starts(
        self, ranks: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        assert run("launch", "demo", "--set", f"run_dir={tmp_path / 'r'}", "--set", "log.wandb.mode=offline") == 2
        assert "dist-gpt[wandb]" in capsys.readouterr().err and "spec" not in ranks


class TestBadInput:
    @pytest.mark.parametrize(
        ("argv", "words"),
        [
            (["plan", "no-such.yaml"], "no such file"),
            (["plan", "demo", "--rank", "8"], "--rank 8: expected 0 to 7, as the world has 8 ranks"),
            (["plan", "demo", "--gpus", "6"], "world 6"),
            (["plan"], "CONFIG"),
            (["plan", "demo", "--set", "train.steps"], "KEY=VALUE"),
            (["no-such-verb"], "no-such-verb"),
        ],
    )
    def test_one_message_no_traceback(
        self, argv: list[str], words: str, seen: dict[str, Any], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run(*argv) == 2
        shown = capsys.readouterr()
        assert words in shown.err and "Traceback" not in shown.err and shown.out == ""

    def test_a_bug_keeps_its_traceback(self, seen: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(config: Any) -> None:
            raise ZeroDivisionError("a bug")

        monkeypatch.setattr(sys.modules["dist_gpt.plan.api"], "flops_document", broken)
        with pytest.raises(ZeroDivisionError):
            cli.main(["flops", "demo"])

    def test_a_failing_rank_leaves_the_time_for_its_launcher(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        def failing(config: Any, resume: str | None) -> int:
            raise RuntimeError("lost a peer")

        stand_in(monkeypatch, "dist_gpt.train.trainer", main=failing)
        monkeypatch.setenv("DIST_GPT_ERROR_FILE", str(tmp_path / "error.json"))
        monkeypatch.setenv("WORLD_SIZE", "8")
        monkeypatch.setenv("DIST_GPT_RUN_DIR", str(tmp_path))  # the launcher has made it
        with pytest.raises(RuntimeError):
            cli.main(["train", "demo", "--set", f"run_dir={tmp_path}"])
        assert json.loads((tmp_path / "error.json").read_text())["error"] == "RuntimeError: lost a peer"

    @pytest.mark.parametrize("left", ["gone", "."])
    def test_a_launcher_of_another_run_is_not_believed(
        self, left: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        stand_in(monkeypatch, "dist_gpt.train.trainer", main=lambda *words: pytest.fail("it trains"))
        monkeypatch.delenv("DIST_GPT_ERROR_FILE", raising=False)
        monkeypatch.setenv("DIST_GPT_RUN_DIR", str(tmp_path / left))
        one = [word for axis in ("dp", "tp", "pp") for word in ("--set", f"parallel.{axis}=1")]
        assert run("train", "demo", *one, "--set", f"run_dir={tmp_path / 'gone'}") == 2
        assert f"DIST_GPT_RUN_DIR={tmp_path / left} is not a run directory" in capsys.readouterr().err
        assert not (tmp_path / "gone").exists()

    def test_a_lost_peer_is_a_sentence_and_a_failure(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Without a launcher, no logs of the ranks are shown; after the meeting, the error is no longer bad input."""

        class RendezvousError(RuntimeError):
            pass

        def failing(config: Any, resume: str | None, folder: Any) -> int:
            raise RendezvousError("rank 0: rank 1 did not report the accounting")

        stand_in(monkeypatch, "dist_gpt.train.trainer", main=failing)
        for name in ("RANK", "WORLD_SIZE", "DIST_GPT_RUN_DIR", "DIST_GPT_ERROR_FILE"):
            monkeypatch.delenv(name, raising=False)
        one = [word for axis in ("dp", "tp", "pp") for word in ("--set", f"parallel.{axis}=1")]
        assert run("train", "demo", *one, "--set", f"run_dir={tmp_path / 'run'}") == 1
        assert capsys.readouterr().err == "dist-gpt: rank 0: rank 1 did not report the accounting\n"

    def test_a_closed_pipe_is_no_traceback(self) -> None:
        read, write = os.pipe()
        os.close(read)
        process = subprocess.Popen(
            [sys.executable, "-m", "dist_gpt", "launch", "demo", "--dry-run", "--set", "run_dir=runs/never-made"],
            cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        os.close(write)
        _, error = process.communicate(timeout=PATIENCE_S)
        assert "Traceback" not in error
