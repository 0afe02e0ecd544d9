# SPDX-License-Identifier: Apache-2.0
"""Scoring jobs whose ids do not matter."""

from trl_opsd.teacher.jobs import ScoringJob


def job(context, rollout, row=0, anchor=1.0, direction=0.0):
    return ScoringJob(list(range(10, 10 + context)), list(range(50, 50 + rollout)), row, anchor, direction)
