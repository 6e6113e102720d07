"""The card's metadata: what the hub reads, whatever the model is called."""

from __future__ import annotations

import pytest
import yaml
from huggingface_hub import ModelCard

from compression.card import model_card
from tests.compression.made_reports import full_report


@pytest.mark.parametrize("name", ["owner/name", "a: b", "---\nlicense: mit", "<script>x</script>", "null", '"'])
def test_the_metadata_is_yaml_and_keeps_a_strange_name_whole(name: str):
    text = model_card(full_report(name=name))

    metadata = yaml.safe_load(text.split("\n---\n", 1)[0].removeprefix("---\n"))
    assert metadata["base_model"] == name
    assert "license" not in metadata
    assert "<script>" not in text.split("\n---\n", 1)[1].split("## How to make")[0]


def test_the_hub_reads_results_where_they_were_measured():
    card = ModelCard(model_card(full_report()))

    found = {(result.dataset_name, result.metric_type): result.metric_value for result in card.data.eval_results}
    assert found == {
        ("held-out text", "perplexity"): pytest.approx(full_report().quality.perplexity_after),
        ("owner/name", "acc"): 0.5,
        ("gsm", "exact_match"): 0.0,
    }
    assert card.data.pipeline_tag == "text-generation"
