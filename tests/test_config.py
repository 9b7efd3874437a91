from __future__ import annotations

import dataclasses
import re
import typing
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from igpo import options
from igpo.config import Config, ConfigError
from igpo.config_io import ALIASES, assign, dump, flatten, leaves, load, pairs, read, validate
from igpo.options import GenerateOptions

LEAVES = leaves(Config)


def written(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    return file


def test_leaf_names_are_unique_in_every_tree() -> None:
    for tree in (
        Config,
        *(getattr(options, name) for name in dir(options) if name.endswith("Options")),
    ):
        names = [key.rpartition(".")[2] for key in leaves(tree)]
        assert len(set(names)) == len(names), tree


def test_sections_may_be_nested_or_left_out(tmp_path: Path) -> None:
    nested = load([written(tmp_path, "rl:\n  beta: 0.5\n  inpaint:\n    eta_low: 0.1\n")])
    flat = load([written(tmp_path, "beta: 0.5\neta_low: 0.1\n")])
    assert nested == flat
    assert (nested.rl.beta, nested.rl.inpaint.eta_low) == (0.5, 0.1)
    assert nested.train == Config().train


@pytest.mark.parametrize("key", ["eta_low", "inpaint.eta_low", "rl.inpaint.eta_low"])
def test_a_key_is_any_end_of_its_path(key: str) -> None:
    assert load([], [f"{key}=0.25"]).rl.inpaint.eta_low == 0.25


def test_later_sources_win(tmp_path: Path) -> None:
    first = written(tmp_path, "beta: 0.1\nepsilon: 0.3\n")
    second = tmp_path / "second.yaml"
    second.write_text("beta: 0.2\n")
    cfg = load([first, second], ["beta=0.4", "beta=0.5"])
    assert (cfg.rl.beta, cfg.rl.epsilon) == (0.5, 0.3)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("learning_rate=1e-5", 1e-5),
        ("max_steps=1_000", 1000),
        ("use_lora=true", True),
        ("epsilon_high=none", None),
        ("epsilon_high=0.28", 0.28),
        ("reward_funcs=correctness, mine:f", ("correctness", "mine:f")),
        ("suppress_tokens=5", (5,)),
        ("report_to=none", ()),
        ("scale_rewards=none", "none"),
        ("answer_marker=a=b", "a=b"),
    ],
)
def test_text_becomes_the_type_of_the_key(override: str, value: object) -> None:
    found = flatten(load([], [override]))
    (key,) = [k for k in found if k.endswith("." + override.partition("=")[0])]
    assert (tuple(found[key]) if isinstance(value, tuple) else found[key]) == value


