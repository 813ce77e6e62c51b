"""The `dist-gpt` command: parse options, call the module of the verb, print its document and set the exit code.

Each verb imports its code inside its function, so that `--help`, `plan` and `flops` start at once and without torch.
Exit codes: 0 done; 1 failed or verdict fail; 2 bad input (one message on stderr, no traceback); 75 preempted.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from dist_gpt.protocol import ERROR_FILE, RUN_DIR, record_failure
from dist_gpt.wording import counted

if TYPE_CHECKING:
    from dist_gpt.config.schema import Config
    from dist_gpt.rundir import Resume

os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # the search for plugins reads every installed package

app = typer.Typer(
    name="dist-gpt",
    help="Plan, run and report distributed GPT training.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help is fast, and the same in a pipe
)

ConfigArg = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file, or a preset's name.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, value read as YAML: --set train.steps=10."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print exactly one JSON document; progress goes to stderr.")]
GpusOption = Annotated[int | None, typer.Option("--gpus", min=1, help="World size (default: the configuration's).")]
RankOption = Annotated[int, typer.Option("--rank", min=0, help="Rank whose counts and bytes are shown.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        from dist_gpt import __version__

        print(f"dist-gpt {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Plan, run and report distributed GPT training."""


@app.command()
def launch(
    config: ConfigArg,
    overrides: SetOption = None,
    as_json: JsonOption = False,
    via: Annotated[str, typer.Option("--via", help="Launcher of the ranks: local, torchrun, slurm, mpi.")] = "local",
    nodes: Annotated[int | None, typer.Option(min=1, help="Nodes; same as --set launch.nodes=N.")] = None,
    ranks_per_node: Annotated[int | None, typer.Option(min=1, help="Same as --set launch.ranks_per_node=G.")] = None,
    resume: Annotated[
        str | None, typer.Option("--resume", metavar="auto|PATH", help="Resume from the newest checkpoint, or PATH.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Only check: preflight, and a collective per axis.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be started; start nothing.")] = False,
    detach: Annotated[bool, typer.Option("--detach", help="With --via slurm: submit without following.")] = False,
) -> None:
    """Train CONFIG on this machine, under torchrun, in a Slurm job or with mpirun.

    Prepares the data, creates the run directory, starts every rank and follows the run to its end.
    """
    from dist_gpt.checkpoint.resume import AUTO, resolve
    from dist_gpt.rundir import Resume
    from launch import backends, lock, run

    counts = {"launch.nodes": nodes, "launch.ranks_per_node": ranks_per_node}
    sets = [*(overrides or []), *(f"{key}={count}" for key, count in counts.items() if count)]
    loaded, device = run.load_for_launch(config, sets, via)
    way = backends.way_of(via, loaded, detach, check)
    _require_extras(loaded)
    if resume and not (check or dry_run):
        lock.look(Path(str(loaded.run_dir)))
    if resume == AUTO and not check:
        _leave_if_finished(loaded, as_json)
    asked = resolve(resume, Path(str(loaded.run_dir)), loaded)
    if check:
        loaded = run.for_check(loaded)
        asked = Resume(run.made_by_head(loaded))
    run_dir = Path(str(loaded.run_dir)) if asked.goes_on else run.refuse_existing(loaded)
    again = AUTO if resume and run.has_begun(run_dir, asked) else None
    job = run.job_of(loaded, run_dir, device, live_on_stderr=as_json, resume=again)
    if check:
        job = run.check_of(job, run_dir / "config.yaml")
    if dry_run:
        document = {**run.job_document(job), **way.document(job)}
        _print(document, as_json, run.job_text(document))
        return
    told = isinstance(way, backends.Submitted)  # the job's launcher supervises and prints the summary; its log is shown
    with _removed_if_not_started(run_dir), contextlib.ExitStack() as held:
        with _progress(as_json):
            print(f"{loaded.name}: {_ranks(loaded)} on {way.sentence}. {device.sentence}", flush=True)
            hold = None if told else lambda folder: held.enter_context(lock.hold(folder))
            _make_run_dir(loaded, asked, with_data=not check, hold=hold)
        code = way.run(job)
    if check:
        if not asked.goes_on:  # else the launcher that made the folder prints it
            _print({"exit_code": code, "run_dir": str(run_dir)}, as_json, run.checked(run_dir, code))
        raise typer.Exit(code)
    document = {"run_dir": str(run_dir), "exit_code": code, **run.summary(run_dir), "verdict": run.verdict(run_dir)}
    if as_json or code or detach or not told:  # else the job's own launcher has printed it, and was shown here
        summed_up = (code == 0 or document["skipped_why"]) and not told
        _print(document, as_json, run.last_lines(document, with_summary=bool(summed_up)))
    raise typer.Exit(code)


