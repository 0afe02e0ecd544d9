# SPDX-License-Identifier: Apache-2.0
"""Feedback of a served peer for SDPO's teacher (OPCoD, arXiv 2606.14368), partly inferred."""
