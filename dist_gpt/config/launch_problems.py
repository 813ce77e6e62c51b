"""Find values in the section `launch` that a shell, sbatch or the system would not accept, as sentences."""

from __future__ import annotations

import re
import unicodedata

from dist_gpt.config.schema import Config

VARIABLE = r"[A-Za-z_][A-Za-z0-9_]*"
"""Pattern of a shell variable's name."""
SLURM_OPTION = r"[a-z][a-z0-9]*(-[a-z0-9]+)*"
"""Pattern of a long option of sbatch, without its leading dashes."""
SLURM_TIME = r"[0-9]+|[0-9]+:[0-9]{1,2}(:[0-9]{1,2})?|[0-9]+-[0-9]{1,2}(:[0-9]{1,2}){0,2}"
SLURM_OURS = {
    "job-name": "use the key name",
    "chdir": "submit the job from that folder",
    "output": "the log is RUN_DIR/logs/slurm-JOB.out",
    "error": "the log is RUN_DIR/logs/slurm-JOB.out",
    "open-mode": "logs are appended to",
    "requeue": "use launch.slurm.requeue",
    "no-requeue": "use launch.slurm.requeue",
    "signal": "use launch.grace_s",
    "nodes": "use launch.nodes",
    "ntasks": "use launch.nodes and launch.ranks_per_node",
    "ntasks-per-node": "use launch.ranks_per_node",
    "cpus-per-task": "use launch.slurm.cpus_per_rank",
    "gpus-per-node": "use launch.slurm.gpus_per_node",
    "partition": "use launch.slurm.partition",
    "account": "use launch.slurm.account",
    "qos": "use launch.slurm.qos",
    "constraint": "use launch.slurm.constraint",
    "time": "use launch.slurm.time",
    "array": "write your own script, see slurm/array.sbatch",
    "wait": "dist-gpt launch follows the job itself",
    "parsable": "dist-gpt launch reads the job ID itself",
    "test-only": "use --dry-run",
}
"""Option of sbatch that launch.slurm.options may not hold -> advice on what to use instead."""

LEAST_S = 120
"""Shortest time in seconds of a Slurm job beyond launch.grace_s: Slurm may warn a minute earlier than asked, and before
that, ranks have to start and do a step or two."""


def has_control(text: str) -> bool:
    """Return whether `text` holds a line break or another control character."""
    return any(unicodedata.category(c) in ("Cc", "Zl", "Zp") for c in text)


def launch_problems(config: Config) -> list[str]:
    """Return the problems of values that a shell, sbatch or the system would not accept as they are."""
    launch, s = config.launch, config.launch.slurm
    found = []
    for name, value in launch.env.items():
        if not re.fullmatch(VARIABLE, name):
            found.append(f"launch.env: {name!r} is not a valid variable name; use letters, digits and '_', and "
                         "do not begin with a digit")  # fmt: skip
        if "\0" in value:
            found.append(f"launch.env: the value of {name!r} contains a NUL character, which a variable cannot "
                         "hold; remove it")  # fmt: skip
    texts = [(f"launch.slurm.{key}", getattr(s, key)) for key in ("partition", "account", "qos", "constraint")]
    texts += [("launch.modules", module) for module in launch.modules]
    texts += [(f"launch.slurm.options.{option}", value) for option, value in s.options.items()]
    for key, text in texts:
        if text is not None and has_control(text):
            found.append(f"{key}: {text!r} contains a line break or another control character; remove it")
        elif not text and text is not None and ".options." not in key:
            found.append(f"{key}: an empty text is not allowed; remove it")
    found += _time(config)
    for option in s.options:
        if not re.fullmatch(SLURM_OPTION, option):
            found.append(f"launch.slurm.options: {option!r} is not a long sbatch option; write its long name without "
                         "dashes in front, for example mail-type")  # fmt: skip
        elif option in SLURM_OURS:
            found.append(f"launch.slurm.options: {option} is set by dist-gpt itself; {SLURM_OURS[option]}")
    if launch.interface is not None and not re.fullmatch(r"[A-Za-z0-9_.:@-]{1,15}", launch.interface):
        found.append(f"launch.interface: {launch.interface!r} is not a valid name of a network interface; write one "
                     "such as eth0")  # fmt: skip
    if launch.interface == "lo" and launch.nodes > 1:
        found.append(f"launch.interface: lo is the loopback interface, which cannot connect {launch.nodes} nodes; "
                     "remove the key, or name the interface between the nodes")  # fmt: skip
    return found


def slurm_seconds(time: str) -> int | None:
    """Return the seconds of a Slurm time (M, M:SS, H:MM:SS, D-H, D-H:MM, D-H:MM:SS), or None if it is not one."""
    if not re.fullmatch(SLURM_TIME, time, re.ASCII):
        return None
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash or len(parts) == 3:
        hours, minutes, seconds = (parts + [0, 0])[:3]
    else:
        hours, (minutes, seconds) = 0, (parts + [0])[:2]
    return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds


def _time(config: Config) -> list[str]:
    """Return the problems of the job's time: a form that Slurm does not read, or too short for a warning."""
    time, grace_s = config.launch.slurm.time, config.launch.grace_s
    if time is None:
        return []
    seconds = slurm_seconds(time)
    if seconds is None:
        return [f"launch.slurm.time: {time!r} is not a Slurm time; write minutes, H:MM:SS or D-H:MM:SS"]
    if seconds and seconds < grace_s + LEAST_S:  # 0: no limit, where the partition allows it
        return [
            f"launch.slurm.time {time} is {seconds} s, too short with launch.grace_s {grace_s:g}: Slurm warns the "
            "job that long before its end, or up to a minute earlier, so the job would save and be requeued right "
            f"after each start; set time to at least {-int(-(grace_s + LEAST_S) // 60)} minutes, or reduce "
            "grace_s as far as a save still fits into it"
        ]
    return []
