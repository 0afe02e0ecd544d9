# SPDX-License-Identifier: Apache-2.0
"""d-OPSD without a trainer: the sampler and its states by hand, what the teacher sees, and which states an update takes."""

import math

import pytest
import torch
from masked import make_model, make_settings, make_tokenizer

from trl_opsd.experimental.diffusion.contexts import states_of_update, teacher_states
from trl_opsd.experimental.diffusion.reading import completion_logits
from trl_opsd.experimental.diffusion.sampler import Denoised, denoise, fill_in, is_complete, text_length

MASK, EOS = 9, 3


def generators(count, first=0):
    return [torch.Generator().manual_seed(first + index) for index in range(count)]


def run(logits, *, temperature=0.0, rows=1, eos=EOS, **changes):
    """Answers of a model that says the same (C, V) whatever it reads."""
    settings = make_settings(**{"max_completion_length": 8, "block_length": 4, "diffusion_steps": 4, **changes})
    read = lambda prompts, answers: logits.expand(len(answers), *logits.shape).clone()  # noqa: E731
    ids = {"mask_token_id": MASK, "eos_token_id": eos}
    return denoise(read, [[1]] * rows, settings, temperature=temperature, generators=generators(rows), **ids)


def likely(tokens, sureness, vocabulary=10):
    """Logits (C, V) with a likeliest token at each position, by so much."""
    logits = torch.zeros(len(tokens), vocabulary)
    logits[torch.arange(len(tokens)), torch.tensor(tokens)] = torch.tensor(sureness, dtype=torch.float32)
    return logits


def test_blocks_are_filled_from_left_to_right_the_surest_positions_first():
    (answer,) = run(likely([4, 5, 6, 7, 8, 4, 5, 6], [1, 4, 2, 3, 9, 9, 9, 9]))
    assert answer.completion.tolist() == [4, 5, 6, 7, 8, 4, 5, 6]
    assert answer.states.tolist() == [[MASK] * 8, [MASK, 5, MASK, 7, *[MASK] * 4]]  # and none of the last block


def test_no_state_is_kept_from_when_the_text_is_complete_up_to_its_end_token():
    first_end = run(likely([4, EOS, 6, 7, 8, 4, 5, 6], [4, 3, 2, 1, 1, 1, 1, 1]))[0]
    assert first_end.states.tolist() == [[MASK] * 8]  # the first step writes 4 and the end token
    open_text = run(likely([4, EOS, 6, 7, 8, 4, 5, 6], [1, 4, 3, 2, 1, 1, 1, 1]))[0]
    assert len(open_text.states) == 2  # before the end token stands a mask for one more step


def test_the_end_token_is_the_one_that_is_given():
    logits = likely([4, EOS, 6, 7, 8, 4, 5, 6], [4, 3, 2, 1, 1, 1, 1, 1])
    assert len(run(logits, eos=EOS)[0].states) == 1 and len(run(logits, eos=5)[0].states) == 2


def test_an_answer_of_three_blocks_keeps_the_states_of_two():
    tokens = [4, 5, 6, 7] * 3
    (answer,) = run(likely(tokens, range(12, 0, -1)), max_completion_length=12, diffusion_steps=6)
    assert len(answer.states) == 4 and answer.states[2].tolist() == [4, 5, 6, 7, *[MASK] * 8]


def test_the_mask_token_is_never_drawn():
    logits = likely([MASK] * 8, [50.0] * 8)
    for temperature in (0.0, 1.0):
        assert not (run(logits, temperature=temperature)[0].completion == MASK).any()


def test_draws_have_the_probabilities_of_the_temperature():
    rows, temperature = 6000, 0.5
    logits = torch.tensor([0.0, 0.5, 1.0])
    block = torch.full((rows, 1), MASK)
    fill_in(block, logits.expand(rows, 1, 3).clone(), block == MASK, 1, temperature, generators(rows))
    expected = (logits / temperature).softmax(0)
    found = torch.bincount(block[:, 0], minlength=3) / rows
    assert ((found - expected).abs() < 4 * (expected * (1 - expected) / rows).sqrt()).all()


@pytest.mark.parametrize("temperature", [0.0, 0.01])
def test_how_sure_a_token_is_is_read_without_the_temperature_and_of_masked_positions_alone(temperature):
    logits = torch.stack([likely([4, 5, 6], [2.0, 3.0, 9.0])])  # near temperature 0 the first two are sure alike
    for first in range(10):
        block = torch.tensor([[MASK, MASK, 7]])
        fill_in(block, logits, block == MASK, 1, temperature, generators(1, first))
        assert block.tolist() == [[MASK, 5, 7]]


