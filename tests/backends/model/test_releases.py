"""Releases of the hosts: what is refused at start, and what is said of one that was not tested."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from megatron.core import parallel_state

from megatron_opus.backends.model import parallel, releases
from megatron_opus.config import ConfigError

ROOT = Path(__file__).resolve().parents[3]
START = (
    "import pathlib, sys; from megatron_opus.training.main import main; "
    "sys.exit(main(pathlib.Path('configs/pretrain_gpt2_tiny.yaml'), sys.argv[1:]))"
)


def started_with(folder: Path, package: str, release: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Start the trainer where `package` says that it is of this release."""
    info = folder / f"{package.replace('-', '_')}-{release}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {release}\n")
    return subprocess.run(
        [sys.executable, "-c", START, f"output_dir={folder}", *overrides],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{folder}:{ROOT}"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_an_old_release_is_refused_at_start(tmp_path: Path) -> None:
    """Guards against a traceback, out of the middle of an import, as all that an old megatron-core says."""
    result = started_with(tmp_path, "megatron-core", "0.15.3")
    assert result.returncode == 2
    assert result.stderr.startswith("error: megatron-core: expected 0.16 or later, got 0.15.3; install")
    assert "Traceback" not in result.stderr


def test_an_import_that_a_new_release_breaks_is_explained(tmp_path: Path) -> None:
    """Guards against a bare ImportError where a release moved a name: which release, and which ones work?"""
    moved = tmp_path / "sitecustomize.py"
    moved.write_text("import sys\nsys.modules['megatron.core.models.gpt.gpt_layer_specs'] = None\n")
    result = started_with(tmp_path, "megatron-core", "0.99.0")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    warning, error = (line for line in result.stderr.splitlines() if line.startswith(("warning: ", "error: ")))
    tested = ", ".join(releases.TESTED["megatron-core"])
    assert warning == f"warning: megatron-core 0.99.0: not tested with megatron_opus; tested: {tested}"
    assert "gpt_layer_specs" in error
    assert "megatron-core 0.99.0: not tested" in error


def test_what_is_said_of_each_release() -> None:
    """Guards against silence about an untested release, and against noise about a tested one."""
    tested = {name: releases.TESTED[name][-1] for name in releases.TESTED}
    assert releases.check(tested) == []
    assert [line.split(":")[0] for line in releases.check({**tested, "torch": "9.0.0"})] == ["torch 9.0.0"]
    for name, old in (("megatron-core", "0.15.3"), ("deepspeed", "0.16.9"), ("torch", "2.5.1")):
        with pytest.raises(releases.UnsupportedRelease, match=f"{name}: expected {releases.LOWEST[name]} or later"):
            releases.check({**tested, name: old})


def test_lower_bounds_are_those_of_the_package() -> None:
    """Guards against a bound that pip enforces and another one that the start enforces."""
    text = (ROOT / "pyproject.toml").read_text()
    for name, lowest in releases.LOWEST.items():
        assert re.search(rf'"{name}>={re.escape(lowest)}[,"]', text), name


def test_the_pinned_combination_is_a_tested_one() -> None:
    """Guards against a pin that moves while the table of tested releases stays."""
    pins = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE))
    assert {name: pins[name] in tested for name, tested in releases.TESTED.items()} == dict.fromkeys(
        releases.TESTED, True
    )


def test_a_moved_private_name_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against an AttributeError deep in the seeding of a run."""
    monkeypatch.delattr(releases.megatron_random(), "_DATA_PARALLEL_RNG_TRACKER_NAME")
    with pytest.raises(releases.UnsupportedRelease, match=r"expected .*_DATA_PARALLEL_RNG_TRACKER_NAME, found none"):
        releases.megatron_random()


@pytest.mark.parametrize(
    ("where", "name"),
    [
        ("torch_dist_strategies", "_replace_state_dict_keys_with_sharded_keys"),
        ("distributed_optimizer", "_get_model_param_range_map"),
    ],
)
def test_a_moved_private_name_of_the_engine_is_named(monkeypatch: pytest.MonkeyPatch, where: str, name: str) -> None:
    """Guards against an AttributeError at the first checkpoint of a run."""
    monkeypatch.delattr(getattr(releases, where)(), name)
    with pytest.raises(releases.UnsupportedRelease, match=rf"expected .*{name}, found none"):
        getattr(releases, where)()


def test_a_muon_without_its_shape_factor_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against scoring with numbers that an older DeepSpeed's Muon does not use."""
    monkeypatch.delattr(releases.deepspeed_muon()[0], "_aspect_ratio_scale")
    with pytest.raises(releases.UnsupportedRelease, match=r"Muon's _aspect_ratio_scale, found none.*adamw"):
        releases.deepspeed_muon()


def test_generalised_tensor_parallelism_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against scores of pieces that no shard map describes, which megatron-core 0.19 can make."""
    monkeypatch.setattr(parallel_state, "get_gtp_weight_remat_world_size", lambda: 2, raising=False)
    with pytest.raises(ConfigError, match="gtp_remat_size 1, got 2"):
        parallel.megatron_groups()
