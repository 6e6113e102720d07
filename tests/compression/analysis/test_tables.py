"""The tables are plain data, whole where they are small and summaries where they are not."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from compression.analysis import tables as module
from compression.analysis.likeness import likeness
from compression.analysis.tables import analysis_tables, pair_table
from compression.architectures import ARCHITECTURES
from compression.block import Shell
from compression.calibration import load_calibration
from compression.checkpoint.reader import Reader
from compression.observer import Observer
from compression.request import Calibration
from compression.sweep import Stream, sweep
from tests.compression.analysis.studies import a_router, a_study, counted, live, random_layer, sample_of, statistics


def gathered():
    ids_TK = torch.multinomial(torch.ones(500, 4), 2, generator=torch.Generator().manual_seed(0))
    sample = sample_of(torch.randn(5, 4, 8, generator=torch.Generator().manual_seed(1)))
    return counted(ids_TK, 4, sample=sample, likeness=likeness(live(*random_layer()), a_router(4, 32)))


def test_tables_survive_json_unchanged_and_hold_no_nan():
    tables = analysis_tables(a_study(gathered(), statistics(4)))

    assert json.loads(json.dumps(tables, allow_nan=False)) == tables


def test_every_block_has_a_row_and_what_was_not_gathered_is_none():
    study = a_study(gathered(), replace(gathered(), sample=None, likeness=None))
    study.cosine_M[2] = study.cosine_M[0]  # a dense block

    full, bare, dense = analysis_tables(study)["blocks"]

    assert full["likeness"]["matching"]["pairs"] == 6
    assert full["outputs"]["tokens"] == 5
    assert len(full["lift"]["all"]) == 4
    assert bare["likeness"] is bare["outputs"] is None
    assert bare["routing"]["mixed"]["tokens"] == 500
    assert dense == {"block": 2, "experts": 0, "redundancy": {
        "block_cosine": 0.5, "layer_cosine": None, "output_similarity": None, "matrix_similarity": None,
    }}  # fmt: skip


def test_a_study_without_tokens_has_no_routing_but_still_a_table():
    [row] = analysis_tables(a_study(statistics(4, likeness=likeness(live(*random_layer()), a_router(4, 32)))))["blocks"]

    assert row["routing"] == {"mixed": None, "domains": {"text": None}}
    assert row["lift"] is None
    assert row["redundancy"]["block_cosine"] is None
    assert row["redundancy"]["matrix_similarity"] is not None


def test_beyond_the_limit_over_all_layers_pairs_are_summed_up(monkeypatch):
    study = a_study(gathered(), gathered())
    monkeypatch.setattr(module, "FULL_NUMBERS", 9 * 2 * 4**2)
    assert analysis_tables(study)["pair_tables"] == "full"
    monkeypatch.setattr(module, "FULL_NUMBERS", 9 * 2 * 4**2 - 1)

    tables = analysis_tables(study)

    assert tables["pair_tables"] == "summaries"
    assert set(tables["blocks"][0]["lift"]) == {"mean", "lowest", "highest", "top", "bottom"}


def test_a_summary_names_the_pairs_at_both_ends(monkeypatch):
    monkeypatch.setattr(module, "NAMED_PAIRS", 2)
    value_EE = torch.zeros(4, 4)
    for (one, other), value in {(0, 1): 5.0, (0, 2): 1.0, (0, 3): 2.0, (1, 2): -3.0, (1, 3): 0.0, (2, 3): 7.0}.items():
        value_EE[one, other] = value_EE[other, one] = value

    table = pair_table(value_EE, full=False)

    assert table == {
        "mean": 2.0, "lowest": -3.0, "highest": 7.0,
        "top": [[2, 3, 7.0], [0, 1, 5.0]], "bottom": [[1, 2, -3.0], [1, 3, 0.0]],
    }  # fmt: skip


def test_a_layer_of_one_expert_has_no_pairs():
    assert pair_table(torch.ones(1, 1), full=True) == {"mean": None}


@pytest.mark.slow
def test_the_tables_of_a_trained_model_hang_together(shared_folder):
    folder = shared_folder / "models" / "mixtral-docs"
    reader = Reader(folder)
    shell = Shell(reader.config, reader.outside())
    text = f"file://{shared_folder / 'data' / 'docs' / 'calibration.txt'}"
    tokens = load_calibration(Calibration(source=text, samples=8, sequence_length=128), folder)
    observer = Observer(ARCHITECTURES["mixtral"], tokens.domains, tokens.domain_N, ("tokens", "sample", "likeness"))
    sweep(shell, reader, Stream(shell, tokens.ids_NS), observer, lambda *_: None)

    tables = analysis_tables(observer.study)

    assert json.loads(json.dumps(tables, allow_nan=False)) == tables
    assert [row["block"] for row in tables["blocks"]] == list(range(8))
    for row in tables["blocks"]:
        assert row["routing"]["mixed"]["tokens"] == 8 * 128
        assert sum(row["routing"]["mixed"]["usage"]) == pytest.approx(2.0)
        assert row["routing"]["mixed"]["balance"]["largest"] <= 4.0  # no expert twice for one token
        assert row["likeness"]["matching"]["pairs"] == 28
        assert row["likeness"]["matching"]["cosine_matched"] >= row["likeness"]["matching"]["cosine_as_saved"]
    codes = [finding["code"] for finding in tables["findings"]]
    assert "not_looked_at" not in codes
    assert len({"upcycled", "from_scratch", "origin_unclear"} & set(codes)) == 1
