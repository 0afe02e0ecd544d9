# SPDX-License-Identifier: Apache-2.0
"""A method with two divergences in a step, as tests of terms take it."""

from dataclasses import replace

from trl_opsd import OPSDConfig
from trl_opsd.losses import Divergence, Support
from trl_opsd.methods import OPSD, Extra, Term
from trl_opsd.teacher.contexts import TeacherContext
from trl_opsd.trainers.self_distillation import SelfDistillationTrainer

WEIGHT, K = 2.5, 6


def beside(group, settings, moment):
    """The solution beside rollouts that do not box anything, read by the teacher with the plain prompt."""
    view = TeacherContext("teacher", group[0].solution, anchor=1.0, weights=settings.teacher_owner)
    return [None if "boxed" in rollout.completion else Extra(rollout.solution, (view,)) for rollout in group]


def likeliest(settings):
    support = Support(K, of="target", remainder="renormalise")
    return Divergence("forward_kl", temperature=settings.loss_temperature, clip=None, support=support)


class TwoTermsConfig(OPSDConfig):
    teacher_owner = "teacher"


TERM = Term(weight=lambda settings: WEIGHT, divergence=likeliest)


class TwoTerms(SelfDistillationTrainer):
    """KL(S || T) on rollouts, and 2.5 KL(T || S) over the teacher's 6 likeliest tokens on the solution beside some of them."""

    config_class = TwoTermsConfig
    method = replace(OPSD, name="two terms", extras=beside, extra_term=TERM, target_owner="teacher")
