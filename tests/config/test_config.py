"""Recipes: what is accepted, what is refused, and whether the refusal says what to change."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_opus import config as config_module
from megatron_opus.config import (
    ConfigError,
    RunConfig,
    SelectionConfig,
    dump,
    from_dict,
    load,
    read_yaml,
    to_dict,
    validate_world,
)

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
RECIPES = sorted(CONFIGS.glob("*.yaml"))
MODELS = sorted((CONFIGS / "models").glob("*.yaml"))
assert RECIPES
assert MODELS
SMALL: dict[str, Any] = {"name": "x", "model": {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4}}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    return path


# --- keys and types -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.train_step=2", "unknown key training.train_step; did you mean training.train_steps?"),
        ("seq_length=64", "unknown key seq_length; did you mean data.seq_length?"),
        ("training.rho=0.5", "unknown key training.rho; did you mean selection.rho?"),
        ("selection.sketch.dims=64", "unknown key selection.sketch.dims; did you mean selection.sketch.dim?"),
        ("selektion.rho=0.5", "unknown key selektion; did you mean selection?"),
        ("model.zzz=1", "unknown key model.zzz; known keys of model: num_layers,"),
    ],
)
def test_an_unknown_key_names_the_nearest_one(recipe: Path, override: str, expected: str) -> None:
    """Guards against a misspelt override that is ignored, so that a run silently trains with the default."""
    with pytest.raises(ConfigError) as caught:
        load(recipe, [override])
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.train_steps=many", "training.train_steps: expected int, got 'many' (str)"),
        ("training.train_steps=2.5", "training.train_steps: expected int, got 2.5 (float)"),
        ("training.train_steps=true", "training.train_steps: expected int, got True (bool)"),
        ("training.train_steps=null", "training.train_steps: expected int, got None"),
        ("training.tensorboard=1", "training.tensorboard: expected bool, got 1 (int)"),
        ("optimizer.lr=fast", "optimizer.lr: expected float, got 'fast' (str)"),
        ("optimizer.lr=true", "optimizer.lr: expected float, got True (bool)"),
        ("model.vocab_size=[1]", "model.vocab_size: expected int, got [1] (list)"),
        ("data.domain_weights=3", "data.domain_weights: expected a mapping, got 3"),
        ("data.proxy_weights={code: heavy}", "data.proxy_weights.code: expected float, got 'heavy'"),
        ("data.domain_weights={code: heavy}", "data.domain_weights.code: expected float, got 'heavy'"),
        ("training=5", "training: expected a section with keys, got 5"),
        ("name.x=5", "override name.x: name is a value ('x'), not a section"),
        ("training.precision=fp16", "training.precision: expected one of fp32, bf16, got 'fp16' (did you mean"),
        ("selection.strategy=opsu", "filter_then_weight, got 'opsu' (did you mean opus?)"),
        ("parallel.zero_stage=true", "parallel.zero_stage: expected one of 0, 1, 2, 3, got True"),
        ("parallel.zero_stage=4", "parallel.zero_stage: expected one of 0, 1, 2, 3, got 4"),
    ],
)
def test_an_ill_typed_value_says_what_was_expected(recipe: Path, override: str, expected: str) -> None:
    """Guards against values that Python would quietly take: True for 1, 2.5 steps, a string where a number belongs."""
    with pytest.raises(ConfigError) as caught:
        load(recipe, [override])
    assert expected in str(caught.value)


@pytest.mark.parametrize("override", ["training.train_steps", "=3", "model.vocab_size=[", "model.vocab_size=", ""])
def test_a_malformed_override_is_refused(recipe: Path, override: str) -> None:
    """Guards against an override that is dropped, or dies with a YAML traceback, because it has no key or value."""
    with pytest.raises(ConfigError, match="override"):
        load(recipe, [override])


def test_missing_required_keys_are_named() -> None:
    """Guards against a TypeError from a dataclass constructor, which names a Python argument and not the recipe key."""
    with pytest.raises(ConfigError, match=r"missing required key model\.hidden_size, model\.num_attention_heads"):
        from_dict({"name": "x", "model": {"num_layers": 2}})
    with pytest.raises(ConfigError, match="missing required key name"):
        from_dict({"model": SMALL["model"]})


# --- overrides ------------------------------------------------------------------------------------------------------


def test_overrides_reach_their_key_with_their_type(recipe: Path) -> None:
    """Guards against values that arrive as text: 1e-4 without a dot is a string to plain YAML 1.1."""
    c = load(
        recipe,
        [
            "optimizer.lr=1e-4",
            "optimizer.weight_decay=0",
            "training.train_steps=7",
            "selection.sketch.dim=64",
            "data.domain_weights={code: 1, prose: 2.5}",
            "model.vocab_size=512",
            "training.tensorboard=false",
            "output_dir=some where/a=b",
        ],
    )
    assert (c.optimizer.lr, c.optimizer.weight_decay, c.training.train_steps) == (1e-4, 0.0, 7)
    assert isinstance(c.optimizer.weight_decay, float)
    assert c.selection.sketch.dim == 64
    assert c.data.domain_weights == {"code": 1.0, "prose": 2.5}
    assert c.model.vocab_size == 512
    assert c.training.tensorboard is False
    assert c.output_dir == "some where/a=b"


def test_the_later_override_wins_and_null_restores_the_default_meaning(recipe: Path) -> None:
    """Guards against `launch/quickstart.sh key=value` losing to what the script itself sets before it."""
    c = load(
        recipe, ["training.train_steps=1", "training.train_steps=2", "model.vocab_size=9", "model.vocab_size=null"]
    )
    assert c.training.train_steps == 2
    assert c.model.vocab_size is None


def test_data_is_short_for_its_path_and_keeps_the_other_keys(recipe: Path) -> None:
    """Guards against `data=embedded` replacing the whole section, sequence length included."""
    c = load(recipe, ["data.seq_length=32", "data=some/dir"])
    assert (c.data.path, c.data.seq_length) == ("some/dir", 32)
    assert load(recipe, ["data=embedded", "data.seq_length=32"]).data.seq_length == 32


# --- files ----------------------------------------------------------------------------------------------------------


def test_include_is_merged_below_the_recipe(tmp_path: Path) -> None:
    """Guards against an include that overrides the recipe, or a recipe section that drops the included one."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models/m.yaml").write_text(
        "include: ../base.yaml\nmodel:\n  hidden_size: 64\n  num_attention_heads: 4\n"
    )
    (tmp_path / "base.yaml").write_text("model: {num_layers: 2, hidden_size: 32}\nseed: 7\n")
    (tmp_path / "r.yaml").write_text("include: models/m.yaml\nname: r\nmodel:\n  num_layers: 3\n")
    c = load(tmp_path / "r.yaml", ["model.hidden_size=128"])
    assert (c.model.num_layers, c.model.hidden_size, c.model.num_attention_heads, c.seed) == (3, 128, 4, 7)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [", "not valid YAML"),
        ("- a\n", "expected sections with keys, got list"),
        ("", "expected sections with keys, got NoneType"),
        ("include: nowhere.yaml\nname: x\n", "nowhere.yaml: not found"),
    ],
)
def test_an_unreadable_recipe_names_the_file(tmp_path: Path, text: str, expected: str) -> None:
    """Guards against tracebacks of the YAML parser where a file name and a reason are wanted."""
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert expected in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_missing_recipe_names_the_file(tmp_path: Path) -> None:
    """Guards against a bare FileNotFoundError."""
    with pytest.raises(ConfigError, match=r"no\.yaml: not found"):
        load(tmp_path / "no.yaml")


