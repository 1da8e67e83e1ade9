"""A job's options: layers, names of other systems and their units, YAML out and in."""

from __future__ import annotations

from pathlib import Path

import pytest

from tinytron.errors import ConfigError
from tinytron.jobs.aliases import SECTIONS, TRAINING
from tinytron.jobs.kinds import job_class
from tinytron.jobs.options import JobOptions, View, read_file

KEY = "gpt/train/pretrain"


@pytest.fixture
def options() -> JobOptions:
    return JobOptions(KEY, job_class(KEY))


def test_every_alias_names_an_option(options: JobOptions) -> None:
    for name, alias in TRAINING.items():
        assert alias.path in options.known, name
        assert set(alias.also) <= set(options.known)
        assert name not in options.known
    assert set(SECTIONS.values()) <= {path.partition(".")[0] for path in options.known}


@pytest.mark.parametrize(
    ("given", "path", "value"),
    [
        ({"training": {"batch_size": 4}, "architecture": {"block_size": 32}}, "train.total_batch_size", 128),
        ({"training": {"per_device_batch_size": 16}}, "train.batch_size", 16),
        ({"training": {"per_device_batch_size": -1}}, "train.batch_size", 0),  # auto
        ({"train": {"batch_size": "auto"}}, "train.batch_size", 0),
        ({"training": {"tokens": 1e9}}, "train.max_train_tokens", 10**9),
        ({"training": {"validation_steps": 2}, "train": {"seq_len": 8}}, "train.max_eval_tokens", 16),
        ({"optimization": {"lr": "3e-4"}}, "optim.max_lr", 3e-4),
        ({"optimization": {"lr": 0.1, "min_lr_mult": 0.01}}, "optim.min_lr", 0.001),
        ({"optimization": {"weight_decay": 0.3}}, "optim.weight_decay", 0.3),
        ({"optimization": {"warmup_pct": 0.1}, "train": {"max_steps": 50}}, "optim.warmup_steps", 5),
        (
            {
                "optimization": {"warmup_pct": 0.1},
                "training": {"tokens": 6400, "batch_size": 2},
                "train": {"seq_len": 32},
            },
            "optim.warmup_steps",
            10,
        ),
        ({"optimization": {"muon": {"momentum": 0.9}}}, "optim.muon_momentum", 0.9),
        ({"logging": {"checkpoint_interval": 4096}}, "ckpt.save_every_steps", 4096),
        ({"architecture": {"n_head": 4}}, "model.num_key_value_heads", 4),
        ({"architecture": {"n_head": 4, "n_kv_head": 2}}, "model.num_key_value_heads", 2),
        ({"architecture": {"n_head": 16}, "model": {"num_key_value_heads": 8}}, "model.num_key_value_heads", 8),
        ({"architecture": {"intermediate_size": -1, "n_embd": 48}}, "model.intermediate_size", 192),
        ({"architecture": {"rope": False}}, "model.position_type", "learned"),
        ({"architecture": {"dtype": {"activation": "bfloat16"}}}, "train.precision", "bf16"),
        ({"architecture": {"dropout": 0.1}}, "model.dropout", 0.1),
        ({"architecture": {"backbone": {"weights": "gpt2"}}}, "ckpt.init_from", "gpt2"),
    ],
)
def test_names_of_other_systems(options: JobOptions, given: dict[str, object], path: str, value: object) -> None:
    options.update(given, "file")
    assert options.values()[path] == value


def test_a_view_reads_and_writes_under_every_name(options: JobOptions) -> None:
    config = View(options)
    config.training.per_device_batch_size = 16
    config.architecture.block_size = 64
    config.training.batch_size = 32
    config.logging.checkpoint_interval = 4096
    config["model"]["hidden_size"] = 256
    assert (config.train.batch_size, config.ckpt.save_every_steps) == (16, 4096)
    assert (config.train.total_batch_size, config.training.batch_size) == (2048, 32)
    config.train.total_batch_size = 640  # the last one counts, whatever its name
    assert config.training.batch_size == 10
    assert config.model.hidden_size == 256
    assert '"hidden_size": 256' in repr(config.model)
    with pytest.raises(ConfigError, match=r"there is no option training\.per_device_batchsize; did you mean"):
        config.training.per_device_batchsize = 1
    with pytest.raises(AttributeError, match="there is no option"):
        _ = config.training.nothing_like_it


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("model.hiden_size=1", r"there is no option model.hiden_size; did you mean model.hidden_size"),
        ("hidden_size=1", r"there is no option hidden_size; did you mean model.hidden_size"),
        ("nothing.at_all=1", r"there is no option nothing.at_all"),
        ("model.hidden_size=wide", r"model.hidden_size=wide must be a whole number"),
        ("training.tokens=many", r"training.tokens=many must be a whole number or null"),
        ("train.do_val=1", r"train.do_val=1 must be true or false"),
        ("train.max_steps", r"train.max_steps is not an option; write key=value"),
        ("optimization.warmup_pct=0.1", r"optimization.warmup_pct needs the length of the run"),
        ("train=3", r"train=3: train is a section of options, not a value; give train."),
        ("architecture=[1]", r"architecture is a section of options, not a value; give model."),
        ("training.batch_size=a", r"training.batch_size=a must be a whole number"),
        ("training.batch_size=1.5", r"training.batch_size=1.5 must be a whole number"),
        ("training.batch_size=null", r"training.batch_size=null must be a whole number"),
        ("architecture.rope=sometimes", r"architecture.rope=sometimes must be true or false"),
        ("data.dataset_path=[a]", r"must be text or null"),
    ],
)
def test_bad_overrides(options: JobOptions, word: str, says: str) -> None:
    def resolve() -> None:
        options.override([word])
        options.values()

    with pytest.raises(ConfigError, match=says.replace(".", r"\.")):
        resolve()


