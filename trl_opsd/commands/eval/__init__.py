# SPDX-License-Identifier: Apache-2.0
"""`trl-opsd eval`."""
