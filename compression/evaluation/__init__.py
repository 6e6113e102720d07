"""Evaluation measures what was lost, and verification proves that the artifact is what was computed."""
