"""What a person writes: files, presets, keys and values; each mistake is explained and all are reported at once."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dist_gpt.config import explain, yaml_io
from dist_gpt.config.load import ConfigError, config_hash, dump, load, presets, problems
from dist_gpt.plan.api import plan_document
from tests.patience import PATIENCE_S

SMALL = """\
model: {num_layers: 4, hidden_size: 128, num_heads: 4, seq_len: 16}
train: {steps: 10, global_batch: 8}
"""


@pytest.fixture
def small(tmp_path: Path) -> str:
    return write(tmp_path, SMALL)


def write(folder: Path, text: str) -> str:
    file = folder / "run.yaml"
    file.write_text(text, encoding="utf-8")
    return str(file)


def refused(path: str, overrides: list[str] | None = None, world: int | None = None) -> list[str]:
    """The problems `load` raises."""
    with pytest.raises(ConfigError) as caught:
        load(path, overrides or [], world)
    assert all("\n" not in problem for problem in caught.value.problems)
    return caught.value.problems


# --- what is written wrongly -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.num_heads=x", "model.num_heads: got 'x' (str), expected an integer >= 1"),
        ("model.num_heads=0", "model.num_heads: got 0 (int), expected an integer >= 1"),
        ("model.num_heads=2.0", "model.num_heads: got 2.0 (float), expected an integer >= 1"),
        ("model.num_heads=true", "model.num_heads: got true (bool), expected an integer >= 1"),
        ("model.num_heads=", "model.num_heads: got null, expected an integer >= 1"),
        ("model.num_kv_heads='4'", "model.num_kv_heads: got '4' (str), expected an integer >= 1 or null"),
        ("model.bias=yes", "model.bias: got 'yes' (str), expected true or false"),
        ("model.dropout=1", "model.dropout: got 1 (int), expected a number >= 0 and < 1"),
        ("parallel.schedule=zb", "parallel.schedule: got 'zb' (str), expected one of gpipe, 1f1b, interleaved"),
        ("train.loss_scale=0.5", "train.loss_scale: got 0.5 (float), expected a number >= 1 and <= 4294967296"),
        ("optim.lr=1e999", "optim.lr: got '1e999' (str), expected a number > 0"),
        ("optim.lr=.inf", "optim.lr: got '.inf' (str), expected a number > 0"),
        ("optim.lr=.nan", "optim.lr: got '.nan' (str), expected a number > 0"),
        ("optim.betas=[0.9]", "optim.betas: got [0.9] (list), expected a list of 2 values, each a number >= 0 and < 1"),
        ("model.norm=rms", "model.norm: got 'rms' (str), expected one of layernorm, rmsnorm"),
        ("parallel.dp=-1", "parallel.dp: got -1 (int), expected an integer >= 1 or auto"),
        (
            "parallel.layers=[2, -2]",
            "parallel.layers: got [2, -2] (list), expected one of balanced, equal or a list of values, "
            "each an integer >= 0",
        ),
        ("name=12", "name: got 12 (int), expected text; write it in quotes, '12'"),
    ],
)
def test_wrong_values_are_explained(small: str, override: str, message: str) -> None:
    assert refused(small, [override]) == [message]


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("parallel.ppp", "parallel.pp"),
        ("parallel.zzz", None),
        ("model.tp", "parallel.tp"),
        ("model.hidden-size", "model.hidden_size"),
        ("model.n_layers", "model.num_layers"),
        ("modle.num_heads", "model"),
        ("steps", "train.steps"),
        ("log.wandb.mod", "log.wandb.mode"),
    ],
)
def test_unknown_keys_get_a_suggestion(tmp_path: Path, small: str, key: str, meant: str | None) -> None:
    tree: dict[str, Any] = yaml_io.parse(SMALL, "x")[0]
    section = tree
    for part in key.split(".")[:-1]:
        section = section.setdefault(part, {})
    section[key.rsplit(".", 1)[-1]] = 1
    in_override = refused(small, [f"{key}=1"])
    in_file = refused(write(tmp_path, yaml_io.write(tree)))
    for found in (in_file, in_override):
        assert len(found) == 1 and "unknown key" in found[0]
        assert f"did you mean {meant}?" in found[0] if meant else "did you mean" not in found[0]
    assert in_override[0].startswith(f"--set {key}: ")


def test_unknown_key_lists_the_keys_of_its_section(small: str) -> None:
    [message] = refused(small, ["checkpoint.often=1"])
    assert message == "--set checkpoint.often: unknown key. Keys of checkpoint: every, keep, async_save"


def test_every_problem_is_reported_at_once(tmp_path: Path) -> None:
    text = """\