def test_the_resolved_configuration_reproduces_itself(recipe: Path, tmp_path: Path) -> None:
    """Guards against a runs/<name>/config.yaml that cannot be run again, or runs with other values."""
    overrides = [
        "optimizer.lr=1e-5",
        "data.domain_weights={code: 1}",
        "selection.redundancy.scale=off",
        "optimizer.adam_eps=1e-30",
    ]
    first = load(recipe, overrides)
    assert first.selection.redundancy.scale == "off"
    (tmp_path / "again.yaml").write_text(dump(first))
    assert load(tmp_path / "again.yaml") == first
    assert from_dict(to_dict(first)) == first


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_loads_and_says_every_value(path: Path) -> None:
    """Guards against a recipe that no longer loads, and against values that matter but stand only in the code."""
    c = load(path)
    assert c.name == path.stem
    raw = read_yaml(path)
    for section in ("data", "parallel", "optimizer", "training", "selection"):
        unsaid = {f.name for f in dataclasses.fields(getattr(c, section))} - set(raw[section]) - {"cache_dir"}
        assert not unsaid, f"{path.name} leaves {section}.{unsaid} to the defaults"
    sections = ("redundancy", "preconditioner", "sketch", "ado", "filter_then_weight", "floors")
    for section in (*sections, "domain_bandit", "controller", "prefilter"):
        assert {f.name for f in dataclasses.fields(getattr(c.selection, section))} == set(raw["selection"][section])


@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.stem)
def test_every_model_preset_is_a_model_and_nothing_else(path: Path) -> None:
    """Guards against a preset that changes optimizer or data of the recipe that includes it."""
    raw = yaml.safe_load(path.read_text())
    assert set(raw) == {"model"}
    from_dict({"name": path.stem, **raw, "data": {"seq_length": raw["model"].get("max_position_embeddings") or 1024}})


