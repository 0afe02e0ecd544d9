# SPDX-License-Identifier: Apache-2.0
"""What commands without a model ask of a method: stand-in groups, each context once, the rollout that most views read."""

from types import SimpleNamespace

import pytest

from trl_opsd.methods import Method
from trl_opsd.methods.stand_in import context_name, stand_in, stand_in_group, work_lines
from trl_opsd.pages import PAGES, trainer_of
from trl_opsd.teacher.contexts import TeacherContext, Unused

ROW = {"prompt": "1+1=?", "solution": "2"}


def settings(**values):
    given = {"num_generations": 4, "max_completion_length": 8, "reward_weight": 0.0, **values}
    return SimpleNamespace(**given, solution_share_at=lambda step: 1.0)


def peers(group, settings, moment):
    """Each rollout is read beside every other right one."""
    right = [rollout for rollout in group if rollout.reward]
    found = [[peer for peer in right if peer is not own] for own in group]
    views = [tuple(TeacherContext("teacher", peer.completion, anchor=1.0) for peer in own) for own in found]
    return [own or Unused("no right peer") for own in views]


def test_a_group_is_half_right_and_a_context_is_told_once():
    found = stand_in(Method("Peers", peers, needs_group=True), settings(), ROW)
    assert sorted(context.slot for _, context in found.views) == ["2", "another right rollout, 1"]
    assert len(found.most) == 2, "a wrong rollout has two right peers, a right one has one"


def test_where_a_mixed_group_gives_nothing_others_are_tried():
    def only_wrong(group, settings, moment):
        used = not any(rollout.reward for rollout in group)
        return [(TeacherContext("teacher", "x", read=1.0),) if used else () for _ in group]

    found = stand_in(Method("Wrong", only_wrong, needs_group=True), settings(), ROW)
    assert [kind for kind, _ in found.views] == ["wrong"]


def test_a_method_without_groups_is_asked_about_a_wrong_and_a_right_rollout():
    def verdicts(group, settings, moment):
        return [(TeacherContext("teacher", str(rollout.reward), read=1.0),) for rollout in group]

    found = stand_in(Method("Verdicts", verdicts, needs_reward=True), settings(), ROW)
    assert {(kind, context.slot) for kind, context in found.views} == {("wrong", "0.0"), ("right", "1.0")}
    assert len(found.most) == 1


def test_rollouts_of_a_group_are_different_texts_and_the_first_right_one_is_the_solution():
    group = stand_in_group(Method("Any", peers), ROW, ["right", "right", "wrong", "wrong"])
    assert len({rollout.completion for rollout in group}) == 4 and group[0].completion == "2"


@pytest.mark.parametrize("name", PAGES)
def test_every_method_of_the_table_can_be_asked_without_a_row(name):
    method, args = trainer_of(name).method, trainer_of(name).config_class("out", bf16=False)
    found = stand_in(method, args, None)
    assert found.most or found.extra is not None or method.marks is not None  # marks come from functions of the user's
    for context in (*found.most, *(found.extra.contexts if found.extra else ())):
        assert context_name(context).startswith(context.template)
    lines = dict(work_lines(method, args, found))
    assert ("written" in lines) == (found.request is not None) and ("beside it" in lines) == (method.extras is not None)


def test_a_view_in_words_names_its_role_and_whose_weights_read_it():
    assert context_name(TeacherContext("peer", "x", anchor=0.7, weights="base")) == "peer (anchor +0.7, base weights)"
    assert context_name(TeacherContext("skill", None, read=0.25)) == "skill (read, weight +0.25)"
    assert context_name(TeacherContext("plain", None, direction=-1.0)) == "plain (direction -1)"