def test_an_answer_does_not_depend_on_the_prompts_beside_it():
    tokenizer = make_tokenizer()
    model, settings = make_model(tokenizer).eval(), make_settings()
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12], [5]]
    ids = {"mask_token_id": tokenizer.mask_token_id, "eos_token_id": tokenizer.eos_token_id, "temperature": 0.9}

    def read(prompts, answers):
        return completion_logits(model, prompts, answers, pad_token_id=1)

    together = denoise(read, prompts, settings, generators=generators(3), **ids)
    for place, prompt in enumerate(prompts):
        (alone,) = denoise(read, [prompt], settings, generators=generators(1, place), **ids)
        assert torch.equal(alone.completion, together[place].completion)
        assert torch.equal(alone.states, together[place].states)
    assert len({tuple(answer.completion.tolist()) for answer in together}) == 3


def test_logits_stand_at_the_answers_positions_and_padding_changes_none():
    model = make_model(make_tokenizer(), dtype=torch.float64).eval()
    prompts, answers = [[5, 6, 7], [8, 9, 10, 11, 12]], torch.tensor([[20, 21], [22, 23]])
    with torch.no_grad():
        together = completion_logits(model, prompts, answers, pad_token_id=1)
        for row, prompt in enumerate(prompts):
            alone = model(input_ids=torch.tensor([[*prompt, *answers[row].tolist()]])).logits[0, len(prompt) :]
            torch.testing.assert_close(together[row], alone)


def test_a_text_ends_at_its_first_end_token():
    assert text_length(torch.tensor([4, EOS, 5, EOS]), EOS) == 1 and text_length(torch.tensor([4, 5]), EOS) == 2
    ids = {"mask_token_id": MASK, "eos_token_id": EOS}
    assert is_complete(torch.tensor([4, EOS, MASK]), **ids)
    assert not is_complete(torch.tensor([MASK, EOS, 4]), **ids) and not is_complete(torch.tensor([4, 5]), **ids)


def finished(length=12, end=None):
    """An answer with the states of two blocks of four, and tokens that tell their place."""
    completion = torch.arange(100, 100 + length)
    if end is not None:
        completion[end:] = EOS
    states = torch.full((4, length), MASK)
    for step in range(4):
        states[step, : 2 * step] = completion[: 2 * step]
    return Denoised(completion, states)


def taught(answer, share, seed=0):
    settings = make_settings(retained_share=share)
    return teacher_states(answer, settings, eos_token_id=EOS, generator=torch.Generator().manual_seed(seed))


def test_a_teacher_that_retains_nothing_sees_what_the_student_sees():
    answer = finished()
    assert torch.equal(taught(answer, 0.0), answer.states)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_the_teacher_sees_a_share_of_later_blocks_as_the_finished_answer_has_them(share):
    answer = finished()
    for seed in range(20):
        for step, (state, seen) in enumerate(zip(answer.states, taught(answer, share, seed), strict=True)):
            start = 4 * (step // 2 + 1)
            filled = (seen != state).nonzero().flatten()
            assert (filled >= start).all() and len(filled) == math.floor((12 - start) * share)
            assert torch.equal(seen[filled], answer.completion[filled])


def test_any_later_position_may_be_filled_in_also_behind_the_end_token():
    answer = finished(end=6)
    places = {
        place for seed in range(60) for place in (taught(answer, 0.25, seed)[0] != MASK).nonzero().flatten().tolist()
    }
    assert places == set(range(4, 12))


def test_nothing_is_filled_in_where_the_next_block_begins_behind_the_end_token():
    for end in (7, 8):  # the second block's states have a next block that begins at position 8
        answer = finished(end=end)
        for seed in range(5):
            assert torch.equal(taught(answer, 0.5, seed)[2:], answer.states[2:])
    assert not torch.equal(taught(finished(end=9), 0.5)[2:], finished(end=9).states[2:])


def test_states_are_dealt_out_in_order_and_the_last_and_what_remains_are_left_out():
    dealt = [list(range(12))[states_of_update(12, update, 4)] for update in range(4)]
    assert dealt == [[0, 1], [2, 3], [4, 5], [6, 7]]  # of 11, two for each of four updates
    assert [states_of_update(9, update, 4) for update in range(4)] == [slice(k, k + 2) for k in (0, 2, 4, 6)]
    assert [list(range(4))[states_of_update(4, update, 4)] for update in range(4)] == [[]] * 4
    assert list(range(0))[states_of_update(0, 0, 1)] == []
