"""Domain weights over the run, and caps on the epochs of a domain."""

from __future__ import annotations

import numpy as np
import pytest
from test_candidate_buffer import Domains, use

from megatron_opus.config import ConfigError, DataConfig, DomainScheduleConfig
from megatron_opus.config.load import from_dict
from megatron_opus.data.buffer import CandidateBuffer, DrawError
from megatron_opus.data.domain_schedule import DomainSchedule, domain_schedule

SIZES = {"a": 400, "b": 300, "c": 60}
SMALL = {"name": "x", "model": {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1}}


def schedule(points, interpolation="constant", steps=100) -> DomainSchedule:
    config = DataConfig(domain_schedule=DomainScheduleConfig(points=points, interpolation=interpolation))
    return domain_schedule(Domains(SIZES), config, steps)  # type: ignore[arg-type]


def test_points_are_steps_and_shares_of_the_run():
    """Guards against a share of the run taken of another number of steps, and a point that begins a step late."""
    made = schedule({"step 10": {"b": 2}, "0%": {"a": 1, "b": 1}, "80%": {"a": 1}})
    assert made.steps == (0, 10, 80)
    assert made.at(9).tolist() == [0.5, 0.5, 0]
    assert made.at(10).tolist() == made.at(79).tolist() == [0, 1, 0]
    assert made.at(80).tolist() == made.at(10**6).tolist() == [1, 0, 0]


def test_a_line_runs_from_point_to_point():
    """Guards against a line that jumps at its ends, or goes on after the last point."""
    made = schedule({"0%": {"a": 1}, "50%": {"b": 3}}, "linear")
    np.testing.assert_allclose(
        [made.at(step) for step in (0, 10, 25, 50, 99)], np.array([[1, 0.8, 0.5, 0, 0], [0, 0.2, 0.5, 1, 1], [0] * 5]).T
    )


@pytest.mark.parametrize(
    ("points", "said"),
    [
        ({"step 5": {"a": 1}}, "expected a first point at `0%` or `step 0`"),
        ({"0%": {"a": 1}, "50%": {"a": 1}, "step 50": {"b": 1}}, r"two points stand at step \[50\] of 100"),
        ({"0%": {"a": 0}}, "points.0%: expected non-negative numbers with a positive sum"),
        ({"begin": {"a": 1}}, "expected `step N` or `P%`"),
        ({"120%": {"a": 1}}, "expected `step N` or `P%`"),
    ],
)
def test_a_schedule_that_says_two_things_is_refused(points, said):
    """Guards against a mistyped place that is silently the last one, or the first."""
    raw = {**SMALL, "data": {"domain_schedule": {"points": points}}, "training": {"train_steps": 100}}
    with pytest.raises(ConfigError, match=said):
        from_dict(raw)


def test_weights_beside_a_schedule_are_refused():
    """Guards against two sources of the same weights, one of which is ignored."""
    with pytest.raises(ConfigError, match=r"takes the place of data\.domain_weights"):
        DataConfig(domain_weights={"a": 1}, domain_schedule=DomainScheduleConfig(points={"0%": {"a": 1}}))


def test_what_a_strategy_asks_for_multiplies_the_schedule():
    """Guards against a strategy that overrides the schedule, and against a schedule that overrides the strategy."""
    made = schedule({"0%": {"a": 0.8, "b": 0.2}, "50%": {"a": 0.2, "b": 0.8}})
    assert made.prior.tolist() == [0.5, 0.5, 0]
    np.testing.assert_allclose(made.shares(0, None), [0.8, 0.2, 0])
    np.testing.assert_allclose(made.shares(0, made.prior), [0.8, 0.2, 0])
    np.testing.assert_allclose(made.shares(0, [0.25, 0.75, 0]), [4 / 7, 3 / 7, 0])
    assert schedule({"0%": {"a": 1}}).shares(3, [0, 2, 2]).tolist() == [0, 0.5, 0.5]  # without a change: as asked


def test_the_buffer_follows_the_schedule_and_resumes_in_the_middle_of_it():
    """Guards against a buffer that reads the schedule at its own count of draws instead of the run's step."""
    made = schedule({"0%": {"a": 1, "b": 1}, "step 5": {"c": 1, "a": 3}})

    def buffer() -> CandidateBuffer:
        return CandidateBuffer(Domains(SIZES), 8, 1, schedule=made)  # type: ignore[arg-type]

    whole, cut = buffer(), buffer()
    drawn = [use(whole, step)[0] for step in range(10)]
    assert [np.bincount(d.domains, minlength=3).tolist() for d in drawn] == [[4, 4, 0]] * 5 + [[6, 0, 2]] * 5
    for step in range(4):
        use(cut, step)
    resumed = buffer()
    resumed.load_state_dict(cut.state_dict())
    for step in range(4, 10):
        assert use(resumed, step)[0].sample_ids.tolist() == drawn[step].sample_ids.tolist()


@pytest.mark.parametrize("unselected", ["discard", "return"])
def test_a_domain_is_not_gone_through_more_often_than_it_may(unselected):
    """Guards against a cap that counts draws instead of sequences, or that leaves the buffer short.

    60 sequences of c at most 1.5 times: 90 of them offered, or with `return` used. The others fill its share."""
    weights = {"c": 0.5, "a": 0.25, "b": 0.25}
    b = CandidateBuffer(Domains(SIZES), 8, 1, weights, unselected, max_epochs={"c": 1.5})  # type: ignore[arg-type]
    sizes = [len(use(b, step)[0]) for step in range(70)]
    counters = b.counters()["c"]
    assert {*sizes} == {8}
    assert (counters["used"] if unselected == "return" else counters["offered"]) == 90
    assert len(b.notices) == 1
    assert "domain c has been gone through" in b.notices[0]


def test_nothing_left_is_an_error_with_a_remedy():
    """Guards against a run that repeats what it may not, or ends in an endless loop, when all domains are used up."""
    b = CandidateBuffer(Domains(SIZES), 8, 1, {"c": 1.0}, max_epochs={"c": 0.5})  # type: ignore[arg-type]
    for step in range(3):
        use(b, step)
    with pytest.raises(DrawError, match=r"2 of 8 candidates are missing.*domain_max_epochs"):
        use(b, 3)
    with pytest.raises(DrawError, match="no candidate domain 'd'"):
        CandidateBuffer(Domains(SIZES), 8, 1, max_epochs={"d": 1})  # type: ignore[arg-type]
