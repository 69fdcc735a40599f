"""Settings that may change at a resume, and those that a checkpoint of an earlier release does not have."""

from __future__ import annotations

import json
from typing import Any

from megatron_opus.config import from_dict, to_dict
from megatron_opus.report.record import read_records
from megatron_opus.runs.checkpoints import CHANGES_FILE, recorded_changes, settings_that_differ

SMALL: dict[str, Any] = {"name": "x", "model": {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1}}


def test_the_mixture_may_change_and_is_told():
    """Guards against a changed mixture that is refused, or that passes without a word, and a rate that passes too."""
    saved = to_dict(from_dict({**SMALL, "data": {"domain_weights": {"a": 1.0, "b": 2.0}}}))
    points = {"0%": {"a": 1.0}}
    now = from_dict({**SMALL, "data": {"domain_schedule": {"points": points}, "domain_max_epochs": {"b": 2.0}}})
    assert settings_that_differ(saved, now) == []
    assert {key: (was, new) for key, was, new in recorded_changes(saved, now)} == {
        "data.domain_weights.a": (1.0, "absent"),
        "data.domain_weights.b": (2.0, "absent"),
        "data.domain_schedule.points.0%.a": ("absent", 1.0),
        "data.domain_max_epochs.b": ("absent", 2.0),
    }
    other = from_dict({**SMALL, "optimizer": {"lr": 0.5}})
    assert [key for key, _, _ in settings_that_differ(saved, other)] == ["optimizer.lr"]


def test_another_target_is_another_run():
    """Guards against a run whose target changes in the middle, while averages and shares keep what the old one left."""
    saved = to_dict(from_dict({**SMALL, "data": {"proxy_weights": {"a": 1.0, "b": 2.0}}}))
    assert settings_that_differ(saved, from_dict(SMALL)) == [
        ("data.proxy_weights.a", 1.0, "absent"),
        ("data.proxy_weights.b", 2.0, "absent"),
    ]
    del saved["data"]["proxy_weights"]
    assert settings_that_differ(saved, from_dict(SMALL)) == []


def test_settings_that_are_new_since_are_at_their_defaults():
    """Guards against a release after which no older run can be resumed, and one that resumes it with other settings."""
    saved = to_dict(from_dict(SMALL))
    for section, key in (("selection", "controller"), ("selection", "prefilter"), ("data", "domain_schedule")):
        del saved[section][key]
    assert settings_that_differ(saved, from_dict(SMALL)) == []
    assert recorded_changes(saved, from_dict(SMALL)) == []
    other = from_dict({**SMALL, "selection": {"controller": {"enabled": True}}})
    assert settings_that_differ(saved, other) == [("selection.controller.enabled", False, True)]


def test_a_change_is_in_the_report(tmp_path):
    """Guards against curves that bend at a step where the page says nothing."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text(json.dumps({"step": 0, "loss": 1.0}) + "\n")
    row = {"step": 7, "key": "data.domain_weights.a", "was": 1.0, "now": 2.0}
    (run / CHANGES_FILE).write_text(json.dumps(row) + "\n")
    (record,) = read_records([run])
    assert "From step 7 on data.domain_weights.a is 2.0; it was 1.0." in record.notes
