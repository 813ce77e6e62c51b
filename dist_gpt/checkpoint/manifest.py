"""Names of checkpoint folders, and content of their manifests. Torch-free.

    RUN_DIR/checkpoints/step_00000010/manifest.json, rank00000.safetensors, rank00001.safetensors, ...

A folder of that name exists only when all of it was written (`store` renames it into place); a folder whose name
begins with a dot is unfinished. See docs/checkpoints.md.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dist_gpt.config.schema import Config
from dist_gpt.plan.precision import shard_ranks

SCHEMA = 1
MANIFEST = "manifest.json"
TRAIN_KEYS = ("global_batch", "micro_batch", "seed", "dtype")
"""Keys of `train` that must be equal in a resumed run; it may train longer and validate more often."""
SHARDS = "shard_ranks"
"""Key added to `optim` if state is sharded inside nodes: the number of data ranks that share it (by launch.nodes)."""
ORDER, OLD_ORDER = "data.order", "replacement"
"""Key of the order of batches, and its value in older checkpoints, which do not name it."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


class BrokenError(Exception):
    """Error of a checkpoint that is not whole; the sentence names the file."""


@dataclass(frozen=True)
class File:
    """One rank's file: name, size in bytes and hash."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Content of manifest.json.

    `config` is what a resumed run must share; `files` are in the order of ranks; `steps` is the run's train.steps,
    which may change (None in older checkpoints).
    """

    step: int
    world: int
    layout: dict[str, int]
    config: dict[str, Any]
    files: tuple[File, ...]
    trainer: dict[str, int]
    steps: int | None = None

    def text(self) -> str:
        """Return the text of the file."""
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1) + "\n"


def folder_name(step: int) -> str:
    """Return the name of a checkpoint's folder, such as step_00000010."""
    return f"step_{step:08d}"


def file_name(rank: int) -> str:
    """Return the name of a rank's file, such as rank00003.safetensors."""
    return f"rank{rank:05d}.safetensors"


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a checkpoint; raise BrokenError if it is missing or not valid."""
    path = folder / MANIFEST
    try:
        tree = json.loads(path.read_bytes())
        if tree["schema"] != SCHEMA:
            raise BrokenError(f"{path}: schema {tree['schema']}, this version reads {SCHEMA}")
        files = tuple(File(str(f["name"]), int(f["bytes"]), str(f["sha256"])) for f in tree["files"])
        manifest = Manifest(
            int(tree["step"]), int(tree["world"]), dict(tree["layout"]), dict(tree["config"]), files,
            {key: int(value) for key, value in tree["trainer"].items()},
            int(tree["steps"]) if tree.get("steps") is not None else None,
        )  # fmt: skip
    except FileNotFoundError:
        raise BrokenError(f"{path}: no such file") from None
    except OSError as error:
        raise BrokenError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BrokenError(f"{path}: not a checkpoint manifest ({type(error).__name__}: {error})") from None
    if [f.name for f in files] != [file_name(rank) for rank in range(manifest.world)]:
        raise BrokenError(f"{path}: does not name one file for each of {manifest.world} ranks")
    if manifest.step < 0 or any(f.bytes < 0 or not _SHA256.fullmatch(f.sha256) for f in files):
        raise BrokenError(f"{path}: its step, sizes or hashes are not valid")
    return manifest


def refuse_cut(folder: Path) -> None:
    """Raise BrokenError if a checkpoint lacks a file or part of one. Hashes are compared when it is loaded."""
    for file in read_manifest(folder).files:
        path = folder / file.name
        if not path.is_file():
            raise BrokenError(f"{path} is missing")
        if path.stat().st_size != file.bytes:
            raise BrokenError(f"{path} has {path.stat().st_size} bytes, {file.bytes} were written")


def shared_config(config: Config, data: str | None = None) -> dict[str, Any]:
    """Return what must be equal in the run that saves and the one that resumes; `data` is the digest of the tokens."""
    tree = config.model_dump(mode="json")
    found = {section: tree[section] for section in ("model", "parallel", "optim")}
    if config.optim.shard_group == "node":
        found["optim"] = {**tree["optim"], SHARDS: shard_ranks(config)}
    found["train"] = {key: tree["train"][key] for key in TRAIN_KEYS}
    found["data"] = {key: tree["data"][key] for key in ("seed", "order")}
    if data is not None:
        found["data"]["tokens"] = data
    return found


def differences(manifest: Manifest, ours: dict[str, Any], where: Path) -> list[str]:
    """Return a sentence for each key that keeps a run of `ours` from resuming from this checkpoint."""
    theirs, mine = {ORDER: OLD_ORDER, **_flat(manifest.config)}, _flat(ours)
    return [
        f"{key}: the checkpoint {where} has {_shown(theirs, key)}, this run has {_shown(mine, key)}; resume with "
        f"{_remedy(key, theirs)}, or start another run"
        for key in sorted(set(theirs) | set(mine))
        if theirs.get(key, _shown) != mine.get(key, _shown) and not _unknown(key, theirs, mine)
    ]


def _remedy(key: str, theirs: dict[str, Any]) -> str:
    """Return the setting to resume with, in words."""
    if key == ORDER:
        return f"{ORDER}={theirs[key]}"
    return f"the same {'launch.nodes' if key == f'optim.{SHARDS}' else 'value'}"


def _unknown(key: str, theirs: dict[str, Any], mine: dict[str, Any]) -> bool:
    """Return whether one side cannot know the value of `key`.

    Tokens are hashed only when the ranks have met; older checkpoints lack data.seed and optim.shard_ranks.
    """
    if key == f"optim.{SHARDS}":
        return key not in theirs or key not in mine
    return (key == "data.tokens" and key not in mine) or (key == "data.seed" and key not in theirs)


def schedule_note(manifest: Manifest, config: Config) -> list[str]:
    """Return a sentence if the learning rate is not what it would have been in the run that saved, else nothing."""
    theirs, ours, decay = manifest.steps, config.train.steps, config.optim.decay
    if theirs is None or theirs == ours or decay == "none":
        return []
    return [
        f"train.steps: the checkpoint's run had {theirs}, this one has {ours}; optim.decay {decay} ends at the last "
        f"step, so from step {manifest.step + 1} on the learning rate is different"
    ]


def _flat(tree: dict[str, Any], before: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{before}{key}.")
        else:
            flat[f"{before}{key}"] = value
    return flat


def _shown(tree: dict[str, Any], key: str) -> str:
    return json.dumps(tree[key])[:100] if key in tree else "no such key"
