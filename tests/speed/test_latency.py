"""Latency of `generate` calls: every step is recorded, outputs do not change, and summaries match values by hand."""

from __future__ import annotations

import time

import pytest
import torch

from hf_earlyexit.speed.latency import CallTimes, count_tokens, summarize, timed_generate
from tests.tiny import ENDS, tiny_inputs, tiny_pair, unrest


DECODING = {"max_new_tokens": 12, "eos_token_id": ENDS, "pad_token_id": 0}
EXITS = {"exit_criterion": "max_prob", "exit_threshold": 0.05}


@pytest.fixture(scope="module")
def pair():
    stock, model = tiny_pair(seed=3)
    for one in (stock, model):
        one.generation_config.eos_token_id = ENDS
    return stock, model


def test_every_step_is_noted_and_nothing_changes(pair):
    """For stock and early-exit models, with rows that end at different steps."""
    for model, keywords in zip(pair, ({}, EXITS)):
        batch, seen = {**tiny_inputs(4), **DECODING, "logits_processor": unrest()}, []
        plain = model.generate(**batch, **keywords)
        times = timed_generate(
            model, lambda **call: seen.append(model.generate(**call, **keywords)) or seen[-1], batch
        )
        assert torch.equal(seen[0], plain)
        assert len(times.steps) == plain.shape[1] - 1 and len(times.inter_token) == plain.shape[1] - 2
        lengths = [
            next((n for n, token in enumerate(row, 1) if token in ENDS), len(row)) for row in plain[:, 1:].tolist()
        ]
        assert times.tokens == sum(lengths) and len(set(lengths)) > 1
        assert times.start < times.steps[0] and times.steps == sorted(times.steps)
        assert 0 < times.encoder < times.first_token < times.whole and times.steps[-1] < times.end


def test_the_encoder_is_timed_by_itself(pair, monkeypatch):
    stock, _ = pair
    forward = stock.encoder.forward

    def slow(*args, **kwargs):
        time.sleep(0.5)
        return forward(*args, **kwargs)

    monkeypatch.setattr(stock.encoder, "forward", slow)
    times = timed_generate(stock, stock.generate, {**tiny_inputs(2), "max_new_tokens": 3})
    assert 0.5 <= times.encoder < times.first_token and max(times.inter_token) < 0.5


def test_hooks_are_gone_after_an_exception(pair):
    _, model = pair
    with pytest.raises(ValueError, match="exit_threshold"):
        timed_generate(model, model.generate, {**tiny_inputs(2), "exit_criterion": "softmax", "exit_threshold": 3})
    assert not model.encoder._forward_hooks and not model.encoder._forward_pre_hooks


def test_beams_are_counted_without_the_decoders_start(pair):
    """Beams may end before the last step, so there may be fewer tokens than steps."""
    _, model = pair
    batch = {**tiny_inputs(3), **DECODING, "num_beams": 3, "early_stopping": True, "logits_processor": unrest()}
    ids = model.generate(**batch, early_exit=False)[:, 1:]
    times = timed_generate(model, model.generate, {**batch, "early_exit": False})
    assert times.tokens == count_tokens(ids, ENDS) and len(times.steps) >= ids.shape[1]


def test_sums_by_hand():
    first = CallTimes(start=1.0, steps=[2.0, 2.1, 2.3], end=2.4, encoder=0.5, tokens=5)
    second = CallTimes(start=4.0, steps=[4.4, 4.8], end=4.8, encoder=0.1, tokens=2)
    found = summarize([first, second])
    assert found["tokens_per_second"] == pytest.approx(7 / (1.4 + 0.8))
    assert found["inter_token_ms"]["median"] == pytest.approx(200)
    assert found["inter_token_ms"]["p95"] == pytest.approx(380)
    assert found["first_token_ms"]["median"] == pytest.approx(700)
    assert found["encoder_ms"]["median"] == pytest.approx(300)
    only = summarize([CallTimes(0.0, [1.0], 1.0, 0.5, 1)])
    assert only["inter_token_ms"] == {"median": None, "p95": None}, "one token has no next one"


def test_tokens_are_counted_up_to_the_first_end():
    tokens = torch.tensor([[5, 6, 1, 0], [5, 1, 1, 1], [5, 6, 7, 8], [0, 5, 1, 0]])
    assert count_tokens(tokens, 1) == 3 + 2 + 4 + 3
    assert count_tokens(tokens, [1, 6]) == 2 + 2 + 2 + 3
    assert count_tokens(tokens, None) == 16