name: a b
model: {num_layers: 3, hidden_size: 130, num_heads: 4, seq_len: 16}
parallel: {tp: 2, ppp: 2, dp: 3, cp: 3}
train: {steps: 10, global_batch: 7, dtype: fp32, dtype: fp16, micro_batch: 0}
7: seven
"""
    file = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load(file, ["optim.warmup=11", "no.such=1", "novalue"])
    found = "\n".join(caught.value.problems)
    for fragment in (
        f"{file}:4: duplicate key train.dtype, first on line 4",
        "--set no.such: unknown key",
        "--set novalue: expected KEY=VALUE",
        "parallel.ppp: unknown key; did you mean parallel.pp?",
        "train.micro_batch: got 0 (int)",
        "7: unknown key",
        "name: 'a b' is not a valid folder name",
        "model.hidden_size 130",
        "parallel.cp: 3",
        "optim.warmup 11",
    ):
        assert fragment in found
    assert "train.global_batch" not in found  # depends on micro_batch, which is reported already
    text = str(caught.value)
    assert text.startswith(f"{len(caught.value.problems)} problems:\n  1. ")
    assert f"\n  {len(caught.value.problems)}. " in text


def test_one_problem_is_shown_without_a_number() -> None:
    assert str(ConfigError(["only this"])) == "only this"


def test_missing_sections_and_keys_are_named(tmp_path: Path) -> None:
    found = refused(write(tmp_path, "model:\ntrain: {steps: 1}\n"))
    assert "model.num_layers: missing, expected an integer >= 1" in found
    assert "train.global_batch: missing, expected an integer >= 1" in found
    assert any(m.startswith("train: missing, expected a section") for m in refused(write(tmp_path, "model: 3\n")))


def test_an_empty_section_means_its_defaults(tmp_path: Path) -> None:
    assert load(write(tmp_path, SMALL + "parallel:\nlog:\n  wandb:\n")) == load(write(tmp_path, SMALL))


# --- files and presets -----------------------------------------------------------------------------------------------


def test_missing_file_names_the_presets(tmp_path: Path) -> None:
    [message] = refused(str(tmp_path / "nothing.yaml"))
    assert "no such file" in message and "demo" in message and "gpt3-175b" in message
    assert "did you mean gpt2-124m?" in refused("gpt2-124")[0]


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    assert "is a folder" in refused(str(tmp_path))[0]
    binary = tmp_path / "b.yaml"
    binary.write_bytes(b"a: \xff\xfe")
    assert "not UTF-8 text (byte 3)" in refused(str(binary))[0]
    binary.write_bytes(b"#" * (yaml_io.MAX_FILE_BYTES + 1))
    assert "bytes, expected a YAML file of at most" in refused(str(binary))[0]


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("", "is empty"),
        ("# only a comment\n", "is empty"),
        ("- 1\n", "holds [1] (list), expected sections: name, "),
        ("a: [1\n", "invalid YAML"),
        ("model:\n\tnum_layers: 1\n", ":2:1: invalid YAML"),
        ("a: b: c\n", ":1:5: invalid YAML"),
        ("a: &x 1\nb: *x\n", ":2:4: invalid YAML: found the alias *x"),
        ("!!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
        ("a: !!int x\n", "a value cannot be read"),
        ("a: \0\n", ":1: invalid YAML"),
        ("[" * 600, "nested too deeply"),
        ("a: 1\n---\na: 2\n", "invalid YAML"),
    ],
)
def test_broken_yaml_names_file_and_line(tmp_path: Path, text: str, fragment: str) -> None:
    file = write(tmp_path, text)
    [message] = refused(file)
    assert message.startswith(file) and fragment in message


def test_duplicate_keys_are_refused_with_key_and_lines(tmp_path: Path) -> None:
    file = write(tmp_path, SMALL + "optim:\n  lr: 1e-3\n  eps: 1e-8\n  lr: 2e-3\nname: a\nname: b\n")
    assert refused(file) == [
        f"{file}:6: duplicate key optim.lr, first on line 4; keep one of them",
        f"{file}:8: duplicate key name, first on line 7; keep one of them",
    ]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("1E5", 1e5), (".5e-3", 5e-4), ("-2.5E+3", -2500.0), ("6.e1", 60.0), ("1_0.5", 10.5), ("3", 3),
        ("-3", -3), ("010", 10), ("1_000", 1000), ("true", True), ("no", "no"), ("on", "on"), ("null", None),
        ("~", None), ("", None), ("12:30", "12:30"), ("2024-01-01", "2024-01-01"), ("0x10", "0x10"), ("1e", "1e"),
        ("e5", "e5"), (".", "."), ("-", [None]), ("'1e-4'", "1e-4"), ("[1e-4, -1]", [1e-4, -1]), ("bpe:512", "bpe:512"),
    ],
)  # fmt: skip
def test_scalars(text: str, value: Any) -> None:
    read = yaml_io.parse(text, "x")[0]
    assert read == value and type(read) is type(value)
    assert yaml_io.parse(yaml_io.write({"key": value}), "x")[0] == {"key": value}


@pytest.mark.parametrize("text", ["1e5", "no", "010", "null", "~", "", "#x", "a: b", "*x", "1_0", "é", "a\nb", "true"])
def test_text_that_looks_like_something_else_survives_writing(text: str) -> None:
    assert yaml_io.parse(yaml_io.write({"key": text}), "x") == ({"key": text}, [])


@pytest.mark.parametrize("name", sorted(presets()))
def test_presets_load_and_survive_a_round_trip(tmp_path: Path, name: str) -> None:
    config = load(name)
    assert config.name == name and config.run_dir == f"runs/{name}" and problems(config) == []
    again = load(write(tmp_path, dump(config)))
    assert again == config and config_hash(again) == config_hash(config)
    assert presets()[name].read_text(encoding="utf-8").startswith("# ")


def test_the_presets_the_readme_promises_exist() -> None:
    promised = {"demo", "gpt2-124m", "gpt2-355m", "gpt2-774m", "gpt2-1.5b", "gpt3-175b", "llama-8b"}
    assert promised <= set(presets())


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("gpt2-124m", 124_439_808), ("gpt2-355m", 354_823_168), ("gpt2-774m", 774_030_080),
        ("gpt2-1.5b", 1_557_611_200), ("gpt3-175b", 174_604_259_328), ("llama-8b", 8_030_261_248),
    ],
)  # fmt: skip
def test_model_presets_have_the_published_number_of_parameters(name: str, parameters: int) -> None:
    """GPT-2 and Llama as Hugging Face counts the released weights; GPT-3's is only published as 175B.

    GPT: L(12h^2 + 13h) + (V + T)h + 2h. Llama: L(2h^2 + 2h k K + 3hF + 2h) + 2Vh + h.
    """
    m = load(name).model
    layers, h, v, t, ffn = m.num_layers, m.hidden_size, m.vocab_size or 0, m.seq_len, m.ffn_size or 0
    if m.activation == "gelu":
        count = layers * (12 * h * h + 13 * h) + (v + t) * h + 2 * h
        assert ffn == 4 * h and m.bias and m.tie_embeddings and m.position == "learned" and m.norm == "layernorm"
    else:
        kv = (m.num_kv_heads or 0) * h // m.num_heads
        count = layers * (2 * h * h + 2 * h * kv + 3 * h * ffn + 2 * h) + 2 * v * h + h
        assert not m.bias and not m.tie_embeddings and m.position == "rope" and m.norm == "rmsnorm"
    assert count == parameters


GPU_PRESETS = ("gpt2-124m", "gpt2-355m", "gpt2-774m", "gpt2-1.5b", "gpt3-175b", "llama-8b")


@pytest.mark.parametrize("name", GPU_PRESETS)
def test_gpu_presets_fit_what_their_heads_say(name: str) -> None:
    """A tenth of the GPU is left to the allocator, NCCL and temporary buffers of kernels."""
    head = " ".join(presets()[name].read_text(encoding="utf-8").split("\nname:")[0].replace("#", " ").split())
    stated = re.search(r"in bf16 on (\d+) GPUs of (\d+) GB .* counts ([0-9.]+) GB on the fullest", head)
    assert stated is not None
    world, memory, counted = int(stated[1]), float(stated[2]), float(stated[3])
    config = load(name, world=world)
    assert config.world_size == world and config.launch.backend == "nccl"
    peak = plan_document(config)["memory_bytes"]["peak"] / 1e9
    assert peak == pytest.approx(counted, abs=0.05)
    assert peak <= 0.9 * memory and memory == 80
    assert config.train.dtype == "bf16" and config.model.dropout == 0


@pytest.mark.parametrize(
    ("name", "worlds"), [("gpt2-124m", (1, 16)), ("gpt2-355m", (1, 16)), ("gpt2-774m", (1, 32)), ("gpt2-1.5b", (8, 32))]
)
def test_gpt2_presets_take_the_worlds_that_their_heads_name(name: str, worlds: tuple[int, int]) -> None:
    least, most = worlds
    assert f"Runs on {least} to {most} GPUs (powers of two)" in presets()[name].read_text(encoding="utf-8")
    for world in worlds:
        assert plan_document(load(name, world=world))["memory_bytes"]["peak"] <= 72e9
    with pytest.raises(ConfigError, match=r"train\.global_batch"):
        load(name, world=2 * most)


# --- the rest --------------------------------------------------------------------------------------------------------


def test_every_key_can_be_described_and_set(small: str) -> None:
    paths = explain.leaf_paths()
    assert "log.wandb.mode" in paths and "model.num_heads" in paths and "model" not in paths
    for path in paths:
        words = explain.expected(tuple(path.split(".")))
        assert words and "None" not in words
        if explain.takes_names(tuple(path.split("."))):
            [message] = refused(small, [f"{path}=[1]"])
            assert message == f"{path}: got [1] (list), expected {words}" and "{NAME: VALUE}" in words
            continue
        [message] = refused(small, [f"{path}={{a: 1}}"])  # a section is no value of any other key
        assert message == f"{path}: got a section, expected {words}"


def test_importing_the_configuration_is_light() -> None:
    code = (
        "import sys, dist_gpt.config.load\n"
        "heavy = {'torch', 'numpy', 'tokenizers', 'safetensors', 'deepspeed', 'wandb', 'typer', 'rich', 'psutil'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=PATIENCE_S)
    assert done.stdout.strip() == "[]"


def test_numbers_are_text_where_text_may_look_like_one(small: str) -> None:
    sets = ["launch.env={OMP_NUM_THREADS: 4, SHARE: 0.5}", "launch.slurm.options={mem: 0}", "launch.slurm.time=30"]
    launch = load(small, sets).launch
    assert launch.env == {"OMP_NUM_THREADS": "4", "SHARE": "0.5"}
    assert (launch.slurm.options, launch.slurm.time) == ({"mem": "0"}, "30")
    assert load(small, ["launch.slurm.time=1:00:00"]).launch.slurm.time == "1:00:00", "no quotes"


def test_a_name_of_ones_own_is_set_alone(small: str) -> None:
    """What is typed is the value, also where YAML would read something else."""
    typed = ["ONE=1", "SIZE=010", "FLAG=true", "NOTHING=", "LIST=[a]", "ODD=%j: x", "QUOTED='a b'", "EQUAL=a=b"]
    sets = ["launch.env={ONE: 0, KEPT: yes}", *(f"launch.env.{pair}" for pair in typed)]
    assert load(small, [*sets, "launch.slurm.options.mem=0"]).launch.env == {
        "KEPT": "yes", "ONE": "1", "SIZE": "010", "FLAG": "true", "NOTHING": "", "LIST": "[a]", "ODD": "%j: x",
        "QUOTED": "a b", "EQUAL": "a=b",
    }  # fmt: skip
    assert load(small, ["launch.slurm.options.mem=0"]).launch.slurm.options == {"mem": "0"}


@pytest.mark.parametrize(("value", "told"), [
    ("true", "got true (bool), expected text or a number; write it in quotes, 'true'"),
    ("null", "got null, expected text or a number; write '' for an empty text"),
    ("[1]", "got [1] (list), expected text or a number"),
])  # fmt: skip
def test_a_wrong_value_of_a_name_is_named(small: str, value: str, told: str) -> None:
    for key in ("launch.env", "launch.slurm.options"):
        assert refused(small, [f"{key}={{fine: 1, wrong: {value}}}"]) == [f"{key}.wrong: {told}"]
