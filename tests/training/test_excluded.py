"""A candidate with NaN or infinite factors is left out, and nothing of it reaches the others. Real runs."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import recipe

from megatron_opus.config import RunConfig

STEPS, N, K = 3, 8, 4
MODEL = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "untie_embeddings_and_output_weights": True}


class Kept(list):
    """Notices, kept when the loop clears them."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[str] = []

    def clear(self) -> None:
        self.all += self
        super().clear()


def put_infinity(model: torch.nn.Module, token: int) -> None:
    """The embedding of one token, on the rank that holds it."""
    module = model.embedding.word_embeddings
    row = token - module.vocab_start_index
    if 0 <= row < module.weight.shape[0]:
        with torch.no_grad():
            module.weight[row] = float("inf")


def hide_window(corpus: Any, ids: list[int], length: int) -> None:
    """No token of these sequences counts in the scoring window."""
    batch = corpus.batch

    def masked(sample_ids: Any) -> Any:
        result = batch(sample_ids)
        result.loss_mask[np.isin(np.asarray(sample_ids), ids), :length] = 0.0
        return result

    corpus.batch = masked


def damaged_run(config: RunConfig, kind: str, wanted: str) -> dict[str, Any]:
    """Score the candidates of step 0 before and after the damage, then train; what was found out on this rank.

    wanted: damage what `few` of the candidates of step 0 have and the proxy has not, or what almost `all` have.
    """
    from megatron_opus.data.buffer import CandidateBuffer
    from megatron_opus.runs.ledger import read_ledger
    from megatron_opus.training.session import Session

    session = Session(config, resume=False, versions={}, say=lambda text: None)
    driver, corpus = session.driver, session.corpus
    first = CandidateBuffer(corpus, N, config.seed, unselected="discard").draw(0)
    untouched = driver.state_dict()
    clean, clean_state = driver._score(first), driver._scorer.state_dict()
    driver.load_state_dict(untouched)

    tokens = corpus.batch(first.sample_ids).tokens.numpy()
    proxy = {
        t for s in range(STEPS) for t in corpus.batch(corpus.proxy_ids(s, 4, config.seed)).tokens.unique().tolist()
    }
    holders = Counter(t for row in tokens for t in set(row.tolist()))
    if wanted == "all":
        token = holders.most_common(1)[0][0]
    else:
        token = min(t for t, count in holders.items() if count == 2 and t not in proxy)
    if kind == "token":
        put_infinity(session.engine.module, token)
    else:
        hide_window(corpus, [int(i) for i, row in zip(first.sample_ids, tokens, strict=True) if token in row], 16)
    if wanted == "few":
        damaged, damaged_state = driver._score(first), driver._scorer.state_dict()
        driver.load_state_dict(untouched)
    else:
        damaged, damaged_state = clean, clean_state
    driver.notices = Kept()
    error = ""
    try:
        session.train()
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}"
    driver.notices.clear()
    torch.distributed.barrier()  # rank 0 has closed its record
    table = read_ledger(session.run_dir / "ledger").to_pydict()
    return {
        "clean": clean,
        "damaged": damaged,
        # of the only stage and rank; None where no proxy was finite
        "psi": tuple((x["proxy_average"][0][0] or [None])[0] for x in (clean_state, damaged_state)),
        "holds": [token in row for row in corpus.batch(np.array(table["sample_id"])).tokens.numpy()],
        "ledger": table,
        "notices": driver.notices.all,
        "counters": driver.counters,
        "error": error,
    }


