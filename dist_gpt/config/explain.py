"""Explain in plain words the errors in a tree of YAML values: unknown keys, wrong types, values out of range."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import cache
from typing import Any, get_origin

from pydantic import ValidationError

from dist_gpt.config.problems import NOT_YET
from dist_gpt.config.schema import Config, Section


def section_keys(path: tuple[str, ...] = ()) -> list[str] | None:
    """Return the keys of the section at `path`, or None if `path` is not a section."""
    section = _section_at(path)
    return None if section is None else list(section.model_fields)


def leaf_paths(path: tuple[str, ...] = ()) -> list[str]:
    """Return the dotted path of every key below `path` that takes a value, in the schema's order."""
    found: list[str] = []
    for key in section_keys(path) or []:
        inner = (*path, key)
        found += leaf_paths(inner) if _section_at(inner) else [".".join(inner)]
    return found


def unknown_key(path: tuple[str, ...]) -> tuple[str, str | None]:
    """Return the message for a key that the schema does not have, and the key that was probably meant, or None."""
    full = ".".join(path)
    above = path[:-1]
    keys = section_keys(above)
    if keys is None:  # inside a plain value, or inside a section that is unknown itself
        depth = next(n for n in range(len(above), -1, -1) if section_keys(above[:n]) is not None)
        if depth < len(path) and path[depth] in (section_keys(path[:depth]) or []):
            owner = ".".join(path[: depth + 1])
            return f"{full}: unknown key; {owner} is a single value, not a section; set {owner} itself", owner
        above, keys = path[:depth], section_keys(path[:depth]) or []
    meant = _suggestion(path[len(above)], above, keys)
    hint = f"; did you mean {meant}?" if meant else "."
    name = f"Keys of {'.'.join(above)}" if above else "Sections"
    return f"{full}: unknown key{hint} {name}: {', '.join(keys)}", meant


def expected(path: tuple[str, ...]) -> str:
    """Return the value expected at `path` in words, for example "an integer >= 1"."""
    if takes_names(path):
        return f"names with values, for example {path[-1]}: {{NAME: VALUE}}"
    if _section_at(path):
        return f"a section with the keys {', '.join(section_keys(path) or [])}"
    root = node = _json_schema()
    for key in path:
        node = node["properties"][key]
        if "$ref" in node:
            node = root["$defs"][node["$ref"].rsplit("/", 1)[-1]]
    if "enum" in node and (proven := NOT_YET.get(".".join(path))):
        node = {**node, "enum": list(proven)}
    return _describe(node)


def shown(value: Any) -> str:
    """Return `value` as the user wrote it, with its type; long values are cut."""
    if value is None:
        return "null"
    if isinstance(value, Mapping):
        return "a section" if value else "an empty section"
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def explain(error: ValidationError, tree: Any) -> dict[str, tuple[str, str | None]]:
    """Return the errors that pydantic found in `tree`, as dotted key -> (message, key that was meant instead).

    Each key has one entry, even if pydantic reports several errors (one per option of a union).
    """
    found: dict[str, tuple[str, str | None]] = {}
    for item in error.errors(include_url=False, include_context=False):
        location = tuple(str(part) for part in item["loc"])
        if item["type"] in ("extra_forbidden", "invalid_key"):
            path = location[:-1] if location[-1] == "[key]" else location
            found.setdefault(".".join(path), unknown_key(path))
            continue
        path = _known_prefix(location)
        if takes_names(path) and len(location) > len(path):  # a name inside it
            path = location[: len(path) + 1]
            found.setdefault(".".join(path), (_wrong_word(path, value_at(tree, path)), None))
            continue
        value, wanted = value_at(tree, path), expected(path)
        if wanted == "text" and isinstance(value, (bool, int, float)):
            wanted = f"text; write it in quotes, '{value}'"
        given = "missing" if item["type"] == "missing" else f"got {shown(value)}"
        found.setdefault(".".join(path), (f"{'.'.join(path)}: {given}, expected {wanted}", None))
    return found


def takes_names(path: tuple[str, ...]) -> bool:
    """Return whether `path` takes names of the user's choice, with values: launch.env, launch.slurm.options."""
    section = _section_at(path[:-1]) if path else None
    field = section.model_fields.get(path[-1]) if section is not None else None
    return field is not None and get_origin(field.annotation) is dict


def _wrong_word(path: tuple[str, ...], value: Any) -> str:
    """Return the message for a value that is neither text nor a number."""
    quoted = f"; write it in quotes, '{str(value).lower()}'" if isinstance(value, bool) else ""
    quoted = "; write '' for an empty text" if value is None else quoted
    return f"{'.'.join(path)}: got {shown(value)}, expected text or a number{quoted}"


def value_at(tree: Any, path: tuple[str, ...]) -> Any:
    """Return the value at `path` in nested mappings, or None if there is none."""
    for key in path:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


@cache
def _json_schema() -> dict[str, Any]:
    return Config.model_json_schema()


def _section_at(path: tuple[str, ...]) -> type[Section] | None:
    section: type[Section] = Config
    for key in path:
        field = section.model_fields.get(key)
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, Section)):
            return None
        section = field.annotation
    return section


def _known_prefix(location: tuple[str, ...]) -> tuple[str, ...]:
    for n in range(len(location)):
        if location[n] not in (section_keys(location[:n]) or []):
            return location[:n]
    return location


def _suggestion(key: str, above: tuple[str, ...], keys: list[str]) -> str | None:
    prefix = "".join(f"{part}." for part in above)
    for name in keys:
        if name.lower() == key.lower().replace("-", "_"):
            return prefix + name
    elsewhere = [path for path in leaf_paths() if path.rsplit(".", 1)[-1] == key]
    if elsewhere:  # the right key in the wrong section
        return elsewhere[0]
    near = difflib.get_close_matches(key, keys, n=1, cutoff=0.6)
    if near:
        return prefix + near[0]
    by_name = {path.rsplit(".", 1)[-1]: path for path in reversed(leaf_paths())}
    far = difflib.get_close_matches(key, by_name, n=1, cutoff=0.8)
    return by_name[far[0]] if far else None


def _number(value: float) -> str:
    """Return a number as text, a whole number with all its digits."""
    return f"{value:.0f}" if value == int(value) else f"{value:g}"


def _describe(node: Mapping[str, Any]) -> str:
    if "anyOf" in node:
        return " or ".join(_describe(option) for option in node["anyOf"])
    if "enum" in node:
        return "one of " + ", ".join(str(option) for option in node["enum"])
    if "const" in node:
        return str(node["const"])
    kind = node.get("type")
    if kind == "array":
        low, high = node.get("minItems"), node.get("maxItems")
        count = f"{low} " if low is not None and low == high else ""
        return f"a list of {count}values, each {_describe(node['items'])}"
    names = {"integer": "an integer", "number": "a number", "boolean": "true or false", "string": "text"}
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = [f"{sign} {_number(node[key])}" for key, sign in signs.items() if key in node]
    name = names.get(str(kind), str(kind))
    return f"{name} {' and '.join(limits)}" if limits else name
