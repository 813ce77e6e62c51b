"""Test the GPU check without a GPU: its options, its results, and every section once, with the CPU as a stand-in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks.gpu_check import __main__ as check
from benchmarks.gpu_check import ceiling, environment, one_process, packages, ranks, results, section, speed, tests_part
from benchmarks.gpu_check import window as window_part
from benchmarks.gpu_check.cases import config_of, tiny
from benchmarks.gpu_check.device import Cuda, StandIn
from benchmarks.gpu_check.results import Outcome
from benchmarks.gpu_check.section import BY_NAME, SECTIONS, Context
from dist_gpt.comm.mesh import NcclBackends
from dist_gpt.comm.staged import StagedBackends
from dist_gpt.config.errors import ConfigError
from tests.ranks import runs
from tests.ranks.preloaded import Started

ROOT = Path(__file__).resolve().parents[2]
HANGS_S = 600
pytestmark = pytest.mark.timeout(HANGS_S)


def context(name: str, out: Path, budget_s: float = HANGS_S) -> Context:
    return Context(name, out, "cpu", True, budget_s)


def command(*options: str) -> runs.Run:
    process = Started("benchmarks.gpu_check", options, ROOT, runs.environment())
    out, err = runs.finish(process)
    return runs.Run(process.wait(), out, err, Path())


def executed(*options: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_check", *options],
        cwd=ROOT, env={**os.environ, **(env or {})}, capture_output=True, text=True, timeout=HANGS_S, check=False,
    )  # fmt: skip


# --- every section, the CPU standing in --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["environment", "one-process", "ceiling", "speed", "window", "tests"])
def test_a_section_passes_with_a_stand_in(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    if name == "speed":
        section.run(context("ceiling", tmp_path))
    assert section.run(context(name, tmp_path)) == 0, capfd.readouterr()
    found = json.loads((tmp_path / f"{name}.json").read_text())
    assert found["ended"] and found["failed"] == [] and found["figures"]


def test_ranks_train_through_host_memory_as_one_process_does(tmp_path: Path) -> None:
    assert section.run(context("ranks", tmp_path)) == 0
    figures = json.loads((tmp_path / "ranks.json").read_text())["figures"]
    assert figures["backend"] == ranks.SHARED
    for layout in ("dp2", "pp2"):
        assert figures[layout]["accounting"] == "exact" and figures[layout]["gradient"] <= 1e-10


def test_without_a_gpu_it_says_so_checks_a_pretended_one_and_succeeds(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = command("--out", str(tmp_path / "new" / "folder"))
    assert done.code == 0, done.out + done.err
    assert len([line for line in done.out.splitlines() if line.startswith("No GPU: ")]) == 1
    document = json.loads((tmp_path / "new" / "folder" / "results.json").read_text())
    assert document["schema"] == 1 and document["passed"] and document["commit"] == results.commit_of(ROOT)
    assert [(s["name"], s["status"]) for s in document["sections"]] == [
        ("environment", "passed"), ("pretended", "passed"),
    ]  # fmt: skip
    assert document["sections"][1]["figures"]["gpt2"]["kernels"] > 100
    assert "| pretended | passed |" in (tmp_path / "new" / "folder" / "results.md").read_text()


def test_json_is_alone_on_stdout_and_sections_can_be_chosen(tmp_path: Path) -> None:
    done = command("--stand-in", "--only", "environment", "--json", "--out", str(tmp_path))
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert [s["name"] for s in document["sections"]] == ["environment"] and document["stand_in"]
    assert document == json.loads((tmp_path / "results.json").read_text())
    assert "environment: passed" in done.err


def test_a_machine_with_torch_alone_is_told_what_to_bring(tmp_path: Path) -> None:
    absent = ["pydantic", "pydantic_core", "yaml", "safetensors", "psutil", "pynvml"]
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {absent!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
    )
    done = executed("--stand-in", "--only", "environment", "--only", "speed", "--out", str(tmp_path / "out"),
                    env={"PYTHONPATH": str(tmp_path)})  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for words in ("pydantic==", "PyYAML==", "pip download", "--wheels FOLDER", "pure Python", "compiled, a wheel for"):
        assert words in done.stdout
    status = {s["name"]: s for s in json.loads((tmp_path / "out" / "results.json").read_text())["sections"]}
    assert status["environment"]["status"] == "passed"
    assert status["speed"]["status"] == "skipped" and "pydantic" in status["speed"]["error"]


# --- options -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--only", "sped"], "there is no such section; choose from environment"),
        (["--budget-s", "0"], "give a number of seconds above 0"),
        (["--budget-s", "nan"], "give a number of seconds above 0"),
        (["--budget-s", "1e9"], "up to 3600"),
        (["--wheels", "/nowhere/at/all"], "which is not a folder"),
        (["--out", __file__], "this is a file"),
        (["--out", f"{__file__}/below"], "the folder cannot be made"),
    ],
)
def test_bad_options_end_with_2_and_a_sentence(options: list[str], words: str, capsys: Any) -> None:
    assert check.main(options) == 2
    assert words in capsys.readouterr().err


def test_the_budget_of_everything_is_under_ten_minutes() -> None:
    assert check.BUDGET_S < 600
    assert len(BY_NAME) == len(SECTIONS)
    assert [s.name for s in check.chosen((), has_gpu=True)][:3] == ["environment", "one-process", "ranks"]
    assert [s.name for s in check.chosen(("window", "speed"), has_gpu=True)] == ["speed", "window"]


# --- how a section ends ------------------------------------------------------------------------------------------


def plan_for(out: Path, *names: str, budget_s: float = 100.0) -> check.Plan:
    return check.Plan([BY_NAME[name] for name in names], "cpu", True, out, budget_s, dict(os.environ))


def test_a_section_without_time_left_is_skipped(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log:
        (outcome,) = check.run_all(plan_for(tmp_path, "speed", budget_s=0.5), {}, 0.0, log)
    assert outcome.status == "skipped" and "it needs 20" in outcome.error


def test_a_section_that_takes_too_long_is_ended_and_keeps_what_it_found(tmp_path: Path) -> None:
    outcome = check.run_section(BY_NAME["one-process"], plan_for(tmp_path), 0.01, subprocess.DEVNULL)
    assert outcome.status == "timeout" and "0 s" in outcome.error
    (tmp_path / "speed.json").write_text('{"figures": {"a": 1}, "failed": []}')
    assert check.outcome_of("speed", None, 1.0, tmp_path, 5.0).figures == {"a": 1}


@pytest.mark.parametrize(
    ("code", "written", "status"),
    [
        (0, {"figures": {}, "failed": [], "ended": True}, "passed"),
        (1, {"figures": {}, "failed": ["x"], "ended": True}, "failed"),
        (1, {"figures": {}, "failed": []}, "error"),  # Python's own exit code
        (3, {"figures": {}, "failed": [], "error": "ValueError: x"}, "error"),
        (-11, None, "error"),
        (0, None, "error"),
    ],
)
def test_the_status_follows_from_exit_code_and_file(
    code: int, written: dict[str, Any] | None, status: str, tmp_path: Path
) -> None:
    if written is not None:
        (tmp_path / "speed.json").write_text(json.dumps(written))
    outcome = check.outcome_of("speed", code, 1.0, tmp_path, 5.0)
    assert outcome.status == status
    assert bool(outcome.error) == (status == "error")


def test_the_exit_code_counts_what_did_not_run_only_where_there_is_a_gpu() -> None:
    passed, skipped, failed = (Outcome("x", status) for status in ("passed", "skipped", "failed"))
    assert check.exit_code([passed, skipped], has_gpu=False) == 0
    assert check.exit_code([passed, skipped], has_gpu=True) == 1
    assert check.exit_code([passed, failed], has_gpu=False) == 1
    assert check.exit_code([passed], has_gpu=True) == 0


def test_an_exception_in_a_section_is_written_and_one_in_a_part_lets_the_others_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: object) -> None:
        raise RuntimeError("CUDA error: planted")

    monkeypatch.setattr(environment, "run", breaks)
    assert section.run(context("environment", tmp_path)) == 3
    assert "planted" in json.loads((tmp_path / "environment.json").read_text())["error"]
    monkeypatch.setattr(one_process, "in_float64", breaks)
    assert section.run(context("one-process", tmp_path)) == 1
    found = json.loads((tmp_path / "one-process.json").read_text())
    assert len(found["failed"]) == 2 and set(found["figures"]) == {"gpt2.bf16", "llama.bf16"}


def test_a_wrong_gradient_fails_the_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = one_process.gradients

    def wrong(config: Any, device: Any) -> Any:
        found = real(config, device)
        if config.train.dtype == "bf16":
            next(iter(found.values())).mul_(1.5)
        return found

    monkeypatch.setattr(one_process, "gradients", wrong)
    here = context("one-process", tmp_path)
    one_process.in_bf16(here, "gpt2")
    assert len(here.failed) == 1 and "is off by" in here.failed[0]
    monkeypatch.setattr(one_process, "TOLERANCE", -1.0)
    one_process.in_float64(here, "gpt2")
    assert len(here.failed) == 5


def test_a_rank_that_fails_or_dies_is_named(tmp_path: Path) -> None:
    here = context("ranks", tmp_path)
    config = ranks.layout_config("dp2")
    answers = {0: {"error": "boom"}, 1: {"error": "its process ended with exit code -9"}}
    team = SimpleNamespace(collect=lambda *_: answers, limit_s=1.0)
    ranks.certificate(here, team, "dp2")  # type: ignore[arg-type]
    assert config.world_size == 2 and "rank 0: boom; rank 1: its process ended" in here.failed[0]
    dead = SimpleNamespace(poll=lambda: -9)
    silent = SimpleNamespace(poll=lambda: None)
    fake = SimpleNamespace(folder=tmp_path, processes=[dead, silent])
    found = ranks.Team.collect(fake, "dp2", 2, 0.05)  # type: ignore[arg-type]
    assert "exit code -9" in found[0]["error"] and "no answer" in found[1]["error"]


def test_ranks_with_a_gpu_each_talk_over_nccl_and_others_through_host_memory() -> None:
    gpu = torch.device("cuda", 1)
    assert isinstance(ranks.backends_for(dist.HashStore(), gpu, own=True, limit_s=60.0), NcclBackends)
    shared = ranks.backends_for(dist.HashStore(), gpu, own=False, limit_s=60.0)
    assert isinstance(shared, StagedBackends) and not shared.stages_all


def test_every_layout_of_the_check_is_a_valid_configuration() -> None:
    for name in ranks.LAYOUTS:
        config = ranks.layout_config(name)
        assert config.world_size <= ranks.RANKS and config.train.dtype == "fp64" and config.train.global_batch == 8
    for config in speed.cases(small=False).values():
        assert config.world_size == 1
    with pytest.raises(ConfigError, match="choose one of gpt2, llama"):
        tiny("bert")
    with pytest.raises(ConfigError):
        config_of("gpt2", {"num_layers": 1, "hidden_size": 10, "num_heads": 3, "seq_len": 4, "vocab_size": 8},
                  {"global_batch": 1})  # fmt: skip


# --- packages ----------------------------------------------------------------------------------------------------


def test_pins_are_read_for_the_running_python() -> None:
    text = '# comment\nnumpy==2.4.6; python_version >= "3.11"\nnumpy==2.2.6; python_version < "3.11"\nPyYAML==6.0.3\n'
    assert packages.pins(text, (3, 12)) == {"numpy": "2.4.6", "pyyaml": "6.0.3"}
    assert packages.pins(text, (3, 10))["numpy"] == "2.2.6"
    real = packages.pins((ROOT / "constraints.txt").read_text())
    assert {"pydantic", "pydantic-core", "pyyaml", "safetensors", "psutil"} <= set(real)


def test_advice_names_everything_at_once_and_says_what_is_pure() -> None:
    lacking = packages.missing(lambda module: module not in ("pydantic", "pydantic_core", "rich", "torch"))
    text = "\n".join(packages.advice(lacking, "pydantic==2.1\n"))
    assert "pydantic==2.1  (pure Python, any wheel)" in text and "pydantic-core  (compiled" in text
    assert "not needed by this check" in text and "torch itself must be installed" in text
    assert packages.advice([], "") == []


@pytest.mark.parametrize(
    ("wheel", "fits"),
    [
        ("a-1-py3-none-any.whl", True),
        ("a-1-py2.py3-none-any.whl", True),
        ("a-1-cp312-cp312-manylinux2014_x86_64.manylinux_2_17_x86_64.whl", True),
        ("a-1-cp36-abi3-manylinux_2_17_x86_64.whl", True),
        ("a-1-cp313-abi3-manylinux_2_17_x86_64.whl", False),
        ("a-1-cp311-cp311-manylinux2014_x86_64.whl", False),
        ("a-1-cp312-cp312-manylinux2014_aarch64.whl", False),
        ("a-1-cp312-cp312-musllinux_1_2_x86_64.whl", False),
        ("a-1-cp312-cp312-win_amd64.whl", False),
        ("a-1-py2-none-any.whl", False),
        ("a.whl", False),
    ],
)
def test_which_wheels_fit(wheel: str, fits: bool) -> None:
    assert (packages.unfit(wheel, (3, 12), "x86_64") == "") is fits


def test_wheels_are_unpacked_and_those_that_do_not_fit_are_named(tmp_path: Path) -> None:
    source, into = tmp_path / "wheels", tmp_path / "into"
    source.mkdir()
    with zipfile.ZipFile(source / "brought-1-py3-none-any.whl", "w") as archive:
        archive.writestr("brought/__init__.py", "VALUE = 1\n")
    (source / "broken-1-py3-none-any.whl").write_bytes(b"not a zip file")
    (source / "other-1-cp27-cp27m-win32.whl").write_bytes(b"")
    refused = packages.unpack(source, into)
    assert (into / "brought" / "__init__.py").is_file()
    assert [line.split()[0] for line in refused] == ["broken-1-py3-none-any.whl", "other-1-cp27-cp27m-win32.whl"]


def test_the_folder_of_wheels_is_the_option_the_variable_or_vendor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(packages.FOLDER_VARIABLE, raising=False)
    assert packages.wheel_folder(None, tmp_path) is None
    (tmp_path / "vendor").mkdir()
    assert packages.wheel_folder(None, tmp_path) == tmp_path / "vendor"
    monkeypatch.setenv(packages.FOLDER_VARIABLE, str(tmp_path))
    assert packages.wheel_folder(None, tmp_path) == tmp_path
    monkeypatch.setenv(packages.FOLDER_VARIABLE, str(tmp_path / "none"))
    with pytest.raises(ValueError, match="DIST_GPT_WHEELS"):
        packages.wheel_folder(None, tmp_path)


# --- the device, with something in the place of torch.cuda -------------------------------------------------------


class FakeEvent:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, other: FakeEvent) -> float:
        return 50.0


class FakeCuda:
    """Fake of torch.cuda with only what the check may call."""

    Event = FakeEvent

    def __init__(self) -> None:
        self.mode = "default"

    def get_device_properties(self, device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(
            name="NVIDIA H200 MIG 1g.18gb", major=9, minor=0, multi_processor_count=16, total_memory=1000
        )

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        return 900, 1000

    def device_count(self) -> int:
        return 1

    def is_bf16_supported(self) -> bool:
        return True

    def synchronize(self, device: torch.device) -> None: ...

    def empty_cache(self) -> None: ...

    def reset_peak_memory_stats(self, device: torch.device) -> None: ...

    def memory_allocated(self, device: torch.device) -> int:
        return 10

    def max_memory_allocated(self, device: torch.device) -> int:
        return 110

    def set_sync_debug_mode(self, mode: str) -> None:
        self.mode = mode


def test_the_device_asks_torch_cuda_and_leaves_its_settings() -> None:
    fake = FakeCuda()
    device = Cuda(fake)
    assert device.facts()["mig_slice"] and device.facts()["memory_bytes"] == 1000 and device.count() == 1
    assert (device.reset_peak(), device.peak(), device.total_memory()) == (10, 110, 1000)
    assert device.seconds(lambda: None, 5) == pytest.approx(0.01)
    device.synchronize()
    device.empty()

    def waits() -> None:
        assert fake.mode == "warn"
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)

    found = device.waits(waits)
    assert list(found.values()) == [2] and next(iter(found)).startswith("tests/unit/test_gpu_check.py:")
    with pytest.raises(ValueError, match="planted"):
        device.waits(lambda: (_ for _ in ()).throw(ValueError("planted")))
    assert fake.mode == "default"


class Described(StandIn):
    """Stand-in with a given name and a given amount of memory."""

    def __init__(self, name: str, memory: int | None, peak: int | None = None) -> None:
        self.name, self.memory, self.measured = name, memory, peak

    def facts(self) -> dict[str, Any]:
        return {"name": self.name, "mig_slice": "MIG" in self.name}

    def total_memory(self) -> int | None:
        return self.memory

    def peak(self) -> int | None:
        return self.measured


def test_speed_is_told_against_the_published_peak_and_the_measured_ceiling(tmp_path: Path) -> None:
    here = context("speed", tmp_path)
    here.device = Described("NVIDIA H200", None)  # type: ignore[misc]
    config = tiny(dtype="bf16")
    (tmp_path / "ceiling.json").write_text('{"figures": {"best_tflops": {"bf16": 2.0}}}')
    found = speed.figures(here, config, [1.0, 2.0, 3.0], [0.5])
    assert found["step_s"] == 2.0 and found["tokens_per_s"] == 32.0 and found["host_issue_s"] == 0.5
    assert found["mfu"] == pytest.approx(found["model_tflops"] * 1e12 / 989e12)
    assert found["of_measured_ceiling"] == pytest.approx(found["model_tflops"] / 2.0) and "H200" in found["peak_source"]
    (tmp_path / "ceiling.json").unlink()
    for name in ("some other GPU", "NVIDIA H200 MIG 1g.18gb"):
        here.device = Described(name, None)  # type: ignore[misc]
        assert {"mfu", "of_measured_ceiling"}.isdisjoint(speed.figures(here, config, [1.0], [1.0]))


def test_a_model_that_does_not_fit_is_left_out_and_memory_is_compared_with_the_plan(tmp_path: Path) -> None:
    here = context("speed", tmp_path)
    here.device = Described("small", 1000)  # type: ignore[misc]
    speed.measure(here, "case", tiny())
    assert "the plan needs" in here.figures["case"]
    assert speed.memory_figures(110, 120, 20) == {
        "planned_bytes": 110, "measured_bytes": 100, "plan_error": pytest.approx(0.1),
    }  # fmt: skip
    short = context("speed", tmp_path, budget_s=0.0)
    speed.run(short)
    assert set(short.figures.values()) == {"not measured: no time left"}


def test_kernels_of_a_gpu_are_told_apart_from_operators() -> None:
    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    rows = [
        SimpleNamespace(key="kernel", count=2, device_type=cuda, self_device_time_total=5.0, self_cpu_time_total=0.0),
        SimpleNamespace(key="longer", count=1, device_type=cuda, self_device_time_total=9.0, self_cpu_time_total=0.0),
        SimpleNamespace(key="aten::mm", count=2, device_type=cpu, self_device_time_total=5.0, self_cpu_time_total=7.0),
    ]
    assert [row["name"] for row in window_part.top_kernels(rows, cuda=True)] == ["longer", "kernel"]
    assert [row["name"] for row in window_part.top_kernels(rows, cuda=False)] == ["aten::mm"]


def test_precision_of_matmuls_is_put_back(tmp_path: Path) -> None:
    before = torch.get_float32_matmul_precision()
    assert ceiling.matmul_tflops(context("ceiling", tmp_path), "tf32", 16) > 0
    assert torch.get_float32_matmul_precision() == before


def test_the_driver_is_asked_where_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment.nvidia_smi("no-such-program-here") is None
    program = tmp_path / "smi"
    program.write_text('#!/bin/sh\necho "$1 H200"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert environment.nvidia_smi("smi")["devices"] == ["-L H200"]  # type: ignore[index]


# --- the tests of tests/gpu --------------------------------------------------------------------------------------


def module_with(**functions: Any) -> Iterator[ModuleType]:
    module = types.ModuleType("planted")
    vars(module).update(functions)
    yield module


ON_THE_CPU_TOO = [module for module in tests_part.modules(tests_part.FOLDER) if "nccl" not in module.__name__]


@pytest.mark.parametrize("module", ON_THE_CPU_TOO, ids=lambda module: module.__name__)
def test_the_tests_for_a_gpu_hold_on_the_cpu_too(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DEVICE", torch.device("cpu"))
    tests = {name: value for name, value in vars(module).items() if name.startswith("test_")}
    assert tests
    assert {name: tests_part.outcome(test) for name, test in tests.items()} == dict.fromkeys(tests, "passed")


def test_tests_are_called_one_by_one_where_there_is_no_pytest(tmp_path: Path) -> None:
    def fails() -> None:
        raise AssertionError("planted")

    here = context("tests", tmp_path)
    tests_part.by_hand(here, module_with(test_good=lambda: None, test_bad=fails, helper=fails), call=True)
    assert here.figures["tests"]["planted.test_good"] == "passed"
    assert len(here.failed) == 1 and "planted.test_bad: AssertionError" in here.failed[0]
    empty = context("tests", tmp_path)
    tests_part.by_hand(empty, iter(()), call=True)
    assert empty.failed == ["no tests were found in tests/gpu"]


def test_pytest_runs_them_without_the_projects_plugins(tmp_path: Path) -> None:
    (tmp_path / "test_planted.py").write_text("def test_bad(): assert False\n")
    here = context("tests", tmp_path)
    tests_part.with_pytest(here, tmp_path)
    assert here.failed == ["pytest ended with exit code 1"]
    good = context("tests", tmp_path)
    tests_part.with_pytest(good, tests_part.FOLDER)
    assert good.failed == [], good.figures


# --- results -----------------------------------------------------------------------------------------------------


def test_results_are_written_after_every_section_and_read_back(tmp_path: Path) -> None:
    good = Outcome("a", "passed", 1.0, {"x": {"y": 1.5}, "rows": [{"z": 2}], "n": 12345})
    bad = Outcome("b", "failed", 2.0, {}, ["1 | 2\nis wrong"])
    results.write(tmp_path, {"date": "today", "commit": None}, [good, bad])
    document = json.loads((tmp_path / "results.json").read_text())
    assert not document["passed"] and document["sections"][1]["failed"] == ["1 | 2\nis wrong"]
    text = (tmp_path / "results.md").read_text()
    assert "| x.y | 1.5 |" in text and "| rows.0.z | 2 |" in text and "| n | 12,345 |" in text
    assert "| b | failed | 2.0 | 1 \\| 2 is wrong |" in text and "commit" not in text
    assert results.commit_of(tmp_path) is None
