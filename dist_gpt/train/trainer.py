"""The training loop of one rank, with rendezvous, run directory and accounting around it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dist_gpt import cpu
from dist_gpt.checkpoint.resume import AUTO
from dist_gpt.checkpoint.state import restore, tensors_of
from dist_gpt.checkpoint.store import Checkpoints
from dist_gpt.comm.clock import read_clock
from dist_gpt.comm.probe import Network, network
from dist_gpt.comm.rendezvous import (
    RankEnv,
    RendezvousError,
    Store,
    choose_device,
    connect_store,
    rank_env,
    restarts,
)  # fmt: skip
from dist_gpt.config.errors import ConfigError
from dist_gpt.config.schema import Config
from dist_gpt.data.loader import Batches
from dist_gpt.events import EVAL, TRAIN, Counts, moved_by_engine
from dist_gpt.heap import Heap, prepare_heap
from dist_gpt.optim.lr import learning_rate
from dist_gpt.plan.buffers import needs_room
from dist_gpt.plan.count import count_comm
from dist_gpt.plan.steps import Call
from dist_gpt.plan.text import size
from dist_gpt.profile.memory import held_now
from dist_gpt.profile.recorder import Recorder, attempts_in
from dist_gpt.protocol import PREEMPTED, record_failure
from dist_gpt.replica import Rank, make_rank
from dist_gpt.rundir import CHECKPOINTS, committed
from dist_gpt.skips import CHANGE, DivergedError, Skips
from dist_gpt.train import oom
from dist_gpt.train.heartbeat import Pulse
from dist_gpt.train.metrics import ExitRecord, Tracker
from dist_gpt.train.preemption import Stop
from dist_gpt.train.startup import Folder, agree_on_attempt, meet, settle
from dist_gpt.wording import counted


class Trainer:
    """Training loop of `rank`'s part of the model, up to step `train.steps`. It saves if `checkpoints` is given."""

    def __init__(
        self,
        config: Config,
        rank: Rank,
        batches: Batches,
        tracker: Tracker,
        recorder: Recorder,
        checkpoints: Checkpoints | None = None,
    ) -> None:
        self.config, self.rank, self.batches = config, rank, batches
        self.tracker, self.recorder, self.checkpoints = tracker, recorder, checkpoints
        self.evaluations = self.trained = 0  # in this attempt
        self.step = 0  # steps done, earlier attempts included
        self.skips = Skips()
        self.owed = False  # a save was due while the weights were not worth one

    def resume(self, start: Start) -> None:
        """Set step and skip counts to those of `start`."""
        self.step = start.step
        self.skips.resume(start.step, start.trainer)

    def run(self) -> bool:
        """Train the steps after `self.step`. Reports count steps from 1; step 0 is before training.

        Return whether all steps were done. If not, a rank was asked to stop, and all ranks stop, after a save if the
        weights are good. A stop request on the first skipped step in a row waits one step, which may be good.
        """
        t = self.config.train
        if self.step == 0:
            self.validate(0)
        for step in range(self.step + 1, t.steps + 1):
            with self.recorder.step(step) as taken:
                self.rank.train_step(step - 1, partial(self.batches.sample, step - 1))
                loss, norm = self.rank.optimizer.statistics.tolist()
            self.step, self.trained = step, self.trained + 1
            self.record(step, loss, norm, taken.seconds)
            if step == t.steps or (t.eval_every and step % t.eval_every == 0):
                self.validate(step)
            stops = step < t.steps and bool(self.rank.optimizer.stop_votes > 0)
            if stops and self.skips.in_a_row == 1 and not self.skips.sound:
                stops = False
            self.owed = self.owed or stops or self.save_is_due(step)
            if self.owed and self.skips.sound:
                self.save(step)
                self.owed = False
            if stops:
                return False
        return True

    def save_is_due(self, step: int) -> bool:
        """Return whether a checkpoint is due: every `checkpoint.every` steps, and after the last."""
        every = self.config.checkpoint.every
        return every > 0 and (step % every == 0 or step == self.config.train.steps)

    def save(self, step: int) -> None:
        """Save a checkpoint. All ranks call this together."""
        if self.checkpoints is None:
            return
        if self.config.optim.engine == "deepspeed":
            raise RuntimeError(
                f"asked to stop after step {step}, but optim.engine: deepspeed saves no checkpoints: the training so "
                "far is lost. Set optim.engine: native for runs that may be interrupted"
            )
        self.tracker.sync()
        tensors = tensors_of(self.rank.buffers.tensors(), self.rank.optimizer)
        saved = self.checkpoints.save(step, tensors, self.skips.state())
        self.recorder.saved(step, saved.seconds)
        if self.rank.mesh.rank == 0:
            for note in saved.notes:
                self.tracker.message(note)
            self.tracker.message(f"saved {saved.path} ({saved.bytes / 1e6:.1f} MB in {saved.seconds:.2f} s)")

    def record(self, step: int, loss: float, norm: float, elapsed: float) -> None:
        """Report one step that took `elapsed` seconds. Raise DivergedError after train.max_skipped skips in a row."""
        tokens = self.config.train.global_batch * self.config.model.seq_len
        scale = self.rank.optimizer.scale.value.item() if self.rank.optimizer.scale is not None else None
        more: dict[str, Any] = {"skipped": True} if self.skips.count(step, loss, norm, scale) else {}
        if scale is not None:
            more["loss_scale"] = scale
        self.tracker.step(
            {
                "step": step,
                "loss": loss,
                "grad_norm": norm,
                "lr": learning_rate(self.config, step - 1),
                "tokens_per_s": tokens / elapsed,
                "step_s": elapsed,
                "epoch": self.batches.epoch(step),
                **more,
            }
        )
        if self.skips.in_a_row >= self.config.train.max_skipped:
            raise gave_up(self.skips, loss, norm, scale)

    def validate(self, step: int) -> None:
        """Report the mean loss over the validation batches, the same ones every time. All ranks call this together."""
        count = self.config.train.eval_batches
        if not count:
            return
        started, before = time.perf_counter(), self.rank.mesh.ledger.counts(EVAL).copy()
        loss = self.rank.evaluate([partial(self.batches.validation, b) for b in range(count)])
        self.evaluations += 1
        self.skips.validated(step, loss.item())
        self.tracker.validation(step, loss.item())
        elapsed = time.perf_counter() - started
        self.recorder.evaluation(step, EVAL, elapsed, self.rank.mesh.ledger.counts(EVAL).since(before))

    def accounting(self) -> list[str]:
        """Return the deviations of this attempt's traffic and gradients from the plan, as sentences; empty if none."""
        plan, ledger, config = self.rank.plan, self.rank.mesh.ledger, self.config
        train, evaluation = Counts(), Counts()
        train.merge(count_comm(plan, plan.steps), self.trained)
        batches = self.evaluations * config.train.eval_batches
        evaluation.merge(count_comm(plan, plan.eval_steps), batches)
        evaluation.merge(count_comm(plan, plan.refresh_steps), self.evaluations)
        evaluation.merge(_count_calls(plan.eval_calls(), plan.layout.world), batches)
        unwritten = self.rank.sink.unwritten() if self.trained else []
        return [
            *ledger.differences,
            *(f"no gradient was written for a parameter of shape {tuple(p.shape)}" for p in unwritten),
            *(f"train: {line}" for line in ledger.counts(TRAIN).differences(train)),
            *(f"eval: {line}" for line in ledger.counts(EVAL).differences(evaluation)),
        ]


