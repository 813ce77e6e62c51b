"""Agreements of a run's ranks over the store: on presence, configuration, data, attempt number and accounting."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Protocol

from dist_gpt.comm.rendezvous import RankEnv, RendezvousError, Store, identity, roll_call, scoped, wait_for
from dist_gpt.config.load import config_hash
from dist_gpt.config.schema import Config
from dist_gpt.data.corpus import DataError
from dist_gpt.data.tokens import Prepared, describe, open_prepared, prepare
from dist_gpt.protocol import record_failure
from dist_gpt.train.metrics import Tracker

DATA_TIMEOUT_S = 1800.0  # for a large text; missing ranks are found before the tokenising starts


class Folder(Protocol):
    """Run directory that no launcher has made. Its methods, except `restart`, are called on rank 0 only."""

    def restart(self) -> None:
        """Note that the ranks have been restarted, so that a run in the folder is this one."""

    def check(self) -> None:
        """Raise ConfigError if the folder cannot be made or continued; change nothing."""

    def make(self, about_data: str) -> None:
        """Make or take over the folder and lock it. Raise ConfigError if another run uses it."""

    def discard(self) -> None:
        """Remove what `make` made."""


def meet(config: Config, store: Store, env: RankEnv, folder: Folder | None = None) -> tuple[Prepared, RankEnv]:
    """Return the run's data, and `env` with a fresh deadline, once all ranks have the same configuration and data.

    All ranks call this together. `folder` is made last, when everything else is in place. Preparing the data has its
    own time limit, DATA_TIMEOUT_S.
    """
    mine = identity(config_hash(config))
    if folder is None:
        roll_call(store, env, mine)
        return shared_data(config, store, env), _fresh(config, env)
    _led_by_first(store, env, mine, folder.check)
    data = shared_data(config, store, env, say=True)
    env = _fresh(config, env)
    try:
        _led_by_first(scoped(store, "folder"), env, {}, lambda: folder.make(describe(data)))
    except BaseException:
        if env.rank == 0:
            folder.discard()
        raise
    return data, _fresh(config, env)


def _fresh(config: Config, env: RankEnv) -> RankEnv:
    """Return `env` with a deadline that starts now."""
    return replace(env, deadline=time.monotonic() + config.launch.timeout_s)


def _led_by_first(store: Store, env: RankEnv, mine: dict[str, str], act: Callable[[], None]) -> None:
    """Call `act` on rank 0, then the roll on all ranks.

    If `act` fails, rank 0 raises its error, and every other rank raises a RendezvousError with the same reason.
    """
    if env.rank == 0:
        try:
            act()
        except Exception as error:
            record_failure(error)
            with suppress(Exception):  # this rank's own error is the better message
                roll_call(store, env, {"error": f"cannot start: {error}"})
            raise
    roll_call(store, env, mine)


def shared_data(config: Config, store: Store, env: RankEnv, say: bool = False) -> Prepared:
    """Return tokens from the cache, the same on all ranks. If loading fails on one rank, all ranks raise the reason.

    Raise DataError if ranks have different tokens, for example because nodes have different files under one path.

    All ranks call this together, after a roll call: each waits up to DATA_TIMEOUT_S for a silent one.
    `say`: rank 0 prints the progress of the preparation.
    """
    scope = scoped(store, "data")
    patient = replace(env, deadline=time.monotonic() + DATA_TIMEOUT_S)
    try:
        data = _prepared(config, scope, patient, say)
    except Exception as error:
        record_failure(error)  # before the other ranks fail because of it
        with suppress(Exception):  # this rank's own error is the better message
            roll_call(scope, patient, {"error": f"has no data: {error}"})
        raise
    try:
        roll_call(scope, patient, {"data": data.digest[:16]})
    except RendezvousError as error:
        if not error.differs:
            raise
        raise DataError(
            f"data.source: {config.data.source} is not the same on all ranks ({error}); give every node the same files"
        ) from error
    return data


def _prepared(config: Config, scope: Store, env: RankEnv, say: bool) -> Prepared:
    """Prepare the tokens on the first rank of each node; the other ranks wait for its result and open the same file."""
    first = env.rank - env.local_rank
    key = f"node/{first}"
    if env.local_rank == 0:
        try:
            data = prepare(config, _print_line) if say and env.rank == 0 else prepare(config)
        except Exception as error:
            record_failure(error)
            scope.set(key, json.dumps({"error": str(error)}))
            raise
        scope.set(key, json.dumps({"path": str(data.path)}))
        return data
    wait_for(scope, env, {first: key}, "prepare the data", DATA_TIMEOUT_S)
    word = json.loads(scope.get(key))
    if "error" in word:
        raise RendezvousError(f"rank {first} could not prepare the data: {word['error']}")
    return open_prepared(word["path"])


def _print_line(line: str) -> None:
    print(line, flush=True)


def agree_on_attempt(store: Store, env: RankEnv, before: int) -> int:
    """Return the number of this attempt, the same on all ranks: the largest `before` of any rank.

    `before` is the number of attempts in a rank's own files: a rank that died before it wrote anything counts fewer.
    """
    scope = scoped(store, "attempt")
    scope.set(str(env.rank), str(before))
    keys = {rank: str(rank) for rank in range(env.world)}
    wait_for(scope, env, keys, "report the number of starts")
    return max(int(scope.get(key)) for key in keys.values())


def settle(store: Store, env: RankEnv, differences: list[str], tracker: Tracker) -> int:
    """Collect `differences` from all ranks and report them on rank 0. Return the exit code, 0 or 1, on every rank."""
    store.set(f"accounting/{env.rank}", json.dumps(differences))
    keys = {rank: f"accounting/{rank}" for rank in range(env.world)}
    wait_for(store, env, keys, "report the accounting")
    found = [f"rank {rank}: {line}" for rank, key in keys.items() for line in json.loads(store.get(key))]
    if env.rank == 0:
        tracker.message("accounting: differs" if found else "accounting: exact")
        for line in found[:20]:
            tracker.message(f"  {line}")
    store.set(f"left/{env.rank}", "")
    if env.rank == 0:  # rank 0 may host the store, so it exits last
        wait_for(store, env, {rank: f"left/{rank}" for rank in range(env.world)}, "read the accounting")
    return 1 if found else 0
