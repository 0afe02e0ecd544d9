# SPDX-License-Identifier: Apache-2.0
"""RESD's playbook: a trace by hand, what answers are read, who is asked what, and a run that is resumed in the middle."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from groups import ids_of, reward_boxed
from pages import MOMENT, moved, raw_logits, student_of, whole_step

from trl_opsd.methods.playbook import EMPTY, lesson_request, playbook_text, pruned, read_answer, written_book
from trl_opsd.methods.resd import experience_contexts
from trl_opsd.settings.resd import RESDSettings
from trl_opsd.teacher.contexts import Draft, Rollout, Written
from trl_opsd.trainers.resd import RESDConfig, RESDTrainer

TEXTS = ("1+2=3", "so \\boxed{3}", "wait, 10 it is", "a")
SHORT = {
    "attempt_block": "a{text}",
    "feedback_block": "!{text}",
    "review_block": "?{text}",
    "solution_block": "+{text}",
    "playbook_block": "#{text}#",
}


def settings_of(**own):
    return RESDSettings(**{**SHORT, **own})


def answer(tags=(), add=()):
    tags = [{"id": name, "tag": tag} for name, tag in tags]
    return json.dumps({"tags": tags, "add": [{"section": section, "lesson": text} for section, text in add]})


def rollout_of(reward, *, tags=(), add=(), prompt="x", said=None):
    text = answer(tags, add) if said is None else said
    return Rollout(prompt, None, "y", reward, drafts=(Draft(text, [1]),))


def run(batches, **own):
    """The books after each batch."""
    memory, books = {}, []
    for batch in batches:
        memory = {"playbook": written_book(memory, batch, settings_of(**own))}
        books.append(json.loads(json.dumps(memory["playbook"])))  # which checkpoints do
    return books


def counters(book):
    return {each["id"]: (each["helpful"], each["harmful"], each["judged"]) for each in book["lessons"]}


def test_a_trace_by_hand():
    """Five batches at a pruning every fourth, worked out on paper."""
    batches = [
        [
            rollout_of(0.0, add=[("mistakes", "one"), ("no such", "two")]),
            rollout_of(0.0, add=[("code", "three")], prompt="z"),
        ],
        # The second rollout of a prompt adds nothing, but its judgements count; a right one judges, and adds nothing.
        [
            rollout_of(0.0, tags=[(1, "helpful"), (2, "harmful")], add=[("clues", "four")]),
            rollout_of(0.0, tags=[(1, "helpful"), (3, "neutral")], add=[("clues", "lost")]),
            rollout_of(1.0, tags=[(1, "helpful"), (99, "helpful")], add=[("clues", "lost")]),
            rollout_of(1.0, tags=[(1, "helpful")]),  # of the same prompt: not counted again
        ],
        [rollout_of(0.0, tags=[(4, "helpful"), (4, "harmful")], add=[("clues", "five")])],  # the last judgement counts
        [rollout_of(1.0, tags=[(1, "harmful")])],
        [],
    ]
    books = run(batches)
    assert counters(books[0]) == {1: (0, 0, 0), 2: (0, 0, 0), 3: (0, 0, 0)}
    assert [each["section"] for each in books[0]["lessons"]] == ["mistakes", "others", "code"]
    assert counters(books[1]) == {1: (3, 0, 1), 2: (0, 1, 1), 3: (0, 0, 1), 4: (0, 0, 1)}
    assert counters(books[2]) == {1: (3, 0, 1), 2: (0, 1, 1), 3: (0, 0, 1), 4: (0, 1, 2), 5: (0, 0, 2)}
    # Pruned at 4: 2 and 4 harmed, 3 was last looked at in batch 1 and 5 in batch 2, two and more before.
    assert counters(books[3]) == {1: (3, 1, 3)}
    assert [book["batches"] for book in books] == [1, 2, 3, 4, 5] and books[4]["next_id"] == 6
    assert counters(books[4]) == counters(books[3])
    assert playbook_text(books[2]).split("\n")[:2] == ["## code", "[3] helpful 0, harmful 0: three"]


def lesson(name, helpful=0, harmful=0, judged=0):
    return {"id": name, "section": "others", "text": "t", "helpful": helpful, "harmful": harmful, "judged": judged}


LESSONS = [
    lesson(1, 2, 2, 9),
    lesson(2, 1, 0, 3),
    lesson(3, judged=9),
    lesson(4, judged=8),
    lesson(5, 5, 1, 7),
    lesson(6, 0, 1, 9),
]


@pytest.mark.parametrize(
    ("pruning", "most", "kept"),
    [
        ("staleness", 9, [2, 3, 5]),
        ("prioritized", 9, [2, 5]),
        ("staleness", 2, [3, 5]),  # 2 was judged longest ago
        ("staleness", 1, [3]),
    ],
)
def test_what_a_pruning_keeps(pruning, most, kept):
    assert [each["id"] for each in pruned(LESSONS, 10, pruning, most)] == kept


def test_of_lessons_judged_at_once_the_oldest_go():
    equal = [lesson(3, 1, 0, 5), lesson(1, 1, 0, 5), lesson(2, 1, 0, 5)]
    assert [each["id"] for each in pruned(equal, 6, "staleness", 2)] == [3, 2]


def test_the_book_never_holds_more_than_its_limit():
    batches = [[rollout_of(0.0, add=[("others", f"{n}{k}") for k in range(3)])] for n in range(3)]
    books = run(batches, max_playbook_lessons=4)
    assert [len(book["lessons"]) for book in books] == [3, 4, 4]
    assert [each["id"] for each in books[2]["lessons"]] == [6, 7, 8, 9]


def test_nothing_that_is_given_is_changed():
    book = run([[rollout_of(0.0, add=[("others", "one")])]])[0]
    before = copy.deepcopy(book)
    written_book({"playbook": book}, [rollout_of(0.0, tags=[(1, "helpful")])], settings_of())
    assert book == before and EMPTY["lessons"] == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"tags": []}', {"tags": []}),
        ('so: ```json\n{"add": [1]}\n``` and {"add": []}', {"add": [1]}),
        ('{"why": {"tags": [2]}}', {"tags": [2]}),
        ('{broken {"add": []}', {"add": []}),
        ('{"other": 1}', None),
        ("no braces", None),
        ("{" * 3000, None),
        ('{"a":' * 3000, None),  # deeper than the interpreter goes
    ],
)
def test_the_first_object_of_an_answer_that_is_one(text, found):
    assert read_answer(text) == found


def test_what_cannot_be_read_is_counted_and_what_is_wrong_in_kind_changes_nothing():
    said = [
        "no JSON",
        '{"tags": 3, "add": {"lesson": "x"}}',
        '{"tags": [5, {"id": null, "tag": "helpful"}], "add": ["x", {"lesson": null}, {"lesson": " "}]}',
        '<think>{"add": [{"lesson": "thought"}]}</think>{"add": [{"lesson": "a\\n b"}]}',
    ]
    (book,) = run([[rollout_of(0.0, said=text, prompt=str(n)) for n, text in enumerate(said)]])
    assert book["unread"] == 1 and [each["text"] for each in book["lessons"]] == ["a b"]
    books = run([[rollout_of(0.0, add=[("others", "one")])], [rollout_of(0.0, tags=[("[1]", "helpful")])]])
    assert counters(books[1]) == {1: (1, 0, 1)}, "an id as the book prints it"


BOOK = {"lessons": [lesson(1, 2, 0)], "next_id": 2, "batches": 1, "unread": 0}
SHOWN = "### others\n[1] helpful 2, harmful 0: t#"
WITH_BOOK = replace(MOMENT, memory={"playbook": BOOK})


def test_wrong_rollouts_are_asked_for_lessons_and_right_ones_for_judgements_where_there_are_some():
    review = Written("z", [1])
    wrong, right = (Rollout("x", None, "y", reward, note="f", written=review) for reward in (0.0, 1.0))
    asked = {
        (reward, bool(moment.memory)): lesson_request(rollout, settings_of(), moment)
        for reward, rollout in ((0, wrong), (1, right))
        for moment in (MOMENT, WITH_BOOK)
    }
    assert {key: view and (view.template, view.slot, view.weights) for key, view in asked.items()} == {
        (0, False): ("lessons", "ay!f?z", "live"),
        (0, True): ("lessons", "ay!f?z" + SHOWN, "live"),
        (1, False): None,
        (1, True): ("tags", "ay" + SHOWN, "live"),
    }
    unscored, answered = replace(wrong, reward=None), replace(wrong, drafts=(Draft("{}", [1]),))
    assert lesson_request(unscored, settings_of(), WITH_BOOK) is lesson_request(answered, settings_of(), MOMENT) is None
    assert lesson_request(wrong, settings_of(write_playbook=False), WITH_BOOK) is None


def test_the_teacher_reads_the_book_in_front_of_what_it_learnt_of_the_rollout():
    (views,) = experience_contexts([Rollout("x", None, "y", 0.0, note="f")], settings_of(), WITH_BOOK)
    assert views[0].slot == SHOWN + "ay!f"
    (views,) = experience_contexts([Rollout("x", None, "y", 0.0)], settings_of(), WITH_BOOK)
    assert views.reason == "nothing learnt", "a book alone says nothing of this rollout"


ANSWERS = (
    answer([(1, "helpful"), (2, "harmful")], [("mistakes", "carry {prompt} <|im_end|>")]),
    answer([(1, "helpful")]),
    answer([(1, "harmful")], [("code", "count")]),
    "no JSON",
)
SMALL = {"support_size": 20, "per_device_train_batch_size": 4, "max_completion_length": 200, "write_review": False}
SMALL |= {
    "chat_template_kwargs": {"enable_thinking": False},
    "teacher_chat_template_kwargs": {"enable_thinking": False},
}


@pytest.fixture
def make(make_model, make_args, dataset, tokenizer, monkeypatch):
    """A trainer of eight rows whose answers for the book are given, known by their prompts."""

    def make(**settings):
        rows = [{**dataset[index], "feedback": "no"} for index in range(8)]
        trainer = RESDTrainer(
            model=make_model(torch.float64),
            reward_funcs=reward_boxed,
            args=make_args(RESDConfig, **{**SMALL, "shuffle_dataset": False, **settings}),
            train_dataset=Dataset.from_list(rows),
            processing_class=copy.deepcopy(tokenizer),
        )
        plain = [tuple(ids_of(trainer, row["prompt"], enable_thinking=False)) for row in rows]

        def sample(prompts, *args, **kwargs):
            of_rollouts = all(tuple(ids) in plain for ids in prompts)
            texts = TEXTS if of_rollouts else ANSWERS
            ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
            return [[*own, tokenizer.eos_token_id] for own in ids], None

        monkeypatch.setattr(trainer, "_generate_single_turn", sample)
        return trainer

    return make


def test_a_step_reads_the_book_of_the_batch_before_by_hand(make):
    """The second step's contexts hold the lessons of the first, and its divergence is that from such a teacher."""
    trainer = make(teacher_model_kind="live", max_kept_solutions=0, balance_outcomes=False, target_share_floor=0.0)
    rows = [trainer.train_dataset[index] for index in range(4)]
    whole_step(trainer, rows)
    book = trainer.memory["playbook"]
    assert [each["text"] for each in book["lessons"]] == ["carry {prompt}", "count"], "without the control token"
    assert trainer._metrics["train"]["drafts/texts"] == [3], "no book yet, so a right rollout is asked nothing"
    assert trainer._metrics["train"]["method/unread_lessons"] == [1.0]
    moved(trainer)
    got = whole_step(trainer, rows)
    assert trainer._metrics["train"]["drafts/texts"] == [3, 4]
    assert counters(trainer.memory["playbook"])[1] == (2, 1, 1)
    model, values = student_of(trainer), []
    args = trainer.args
    shown = args.playbook_block.replace("{text}", playbook_text(book))
    before, after = args.experience_prompt_template.split("{prompt}{solution}")
    for row, text in zip(rows, TEXTS, strict=True):
        ids = [*trainer.tokenizer(text, add_special_tokens=False)["input_ids"], trainer.tokenizer.eos_token_id]
        blocks = shown + args.attempt_block.replace("{text}", text) + args.feedback_block.replace("{text}", "no")
        content = before + row["prompt"][-1]["content"] + blocks + after
        teacher = ids_of(trainer, [{"role": "user", "content": content}], enable_thinking=False)
        student = ids_of(trainer, row["prompt"], enable_thinking=False)
        q, p = (raw_logits(model, context, ids).softmax(-1) for context in (student, teacher))
        kept = q.topk(20, dim=-1).indices
        q, p = (
            torch.cat([each.gather(-1, kept), 1 - each.gather(-1, kept).sum(-1, keepdim=True)], -1) for each in (q, p)
        )
        values.append((q * (q / p).log()).sum(-1))
    assert got[0] == pytest.approx(torch.cat(values).mean().item(), rel=1e-6)


