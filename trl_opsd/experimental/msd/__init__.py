# SPDX-License-Identifier: Apache-2.0
"""MSD, whose formula is partly inferred; the page says which parts."""
