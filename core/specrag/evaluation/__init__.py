"""Evaluation: data formats and metrics."""
