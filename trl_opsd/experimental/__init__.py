# SPDX-License-Identifier: Apache-2.0
"""Built on experimental parts of TRL, not yet held against a GPU, or methods whose formula is partly inferred.

Each of these methods has a room of its own and says at its start, in its card and in its docs which parts are inferred.
"""
