"""Meaning of `--resume`. Torch-free.

auto: the newest whole checkpoint of the run directory, else what RUN_DIR/resume_from names, else the beginning.
PATH: where the run branches from. The process that makes the run directory notes it there (resume_from), so that auto
is enough from then on: restarts, requeued jobs and `--resume auto` never go back behind what the run has saved since.
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
    """Return what `--resume` asks for; `again`: torchrun has restarted its ranks, and the first start did most of it.

    Raises ConfigError, before any rank starts or anything is changed, if the checkpoint is missing, cut, or of another
    model, layout or optimizer, or if starting over would overwrite another configuration's steps or a finished run.
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
    """Run with nothing left to train."""

    step: int
    code: int
    """Exit code of its last attempt; 0 if none is noted."""
    why: str


def finished(run_dir: Path, config: Config) -> Finished | None:
    """Return how the run ended if `--resume auto` would train nothing, else None. Raises ConfigError as `resolve` does.

    Either the newest checkpoint is of the last step, or the last attempt, of the same configuration, completed all
    steps and saved nothing.
    """
    own = [path for path in committed(run_dir / CHECKPOINTS) if not _is_cut(path)]
    branch, last = branch_of(run_dir), ended(run_dir)
    if branch is not None and _own(branch, run_dir):
        return None  # the run went back, and the ranks decide where it resumes
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
    """Raise ConfigError if nothing was saved and starting over would overwrite more than an unfinished attempt.

    That is, the steps are of another configuration, or the run came to its end.
    """
    branch = branch_of(run_dir)
    if committed(run_dir / CHECKPOINTS) or (branch is not None and _own(branch, run_dir)) or not has_trained(run_dir):
        return
    if not _same_config(run_dir, config):
        what = "its steps are of another configuration"
    elif ended(run_dir).get("code") == 0:
        what = "its training is finished"
    else:
        return
    raise ConfigError([
        f"--resume auto: {run_dir} has no checkpoint to resume from, and {what}; it is never overwritten. Choose "
        "another name or --set run_dir=..., or remove it (set checkpoint.every to save checkpoints)"
    ])  # fmt: skip


def _same_config(run_dir: Path, config: Config) -> bool:
    try:
        return config_hash(load(str(run_dir / "config.yaml"))) == config_hash(config)
    except ConfigError:  # missing, or of a version that this one does not read
        return False


def _own(path: Path, run_dir: Path) -> bool:
    """Return whether `path` is a checkpoint of this run directory."""
    return path.resolve().parent == (run_dir / CHECKPOINTS).resolve()


def candidates(resume: str, run_dir: Path) -> tuple[list[Path], bool]:
    """Return the checkpoints that `--resume` means for a run in `run_dir`, and whether a broken one is skipped.

    The first choice comes first; with auto the list is empty if there is none yet. Raises ConfigError for a path
    without checkpoints.
    """
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
    except BrokenError:  # removed since, while later ones may exist
        step = step_of(branch)
    if branch.is_dir() and not later(run_dir / CHECKPOINTS, step, branch):
        return [branch], False
    return found, True


def _readable(branch: Path) -> list[Path]:
    """Return the checkpoints of a branch; none if they are gone by now."""
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
    """Raise ConfigError if what `--resume` means is missing, or is of another model, layout or optimizer.

    A broken checkpoint is skipped if the next may replace it.
    """
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
