# SPDX-License-Identifier: Apache-2.0
"""The gates, weights and shares that a method makes of its facts are shown token by token, and are those of its loss."""

import json
import re

import pytest
import torch
from inspected import GROUPS, HOT, close

from trl_opsd.inspect.page import page_payload, write_page
from trl_opsd.losses import MixtureShape, bounded_square

SINGLE = {"max_completion_length": 24}


def own(record, name):
    return torch.tensor(record.values[f"own@{name}"], dtype=torch.float64)


def numbers(record, name):
    return torch.tensor(record.values[name], dtype=torch.float64)


def log_prob(record, view=0):
    return torch.tensor(record.views[view].log_prob, dtype=torch.float64)


def trained(record):
    return torch.tensor(record.values.get("trained", [1.0] * len(record.ids)), dtype=torch.float64)


def terms_of_egrsd(record, settings):
    return -own(record, "advantage") * own(record, "evidence weight") * own(record, "gate") * log_prob(record)


def advantages_of_antisd(record, settings):
    pull = settings.ascent_strength * own(record, "gate") * own(record, "phi(u)")
    return record.numbers["advantage of TRL"] - pull


def advantages_by_evidence(record, settings):
    return record.numbers["advantage of TRL"] * own(record, "evidence weight")


def advantages_of_dasd(record, settings):
    pull = settings.direction_strength * own(record, "omega") * own(record, "relative ratio")
    return record.numbers["advantage of TRL"] + pull


def advantages_of_trace(record, settings):
    return record.numbers["advantage of TRL"] * (1 - own(record, "on a distilled span"))


def terms_of_vopd(record, settings):
    return -own(record, "advantage") * log_prob(record)


# method -> settings, what its loss makes of the numbers shown, where that is shown, the parts
METHODS = {
    "egrsd": ({**SINGLE, **HOT}, terms_of_egrsd, "term", {"gate", "evidence weight", "advantage"}),
    "antisd": ({**GROUPS, "gate_warmup_batches": 0}, advantages_of_antisd, "advantage", {"gate", "phi(u)"}),
    "rlsd": (GROUPS, advantages_by_evidence, "advantage", {"evidence weight"}),
    "rlrt": ({**GROUPS, "evidence_bound": 0.9}, advantages_by_evidence, "advantage", {"evidence weight"}),
    "dasd": ({**GROUPS, "direction_strength": 1.0}, advantages_of_dasd, "advantage", {"omega", "relative ratio"}),
    "trace": ({**GROUPS, "max_span_share": 1.0}, advantages_of_trace, "advantage", {"on a distilled span"}),
    "vopd": (SINGLE, terms_of_vopd, "term", {"advantage"}),
}


@pytest.mark.parametrize("name", METHODS)
def test_what_is_shown_makes_up_the_loss_and_is_what_the_trainers_rule_kept(step, name):
    settings, made, value, parts = METHODS[name]
    taken, varied = step(name, **settings), set()
    for record in taken.every_record():
        assert {key[4:] for key in record.values if key.startswith("own@")} == parts
        close(numbers(record, value), made(record, taken.trainer.args) * trained(record))
        for part in parts:
            kept = taken.kept_by(record, part)
            close(own(record, part), kept * trained(record))
            varied |= {part} if kept.abs().max() > 1e-3 else set()
    assert varied == parts, "every part is somewhere no 0"


def test_sgsd_shows_how_each_of_its_teachers_was_judged(step):
    taken, seen = step("sgsd", **SINGLE), set()
    for record in taken.every_record():
        counted, total = trained(record), 0.0
        read = [place for place, view in enumerate(record.views) if view.weight is not None]
        for k, place in enumerate(read, 1):
            polarity = own(record, f"polarity {k}")
            kept = taken.kept_by(record, "polarity")[k - 1] * counted
            close(polarity, kept)
            seen |= set(polarity.tolist())
            pull = polarity * bounded_square(log_prob(record, place) - log_prob(record))
            total += record.views[place].weight * pull.sum() / counted.sum()
        assert record.numbers["loss of the rollout"] == pytest.approx(float(total), abs=1e-6)
    assert {-1.0, 1.0} <= seen


def test_demopsd_shows_the_share_of_the_plain_view_that_its_target_had(step, monkeypatch):
    shares, share = [], MixtureShape.share

    def recorded(self, direction, anchor):
        found = share(self, direction, anchor)
        shares.append(found.detach().flatten())
        return found

    monkeypatch.setattr(MixtureShape, "share", recorded)
    taken = step("demopsd", **GROUPS, **HOT)
    mask = taken.batch["distillation_mask"]
    by_row = torch.zeros(mask.numel(), dtype=torch.float64)
    by_row[taken.batch["distilled_positions"]] = torch.cat(shares)[: len(taken.batch["distilled_positions"])].double()
    by_row, shown = by_row.view(mask.shape), []
    for record in taken.records:
        shown.append(own(record, "share mixed in"))
        close(shown[-1], by_row[taken.row_of(record), : len(record.ids)])
    assert len(shown) == 4 and torch.cat(shown).min() >= 0 and torch.cat(shown).max() > 1e-3


def test_a_page_offers_what_a_method_kept_under_its_name(step, tmp_path):
    records = step("antisd", **GROUPS, gate_warmup_batches=0).records
    payload = page_payload(records, str, "t", {})
    assert payload["rollouts"][0]["values"]["own@gate"] == [1000] * len(records[0].ids)
    text = write_page(tmp_path / "page.html", records, str, "t", {}).read_text()
    assert (
        "own@phi(u)"
        in json.loads(re.search(r'id="payload">(.*?)</script>', text, re.DOTALL)[1])["rollouts"][0]["values"]
    )


def test_training_keeps_nothing(step):
    recorded = step("egrsd", keeps=False, **SINGLE).recorded["loss"]
    assert recorded and all(facts.kept is None for facts, _ in recorded)
