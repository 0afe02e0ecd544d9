# SPDX-License-Identifier: Apache-2.0
"""The signal, token by token: what student, target and every teacher view say of a rollout, as one HTML page."""