def gave_up(skips: Skips, loss: float, norm: float, scale: float | None) -> DivergedError:
    """Return the error of a run whose last train.max_skipped steps were all skipped."""
    change = CHANGE
    if scale is not None and math.isfinite(loss):
        fp16 = f"The fp16 loss scale has dropped to {scale:.0f}"
        if scale > 1:
            change = (
                f"{fp16} and may have to drop further: raise train.max_skipped, or lower "
                "train.loss_scale (a resumed run continues with its checkpoint's)"
            )
        else:
            change = f"{fp16}: the gradients themselves overflow. {CHANGE}, or train in bf16"
    return DivergedError(
        f"{counted(skips.in_a_row, 'step')} in a row, up to step {skips.step}, changed no "
        f"weight (train.max_skipped), as the loss ({loss}) or gradient norm ({norm}) was not finite; "
        f"{skips.so_far.text()}. {change}",
        change,
    )


def last_good(run_dir: Path) -> str:
    """Name the last good checkpoint: while steps are skipped, none is saved or removed."""
    newest = next((path.name for path in committed(run_dir / CHECKPOINTS)), None)
    return f"the last good checkpoint is {newest}" if newest else "there is no checkpoint"


def how_it_ended(finished: bool, skips: Skips, stop: str | None) -> DivergedError | None:
    """Return the error of a run whose loop ended; None if it succeeded, or was asked to stop and has saved."""
    if finished or not skips.sound:
        failed = skips.failure()
        if failed is None or finished:
            return failed
        asked = stop or "another rank was asked to stop"
        return DivergedError(f"asked to stop after step {skips.step}, but not saved ({asked}): {failed}", failed.change)
    return None


