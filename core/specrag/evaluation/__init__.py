"""Measuring answers: data formats and metrics."""
