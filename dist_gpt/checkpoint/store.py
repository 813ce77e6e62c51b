"""Writing and reading of checkpoints by all ranks together, which talk over the store (control traffic).

    saved = checkpoints.save(step, tensors, {"skipped": 0})
    loaded = checkpoints.load("auto")           # None if there is no checkpoint yet

A checkpoint is written to a folder beside its place, each file is flushed to disk, and the folder is renamed when all
of it is there: a crash at any moment leaves earlier checkpoints unchanged. What is read is compared with the hashes
that were taken of the memory before writing.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load as tensors_of_bytes
from safetensors.torch import save as bytes_of_tensors
from torch import Tensor

from dist_gpt.checkpoint.manifest import (
    MANIFEST,
    BrokenError,
    File,
    Manifest,
    differences,
    file_name,
    folder_name,
    read_manifest,
    schedule_note,
    shared_config,
)  # fmt: skip
from dist_gpt.checkpoint.resume import candidates
from dist_gpt.comm.rendezvous import READ_S, RankEnv, Store, scoped, wait_for
from dist_gpt.config.errors import ConfigError
from dist_gpt.config.schema import Config
from dist_gpt.plan.steps import layout_of
from dist_gpt.rundir import CHECKPOINTS, committed, later, set_aside

PATIENCE_S = 1800.0  # for the slowest rank: the launcher notices much earlier when a rank is gone
VISIBLE_S = 10.0  # for a network file system to show rank 0 what another node has written


class CheckpointError(RuntimeError):
    """Error of a checkpoint that could not be written; earlier ones are unchanged."""


@dataclass(frozen=True)
class Saved:
    """Committed checkpoint, with the bytes of all ranks. `notes` are sentences on what else went wrong."""

    path: Path
    bytes: int
    seconds: float
    notes: list[str]


@dataclass(frozen=True)
class Loaded:
    """One rank's part of a checkpoint. `notes` are sentences, such as on newer checkpoints that are broken."""

    step: int
    path: Path
    tensors: dict[str, Tensor]
    trainer: dict[str, int]
    notes: list[str] = field(default_factory=list)


Word = dict[str, Any]