def _count_calls(calls: tuple[Call, ...], size: int) -> Counts:
    counts = Counts()
    for call in calls:
        counts.add(call.axis, call.op, call.calls, call.payload, size)
    return counts


class Attempt:
    """Reports of this process's state to exit.json in the run directory and to the launcher."""

    def __init__(self) -> None:
        self.stop = Stop()
        self.pulse = Pulse.from_environ(self.stop)
        self.pulse.record = record_failure
        self.rank: Rank | None = None
        self.trainer: Trainer | None = None
        self._record: ExitRecord | None = None

    def has_run_dir(self, run_dir: Path, env: RankEnv) -> None:
        """Write exit.json from now on, since the run directory is known to belong to this run."""
        self._record = ExitRecord(run_dir, env.rank)

    def begins(self, rank: Rank) -> None:
        """Report positions and accept stop requests from now on: the groups of `rank` exist."""
        self.rank = rank
        rank.optimizer.wants_stop = lambda: self.stop.requested
        self.pulse.follow(rank.mesh.ledger)

    def trains(self, trainer: Trainer) -> None:
        """Note that the loop begins, so that the ranks can save from now on if they lose the launcher."""
        self.trainer = trainer
        if trainer.config.optim.engine != "deepspeed":
            self.pulse.can_save(trainer.config.launch.grace_s)

    def ends(self, code: int, failed: DivergedError | None = None) -> int:
        """Report exit `code` and return it. `failed`: the error of a run that failed with traffic as planned."""
        if failed is not None:
            self._write(code, str(failed), failed.change)
        else:
            why = {0: None, PREEMPTED: self.stop.requested or "another rank was asked to stop"}
            self._write(code, why.get(code, "the accounting differs"))
        self.pulse.bye(code)
        return code

    def fails(self, error: BaseException) -> None:
        """Report that this rank fails. Call this before connections are closed, which makes other ranks fail."""
        record_failure(error)
        change = error.change if isinstance(error, DivergedError) else None
        if change is not None:  # before the launcher hears of the failure and reads it
            self._write(1, str(error), change)
        self.pulse.failed(error)
        if change is None:
            self._write(2 if isinstance(error, ConfigError) else 1, f"{type(error).__name__}: {error}")

    def close(self) -> None:
        """Close the heartbeat, after everything else is closed."""
        self.pulse.close()

    def _write(self, code: int, why: str | None, change: str | None = None) -> None:
        if self._record is not None:
            self._record.write(code, why, self.trainer.step if self.trainer is not None else 0, change)


@dataclass(frozen=True)
class Start:
    """Point from which training starts. `after`: the last step that metrics.jsonl keeps; None: a new file."""

    step: int = 0
    trainer: dict[str, int] = field(default_factory=dict)
    after: int | None = None
    lines: tuple[str, ...] = ()


def begin(rank: Rank, checkpoints: Checkpoints, resume: str | None) -> Start:
    """Set initial weights, or load weights and optimizer state from a checkpoint. All ranks call this together."""
    loaded = checkpoints.load(resume) if resume is not None else None
    if loaded is None:
        rank.initialise()
        none_yet = f"no checkpoint in {checkpoints.folder} yet: training starts from the beginning"
        return Start() if resume is None else Start(after=-1, lines=(none_yet,))
    restore(loaded.tensors, rank.buffers.tensors(), rank.optimizer)
    line = f"resumed at step {loaded.step} from {loaded.path}"
    return Start(loaded.step, loaded.trainer, loaded.step, (*loaded.notes, line))


