"""The model that both sides train, and the options of the command line. Torch-free."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from dist_gpt.config.load import load
from dist_gpt.config.schema import Config

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {"norm": "rmsnorm", "activation": "swiglu", "position": "rope", "tie_embeddings": False, "bias": False},
}


@dataclass(frozen=True)
class Settings:
    """Options of the command line. `pairs`, `threads` or `micro_batches` None: the benchmark's own value."""

    pairs: int | None = None
    threads: int | None = None
    family: str = "gpt2"
    hidden: int = 512
    layers: int = 6
    heads: int = 8
    seq: int = 256
    vocab: int = 4096
    micro_batch: int = 4
    micro_batches: int | None = None
    warm_up: int = 2
    overrides: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    def config(self, micro_batches: int, **parallel: Any) -> Config:
        """Return the configuration of a step of `micro_batches` micro-batches over all data ranks.

        The global batch, and with it the plain side's work, is then the same in every layout. Raise ConfigError if the
        options cannot train.
        """
        tree = {
            "model": {
                "num_layers": self.layers, "hidden_size": self.hidden, "num_heads": self.heads,
                "seq_len": self.seq, "vocab_size": self.vocab, **FAMILIES[self.family],
            },
            "parallel": {"dp": 1, **parallel},
            "optim": {"decay": "none"},
            "train": {"steps": 1, "global_batch": micro_batches * self.micro_batch, "micro_batch": self.micro_batch},
            "data": {"source": "synthetic"},
        }  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "benchmark.yaml"
            path.write_text(yaml.safe_dump(tree))
            return load(str(path), self.overrides)

    def document(self) -> dict[str, Any]:
        """Return the settings for a JSON document."""
        return asdict(self)


def tokens_per_step(config: Config) -> int:
    """Return the tokens of a step over all ranks."""
    return config.train.global_batch * config.model.seq_len