def test_yaml_numbers_without_a_point_are_numbers(tmp_path: Path) -> None:
    cfg = load(
        [written(tmp_path, "learning_rate: 1e-5\nwarmup_steps: 7\nsuppress_tokens: [1, 2]\n")]
    )
    assert (cfg.train.learning_rate, cfg.train.warmup_steps) == (1e-5, 7)
    assert cfg.rollout.suppress_tokens == (1, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_steps: 1.5", r"train.max_steps must be a whole number, got 1.5 \(float\)"),
        ("max_steps: true", r"train.max_steps must be a whole number, got True \(bool\)"),
        ("max_steps: null", r"train.max_steps must be a whole number, got None"),
        ("beta: .nan", "rl.beta must be a finite number"),
        ("use_lora: 1", "lora.use_lora must be true or false, got 1"),
        ("use_lora: 'yes please'", "lora.use_lora must be true or false"),
        ("output_dir: 5", "train.output_dir must be text"),
        ("suppress_tokens: [1, a]", "rollout.suppress_tokens must be a whole number, got 'a'"),
        ("beta: {x: 1}", "unknown key 'beta.x'"),
        ("rl: 3", "unknown key 'rl'"),
        ("rl:\n  beta: 1\nbeta: 2", "rl.beta is set twice"),
        ("- beta", "must hold keys and values, got list"),
        ("a: [", "not YAML"),
    ],
)
def test_files_are_read_strictly(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load([written(tmp_path, text)])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learnin_rate=1", "unknown key 'learnin_rate'. The nearest one is 'learning_rate'"),
        ("train.betta=1", "unknown key 'train.betta'"),
        ("rollout.beta=1", "unknown key 'rollout.beta'"),
        ("gradient_accumulation_steps=4", "is not a key: it follows: prompts_per_step"),
        ("lora_dropout=0.05", "is not a key: there is none"),
        ("max_steps", "'max_steps' must be key=value"),
        ("max_steps=ten", "train.max_steps must be a whole number, got 'ten'"),
    ],
)
def test_overrides_are_read_strictly(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load([], [override])


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: No such file"):
        load(["nowhere.yaml"])


@pytest.mark.parametrize("alias", ALIASES)
def test_aliases_name_keys_and_are_no_keys(alias: str) -> None:
    assert not any(key.endswith(f".{alias}") for key in LEAVES)
    (leaf,) = [leaf for key, leaf in LEAVES.items() if key.endswith(f".{ALIASES[alias]}")]
    value = "random" if leaf.kind is str else "17"
    assert load([], [f"{alias}={value}"]) == load([], [f"{ALIASES[alias]}={value}"]) != Config()


def strategy(kind: typing.Any) -> st.SearchStrategy:
    """Values of a leaf's type. The words none and null are None wherever None is allowed."""
    text = st.text(st.characters(codec="utf-8"), max_size=8).filter(
        lambda s: s.lower() not in ("none", "null")
    )
    scalars = {
        str: text,
        int: st.integers(-(2**62), 2**62),
        float: st.floats(allow_nan=False, allow_infinity=False),
        bool: st.booleans(),
    }
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        return st.lists(scalars[arguments[0]], max_size=3).map(tuple)
    return st.none() | scalars[arguments[0]] if arguments else scalars[kind]


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_dump_and_read_give_the_same_tree(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    keys = data.draw(st.sets(st.sampled_from(sorted(LEAVES)), max_size=12))
    values = [(key, data.draw(strategy(LEAVES[key].kind))) for key in sorted(keys)]
    cfg = assign(Config(), values, "test")
    for key, value in values:
        section: typing.Any = cfg
        for name in key.split("."):
            section = getattr(section, name)
        assert section == value
    file = tmp_path_factory.mktemp("dump") / "config.yaml"
    file.write_text(dump(cfg), encoding="utf-8", newline="")
    assert load([file]) == cfg
    assert {key for key, _ in read(file)} == set(LEAVES)


def test_every_section_is_frozen_and_documented_defaults_are_valid() -> None:
    validate(Config())
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().rl.beta = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["dtype=float16"], "dtype must be one of auto, float32, bfloat16, got 'float16'"),
        (["lr_scheduler_type=step"], "lr_scheduler_type must be one of"),
        (["report_to=mlflow"], "report_to must be one of tensorboard"),
        (["max_steps=0"], "max_steps must be at least 1, got 0"),
        (["prompts_per_step=0"], "prompts_per_step must be at least 1"),
        (["warmup_steps=-1"], "warmup_steps must not be negative"),
        (["adam_beta2=1"], r"adam_beta2 must lie in \[0, 1\)"),
        (["max_grad_norm=0"], "max_grad_norm must be positive"),
        (["save_total_limit=0"], "save_total_limit must be none or at least 1"),
        (["use_lora=true"], "model_name_or_path must name a folder when use_lora is true"),
        (["eval_steps=5"], "eval_file must name a JSONL file"),
        (
            ["eval_steps=5", "eval_file=none.jsonl"],
            "eval_file must name a file that exists, got 'none.jsonl'",
        ),
    ],
)
def test_values_are_validated(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(load([], overrides))


def test_needed_files_are_asked_for() -> None:
    with pytest.raises(ConfigError, match="train_file must name a JSONL file, got None"):
        validate(Config(), need=("train_file",))


def test_comments_of_the_source_are_the_help() -> None:
    assert LEAVES["rl.num_generations"].comment == "G"
    assert LEAVES["rl.inpaint.entropy_filter"].comment.startswith("tau")  # on a line of its own
    assert LEAVES["train.save_total_limit"].type_name == "int | None"
    assert leaves(GenerateOptions)["prompt"].type_name == "str | None"


def test_the_documentation_names_keys_that_exist() -> None:
    text = (Path(__file__).parents[1] / "docs" / "configuration.md").read_text()
    (example,) = re.findall(r"```yaml\n(.*?)```", text, re.S)
    assert assign(Config(), pairs(yaml.safe_load(example)), "docs").train.learning_rate == 1e-4
    for alias, key in ALIASES.items():
        assert f"`{alias}`" in text
        assert f"`{key}`" in text
    known = {key.rpartition(".")[2] for key in LEAVES}
    (names,) = re.findall(r"Names are TRL's where.*?: (.*?)\. What differs", text, re.S)
    assert set(re.findall(r"`(\w+)`", names)) <= known
