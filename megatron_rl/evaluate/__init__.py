"""Evaluation: many samples a prompt, figures with intervals, two results compared."""
