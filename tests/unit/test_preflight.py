"""Preflight: what a rank finds, and every mistake planted in the answers of a job, named with node and remedy."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dist_gpt.layout import Layout
from launch.monitor import preflight
from launch.monitor.diagnose import RankState
from launch.monitor.preflight import ERROR, WARNING, Answer, Expected, Problem, judge, text
from launch.rank import node_info as finding
from launch.spec import JobSpec

ROOT = Path(__file__).resolve().parents[2]
NOW = 1_800_000_000.0
EXPECTED = Expected(ranks=8, nodes=2, layout="pp 2 x dp 2 x cp 1 x tp 2", mesh=8)
Facts = dict[str, Any]


def found(rank: int) -> Facts:
    """What rank `rank` of two good nodes with four GPUs each finds."""
    node, local = divmod(rank, 4)
    return {
        "hostname": f"node{node}",
        "interfaces": {"lo": ["127.0.0.1"], "eth0": [f"10.0.0.{node + 1}"]},
        "named_interfaces": [],
        "master": {"name": "node0", "port": "29500", "addresses": ["10.0.0.1"]},
        "port_free": True if rank == 0 else None,
        "cores": [4 * local + core for core in range(4)],
        "machine_cores": 16,
        "slurm": True,
        "gpus": [f"GPU-{node}{gpu}" for gpu in range(4)],
        "versions": {"python": "3.11.7", "torch": "2.13.0", "dist-gpt": "0.1.0"},
        "code": "c0de",
        "config": "c0ffee",
        "config_expected": "c0ffee",
        "run_dir": {"path": "/shared/run", "visible": True, "writable": True, "free_bytes": 1 << 40},
        "time": NOW,
    }


def good() -> dict[int, Answer]:
    return {
        rank: Answer(rank, 8, rank % 4, 4, rank // 4, f"node{rank // 4}", found(rank), arrived=NOW + 0.1)
        for rank in range(8)
    }


def with_facts(change: Callable[[int, Facts], object], ranks: range = range(4, 8)) -> dict[int, Answer]:
    """Good answers, those of node1 (or of `ranks`) changed."""
    answers = good()
    for rank in ranks:
        facts = found(rank)
        change(rank, facts)
        answers[rank] = replace(answers[rank], facts=facts)
    return answers


def only(problems: list[Problem]) -> Problem:
    assert len(problems) == 1, text(problems)
    return problems[0]


def test_a_good_job_has_no_problems() -> None:
    assert judge(good(), EXPECTED) == []
    assert text([]) == ""


CPU: Facts = {"gpus": []}
PLANTED: dict[str, tuple[Callable[[int, Facts], object], str, str, str]] = {
    # name: (what rank r of node1 finds, its ranks, words of what, words of the remedy)
    "unresolvable master": (lambda r, f: f.update(master={"name": "node0", "error": "Name or service not known"}),
                            "ranks 4-7", "cannot resolve node0", "/etc/hosts"),
    "loopback master": (lambda r, f: f.update(master={"name": "node0", "addresses": ["127.0.1.1"]}),
                        "ranks 4-7", "resolves node0, where the ranks meet, to 127.0.1.1: loopback", "127.*"),
    "no such interface": (lambda r, f: f.update(named_interfaces=["ib0"]),
                          "ranks 4-7", "no interface ib0 that is up; it has eth0 10.0.0.2; lo", "launch.interface"),
    "fewer GPUs than ranks": (lambda r, f: f.update(gpus=["GPU-10", "GPU-11"]),
                              "ranks 6-7", "sees 2 GPUs for 4 ranks", "launch.slurm.gpus_per_node"),
    "no GPU on one node": (lambda r, f: f.update(gpus=[]), "ranks 4-7", "sees 0 GPUs for 4 ranks", "GPUs per node"),
    "a shared GPU": (lambda r, f: f.update(gpus=[("GPU-10", "GPU-11", "GPU-10", "GPU-12")[r - 4]]),
                     "ranks 4-7", "sees 3 GPUs for 4 ranks", "GPUs per node"),
    "one core for all": (lambda r, f: f.update(cores=[0]),
                         "ranks 4-7", "4 ranks with GPUs may run on 1 of the machine's 16 cores",
                         "launch.slurm.cpus_per_rank: 4 (srun gives a task one core"),
    "one core per rank with GPUs": (lambda r, f: f.update(cores=[r - 4]),
                                    "ranks 4-7", "may run on 4 of the machine's 16 cores", "SRUN_CPUS_PER_TASK"),
    "another torch": (lambda r, f: f["versions"].update(torch="2.12.0"),
                      "ranks 4-7", "has torch 2.12.0, and rank 0 on node0 has 2.13.0", "the same on all nodes"),
    "another Python": (lambda r, f: f["versions"].update(python="3.12.1"),
                       "ranks 4-7", "has python 3.12.1, and rank 0 on node0 has 3.11.7", "the same on all nodes"),
    "other source files": (lambda r, f: f.update(code="01d"), "ranks 4-7", "different source files", "one checkout"),
    "another config": (lambda r, f: f.update(config="dead"),
                       "ranks 4-7", "digest dead) than the launcher wrote (c0ffee)", "all nodes share"),
    "an unreadable config": (lambda r, f: f.update(config=""),
                             "ranks 4-7", "digest none) than the launcher wrote", "all nodes share"),
    "run directory not there": (lambda r, f: f.update(config="", run_dir={**f["run_dir"], "visible": False}),
                                "ranks 4-7", "does not see the run directory /shared/run", "all nodes share"),
    "run directory read-only": (lambda r, f: f["run_dir"].update(writable=False),
                                "rank 4", "cannot write to the run directory", "writable for this user"),
    "clock ahead": (lambda r, f: f.update(time=NOW + 63), "ranks 4-7", "63 s ahead of the launcher's", "chronyc"),
    "clock behind": (lambda r, f: f.update(time=NOW - 63), "ranks 4-7", "63 s behind the launcher's", "chronyc"),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(PLANTED))
def test_planted_on_a_node(name: str) -> None:
    change, ranks, what, remedy = PLANTED[name]
    problem = only(judge(with_facts(change), EXPECTED))
    line = text([problem])
    assert (problem.node, problem.severity) == ("node1", ERROR)
    assert line.startswith(f"preflight error: node1 ({ranks}): ") and what in line
    assert remedy in problem.remedy


def test_two_ranks_that_would_take_the_same_gpu_of_enough() -> None:
    """Masks that differ between the ranks of a node: each sees two, as many as ranks in all."""
    masks = {4: ["GPU-a", "GPU-b"], 5: ["GPU-a", "GPU-b"], 6: ["GPU-c"], 7: ["GPU-c", "GPU-b", "GPU-d", "GPU-c"]}
    problem = only(judge(with_facts(lambda r, f: f.update(gpus=masks[r])), EXPECTED))
    assert problem.ranks == (6, 7) and problem.what == "would share the GPU GPU-c"


def test_one_gpu_for_each_task_is_enough() -> None:
    assert judge(with_facts(lambda r, f: f.update(gpus=[f"GPU-1{r}"])), EXPECTED) == []


def test_missing_ranks_are_named_with_their_node() -> None:
    answers = {rank: answer for rank, answer in good().items() if rank not in (5, 6)}
    problem = only(judge(answers, replace(EXPECTED, log=lambda rank: f"/run/logs/rank{rank}.log")))
    assert (problem.node, problem.ranks) == ("node1", (5, 6))
    assert "ranks 4, 7 of the same node did" in problem.what and "/run/logs/rank5.log" in problem.remedy


def test_a_node_that_does_not_answer() -> None:
    answers = {rank: answer for rank, answer in good().items() if rank < 4}
    problem = only(judge(answers, EXPECTED))
    assert (problem.node, problem.ranks) == ("node 1", (4, 5, 6, 7))
    assert "rank4.log" in problem.remedy and "launch.interface" in problem.remedy


def test_nobody_answers() -> None:
    assert [problem.node for problem in judge({}, EXPECTED)] == ["node 0", "node 1"]


def test_the_mesh_is_not_what_was_started() -> None:
    problem = only(judge(good(), replace(EXPECTED, mesh=16, layout="pp 4 x dp 2 x cp 1 x tp 2")))
    assert "has 8 ranks on 2 nodes (4 per node), but the layout pp 4 x dp 2 x cp 1 x tp 2 has 16" in problem.what
    assert "--ranks-per-node" in problem.remedy


def test_ranks_that_were_told_another_world() -> None:
    answers = good() | {rank: replace(good()[rank], world=4) for rank in range(4, 8)}
    problem = only(judge(answers, EXPECTED))
    assert (problem.node, problem.ranks) == ("node1", (4, 5, 6, 7)) and "one of 4 ranks" in problem.what


def test_nodes_with_different_numbers_of_ranks() -> None:
    answers = good()
    for rank in range(8):
        node, local = (0, rank) if rank < 5 else (1, rank - 5)
        answers[rank] = replace(
            answers[rank], node=node, local_rank=local, local_world=5 - 2 * node, host=f"node{node}",
            facts={**found(rank), "gpus": []},
        )  # fmt: skip
    first, second = judge(answers, EXPECTED)
    assert "has 5 ranks, but should have 4 (8 ranks on 2 nodes)" in first.what and first.node == "node0"
    assert "has 3 ranks" in second.what and "--map-by ppr:4:node" in second.remedy


def test_a_rank_that_is_there_twice() -> None:
    problem = only(judge(good(), EXPECTED, [replace(good()[3], host="node1", node=1)]))
    assert (problem.node, problem.ranks) == ("node1", (3,))
    assert "claims rank 3, which a process on node0 already holds" in problem.what


def test_a_port_that_is_taken() -> None:
    problem = only(judge(with_facts(lambda r, f: f.update(port_free=False), range(1)), EXPECTED))
    assert "another program listens on node0:29500" in problem.what
    assert problem.node == "node0" and "MASTER_PORT" in problem.remedy


def test_the_interface_of_the_config_is_asked_of_every_node() -> None:
    problems = judge(good(), replace(EXPECTED, interface="hsn0"))
    assert [problem.node for problem in problems] == ["node0", "node1"]
    assert (
        judge(good(), replace(EXPECTED, interface="eth0")) == judge(good(), replace(EXPECTED, interface="eth*")) == []
    )


def test_loopback_is_right_on_one_machine() -> None:
    """Also where it plays two nodes."""
    answers = with_facts(lambda r, f: f.update(master={"name": "localhost", "addresses": ["127.0.0.1"]}), range(8))
    here = {rank: replace(answer, host="laptop") for rank, answer in answers.items()}
    assert judge(here, EXPECTED) == []


def test_cores_of_a_job_on_processors() -> None:
    """Fewer cores than ranks: a mistake of srun's mask, a note about another mask, nothing on a small machine."""
    wide, narrow = {**CPU, "machine_cores": 16}, {**CPU, "machine_cores": 2}
    for changes, severity in (
        ({**wide, "cores": [0]}, ERROR),
        ({**wide, "cores": [0], "slurm": False}, WARNING),
        ({**narrow, "cores": [0, 1]}, None),
        ({**wide, "cores": [0, 1, 2, 3]}, None),
    ):
        problems = judge(with_facts(lambda r, f, c=changes: f.update(c), range(8)), EXPECTED)  # type: ignore[misc]
        assert [problem.severity for problem in problems] == ([severity] * 2 if severity else []), changes


