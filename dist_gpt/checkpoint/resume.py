"""What `--resume` means. Torch-free.

auto: the newest whole checkpoint of the run directory, else what RUN_DIR/resume_from names, else the beginning.
PATH: where the run branches from. Whoever makes the run directory notes it there (resume_from), and from then on auto
means all of it: restarts, requeued jobs and the next `--resume auto` never go back behind what the run has saved since.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from dist_gpt.checkpoint.manifest import MANIFEST, BrokenError, differences, read_manifest, refuse_cut, shared_config
from dist_gpt.config.errors import ConfigError
from dist_gpt.config.load import config_hash, load
from dist_gpt.config.schema import Config
from dist_gpt.rundir import (
    CHECKPOINTS,
    RESUME_FROM,
    Resume,
    branch_of,
    committed,
    ended,
    has_trained,
    later,
    step_of,
)

AUTO = "auto"


def resolve(resume: str | None, run_dir: Path, config: Config, again: bool = False) -> Resume:
    """What `--resume` asks for; `again`: torchrun has started its ranks again, so the first start has done most of it.

    Raises ConfigError, before any rank starts or anything is changed, where the checkpoint is not there, is cut, or is
    of another model, layout or optimizer.
    """
    if resume is None and not again:
        return Resume(False)
    path = None if resume in (None, AUTO) else Path(os.path.abspath(Path(str(resume)).expanduser()))
    if path is not None and (path.resolve() == run_dir.resolve() or (again and branch_of(run_dir) == path)):
        path = None
    refuse_other_config(AUTO if path is None else str(path), run_dir, config)
    if path is None:
        if not again:
            _refuse_what_would_be_lost(run_dir, config)
        return Resume(True)
    if not _own(path, run_dir):
        return Resume(again, path)
    return Resume(True, path, tuple(later(run_dir / CHECKPOINTS, read_manifest(path).step, path)))


@dataclass(frozen=True)
class Finished:
    """A run with nothing left to train."""

    step: int
    code: int
    """What its last attempt left with; 0 where it left no word."""
    why: str


def finished(run_dir: Path, config: Config) -> Finished | None:
    """Whether `--resume auto` would train nothing: the newest checkpoint is of the last step, or the last attempt did
    all of it, of the same configuration, and saved nothing. Raises ConfigError as `resolve` does."""
    own = [path for path in committed(run_dir / CHECKPOINTS) if not _is_cut(path)]
    branch, last = branch_of(run_dir), ended(run_dir)
    if branch is not None and _own(branch, run_dir):
        return None  # it went back, and ranks decide from where it goes on
    step, code = step_of(own[0]) if own else -1, last.get("code")
    if not own and code == 0 and isinstance(last.get("step"), int) and _same_config(run_dir, config):
        step = last["step"]
    if step < config.train.steps:
        return None
    refuse_other_config(AUTO, run_dir, config)
    if code in (0, None) or last.get("step") != step:
        return Finished(step, 0, "")
    return Finished(step, int(code), str(last.get("why") or ""))


def _is_cut(folder: Path) -> bool:
    try:
        refuse_cut(folder)
    except BrokenError:
        return True
    return False


def _refuse_what_would_be_lost(run_dir: Path, config: Config) -> None:
    """Raise ConfigError where nothing was saved and beginning again would write over what is not this run's earlier
    attempt: steps of another configuration, or a run that came to its end."""
    branch = branch_of(run_dir)
    if committed(run_dir / CHECKPOINTS) or (branch is not None and _own(branch, run_dir)) or not has_trained(run_dir):
        return
    if not _same_config(run_dir, config):
        what = "what it has trained is of another configuration"
    elif ended(run_dir).get("code") == 0:
        what = "it has come to its end"
    else:
        return
    raise ConfigError([
        f"--resume auto: {run_dir} has no checkpoint to go on from, and {what}; it is never written over. Choose "
        "another name or --set run_dir=..., or remove it (checkpoint.every makes checkpoints)"
    ])  # fmt: skip


def _same_config(run_dir: Path, config: Config) -> bool:
    try:
        return config_hash(load(str(run_dir / "config.yaml"))) == config_hash(config)
    except ConfigError:  # not there, or of a version that this one does not read
        return False


def _own(path: Path, run_dir: Path) -> bool:
    """Whether `path` is a checkpoint of this run directory."""
    return path.resolve().parent == (run_dir / CHECKPOINTS).resolve()


def candidates(resume: str, run_dir: Path) -> tuple[list[Path], bool]:
    """The checkpoints that `--resume` means for a run in `run_dir`, the first choice first, and whether a broken one
    is passed over for the next. None: auto, and there is none yet. Raises ConfigError for a path of nothing."""
    if resume != AUTO:
        return _at(Path(resume).expanduser(), f"--resume {resume}")
    found, branch = committed(run_dir / CHECKPOINTS), branch_of(run_dir)
    if branch is None:
        return found, True
    if not _own(branch, run_dir):
        if not found:
            return _at(branch, f"{run_dir / RESUME_FROM} names {branch}")
        return [*found, *_readable(branch)], True
    try:
        step = read_manifest(branch).step
    except BrokenError:  # removed since, with its successors there
        step = step_of(branch)
    if branch.is_dir() and not later(run_dir / CHECKPOINTS, step, branch):
        return [branch], False
    return found, True


def _readable(branch: Path) -> list[Path]:
    """The checkpoints of a branch that may be gone by now."""
    try:
        return _at(branch, "")[0]
    except ConfigError:
        return []


def _at(folder: Path, said: str) -> tuple[list[Path], bool]:
    if (folder / MANIFEST).is_file() or (folder.is_dir() and step_of(folder) >= 0):
        return [folder], False
    if found := committed(folder / CHECKPOINTS):
        return found, True
    raise ConfigError([
        f"{said}: neither a checkpoint (a folder with {MANIFEST}) nor a run directory with {CHECKPOINTS}/step_*; "
        "expected auto or such a path"
    ])  # fmt: skip


def refuse_other_config(resume: str, run_dir: Path, config: Config) -> None:
    """Raise ConfigError when what `--resume` means is not there, or is of another model, layout or optimizer. A broken
    checkpoint is passed over where another may be taken for it."""
    folders, falls_back = candidates(resume, run_dir)
    for folder in folders:
        try:
            refuse_cut(folder)
        except BrokenError as error:
            if not falls_back:
                raise ConfigError([f"--resume {resume}: the checkpoint is broken: {error}"]) from None
            continue
        if found := differences(read_manifest(folder), shared_config(config), folder):
            raise ConfigError(found)
        return