def main(config: Config, resume: str | None = None, folder: Folder | None = None) -> int:
    """Train as the rank that torchrun's variables name.

    The run directory exists, or `folder` makes it when all ranks have met.
    `resume`: auto (from the newest checkpoint there, if any, else from the one that the run directory branches from),
    or the path of a checkpoint or run directory. For restarted ranks it is always auto.
    Return the exit code: 0; 1 if traffic differs from the plan, or if the run trained nothing or ended while its loss
    was not finite (skips.Skips.failure); 75 if the run was asked to stop, saved and exited.
    Raise ConfigError if the ranks that are to make `folder` do not meet; nothing has been made or changed then.
    """
    with _bad_input_until_met(folder):
        env = expected_env(config)
    torch.manual_seed(config.train.seed)
    attempt = Attempt()
    env = replace(env, watched=attempt.pulse.line is not None)
    if folder is None:
        attempt.has_run_dir(Path(str(config.run_dir)), env)
    with ExitStack() as parts:  # closed in reverse order, even if closing one fails
        parts.callback(attempt.close)
        try:
            with _bad_input_until_met(folder):
                store = connect_store(env)  # freed after all parts, with this function's frame
            env = replace(env, attempt=restarts(store, env))
            if env.attempt and folder is not None:
                folder.restart()
            resume = AUTO if env.attempt else resume
            return attempt.ends(*_train(config, resume, store, env, attempt, folder, parts))
        except BaseException as error:
            if not oom.is_out_of_memory(error):
                attempt.fails(error)
                raise
            device = choose_device(env, config.launch.backend)
            held = held_now(attempt.rank) if attempt.rank is not None else None
            explained = oom.explain(config, env.rank, error, oom.device_bytes(device), held)
            attempt.fails(explained)
            raise explained from error


def expected_env(config: Config) -> RankEnv:
    """Return torchrun's variables. Raise RendezvousError or ConfigError if they do not fit the layout."""
    env = rank_env(config.launch.timeout_s)
    if env.world != config.world_size:
        raise RendezvousError(
            f"the world size is {env.world}, but the layout pp {config.parallel.pp} x dp {config.parallel.dp} x "
            f"cp {config.parallel.cp} x tp {config.parallel.tp} needs {config.world_size}: start that many ranks, or "
            "change the degrees in parallel"
        )
    nodes, per_node = config.launch.nodes, env.local_world
    if config.optim.shard_group == "node" and per_node * nodes != env.world:  # the plan would assume other nodes
        raise ConfigError([
            f"launch.nodes {nodes} with optim.shard_group node, but this node runs {per_node} of the {env.world} "
            f"ranks; set launch.nodes: {env.world // per_node}, or shard_group: data"
        ])  # fmt: skip
    return env


@contextmanager
def _bad_input_until_met(folder: Folder | None) -> Iterator[None]:
    """Turn a RendezvousError into a ConfigError if the ranks make their run directory themselves."""
    try:
        yield
    except RendezvousError as error:
        if folder is None:
            raise
        raise ConfigError([str(error)]) from error


