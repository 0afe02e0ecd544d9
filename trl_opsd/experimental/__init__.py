# SPDX-License-Identifier: Apache-2.0
"""Built on experimental parts of TRL, or not yet held against a GPU."""
