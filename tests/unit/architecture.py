"""Rules on the sources: who may import whom, and what no file may hold. Files are read, never run.

Rooms are the files and folders of dist_gpt/, and launch/. A room may import those of the layers below it and of its
own layer (never in a circle). `test_architecture.py` holds the project to the rules, and the rules to planted cases.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

LAYERS = (
    ("rundir", "protocol", "wording", "awake", "skips"),
    ("config",),
    ("layout", "params"),
    ("schedule",),
    ("plan",),
    ("comm",),
    ("parallel",),
    ("model",),
    ("optim", "data", "checkpoint"),
    ("integrations",),
    ("replica", "heap", "cpu"),  # one rank's parts put together: what train, verify and dryrun stand on
    ("profile",),
    ("train",),
    ("verify", "dryrun"),
)
PURE = {"rundir", "protocol", "wording", "awake", "skips", "config", "layout", "params", "schedule", "plan", "events"}
TORCH_FREE = PURE | {"report", "cpu", "launch", "cli", "__main__", "dist_gpt"}
TORCH_FREE_FILES = {f"dist_gpt/train/{name}.py" for name in ("heartbeat", "metrics", "preemption")}
DISTRIBUTED_ELSEWHERE = {"dist_gpt/integrations/deepspeed/engine.py"}  # DeepSpeed's engine communicates by itself
MAX_LINES, MAX_FUNCTION_LINES = 600, 60


def allowed_imports() -> dict[str, set[str]]:
    """Room -> the other rooms it may import. `dist_gpt` is the package's own __init__, the version."""
    allowed: dict[str, set[str]] = {}
    below: set[str] = set()
    for layer in LAYERS:
        below |= set(layer)
        # The records of events.py are counts that the plan declares and everything with torch makes.
        events = {"events"} if layer[0] not in ("rundir", "config", "layout", "schedule") else set()
        allowed |= {room: (below - {room}) | events for room in layer}
    allowed["events"] = set()
    allowed["report"] = {"config", "layout", "schedule", "plan", "events", "protocol", "skips"}
    allowed["launch"] = allowed["report"] | {"report", "rundir", "protocol", "wording", "awake"}
    allowed["cli"] = set(PURE)
    allowed["__main__"] = {"cli"}
    for room in set(allowed) - {"events"}:
        allowed[room].add("dist_gpt")
    allowed["dist_gpt"] = set()
    return allowed


ALLOWED = allowed_imports()


@dataclass(frozen=True)
class Import:
    """One imported name. `module` is absolute and dotted; for `from a import b` it is a.b."""

    path: str
    line: int
    module: str
    lazy: bool  # inside a function

    @property
    def where(self) -> str:
        return f"{self.path}:{self.line}"


@dataclass(frozen=True, eq=False)
class Source:
    """One Python file, parsed; each is one object, by which what is found in it is remembered."""

    path: str  # relative to the root, with /
    text: str
    tree: ast.Module

    @property
    def room(self) -> str:
        parts = self.path.removesuffix(".py").split("/")
        if parts[0] != "dist_gpt":
            return parts[0]
        return "dist_gpt" if parts[1] == "__init__" else parts[1]