def _train(
    config: Config, resume: str | None, store: Store, env: RankEnv, attempt: Attempt, folder: Folder | None,
    parts: ExitStack,
) -> tuple[int, DivergedError | None]:  # fmt: skip
    """Train, from the first meeting of the ranks to the last. Resources to close are added to `parts`.

    Return the exit code, and the error of a run that failed for another reason than its accounting.
    """
    with _bad_input_until_met(folder):
        device = choose_device(env, config.launch.backend)
    run_dir = Path(str(config.run_dir))
    bound: list[int] = []
    if device.type == "cpu":
        if config.launch.bind == "auto":
            bound = parts.enter_context(cpu.kept(env.local_rank, env.local_world, torch.get_num_threads()))
        prepare_heap()
    with _bad_input_until_met(folder):
        data, env = meet(config, store, env, folder)
    if folder is not None:
        attempt.has_run_dir(run_dir, env)
    parts.enter_context(attempt.stop.listen())  # earlier there is nothing to save, and signals end the process
    baseline = Heap().bytes_in_use()
    rank = make_rank(config, env, store, device)
    parts.callback(rank.close)
    attempt.begins(rank)
    links = look_at_network(config, rank, store, env)
    checkpoints = Checkpoints(config, run_dir, data.digest, store, env)
    start = begin(rank, checkpoints, resume)
    tracker = Tracker(config, run_dir, env.rank, start.after)
    parts.callback(tracker.close)
    tracker.message(greeting(env, rank, bound))
    batches = Batches(data, config)
    if env.rank == 0:
        tracker.message(batches.describe())
    for line in start.lines if env.rank == 0 else ():
        tracker.message(line)
    number = agree_on_attempt(store, env, attempts_in(run_dir, env.rank))
    recorder = Recorder(config, rank, replace(env, attempt=number), run_dir, baseline)
    parts.callback(recorder.close)
    recorder.network(links)
    recorder.clock(read_clock(store, env, "start"))
    trainer = Trainer(config, rank, batches, tracker, recorder, checkpoints)
    trainer.resume(start)
    attempt.trains(trainer)
    finished = trainer.run()
    recorder.clock(read_clock(store, env, "end"))
    differences = trainer.accounting()
    recorder.finish(differences)
    for line in engine_lines(rank) if env.rank == 0 else ():
        tracker.message(line)
    failed = how_it_ended(finished, trainer.skips, attempt.stop.requested)
    if differing := settle(store, env, differences, tracker):
        return differing, None
    if failed is not None:
        if env.rank == 0:
            tracker.message(f"failed: {failed}; {last_good(run_dir)}")
        return 1, failed
    return (0 if finished else PREEMPTED), None


def look_at_network(config: Config, rank: Rank, store: Store, env: RankEnv) -> Network | None:
    """Probe the network of a run on several nodes with small collectives, and print the result on rank 0.

    Return None on one node, or with launch.preflight: off. All ranks call this together.
    """
    if env.one_node or config.launch.preflight == "off":
        return None
    found = network(config, rank.mesh, rank.device, store, env)
    if env.rank == 0:
        print("\n".join(found.lines()), flush=True)
    return found


def engine_lines(rank: Rank) -> list[str]:
    """Return lines on the traffic per training step of an engine that communicates by itself, as this rank counts."""
    facts = rank.engine_facts()
    if facts is None:
        return []
    rows = [
        f"{facts['name']} {facts['version']} sends its own messages, which the accounting does not include; "
        f"rank {rank.mesh.rank}, per step:"
    ]
    for axis, op, calls, payload, wire in moved_by_engine(facts):
        rows.append(f"  {axis} {op}: {calls:.3g} calls, payload {size(payload)}, wire {size(wire)}")
    return rows


def greeting(env: RankEnv, rank: Rank, bound: Sequence[int]) -> str:
    """Return a line that says which rank this is, where it computes and how it communicates."""
    device = rank.device
    where = f"{torch.cuda.get_device_name(device)} ({device}), NCCL" if device.type == "cuda" else "CPU, gloo"
    if bound:
        cpus = f"CPU {bound[0]}" if len(bound) == 1 else f"CPUs {bound[0]} to {bound[-1]}"
        where += f"; pinned to {cpus} (launch.bind)"
    if rank.mesh.reads_memory:
        where += "; ranks of a node read each other's memory (launch.single_copy)"
        where += "" if rank.config.optim.engine == "native" else ", except in DeepSpeed's own communication"
    shard = rank.mesh.shard
    expected = device.type == "cpu" and shard.size > 1 and not needs_room(rank.plan)
    if rank.mesh.refusal or (expected and shard.near is None):
        why = rank.mesh.refusal or "they are on several nodes, or cannot see each other's processes"
        where += f"; they do not read each other's memory ({why}): plan this run with --set launch.single_copy=off"
    return f"rank {env.rank}/{env.world} local {env.local_rank}/{env.local_world} ({rank.mesh.coords}) on {where}"
