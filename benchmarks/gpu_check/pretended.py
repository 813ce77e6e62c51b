"""Run training steps on a fake ("pretended") device: no GPU, no data, about a second per configuration.

The real code of a rank runs on torch's fake tensors of a device called "gpu". Code that would wait for the device
raises there, and so does an operation that mixes CPU and device tensors. A dispatch mode counts the operations that
would be kernels, and the bytes they read and write. Attention is counted in its plain form (with the scores in memory),
which moves more bytes than a fused kernel; collectives move nothing.

    python3 -m benchmarks.gpu_check.pretended          a table of kernels and bytes by family, precision and stage
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu_check.cases import config_of, tiny
from dist_gpt.comm.mesh import FakeBackends
from dist_gpt.config.errors import ConfigError
from dist_gpt.config.schema import Config
from dist_gpt.replica import Rank

NAME = "gpu"
ROOT = Path(__file__).resolve().parents[2]
UNABLE = "this torch cannot provide a pretended device; version 2.11 or later can"
NO_KERNELS = {
    "aten._local_scalar_dense", "aten._unsafe_view", "aten.empty", "aten.empty_like", "aten.empty_strided",
    "aten.lift_fresh", "aten.new_empty", "aten.new_empty_strided", "aten.resize_", "prim.device",
}  # fmt: skip
"""Operations that start no kernel, besides views, which their schema identifies."""
WRITES_ONLY = {"aten.copy_", "aten.fill_", "aten.zero_"}
"""In-place operations that do not read the tensor they change."""


class NotPretended(RuntimeError):
    """Error of a torch version that cannot provide a fake device."""


@dataclass
class Found:
    """Counts and problems of some work as it would run on a GPU.

    `waits` and `mixed` are places in the code: where the host waits for the device, and where a CPU tensor is used with
    a device tensor. `finished` is False if the work could not continue without a value from the device.
    """

    kernels: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    copies_to_device: int = 0
    blocking_copies: int = 0
    copies_to_host: int = 0
    waits: list[str] = field(default_factory=list)
    mixed: list[str] = field(default_factory=list)
    finished: bool = True
    by_operation: Counter[str] = field(default_factory=Counter)

    @property
    def clean(self) -> bool:
        """True if the work finished without waits and without mixing devices."""
        return self.finished and not self.waits and not self.mixed

    def document(self) -> dict[str, Any]:
        """Return the findings as JSON data, without the counts by operation."""
        return {key: value for key, value in asdict(self).items() if key != "by_operation"}


@lru_cache(maxsize=1)
def pretended_device() -> tuple[torch.device, Any]:
    """Return the fake device and the mode of its tensors. It stays registered as long as this process runs."""
    try:
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.utils import backend_registration

        register = backend_registration._setup_privateuseone_for_python_backend
    except (ImportError, AttributeError) as error:
        raise NotPretended(UNABLE) from error
    register(NAME)
    return torch.device(NAME, 0), FakeTensorMode()


class Watch(TorchDispatchMode):
    """Mode that counts the operations inside it in `found`."""

    def __init__(self, found: Found) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        try:
            out = None if func in unknown_to_torch() else func(*args, **kwargs)
        except Exception as error:
            if (kind := _kind(error)) is not None:
                getattr(self.found, kind).append(f"{_place()}: {func}")
            raise
        self._count(func, args, kwargs, out)
        return out

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        name = func._overloadpacket._qualified_op_name.replace("::", ".")
        given, made = list(_tensors((args, kwargs))), list(_tensors(out))
        if not any(t.device.type == NAME for t in (*given, *made)):
            return
        if name in NO_KERNELS or _is_view(func):
            return
        self._note_copies(name, args, kwargs, given, made)
        changed = list(_changed(func, args, kwargs))
        kept = {id(t) for t in changed} if name in WRITES_ONLY or _has_out(func) else set()
        self.found.kernels += 1
        self.found.by_operation[name] += 1
        self.found.bytes_read += sum(_size(t) for t in given if id(t) not in kept)
        self.found.bytes_written += sum(_size(t) for t in (changed or made))

    def _note_copies(self, name: str, args: Any, kwargs: Any, given: list[Tensor], made: list[Tensor]) -> None:
        """Count copies between host and device; a blocking copy to the host is a wait."""
        if name not in ("aten._to_copy", "aten.copy_"):
            return
        source, target = (given[1], given[0]) if name == "aten.copy_" and len(given) > 1 else (given[0], made[0])
        if (source.device.type == NAME) == (target.device.type == NAME):
            return
        told = kwargs.get("non_blocking", args[2] if name == "aten.copy_" and len(args) > 2 else False)
        if target.device.type == NAME:
            self.found.copies_to_device += 1
            self.found.blocking_copies += not told
            return
        self.found.copies_to_host += 1
        if not told:
            self.found.waits.append(f"{_place()}: {name} to the host")


@lru_cache(maxsize=1)
def unknown_to_torch() -> tuple[Any, ...]:
    """Return operations that fake tensors do not support.

    They change their arguments and return nothing, so they are counted but not run.
    """
    return (torch.ops.aten._fused_sgd_.default, torch.ops.aten._fused_sgd_.tensor_lr)


def _kind(error: Exception) -> str | None:
    """Return the list of `Found` to which an exception of a fake tensor belongs; None for any other exception."""
    name = type(error).__name__
    if name in ("DataDependentOutputException", "DynamicOutputShapeException"):
        return "waits"
    if name == "FakeTensorDeviceMismatchError" or "FakeTensor Device Propagation" in str(error):
        return "mixed"
    return None


def _place() -> str:
    """Return the innermost running line of this repository outside this file."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if not path.is_relative_to(ROOT) or path == Path(__file__).resolve():
            continue
        if not {"site-packages", "dist-packages"} & set(path.parts):  # an environment may lie in the repository
            return f"{path.relative_to(ROOT).as_posix()}:{frame.lineno} ({frame.line})"
    return "outside this repository"


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))


