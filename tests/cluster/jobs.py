"""Training jobs on the virtual cluster: one tiny configuration in float64, started in every way."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.virtual import VirtualCluster
from tests.ranks.runs import CONFIG, ROOT, TEXT, rows

COMMAND = Path(sys.executable).with_name("dist-gpt")
PATIENCE_S = 200.0
MEASURED = ("loss", "val_loss", "grad_norm")
"""What must not depend on who started the ranks."""


class Jobs:
    """A folder with the configuration and its data, whose runs are on 2 nodes x 4 ranks unless told otherwise."""

    def __init__(self, cluster: VirtualCluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        (folder / "text.txt").write_text(TEXT * 8)
        document = {
            **CONFIG,
            "data": {"source": str(folder / "text.txt"), "cache": str(folder / "cache")},
            "parallel": {"dp": 2, "tp": 2, "pp": 2},
            "launch": {"nodes": 2, "ranks_per_node": 4, "timeout_s": 60.0, "grace_s": 30.0},
        }
        self.config = folder / "tiny.yaml"
        self.config.write_text(yaml.safe_dump(document))

    def argv(self, run_dir: str, via: str, *options: str, sets: Mapping[str, object] | None = None) -> list[str]:
        """`dist-gpt launch CONFIG --via VIA ...`; values of `sets` are as YAML."""
        pairs = {"run_dir": self.folder / run_dir, **(sets or {})}
        words = [word for key, value in pairs.items() for word in ("--set", f"{key}={value}")]
        return [str(COMMAND), "launch", str(self.config), "--via", via, *options, *words]

    def local(self, run_dir: str, *options: str, sets: Mapping[str, object] | None = None) -> list[dict[str, Any]]:
        """Train on the head, all ranks there; rows of metrics.jsonl."""
        one = {"launch.nodes": 1, "launch.ranks_per_node": "auto", **(sets or {})}
        self.cluster.run(0, self.argv(run_dir, "local", *options, sets=one), timeout=PATIENCE_S, cwd=self.folder)
        return self.metrics(run_dir)

    def submit(self, run_dir: str, via: str, *options: str, sets: Mapping[str, object] | None = None,
               sbatch: tuple[str, ...] = (), ranks_per_node: int = 4) -> int:  # fmt: skip
        """sbatch of a script as a person writes it, its last line `exec dist-gpt launch CONFIG --via VIA`; job id."""
        argv = self.argv(run_dir, via, *options, sets={"launch.ranks_per_node": ranks_per_node, **(sets or {})})
        script = "exec " + " ".join(f"'{word}'" for word in argv)
        wanted = ["--nodes=2", f"--ntasks-per-node={ranks_per_node}", f"--output={self.out(run_dir)}",
                  "--open-mode=append", *sbatch]  # fmt: skip
        return self.cluster.sbatch(*wanted, script=script, cwd=self.folder)

    def train(self, run_dir: str, via: str, *options: str, sets: Mapping[str, object] | None = None,
              ranks_per_node: int = 4) -> list[dict[str, Any]]:  # fmt: skip
        """The same to its good end; rows of metrics.jsonl. A failure shows what the job said."""
        job = self.submit(run_dir, via, *options, sets=sets, ranks_per_node=ranks_per_node)
        try:
            self.cluster.wait_state(job, {"COMPLETED"}, PATIENCE_S)
        except (RuntimeError, TimeoutError) as error:
            raise AssertionError(f"{error}\n{self.said(run_dir)}") from None
        return self.metrics(run_dir)

    def out(self, run_dir: str) -> Path:
        return self.folder / f"{run_dir}.out"

    def said(self, run_dir: str) -> str:
        """What the job printed."""
        path = self.out(run_dir)
        return path.read_text(errors="replace") if path.exists() else ""

    def metrics(self, run_dir: str) -> list[dict[str, Any]]:
        return rows(self.folder / run_dir / "metrics.jsonl")

    def nothing_runs(self) -> bool:
        """Whether no rank, torchrun or mpirun is left on any node or the head."""
        return not [pid for node in range(1, self.cluster.nodes + 1)
                    for pid in self.cluster.processes(node, str(ROOT))]  # fmt: skip


def numbers(metrics: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """What must be equal to the last bit."""
    return [tuple(row.get(key) for key in ("step", *MEASURED)) for row in metrics]