def test_the_recipes_hold_the_published_values() -> None:
    """Guards against a tuned value slipping into the recipes that claim the paper's."""
    for name, length in (("xl", 6144), ("large", 24576)):
        c = load(CONFIGS / f"pretrain_gpt2_{name}.yaml")
        o, s, t = c.optimizer, c.selection, c.training
        assert c.data.seq_length == c.model.max_position_embeddings == length
        assert (c.buffer_size, t.global_batch_size, s.rho, s.score_length, s.proxy_batch_size) == (32, 16, 0.5, 512, 8)
        assert (s.sketch.dim, s.sketch.seed, t.gradient_clipping) == (8192, 42, 1.0)
        assert (o.lr, o.adam_beta1, o.adam_beta2, o.adam_eps, t.precision) == (2e-3, 0.8, 0.95, 1e-8, "bf16")
        tokens = t.train_steps * t.global_batch_size * length
        assert 0 <= tokens - 30e9 < t.global_batch_size * length


@pytest.mark.parametrize(
    ("path", "ranks"), [(p, n) for p in RECIPES for n in (1, 2, 4)], ids=lambda x: getattr(x, "stem", x)
)
def test_a_recipe_typed_without_overrides_fits_the_usual_numbers_of_devices(path: Path, ranks: int) -> None:
    """Guards against `deepspeed launch/x.sh` failing on a machine with one, two or four devices."""
    recipe = load(path)
    p = recipe.parallel
    least = p.tensor_model_parallel_size * p.pipeline_model_parallel_size
    validate_world(recipe, max(ranks, least) if path.stem.startswith("cpt_qwen3_8b") else ranks)  # 8 billion parameters


def test_the_paper_recipes_fit_eight_devices() -> None:
    """Guards against the README's 8-GPU commands being refused."""
    for name in ("pretrain_gpt2_xl", "pretrain_gpt2_large", "cpt_qwen3_8b", "cpt_qwen3_8b_megatron"):
        validate_world(load(CONFIGS / f"{name}.yaml"), 8)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_the_continued_pretraining_recipe_holds_the_published_values(optimizer: str) -> None:
    """Guards against a tuned value slipping into either variant of the Qwen3-8B recipe."""
    c = load(CONFIGS / "cpt_qwen3_8b.yaml", [] if optimizer == "muon" else ["optimizer.name=adamw"])
    o, s, t = c.optimizer, c.selection, c.training
    assert (o.name, o.lr, o.muon_lr, o.adam_beta1, o.adam_beta2) == (optimizer, 1e-6, 1e-5, 0.9, 0.95)
    assert (o.weight_decay, o.muon_weight_decay, o.lr_warmup_fraction) == (0.01, 0.01, 0.01)
    assert (c.data.seq_length, s.rho, s.score_length, s.proxy_batch_size) == (4096, 0.5, 512, 4)
    assert (t.precision, t.recompute, c.parallel.zero_stage) == ("bf16", "full", 2)
    assert c.buffer_size == 16 * (8 // c.parallel.tensor_model_parallel_size)
    assert 0.5e9 <= t.train_steps * t.global_batch_size * c.data.seq_length <= 1.51e9


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_draws_as_was_measured_to_be_best(path: Path) -> None:
    """Guards against recipes that differ in what docs/evidence.md settled, or a default that none of them has."""
    s, default = load(path).selection, SelectionConfig()
    assert (s.sampling, s.temperature, s.temperature_unit) == ("boltzmann", 0.3, "std")
    assert (s.redundancy.scale, s.preconditioner.kind, s.preconditioner.form) == ("matched", "auto", "separable")
    assert (s.sampling, s.temperature, s.temperature_unit) == (
        default.sampling,
        default.temperature,
        default.temperature_unit,
    )


# --- combinations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["training.train_steps=0"], "training.train_steps: expected a positive number, got 0"),
        (["training.global_batch_size=-1"], "training.global_batch_size: expected a positive number, got -1"),
        (["name=a/b"], "name: expected letters, digits"),
        (["model.hidden_size=66"], "model.hidden_size: expected a multiple of num_attention_heads (4), got 66"),
        (["model.num_query_groups=3"], "model.num_query_groups: expected a divisor of num_attention_heads (4), got 3"),
        (["parallel.tensor_model_parallel_size=3"], "expected a multiple of tensor_model_parallel_size (3)"),
        (["parallel.pipeline_model_parallel_size=2"], "expected 1 with parallel.engine deepspeed, got 2"),
        (["model.max_position_embeddings=64", "data.seq_length=65"], "expected at least data.seq_length (65), got 64"),
        (["selection.rho=0"], "selection.rho: expected 0 < rho <= 1, got 0.0"),
        (["selection.rho=1.5"], "selection.rho: expected 0 < rho <= 1, got 1.5"),
        (["selection.rho=0.3"], "to be whole, got 53.3333"),
        (["selection.temperature=0"], "for argmax use sampling: greedy"),
        (["selection.proxy_momentum=1"], "selection.proxy_momentum: expected 0 <= beta < 1, got 1.0"),
        (["selection.preconditioner.form=exact"], "preconditioner.form exact needs materialise"),
        (["selection.scored_layers=none"], "none leaves nothing to score"),
        (["selection.target=update", "selection.sketch.alignment=features"], "update needs sketch.alignment one_sided"),
        (["selection.redundancy.fraction=-1"], "selection.redundancy.fraction: expected >= 0, got -1.0"),
        (["optimizer.lr=0"], "optimizer.lr: expected 0 <= min_lr <= lr"),
        (["optimizer.min_lr=1"], "optimizer.lr: expected 0 <= min_lr <= lr, got 1.0, 0.0003"),
        (["optimizer.adam_beta2=1"], "optimizer.adam_beta2: expected 0 <= beta < 1, got 1.0"),
        (["data.proxy_weights={a: 0}"], "data.proxy_weights.a: expected > 0, got 0.0"),
        (["data.domain_weights={a: 0}"], "data.domain_weights: expected non-negative numbers with a positive sum"),
        (["data.domain_weights={a: 1, b: -1}"], "data.domain_weights.b: expected >= 0, got -1.0"),
    ],
)
def test_values_that_cannot_run_together_are_refused(recipe: Path, overrides: list[str], expected: str) -> None:
    """Guards against a run that fails, or trains something else, after minutes of set-up."""
    with pytest.raises(ConfigError) as caught:
        load(recipe, overrides)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "ranks", "expected"),
    [
        (["parallel.tensor_model_parallel_size=2"], 3, "2 does not divide the 3 processes started; start a multiple"),
        (["training.global_batch_size=6"], 4, "training.global_batch_size: expected a multiple of 4"),
        (
            ["training.micro_batch_size=8"],
            4,
            "expected a multiple of 32 (data-parallel size 4 x micro_batch_size 8), got 16",
        ),
    ],
)
def test_a_layout_that_does_not_divide_is_refused(
    recipe: Path, overrides: list[str], ranks: int, expected: str
) -> None:
    """Guards against ranks that disagree about the number of microbatches and wait for each other for ever."""
    with pytest.raises(ConfigError) as caught:
        validate_world(load(recipe, overrides), ranks)
    assert expected in str(caught.value)


