# SPDX-License-Identifier: Apache-2.0
"""What a user sets: plain dataclasses, one module for each method beside the shared ones, each checked where it is declared.

Importing them loads neither torch nor trl, so that help answers at once; what a check needs of other rooms it imports itself.
"""