def sources(root: Path, *folders: str) -> list[Source]:
    """Every Python file below the folders; by default those of the product."""
    found = []
    for folder in folders or ("dist_gpt", "launch"):
        for path in sorted((root / folder).rglob("*.py")):
            found.append(_parsed(path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")))
    return found


@cache  # every rule reads all files
def _parsed(path: str, text: str) -> Source:
    return Source(path, text, ast.parse(text, path))


def dotted(node: ast.expr) -> str:
    """`a.b.c` of a chain of names, else an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    inner = dotted(node.value) if isinstance(node, ast.Attribute) else ""
    return f"{inner}.{node.attr}" if inner and isinstance(node, ast.Attribute) else ""


@cache
def nodes(source: Source) -> list[ast.AST]:
    """Return every node of the file."""
    return list(ast.walk(source.tree))


@cache
def imports(source: Source) -> list[Import]:
    """Every import statement, at any depth, and every import_module or __import__ of a literal name."""
    found: list[Import] = []

    def visit(node: ast.AST, lazy: bool) -> None:
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = source.path.split("/")[: -node.level]
                base = ".".join([*package, base] if base else package)
            names = [f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and dotted(node.func).split(".")[-1] in ("import_module", "__import__"):
            name = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
            names = [name if isinstance(name, str) else "<computed>"]
        found.extend(Import(source.path, getattr(node, "lineno", 0), name, lazy) for name in names)
        inside = lazy or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(source.tree, False)
    return found


def room_of(root: Path, module: str) -> str | None:
    """The room a module lies in; None for what is not ours. `from dist_gpt import __version__` is room dist_gpt."""
    parts = module.split(".")
    if parts[0] == "launch":
        return "launch"
    if parts[0] != "dist_gpt":
        return None
    name = parts[1] if len(parts) > 1 else "__init__"
    is_room = name in ALLOWED or (root / "dist_gpt" / name).is_dir() or (root / "dist_gpt" / f"{name}.py").is_file()
    return name if is_room and name not in ("__init__", "dist_gpt") else "dist_gpt"


# --- the rules: each yields one line per violation -------------------------------------------------


FOR_OTHERS = ("launch/starters/forkserver.py",)
"""Files that import modules by name and use none of them: those that the ranks they fork will import."""


def breaks_import_order(root: Path) -> Iterator[str]:
    for source in sources(root):
        if source.room not in ALLOWED:
            yield f"{source.path}: room {source.room!r} has no place in the order; add it to LAYERS"
            continue
        for found in imports(source):
            target = room_of(root, found.module)
            if found.module == "<computed>" and source.room != "cli" and source.path not in FOR_OTHERS:
                yield f"{found.where}: a computed import cannot be checked; write the module's name"
            foreign = target is None and found.module.split(".")[0] not in sys.stdlib_module_names
            if source.room == "events" and foreign:
                yield f"{found.where}: events imports {found.module}; it may import the standard library alone"
            if target is None or target == source.room or target in ALLOWED[source.room]:
                continue
            if source.room == "cli" and found.lazy:
                continue
            advice = "; import it inside a function" if source.room == "cli" else ""
            yield f"{found.where}: {source.room} may not import {target} ({found.module}){advice}"


def has_circles(root: Path) -> Iterator[str]:
    """Rooms of one layer may use each other, one way. What the command line imports lazily is no dependency."""
    graph: dict[str, set[str]] = {}
    for source in sources(root):
        for found in imports(source):
            target = room_of(root, found.module)
            if target not in (None, source.room) and not (source.room == "cli" and found.lazy):
                graph.setdefault(source.room, set()).add(str(target))
    reaches = {room: set(direct) for room, direct in graph.items()}
    for middle in list(graph):
        for room in list(graph):
            if middle in reaches[room]:
                reaches[room] |= reaches[middle]
    circle = sorted(room for room in reaches if room in reaches[room])
    if circle:
        yield f"these rooms import each other in a circle: {', '.join(circle)}"


def drags_torch(root: Path) -> Iterator[str]:
    for source in sources(root):
        if source.room in TORCH_FREE or source.path in TORCH_FREE_FILES:
            for found in imports(source):
                if found.module.split(".")[0] in ("torch", "deepspeed") or found.module.startswith("safetensors.torch"):
                    yield f"{found.where}: {source.room} is torch-free and imports {found.module}"


def communicates_outside_comm(root: Path) -> Iterator[str]:
    """torch.distributed by import or by attribute, DistributedDataParallel and the c10d operators included."""
    for source in sources(root):
        if source.path.startswith("dist_gpt/comm/") or source.path in DISTRIBUTED_ELSEWHERE:
            continue
        names = [(found.line, found.module) for found in imports(source)]
        names += [(node.lineno, dotted(node)) for node in nodes(source) if isinstance(node, ast.Attribute)]
        for line, name in sorted(set(names)):
            below_torch = name.lower().split(".")[1:] if name.split(".")[0] == "torch" else []
            if any("distributed" in part or "c10d" in part for part in below_torch):
                yield f"{source.path}:{line}: {name} belongs under dist_gpt/comm/"


def declares_global(root: Path) -> Iterator[str]:
    for source in sources(root):
        for node in nodes(source):
            if isinstance(node, ast.Global):
                yield f"{source.path}:{node.lineno}: global {', '.join(node.names)}; pass it as an argument"


PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
OBJECT_COLLECTIVES = {
    f"{op}_object{end}"
    for op in ("all_gather", "gather", "broadcast", "scatter", "send", "recv")
    for end in ("", "_list")
}
SHELLS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"}
UNSAFE_YAML = {f"yaml.{way}_load{all_}" for way in ("unsafe", "full") for all_ in ("", "_all")}


def loaders(root: Path) -> set[str]:
    """Names of safe YAML loaders: PyYAML's, and classes of ours that derive from one."""
    safe = {"SafeLoader", "CSafeLoader"}
    for source in sources(root):
        for node in nodes(source):
            if isinstance(node, ast.ClassDef) and any(dotted(base).split(".")[-1] in safe for base in node.bases):
                safe.add(node.name)
    return safe


def unsafe_call(call: ast.Call, safe_loaders: set[str]) -> str:
    """What is wrong with a call, or an empty string."""
    name, words = dotted(call.func), {word.arg: word.value for word in call.keywords}

    def is_set(word: str, value: bool) -> bool:
        given = words.get(word)
        return isinstance(given, ast.Constant) and given.value is value

    last = call.func.attr if isinstance(call.func, ast.Attribute) else name
    if name in ("eval", "exec", "builtins.eval", "builtins.exec"):
        return f"{name} runs text as code"
    if name in SHELLS or last == "create_subprocess_shell":
        return f"{name} starts a shell; pass a list of arguments to subprocess"
    if "shell" in words and not is_set("shell", False):
        return "shell= starts a shell; pass a list of arguments"
    if name in ("yaml.load", "yaml.load_all"):
        loader = words.get("Loader") or (call.args[1] if len(call.args) > 1 else None)
        if loader is None or dotted(loader).split(".")[-1] not in safe_loaders:
            return f"{name} needs a loader that derives from yaml.SafeLoader"
    if name in UNSAFE_YAML:
        return f"{name} builds arbitrary objects; use a safe loader"
    if name == "torch.save" or (name == "torch.load" and not is_set("weights_only", True)):
        return f"{name} pickles; use safetensors"
    if "allow_pickle" in words and not is_set("allow_pickle", False):
        return "allow_pickle= unpickles"
    return f"{last} pickles what it sends" if last in OBJECT_COLLECTIVES else ""


def runs_untrusted_text(root: Path) -> Iterator[str]:
    safe_loaders = loaders(root)
    for source in sources(root):
        for found in imports(source):
            if found.module.split(".")[0] in PICKLES:
                yield f"{found.where}: imports {found.module}, which can run code on loading"
        for node in nodes(source):
            if isinstance(node, ast.Call) and (wrong := unsafe_call(node, safe_loaders)):
                yield f"{source.path}:{node.lineno}: {wrong}"


def is_too_long(root: Path) -> Iterator[str]:
    for source in sources(root, "dist_gpt", "launch", "tests", "benchmarks"):
        lines = source.text.count("\n")
        if lines > MAX_LINES:
            yield f"{source.path}: {lines} lines, {MAX_LINES} are allowed; split it"
        for node in nodes(source):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    yield f"{source.path}:{node.lineno}: {node.name} has {length} lines, {MAX_FUNCTION_LINES} allowed"


def leads_nowhere(root: Path) -> Iterator[str]:
    """Lazy imports of the command line run only when a verb is called: each of our modules named must exist."""
    for source in sources(root):
        if source.room != "cli":
            continue
        for found in imports(source):
            parts = found.module.split(".")
            if room_of(root, found.module) is None or not found.lazy:
                continue
            tried = [root.joinpath(*parts[:n]) for n in (len(parts), len(parts) - 1) if n]
            if not any(path.with_suffix(".py").is_file() or (path / "__init__.py").is_file() for path in tried):
                yield f"{found.where}: {found.module} does not exist"


Rule = Callable[[Path], Iterator[str]]
RULES: list[Rule] = [
    breaks_import_order,
    has_circles,
    drags_torch,
    communicates_outside_comm,
    declares_global,
    runs_untrusted_text,
    is_too_long,
    leads_nowhere,
]