def test_tensor_parallel_ranks_do_not_count_as_data_parallel(recipe: Path) -> None:
    """Guards against dividing the batch by all ranks under tensor parallelism."""
    c = load(recipe, ["parallel.tensor_model_parallel_size=4", "training.global_batch_size=1", "selection.rho=1"])
    c = dataclasses.replace(c, selection=dataclasses.replace(c.selection, proxy_batch_size=1))
    validate_world(c, 4)


@pytest.mark.parametrize(("k", "rho", "n"), [(16, 0.5, 32), (3, 0.3, 10), (7, 1.0, 7), (1, 0.1, 10)])
def test_the_buffer_size_is_whole_in_spite_of_rounding(k: int, rho: float, n: int) -> None:
    """Guards against int(3 / 0.3) = 9: the buffer would offer one candidate fewer than K / rho."""
    assert from_dict({**SMALL, "training": {"global_batch_size": k}, "selection": {"rho": rho}}).buffer_size == n


def test_every_section_is_immutable_and_keyword_only() -> None:
    """Guards against a configuration that changes after it was written to config.yaml."""
    c = from_dict(SMALL)
    with pytest.raises(dataclasses.FrozenInstanceError):
        c.seed = 1  # type: ignore[misc]
    sections = [v for v in vars(config_module).values() if dataclasses.is_dataclass(v)]
    assert RunConfig in sections
    for section in sections:
        assert all(f.kw_only for f in dataclasses.fields(section)), section.__name__


def test_every_key_that_a_page_names_exists() -> None:
    """Guards against pages that tell of keys which the program refuses."""
    pages = (CONFIGS.parent / "README.md", *(CONFIGS.parent / "docs").glob("*.md"))
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    sections = "model|data|parallel|optimizer|training|selection"
    named = set(re.findall(rf"(?<![.\w])((?:{sections})(?:\.[a-z_]+)+)(?=[`=,])", text))
    paths = [*leaves(to_dict(from_dict(SMALL)))]
    known = {".".join(path[:depth]) for path in paths for depth in range(2, len(path) + 1)}  # sections of sections too
    assert len(named) > 20
    assert named <= known, named - known


def leaves(tree: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from ((key, *rest) for rest in leaves(value))
        else:
            yield (key,)
