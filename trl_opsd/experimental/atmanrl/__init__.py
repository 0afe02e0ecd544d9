# SPDX-License-Identifier: Apache-2.0
"""AtManRL's saliency as a reward function, whose formula is partly inferred; docs/rewards.md says which parts."""
