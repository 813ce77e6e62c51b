"""From a configuration to a run directory and a job, and from a finished run directory to its summary."""

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
from dist_gpt.rundir import CHECKPOINTS, EXIT, RESUME_FROM, Resume, branch_of, set_aside
from dist_gpt.rundir import replace as replace_file
from dist_gpt.skips import Skipped
from launch import slurm
from launch.env import Device, choose_device, count_gpus
from launch.spec import RUN_DIR, WORKER, JobSpec, train_argv

QUICKLY_READ_BYTES = 100_000_000


def load_for_launch(path_or_preset: str, overrides: Sequence[str], via: str = "local") -> tuple[Config, Device]:
    """The configuration and where its ranks will compute; of a job on other hosts only these know that.

    Where neither parallel.dp nor launch.ranks_per_node says how many ranks there are, the GPUs of this machine do:
    as many of them as the other axes can use. Raises ConfigError.
    """
    config = _load_on_nodes(path_or_preset, overrides, via)
    if via != "local" and (config.launch.nodes > 1 or via == "slurm"):
        return config, Device("", "Every rank looks for its own GPU")
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
    """The configuration, on all nodes of the allocation that this process is in where nobody has said how many."""
    hosts = slurm.hosts() if via != "local" and slurm.in_allocation() else []
    if len(hosts) < 2 or _given(path_or_preset, overrides, "launch", "nodes") is not None:
        return load(path_or_preset, overrides)
    try:
        return load(path_or_preset, [*overrides, f"launch.nodes={len(hosts)}"])
    except ConfigError:
        config = load(path_or_preset, overrides)  # what is wrong with it on any number of nodes
        if config.launch.ranks_per_node == config.world_size:
            return config
        fits = [n for n in range(1, len(hosts)) if config.world_size % n == 0]
        raise ConfigError([
            f"your allocation has {len(hosts)} nodes ({', '.join(hosts[:8])}), and {config.world_size} ranks cannot be "
            f"spread evenly over them; say how many shall be used: --nodes {' or '.join(map(str, fits))}"
        ]) from None  # fmt: skip


def _given(path_or_preset: str, overrides: Sequence[str], section: str, key: str) -> Any:
    """What the file, or else an override, says of a key; None where nobody does (loading fills it in)."""
    tree, _ = yaml_io.read(find(path_or_preset))
    inner = tree.get(section) if isinstance(tree, dict) else None
    value = inner.get(key) if isinstance(inner, dict) else None
    for text in overrides:
        name, _, said = text.partition("=")
        if name.strip() == f"{section}.{key}":
            value, _ = yaml_io.parse(said, f"--set {section}.{key}")
    return value


def _dp_is_auto(path_or_preset: str, overrides: Sequence[str]) -> bool:
    """Whether parallel.dp was left to the launcher (loading has replaced "auto" by a number)."""
    return _given(path_or_preset, overrides, "parallel", "dp") in (None, "auto")


def refuse_existing(config: Config) -> Path:
    """The run directory, not there yet. Raises ConfigError, with a free name, where it exists."""
    run_dir = Path(str(config.run_dir))
    if not os.path.lexists(run_dir):
        return run_dir
    number = 2
    while os.path.lexists(f"{run_dir}-{number}"):
        number += 1
    goes_on = "; --resume auto goes on with the run in it" if (run_dir / "config.yaml").is_file() else ""
    raise ConfigError([
        f"run_dir: {run_dir} exists already and is never written over; choose another, for example "
        f"--set run_dir={run_dir}-{number}, or remove it{goes_on}"
    ])  # fmt: skip


def make_run_dir(config: Config, resume: bool = False) -> Path:
    """The run directory, with nothing changed in it. Raises ConfigError where it exists and nothing is resumed."""
    run_dir = Path(str(config.run_dir)) if resume else refuse_existing(config)
    try:
        run_dir.mkdir(parents=True, exist_ok=resume)
    except FileExistsError:
        refuse_existing(config)
        raise
    except OSError as error:
        raise ConfigError([f"run_dir: cannot make {run_dir}: {error.strerror}"]) from error
    return run_dir


def fill_run_dir(config: Config, plan: dict[str, Any], asked: Resume | None = None) -> None:
    """Write config.yaml (resolved), plan.json, logs/ and what `asked` wants; how an earlier attempt ended goes."""
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
    """Both."""
    run_dir = make_run_dir(config, resume)
    fill_run_dir(config, plan)
    return run_dir


