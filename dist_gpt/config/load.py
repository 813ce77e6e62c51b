"""Load a file or preset with `--set` options as a resolved `Config`, or report every problem at once.

    config = load("demo", ["train.steps=10"])        # a Config without None or "auto" where a number is needed

Loading does not import torch and starts no process. Errors are `ConfigError`, one plain line per problem.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from math import gcd
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dist_gpt.config import explain, yaml_io
from dist_gpt.config.errors import ConfigError
from dist_gpt.config.problems import problems
from dist_gpt.config.schema import SMALLEST_BPE, Config, LaunchConfig

__all__ = ["ConfigError", "config_hash", "dump", "find", "load", "presets", "problems", "resolve"]

_PACKAGE = Path(__file__).resolve().parents[1]
PRESET_FOLDERS = (_PACKAGE / "configs", _PACKAGE.parent / "configs")
"""Folders of the presets: of an installed package, then of the repository."""


def presets() -> dict[str, Path]:
    """Return name -> file of every shipped configuration."""
    found: dict[str, Path] = {}
    for folder in PRESET_FOLDERS:
        for file in sorted([*folder.glob("*.yaml"), *folder.glob("models/*.yaml")]):
            found.setdefault(file.stem, file)
    return found


def find(path_or_preset: str) -> Path:
    """Return the file that `path_or_preset` names. Raise ConfigError, which lists the presets, if there is none."""
    path = Path(path_or_preset).expanduser()
    if path.is_file():
        return path
    known = presets()
    if path_or_preset in known:
        return known[path_or_preset]
    if path.exists():
        return path  # a folder or the like: the error comes when it is read
    near = difflib.get_close_matches(path.stem if path.suffix in (".yaml", ".yml") else path.name, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else "."
    raise ConfigError([f"{path_or_preset}: no such file and no preset of that name{hint} Presets: {', '.join(known)}"])


def load(path_or_preset: str, overrides: Sequence[str] = (), world: int | None = None) -> Config:
    """Return the resolved configuration of a file or preset, with `--set` overrides (`a.b=value`) applied in order.

    `world` is the number of ranks when the caller knows it (a launcher that counted GPUs, torchrun's WORLD_SIZE).
    Raise ConfigError with every problem found.
    """
    file = find(path_or_preset)
    tree, found = yaml_io.read(file)
    if tree is None or not isinstance(tree, dict):
        given = "is empty" if tree is None else f"holds {explain.shown(tree)}"
        found.append(f"{file}: {given}, expected sections: {', '.join(explain.section_keys() or [])}")
        raise ConfigError(found)
    suspects: set[str] = set()  # keys known to be wrong, about which no more is reported
    found += _apply(tree, overrides, suspects)
    _open_empty_sections(tree)
    config = _validate(tree, found, suspects)
    if config is None:
        raise ConfigError(found)
    config, messages = _resolve(config, world, suspects)
    found += messages
    found += _about_others(problems(config), suspects)
    if found:
        raise ConfigError(found)
    return config


def resolve(config: Config, world: int | None = None) -> Config:
    """Return `config` with a number wherever None or "auto" stood for one, and with its run directory.

    Fill in model.num_kv_heads, ffn_size, attention_dropout and vocab_size, parallel.dp and run_dir; if `world` is
    given, also make launch.nodes x ranks_per_node agree with it. Raise ConfigError if there is no such number.
    """
    resolved, found = _resolve(config, world, set())
    if found:
        raise ConfigError(found)
    return resolved


def dump(config: Config) -> str:
    """Return `config` as YAML text that `load` reads back equal."""
    return yaml_io.write(config.model_dump(mode="json"))


def config_hash(config: Config) -> str:
    """Return the SHA-256 (hex) of the configuration's canonical JSON without its run directory."""
    tree = config.model_dump(mode="json", exclude={"run_dir"})
    text = json.dumps(tree, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _apply(tree: dict[str, Any], overrides: Sequence[str], suspects: set[str]) -> list[str]:
    """Put `a.b=value` overrides into `tree` and return their problems."""
    found = []
    for text in overrides:
        key, equals, value_text = text.partition("=")
        path = tuple(part.strip() for part in key.split("."))
        if not equals or not all(path):
            found.append(f"--set {text}: expected KEY=VALUE, for example --set train.steps=100")
            continue
        if explain.takes_names(path[:-1]):
            _put(tree, path, _word(value_text))
            continue
        if path[-1] not in (explain.section_keys(path[:-1]) or []):
            message, meant = explain.unknown_key(path)
            suspects.update({meant} if meant else ())
            found.append(f"--set {message}")
            continue
        try:
            value, duplicates = yaml_io.parse(value_text, f"--set {key.strip()}")
        except ConfigError as error:
            found += error.problems
            suspects.add(".".join(path))
            continue
        found += duplicates
        _put(tree, path, value)
    return found


def _put(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    """Set a value, except where the file has a plain value in place of a section, which validation reports."""
    section = tree
    for part in path[:-1]:
        if section.get(part) is None:
            section[part] = {}
        section = section[part]
        if not isinstance(section, dict):
            return
    section[path[-1]] = value


def _word(text: str) -> str:
    """Return the value of a name in launch.env and the like: as typed, unless it is in YAML's quotes."""
    try:
        value, _ = yaml_io.parse(text, "")
    except ConfigError:
        return text.strip()
    return value if isinstance(value, str) else text.strip()


def _open_empty_sections(tree: dict[str, Any], path: tuple[str, ...] = ()) -> None:
    """Replace null sections by empty ones: a section whose keys are all commented out means the defaults."""
    for key in explain.section_keys(path) or []:
        if explain.section_keys((*path, key)) is None or key not in tree:
            continue
        if tree[key] is None:
            tree[key] = {}
        if isinstance(tree[key], dict):
            _open_empty_sections(tree[key], (*path, key))


def _validate(tree: dict[str, Any], found: list[str], suspects: set[str]) -> Config | None:
    """Return the typed configuration; add problems to `found` and leave wrong keys at their defaults.

    Return None if a key without a default is missing or wrong.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        wrong = explain.explain(error, tree)
    found += [message for message, _ in wrong.values()]
    suspects.update(meant or key for key, (_, meant) in wrong.items())
    rest = copy.deepcopy(tree)
    for key in wrong:
        _remove(rest, key)
    try:
        return Config.model_validate(rest)
    except ValidationError:
        return None


def _remove(tree: dict[Any, Any], dotted: str) -> None:
    """Remove the key `dotted`; keys of the file may be numbers or contain dots themselves."""
    for key in list(tree):
        name = str(key)
        if name == dotted:
            del tree[key]
        elif dotted.startswith(name + ".") and isinstance(tree[key], dict):
            _remove(tree[key], dotted[len(name) + 1 :])


def _about_others(messages: Iterable[str], suspects: set[str]) -> list[str]:
    """Return the messages that do not depend on a key already reported (each names the keys it depends on)."""
    named = [re.compile(rf"(?<![\w.]){re.escape(key)}(?!\w)") for key in suspects]
    return [message for message in messages if not any(key.search(message) for key in named)]


def _resolve(config: Config, world: int | None, suspects: set[str]) -> tuple[Config, list[str]]:
    """Return the resolved configuration and its problems; a key with a problem gets a stand-in and becomes suspect."""
    m = config.model
    found: list[str] = []
    vocab, message = _vocab_size(config)
    if message:
        found += _about_others([message], suspects)
        suspects.add("model.vocab_size")
    model = m.model_copy(update={
        "num_kv_heads": m.num_kv_heads or m.num_heads,
        "ffn_size": m.ffn_size or 4 * m.hidden_size,
        "vocab_size": vocab,
        "attention_dropout": m.dropout if m.attention_dropout is None else m.attention_dropout,
    })  # fmt: skip
    dp, message = _data_parallel(config, world)
    if message:
        found += _about_others([message], suspects)
        suspects.add("parallel.dp")
    update = {
        "model": model,
        "parallel": config.parallel.model_copy(update={"dp": dp}),
        "launch": _launch_for(config.launch, world),
        "run_dir": config.run_dir or f"runs/{config.name}",
    }
    return config.model_copy(update=update), found


def _vocab_size(config: Config) -> tuple[int, str | None]:
    """Return the number of rows of the embedding, and its problem or None."""
    given, tokenizer, source = config.model.vocab_size, config.data.tokenizer, config.data.source
    kind, _, size = tokenizer.partition(":")
    digits = size.isascii() and size.isdigit()
    if tokenizer != "byte" and not (kind == "bpe" and digits and SMALLEST_BPE <= int(size) < 2**31):
        return given or 1, (
            f"data.tokenizer: got '{tokenizer}', expected byte, or bpe:SIZE with SIZE >= {SMALLEST_BPE} (256 entries "
            "are the bytes, and one is the end of text), for example bpe:4096"
        )
    if given is not None:
        return given, None
    if source == "synthetic" or source.endswith((".bin", ".idx", ".npy")):
        return 1, (
            f"model.vocab_size: missing, and data.source {source} is already tokenised, so no tokenizer determines it; "
            "set vocab_size to at least the largest token id + 1"
        )
    return (256 if tokenizer == "byte" else int(size)), None


def _data_parallel(config: Config, world: int | None) -> tuple[int, str | None]:
    """Return parallel.dp as a number, and its problem or None."""
    p, n = config.parallel, config.launch
    rest = p.tp * p.pp * p.cp
    origin = ""
    if world is None and n.ranks_per_node != "auto":
        world = n.nodes * n.ranks_per_node
        origin = f" (launch.nodes {n.nodes} x launch.ranks_per_node {n.ranks_per_node})"
    if world is None:  # unknown: dp as given, or one replica per node
        dp = n.nodes if p.dp == "auto" else p.dp
        if dp * rest % n.nodes:
            return dp, (
                f"parallel.dp {dp} x {_factors(config)} = {dp * rest} ranks cannot be spread evenly over "
                f"launch.nodes {n.nodes}; change nodes to a divisor of {dp * rest}"
            )
        return dp, None
    if p.dp == "auto" and world >= 1 and world % rest == 0:
        return world // rest, None
    if p.dp != "auto" and world == p.dp * rest:
        return p.dp, None
    legal = [d for d in (world // rest, world // rest + 1) if d >= 1]
    nearest = f"{' or '.join(str(d * rest) for d in legal)} (parallel.dp {' or '.join(map(str, legal))})"
    if world < 1 or world % rest:
        dp = legal[0] if p.dp == "auto" else p.dp
        return dp, (
            f"world {world}{origin} is not a positive multiple of {_factors(config)} = {rest}; nearest worlds: "
            f"{nearest}; start one of these, or change tp, pp or cp so that their product divides {world}"
        )
    return int(p.dp), (
        f"world {world}{origin} is not parallel.dp {p.dp} x {_factors(config)} = {int(p.dp) * rest}; "
        f"start {int(p.dp) * rest} ranks, or set parallel.dp to {world // rest} or auto"
    )


def _factors(config: Config) -> str:
    p = config.parallel
    return f"parallel.tp {p.tp} x parallel.pp {p.pp} x parallel.cp {p.cp}"


def _launch_for(launch: LaunchConfig, world: int | None) -> LaunchConfig:
    """Return `launch` with nodes x ranks_per_node = world, keeping the size of a node if it divides the world."""
    size = launch.ranks_per_node
    if world is None or world < 1 or size == "auto" or launch.nodes * size == world:
        return launch
    size = world if world < size else gcd(world, size)
    return launch.model_copy(update={"nodes": world // size, "ranks_per_node": size})
