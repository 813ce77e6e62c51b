"""What leaves a node by its link's own counters is what the ledger says leaves it; each axis across nodes in turn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dist_gpt.config.load import load
from dist_gpt.events import leaving_bytes
from dist_gpt.layout import Layout
from tests.cluster import network
from tests.cluster.jobs import Jobs
from tests.cluster.virtual import VirtualCluster
from tests.ranks.runs import rows

WIDE = {"model.hidden_size": 256, "train.global_batch": 8, "train.micro_batch": 1}
LONG = {"model.hidden_size": 64, "train.global_batch": 64, "train.micro_batch": 8}
"""Many bytes for little work: wide where weights are sent, many tokens where activations are."""
PLACED: dict[str, dict[str, object]] = {  # ranks are numbered tensor fastest, pipeline slowest
    "data": {"parallel.dp": 2, "parallel.tp": 4, "parallel.pp": 1, "train.steps": 6, **WIDE},
    "tensor": {"parallel.dp": 1, "parallel.tp": 8, "parallel.pp": 1, "train.steps": 2, **LONG},
    "pipeline": {"parallel.dp": 2, "parallel.tp": 2, "parallel.pp": 2, "train.steps": 6, **LONG},
}
SIZES = {"model.num_heads": 8, "model.seq_len": 128, "train.eval_every": 0, "train.eval_batches": 0,
         "optim.warmup": 1}  # fmt: skip
MOST, MOST_CONTROL = 0.03, 0.01
HEADER = 66
"""Ethernet 14, IPv4 20, TCP 20 and its time stamps 12."""


def by_ledger(run_dir: Path, layout: Layout, per_node: int) -> list[int]:
    """Bytes of training, evaluation and the probe before them that left each node, from the events files."""
    node_of = [rank // per_node for rank in range(layout.world)]
    found = [0] * (max(node_of) + 1)
    for rank in range(layout.world):
        events = rows(run_dir / f"events.rank{rank}.jsonl")
        assert events[0]["host"] == f"node{node_of[rank] + 1}" and events[-1]["end"]["differences"] == []
        for row in events:
            for axis, ops in row.get("probe", row).get("comm", {}).items():
                # with two stages a rank's only peer along pp, and along embed, is the rank of the other stage
                ranks = layout.group(axis if axis != "embed" else "pp", rank)
                for op, tally in ops.items():
                    found[node_of[rank]] += leaving_bytes(
                        op, tally["payload_bytes"], ranks, ranks.index(rank), node_of, emulated=True)  # fmt: skip
    return found


@pytest.mark.parametrize("axis", PLACED)
def test_the_link_counts_what_the_ledger_counts(axis: str, cluster: VirtualCluster, tmp_path: Path) -> None:
    jobs = Jobs(cluster, tmp_path)
    before = [cluster.nic(node) for node in (1, 2)]
    resent = [network.resent_bytes(node) for node in (1, 2)]
    jobs.train("run", "slurm", sets={**SIZES, **PLACED[axis]})
    sent = [cluster.nic(node).since(then) for node, then in zip((1, 2), before, strict=True)]
    resent = [network.resent_bytes(node) - then for node, then in zip((1, 2), resent, strict=True)]
    config = load(str(tmp_path / "run" / "config.yaml"))
    p = config.parallel
    assert isinstance(p.dp, int)
    ledger = by_ledger(tmp_path / "run", Layout(pp=p.pp, dp=p.dp, cp=p.cp, tp=p.tp), per_node=4)
    measured = [link.tx_bytes - HEADER * link.tx_packets for link in sent]
    packets = [link.tx_packets for link in sent]
    print(axis, json.dumps({"ledger": ledger, "link": measured, "sent again": resent, "packets": packets}))
    for counted, left, again in zip(ledger, measured, resent, strict=True):
        assert counted > 10_000_000
        assert -0.005 < left / counted - 1 < MOST, (measured, ledger)
        # all the rest of the job: Slurm's messages, output, the store, hellos, heartbeats
        assert again < MOST_CONTROL * counted, (measured, ledger, resent)
        assert -MOST_CONTROL / 2 * counted < left - again - counted < MOST_CONTROL * counted, (measured, ledger, resent)
