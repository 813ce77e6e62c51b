"""Start the ranks of `dist-gpt verify` (gloo, CPU) on this machine and collect the certificate."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from dist_gpt.config.deepspeed import require_native
from dist_gpt.config.errors import ConfigError
from dist_gpt.config.load import dump, problems
from dist_gpt.config.schema import Config
from dist_gpt.plan.count import total_parameters
from dist_gpt.plan.shrink import MAX_WORLD, certificate_config
from dist_gpt.plan.steps import layout_of
from launch.spec import WORKER, JobSpec
from launch.starters.local import launch_local


class VerifyError(RuntimeError):
    """Failure of a rank, so that there is no certificate; the rank's log has been shown."""


def verify(config: Config, full: bool) -> dict[str, Any]:
    """Return the certificate of `config`, shrunk unless `full`; `changed` says what differs from the given `config`.

    Raise ConfigError if it cannot be run, VerifyError if a rank fails.
    """
    require_native(config, "the certificate is")
    small, notes = certificate_config(config, full, total_parameters(config))
    found = problems(small)
    if small.world_size > MAX_WORLD and full:
        found.append(
            f"--full: a world of {small.world_size} ranks is more than the limit of {MAX_WORLD} processes; omit --full"
        )
    if found:
        raise ConfigError(found)
    with tempfile.TemporaryDirectory(prefix="dist-gpt-verify-") as folder:
        path = Path(folder)
        (path / "config.yaml").write_text(dump(small))
        layout = layout_of(small)
        job = JobSpec(
            argv=(sys.executable, *WORKER, "dist_gpt.verify", str(path)),
            ranks=layout.world,
            log_dir=path / "logs",
            env={"CUDA_VISIBLE_DEVICES": ""},
            layout=layout,
            live_on_stderr=True,
            preload=("torch._dynamo",),  # the dry run imports it
        )
        (path / "logs").mkdir()
        code = launch_local(job)
        if code != 0:
            raise VerifyError(f"the certificate's ranks exited with code {code}")
        document: dict[str, Any] = json.loads((path / "certificate.json").read_text())
    return {"verdict": document.pop("verdict"), "changed": notes, **document}
