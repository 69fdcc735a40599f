"""The text of recipes and overrides: what it means, and that nothing but a ConfigError comes of bad text."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_opus.config import ConfigError, RunConfig, dump, load

SMALL = "name: x\nmodel: {num_layers: 2, hidden_size: 64, num_attention_heads: 4}\n"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "r.yaml"
    path.write_text(SMALL)
    return path


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("output_dir=a#b", "a#b"),
        ("output_dir=a #b", "a #b"),
        ("output_dir=010", "010"),
        ("output_dir=true", "true"),
        ("output_dir=1:30", "1:30"),
        ("output_dir=2024-01-01", "2024-01-01"),
        ("output_dir=null", "null"),
        ("output_dir=[a", "[a"),
        ("output_dir=a: b", "a: b"),
        ("output_dir=*a", "*a"),
        ('output_dir="a b"', "a b"),
        ("output_dir='a'", "a"),
        ("model.init_from=null", None),
        ("model.init_from=1e4", "1e4"),
        ("optimizer.lr=1e-4", 1e-4),
        ("optimizer.lr=.5", 0.5),
        ("optimizer.lr=+2E-1", 0.2),
        ("training.tensorboard=false", False),
        ('data.domain_weights={"a": 1, b: 2.5}', {"a": 1.0, "b": 2.5}),
        ("selection.redundancy.scale=off", "off"),
    ],
)
def test_an_override_is_the_value_that_was_typed(recipe: Path, override: str, value: Any) -> None:
    """Guards against YAML 1.1: comments cut off, `off` for False, 010 for 8, 1:30 for 90."""
    found: Any = load(recipe, [override])
    for key in override.partition("=")[0].split("."):
        found = getattr(found, key)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.train_steps=5 # five", "override training.train_steps: expected one value without comments"),
        ("training.train_steps=010", "training.train_steps: expected int, got '010' (str)"),
        ("training.train_steps=0x10", "training.train_steps: expected int, got '0x10' (str)"),
        ("training.train_steps=1_000", "training.train_steps: expected int, got '1_000' (str)"),
        ("training.train_steps=1:30", "training.train_steps: expected int, got '1:30' (str)"),
        ("training.train_steps=5\n---\n6", "override training.train_steps: expected printable text"),
        ("training.train_steps=--- 5", "expected one value without comments"),
        ("training.train_steps=a: 5", "expected one value without comments"),
        ("training.train_steps=&a 5", "expected one value without comments"),
        ("training.train_steps=!!int 5", "expected one value without comments"),
        ("training.train_steps=" + "9" * 5000, "override training.train_steps: expected a value"),
        ("training.tensorboard=yes", "training.tensorboard: expected bool, got 'yes' (str)"),
        ("training.tensorboard=off", "training.tensorboard: expected bool, got 'off' (str)"),
        ("data.domain_weights={a: 1, a: 2}", "the key a stands there twice"),
        ("optimizer.lr=.nan", "optimizer.lr: expected >= 0, got nan"),
        ("data.path=", "data.path: expected printable text, got ''"),
    ],
)
def test_what_is_no_value_is_refused(recipe: Path, override: str, said: str) -> None:
    """Guards against a value that means something else than it looks like."""
    with pytest.raises(ConfigError) as caught:
        load(recipe, [override])
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: 1\nname: a\nseed: 2\n", "line 3: the key seed stands there twice"),
        ("name: a\nmodel:\n  num_layers: 1\n  num_layers: 2\n", "line 4: the key num_layers stands there twice"),
        ("name: a\ntraining:\n", "training is empty; give it a value, or leave it out"),
        ("include: r.yaml\n", "includes itself"),
        ("include: other.yaml\n", "includes itself"),
        ("include: 3\n", "include: expected a file or a list of files, got 3"),
        ("include: [a.yaml, {}]\n", "a.yaml: not found"),
        ("include: .\n", "expected a file with text"),
        ("a: &x {b: 1}\nc: *x\n", "line 1: no aliases"),
        ("a: !!python/object:os.system x\n", "line 1: no aliases"),
        ("a: 1\n---\nb: 2\n", "not valid YAML (line"),
        ("a: " + "[" * 3000, "not valid YAML"),
        ("a: " + "9" * 5000, "not valid YAML"),
        ("just text", "expected sections with keys, got str"),
        ("a: \x01", "not valid YAML"),
    ],
)
def test_a_bad_recipe_is_named_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    """Guards against duplicated keys of which one is lost, endless includes, and tracebacks for text."""
    (tmp_path / "r.yaml").write_text(text)
    (tmp_path / "other.yaml").write_text("include: [r.yaml]\n")
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "r.yaml")
    assert said in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    """Guards against waiting for ever at a FIFO, and against tracebacks for folders and foreign encodings."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "latin").write_bytes("name: \xe9".encode("latin-1"))
    for name, said in (
        ("fifo", "expected a file with text"),
        (".", "expected a file with text"),
        ("latin", "UTF-8"),
        ("a" * 999, "cannot be read"),
    ):
        with pytest.raises(ConfigError, match=said):
            load(tmp_path / name)