def _changed(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """Yield the tensors that `func` writes in place."""
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from _tensors(kwargs.get(argument.name, args[index] if index < len(args) else None))


@lru_cache(maxsize=4096)
def _is_view(func: Any) -> bool:
    returns = [r.alias_info for r in func._schema.returns]
    return bool(returns) and all(alias is not None and not alias.is_write for alias in returns)


@lru_cache(maxsize=4096)
def _has_out(func: Any) -> bool:
    return any(argument.is_out for argument in func._schema.arguments)


def _size(tensor: Tensor) -> int:
    """Return the bytes of `tensor`, at most those of its storage, since an expanded tensor is read once."""
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())


def watch(work: Callable[[], object]) -> Found:
    """Do `work` on the fake device and return the findings. Exceptions not due to the device propagate."""
    found = Found()
    try:
        with Watch(found):
            work()
    except Exception as error:
        if _kind(error) is None:
            raise
        found.finished = False
    return found


def observe(config: Config, rank: int = 0, warm_up: bool = False) -> dict[str, Found]:
    """Return the findings of rank `rank` in one training `step`, one `evaluation` and a read of `statistics`.

    `warm_up`: train a step first, so that work that only the first step does is not counted.
    """
    device, mode = pretended_device()
    ids = np.zeros((config.train.micro_batch, config.model.seq_len + 1), dtype=np.int64)

    def samples(first: int, count: int) -> np.ndarray:
        return ids[:count]

    with mode:
        replica = Rank(config, rank, FakeBackends(), device)
        try:
            if warm_up:
                replica.train_step(0, samples)
            found = {"step": watch(lambda: replica.train_step(int(warm_up), samples))}
            if found["step"].finished:
                found["evaluation"] = watch(lambda: replica.evaluate([samples]))
                found["statistics"] = watch(replica.optimizer.statistics.tolist)
        finally:
            replica.close()
    return found


def ends(config: Config) -> list[int]:
    """Return the ranks worth checking: the first and, in a pipeline, the last."""
    return [0, config.world_size - 1] if config.parallel.pp > 1 else [0]


# --- the table ---------------------------------------------------------------------------------------------------

GPT2_SMALL = {"num_layers": 3, "hidden_size": 768, "num_heads": 12, "seq_len": 1024, "vocab_size": 50257}
MICRO_BATCHES = 4
Row = dict[str, Any]


def table_cases() -> Iterator[tuple[str, Config]]:
    """Yield the rows of the table: three layers of GPT-2's width, 4 micro-batches of 4 sequences, on 2 data ranks."""
    for family in ("gpt2", "llama"):
        for dtype, dropout, stage in (
            ("fp32", 0.0, "none"), ("bf16", 0.0, "none"), ("bf16", 0.0, "zero1"), ("bf16", 0.0, "zero2"),
            ("bf16", 0.0, "zero3"), ("fp16", 0.0, "zero1"), ("bf16", 0.1, "zero1"),
        ):  # fmt: skip
            train = {"global_batch": 2 * 4 * MICRO_BATCHES, "micro_batch": 4, "dtype": dtype}
            model = {**GPT2_SMALL, "dropout": dropout, "attention_dropout": 0.0}
            yield (
                f"{family} {dtype} {stage}" + (f" dropout {dropout}" if dropout else ""),
                config_of(family, model, train, {"dp": 2}, {"sharding": stage}),
            )


def table_rows(cases: Iterator[tuple[str, Config]] | Sequence[tuple[str, Config]]) -> Iterator[Row]:
    """Yield a row for each case, with the findings of its second step."""
    for name, config in cases:
        found = observe(config, warm_up=True)["step"]
        yield {"case": name, **found.document(), "most": dict(found.by_operation.most_common(6))}


def table(rows: Sequence[Row]) -> str:
    """Return the rows in aligned columns."""
    head = ("case", "kernels", "read, GB", "written, GB", "to device", "to host", "waits", "mixed")
    cells = [head]
    for r in rows:
        gigabytes = [f"{r[key] / 1e9:,.2f}" for key in ("bytes_read", "bytes_written")]
        counts = [str(r["copies_to_device"]), str(r["copies_to_host"]), str(len(r["waits"])), str(len(r["mixed"]))]
        cells.append((r["case"], f"{r['kernels']:,}", *gigabytes, *counts))
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = []
    for name, *numbers in cells:
        aligned = [number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *aligned]))
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Print the table. Return 1 if a step would wait for the device or mix devices, 2 if it cannot be made, else 0."""
    parser = argparse.ArgumentParser(
        prog="python3 -m benchmarks.gpu_check.pretended",
        description="Count the kernels and bytes of a training step on a pretended GPU.",
    )
    parser.add_argument("--tiny", action="store_true", help="use tiny models, one per family")
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")
    given = parser.parse_args(argv)
    cases = [(f"{family} tiny", tiny(family)) for family in ("gpt2", "llama")] if given.tiny else table_cases()
    try:
        rows = list(table_rows(cases))
    except (NotPretended, ConfigError) as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(rows) if given.json else table(rows))
    return 1 if any(row["waits"] or row["mixed"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
