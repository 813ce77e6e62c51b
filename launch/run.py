"""Make the run directory and the job of a configuration, and the summary of a finished run directory."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from dist_gpt.config import yaml_io
from dist_gpt.config.errors import ConfigError
from dist_gpt.config.load import dump, find, load
from dist_gpt.config.schema import Config
from dist_gpt.plan.steps import layout_of
from dist_gpt.protocol import RUN_DIR
from dist_gpt.rundir import CHECKPOINTS, EXIT, RESUME_FROM, Resume, branch_of, set_aside
from dist_gpt.rundir import replace as replace_file
from dist_gpt.skips import Skipped
from dist_gpt.wording import counted
from launch.env import Device, choose_device, count_gpus
from launch.spec import WORKER, JobSpec, train_argv
from launch.starters import slurm

QUICKLY_READ_BYTES = 100_000_000


def load_for_launch(path_or_preset: str, overrides: Sequence[str], via: str = "local") -> tuple[Config, Device]:
    """Return the configuration and its ranks' device, which only the ranks know if the job runs on other hosts.

    If neither parallel.dp nor launch.ranks_per_node says how many ranks there are, the GPUs of this machine do: as many
    of them as the other axes can use. Raise ConfigError if the configuration cannot run.
    """
    config = _load_on_nodes(path_or_preset, overrides, via)
    if via != "local" and (config.launch.nodes > 1 or via == "slurm"):
        return config, Device("", "Every rank selects its own GPU")
    gpus = count_gpus()
    nodes = config.launch.nodes
    if gpus and config.launch.ranks_per_node == "auto" and _dp_is_auto(path_or_preset, overrides):
        p = config.parallel
        rest = p.tp * p.pp * p.cp
        world = gpus * nodes // rest * rest
        if world:
            config = load(path_or_preset, overrides, world=world)
    return config, choose_device(config.world_size // nodes, gpus, config.launch.backend)


def _load_on_nodes(path_or_preset: str, overrides: Sequence[str], via: str) -> Config:
    """Return the configuration; if launch.nodes is not set, on all nodes of the allocation that this process is in."""
    hosts = slurm.hosts() if via != "local" and slurm.in_allocation() else []
    if len(hosts) < 2 or _given(path_or_preset, overrides, "launch", "nodes") is not None:
        return load(path_or_preset, overrides)
    try:
        return load(path_or_preset, [*overrides, f"launch.nodes={len(hosts)}"])
    except ConfigError:
        config = load(path_or_preset, overrides)  # raises if it is wrong on any number of nodes
        if config.launch.ranks_per_node == config.world_size:
            return config
        fits = [n for n in range(1, len(hosts)) if config.world_size % n == 0]
        raise ConfigError([
            f"your allocation has {len(hosts)} nodes ({', '.join(hosts[:8])}), and {config.world_size} ranks cannot be "
            f"spread evenly over them; choose how many to use: --nodes {' or '.join(map(str, fits))}"
        ]) from None  # fmt: skip


def _given(path_or_preset: str, overrides: Sequence[str], section: str, key: str) -> Any:
    """Return what an override, else the file, says of a key; None if neither does (loading fills it in)."""
    tree, _ = yaml_io.read(find(path_or_preset))
    inner = tree.get(section) if isinstance(tree, dict) else None
    value = inner.get(key) if isinstance(inner, dict) else None
    for text in overrides:
        name, _, said = text.partition("=")
        if name.strip() == f"{section}.{key}":
            value, _ = yaml_io.parse(said, f"--set {section}.{key}")
    return value


def _dp_is_auto(path_or_preset: str, overrides: Sequence[str]) -> bool:
    """Return whether parallel.dp was left to the launcher (loading has replaced "auto" by a number)."""
    return _given(path_or_preset, overrides, "parallel", "dp") in (None, "auto")


def refuse_existing(config: Config) -> Path:
    """Return the run directory, which must not exist yet. Raise ConfigError, with a free name, if it does."""
    run_dir = Path(str(config.run_dir))
    if not os.path.lexists(run_dir):
        return run_dir
    number = 2
    while os.path.lexists(f"{run_dir}-{number}"):
        number += 1
    goes_on = "; --resume auto continues the run in it" if (run_dir / "config.yaml").is_file() else ""
    raise ConfigError([
        f"run_dir: {run_dir} already exists and is never overwritten; choose another, for example "
        f"--set run_dir={run_dir}-{number}, or remove it{goes_on}"
    ])  # fmt: skip


def make_run_dir(config: Config, resume: bool = False) -> Path:
    """Create the run directory and change nothing in it. Raise ConfigError if it exists and nothing is resumed."""
    run_dir = Path(str(config.run_dir)) if resume else refuse_existing(config)
    try:
        run_dir.mkdir(parents=True, exist_ok=resume)
    except FileExistsError:
        refuse_existing(config)
        raise
    except OSError as error:
        raise ConfigError([f"run_dir: cannot create {run_dir}: {error.strerror}"]) from error
    return run_dir


def fill_run_dir(config: Config, plan: dict[str, Any], asked: Resume | None = None) -> None:
    """Write config.yaml (resolved), plan.json, logs/ and what `asked` wants; remove an earlier attempt's exit.json."""
    run_dir = Path(str(config.run_dir))
    (run_dir / EXIT).unlink(missing_ok=True)
    for checkpoint in asked.newer if asked is not None else ():
        print(f"{checkpoint} is of a later step: moved to {set_aside(checkpoint).name}", flush=True)
    if asked is not None and asked.branch is not None:
        replace_file(run_dir / RESUME_FROM, f"{asked.branch}\n")
    replace_file(run_dir / "config.yaml", dump(config))
    replace_file(run_dir / "plan.json", json.dumps(plan, indent=1) + "\n")
    (run_dir / "logs").mkdir(exist_ok=True)


