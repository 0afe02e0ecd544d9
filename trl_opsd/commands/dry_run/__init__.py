# SPDX-License-Identifier: Apache-2.0
"""What a run would do, from tokenizer, config and a few rows, before an hour is spent."""
