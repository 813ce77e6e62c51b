"""Checkpoints on the disk: what a crash or a full disk leaves, and what is read back."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dist_gpt.checkpoint import store as store_module
from dist_gpt.checkpoint.store import CheckpointError, Checkpoints, Loaded, Saved
from dist_gpt.config.errors import ConfigError
from dist_gpt.config.schema import Config
from tests.ranks.resuming import config_of, env_of
from tests.ranks.threads import RankFailed, in_threads

WORLD = 3
POINTS = ("write", "written", "manifest", "rename")


class Killed(BaseException):
    """Nothing of ours catches it: what is on the disk stays as it is, as when the process is killed."""


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return config_of(tmp_path)


def tensors(step: int, rank: int = 0) -> dict[str, Tensor]:
    """Not everything that a float can be is a number."""
    odd = torch.tensor([float("nan"), -0.0, 5e-324, float("inf")], dtype=torch.float64)
    return {"a.b": odd, "c": torch.full((3, 2), 10.0 * step + rank), "step": torch.tensor(float(step))}


def checkpoints(
    config: Config, folder: Path, rank: int = 0, world: int = 1, store: dist.Store | None = None,
    data: str = "d",
) -> Checkpoints:  # fmt: skip
    return Checkpoints(config, folder, data, store or dist.HashStore(), env_of(rank, world))


def save(config: Config, folder: Path, *steps: int) -> list[Saved]:
    """By one rank."""
    found = checkpoints(config, folder)
    return [found.save(step, tensors(step), {"skipped": step}) for step in steps]


def load(config: Config, folder: Path, resume: str = "auto", data: str = "d") -> Loaded | None:
    return checkpoints(config, folder, data=data).load(resume)


def branch(folder: Path, origin: Path) -> None:
    """As whoever makes the run directory notes it."""
    folder.mkdir(exist_ok=True)
    (folder / "resume_from").write_text(f"{origin}\n")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def bits(found: dict[str, Tensor]) -> dict[str, tuple[torch.Size, bytes]]:
    return {name: (t.shape, t.contiguous().numpy().tobytes()) for name, t in found.items()}


class TestWhole:
    def test_three_ranks_read_what_they_wrote(self, config: Config, tmp_path: Path) -> None:
        store = dist.HashStore()

        def body(rank: int) -> tuple[Saved, Loaded | None]:
            mine = checkpoints(config, tmp_path, rank, WORLD, store=store)
            saved = mine.save(7, tensors(7, rank), {"skipped": 2})
            return saved, checkpoints(config, tmp_path, rank, WORLD, store=store).load("auto")

        for rank, (saved, loaded) in enumerate(in_threads(WORLD, body)):
            assert loaded is not None and (loaded.step, loaded.trainer, loaded.notes) == (7, {"skipped": 2}, [])
            assert saved.path == loaded.path == tmp_path / "checkpoints" / "step_00000007"
            assert bits(loaded.tensors) == bits(tensors(7, rank))
        folder = tmp_path / "checkpoints" / "step_00000007"
        files = [f"rank0000{rank}.safetensors" for rank in range(WORLD)]
        assert sorted(p.name for p in folder.iterdir()) == ["manifest.json", *files]
        manifest = json.loads((folder / "manifest.json").read_text())
        assert (manifest["schema"], manifest["step"], manifest["world"]) == (1, 7, WORLD)
        assert [f["name"] for f in manifest["files"]] == files
        assert saved.bytes == sum((folder / name).stat().st_size for name in files)
        assert set(manifest["config"]["train"]) == {"global_batch", "micro_batch", "seed", "dtype"}

    def test_the_newest_are_kept(self, config: Config, tmp_path: Path) -> None:
        save(config, tmp_path, 1, 2, 3, 4)
        assert names(tmp_path) == ["step_00000003", "step_00000004"]

    def test_none(self, config: Config, tmp_path: Path) -> None:
        assert load(config, tmp_path) is None

    def test_the_same_step_again_does_not_write_over_it(self, config: Config, tmp_path: Path) -> None:
        save(config, tmp_path, 1)
        save(config, tmp_path, 1)
        aside, kept = names(tmp_path)
        assert kept == "step_00000001" and aside.startswith("aside-step_00000001-")


class TestBroken:
    """Step 2 is damaged; step 1 is whole."""

    def flip(self, folder: Path) -> str:
        path = folder / "rank00000.safetensors"
        data = bytearray(path.read_bytes())
        data[-5] ^= 1
        path.write_bytes(data)
        return "rank00000.safetensors is not what was written (sha256 differs)"

    def cut(self, folder: Path) -> str:
        path = folder / "rank00000.safetensors"
        size = path.stat().st_size
        path.write_bytes(path.read_bytes()[:-1])
        return f"rank00000.safetensors has {size - 1} bytes, {size} were written"

    def lose(self, folder: Path) -> str:
        (folder / "rank00000.safetensors").unlink()
        return "rank00000.safetensors is missing"

    def lose_manifest(self, folder: Path) -> str:
        (folder / "manifest.json").unlink()
        return "manifest.json: no such file"

    def spoil_manifest(self, folder: Path) -> str:
        (folder / "manifest.json").write_text("{")
        return "manifest.json: not a checkpoint manifest"

    def lead_away(self, folder: Path) -> str:
        tree = json.loads((folder / "manifest.json").read_text())
        tree["files"][0]["name"] = "../step_00000001/rank00000.safetensors"
        (folder / "manifest.json").write_text(json.dumps(tree))
        return "manifest.json: does not name one file for each of 1 ranks"

    @pytest.mark.parametrize("damage", ["flip", "cut", "lose", "lose_manifest", "spoil_manifest", "lead_away"])
    def test_the_one_before_is_taken(self, damage: str, config: Config, tmp_path: Path) -> None:
        save(config, tmp_path, 1, 2)
        folder = tmp_path / "checkpoints" / "step_00000002"
        why = getattr(self, damage)(folder)
        with pytest.raises(ConfigError, match="the checkpoint is broken") as refused:
            load(config, tmp_path, str(folder))
        assert why in str(refused.value)
        loaded = load(config, tmp_path)
        assert loaded is not None and loaded.step == 1 and bits(loaded.tensors) == bits(tensors(1))
        assert loaded.notes[0].startswith(f"checkpoint {folder} is broken and skipped: {folder}/{why}")
        assert "moved to aside-step_00000002-" in loaded.notes[1] and len(loaded.notes) == 2
        save(config, tmp_path, 2)
        again = load(config, tmp_path)
        assert again is not None and again.step == 2 and again.notes == []

    def test_no_rank_takes_it_when_one_cannot(self, config: Config, tmp_path: Path) -> None:
        store = dist.HashStore()

        def body(rank: int) -> Loaded | None:
            mine = checkpoints(config, tmp_path, rank, WORLD, store=store)
            for step in (1, 2):
                mine.save(step, tensors(step, rank), {})
            if rank == 2:
                self.flip_of(tmp_path / "checkpoints" / "step_00000002" / "rank00002.safetensors")
            return mine.load("auto")

        for loaded in in_threads(WORLD, body):
            assert loaded is not None and loaded.step == 1 and "step_00000002/rank00002.safe" in loaded.notes[0]

    def flip_of(self, path: Path) -> None:
        path.write_bytes(path.read_bytes()[:-1] + b"\x55")

    def test_when_none_is_whole_nothing_starts_from_the_beginning(self, config: Config, tmp_path: Path) -> None:
        save(config, tmp_path, 1)
        self.flip(tmp_path / "checkpoints" / "step_00000001")
        with pytest.raises(ConfigError, match=r"--resume auto: no checkpoint is intact\. .*sha256 differs"):
            load(config, tmp_path)


class TestPaths:
    def test_neither_a_checkpoint_nor_a_run(self, config: Config, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="neither a checkpoint"):
            load(config, tmp_path, str(tmp_path / "nowhere"))

    def test_a_run_directory(self, config: Config, tmp_path: Path) -> None:
        save(config, tmp_path / "other", 1, 2)
        loaded = load(config, tmp_path / "mine", str(tmp_path / "other"))
        assert loaded is not None and loaded.step == 2

    def test_auto_is_where_the_run_branches_from_until_it_has_its_own(self, config: Config, tmp_path: Path) -> None:
        save(config, tmp_path / "other", 2)
        branch(tmp_path / "mine", tmp_path / "other" / "checkpoints" / "step_00000002")
        for _ in range(2):  # it died before its first save
            loaded = load(config, tmp_path / "mine")
            assert loaded is not None and loaded.step == 2
        save(config, tmp_path / "mine", 3)
        loaded = load(config, tmp_path / "mine")
        assert loaded is not None and (loaded.step, loaded.notes) == (3, [])
        shutil.rmtree(tmp_path / "other")
        loaded = load(config, tmp_path / "mine")
        assert loaded is not None and loaded.step == 3

    def test_behind_a_broken_one_comes_where_the_run_branches_from(self, config: Config, tmp_path: Path) -> None:
        save(config, tmp_path / "other", 2)
        branch(tmp_path / "mine", tmp_path / "other")
        save(config, tmp_path / "mine", 3)
        (tmp_path / "mine" / "checkpoints" / "step_00000003" / "rank00000.safetensors").unlink()
        loaded = load(config, tmp_path / "mine")
        assert loaded is not None and loaded.step == 2 and "step_00000003 is broken" in loaded.notes[0]

    def test_a_branch_in_its_own_past_is_taken_or_refused(self, config: Config, tmp_path: Path) -> None:
        save(config, tmp_path, 1, 2)
        own = tmp_path / "checkpoints" / "step_00000002"
        branch(tmp_path, own)
        data = (own / "rank00000.safetensors").read_bytes()
        (own / "rank00000.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(ConfigError, match="the checkpoint is broken"):
            load(config, tmp_path)
        save(config, tmp_path, 3)
        loaded = load(config, tmp_path)
        assert loaded is not None and loaded.step == 3

    def test_another_order_of_batches(self, config: Config, tmp_path: Path) -> None:
        save(config, tmp_path, 1)
        other = config_of(tmp_path, data={"seed": 7})
        with pytest.raises(ConfigError, match=r"data\.seed: the checkpoint .* has 0, this run has 7"):
            load(other, tmp_path)
        path = tmp_path / "checkpoints" / "step_00000001" / "manifest.json"
        manifest = json.loads(path.read_text())
        del manifest["config"]["data"]["seed"], manifest["steps"]
        path.write_text(json.dumps(manifest))
        loaded = load(other, tmp_path)  # written before seeds were noted: who knows
        assert loaded is not None and loaded.notes == []

    def test_a_checkpoint_from_before_epochs(self, config: Config, tmp_path: Path) -> None:
        """The manifest names no order: windows were drawn with replacement, and the run can only continue that way."""
        save(config, tmp_path, 1)
        path = tmp_path / "checkpoints" / "step_00000001" / "manifest.json"
        manifest = json.loads(path.read_text())
        del manifest["config"]["data"]["order"]
        path.write_text(json.dumps(manifest))
        said = r'data\.order: the checkpoint .* has "replacement", this run has "epochs"; resume with '
        with pytest.raises(ConfigError, match=said + "data.order=replacement, or start another run"):
            load(config, tmp_path)
        loaded = load(config_of(tmp_path, data={"order": "replacement"}), tmp_path)
        assert loaded is not None and loaded.step == 1

    @pytest.mark.parametrize("decay", ["cosine", "none"])
    def test_another_end_is_another_learning_rate(self, decay: str, tmp_path: Path) -> None:
        mine, longer = (config_of(tmp_path, optim={"decay": decay}, train={"steps": steps}) for steps in (6, 8))
        save(mine, tmp_path, 1)
        loaded = load(longer, tmp_path)
        assert loaded is not None and load(mine, tmp_path).notes == []
        assert loaded.notes == ([] if decay == "none" else [
            "train.steps: the checkpoint's run had 6, this one has 8; optim.decay cosine ends at the last step, so "
            "from step 2 on the learning rate is different"
        ])  # fmt: skip

    def test_other_tokens(self, config: Config, tmp_path: Path) -> None:
        save(config, tmp_path, 1)
        with pytest.raises(ConfigError, match=r'data\.tokens: the checkpoint .* has "d", this run has "e"'):
            load(config, tmp_path, data="e")


class TestDeath:
    @pytest.mark.parametrize("point", POINTS)
    def test_while_saving(self, point: str, config: Config, tmp_path: Path) -> None:
        """Wherever it dies, the checkpoint before is loaded, and what is left over goes with the next save."""
        save(config, tmp_path, 1)
        dies = checkpoints(config, tmp_path)

        def at(now: str) -> None:
            if now == point:
                raise Killed

        dies.at = at
        with pytest.raises(Killed):
            dies.save(2, tensors(2), {})
        [left, first] = names(tmp_path)
        assert first == "step_00000001" and left.startswith(".step_00000002.tmp-")
        loaded = load(config, tmp_path)
        assert loaded is not None and loaded.step == 1 and loaded.notes == []
        save(config, tmp_path, 2)
        assert names(tmp_path) == ["step_00000001", "step_00000002"]

    def test_in_the_middle_of_a_file(self, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        save(config, tmp_path, 1)

        def half(path: Path, data: bytes) -> None:
            path.write_bytes(data[: len(data) // 2])
            raise Killed

        monkeypatch.setattr(store_module, "_write_synced", half)
        with pytest.raises(Killed):
            save(config, tmp_path, 2)
        loaded = load(config, tmp_path)
        assert loaded is not None and loaded.step == 1

    def test_while_removing_an_old_one(self, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        save(config, tmp_path, 1, 2)

        def dies(path: Path, **_: object) -> None:
            next(path.iterdir()).unlink()
            raise Killed

        monkeypatch.setattr(shutil, "rmtree", dies)
        with pytest.raises(Killed):
            save(config, tmp_path, 3)
        monkeypatch.undo()
        assert [name for name in names(tmp_path) if name.startswith("step")] == ["step_00000002", "step_00000003"]
        save(config, tmp_path, 4)
        assert names(tmp_path) == ["step_00000003", "step_00000004"]


class TestFailedWrite:
    def test_no_space_on_one_rank_is_told_by_all(self, config: Config, tmp_path: Path) -> None:
        store = dist.HashStore()

        def body(rank: int) -> str:
            mine = checkpoints(config, tmp_path, rank, WORLD, store=store)
            mine.save(1, tensors(1, rank), {})
            if rank == 1:
                mine.at = no_space
            with pytest.raises(CheckpointError) as caught:
                mine.save(2, tensors(2, rank), {})
            loaded = mine.load("auto")
            assert loaded is not None and loaded.step == 1
            return str(caught.value)

        def no_space(point: str) -> None:
            raise OSError(28, "No space left on device", "/disk/file")

        said = set(in_threads(WORLD, body))
        assert len(said) == 1
        [text] = said
        assert text.startswith("checkpoint of step 2: rank 1 on ")
        assert text.endswith(", /disk/file: No space left on device (errno 28)")
        assert names(tmp_path) == ["step_00000001"]

    @pytest.mark.parametrize("limit", [0, 100])
    def test_a_file_that_the_system_does_not_take(self, limit: int, config: Config, tmp_path: Path) -> None:
        """A limit on the size of files, as a quota is: the write itself fails."""
        save(config, tmp_path, 1)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            with pytest.raises(CheckpointError, match=r"rank 0 on .*tmp-.*/rank00000.safetensors: .*\(errno 27\)"):
                save(config, tmp_path, 2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert names(tmp_path) == ["step_00000001"]
        assert load(config, tmp_path) is not None

    def test_a_folder_that_only_some_see(self, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(store_module, "VISIBLE_S", 0.1)
        store, local = dist.HashStore(), tmp_path / "local"

        def body(rank: int) -> None:
            mine = checkpoints(config, local if rank else tmp_path, rank, 2, store=store)
            mine.folder.mkdir(parents=True)
            with pytest.raises(CheckpointError, match="rank 1 has written .*all nodes share"):
                mine.save(1, tensors(1, rank), {})

        in_threads(2, body)

    def test_nothing_is_raised_on_one_rank_alone(self, config: Config, tmp_path: Path) -> None:
        """A bug in one rank's part is told to all as well."""
        store = dist.HashStore()

        def body(rank: int) -> Callable[[], object]:
            mine = checkpoints(config, tmp_path, rank, 2, store=store)
            wrong = {"a": torch.ones(1).to_sparse()} if rank else tensors(1)
            mine.save(1, wrong, {})
            return lambda: None

        with pytest.raises(RankFailed, match="rank 0: checkpoint of step 1: rank 1 on "):
            in_threads(2, body)
