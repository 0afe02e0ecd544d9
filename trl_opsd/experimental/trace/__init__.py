# SPDX-License-Identifier: Apache-2.0
"""TRACE, whose formula is partly inferred; the page says which parts."""