def test_little_room_is_a_warning() -> None:
    problem = only(judge(with_facts(lambda r, f: f["run_dir"].update(free_bytes=5 << 20)), EXPECTED))
    assert problem.severity == WARNING and "5 MiB left" in problem.what


def test_a_hello_under_way_for_long_is_no_wrong_clock() -> None:
    answers = {rank: replace(answer, asked=NOW - 1, arrived=NOW + 20) for rank, answer in good().items()}
    assert judge(answers, EXPECTED) == []

    slow = good()[5]
    assert judge(good() | {5: replace(slow, arrived=NOW + 20)}, EXPECTED) == [], "the promptest of the node counts"


def test_errors_are_listed_before_warnings() -> None:
    problems = [Problem("a", (1,), "w", "r", WARNING), Problem("b", (0, 1, 3), "e", "r")]
    assert text(problems) == "preflight error: b (ranks 0-1, 3): e. r\npreflight warning: a (rank 1): w. r"


class TestSupervisor:
    def states(self, answers: dict[int, Answer]) -> list[RankState]:
        hellos = {r: {**vars(a), "facts": {**a.facts, "time": time.time()}} for r, a in answers.items()}
        return [RankState(rank, hellos.get(rank), joined=1.0, arrived=time.time()) for rank in range(8)]

    def spec(self, tmp_path: Path) -> JobSpec:
        return JobSpec(("x",), 8, tmp_path, nodes=2, layout=Layout(pp=2, dp=2, tp=2))

    def test_good(self, tmp_path: Path) -> None:
        assert preflight.check_answers(self.spec(tmp_path), self.states(good()), []) == ""

    def test_bad(self, tmp_path: Path) -> None:
        answers = {rank: answer for rank, answer in good().items() if rank != 7}
        said = preflight.check_answers(self.spec(tmp_path), self.states(answers), [7])
        assert said.startswith("preflight error: node1 (rank 7): did not report to the launcher")
        assert str(tmp_path / "rank7.log") in said

    @pytest.mark.parametrize(("nodes", "name"), [("n[1-2]", "n2"), ("n[1-", "node 1")])
    def test_nodes_are_named_as_slurm_does_if_it_can_be_read(
        self, nodes: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SLURM_JOB_NODELIST", nodes)
        answers = {rank: answer for rank, answer in good().items() if rank < 4}
        said = preflight.check_answers(self.spec(tmp_path), self.states(answers), [4, 5, 6, 7])
        assert said.startswith(f"preflight error: {name} (ranks 4-7): no rank of ")

    def test_warnings_do_not_keep_it(self, tmp_path: Path) -> None:
        states = self.states(with_facts(lambda r, f: f["run_dir"].update(free_bytes=0)))
        assert preflight.check_answers(self.spec(tmp_path), states, []) == ""
        assert preflight.warnings(self.spec(tmp_path), states).startswith("preflight warning: node1")

    def test_rivals_are_duplicates(self, tmp_path: Path) -> None:
        states = self.states(good())
        states[2] = replace(states[2], rivals=(vars(good()[2]),))
        assert "claims rank 2" in preflight.check_answers(self.spec(tmp_path), states)


class TestFacts:
    def test_they_are_json_and_quick(self, tmp_path: Path) -> None:
        (tmp_path / "config.yaml").write_text("name: x\n")
        environ = {
            "MASTER_ADDR": "127.0.0.1", "DIST_GPT_RUN_DIR": str(tmp_path), "DIST_GPT_WATCH": "127.0.0.1:1",
            "DIST_GPT_CONFIG_HASH": finding.config_digest(tmp_path / "config.yaml"), "GLOO_SOCKET_IFNAME": "lo, eth9",
            "CUDA_VISIBLE_DEVICES": "",
        }  # fmt: skip
        before = time.time()
        facts = json.loads(json.dumps(finding.facts(environ)))
        assert facts["config"] == facts["config_expected"] != ""
        assert facts["master"]["addresses"] == ["127.0.0.1"] and facts["towards_watch"] == "127.0.0.1"
        assert facts["named_interfaces"] == ["lo", "eth9"] and "127.0.0.1" in facts["interfaces"]["lo"]
        assert facts["cores"] == sorted(os.sched_getaffinity(0)) and facts["gpus"] == []
        assert facts["run_dir"]["visible"] and facts["run_dir"]["writable"]
        assert list(tmp_path.iterdir()) == [tmp_path / "config.yaml"], "its trial of writing is still there"
        assert before <= facts["time"] <= time.time()
        assert len(json.dumps(facts)) < 32768
        assert min(_seconds(environ) for _ in range(5)) < finding.RESOLVE_S, "it waits for a name service"

    def test_without_torch(self) -> None:
        code = "import sys, launch.monitor.preflight as p; p.facts({}); sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0

    def test_names_that_do_not_resolve(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuses(*args: object, **more: object) -> list[Any]:
            raise socket.gaierror(-2, "Name or service not known")

        def sleeps(*args: object, **more: object) -> list[Any]:
            time.sleep(0.5)
            return []

        monkeypatch.setattr(socket, "getaddrinfo", refuses)
        assert finding.resolve("nowhere", 20.0) == {"error": "[Errno -2] Name or service not known"}
        monkeypatch.setattr(socket, "getaddrinfo", sleeps)
        assert finding.resolve("slow", 0.05) == {"error": "no answer from the name service in 0.05 s"}

    def test_ports(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            assert not finding.port_free("127.0.0.1", port)
            taken = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            assert finding.facts(taken)["port_free"] is False
            assert finding.facts({**taken, "RANK": "1"})["port_free"] is None
            assert finding.facts({**taken, "TORCHELASTIC_USE_AGENT_STORE": "True"})["port_free"] is None
        assert finding.port_free("127.0.0.1", port)

    @pytest.mark.parametrize(
        ("visible", "expected"),
        [(None, ["GPU-aa", "GPU-ab", "GPU-c"]), ("", []), ("2,0", ["GPU-c", "GPU-aa"]), ("0,-1,1", ["GPU-aa"]),
         ("GPU-c", ["GPU-c"]), ("MIG-7", ["MIG-7"]), ("9", [])],
    )  # fmt: skip
    def test_nvidia(self, tmp_path: Path, visible: str | None, expected: list[str]) -> None:
        tool = tmp_path / "nvidia-smi"
        tool.write_text("#!/bin/sh\n" + "".join(
            f'echo "GPU {i}: NVIDIA H100 80GB HBM3 (UUID: GPU-{name})"\n' for i, name in enumerate(("aa", "ab", "c"))
        ))  # fmt: skip
        tool.chmod(0o755)
        environ = {"PATH": f"{tmp_path}:/bin:/usr/bin"} | ({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
        assert finding.visible_gpus(environ) == expected

    def test_amd(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for node, number in {0: "0", 1: "51111", 2: "52222", 10: "53333"}.items():
            (tmp_path / str(node)).mkdir()
            (tmp_path / str(node) / "gpu_id").write_text(f"{number}\n")
        monkeypatch.setattr(finding, "KFD", tmp_path)
        assert finding.visible_gpus({"PATH": ""}) == ["KFD-51111", "KFD-52222", "KFD-53333"]
        chosen = {"PATH": "", "ROCR_VISIBLE_DEVICES": "1,2", "HIP_VISIBLE_DEVICES": "1"}
        assert finding.visible_gpus(chosen) == ["KFD-53333"]

    def test_source_files_that_differ(self, tmp_path: Path) -> None:
        (tmp_path / "launch").mkdir()
        (tmp_path / "launch" / "a.py").write_text("x = 1\n")
        one = finding.code_digest(tmp_path)
        (tmp_path / "launch" / "a.py").write_text("x = 2\n")
        assert finding.code_digest(tmp_path) != one

    def test_a_folder_that_is_not_there(self, tmp_path: Path) -> None:
        assert finding.folder(tmp_path / "no")["visible"] is False
        assert finding.config_digest(tmp_path / "no") == ""


def _seconds(environ: dict[str, str]) -> float:
    started = time.perf_counter()
    finding.facts(environ)
    return time.perf_counter() - started
