# SPDX-License-Identifier: Apache-2.0
"""BRTS, whose formula is partly inferred; the page says which parts."""
