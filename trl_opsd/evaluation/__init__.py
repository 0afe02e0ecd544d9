# SPDX-License-Identifier: Apache-2.0
"""Accuracy of a model on questions with answers: sampling, measures, and both during training."""

from .measures import EvaluationResult, Interval, bootstrap_interval, evaluate, paired_difference, summarize

__all__ = ["EvaluationResult", "Interval", "bootstrap_interval", "evaluate", "paired_difference", "summarize"]