def test_two_names_of_one_option_in_a_file(options: JobOptions) -> None:
    options.update({"optim": {"max_lr": 0.1}, "optimization": {"lr": 0.1}}, "file")
    with pytest.raises(ConfigError, match=r"file: optim\.max_lr and optimization\.lr are one option"):
        options.update({"optim": {"max_lr": 0.1}, "optimization": {"lr": 0.2}}, "file")


def test_a_later_layer_wins_under_any_name(options: JobOptions) -> None:
    options.update({"optimization": {"lr": 0.1}}, "file")
    options.override(["optim.max_lr=0.2"])
    assert options.values()["optim.max_lr"] == 0.2
    options.override(["optimization.lr=0.3"])
    assert options.values()["optim.max_lr"] == 0.3
    options.update({"optim": {"max_lr": options.known["optim.max_lr"].default}}, "file")
    assert options.values()["optim.max_lr"] == options.known["optim.max_lr"].default


def test_a_written_file_reads_back_equal(options: JobOptions, tmp_path: Path) -> None:
    options.override(
        ["architecture.n_head=4", "train.max_steps=7", "optimization.lr=1e-4", "train.steps_to_profile=[2,3]"]
    )
    file = tmp_path / "run.yaml"
    file.write_text(options.as_yaml({"job": KEY}))
    again = JobOptions(KEY, job_class(KEY))
    content, about = read_file(str(file))
    again.update(content, str(file))
    assert about == {"job": KEY}
    assert again.values() == options.values()
    again.override(["architecture.n_head=2"])  # key/value heads of the file were those of four heads
    assert again.values()["model.num_key_value_heads"] == 4


def test_heads_follow_in_a_file_of_defaults(options: JobOptions, tmp_path: Path) -> None:
    """A written file lists the default number of key/value heads; no user asked for it."""
    file = tmp_path / "run.yaml"
    file.write_text(options.as_yaml({"job": KEY}))
    options.update(read_file(str(file))[0], "file")
    options.override(["architecture.n_head=2"])
    assert options.values()["model.num_key_value_heads"] == 2


def test_required_options_are_marked(tmp_path: Path) -> None:
    key = "data/tokenize_variable_dataset"
    options = JobOptions(key, job_class(key))
    assert options.missing() == ["data.name"]
    text = options.as_yaml({"job": key})
    assert "  name: ???  # text file, folder" in text
    (tmp_path / "run.yaml").write_text(text)
    options.update(read_file(str(tmp_path / "run.yaml"))[0], "file")
    with pytest.raises(ConfigError, match=rf"data\.name is required by {key}"):
        options.values()
    options.override(["data.dataset=texts"])
    assert options.values()["data.name"] == "texts"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "cannot be read"),
        ("a: [", "is not valid YAML"),
        ("- a", "has no options"),
        ("a: ${b}", r"is not valid YAML \(Interpolation key 'b' not found\)"),
        ("job: [a]", r"job: \['a'\] must be text; write it in quotes"),
        ("restore: 3", "restore: 3 must be text; write it in quotes"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, text: str | None, says: str) -> None:
    if text is not None:
        (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=says) as caught:
        read_file(str(tmp_path / "run.yaml"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        ("2024_01", "2024_01"),
        ("007", "007"),
        ("1.10", "1.10"),
        ("no", "no"),
        ("a=b", "a=b"),
        ("'a b'", "a b"),
        ("null", None),
        ("", None),
    ],
)
def test_text_stays_as_it_was_typed(options: JobOptions, typed: str, value: str | None) -> None:
    """To YAML 2024_01 is a number and "no" is false."""
    options.override([f"data.dataset_path={typed}"])
    assert options.values()["data.dataset_path"] == value


def test_a_section_whose_lines_are_commented_out(options: JobOptions) -> None:
    options.update({"train": None, "optimization": None}, "file")
    assert options.values() == JobOptions(KEY, job_class(KEY)).values()
    options.update({"optim": {"max_lr": float("nan")}}, "file")  # NaN is not equal to itself, but it is one value
    with pytest.raises(ConfigError, match="file: train is a section of options"):
        options.update({"train": [1]}, "file")