def _ranks(config: Config) -> str:
    return counted(config.world_size, "rank")


def _leave_if_finished(config: Config, as_json: bool) -> None:
    """Exit with a message if `--resume auto` would train nothing; change nothing. Raise ConfigError like `finished`."""
    from dist_gpt.checkpoint.resume import finished
    from launch import run

    run_dir = Path(str(config.run_dir))
    if (done := finished(run_dir, config)) is not None:
        document, text = run.finished(run_dir, done.step, done.code, done.why)
        _print(document, as_json, text)
        raise typer.Exit(done.code)


@contextlib.contextmanager
def _removed_if_not_started(run_dir: Path) -> Iterator[None]:
    """Remove a run directory made inside this context if nothing was started in it (NotStartedError)."""
    from launch.starter import NotStartedError

    there = os.path.lexists(run_dir)
    try:
        yield
    except NotStartedError:
        if not there:
            shutil.rmtree(run_dir, ignore_errors=True)
        raise


@app.command()
def train(
    config: ConfigArg,
    overrides: SetOption = None,
    as_json: JsonOption = False,
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume",
            metavar="auto|PATH",
            help="Resume from the newest checkpoint of the run directory, or from a checkpoint or run directory PATH.",
        ),
    ] = None,
) -> None:
    """Run one rank of a training run.

    Started once per rank by dist-gpt launch, torchrun, srun or mpirun, for example `torchrun --nproc-per-node 8 -m
    dist_gpt train CONFIG`. Started on its own, it trains in one process.
    """
    from dist_gpt.checkpoint.resume import AUTO
    from dist_gpt.config.load import load

    if RUN_DIR not in os.environ:  # no launcher has made it
        _train_directly(config, overrides or [], as_json, resume)
    world = os.environ.get("WORLD_SIZE", "1")
    loaded = load(config, overrides or [], world=int(world) if world.isdecimal() else None)
    _refuse_other_run_dir(loaded)
    with _progress(as_json):
        from dist_gpt.train.trainer import main as train_main

        code = train_main(loaded, AUTO if resume else None)  # the launcher has noted a PATH in the run directory
    if as_json and os.environ.get("RANK", "0") == "0":
        _print({"run_dir": loaded.run_dir, "exit_code": code}, True, "")
    raise typer.Exit(code)


def _refuse_other_run_dir(config: Config) -> None:
    """Raise ConfigError if DIST_GPT_RUN_DIR was set by the launcher of another run, or if its folder is gone."""
    from dist_gpt.config.errors import ConfigError

    made, run_dir = Path(os.environ[RUN_DIR]), Path(str(config.run_dir))
    if made != run_dir or not made.is_dir():
        raise ConfigError([
            f"{RUN_DIR}={made} is not a run directory that a launcher made for run_dir {run_dir}; unset the "
            "DIST_GPT_* variables that an earlier job left behind"
        ])  # fmt: skip


