"""Every sort of bad input, through `dist-gpt launch` with nothing replaced but the door to new processes.

Each is refused with exit code 2 and one message that says what was given, what is allowed and what to change; no
process is started, and no file is made or changed outside of the data cache.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_gpt import cli

TINY = """
name: tiny
model: {num_layers: 4, hidden_size: 32, num_heads: 4, seq_len: 32}
train: {steps: 2, global_batch: 8}
data: {source: text.txt}
"""
EVERY_AXIS = ["parallel.dp=auto", "parallel.tp=2", "parallel.pp=2"]
INTERLEAVED = ["parallel.schedule=interleaved", "parallel.virtual_stages=2", "parallel.pp=2"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a configuration and data of every sort. The cache lies elsewhere."""
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "tiny.yaml").write_text(TINY)
    (folder / "text.txt").write_text("a line of text\n" * 400)
    (folder / "short.txt").write_text("too short\n")
    (folder / "empty.txt").touch()
    (folder / "binary.txt").write_bytes(b"text\0and more" * 100)
    (folder / "latin1.txt").write_bytes("caf\u00e9 ".encode("latin-1") * 100)
    ids = np.arange(4000, dtype="<u2") % 250
    ids[1234] = 300
    (folder / "ids.bin").write_bytes(ids.tobytes())
    (folder / "wide.bin").write_bytes((np.arange(4000) % 250).astype("<u4").tobytes())
    (folder / "packed.bin").write_bytes(b"\x1f\x8b\x08\0" + ids.tobytes())
    (folder / "zeros.bin").write_bytes(bytes(8000))
    (folder / "odd.bin").write_bytes(bytes(8001))
    (folder / "no_text").mkdir()
    (folder / "occupied").mkdir()
    (folder / "occupied" / "metrics.jsonl").write_text("{}\n")
    (folder / "a_file").write_text("no run directory\n")
    (folder / "broken.yaml").write_text(TINY + "model: [\n")
    (folder / "twice.yaml").write_text(TINY + "train: {steps: 3, global_batch: 8}\n")
    (folder / "nothing.yaml").touch()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever starts a process fails the test."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        pytest.fail(f"a process was started: {args} {kwargs}")

    monkeypatch.setattr("launch.run.count_gpus", lambda: 0)  # it may ask nvidia-smi
    monkeypatch.setattr(subprocess, "Popen", refuse)


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file and folder, when it was changed and what it holds."""
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else b"")
        for p in sorted(folder.rglob("*"))
    }


def launch(here: Path, capsys: pytest.CaptureFixture[str], *argv: str, verb: str = "launch") -> str:
    """What `dist-gpt VERB ARGV` says on its way out with code 2, having changed nothing."""
    before = contents(here)
    with pytest.raises(SystemExit) as left:
        cli.main([verb, *argv])
    shown = capsys.readouterr()
    assert left.value.code == 2, shown
    assert contents(here) == before
    assert "Traceback" not in shown.err and "run_dir: " not in shown.out
    assert shown.err.startswith("dist-gpt: ")
    return shown.err


def sets(*pairs: str) -> list[str]:
    return [word for pair in pairs for word in ("--set", pair)]


CASES: dict[str, tuple[list[str], list[str]]] = {
    # what: (--set options, [what was given, what is allowed, what to change])
    "world_no_product_of_the_axes": (
        ["launch.ranks_per_node=6", *EVERY_AXIS],
        [r"world 6", r"parallel\.tp 2 x parallel\.pp 2", r"nearest worlds: 4 or 8"],
    ),
    "world_other_than_dp": (
        ["launch.ranks_per_node=6", "parallel.dp=2", "parallel.tp=2"],
        [r"world 6", r"parallel\.dp 2 x parallel\.tp 2", r"start 4 ranks, or set parallel\.dp to 3 or auto"],
    ),
    "heads_not_divisible_by_tp": (
        ["parallel.tp=3", "model.ffn_size=96"],
        [r"model\.num_heads 4 is not divisible by parallel\.tp 3", r"change tp to 2 or 4$"],
    ),
    "kv_heads_less_than_tp": (
        ["parallel.tp=4", "model.num_kv_heads=2"],
        [r"model\.num_kv_heads 2 is smaller than parallel\.tp 4", r"change tp to 2", r"num_kv_heads to 4"],
    ),
    "more_chunks_than_layers": (
        ["parallel.schedule=interleaved", "parallel.virtual_stages=3", "parallel.pp=2"],
        [r"parallel\.pp 2", r"parallel\.virtual_stages 3", r"model\.num_layers 4", r"num_layers to at least 6"],
    ),
    "more_stages_than_layers": (
        ["parallel.pp=8"],
        [r"parallel\.pp 8", r"model\.num_layers 4", r"at most 4"],
    ),
    "micro_batches_break_the_interleaved_rule": (
        [*INTERLEAVED, "train.global_batch=7"],
        [r"multiples of parallel\.pp 2", r"train\.global_batch 7", r"change global_batch to 6 or 8"],
    ),
    "batch_not_divisible": (
        ["parallel.dp=3"],
        [r"train\.global_batch 8", r"parallel\.dp 3", r"change"],
    ),
    "micro_batch_not_divisible": (
        ["train.micro_batch=3"],
        [r"train\.global_batch 8", r"train\.micro_batch 3", r"change"],
    ),
    "sequence_longer_than_the_data": (
        ["data.source=short.txt"],
        [r"train part of short\.txt has \d+ tokens", r"one sequence needs 33", r"lower model\.seq_len or use more"],
    ),
    "sequence_longer_than_the_validation_data": (
        ["train.eval_batches=1", "model.seq_len=1000"],
        [r"validation part of text\.txt has 300 tokens", r"needs 1001", r"raise data\.val_fraction"],
    ),
    "empty_text": (["data.source=empty.txt"], [r"empty\.txt is empty \(0 bytes\)", r"give a file with text"]),
    "binary_text": (["data.source=binary.txt"], [r"NUL byte at offset 4", r"convert it to UTF-8"]),
    "text_of_another_encoding": (["data.source=latin1.txt"], [r"not UTF-8 at byte 3 \(0xe9\)", r"convert it to UTF-8"]),
    "folder_without_text": (["data.source=no_text"], [r"no_text", r"allowed: stdlib, synthetic"]),
    "missing_data": (["data.source=missing.txt"], [r"'missing\.txt' does not exist", r"allowed: stdlib, synthetic"]),
    "wide_tokens": (
        ["data.source=wide.bin", "model.vocab_size=256"], [r"looks like 4-byte integers", r"set data\.dtype: uint32"],
    ),
    "tokens_of_a_large_vocabulary": (
        ["data.source=ids.bin", "model.vocab_size=100000"], [r"model\.vocab_size 100000", r"set data\.dtype: uint32"],
    ),
    "compressed_tokens": (
        ["data.source=packed.bin", "model.vocab_size=256"], [r"packed\.bin is a gzip file", r"decompress it first"],
    ),
    "zeros": (
        ["data.source=zeros.bin", "model.vocab_size=256"],
        [r"all 3,800 train tokens of zeros\.bin are the id 0", r"write it again"],
    ),
    "odd_length": (
        ["data.source=odd.bin", "model.vocab_size=256"], [r"8001 bytes, an odd number", r"truncated"],
    ),
    "dtype_of_text": (["data.dtype=uint32"], [r"dtype: uint32, but data\.source text\.txt", r"leave data\.dtype"]),
    "dtype_of_floats": (["data.dtype=float32"], [r"data\.dtype", r"float32", r"uint16"]),
    "unknown_order": (["data.order=shuffle"], [r"data\.order", r"shuffle", r"epochs", r"replacement"]),
    "unknown_key": (["train.stepz=3"], [r"train\.stepz", r"did you mean (train\.)?steps"]),
    "wrong_type": (["train.steps=many"], [r"train\.steps", r"many", r"integer|whole number"]),
    "number_as_text": (["optim.lr='fast'"], [r"optim\.lr", r"fast", r"number"]),
    "not_one_of_the_choices": (["optim.name=adam"], [r"optim\.name", r"adam\b", r"adamw"]),
    "out_of_range": (["train.steps=0"], [r"train\.steps", r"\b0\b", r"1"]),
    "not_in_this_version": (["parallel.cp=2"], [r"parallel\.cp: 2 is not supported in this version", r"allowed: 1"]),
    "existing_run_directory": (["run_dir=occupied"], [r"occupied already exists", r"--set run_dir=occupied-2"]),
    "run_directory_is_a_file": (["run_dir=a_file"], [r"a_file already exists", r"--set run_dir=a_file-2"]),
    "run_directory_below_a_file": (["run_dir=a_file/run"], [r"run_dir: cannot create a_file/run", r"Not a directory"]),
}  # fmt: skip


@pytest.mark.usefixtures("no_process")
class TestRefused:
    @pytest.mark.parametrize("name", CASES)
    def test_options(self, name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
        options, words = CASES[name]
        said = launch(here, capsys, "tiny.yaml", *sets(*options))
        for word in words:
            assert re.search(word, said), f"{word!r} is not in {said!r}"

    @pytest.mark.parametrize(
        ("file", "words"),
        [
            ("missing.yaml", [r"missing\.yaml: no such file and no preset", r"Presets: .*demo"]),
            ("broken.yaml", [r"broken\.yaml"]),
            ("twice.yaml", [r"twice\.yaml", r"train", r"twice|duplicate|already"]),
            ("nothing.yaml", [r"nothing\.yaml: is empty", r"expected sections: .*model"]),
        ],
    )
    def test_configuration_file(
        self, file: str, words: list[str], here: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        said = launch(here, capsys, file)
        for word in words:
            assert re.search(word, said), f"{word!r} is not in {said!r}"

    def test_token_outside_the_vocabulary_is_the_same_error_at_every_tp(
        self, here: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        said = [
            launch(here, capsys, "tiny.yaml", *sets("data.source=ids.bin", "model.vocab_size=256", f"parallel.tp={tp}"))
            for tp in (1, 2, 4)
        ]
        assert said[0] == (
            "dist-gpt: data.source: token id 300 at position 1234 of train is outside the vocabulary of 256 "
            "(model.vocab_size: ids 0 to 255); set model.vocab_size to at least 301, or use other data\n"
        )
        assert said[1] == said[0] == said[2]

    @pytest.mark.parametrize("pair", ["data.source=binary.txt", "run_dir=occupied", "train.stepz=3"])
    def test_train_without_a_launcher(
        self, pair: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """As one process or as torchrun's rank 0: no run directory is left that the next try would stumble over."""
        for name in ("RANK", "WORLD_SIZE", "DIST_GPT_RUN_DIR", "DIST_GPT_ERROR_FILE"):
            monkeypatch.delenv(name, raising=False)
        launch(here, capsys, "tiny.yaml", *sets(pair), verb="train")

    def test_the_door_is_watched(self, here: Path) -> None:
        """Good input gets as far as the first process, and then the run directory exists."""
        with pytest.raises(pytest.fail.Exception, match="a process was started"):
            cli.main(["launch", "tiny.yaml"])
        assert (here / "runs" / "tiny" / "plan.json").is_file()

    def test_all_at_once(self, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
        said = launch(
            here, capsys, "tiny.yaml",
            *sets("train.stepz=3", "optim.lr=fast", "parallel.tp=3", "train.global_batch=7", "parallel.dp=2"),
        )  # fmt: skip
        for word in ("train.stepz", "optim.lr", "model.num_heads 4", "train.global_batch 7"):
            assert word in said
