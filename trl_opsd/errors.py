# SPDX-License-Identifier: Apache-2.0
"""Errors that a command answers with a sentence."""


class UsageError(ValueError):
    """What a user typed cannot be meant; the message says what could."""
