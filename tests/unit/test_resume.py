"""What `--resume` means for a run directory, before anything is started: folders and manifests alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dist_gpt.checkpoint.manifest import File, Manifest, shared_config
from dist_gpt.checkpoint.resume import Finished, candidates, finished, resolve
from dist_gpt.config.errors import ConfigError
from dist_gpt.config.load import load
from dist_gpt.config.schema import Config
from dist_gpt.rundir import Resume
from launch.run import create_run_dir, fill_run_dir, make_run_dir


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load("demo", [f"run_dir={tmp_path / 'run'}"])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def checkpoint(config: Config, run_dir: Path, step: int, name: str | None = None) -> Path:
    """A checkpoint of one rank as it looks from outside."""
    folder = run_dir / "checkpoints" / (name or f"step_{step:08d}")
    folder.mkdir(parents=True)
    (folder / "rank00000.safetensors").write_bytes(b"12345")
    files = (File("rank00000.safetensors", 5, "0" * 64),)
    (folder / "manifest.json").write_text(Manifest(step, 1, {}, shared_config(config), files, {}).text())
    return folder


def begin(config: Config, resume: str | Path, again: bool = False) -> Resume:
    """What a command does before ranks start."""
    asked = resolve(str(resume), Path(str(config.run_dir)), config, again)
    make_run_dir(config, asked.goes_on)
    fill_run_dir(config, {}, asked)
    return asked


def auto(run_dir: Path) -> list[Path]:
    return candidates("auto", run_dir)[0]


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_auto_begins_or_goes_on(config: Config, run: Path) -> None:
    assert resolve("auto", run, config) == Resume(True) and auto(run) == []
    assert resolve(None, run, config) == Resume(False)
    begin(config, "auto")
    one, two = checkpoint(config, run, 1), checkpoint(config, run, 2)
    assert auto(run) == [two, one] and not (run / "resume_from").exists()
    assert begin(config, run) == Resume(True), "its own folder is auto"


def test_a_new_run_notes_where_it_branches_from(
    config: Config, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From then on it is not gone back to, however often it is started."""
    origin = checkpoint(config, tmp_path / "other", 5)
    checkpoint(config, tmp_path / "other", 9)
    monkeypatch.chdir(tmp_path)
    assert begin(config, "other/checkpoints/step_00000005") == Resume(False, origin)
    assert (run / "resume_from").read_text() == f"{origin}\n" and auto(run) == [origin]
    begin(config, "auto")
    assert auto(run) == [origin]
    own = checkpoint(config, run, 6)
    assert auto(run) == [own, origin]
    assert begin(config, origin, again=True) == Resume(True), "torchrun's second start has the same command line"
    assert auto(run)[0] == own


def test_back_to_an_older_one_of_its_own(config: Config, run: Path) -> None:
    """Nothing is left that a restart could take for newer, whenever it comes."""
    old, new = (checkpoint(config, run, step) for step in (10, 20))
    asked = begin(config, old)
    assert asked == Resume(True, old, (new,)) and candidates("auto", run) == ([old], False)
    aside = names(run)[0]
    assert aside.startswith("aside-step_00000020-") and names(run)[1:] == ["step_00000010"]
    later = checkpoint(config, run, 15)
    assert begin(config, old, again=True) == Resume(True) and auto(run) == [later, old]
    assert begin(config, run / "checkpoints" / aside).newer == ()
    assert auto(run) == [run / "checkpoints" / aside], "what was set aside is there to be gone back to"
    again = checkpoint(config, run, 30)
    assert auto(run)[0] == again


def test_other_nodes_are_another_sharding_where_a_node_shares_state(config: Config, run: Path) -> None:
    def on(nodes: int) -> Config:
        sets = ["parallel.dp=4", "parallel.tp=1", "optim.shard_group=node", f"launch.nodes={nodes}", f"run_dir={run}"]
        return load("demo", sets)

    folder = checkpoint(on(1), run, 10)
    assert resolve("auto", run, on(1)) == Resume(True)
    told = r"optim\.shard_ranks: the checkpoint .* has 4, this run has 2; resume with the same launch\.nodes"
    with pytest.raises(ConfigError, match=told) as caught:
        resolve("auto", run, on(4))
    assert len(caught.value.problems) == 1
    assert resolve("auto", run, on(2)) == Resume(True), "two nodes of one stage each: a stage's data ranks are together"
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["config"]["optim"]["shard_ranks"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert resolve("auto", run, on(4)) == Resume(True), "written before it was noted: the tensors decide"


def test_torchruns_restart_before_the_first_start_did_anything(config: Config, run: Path) -> None:
    old, new = (checkpoint(config, run, step) for step in (10, 20))
    assert begin(config, old, again=True).newer == (new,)


@pytest.mark.parametrize("exists", ["empty", "a run"])
def test_an_existing_directory_is_not_written_into_from_elsewhere(
    exists: str, config: Config, run: Path, tmp_path: Path
) -> None:
    origin = checkpoint(config, tmp_path / "other", 5)
    if exists == "a run":
        create_run_dir(config, {})
    else:
        run.mkdir()
    told = "already exists" if exists == "empty" else "already exists.*--resume auto continues the run in it"
    before = sorted(run.rglob("*"))
    with pytest.raises(ConfigError, match=told):
        begin(config, origin)
    with pytest.raises(ConfigError, match="neither a checkpoint"):
        begin(config, run / "checkpoints")
    assert sorted(run.rglob("*")) == before


def test_what_is_cut_is_refused_before_anything_is_set_aside(config: Config, run: Path) -> None:
    old, _ = checkpoint(config, run, 10), checkpoint(config, run, 20)
    (old / "rank00000.safetensors").write_bytes(b"1234")
    with pytest.raises(ConfigError, match="rank00000.safetensors has 4 bytes, 5 were written"):
        begin(config, old)
    (old / "rank00000.safetensors").unlink()
    with pytest.raises(ConfigError, match="rank00000.safetensors is missing"):
        begin(config, old)
    assert names(run) == ["step_00000010", "step_00000020"]


def test_a_branch_that_is_gone(config: Config, run: Path, tmp_path: Path) -> None:
    origin = checkpoint(config, tmp_path / "other", 5)
    begin(config, origin)
    origin.rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"run/resume_from names .*step_00000005: neither a checkpoint"):
        resolve("auto", run, config)
    own = checkpoint(config, run, 6)
    assert auto(run) == [own]