def job_of(
    config: Config, run_dir: Path, device: Device, live_on_stderr: bool = False, resume: str | None = None
) -> JobSpec:
    """The job that trains `config` in `run_dir`, from a checkpoint where `resume` says so."""
    launch, layout = config.launch, layout_of(config)
    env = {**launch.env, RUN_DIR: str(run_dir)}
    if device.kind == "cpu":
        env["CUDA_VISIBLE_DEVICES"] = ""  # ranks decide by what they see; they shall decide what the user was told
    if launch.interface is not None:  # what is said for NCCL or gloo alone counts for more (several cards of a node)
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
        # DeepSpeed imports torch's compiler; DeepSpeed itself starts a thread, and ranks could not be forked any more.
        preload=("dist_gpt.train", *(("torch._dynamo",) if config.optim.engine == "deepspeed" else ())),
    )


def has_begun(run_dir: Path, asked: Resume) -> bool:
    """Whether there is something to go on from, or to be cut back."""
    past = (run_dir / CHECKPOINTS).exists() or (run_dir / "metrics.jsonl").exists()
    return past or asked.branch is not None or branch_of(run_dir) is not None


def finished(run_dir: Path, step: int, code: int, why: str) -> tuple[dict[str, Any], str]:
    """What is said where nothing is left to train: nothing was started or changed."""
    document = {"run_dir": str(run_dir), "exit_code": code, **summary(run_dir), "verdict": verdict(run_dir)}
    text = f"finished already at step {step}, nothing is started"
    text += f"; its last attempt left with exit code {code}: {why}" if code else ""
    return document, f"{text}\nrun_dir: {run_dir}"


def check_of(spec: JobSpec, config_path: Path) -> JobSpec:
    """The job that only looks: preflight, and a small collective along every axis."""
    argv = (spec.argv[0], *WORKER, "dist_gpt.comm.probe", str(config_path))
    preflight = "strict" if spec.preflight == "off" else spec.preflight
    return replace(spec, argv=argv, saves=False, max_restarts=0, preflight=preflight, check=True, preload=("torch",))


def for_check(config: Config) -> Config:
    """`config` with a folder of its own for what --check writes, beside the run's."""
    if made_by_head(config):
        return config
    return config.model_copy(update={"run_dir": f"{config.run_dir}.check-{time.strftime('%Y%m%d-%H%M%S')}"})


def made_by_head(config: Config) -> bool:
    """Whether this launcher runs in a job, and the one that submitted it has made the run directory for it."""
    return RUN_DIR in os.environ and Path(os.environ[RUN_DIR]) == Path(str(config.run_dir))


def checked(run_dir: Path, code: int) -> str:
    """What --check ends with; a folder with nothing worth reading is removed."""
    if code:
        return f"check failed (exit code {code}); logs in {run_dir / 'logs'}"
    shutil.rmtree(run_dir)
    return "check passed"


def job_document(job: JobSpec) -> dict[str, Any]:
    """What --dry-run shows: what would be started."""
    return {
        "run_dir": job.env[RUN_DIR],
        "ranks": job.ranks,
        "nodes": job.nodes,
        "argv": list(job.argv),
        "env": [job.rank_env(rank, "127.0.0.1", 0) for rank in range(job.ranks)],
    }


def job_text(document: dict[str, Any]) -> str:
    """`job_document` for people; the port is chosen at the start."""
    first = " ".join(f"{k}={shlex.quote(v)}" for k, v in document["env"][0].items())
    shown = {shlex.join(argv): None for argv in document["commands"]}
    lines = [f"would start {document['ranks']} ranks on {document['nodes']} node(s), by:"]
    lines += [f"  {command}" for command in shown]
    if "script" in document:
        lines += ["the script:", *(f"  {line}".rstrip() for line in document["script"].splitlines())]
    else:
        lines += ["environment of rank 0 (MASTER_PORT is chosen at the start):", f"  {first}"]
    return "\n".join([*lines, f"would make {document['run_dir']}; nothing was started or written"])


def summary(run_dir: Path) -> dict[str, Any]:
    """Return what metrics.jsonl says: steps, how many were skipped and why, first and last loss and validation loss
    (null: not finite), median tokens_per_s and step_s."""
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
    """The report's line on what the run spent its time on. A run that has ended well stays so, whatever goes wrong
    here; and nobody waits for the analysis of a very large one."""
    from dist_gpt.report.write import read_document

    try:
        if sum(path.stat().st_size for path in run_dir.glob("events.rank*.jsonl")) > QUICKLY_READ_BYTES:
            return f"not made, the run is large: dist-gpt report {run_dir}"
        return str(read_document(run_dir)["verdict"]["line"])
    except Exception as error:
        return f"none ({type(error).__name__}: {error})"


def last_lines(document: dict[str, Any], with_summary: bool) -> str:
    """What is printed at the end of a run."""
    text = f"{summary_text(document)}\n" if with_summary and document["steps"] else ""
    return f"{text}run_dir: {document['run_dir']}"


def _told(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.4f}"


def summary_text(document: dict[str, Any]) -> str:
    """One line per thing worth knowing at the end of a run."""
    trained = document["steps"] - document["skipped"]
    steps = f"{trained} step{'' if trained == 1 else 's'}"
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
