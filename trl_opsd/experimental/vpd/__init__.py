# SPDX-License-Identifier: Apache-2.0
"""VPD: student and teacher's prompt take turns (arXiv 2605.15113)."""
