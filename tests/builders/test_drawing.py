# SPDX-License-Identifier: Apache-2.0
"""Completions drawn token by token from readers: equal to `generate` where one reads, and to each other where all agree."""

import math
import random
from collections import Counter

import pytest
import torch

from trl_opsd.builders.drawing import candidates, draw_completions, draw_token, row_random
from trl_opsd.builders.mixsd import BARE, SHOWN, Coin
from trl_opsd.builders.readers import Reader

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15], [20]]
OTHERS = [[30, 31, 32, 33, 34, 35], [36], [37, 38, 39, 40]]
NEW = 12
NO_STOP = {-1}


@pytest.fixture
def model(make_model):
    return make_model(torch.float64).eval()


def greedy(model, prompt):
    """By transformers, one row alone and without padding."""
    model.generation_config.eos_token_id = None
    out = model.generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=NEW,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


def mixed(model, share, prompts=(PROMPTS, OTHERS), stops=NO_STOP, seed=0, **sampling):
    readers = [Reader(model, rows, pad_token_id=0) for rows in prompts]
    randoms = [row_random(seed, row, 0) for row in range(len(prompts[0]))]
    choices = [Coin(share) for _ in prompts[0]]
    return draw_completions(readers, choices, randoms, stops, max_new_tokens=NEW, **sampling)


@pytest.mark.parametrize(("share", "prompts"), [(1.0, PROMPTS), (0.0, OTHERS)], ids=["bare alone", "shown alone"])
def test_a_share_of_one_or_none_is_greedy_decoding_under_one_prompt(model, share, prompts):
    found = [draws.ids for draws in mixed(model, share)]
    assert found == [greedy(model, prompt) for prompt in prompts]
    assert greedy(model, PROMPTS[0]) != greedy(model, OTHERS[0])  # else the test says nothing


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_where_both_prompts_are_equal_the_share_does_not_matter(model, temperature):
    found = [mixed(model, share, (PROMPTS, PROMPTS), temperature=temperature) for share in (0.0, 0.4, 1.0)]
    assert len({str([draws.ids for draws in each]) for each in found}) == 1
    assert {index for draws in found[1] for index in draws.readers} == {BARE, SHOWN}


def test_a_mixed_completion_is_that_of_full_forwards_over_each_prompt_and_what_stands_so_far(model):
    """By hand: no cache, no padding, the coin of each token thrown from the same numbers."""
    for row, draws in enumerate(mixed(model, 0.5)):
        coins, so_far = row_random(0, row, 0), []
        for _ in range(NEW):
            prompt = (PROMPTS if coins.random() < 0.5 else OTHERS)[row]
            coins.random()
            logits = model(torch.tensor([prompt + so_far])).logits[0, -1]
            so_far.append(int(logits.argmax()))
        assert draws.ids == so_far
        assert len(set(draws.readers)) == 2


def test_a_row_that_ends_leaves_the_others_as_they_were(model):
    whole = [draws.ids for draws in mixed(model, 0.5)]
    stop = whole[1][3]
    for before, draws in zip(whole, mixed(model, 0.5, stops={stop}), strict=True):
        end = before.index(stop) + 1 if stop in before else NEW
        assert draws.ids == before[:end] and len(draws.readers) == end


def test_rows_alone_are_rows_of_a_batch(model):
    whole = mixed(model, 0.5, temperature=1.0)
    readers = [Reader(model, [rows[2]], 0) for rows in (PROMPTS, OTHERS)]
    alone = draw_completions(readers, [Coin(0.5)], [row_random(0, 2, 0)], NO_STOP, max_new_tokens=NEW, temperature=1.0)
    assert alone[0] == whole[2]


def test_the_share_of_draws_is_near_the_probability_and_tries_differ():
    coins = [Coin(0.3).first(row_random(0, row, 0).random()) for row in range(4000)]
    assert abs(coins.count(BARE) / 4000 - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 4000)
    assert row_random(0, 1, 0).random() == row_random(0, 1, 0).random()
    assert len({row_random(*key).random() for key in ((0, 1, 0), (0, 1, 1), (0, 2, 0), (1, 1, 0))}) == 4


def test_tokens_are_drawn_as_often_as_the_softmax_of_the_likeliest_says():
    logits, temperature = torch.tensor([[0.3, 2.0, -1.0, 1.1, 1.9]], dtype=torch.float64), 0.7
    ids, mass = candidates(logits, temperature, top_k=3)
    chances = random.Random(0)
    counts = Counter(draw_token(ids[0], mass[0], chances.random()) for _ in range(6000))
    weights = {token: math.exp(logits[0, token].item() / temperature) for token in (1, 4, 3)}
    assert set(counts) == set(weights)
    for token, weight in weights.items():
        assert counts[token] / 6000 == pytest.approx(weight / sum(weights.values()), abs=0.03)


def test_the_ends_of_the_unit_interval_are_the_first_and_the_last_candidate():
    ids, mass = candidates(torch.tensor([[0.0, 3.0, 1.0]]), 1.0, top_k=0)
    assert draw_token(ids[0], mass[0], 0.0) == 1
    assert draw_token(ids[0], mass[0] * (1 - 1e-9), 1 - 1e-12) == 0
    assert candidates(torch.tensor([[0.0, 3.0, 1.0]]), 0.0, top_k=0)[0].tolist() == [[1]]
