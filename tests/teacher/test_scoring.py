# SPDX-License-Identifier: Apache-2.0
"""Teacher forwards: how jobs are grouped, and that grouping and weights give the sums they should."""

import pytest
import torch
from jobs import job

from trl_opsd.model.heads import attach_head_function
from trl_opsd.teacher import scoring
from trl_opsd.teacher.forwards import TeacherForward
from trl_opsd.teacher.jobs import ScoringJob, padded_size, plan_forwards
from trl_opsd.teacher.scoring import score_contexts
from trl_opsd.teacher.states import TargetStates

H = 3


LENGTHS = [(5, 2), (1, 1), (9, 4), (3, 3), (9, 1), (2, 6)]


@pytest.mark.parametrize("budget", [1, 7, 13, 26, 30, 1000])
def test_forwards_stay_within_the_budget_and_start_with_the_longest(budget):
    jobs = [job(*lengths, row=row) for row, lengths in enumerate(LENGTHS)]
    batches = plan_forwards(jobs, budget)
    assert sorted(j.row for batch in batches for j in batch) == list(range(len(jobs)))
    lengths = [len(j) for batch in batches for j in batch]
    assert lengths == sorted(lengths, reverse=True)
    for batch, following in zip(batches, [*batches[1:], None], strict=True):
        assert padded_size(batch) <= budget or len(batch) == 1
        if following is not None:  # as full as the budget allows
            assert padded_size([*batch, following[0]]) > budget


def test_the_padded_size_is_that_of_the_forward():
    jobs = [job(9, 1), job(2, 6, row=1)]  # neither row is as long as the rectangle
    _, run = score(jobs, shape=(3, 6, H))
    assert run.sizes == [(2, 15)] and padded_size(jobs) == 30


def test_no_jobs_are_no_forwards():
    assert plan_forwards([], 100) == []


class Recorder:
    """A teacher whose hidden state at a position is (its id, its position id, the number of tokens read)."""

    def __init__(self):
        self.sizes, self.grad = [], []

    def __call__(self, ids, mask, length):
        self.sizes.append(tuple(ids.shape))
        self.grad.append(torch.is_grad_enabled())
        seen = mask.cumsum(1)
        states = torch.stack([ids, seen, mask.sum(1, keepdim=True).expand_as(ids)], dim=-1).double()
        return states[:, -length - 1 : -1]


def score(jobs, run=None, *, shape=(3, 4, H), budget=100, direction=False, **settings):
    run = run or Recorder()
    target = score_contexts(
        run,
        jobs,
        TargetStates.empty(shape, torch.float64, torch.device("cpu"), with_direction=direction),
        device=torch.device("cpu"),
        pad_id=0,
        tokens_per_forward=budget,
        **settings,
    )
    return target, run


@pytest.mark.parametrize(("progress", "seconds", "shown"), [(True, 0, True), (True, 60, False), (False, 0, False)])
def test_a_bar_shows_where_scoring_takes_long(monkeypatch, capfd, progress, seconds, shown):
    monkeypatch.setattr(scoring, "_SECONDS_TO_BAR", seconds)
    score([job(5, 2, row=row) for row in range(3)], progress=progress)
    assert ("scoring:" in capfd.readouterr().err) is shown


def test_each_position_holds_the_state_that_predicts_its_token():
    target, run = score([job(5, 2, row=1)])
    expected = torch.zeros(3, 4, H, dtype=torch.float64)
    expected[1, 0] = torch.tensor([14.0, 5, 7])  # the context's last token predicts the first of the rollout
    expected[1, 1] = torch.tensor([50.0, 6, 7])
    assert torch.equal(target.anchor, expected)
    assert target.direction is None and target.num_tokens == 7 and run.grad == [False]


def test_tokens_of_context_and_rollout_reach_the_teacher_verbatim():
    special = [0, 2, 3, 0]  # padding and end tokens inside a rollout are tokens
    reached = []

    def run(ids, mask, length):
        reached.append((ids, mask))
        return torch.zeros(len(ids), length, H)

    jobs = [ScoringJob([7, 0, 8], special, 0, 1.0, 0.0), ScoringJob([9], [4], 1, 1.0, 0.0)]
    score(jobs, run)
    ids, mask = reached[0]
    assert ids.tolist() == [[7, 0, 8, *special], [0, 0, 9, 4, 0, 0, 0]]
    assert mask.tolist() == [[1] * 7, [0, 0, 1, 1, 0, 0, 0]]


def test_weights_add_up_in_anchor_and_direction():
    views = [(0.25, 1.0), (0.75, -0.5), (0.0, -0.5)]
    jobs = [job(2 + k, 3, row=2, anchor=a, direction=d) for k, (a, d) in enumerate(views)]
    target, _ = score(jobs, direction=True)
    alone = [score([job(2 + k, 3, row=2)])[0].anchor for k in range(3)]
    torch.testing.assert_close(target.anchor, 0.25 * alone[0] + 0.75 * alone[1])
    torch.testing.assert_close(target.direction, alone[0] - 0.5 * alone[1] - 0.5 * alone[2])


@pytest.mark.parametrize("budget", [1, 13, 20, 40])
def test_grouping_changes_nothing(budget):
    jobs = [job(c, min(r, 4), row=k % 3, anchor=1 / (k + 1), direction=k - 2.5) for k, (c, r) in enumerate(LENGTHS)]
    whole, _ = score(jobs, direction=True)
    grouped, run = score(jobs, direction=True, budget=budget)
    assert len(run.sizes) > 1
    torch.testing.assert_close(grouped.anchor, whole.anchor)
    torch.testing.assert_close(grouped.direction, whole.direction)
    assert grouped.num_tokens == whole.num_tokens == sum(map(len, jobs))


def test_grouping_changes_nothing_on_a_model(make_model):
    model = make_model(torch.float64).eval()
    attach_head_function(model)
    run = TeacherForward(model, model)
    jobs = [job(c, min(r, 4), row=k % 3, anchor=1 / (k + 1)) for k, (c, r) in enumerate(LENGTHS)]
    targets = [score(jobs, run, shape=(3, 4, 32), budget=budget)[0].anchor for budget in (1, 1000)]
    assert targets[0].abs().max() > 0.1
    torch.testing.assert_close(*targets, rtol=1e-9, atol=1e-12)


def test_a_rank_without_jobs_runs_empty_forwards_beside_the_others():
    target, run = score([], max_over_ranks=lambda count: count + 2, direction=True)
    assert run.sizes == [(1, 2), (1, 2)]
    assert target.anchor.abs().max() == 0 and target.direction.abs().max() == 0 and target.num_tokens == 0


def test_empty_forwards_after_the_own_ones_change_nothing():
    jobs = [job(3, 2, row=0), job(4, 2, row=1)]
    alone, _ = score(jobs)
    beside, run = score(jobs, max_over_ranks=lambda count: 3)
    assert len(run.sizes) == 3
    assert torch.equal(alone.anchor, beside.anchor)


def test_no_jobs_anywhere_run_no_forward():
    target, run = score([])
    assert run.sizes == [] and target.num_tokens == 0