def test_a_resumed_run_has_the_uninterrupted_ones_book_and_weights(make, tmp_path):
    settings = {
        "max_steps": 4,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "steps_per_generation": 4,  # step 3 stands in the middle of a generation batch
        "save_strategy": "steps",
        "save_steps": 1,
        "learning_rate": 1e-2,
        "max_playbook_lessons": 3,
        "output_dir": str(tmp_path / "run"),
    }
    whole, resumed = make(**settings), make(**settings)
    for trainer in (whole, resumed):
        sample = trainer._generate_single_turn
        trainer._generate_single_turn = lambda prompts, *args, sample=sample, **kwargs: (
            (sample(prompts)[0] * 2)[: len(prompts)],
            None,
        )
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert len(whole.memory["playbook"]["lessons"]) > 0 and whole.memory["playbook"]["batches"] == 2
    assert json.dumps(resumed.memory) == json.dumps(whole.memory)
    for (name, one), (_, other) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-14, msg=name)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"max_playbook_lessons": 0}, "max_playbook_lessons=0"),
        ({"playbook_prune_batches": 0}, "playbook_prune_batches=0"),
        ({"playbook_pruning": "reset"}, "playbook_pruning='reset'"),
        ({"playbook_block": "so"}, "playbook_block does not contain {text}"),
        ({"lesson_prompt_template": "{prompt}"}, "lesson_prompt_template does not contain {solution}"),
        ({"tag_prompt_template": "{solution}"}, "tag_prompt_template does not contain {prompt}"),
    ],
)
def test_bad_settings_are_refused_by_name(make_args, bad, message):
    with pytest.raises(ValueError, match=message):
        make_args(RESDConfig, **{**SMALL, **bad})


def test_the_defaults_are_those_of_the_official_script():
    own = RESDSettings()
    # horizon-llm/RESD, selfevolve/resd/run_manufactoria_has_resd_stream_qwen3_4b_fsdp.sh.
    assert (own.write_playbook, own.max_playbook_lessons, own.playbook_prune_batches) == (True, 200, 4)
    assert own.playbook_pruning == "staleness"
