"""Evaluation: many samples per prompt, metrics with confidence intervals, comparison of two results."""
