"""Which rank a process is, from the variables of whoever started it; Slurm's short lists."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_gpt.config.errors import ConfigError
from launch.net import free_port, port_of
from launch.nodelist import counts, expand
from launch.rank.discover import discover, split_address

TORCH = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2", "MASTER_ADDR": "node1", "MASTER_PORT": "29500",
}  # fmt: skip
TORCHRUN = TORCH | {"TORCHELASTIC_RUN_ID": "abc"}
STEP = {
    "SLURM_JOB_ID": "12", "SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_NODEID": "1", "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_STEP_NODELIST": "node[1-2]",
}  # fmt: skip
BATCH = {
    "SLURM_JOB_ID": "12", "SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8",
    "SLURM_JOB_NODELIST": "node[1-2]",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "PMIX_RANK": "5",
}  # fmt: skip
MPICH = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}
JSRUN = {
    "JSM_NAMESPACE_RANK": "5", "JSM_NAMESPACE_SIZE": "8", "JSM_NAMESPACE_LOCAL_RANK": "1",
    "JSM_NAMESPACE_LOCAL_SIZE": "4", "PMIX_RANK": "5",
}  # fmt: skip
MVAPICH = {f"MV2_COMM_WORLD_{name}": value for name, value in (
    ("RANK", "5"), ("SIZE", "8"), ("LOCAL_RANK", "1"), ("LOCAL_SIZE", "4"))}  # fmt: skip
PALS = {"PMI_RANK": "5", "PMI_SIZE": "8", "PALS_RANKID": "5", "PALS_LOCAL_RANKID": "1", "PALS_LOCAL_SIZE": "4"}
FLUX = {"FLUX_TASK_RANK": "5", "FLUX_JOB_SIZE": "8", "FLUX_JOB_NNODES": "2", "FLUX_TASK_LOCAL_ID": "1"}
DAEMON = STEP | {  # the step in which mpirun's daemon runs on the second node: one task a node
    "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
}  # fmt: skip
MASTER = {"DIST_GPT_MASTER": "10.0.0.1:23456"}
SAME = "rank 5/8 node 1/2 local 1/4"


@pytest.mark.parametrize(("environ", "source"), [
    (TORCH | {"DIST_GPT_LAUNCHER": "local"}, "dist-gpt launch, local"),
    (TORCH | {"DIST_GPT_ERROR_FILE": "/tmp/x"} | BATCH, "dist-gpt launch, local"),
    (TORCH | {"DIST_GPT_LAUNCHER": "local"} | DAEMON | OPEN_MPI | TORCHRUN, "dist-gpt launch, local"),
    (TORCHRUN, "torchrun"),
    (TORCHRUN | DAEMON, "torchrun"),
    (TORCHRUN | DAEMON | OPEN_MPI | MPICH, "torchrun"),
    (STEP, "Slurm step 12.0"),
    (STEP | {"RANK": "0", "WORLD_SIZE": "1"}, "Slurm step 12.0"),
    (STEP | {"PMI_RANK": "5", "PMI_SIZE": "8"}, "Slurm step 12.0"),  # srun --mpi=pmi2
    (STEP | OPEN_MPI | {"DIST_GPT_STARTER": "srun"}, "Slurm step 12.0"),  # our step, started inside an mpirun
    (OPEN_MPI | MASTER, "Open MPI"),
    (OPEN_MPI | BATCH | MASTER, "Open MPI"),
    (OPEN_MPI | DAEMON | MASTER, "Open MPI"),
    (MPICH | DAEMON | MASTER, "MPICH (PMI)"),
    (MPICH | MASTER, "MPICH (PMI)"),
    (MVAPICH | MASTER, "MVAPICH"),
    (MVAPICH | {"PMI_RANK": "5", "PMI_SIZE": "8"} | MASTER, "MVAPICH"),
    (PALS | MASTER, "MPICH (PMI)"),
    (JSRUN | MASTER, "jsrun"),
    (JSRUN | OPEN_MPI | MASTER, "Open MPI"),  # Spectrum MPI under jsrun
    (FLUX | MASTER, "Flux"),
    (FLUX | {"PMI_RANK": "5", "PMI_SIZE": "8"} | MPICH | MASTER, "MPICH (PMI)"),
    (TORCH, "RANK and WORLD_SIZE"),
    (TORCH | BATCH, "RANK and WORLD_SIZE"),
])  # fmt: skip
def test_the_nearest_starter_is_believed(environ: dict[str, str], source: str) -> None:
    place = discover(environ)
    assert place.sentence() == f"{SAME} ({source})"
    assert {k: place.environ()[k] for k in TORCH if "MASTER" not in k} == {
        k: v for k, v in TORCH.items() if "MASTER" not in k
    }


@pytest.mark.parametrize("environ", [
    {}, BATCH, BATCH | {"SLURM_STEP_ID": "4294967291", "SLURM_STEP_NUM_TASKS": "8"}, BATCH | {"SLURM_STEP_ID": "batch"},
    {"PMIX_RANK": "0"},
])  # fmt: skip
def test_nobody_started_it(environ: dict[str, str]) -> None:
    place = discover(environ)
    assert place.sentence() == "rank 0/1 node 0/1 local 0/1 (single process)"
    assert "MASTER_ADDR" not in place.environ()


def test_master_of_a_slurm_step() -> None:
    place = discover(STEP)
    assert (place.master_addr, place.master_port) == ("node1", port_of("12", "0"))
    assert place.environ()["MASTER_PORT"] == str(port_of("12", "0"))
    assert discover(STEP | MASTER).environ()["MASTER_ADDR"] == "10.0.0.1"
    one_node = STEP | {"SLURM_STEP_TASKS_PER_NODE": "8", "SLURM_NODEID": "0", "SLURM_LOCALID": "5"}
    assert discover(one_node).environ()["MASTER_ADDR"] == "127.0.0.1"
    uneven = STEP | {
        "SLURM_STEP_TASKS_PER_NODE": "4,3,1",
        "SLURM_NODEID": "2",
        "SLURM_PROCID": "7",
        "SLURM_LOCALID": "0",
    }
    assert discover(uneven).sentence() == "rank 7/8 node 2/3 local 0/1 (Slurm step 12.0)"


@pytest.mark.parametrize(("environ", "named"), [
    (STEP | {"SLURM_PROCID": "x"}, ["SLURM_PROCID='x'", "Slurm step 12.0"]),
    (STEP | {"SLURM_NODEID": ""}, ["SLURM_NODEID", "Slurm step 12.0"]),
    (STEP | {"SLURM_STEP_TASKS_PER_NODE": "4(x3)"}, ["SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_NUM_TASKS"]),
    (STEP | {"SLURM_STEP_TASKS_PER_NODE": "4(x2"}, ["4(x2", "tasks per node"]),
    (STEP | {"SLURM_LOCALID": "0"}, ["SLURM_PROCID", "--distribution=block"]),
    (STEP | {"SLURM_STEP_NODELIST": "node[1-"}, ["node[1-"]),
    (STEP | {"DIST_GPT_MASTER": "node1"}, ["DIST_GPT_MASTER", "HOST:PORT"]),
    (TORCHRUN | {"LOCAL_RANK": "4"}, ["torchrun", "local rank 4 of 4"]),
    (TORCHRUN | {"RANK": "8"}, ["torchrun", "rank 8 of 8"]),
    (TORCHRUN | {"RANK": "-1"}, ["RANK='-1'", "torchrun"]),
    (TORCHRUN | {"RANK": "\u0665"}, ["RANK="]),
    (TORCHRUN | {"MASTER_PORT": "99999"}, ["MASTER_PORT=99999"]),
    (TORCHRUN | {"LOCAL_WORLD_SIZE": "16"}, ["16 ranks on the node"]),
    ({"WORLD_SIZE": "2"}, ["RANK", "RANK and WORLD_SIZE"]),
    ({"RANK": "0", "WORLD_SIZE": "2"}, ["MASTER_ADDR", "DIST_GPT_MASTER"]),
    (OPEN_MPI, ["DIST_GPT_MASTER", "Open MPI"]),
    (OPEN_MPI | MASTER | {"OMPI_COMM_WORLD_LOCAL_RANK": "0"}, ["--map-by ppr:4:node"]),
    ({"PMI_RANK": "0", "PMI_SIZE": "2"}, ["MPI_LOCALRANKID", "MPICH"]),
    (FLUX | MASTER | {"FLUX_JOB_NNODES": "3"}, ["FLUX_JOB_SIZE=8", "FLUX_JOB_NNODES=3"]),
    (FLUX | MASTER | {"FLUX_JOB_NNODES": "0"}, ["FLUX_JOB_NNODES=0"]),
    (JSRUN | MASTER | {"JSM_NAMESPACE_SIZE": "4"}, ["jsrun", "rank 5 of 4"]),
    (MVAPICH | MASTER | {"MV2_COMM_WORLD_LOCAL_SIZE": ""}, ["MV2_COMM_WORLD_LOCAL_SIZE is not set"]),
])  # fmt: skip
def test_contradictions_name_the_variable_and_its_source(environ: dict[str, str], named: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        discover(environ).environ()
    for part in named:
        assert part in str(caught.value)


def test_addresses() -> None:
    assert split_address("node1:29500", "X") == ("node1", 29500)
    assert split_address("[fe80::1]:80", "X") == ("fe80::1", 80)
    for bad in ("", ":1", "a:", "a:0", "a:65536", "a:x"):
        with pytest.raises(ConfigError, match="X="):
            split_address(bad, "X")


def test_ports() -> None:
    found = [port_of(str(job)) for job in range(500)]
    assert all(20000 <= port < 32768 for port in found)
    assert len(set(found)) > 480
    assert port_of("7", "0") == port_of("7", "0") != port_of("7", "1")
    assert 1024 < free_port("127.0.0.1", "seed") < 65536
    with pytest.raises(OSError):
        free_port("192.0.2.1")


@pytest.mark.parametrize(("text", "names"), [
    ("n1", ["n1"]),
    ("n[1-3,07-09],gpu-a[1-2]-x3", ["n1", "n2", "n3", "n07", "n08", "n09", "gpu-a1-x3", "gpu-a2-x3"]),
    ("a[098-101]", ["a098", "a099", "a100", "a101"]),
    ("r[1-2]n[3,5]", ["r1n3", "r1n5", "r2n3", "r2n5"]),
    ("frontier00001,frontier[00010-00011]", ["frontier00001", "frontier00010", "frontier00011"]),
])  # fmt: skip
def test_node_lists(text: str, names: list[str]) -> None:
    assert expand(text) == names


@pytest.mark.parametrize(
    "text", ["", ",", "n[1", "n1]", "n[]", "n[3-1]", "n[a]", "n[1-2,]", "n[[1]]", "n 1", "n[1-999999999]", "n1,",
             "a[1-9999]b[1-9999]", "n[\u0661]"])  # fmt: skip
def test_no_node_lists(text: str) -> None:
    with pytest.raises(ConfigError, match="not a Slurm node list"):
        expand(text)


name = st.text("abcxyz-", min_size=1, max_size=4)
numbers = st.lists(st.tuples(st.integers(0, 200), st.integers(0, 5), st.integers(1, 4)), min_size=1, max_size=3)


@given(st.lists(st.tuples(name, numbers, st.one_of(st.just(""), name)), min_size=1, max_size=4))
def test_node_lists_are_what_was_written(items: list[tuple[str, Any, str]]) -> None:
    texts, names = [], []
    for prefix, ranges, suffix in items:
        inner = [f"{a:0{w}d}" if not n else f"{a:0{w}d}-{a + n:0{w}d}" for a, n, w in ranges]
        texts.append(f"{prefix}[{','.join(inner)}]{suffix}")
        for first, more, width in ranges:
            names += [f"{prefix}{number:0{width}d}{suffix}" for number in range(first, first + more + 1)]
    assert expand(",".join(texts)) == names


@given(st.text("n[]-,0123456789 (x)", max_size=24))
def test_any_text_is_a_list_or_a_refusal(text: str) -> None:
    for parse in (expand, counts):
        with suppress(ConfigError):
            assert parse(text)


@given(st.lists(st.integers(0, 64), min_size=1, max_size=9))
def test_counts(tasks: list[int]) -> None:
    assert counts(",".join(map(str, tasks))) == tasks
    assert counts("4(x2),3") == [4, 4, 3]
