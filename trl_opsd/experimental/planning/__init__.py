# SPDX-License-Identifier: Apache-2.0
"""Memory of a run on paper."""
