# SPDX-License-Identifier: Apache-2.0
"""The student's model: where its output head is, how its weights are sharded, what is checked of it."""
