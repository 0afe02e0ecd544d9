# SPDX-License-Identifier: Apache-2.0
"""`trl-opsd build`: training data that a model makes for its own SFT, a JSONL in and a JSONL out."""
