"""Name missing Python packages, and unpack wheels from a folder in their place. Standard library only.

A machine with a GPU often has torch but nothing else, and no network. Wheels are zip files: those in a folder are
unpacked into a temporary one, which goes to the front of the import path. Pure wheels run anywhere; compiled ones must
fit the interpreter and the CPU.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import sys
import sysconfig
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER_VARIABLE = "DIST_GPT_WHEELS"
DEFAULT_FOLDER = "vendor"


@dataclass(frozen=True)
class Package:
    """Distribution `name`, imported as `module`. `check`: the GPU check needs it."""

    name: str
    module: str
    pure: bool
    check: bool


PACKAGES = (
    Package("torch", "torch", False, True),
    Package("numpy", "numpy", False, True),
    Package("pydantic", "pydantic", True, True),
    Package("pydantic-core", "pydantic_core", False, True),
    Package("annotated-types", "annotated_types", True, True),
    Package("typing-inspection", "typing_inspection", True, True),
    Package("typing-extensions", "typing_extensions", True, True),
    Package("PyYAML", "yaml", False, True),
    Package("safetensors", "safetensors", False, True),
    Package("psutil", "psutil", False, True),
    Package("nvidia-ml-py", "pynvml", True, False),
    Package("pytest", "pytest", True, False),
    Package("typer", "typer", True, False),
    Package("rich", "rich", True, False),
    Package("tokenizers", "tokenizers", False, False),
    Package("jinja2", "jinja2", True, False),
    Package("matplotlib", "matplotlib", False, False),
)


def is_here(module: str) -> bool:
    """Return whether a module can be found, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def missing(found: Callable[[str], object] = is_here) -> list[Package]:
    """Return the packages that cannot be imported here."""
    return [package for package in PACKAGES if not found(package.module)]


def pins(text: str, version: tuple[int, int] = sys.version_info[:2]) -> dict[str, str]:
    """Return {distribution: pinned version} of a constraints file for a Python version; names are normalised."""
    found = {}
    for line in text.splitlines():
        requirement, _, marker = line.split("#")[0].partition(";")
        name, equals, pinned = requirement.strip().partition("==")
        if equals and _holds(marker, version):
            found[_normal(name)] = pinned
    return found


def _holds(marker: str, version: tuple[int, int]) -> bool:
    """Return whether a marker on python_version holds; other markers, which the file does not use, count as true."""
    told = re.fullmatch(r"\s*python_version\s*(>=|<)\s*\"(\d+)\.(\d+)\"\s*", marker)
    if told is None:
        return True
    limit = (int(told[2]), int(told[3]))
    return version >= limit if told[1] == ">=" else version < limit


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def advice(lacking: Iterable[Package], constraints: str) -> list[str]:
    """Return lines that name the missing packages, with versions, and say how to provide them."""
    lacking = list(lacking)
    if not lacking:
        return []
    pinned = pins(constraints)
    lines = []
    for check, words in ((True, "needed by this check"), (False, "not needed by this check")):
        rows = [p for p in lacking if p.check is check]
        if rows:
            lines.append(f"Missing packages, {words}:")
        for p in rows:
            kind = "pure Python, any wheel" if p.pure else f"compiled, a wheel for {_tag()} on {platform.machine()}"
            version = pinned.get(_normal(p.name))
            lines.append(f"  {p.name}{'==' + version if version else ''}  ({kind})")
    names = " ".join(p.name for p in lacking if p.check and p.module != "torch")
    if names:
        lines += [
            f"On a machine with a network: pip download --only-binary=:all: --python-version {_dotted()} "
            f"--platform manylinux_2_28_{platform.machine()} --platform manylinux2014_{platform.machine()} "
            f"-c constraints.txt -d {DEFAULT_FOLDER} {names}",
            f"Then copy that folder here, as {DEFAULT_FOLDER}/ in the repository, or name it: --wheels FOLDER or "
            f"${FOLDER_VARIABLE}.",
        ]
    if any(p.module == "torch" for p in lacking):
        lines.append("torch itself must be installed on this machine.")
    return lines


def _tag() -> str:
    return f"cp{sys.version_info[0]}{sys.version_info[1]}"


def _dotted() -> str:
    return f"{sys.version_info[0]}.{sys.version_info[1]}"


def wheel_folder(given: str | None, root: Path = ROOT) -> Path | None:
    """Return the folder of wheels: `given`, else that of $DIST_GPT_WHEELS, else vendor/ if it exists.

    Raise ValueError if a named one is not a folder.
    """
    for text, origin in ((given, "--wheels"), (os.environ.get(FOLDER_VARIABLE), f"${FOLDER_VARIABLE}")):
        if text:
            if not Path(text).is_dir():
                raise ValueError(f"{origin} is {text}, which is not a folder; give a folder that holds wheels")
            return Path(text).resolve()
    default = root / DEFAULT_FOLDER
    return default if default.is_dir() else None


def unfit(wheel: str, version: tuple[int, int] = sys.version_info[:2], machine: str = "") -> str:
    """Return why a wheel with this file name cannot run here, or an empty string."""
    parts = wheel.removesuffix(".whl").split("-")
    if len(parts) not in (5, 6):
        return "its name is not that of a wheel"
    pythons, abis, platforms = (part.split(".") for part in parts[-3:])
    machine = machine or sysconfig.get_platform().rpartition("-")[2]
    here = f"cp{version[0]}{version[1]}"
    older = {f"cp3{minor}" for minor in range(2, version[1] + 1)}
    by_abi = (here in pythons and here in abis) or ("abi3" in abis and bool(older & set(pythons)))
    pure = bool({"py3", here} & set(pythons)) and "none" in abis
    if not (by_abi or pure):
        return f"it is for {'.'.join(pythons)}-{'.'.join(abis)}, but this is {here}"
    if "any" in platforms or any("linux" in p and "musl" not in p and p.endswith("_" + machine) for p in platforms):
        return ""
    return f"it is for {'.'.join(platforms)}, but this is linux on {machine}"


def unpack(folder: Path, into: Path) -> list[str]:
    """Unpack into `into` the wheels of `folder` that fit this machine; return a line for each other one."""
    refused = []
    for wheel in sorted(folder.glob("*.whl")):
        why = unfit(wheel.name)
        try:
            if not why:
                with zipfile.ZipFile(wheel) as archive:
                    archive.extractall(into)
        except (zipfile.BadZipFile, OSError) as error:
            why = f"it cannot be read: {error}"
        if why:
            refused.append(f"{wheel.name} is ignored: {why}")
    return refused
