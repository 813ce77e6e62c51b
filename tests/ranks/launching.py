"""Launch ranks of any program: `python -m tests.ranks.launching SPEC.json`, the fields of a JobSpec."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from launch.spec import JobSpec
from launch.starters.local import launch_local

if __name__ == "__main__":
    fields = json.loads(Path(sys.argv[1]).read_text())
    fields |= {"argv": tuple(fields["argv"]), "log_dir": Path(fields["log_dir"]), "preload": tuple(fields["preload"])}
    sys.exit(launch_local(JobSpec(**fields)))
