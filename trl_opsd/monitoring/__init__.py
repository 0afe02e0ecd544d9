# SPDX-License-Identifier: Apache-2.0
"""What a run logs about itself, and who warns."""
