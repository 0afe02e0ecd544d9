# SPDX-License-Identifier: Apache-2.0
"""Contexts scored once for all their rollouts: the plain way's hidden states, from fewer tokens."""

import random
import warnings

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    JambaConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

from trl_opsd import OGLSSDConfig, OPSDConfig
from trl_opsd.methods import OGLS_SD, OPSD
from trl_opsd.model.heads import attach_head_function
from trl_opsd.teacher.contexts import Moment, Rollout
from trl_opsd.teacher.forwards import TeacherForward
from trl_opsd.teacher.jobs import ScoringJob, group_by_context, padded_size, plan_shared
from trl_opsd.teacher.scoring import ContextSharing, score_contexts
from trl_opsd.teacher.states import TargetStates

SIZE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WINDOW = 5
FAMILIES = {
    "qwen3": Qwen3Config(**SIZE, head_dim=8),
    "llama": LlamaConfig(**SIZE),
    "gemma2-softcap": Gemma2Config(
        **SIZE, head_dim=8, query_pre_attn_scalar=8, sliding_window=WINDOW, final_logit_softcapping=2.0
    ),
    # Layers with and without a window; transformers runs Gemma 2, whose attention is capped too, in eager only.
    "gemma3-softcap": Gemma3TextConfig(
        **SIZE,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=WINDOW,
        final_logit_softcapping=2.0,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "mistral-window": MistralConfig(**SIZE, sliding_window=WINDOW),
}
KINDS = [(family, attention) for family in FAMILIES for attention in ("sdpa", "eager")]
KINDS.remove(("gemma2-softcap", "sdpa"))
HYBRID = JambaConfig(
    **SIZE,
    attn_layer_period=2,
    attn_layer_offset=1,
    num_experts=1,
    use_mamba_kernels=False,
    mamba_d_state=4,
    mamba_dt_rank=4,
)
# Context length and the lengths of its rollouts: inside, at and beyond the window; one rollout alone; one of one token.
GROUPS = [(13, (7, 3, 1)), (5, (2, 6)), (2, (4, 4)), (9, (5,))]
NUM_ROWS = sum(len(lengths) for _, lengths in GROUPS)
BUDGETS = [1, 40, 90, 1000]


def make_forward(config, attention="sdpa", dtype=torch.float32):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).to(dtype).eval()
    attach_head_function(model)
    return Counting(model, model)


class Counting(TeacherForward):
    """Keeps the number of tokens and the padded tokens held, cached ones included, of each forward."""

    def _states(self, ids, mask, *choice, **settings):
        self.__dict__.setdefault("tokens", []).append(mask[:, -ids.size(1) :].sum().item())
        self.__dict__.setdefault("held", []).append(mask.numel())
        self.__dict__.setdefault("grad", []).append(torch.is_grad_enabled())
        return super()._states(ids, mask, *choice, **settings)


def make_jobs(groups=GROUPS, seed=0):
    draw = random.Random(seed)
    jobs = []
    for length, rollouts in groups:
        context = [draw.randrange(3, 40) for _ in range(length)]
        for rollout in rollouts:
            ids = [draw.randrange(40) for _ in range(rollout)]
            jobs.append(ScoringJob(list(context), ids, len(jobs), draw.uniform(0.5, 1), draw.uniform(-1, 1)))
    draw.shuffle(jobs)
    return jobs


def checked(supported=True):
    sharing = ContextSharing()
    sharing.supported = supported
    return sharing


def score(run, jobs, sharing=None, *, budget=1000, num_rows=NUM_ROWS, **settings):
    return score_contexts(
        run,
        jobs,
        TargetStates.empty((num_rows, 8, SIZE["hidden_size"]), torch.float32, torch.device("cpu"), with_direction=True),
        device=torch.device("cpu"),
        pad_id=0,
        tokens_per_forward=budget,
        sharing=sharing,
        **settings,
    )


