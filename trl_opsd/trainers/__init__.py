# SPDX-License-Identifier: Apache-2.0
"""Trainers: glue between TRL's rollouts and the losses, without formulas."""
