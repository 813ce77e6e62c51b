"""What a shell, sbatch or a name of the system would not take of the section `launch`, as sentences."""

from __future__ import annotations

import re
import unicodedata

from dist_gpt.config.schema import Config

VARIABLE = r"[A-Za-z_][A-Za-z0-9_]*"
"""A variable's name, for a shell."""
SLURM_OPTION = r"[a-z][a-z0-9]*(-[a-z0-9]+)*"
"""A long option of sbatch."""
SLURM_TIME = r"[0-9]+|[0-9]+:[0-9]{1,2}(:[0-9]{1,2})?|[0-9]+-[0-9]{1,2}(:[0-9]{1,2}){0,2}"
SLURM_OURS = {
    "job-name": "name it with the key name",
    "chdir": "submit from the folder you want",
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
    "array": "write a script of your own, see slurm/array.sbatch",
    "wait": "dist-gpt launch follows the job itself",
    "parsable": "dist-gpt launch reads the job's number itself",
    "test-only": "use --dry-run",
}
"""Options of sbatch that launch.slurm.options may not hold -> what to use instead."""

LEAST_S = 120
"""Of a Slurm job's time, beside launch.grace_s: Slurm may warn a minute earlier than asked for, and ranks have to start
and do a step or two before."""


def has_control(text: str) -> bool:
    """Whether there is a line break or another control character in it."""
    return any(unicodedata.category(c) in ("Cc", "Zl", "Zp") for c in text)


def launch_problems(config: Config) -> list[str]:
    """Values that a shell, sbatch or a name of the system would not take as they are."""
    launch, s = config.launch, config.launch.slurm
    found = []
    for name, value in launch.env.items():
        if not re.fullmatch(VARIABLE, name):
            found.append(f"launch.env: {name!r} is no name of a variable; use letters, digits and '_'")
        if "\0" in value:
            found.append(f"launch.env: the value of {name!r} holds a NUL character, which no variable can; take it out")
    texts = [(f"launch.slurm.{key}", getattr(s, key)) for key in ("partition", "account", "qos", "constraint")]
    texts += [("launch.modules", module) for module in launch.modules]
    texts += [(f"launch.slurm.options.{option}", value) for option, value in s.options.items()]
    for key, text in texts:
        if text is not None and has_control(text):
            found.append(f"{key}: {text!r} holds a line break or another control character; take it out")
        elif not text and text is not None and ".options." not in key:
            found.append(f"{key}: an empty text is no value; take the key out")
    found += _time(config)
    for option in s.options:
        if not re.fullmatch(SLURM_OPTION, option):
            found.append(f"launch.slurm.options: {option!r} is no long option of sbatch, for example mail-type")
        elif option in SLURM_OURS:
            found.append(f"launch.slurm.options: {option} is set by dist-gpt itself; {SLURM_OURS[option]}")
    if launch.interface is not None and not re.fullmatch(r"[A-Za-z0-9_.:@-]{1,15}", launch.interface):
        found.append(f"launch.interface: {launch.interface!r} is no name of a network interface, for example eth0")
    if launch.interface == "lo" and launch.nodes > 1:
        found.append(f"launch.interface: lo is loopback, which {launch.nodes} nodes cannot meet over; take it out, or "
                     "name the interface between the nodes")  # fmt: skip
    return found


def slurm_seconds(time: str) -> int | None:
    """Seconds of a time as Slurm reads it (M, M:SS, H:MM:SS, D-H, D-H:MM, D-H:MM:SS); None where it is none."""
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
    """The job's time: as Slurm writes it, and long enough to be warned in."""
    time, grace_s = config.launch.slurm.time, config.launch.grace_s
    if time is None:
        return []
    seconds = slurm_seconds(time)
    if seconds is None:
        return [f"launch.slurm.time: {time!r} is no time of Slurm's; write minutes, H:MM:SS or D-H:MM:SS"]
    if seconds and seconds < grace_s + LEAST_S:  # 0: without an end, where the partition allows it
        return [
            f"launch.slurm.time {time} is {seconds} s, too short with launch.grace_s {grace_s:g}: Slurm warns that "
            "long before the end, or a minute earlier, so the job would save and go back to the queue as soon as it "
            f"has started, again and again; set time to at least {-int(-(grace_s + LEAST_S) // 60)} minutes, or a "
            "smaller grace_s that a save still fits into"
        ]
    return []