def assert_equal(shared, plain):
    assert plain.anchor.abs().max() > 0.1
    torch.testing.assert_close(shared.anchor, plain.anchor, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(shared.direction, plain.direction, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(("family", "attention"), KINDS)
def test_shared_contexts_give_the_states_of_the_plain_way(family, attention, budget):
    run = make_forward(FAMILIES[family], attention)
    plain = score(run, make_jobs())
    sharing = ContextSharing()
    shared = score(run, make_jobs(), sharing, budget=budget)
    assert sharing.supported
    assert_equal(shared, plain)
    assert shared.num_tokens == sum(length + sum(rollouts) for length, rollouts in GROUPS) < plain.num_tokens
    assert not any(run.grad)


@pytest.mark.parametrize("family", ["gemma2-softcap", "gemma3-softcap", "mistral-window"])
def test_the_window_matters_in_these_tests(family):
    config = FAMILIES[family].to_dict() | {"sliding_window": 1000}
    wide = score(make_forward(type(FAMILIES[family])(**config), "eager"), make_jobs(), checked())
    narrow = score(make_forward(FAMILIES[family], "eager"), make_jobs(), checked())
    assert (wide.anchor - narrow.anchor).abs().max() > 1e-2


def test_weights_of_views_on_one_rollout_add_up():
    contexts = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
    rollouts = [[14, 15, 16], [17, 18]]
    jobs = [
        ScoringJob(context, rollout, row, 0.5 * k, k - 1.0)
        for row, rollout in enumerate(rollouts)
        for k, context in enumerate(contexts)
    ]
    run = make_forward(FAMILIES["qwen3"])
    views = [
        score(run, [ScoringJob(c, r, row, 1.0, 0.0) for row, r in enumerate(rollouts)], num_rows=2).anchor
        for c in contexts
    ]
    shared = score(run, jobs, checked(), num_rows=2)
    torch.testing.assert_close(shared.anchor, 0.5 * views[1] + views[2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(shared.direction, views[2] - views[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("budget", BUDGETS)
def test_plans_hold_every_job_once_within_the_budget_longest_first(budget):
    jobs = make_jobs()
    batches, alone = plan_shared(jobs, budget)
    planned = [job for batch in batches for chunk in batch.chunks for job in chunk]
    assert sorted(job.row for job in planned + alone) == list(range(NUM_ROWS))
    assert [len(job.context) for job in alone] == [9]
    longest = [len(batch.chunks[0][0]) for batch in batches]
    assert longest == sorted(longest, reverse=True)
    for batch in batches:
        cached = len(batch.contexts) * max(map(len, batch.contexts))
        for chunk in batch.chunks:
            assert cached + padded_size(chunk) <= budget or len(chunk) == len(batch.contexts) == 1
            assert all(job.context in batch.contexts for job in chunk)


def test_short_contexts_share_a_forward_and_large_groups_are_cut():
    assert [(len(b.contexts), len(b.chunks)) for b in plan_shared(make_jobs(), 1000)[0]] == [(3, 1)]
    assert [(len(b.contexts), len(b.chunks)) for b in plan_shared(make_jobs(), 55)[0]] == [(1, 2), (2, 1)]


def test_forwards_hold_what_was_planned():
    run = make_forward(FAMILIES["qwen3"])
    target = score(run, make_jobs(), checked(), budget=55)
    assert sum(run.tokens) == target.num_tokens and max(run.held) <= 55


def rollouts_of_a_group(num_right, num_wrong):
    rewards = [1.0] * num_right + [0.0] * num_wrong
    return [Rollout("a problem", "its solution", f"attempt {i}", reward) for i, reward in enumerate(rewards)]


def jobs_of(method, settings, group):
    """Jobs of a method's contexts: one context of 10 tokens for each distinct text, rollouts of 4."""
    contexts, jobs = {}, []
    for row, views in enumerate(method.contexts(group, settings, Moment(random.Random(0)))):
        for view in views:
            first = contexts.setdefault((view.template, view.slot), 3 + len(contexts))
            jobs.append(ScoringJob([first] * 10, [2] * 4, row, view.anchor, view.direction))
    return jobs, len(contexts)


@pytest.mark.parametrize(
    ("method", "config_class", "num_contexts", "num_plain", "num_shared"),
    [
        (OPSD, OPSDConfig, 1, 8 * 14, 10 + 8 * 4),
        # Plain, 3 right, a solution; 5 wrong: each of the 5 wrong rollouts reads all of them.
        (OGLS_SD, OGLSSDConfig, 10, 50 * 14, 10 * 10 + 50 * 4),
    ],
    ids=["opsd-8", "ogls-sd-3-5-solution"],
)
def test_tokens_computed_for_a_group_of_eight(make_args, method, config_class, num_contexts, num_plain, num_shared):
    settings = make_args(config_class, num_generations=8, per_device_train_batch_size=8, distillation_length=4)
    jobs, count = jobs_of(method, settings, rollouts_of_a_group(3, 5))
    assert count == num_contexts
    run = make_forward(FAMILIES["qwen3"])
    plain = score(run, jobs, num_rows=8)
    shared = score(run, jobs, checked(), num_rows=8)
    assert (plain.num_tokens, shared.num_tokens) == (num_plain, num_shared)
    assert_equal(shared, plain)


@pytest.mark.parametrize("budget", [30, 1000])
def test_every_rank_runs_the_same_number_of_forwards(budget):
    ranks = [make_jobs(), make_jobs(GROUPS[:1], seed=1), make_jobs(GROUPS[-1:], seed=2), []]
    alone = []
    for jobs in ranks:
        run = make_forward(FAMILIES["qwen3"])
        score(run, jobs, checked(), budget=budget)
        alone.append(len(run.__dict__.get("tokens", [])))
    assert len(set(alone)) > 2
    counts = []
    for jobs in ranks:
        run, sharing = make_forward(FAMILIES["qwen3"]), ContextSharing()
        answers = iter([1, 0, max(alone)])  # any shared, any failed, most forwards
        target = score(run, jobs, sharing, budget=budget, max_over_ranks=lambda own, answers=answers: next(answers))
        assert sharing.supported and next(answers, None) is None
        counts.append(len(run.tokens))
        reference = score(make_forward(FAMILIES["qwen3"]), jobs)
        torch.testing.assert_close(target.anchor, reference.anchor, rtol=1e-4, atol=1e-5)
    assert counts == [4 + max(alone)] * len(ranks)


def test_nothing_is_checked_before_a_context_is_shared():
    run, sharing = make_forward(FAMILIES["qwen3"]), ContextSharing()
    score(run, make_jobs(GROUPS[-1:]), sharing)
    assert sharing.supported is None and len(run.tokens) == 1
    score(run, make_jobs(), sharing)
    assert sharing.supported and len(run.tokens) == 1 + 4 + 3
    score(run, make_jobs(), sharing)
    assert len(run.tokens) == 1 + 4 + 3 + 3


def assert_falls_back_once(run, told):
    sharing, plain = ContextSharing(), score(run, make_jobs())
    with pytest.warns(UserWarning, match=told):
        first = score(run, make_jobs(), sharing)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = score(run, make_jobs(), sharing)
    for target in (first, second):
        assert target.num_tokens == plain.num_tokens
        assert torch.equal(target.anchor, plain.anchor)


def test_a_cache_that_is_not_keys_and_values_falls_back_with_one_warning():
    assert_falls_back_once(make_forward(HYBRID), "JambaForCausalLM cannot score a context once")


def test_states_that_differ_fall_back_with_one_warning():
    class Forgetful(Counting):
        def rollouts(self, ids, mask, cache, first):
            return super().rollouts(ids, mask, cache, first).flip(-1)

    model = make_forward(FAMILIES["llama"]).model
    assert_falls_back_once(Forgetful(model, model), "differ by .* of their norm")


def test_a_rank_where_sharing_works_follows_one_where_it_does_not():
    answers = iter([1, 1, 10])
    with pytest.warns(UserWarning, match="another rank"):
        score(make_forward(FAMILIES["qwen3"]), make_jobs(), ContextSharing(), max_over_ranks=lambda own: next(answers))


def test_bfloat16_passes_the_check():
    run, sharing = make_forward(FAMILIES["qwen3"], dtype=torch.bfloat16), ContextSharing()
    score(run, make_jobs(), sharing)
    assert sharing.supported


def test_groups_are_by_equal_ids_not_by_object():
    jobs = make_jobs()
    assert sorted(len(group) for group in group_by_context(jobs)) == [1, 2, 2, 3]
