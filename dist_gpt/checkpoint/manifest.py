"""What a checkpoint folder is called, and what its manifest says. Torch-free.

    RUN_DIR/checkpoints/step_00000010/manifest.json, rank00000.safetensors, rank00001.safetensors, ...

A folder of that name is there only when all of it was written (`store` renames it into place); a folder whose name
begins with a dot is unfinished. See docs/checkpoints.md.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dist_gpt.config.errors import ConfigError
from dist_gpt.config.schema import Config

SCHEMA = 1
AUTO = "auto"
FOLDER, MANIFEST = "checkpoints", "manifest.json"
TRAIN_KEYS = ("global_batch", "micro_batch", "seed", "dtype")
"""Keys of `train` that a resumed run must share; it may train longer, and validate more often."""
_STEP = re.compile(r"step_(\d{8,12})")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class BrokenError(Exception):
    """A checkpoint that is not whole; the sentence names the file."""


@dataclass(frozen=True)
class File:
    """One rank's file."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """manifest.json. `config` is what a run that resumes must share; `files` are in the order of ranks."""

    step: int
    world: int
    layout: dict[str, int]
    config: dict[str, Any]
    files: tuple[File, ...]
    trainer: dict[str, int]

    def text(self) -> str:
        """The file's text."""
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1) + "\n"


def folder_name(step: int) -> str:
    """step_00000010."""
    return f"step_{step:08d}"


def file_name(rank: int) -> str:
    """rank00003.safetensors."""
    return f"rank{rank:05d}.safetensors"


def committed(folder: Path) -> list[Path]:
    """Checkpoint folders below `folder`, the newest first; none where there is no such folder."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _STEP.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True) if path.is_dir()]


def step_of(folder: Path) -> int:
    """The step that a folder's name says."""
    match = _STEP.fullmatch(folder.name)
    return int(match[1]) if match else -1


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint. Raises BrokenError."""
    path = folder / MANIFEST
    try:
        tree = json.loads(path.read_bytes())
        if tree["schema"] != SCHEMA:
            raise BrokenError(f"{path}: schema {tree['schema']}, this version reads {SCHEMA}")
        files = tuple(File(str(f["name"]), int(f["bytes"]), str(f["sha256"])) for f in tree["files"])
        manifest = Manifest(
            int(tree["step"]), int(tree["world"]), dict(tree["layout"]), dict(tree["config"]), files,
            {key: int(value) for key, value in tree["trainer"].items()},
        )  # fmt: skip
    except FileNotFoundError:
        raise BrokenError(f"{path}: no such file") from None
    except OSError as error:
        raise BrokenError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BrokenError(f"{path}: no manifest of a checkpoint ({type(error).__name__}: {error})") from None
    if [f.name for f in files] != [file_name(rank) for rank in range(manifest.world)]:
        raise BrokenError(f"{path}: does not name one file for each of {manifest.world} ranks")
    if manifest.step < 0 or any(f.bytes < 0 or not _SHA256.fullmatch(f.sha256) for f in files):
        raise BrokenError(f"{path}: step, sizes or hashes are none")
    return manifest


def shared_config(config: Config, data: str | None = None) -> dict[str, Any]:
    """What must be equal in the run that saves and the one that resumes; `data` is the digest of the tokens."""
    tree = config.model_dump(mode="json")
    found = {section: tree[section] for section in ("model", "parallel", "optim")}
    found["train"] = {key: tree["train"][key] for key in TRAIN_KEYS}
    if data is not None:
        found["data"] = {"tokens": data}
    return found


def differences(manifest: Manifest, ours: dict[str, Any], where: Path) -> list[str]:
    """A sentence for each key that keeps a run of `ours` from going on from this checkpoint."""
    theirs, mine = _flat(manifest.config), _flat(ours)
    return [
        f"{key}: the checkpoint {where} has {_shown(theirs, key)}, this run has {_shown(mine, key)}; resume with the "
        "same value, or start another run"
        for key in sorted(set(theirs) | set(mine))
        if theirs.get(key, _shown) != mine.get(key, _shown) and not (key == "data.tokens" and key not in mine)
    ]


def candidates(resume: str, run_dir: Path) -> tuple[list[Path], bool]:
    """The checkpoints that `--resume` means for a run in `run_dir`, the first choice first, and whether a broken one
    is passed over for the next. None: auto, and there is none yet. Raises ConfigError for a path of nothing."""
    if resume == AUTO:
        return committed(run_dir / FOLDER), True
    folder = Path(resume).expanduser()
    if (folder / MANIFEST).is_file() or (folder.is_dir() and step_of(folder) >= 0):
        return [folder], False
    if found := committed(folder / FOLDER):
        return found, True
    raise ConfigError([
        f"--resume {resume}: neither a checkpoint (a folder with {MANIFEST}) nor a run directory with {FOLDER}/step_*; "
        "expected auto or such a path"
    ])  # fmt: skip


def refuse_other_config(resume: str, run_dir: Path, config: Config) -> None:
    """Raise ConfigError when what `--resume` means is not there, or is of another model, layout or optimizer; before
    any rank starts or anything is changed in the run directory. Whether files are whole is seen on loading."""
    for folder in candidates(resume, run_dir)[0]:
        try:
            manifest = read_manifest(folder)
        except BrokenError:
            continue
        if found := differences(manifest, shared_config(config), folder):
            raise ConfigError(found)
        return


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
