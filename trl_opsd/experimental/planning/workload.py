# SPDX-License-Identifier: Apache-2.0
"""What a planned run does, and on which engine."""

from dataclasses import dataclass

ENGINES = ("single", "ddp", "zero2", "zero3", "fsdp2")


@dataclass(frozen=True)
class Workload:
    """How long texts are, in tokens.

    Attributes:
        prompt: the student's prompt.
        solution: the reference solution in the teacher's.
    """

    prompt: int = 256
    solution: int = 4096
