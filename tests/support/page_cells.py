# SPDX-License-Identifier: Apache-2.0
"""The pages that run on ranks: their settings, the columns that they read, functions of a user."""

from pathlib import Path

from datasets import Dataset
from engines import GLOBAL_BATCH, make_rows
from two_terms import TwoTerms

from trl_opsd.experimental.cipo import with_corrections
from trl_opsd.pages import trainer_of

GROUP = {"num_generations": GLOBAL_BATCH}
TOP = {"support_size": 20}
MIX = {"teacher_model_kind": "base", "live_share": 0.4}
BANK = str(Path(__file__).parent / "skill_bank.jsonl")
ACTING = {"gate_warmup_batches": 1, "gate_closes_below": 0.0, "ascent_strength": 2.0}
SPANS = {"span_weight": 2.0, "annotator_function": "page_cells:annotate"}

# name of a cell -> method and settings
PAGES = {
    "antisd": ("antisd", GROUP | ACTING),
    "brts": ("brts", TOP | {"num_generations": 2, "candidate_weight": 0.7}),
    "corrections": ("corrections", GROUP),
    "critique": ("critique", {"critique_function": "page_cells:critique"}),
    "demopsd": ("demopsd", GROUP | {"distillation_length": None}),
    "egrsd": ("egrsd", {}),
    "mopd": ("mopd", GROUP | TOP),
    "msd": ("msd", {}),
    "pbsd": ("pbsd", {}),
    "rcsd": ("rcsd", {}),
    "resd": ("resd", TOP | {"chat_template_kwargs": {"enable_thinking": False}}),
    "rethinking-opd": ("rethinking-opd", {"num_generations": 1, "support_size": 4, "support_of": "intersection"}),
    "rlrt": ("rlrt", GROUP | {"evidence_bound": 0.9}),
    "sdpo": ("sdpo", GROUP | TOP),
    "sdpo-mix": ("sdpo", GROUP | TOP | MIX),
    "sgsd": ("sgsd", {}),
    "sgsd-bank": ("sgsd", {"skill_bank": BANK, "skill_bank_refresh_steps": 2}),
    "sort": (
        "sort",
        {"num_generations": 2, "repair_weight": 0.5, "seed": 1},
    ),  # whose first batch has a group without a right one
    "ssopd": ("ssopd", GROUP | {"frontier_strength": 2.0}),
    "stableopd": ("stableopd", {"num_generations": 2, "golden_weight": 0.7, "reference_weight": 0.3}),
    "trace": ("trace", GROUP | SPANS),
    "two-terms": ("two-terms", {"divergence": "reverse_kl", "clip": None}),
    "shuffled": ("opsd", {"shown_solution": "shuffled"}),
    "empty": ("opsd", {"shown_solution": "empty"}),
    "shortest_rollout": ("opsd", {"shown_solution": "shortest_rollout", "num_generations": GLOBAL_BATCH}),
    "vopd": ("vopd", {"baseline_size": 20}),
    "vpd": ("vpd", GROUP | TOP | {"maximization_steps": 1, "expectation_weight": 1.0}),
}
REMEMBERING = ("antisd", "egrsd", "resd", "sgsd-bank", "vpd")
LESSON = '{"tags": [{"id": 1, "tag": "helpful"}], "add": [{"section": "code", "lesson": "1+1"}]}'  # of RESD's playbook
# Of two texts side by side both may be wrong, so that a group of two may have no right one.
TEXTS = ("1+2=3", "so 4", "wait, 10 it is", "it is 3 then", "a")


def of_page(name):
    """Trainer and settings of a cell."""
    method, settings = PAGES[name]
    if method == "corrections":
        return with_corrections(trainer_of("rlsd"), correction_share=1.0, max_attempt_age=2), settings
    return TwoTerms if method == "two-terms" else trainer_of(method), settings


def critique(rollout):
    """None of some rollouts, so that ranks use other numbers of them."""
    return None if "wait" in rollout.completion else f"{rollout.completion} was {rollout.reward}"


def annotate(rollout):
    return [(1, 3, "K", "a sum")] if len(rollout.completion) > 8 else []


def rows_of_pages():
    """Only every second row has skills, and no two as many, so that ranks read other numbers of views."""
    skills = (["add"], [], ["carry", "look twice", "count"], [])
    reports = ("test 2 failed", None, "off by 1")
    columns = [
        {
            "skills": skills[index % 4],
            "rubric": ["adds"] * (index % 3),
            "plan": "add",
            "translation": f"add {index}",
            "feedback": reports[index % 3],
        }
        for index in range(8)
    ]
    return Dataset.from_list([{**row, **own} for row, own in zip(make_rows(), columns, strict=False)])
