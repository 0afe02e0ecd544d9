# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are whole or refused: their files, their run, its state."""
