# SPDX-License-Identifier: Apache-2.0
"""Built on experimental parts of TRL, or not yet held against a GPU; and, in rooms of their own, methods whose formula is partly
inferred: each says at its start, in its card and in its docs which parts."""
