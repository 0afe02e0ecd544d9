# SPDX-License-Identifier: Apache-2.0
"""The one room that names TRL's private parts: versions, rollouts, checkpoints."""
