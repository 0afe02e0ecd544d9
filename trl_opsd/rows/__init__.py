# SPDX-License-Identifier: Apache-2.0
"""A dataset's rows: their texts, their checks, formats of others."""
