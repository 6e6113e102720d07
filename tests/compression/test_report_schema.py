"""The published schema is the code's, and true of the report that is served and of the one in the artifact."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema_rs

from compression.report import Report
from tests.compression.made_reports import full_report

SCHEMA = Path(__file__).resolve().parents[2] / "docs" / "report.schema.json"


def test_the_published_schema_is_the_codes():
    assert json.loads(SCHEMA.read_text()) == Report.model_json_schema(mode="serialization")


def test_the_schema_is_true_of_both_reports_and_not_of_another():
    validator, report = jsonschema_rs.validator_for(json.loads(SCHEMA.read_text())), full_report()

    validator.validate(report.model_dump(mode="json"))
    validator.validate(report.for_artifact())
    assert not validator.is_valid({**report.for_artifact(), "loss": 1})
    assert not validator.is_valid({name: value for name, value in report.for_artifact().items() if name != "quality"})