CASES = [
    ("tp2", {"parallel": {"tensor_model_parallel_size": 2}}, {}),
    ("tp2-sp", {"parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True}}, {}),
    ("dp2", {}, {}),
    ("dp2-local", {}, {"scope": "rank_local"}),
]


@pytest.mark.parametrize(("name", "sections", "selection"), CASES, ids=[c[0] for c in CASES])
def test_only_candidates_with_infinite_factors_are_excluded(
    world2, embedded_cache, tmp_path, name, sections, selection
):
    """Fault: the infinities of one sequence reach the scores of others through a product over the batch (NaN * 0), the
    Gram matrix, the proxy average or a reduction over ranks; an exclusion that nobody sees. Scores and proxy average
    of the others are bit-identical to those of the undamaged model."""
    config = recipe(
        embedded_cache,
        tmp_path,
        name,
        model=MODEL,
        training={"train_steps": STEPS},
        selection={"proxy_momentum": 0.5, "sketch": {"alignment": "features"}, **selection},
        **sections,
    )
    results = world2.run(damaged_run, config, "token", "few")
    assert not all(result["damaged"].finite.all() for result in results)
    for result in results:
        check_damage(result, reason={"non-finite loss"})
        ledger, holds = result["ledger"], result["holds"]
        assert 2 <= sum(holds) <= len(holds) // 2
        assert [not finite for finite in ledger["finite"]] == holds
        assert not any(chosen and bad for chosen, bad in zip(ledger["selected"], holds, strict=True))
        assert sum(ledger["selected"]) == STEPS * K
        assert result["counters"].excluded == sum(holds)
        assert result["counters"].fallbacks == 0
        # the validation sets have the token, too, so that the run does not count as a good one at its end
        assert result["error"].startswith("NonFiniteLoss: the run has ended, but its last losses are no numbers: prose")
        assert any("2 of 8 candidates excluded for a non-finite loss: sample ids" in text for text in result["notices"])


def check_damage(result: dict[str, Any], reason: set[str]) -> None:
    """What the scores of step 0 and the ledger say."""
    clean, damaged = result["clean"], result["damaged"]
    assert clean.finite.all()
    good = damaged.finite
    assert good.any()
    assert torch.equal(damaged.alignment[good], clean.alignment[good])
    assert torch.equal(damaged.loss[good], clean.loss[good])
    assert torch.equal(damaged.interaction[good][:, good], clean.interaction[good][:, good])
    assert torch.equal(*result["psi"])
    reasons = {
        r for r, finite in zip(result["ledger"]["excluded"], result["ledger"]["finite"], strict=True) if not finite
    }
    assert reasons == reason
    assert all(r is None for r, f in zip(result["ledger"]["excluded"], result["ledger"]["finite"], strict=True) if f)


def test_a_sequence_without_a_counting_token_in_its_window_is_excluded(world2, embedded_cache, tmp_path):
    """Fault: a masked sequence has a loss of 0 / 0, which poisons the batch, or counts as a sequence of utility 0. The
    rest of the sequence could have been trained on, but nothing is known about it."""
    config = recipe(
        embedded_cache,
        tmp_path,
        "masked",
        model=MODEL,
        training={"train_steps": STEPS},
        selection={"proxy_momentum": 0.5, "sketch": {"alignment": "features"}, "score_length": 16},
    )
    for result in world2.run(damaged_run, config, "mask", "few"):
        check_damage(result, reason={"non-finite loss"})
        assert result["ledger"]["finite"][:N].count(False) == result["holds"][:N].count(True) == 2
        assert not result["error"]


def test_too_few_finite_candidates_fall_back_and_end_the_run(world2, embedded_cache, tmp_path):
    """Fault: with almost everything infinite a run trains on at random, and only the log of fallbacks would have said
    so. The infinite token is in the proxy too: nothing can be scored."""
    config = recipe(
        embedded_cache,
        tmp_path,
        "fallback",
        model=MODEL,
        training={"train_steps": STEPS, "max_nonfinite_steps": 10},
        selection={"max_fallbacks": 1},
    )
    for result in world2.run(damaged_run, config, "token", "all"):
        assert result["error"].startswith(
            "TooManyFallbacks: selection fell back to random 2 times, max_fallbacks allows 1"
        )
        assert "0 of 8 candidates have finite scores, need 4" in result["error"]
        assert any("fell back to random (1 of at most 1)" in text for text in result["notices"])
        assert result["ledger"]["finite"] == [False] * N  # of the step that fell back and was recorded
        assert sum(result["ledger"]["selected"]) == K
        assert result["counters"].excluded == 2 * N


def test_sequences_shorter_than_the_window_are_scored_whole(world2, embedded_cache, tmp_path):
    """Fault: a window longer than the sequences is read past their end, or padded with tokens that count."""
    from tiny_runs import run

    results = [
        world2.run(
            run,
            recipe(
                embedded_cache,
                tmp_path,
                f"window{length}",
                selection={"score_length": length},
                data={"eod_mask_loss": True},
                training={"train_steps": STEPS},
            ),
        )[0]
        for length in (32, 512)
    ]
    for column in ("ids", "order", "losses"):
        assert results[0][column] == results[1][column]
    assert torch.equal(results[0]["alignment"], results[1]["alignment"])
    assert results[0]["driver"] == results[1]["driver"]