def test_a_branch_in_its_own_past_that_is_gone(config: Config, run: Path) -> None:
    oldest, old = checkpoint(config, run, 5), checkpoint(config, run, 10)
    begin(config, old)
    old.rename(run / "elsewhere")
    assert auto(run) == [oldest]


def test_another_order_of_batches_is_refused(config: Config, run: Path, tmp_path: Path) -> None:
    origin = checkpoint(config, tmp_path / "other", 5)
    other = load("demo", [f"run_dir={run}", "data.seed=3"])
    with pytest.raises(ConfigError, match=r"data\.seed: the checkpoint .* has 0, this run has 3"):
        resolve(str(origin), run, other)
    assert "tokens" not in json.loads((origin / "manifest.json").read_text())["config"]["data"]


def test_how_the_last_attempt_ended_goes(config: Config, run: Path) -> None:
    """Whoever follows a job must not take it for the end of this one."""
    create_run_dir(config, {})
    (run / "exit.json").write_text('{"code": 1}')
    create_run_dir(config, {}, resume=True)
    assert not (run / "exit.json").exists()


def trained(run_dir: Path, steps: int, code: int | None) -> None:
    """What is left of an attempt that did some steps and saved nothing; code None: it was killed."""
    rows = [{"step": 0, "val_loss": 5.0}, *({"step": step, "loss": 5.0} for step in range(1, steps + 1))]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if code is not None:
        (run_dir / "exit.json").write_text(json.dumps({"code": code, "why": "why", "step": steps}))


def test_what_was_trained_is_not_written_over(config: Config, run: Path) -> None:
    """Without a checkpoint `auto` begins at the start: only where it is the same run once more that came to nothing."""
    create_run_dir(config, {})
    other = load("demo", [f"run_dir={run}", "optim.lr=0.5"])
    trained(run, 0, 1)
    assert begin(other, "auto") == Resume(True), "nothing was trained"
    trained(run, 3, None)
    assert begin(other, "auto") == Resume(True), "killed before its first checkpoint"
    trained(run, 3, 75)
    assert resolve("auto", run, other) == Resume(True)
    before = (run / "config.yaml").read_text()
    for code, one, told in ((None, config, "of another configuration"), (75, config, "of another configuration"),
                            (0, other, "its training is finished")):  # fmt: skip
        (run / "exit.json").unlink(missing_ok=True)
        trained(run, 3, code)
        with pytest.raises(ConfigError, match=f"no checkpoint to resume from, and .*{told}.*--set run_dir="):
            begin(one, "auto")
        assert (run / "config.yaml").read_text() == before
    assert resolve("auto", run, other, again=True) == Resume(True), "torchrun's own restart"
    (run / "config.yaml").write_text("what: 1\n")
    with pytest.raises(ConfigError, match="of another configuration"):
        resolve("auto", run, other)
    checkpoint(config, run, 2)
    assert resolve("auto", run, config) == Resume(True), "there is something to go on from"


def test_a_finished_run_is_known(config: Config, run: Path, tmp_path: Path) -> None:
    steps = config.train.steps
    assert finished(run, config) is None
    create_run_dir(config, {})
    trained(run, steps, 0)
    assert finished(run, config) == Finished(steps, 0, ""), "of a run that saves nothing"
    assert finished(run, load("demo", [f"run_dir={run}", "optim.lr=0.5"])) is None, "another run"
    trained(run, steps, 75)
    assert finished(run, config) is None
    (run / "exit.json").unlink()
    assert finished(run, config) is None
    checkpoint(config, run, steps - 1)
    assert finished(run, config) is None
    last = checkpoint(config, run, steps)
    assert finished(run, config) == Finished(steps, 0, "")
    assert finished(run, load("demo", [f"run_dir={run}", f"train.steps={steps + 1}"])) is None
    with pytest.raises(ConfigError, match="model.num_layers"):
        finished(run, load("demo", [f"run_dir={run}", "model.num_layers=8"]))
    trained(run, steps, 1)
    assert finished(run, config) == Finished(steps, 1, "why"), "its verdict stays"
    (last / "rank00000.safetensors").write_bytes(b"1")
    assert finished(run, config) is None, "the one before it is gone on from"