def _train_directly(config: str, overrides: list[str], as_json: bool, resume: str | None) -> NoReturn:
    """Train as the rank that the environment names, without a launcher, and exit with the exit code."""
    from dist_gpt.checkpoint.resume import AUTO, resolve
    from dist_gpt.config.load import load
    from launch.rank import direct
    from launch.run import verdict

    with _told_once() as told, contextlib.ExitStack() as held:
        start = direct.recognise(os.environ)
        told.shared = True
        loaded = load(config, overrides, world=start.place.world)
        _require_extras(loaded)
        run_dir, again = Path(str(loaded.run_dir)), direct.is_restart(os.environ)
        resolved = partial(resolve, resume, run_dir, loaded)
        folder = direct.RunFolder(loaded, resolved, resume is not None, again, held)
        if start.place.world == 1:
            folder.check()  # early, before torch is imported
        start.enter(os.environ)
        with _progress(as_json):
            from dist_gpt.train.trainer import main as train_main

            code = train_main(loaded, AUTO if resume else None, folder)
            if start.place.rank == 0:
                print(f"verdict: {verdict(run_dir)}", flush=True)
        if as_json and start.place.rank == 0:
            _print({"run_dir": loaded.run_dir, "exit_code": code}, True, "")
    start.linger(code)
    raise typer.Exit(code)


@dataclass
class _Told:
    """State of `_told_once`. `shared`: every rank finds the error that ends this one."""

    shared: bool = False


@contextlib.contextmanager
def _told_once() -> Iterator[_Told]:
    """Let only rank 0 report bad input that all ranks find, as far as the program that started them allows."""
    from launch.rank import direct

    told = _Told()
    try:
        yield told
    except Exception as error:
        if _is_bad_input(error) and not direct.speaks(os.environ, told.shared):
            raise typer.Exit(2) from None
        raise


def _require_extras(config: Config) -> None:
    """Raise ConfigError, before anything is started, if an optional package that `config` needs is missing."""
    from dist_gpt.config.deepspeed import require_deepspeed
    from dist_gpt.train.metrics import require_wandb

    require_wandb(config.log.wandb.mode)
    require_deepspeed(config.optim.engine)


@app.command()
def plan(
    config: ConfigArg,
    overrides: SetOption = None,
    as_json: JsonOption = False,
    gpus: GpusOption = None,
    rank: RankOption = 0,
) -> None:
    """Predict a rank's traffic, FLOPs and memory without running."""
    from dist_gpt.plan import api

    loaded = _load_for_rank(config, overrides, gpus, rank)
    document = api.plan_document(loaded, rank)
    _print(document, as_json, "" if as_json else api.plan_text(document, loaded))


@app.command()
def dryrun(
    config: ConfigArg,
    overrides: SetOption = None,
    as_json: JsonOption = False,
    gpus: GpusOption = None,
    rank: RankOption = 0,
) -> None:
    """Run one rank's real code on meta tensors and count its work.

    Counts what any rank of any world size sends, computes and holds, without a GPU.
    """
    loaded = _load_for_rank(config, overrides, gpus, rank)
    with _progress(as_json):
        from dist_gpt.dryrun import dryrun_document

        document = dryrun_document(loaded, rank)
    _print(document, as_json, "" if as_json else _as_yaml(document))


@app.command()
def verify(
    config: ConfigArg,
    overrides: SetOption = None,
    as_json: JsonOption = False,
    full: Annotated[bool, typer.Option("--full", help="Do not shrink a large model or world.")] = False,
) -> None:
    """Certify that this layout trains as one process does.

    The parity certificate compares both in float64. Exit code 1 if it fails.
    """
    from dist_gpt.config.load import load

    loaded = load(config, overrides or [])
    with _progress(as_json):
        from launch.verify import verify as run_verify

        document = run_verify(loaded, full)
    _print(document, as_json, "" if as_json else _as_yaml(document))
    raise typer.Exit(0 if document["verdict"] == "pass" else 1)


@app.command()
def flops(config: ConfigArg, overrides: SetOption = None, as_json: JsonOption = False) -> None:
    """List every matmul with its shape, FLOPs and share."""
    from dist_gpt.config.load import load
    from dist_gpt.plan import api

    document = api.flops_document(load(config, overrides or []))
    _print(document, as_json, "" if as_json else api.flops_text(document))