def create_run_dir(config: Config, plan: dict[str, Any], resume: bool = False) -> Path:
    """Create and populate the run directory."""
    run_dir = make_run_dir(config, resume)
    fill_run_dir(config, plan)
    return run_dir


def job_of(
    config: Config, run_dir: Path, device: Device, live_on_stderr: bool = False, resume: str | None = None
) -> JobSpec:
    """Return the job that trains `config` in `run_dir`, from a checkpoint if `resume` says so."""
    launch, layout = config.launch, layout_of(config)
    env = {**launch.env, RUN_DIR: str(run_dir)}
    if device.kind == "cpu":
        env["CUDA_VISIBLE_DEVICES"] = ""  # ranks choose by what they see: let them choose what the user was told
    if launch.interface is not None:  # settings for NCCL or gloo alone take precedence (several cards of a node)
        names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
        env |= {name: launch.interface for name in names if name not in {**os.environ, **launch.env}}
    return JobSpec(
        argv=train_argv(run_dir / "config.yaml", *(("--resume", resume) if resume else ())),
        ranks=layout.world,
        log_dir=run_dir / "logs",
        nodes=launch.nodes,
        env=env,
        layout=layout,
        live_on_stderr=live_on_stderr,
        name=config.name,
        saves=True,
        watched=True,
        interface=launch.interface,
        silence_s=launch.silence_s,
        timeout_s=launch.timeout_s,
        grace_s=launch.grace_s,
        max_restarts=launch.max_restarts,
        preflight=launch.preflight,
        # DeepSpeed imports torch's compiler. Importing DeepSpeed itself starts a thread, which rules out forking ranks.
        preload=("dist_gpt.train.trainer", *(("torch._dynamo",) if config.optim.engine == "deepspeed" else ())),
    )


def has_begun(run_dir: Path, asked: Resume) -> bool:
    """Return whether the run has anything to continue from or to cut back."""
    past = (run_dir / CHECKPOINTS).exists() or (run_dir / "metrics.jsonl").exists()
    return past or asked.branch is not None or branch_of(run_dir) is not None


def finished(run_dir: Path, step: int, code: int, why: str) -> tuple[dict[str, Any], str]:
    """Return the document and the text of a run with nothing left to train; nothing was started or changed."""
    document = {"run_dir": str(run_dir), "exit_code": code, **summary(run_dir), "verdict": verdict(run_dir)}
    text = f"already finished at step {step}; nothing is started"
    text += f"; its last attempt exited with code {code}: {why}" if code else ""
    return document, f"{text}\nrun_dir: {run_dir}"


def check_of(spec: JobSpec, config_path: Path) -> JobSpec:
    """Return the job that only checks: preflight, and a small collective along every axis."""
    argv = (spec.argv[0], *WORKER, "dist_gpt.comm.probe", str(config_path))
    preflight = "strict" if spec.preflight == "off" else spec.preflight
    return replace(spec, argv=argv, saves=False, max_restarts=0, preflight=preflight, check=True, preload=("torch",))


def for_check(config: Config) -> Config:
    """Return `config` with its own folder for what --check writes, beside the run's."""
    if made_by_head(config):
        return config
    return config.model_copy(update={"run_dir": f"{config.run_dir}.check-{time.strftime('%Y%m%d-%H%M%S')}"})


