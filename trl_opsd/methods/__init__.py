# SPDX-License-Identifier: Apache-2.0
"""Methods, a page each: what the teacher reads and how the target is shaped."""

from .base import Drafts, Extra, Method, RowFacts, Seen, Term, no_shape
from .ogls_sd import OGLS_SD
from .opsd import OPSD
from .purified_opsd import PURIFIED_OPSD

__all__ = ["OGLS_SD", "OPSD", "PURIFIED_OPSD", "Drafts", "Extra", "Method", "RowFacts", "Seen", "Term", "no_shape"]