def test_a_later_include_replaces_an_earlier_one(tmp_path: Path) -> None:
    """Guards against a base whose values win over the model's preset."""
    (tmp_path / "base.yaml").write_text("seed: 1\noutput_dir: a\nmodel: {num_layers: 1, hidden_size: 64}\n")
    (tmp_path / "model.yaml").write_text("model: {num_layers: 3, num_attention_heads: 4}\noutput_dir: b\n")
    (tmp_path / "r.yaml").write_text("include: [base.yaml, model.yaml]\nname: r\n")
    found = load(tmp_path / "r.yaml")
    assert (found.seed, found.output_dir, found.model.num_layers, found.model.hidden_size) == (1, "b", 3, 64)


@pytest.mark.parametrize("text", ["1e-4", "010", "off", "1:30", "null", "~x", "2024-01-01", "1", "a: b #c", "[x"])
def test_text_survives_the_resolved_configuration(recipe: Path, tmp_path: Path, text: str) -> None:
    """Guards against a config.yaml that reads text back as a number, or not at all."""
    first = load(recipe, [f"output_dir={text}"])
    (tmp_path / "again.yaml").write_text(dump(first))
    assert load(tmp_path / "again.yaml") == first
    assert first.output_dir == text
    assert yaml.safe_load(dump(first))["output_dir"] == text


def only_a_config_error(path: Path, overrides: list[str]) -> None:
    try:
        assert isinstance(load(path, overrides), RunConfig)
    except ConfigError:
        return


KEYS = st.sampled_from(
    ["name", "seed", "model", "data", "data.path", "training.train_steps", "optimizer.lr", "include"]
)
PIECES = st.sampled_from(
    [
        "name: ",
        "model:",
        " ",
        "  ",
        "\n",
        "{",
        "}",
        "[",
        "]",
        "- ",
        "&a ",
        "*a",
        "!!int ",
        "1e9",
        "010",
        "'",
        '"',
        ": ",
        "?",
        "|",
        ">",
        "%",
        "---",
    ]
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    raw=st.one_of(
        st.binary(max_size=200),
        st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")),
        st.lists(PIECES, max_size=30).map(lambda pieces: "".join(pieces).encode()),
        st.lists(PIECES, max_size=8).map(lambda pieces: (SMALL + "".join(pieces)).encode()),
    )
)
def test_any_bytes_give_a_run_or_a_config_error(raw: bytes) -> None:
    """Guards against tracebacks out of the YAML parser, whatever stands in the file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "r.yaml"
        path.write_bytes(raw)
        only_a_config_error(path, [])


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    overrides=st.lists(
        st.one_of(
            st.text(max_size=40),
            st.builds("{}={}".format, KEYS, st.text(max_size=40)),
            st.builds("{}={}".format, KEYS, st.lists(PIECES, max_size=8).map("".join)),
            st.builds("{}={}".format, KEYS, st.floats().map(str)),
        ),
        max_size=3,
    )
)
def test_any_overrides_give_a_run_or_a_config_error(recipe: Path, overrides: list[str]) -> None:
    """Guards against tracebacks for what somebody types."""
    only_a_config_error(recipe, overrides)