@app.command()
def report(
    run_dir: Annotated[str, typer.Argument(metavar="RUN_DIR", help="Directory of a finished or running run.")],
    compare: Annotated[str | None, typer.Option("--compare", metavar="OTHER", help="Run to compare with.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Report where every millisecond and every byte went.

    Writes report.html, report.md, report.json, trace.json.gz and figures/ into RUN_DIR. Exit code 1 if the run
    failed or its accounting differs.
    """
    from dist_gpt.report import write

    with _progress(as_json):
        document = write.report(run_dir, compare, lambda text: print(text, file=sys.stderr, flush=True))
    _print(document, as_json, "" if as_json else write.report_text(document))
    raise typer.Exit(1 if document["failed"] or document["accounting"]["exact"] is False else 0)


def _load_for_rank(config: str, overrides: list[str] | None, gpus: int | None, rank: int) -> Config:
    from dist_gpt.config.errors import ConfigError
    from dist_gpt.config.load import load

    loaded = load(config, overrides or [], world=gpus)
    if rank >= loaded.world_size:
        expected = f"0 to {loaded.world_size - 1}" if loaded.world_size > 1 else "0"
        raise ConfigError([f"--rank {rank}: expected {expected}, as the world has {_ranks(loaded)}"])
    return loaded


def _make_run_dir(
    config: Config, asked: Resume, with_data: bool = True, hold: Callable[[Path], None] | None = None
) -> None:
    """Plan, prepare the data, then make the run directory, so that problems are found before it is written.

    `hold` is called with the directory before anything in it is changed.
    """
    from dist_gpt.data.tokens import describe, prepare
    from dist_gpt.plan import api
    from launch import run

    def say(line: str) -> None:
        print(line, flush=True)

    run_dir = Path(str(config.run_dir)) if asked.goes_on else run.refuse_existing(config)
    plan_document = api.plan_document(config, 0)
    if with_data:
        say(f"data: {describe(prepare(config, say))}")
    run.make_run_dir(config, asked.goes_on)
    if hold is not None:
        hold(run_dir)
    run.fill_run_dir(config, plan_document, asked)
    say(f"run directory {run_dir}, logs in {run_dir / 'logs'}")


def _progress(as_json: bool) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which print goes to stderr if stdout is kept for a JSON document."""
    return contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()


def _print(document: dict[str, Any], as_json: bool, text: str) -> None:
    print(json.dumps(document, indent=1) if as_json else text, flush=True)


def _as_yaml(document: dict[str, Any]) -> str:
    from dist_gpt.config.yaml_io import write

    return write(document).rstrip()


def _is_bad_input(error: Exception) -> bool:
    from dist_gpt.config.errors import ConfigError
    from dist_gpt.schedule.action import ScheduleError

    return isinstance(error, (ConfigError, ScheduleError, FileNotFoundError))  # DataError is a ConfigError


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line (default: sys.argv) and end with SystemExit."""
    try:
        app(args=None if argv is None else list(argv), prog_name="dist-gpt")
    except BrokenPipeError:  # the reader, such as `| head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except Exception as error:
        if os.environ.get(ERROR_FILE):
            record_failure(error)
        if not _is_bad_input(error):
            if RUN_DIR in os.environ or type(error).__name__ != "RendezvousError":
                raise
            print(f"dist-gpt: {error}", file=sys.stderr, flush=True)  # as launch.rank.worker does: no traceback
            sys.exit(1)
        print(f"dist-gpt: {error}", file=sys.stderr, flush=True)
        if "--json" in (sys.argv[1:] if argv is None else argv) and _is_first_rank():
            _print({"problems": getattr(error, "problems", [str(error)])}, True, "")
        sys.exit(2)


def _is_first_rank() -> bool:
    from launch.rank.direct import rank_of

    return rank_of(os.environ) == 0