def made_by_head(config: Config) -> bool:
    """Return whether this launcher runs in a job whose submitter has made the run directory for it."""
    return RUN_DIR in os.environ and Path(os.environ[RUN_DIR]) == Path(str(config.run_dir))


def checked(run_dir: Path, code: int) -> str:
    """Return the last line of --check; remove the folder if the check passed."""
    if code:
        return f"check failed (exit code {code}); logs in {run_dir / 'logs'}"
    shutil.rmtree(run_dir)
    return "check passed"


def job_document(job: JobSpec) -> dict[str, Any]:
    """Return what --dry-run shows: the job that would be started."""
    return {
        "run_dir": job.env[RUN_DIR],
        "ranks": job.ranks,
        "nodes": job.nodes,
        "argv": list(job.argv),
        "env": [job.rank_env(rank, "127.0.0.1", 0) for rank in range(job.ranks)],
    }


def job_text(document: dict[str, Any]) -> str:
    """Return `job_document` as text for users; the port is chosen at the start."""
    first = " ".join(f"{k}={shlex.quote(v)}" for k, v in document["env"][0].items())
    shown = {shlex.join(argv): None for argv in document["commands"]}
    lines = [f"would start {counted(document['ranks'], 'rank')} on {counted(document['nodes'], 'node')}, by:"]
    lines += [f"  {command}" for command in shown]
    if "script" in document:
        lines += ["the script:", *(f"  {line}".rstrip() for line in document["script"].splitlines())]
    else:
        lines += ["environment of rank 0 (MASTER_PORT is chosen at the start):", f"  {first}"]
    return "\n".join([*lines, f"would create {document['run_dir']}; nothing was started or written"])


def summary(run_dir: Path) -> dict[str, Any]:
    """Return the summary of metrics.jsonl.

    It has the steps, how many were skipped and why, the first and last loss and validation loss (None: not finite), and
    the median tokens_per_s and step_s.
    """
    rows = []
    if (run_dir / "metrics.jsonl").is_file():
        rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]

    def column(key: str) -> list[float]:
        return [row[key] for row in rows if row.get(key) is not None]

    loss, val_loss = column("loss"), [row["val_loss"] for row in rows if "val_loss" in row]
    skipped = Skipped.of(rows)
    return {
        "steps": skipped.steps,
        "skipped": skipped.count,
        "skipped_why": skipped.text() or None,
        "loss": [loss[0], loss[-1]] if loss else None,
        "val_loss": [val_loss[0], val_loss[-1]] if val_loss else None,
        "tokens_per_s": median(column("tokens_per_s")) if column("tokens_per_s") else None,
        "step_s": median(column("step_s")) if column("step_s") else None,
    }


def verdict(run_dir: Path) -> str:
    """Return the report's line on where the run spent its time.

    An error here does not fail a run that ended well; a very large run is not analysed, as that takes long.
    """
    from dist_gpt.report.write import read_document

    try:
        if sum(path.stat().st_size for path in run_dir.glob("events.rank*.jsonl")) > QUICKLY_READ_BYTES:
            return f"not computed for a run this large; use dist-gpt report {run_dir}"
        return str(read_document(run_dir)["verdict"]["line"])
    except Exception as error:
        return f"none ({type(error).__name__}: {error})"


def last_lines(document: dict[str, Any], with_summary: bool) -> str:
    """Return the text printed at the end of a run."""
    text = f"{summary_text(document)}\n" if with_summary and document["steps"] else ""
    return f"{text}run_dir: {document['run_dir']}"


def _told(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.4f}"


def summary_text(document: dict[str, Any]) -> str:
    """Return the results of a run as text, one a line."""
    trained = document["steps"] - document["skipped"]
    steps = counted(trained, "step")
    lines = [f"{steps} trained, {document['skipped_why']}" if document["skipped_why"] else f"{steps} done"]
    if document["loss"]:
        lines.append("loss             {:.4f} -> {:.4f}".format(*document["loss"]))
    if document["val_loss"]:
        first, last = document["val_loss"]
        ratio = f"  ({last / first:.2f} x the initial)" if first and last is not None else ""
        lines.append(f"validation loss  {_told(first)} -> {_told(last)}{ratio}")
    if document["tokens_per_s"]:
        lines.append(f"median           {document['tokens_per_s']:.0f} tokens/s")
    if document.get("verdict"):
        lines.append(f"verdict          {document['verdict']}")
    return "\n".join(lines)
