# SPDX-License-Identifier: Apache-2.0
"""What a method remembers of a batch is what the teacher said, and no zeros of what it did not read."""

import torch

from trl_opsd.teacher.contexts import Rollout
from trl_opsd.teacher.states import TargetStates
from trl_opsd.trainers.targets import RolloutBatch, TargetMaker


def test_a_rollout_behind_the_distilled_length_was_not_read_though_an_extra_is_longer():
    target = TargetStates.empty(
        (2, 3, 0), torch.float32, torch.device("cpu"), view_weights=[[1.0], [1.0], [1.0], []], num_view_tokens=8
    )
    target.numbers[0, :, :3], target.numbers[1, :, :2], target.numbers[2] = 1.0, 1.0, 2.0  # row 2 is an extra's
    batch = RolloutBatch([], [], "train", ids=[[5] * 6, [5] * 2], rollouts=[Rollout("", None, "")] * 2, target=target)
    seen = TargetMaker.seen(None, batch)
    assert [entropies.tolist() for entropies in seen.view_entropies] == [[[1.0] * 3], [[1.0] * 2]]
    assert len(seen.rollouts) == 2
