# SPDX-License-Identifier: Apache-2.0
"""Correction prompts (CIPO, arXiv 2605.14539): the model's own attempts come back as prompts of the next batches."""

from .settings import CorrectionSettings
from .trainer import with_corrections

__all__ = ["CorrectionSettings", "with_corrections"]
