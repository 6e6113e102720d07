"""Loss, divergence and agreement, on distributions small enough to work out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from compression.evaluation.perplexity import compare


def test_two_words_by_hand():
    ids_S = torch.tensor([0, 1])
    before_SV = torch.tensor([[0.75, 0.25], [0.5, 0.5]]).log()
    after_SV = torch.tensor([[0.25, 0.75], [0.5, 0.5]]).log()

    loss_before, loss_after, divergence, agreements = compare(ids_S, before_SV, after_SV).tolist()

    assert loss_before == pytest.approx(-math.log(0.25))
    assert loss_after == pytest.approx(-math.log(0.75))
    assert divergence == pytest.approx(0.75 * math.log(3) - 0.25 * math.log(3))
    assert agreements == 0.0


def test_a_model_does_not_diverge_from_itself():
    logits_SV = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    ids_S = torch.randint(0, 30, (40,))

    loss_before, loss_after, divergence, agreements = compare(ids_S, logits_SV, logits_SV).tolist()

    assert loss_before == loss_after
    assert divergence == 0.0
    assert agreements == 39


def test_long_sequences_are_summed_in_pieces_without_losing_a_token(monkeypatch):
    generator = torch.Generator().manual_seed(1)
    ids_S = torch.randint(0, 20, (33,), generator=generator)
    before_SV, after_SV = torch.randn(2, 33, 20, generator=generator)
    whole = compare(ids_S, before_SV, after_SV)

    monkeypatch.setattr("compression.evaluation.perplexity._ROWS", 5)

    torch.testing.assert_close(compare(ids_S, before_SV, after_SV), whole, rtol=1e-6, atol=0)
