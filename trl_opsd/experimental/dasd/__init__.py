# SPDX-License-Identifier: Apache-2.0
"""DASD, whose formula is partly inferred (arXiv 2605.22263)."""
