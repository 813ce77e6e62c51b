"""Read and write YAML: duplicate keys, aliases and tags with side effects are refused, `1e-4` is a number.

PyYAML follows YAML 1.1, which reads `no` as false, `010` as 8 and `1e-4` as text. Here plain scalars follow
the core schema of YAML 1.2 (https://yaml.org/spec/1.2.2/#103-core-schema): null, true/false, decimal integers
(`1_000` too) and floats with an optional exponent; everything else is text.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import yaml

from dist_gpt.config.errors import ConfigError

MAX_FILE_BYTES = 1_000_000  # catches a data file given by mistake

_NULL, _BOOL, _INT, _FLOAT = (f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float"))
_PLAIN: list[tuple[str, re.Pattern[str], list[str]]] = [
    (_NULL, re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    (_BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    (_INT, re.compile(r"^[-+]?[0-9][0-9_]*$"), list("-+0123456789")),
    (
        _FLOAT,
        re.compile(r"^[-+]?(?:[0-9][0-9_]*\.[0-9]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?"
                   r"|[0-9][0-9_]*[eE][-+]?[0-9]+)$"),
        list("-+.0123456789"),
    ),
]  # fmt: skip


class StrictLoader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 scalars and without aliases (and so without merges and entity bombs)."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose a node, but raise ComposerError for an alias."""
        if self.check_event(yaml.events.AliasEvent):
            reader: Any = self
            event = reader.peek_event()
            raise yaml.composer.ComposerError(
                None, None, f"found the alias *{event.anchor}; aliases are not supported, write the value out "
                "(text that begins with * needs quotes)", event.start_mark)  # fmt: skip
        return super().compose_node(parent, index)

    def construct_int(self, node: yaml.ScalarNode) -> int:
        """Return the integer in decimal; YAML 1.1 would read 010 as octal."""
        return int(str(self.construct_scalar(node)).replace("_", ""))

    def construct_float(self, node: yaml.ScalarNode) -> float | str:
        """Return the float; a number too large for one stays text, so that it is refused instead of becoming inf."""
        text = str(self.construct_scalar(node))
        value = float(text.replace("_", ""))
        return value if math.isfinite(value) else text


class PlainDumper(yaml.SafeDumper):
    """SafeDumper that quotes text which either YAML version would read as another type, and writes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        """Return True: values are repeated instead of aliased."""
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> Any:
        """Indent lists below their key, too."""
        return super().increase_indent(flow, False)


for _tag, _pattern, _first in _PLAIN:
    StrictLoader.add_implicit_resolver(_tag, _pattern, _first)
    PlainDumper.add_implicit_resolver(_tag, _pattern, _first)
StrictLoader.add_constructor(_INT, StrictLoader.construct_int)
StrictLoader.add_constructor(_FLOAT, StrictLoader.construct_float)


def parse(text: str, where: str) -> tuple[Any, list[str]]:
    """Return the value in `text` and one problem per duplicate key. Raise ConfigError if `text` is not valid YAML.

    `where` (a file or an option) begins every message, followed by the line if it is known.
    """
    loader: Any = None
    try:
        loader = StrictLoader(text)
        node = loader.get_single_node()
        duplicates = _duplicates(node, "", where)
        return (None if node is None else loader.construct_document(node)), duplicates
    except yaml.YAMLError as error:
        raise ConfigError([_syntax_error(error, text, where)]) from None
    except RecursionError:
        raise ConfigError([f"{where}: nested too deeply for a configuration"]) from None
    except ValueError as error:  # an explicit tag (!!int abc), or an integer of thousands of digits
        raise ConfigError([f"{where}: a value cannot be read ({error})"]) from None
    finally:
        if loader is not None:
            loader.dispose()


def read(path: Path) -> tuple[Any, list[str]]:
    """Return the result of `parse` for a file. Raise ConfigError if it cannot be read as text or is too large."""
    try:
        if path.is_dir():
            raise ConfigError([f"{path}: is a folder, expected a YAML file"])
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise ConfigError([f"{path}: {size} bytes, expected a YAML file of at most {MAX_FILE_BYTES}"])
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}: not UTF-8 text (byte {error.start}), expected a YAML file"]) from None
    except FileNotFoundError:
        raise ConfigError([f"{path}: no such file"]) from None
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read ({error.strerror or error})"]) from None
    return parse(text, str(path))


def write(tree: Any) -> str:
    """Return `tree` (dicts, lists, numbers, text, booleans, None) as YAML that `parse` reads back equal."""
    return str(yaml.dump(tree, Dumper=PlainDumper, sort_keys=False, allow_unicode=True, default_flow_style=None))


def _duplicates(node: Any, path: str, where: str) -> list[str]:
    found: list[str] = []
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            found += _duplicates(item, path, where)
    if isinstance(node, yaml.MappingNode):
        first_line: dict[str, int] = {}
        for key_node, value_node in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            full = f"{path}.{key}" if path else key
            if key in first_line:
                found.append(f"{where}:{line}: duplicate key {full}, first on line {first_line[key]}; keep one of them")
            first_line.setdefault(key, line)
            found += _duplicates(value_node, full, where)
    return found


def _syntax_error(error: yaml.YAMLError, text: str, where: str) -> str:
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, int(error.position)) + 1
        return f"{where}:{line}: invalid YAML: {error.reason} (character {int(error.character):#06x})"
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    place = f"{where}:{mark.line + 1}:{mark.column + 1}" if mark else where
    context = getattr(error, "context", None)
    reason = getattr(error, "problem", None) or str(error)
    hint = "; indent with spaces, not tabs" if "'\\t'" in reason else ""
    return f"{place}: invalid YAML: {reason}{f' ({context})' if context else ''}{hint}"
