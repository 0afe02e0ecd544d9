# SPDX-License-Identifier: Apache-2.0
"""What the teacher reads, whose weights it has, and what it says of each token."""