class Checkpoints:
    """Checkpoints of the run in `run_dir`; `data` is the digest of its tokens. All ranks call `save` and `load`."""

    def __init__(self, config: Config, run_dir: Path, data: str, store: Store, env: RankEnv) -> None:
        self.config, self.env = config, env
        self.folder = run_dir / CHECKPOINTS
        self.shared = shared_config(config, data)
        self.store = scoped(store, "checkpoints")
        self.at: Callable[[str], object] = lambda point: None  # tests crash a rank here

    # --- save --------------------------------------------------------------------------------------------------

    def save(self, step: int, tensors: Mapping[str, Tensor], trainer: Mapping[str, int]) -> Saved:
        """Write and commit a checkpoint, all ranks together.

        Raises CheckpointError, on every rank, with the path, the rank and the system's error.
        """
        started = time.perf_counter()
        scope = scoped(self.store, f"save/{step}")
        begun = self._from_rank_0(scope, "begin", lambda: self._begin(step), PATIENCE_S)
        if "error" not in begun:
            beside = self.folder / begun["folder"]
            scope.set(f"file/{self.env.rank}", json.dumps(self._attempt(lambda: self._write(beside, tensors))))
            begun = self._from_rank_0(scope, "end", lambda: self._commit(scope, step, beside, trainer), 2 * PATIENCE_S)
        if "error" in begun:
            self._stay_until_read(scope, "read")
            raise CheckpointError(f"checkpoint of step {step}: {begun['error']}")
        path = self.folder / folder_name(step)
        return Saved(path, begun["bytes"], time.perf_counter() - started, begun["notes"])

    def _begin(self, step: int) -> Word:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._remove_unfinished()
        beside = self.folder / f".{folder_name(step)}.tmp-{secrets.token_hex(4)}"
        beside.mkdir()
        return {"folder": beside.name}

    def _write(self, folder: Path, tensors: Mapping[str, Tensor]) -> Word:
        """Write this rank's file and flush it to disk; return its entry of the manifest."""
        data = bytes_of_tensors({name: t.detach().cpu().contiguous() for name, t in tensors.items()})
        name = file_name(self.env.rank)
        folder.mkdir(exist_ok=True)  # rank 0 made it: another node may not see that yet
        self.at("write")
        _write_synced(folder / name, data)
        self.at("written")
        return {"name": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    def _commit(self, scope: Store, step: int, beside: Path, trainer: Mapping[str, int]) -> Word:
        """Write the manifest and rename the folder, on rank 0, once every rank's file is there; else remove it all."""
        try:
            words = self._words(scope, "file", "write a checkpoint file")
            errors = [word["error"] for word in words if "error" in word]
            if errors:
                raise CheckpointError("; ".join(errors[:3]))
            files = tuple(File(**word) for word in words)
            self._see(beside, files)
            layout = layout_of(self.config)
            degrees = {"pp": layout.pp, "dp": layout.dp, "cp": layout.cp, "tp": layout.tp}
            steps = self.config.train.steps
            manifest = Manifest(step, self.env.world, degrees, self.shared, files, dict(trainer), steps)
            self.at("manifest")
            _write_synced(beside / MANIFEST, manifest.text().encode())
            _sync_folder(beside)
            self.at("rename")
            place = self.folder / folder_name(step)
            if os.path.lexists(place):
                set_aside(place)
            os.rename(beside, place)
        except Exception:
            shutil.rmtree(beside, ignore_errors=True)
            raise
        _sync_folder(self.folder)
        self.at("committed")
        return {"bytes": sum(f.bytes for f in files), "notes": self._remove_old()}

    def _see(self, folder: Path, files: tuple[File, ...]) -> None:
        """Wait until rank 0 sees the files that the ranks wrote; raise CheckpointError after VISIBLE_S."""
        deadline = time.monotonic() + VISIBLE_S
        for rank, file in enumerate(files):
            path = folder / file.name
            while not path.is_file() or path.stat().st_size != file.bytes:
                if time.monotonic() > deadline:
                    raise CheckpointError(
                        f"rank {rank} has written {path}, but rank 0 does not see it: run_dir must lie on a file "
                        "system that all nodes share"
                    )
                time.sleep(0.1)

    def _remove_unfinished(self) -> None:
        for path in self.folder.glob(".step_*.tmp-*"):
            shutil.rmtree(path, ignore_errors=True)

    def _remove_old(self) -> list[str]:
        """Remove all but the newest `checkpoint.keep`; each is renamed first, so that it is never half there."""
        notes = []
        for path in committed(self.folder)[self.config.checkpoint.keep :]:
            gone = self.folder / f".{path.name}.tmp-{secrets.token_hex(4)}"
            try:
                os.rename(path, gone)
                shutil.rmtree(gone)
            except OSError as error:  # the new one is safe: continue
                notes.append(f"could not remove the old checkpoint {path}: {error.strerror}")
        return notes

    # --- load --------------------------------------------------------------------------------------------------

    def load(self, resume: str) -> Loaded | None:
        """Load this rank's part of a checkpoint; all ranks call this together and load the same one.

        It is the newest whole one if `resume` is auto or a run directory, or exactly the one whose folder `resume` is.
        Returns None with auto if there is none yet and the run branches from none (`resume.candidates`).

        Raises ConfigError on all ranks if the one asked for is broken, none is whole, or it is of another model,
        layout, optimizer or data.
        """
        scope = scoped(self.store, "load")
        choice = self._from_rank_0(scope, "candidates", lambda: self._candidates(resume), PATIENCE_S)
        self._refuse(scope, choice)
        notes: list[str] = []
        for number, name in enumerate(choice["candidates"]):
            folder = Path(name)
            found = self._read(scoped(scope, str(number)), folder)
            if isinstance(found, Loaded):
                moved = self._from_rank_0(scope, "newer", partial(self._set_newer_aside, found), PATIENCE_S)
                self._refuse(scope, moved)
                found.notes[:0] = notes + moved["notes"]
                return found
            notes.append(f"checkpoint {folder} is broken and skipped: {found}")
        if notes:
            only_one = len(notes) == 1 and not choice["falls_back"]
            what = "the checkpoint is broken" if only_one else "no checkpoint is intact"
            raise self._last_word(scope, [f"--resume {resume}: {what}. {'; '.join(notes)}"])
        return None

    def _candidates(self, resume: str) -> Word:
        """Return the folders to try, in order, on rank 0."""
        try:
            found, falls_back = candidates(resume, self.folder.parent)
        except ConfigError as error:
            return {"refused": error.problems}
        return {"candidates": [str(path) for path in found], "falls_back": falls_back}

    def _read(self, scope: Store, folder: Path) -> Loaded | str:
        """Return the checkpoint or why it is broken, in the same way on all ranks."""
        word = self._from_rank_0(scope, "manifest", lambda: self._look(folder), PATIENCE_S)
        self._refuse(scope, word)
        if "broken" in word:
            return str(word["broken"])
        file = File(**word["files"][self.env.rank])
        data, why = _read_whole(folder / file.name, file)
        scope.set(f"file/{self.env.rank}", json.dumps({"broken": why} if why else {}))
        verdict = self._from_rank_0(scope, "verdict", lambda: self._judge(scope), 2 * PATIENCE_S)
        self._refuse(scope, verdict)
        if verdict["broken"]:
            return "; ".join(verdict["broken"][:3])
        return Loaded(word["step"], folder, tensors_of_bytes(data), word["trainer"], word["notes"])

    def _look(self, folder: Path) -> Word:
        """Return, on rank 0, what the manifest says, or why it cannot be used."""
        try:
            manifest = read_manifest(folder)
        except BrokenError as error:
            return {"broken": str(error)}
        if found := differences(manifest, self.shared, folder):
            return {"refused": found}
        files = [vars(file) for file in manifest.files]
        notes = schedule_note(manifest, self.config)
        return {"files": files, "step": manifest.step, "trainer": manifest.trainer, "notes": notes}

    def _judge(self, scope: Store) -> Word:
        words = self._words(scope, "file", "read a checkpoint file")
        return {"broken": [word["broken"] for word in words if "broken" in word]}

    def _set_newer_aside(self, loaded: Loaded) -> Word:
        """Rename, on rank 0, this run directory's checkpoints of later steps: the run resumes from `loaded`."""
        notes = [
            f"{path} is of a later step: moved to {set_aside(path).name}"
            for path in later(self.folder, loaded.step, loaded.path)
        ]
        return {"notes": notes}

    # --- words -------------------------------------------------------------------------------------------------

    def _from_rank_0(self, scope: Store, key: str, action: Callable[[], Word], timeout_s: float) -> Word:
        """Run `action` on rank 0 and return its word on all ranks."""
        if self.env.rank == 0:
            word = self._attempt(action)
            scope.set(key, json.dumps(word))
            return word
        wait_for(scope, self.env, {0: key}, f"send {key!r} for the checkpoint", timeout_s)
        answer: Word = json.loads(scope.get(key))
        return answer

    def _attempt(self, action: Callable[[], Word]) -> Word:
        """Return the word of `action`, or {"error": sentence} if it raised: the other ranks must learn of it."""
        try:
            return action()
        except OSError as error:
            what = f"{error.filename or self.folder}: {error.strerror} (errno {error.errno})"
            return {"error": f"rank {self.env.rank} on {socket.gethostname()}, {what}"}
        except CheckpointError as error:
            return {"error": str(error)}
        except Exception as error:
            return {"error": f"rank {self.env.rank} on {socket.gethostname()}, {type(error).__name__}: {error}"}

    def _words(self, scope: Store, key: str, purpose: str) -> list[Word]:
        """Wait until every rank has set its word under `key`; return all words, in the order of ranks."""
        keys = {rank: f"{key}/{rank}" for rank in range(self.env.world)}
        wait_for(scope, self.env, keys, purpose, PATIENCE_S)
        return [json.loads(scope.get(name)) for name in keys.values()]

    def _refuse(self, scope: Store, word: Word) -> None:
        """Raise ConfigError if the word of rank 0 is a refusal or an error."""
        if "refused" in word or "error" in word:
            raise self._last_word(scope, word.get("refused") or [word["error"]])

    def _last_word(self, scope: Store, problems: list[str]) -> ConfigError:
        self._stay_until_read(scope, "refused")
        return ConfigError(problems)

    def _stay_until_read(self, scope: Store, key: str) -> None:
        """Keep rank 0, which may host the store, until the other ranks have read the reason, READ_S at most."""
        with suppress(Exception):  # what is raised next matters more
            scope.set(f"{key}/{self.env.rank}", "")
            if self.env.rank == 0:
                scope.wait([f"{key}/{rank}" for rank in range(self.env.world)], timedelta(seconds=READ_S))


def _read_whole(path: Path, file: File) -> tuple[bytes, str]:
    """Return the bytes of a file, and what is wrong with them; that is empty if nothing is."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return b"", f"{path} is missing"
    except OSError as error:
        return b"", f"{path} cannot be read ({error.strerror})"
    if len(data) != file.bytes:
        return b"", f"{path} has {len(data)} bytes, {file.bytes} were written"
    if hashlib.sha256(data).hexdigest() != file.sha256:
        return b"", f"{path} is not what was written (sha256 differs)"
    return data, ""


def _write_synced(path: Path, data: bytes) -> None:
    """Write a new file and flush it to disk; an error names the file."""
    try:
        with open(path, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # write and fsync do not say which file


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
