# SPDX-License-Identifier: Apache-2.0
"""Rollouts of several turns through TRL's own loop of tools: what is distilled, what the teacher reads, what is refused."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from agents import calculate, call, load_example, scripted, tool_tokenizer
from datasets import Dataset
from pages import whole_step
from pyarrow.parquet import read_table
from steps import EXACT

from trl_opsd import OPSDTrainer, SDPOTrainer
from trl_opsd.evaluation.callback import EvaluationCallback
from trl_opsd.experimental.brts.trainer import BRTSTrainer
from trl_opsd.inspect.rollouts import _text
from trl_opsd.trainers.pbsd import PBSDTrainer
from trl_opsd.trainers.rollout_text import rollouts_text
from trl_opsd.trainers.tools import check_tool_ranks, observation_of, turns_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:You are using 'environment_factory'"),
    pytest.mark.filterwarnings("ignore:You are using 'rollout_func'"),
]
EXAMPLE = load_example()
# Of each of four rows, the turns that the model says: no call, one, two in a row, and one that fails.
SCRIPTS = (
    ("3<|im_end|>",),
    (call("calculate", expression="1+2"), "so \\boxed{3}<|im_end|>"),
    (call("calculate", expression="1+2"), call("calculate", expression="3+3"), "6 then<|im_end|>"),
    (call("calculate", expression="1+"), "a<|im_end|>"),
)


class Shop:
    """An environment that shows, counts and reports."""

    made: int = 0

    def __init__(self):
        self.feedback, self.calls = None, 0

    def reset(self, **row):
        self.feedback, self.calls = None, 0
        return " (open)"

    def buy(self, what: str) -> str:
        """Buys.

        Args:
            what: a thing.
        """
        self.calls += 1
        self.feedback = f"bought {what} <|im_end|>after {self.calls}"
        return f"you have {what}"


@pytest.fixture
def build(make_model, make_args, dataset, tokenizer, monkeypatch):
    def build(trainer_class=OPSDTrainer, scripts=SCRIPTS, rows=None, dtype=torch.float64, **settings):
        names = ("tools", "environment_factory", "reward_funcs", "processing_class", "eval_dataset")
        keywords = {name: settings.pop(name) for name in names if name in settings}
        if "environment_factory" not in keywords:
            keywords.setdefault("tools", [calculate])
        defaults = {"max_completion_length": 200, "chat_template_kwargs": {"enable_thinking": False}, "guard": "off"}
        defaults |= {"distillation_length": None} if "distillation_length" not in settings else {}
        trainer = trainer_class(
            model=make_model(dtype),
            args=make_args(trainer_class.config_class, **{**defaults, **settings}),
            train_dataset=dataset if rows is None else rows,
            **{"processing_class": tool_tokenizer(tokenizer), **keywords},
        )
        monkeypatch.setattr(trainer, "_generate_single_turn", scripted(trainer, scripts))
        return trainer

    return build


def pieces(trainer, script):
    """A rollout's ids by hand, and 1 where the model wrote them: its turns, and between them the results of their calls."""
    tokenizer, ids, own = trainer.tokenizer, [], []
    for index, turn in enumerate(script):
        said = tokenizer(turn, add_special_tokens=False)["input_ids"]
        ids, own = ids + said, own + [1] * len(said)
        if index + 1 < len(script):
            expression = json.loads(turn.split("<tool_call>")[1].split("</tool_call>")[0])["arguments"]["expression"]
            try:
                result = calculate(expression)
            except Exception as error:
                result = {"error": str(error)}
            told = f"\n<|im_start|>user\n<tool_response>{result}</tool_response><|im_end|>\n"
            told += "<|im_start|>assistant\n<think></think>\n"
            between = tokenizer(told, add_special_tokens=False)["input_ids"]
            ids, own = ids + between, own + [0] * len(between)
    return ids, own


def distilled_rows(batches):
    """Completion ids and distilled positions of every row, as it reached the loss."""
    return [
        (ids[mask.bool()].tolist(), distilled.tolist())
        for batch in batches
        for ids, mask, distilled in zip(
            batch["completion_ids"], batch["completion_mask"], batch["distillation_mask"], strict=True
        )
    ]


@pytest.mark.parametrize(("length", "skipped"), [(None, 0), (150, 0), (150, 3)])
def test_tokens_of_tools_are_never_distilled_also_where_rows_are_ordered_and_cut(
    build, dataset, monkeypatch, length, skipped
):
    trainer = build(
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        distillation_length=length,
        num_loss_tokens_to_skip=skipped,
        max_completion_length=400,
    )
    batches, step_loss = [], trainer.step_loss
    monkeypatch.setattr(trainer, "step_loss", lambda model, batch: batches.append(batch) or step_loss(model, batch))
    trainer.train()
    wanted = {}
    for script in SCRIPTS:
        ids, own = pieces(trainer, script)
        kept = [flag and index >= skipped for index, flag in enumerate(own[:length])]
        wanted[tuple(ids)] = [int(flag) for flag in kept]
    seen = distilled_rows(batches)
    assert len(seen) == 8 and {tuple(ids) for ids, _ in seen} == set(wanted)
    for ids, distilled in seen:
        expected = wanted[tuple(ids)]
        cut = len(distilled)  # a micro-batch is cut to its last distilled token
        assert distilled[: len(expected)] == expected[:cut] and not any(expected[cut:]), ids
        assert not any(distilled[len(expected) :])
    assert any(0 in own[: own.index(0) + 1] and 1 in own[own.index(0) :] for own in wanted.values() if 0 in own)
    widths = [batch["completion_ids"].size(1) for batch in batches]
    assert len(set(widths)) > 1, "rows of about one length stand together"


def test_a_step_by_hand_sums_over_the_models_own_tokens_after_what_tools_wrote(build, dataset):
    trainer = build(clip=None, divergence="reverse_kl", max_completion_length=300)
    rows = [dataset[index] for index in range(4)]
    value, gradients = whole_step(trainer, rows)
    model = copy.deepcopy(trainer.model)
    model.__dict__.pop("forward")
    model.zero_grad()
    tokenizer, terms, count = trainer.tokenizer, 0.0, 0
    render = {"tools": [calculate], "add_generation_prompt": True, "tokenize": True, "return_dict": False}
    for row, script in zip(rows, SCRIPTS, strict=True):
        ids, own = pieces(trainer, script)
        text = trainer.args.teacher_prompt_template.replace("{prompt}", row["prompt"][-1]["content"])
        privileged = [{"role": "user", "content": text.replace("{solution}", row["solution"])}]
        student = tokenizer.apply_chat_template(row["prompt"], **render, **trainer.args.chat_template_kwargs)
        teacher = tokenizer.apply_chat_template(privileged, **render, **trainer.args.teacher_chat_template_kwargs)
        log_q, log_p = (
            (
                model(input_ids=torch.tensor([context + ids]), use_cache=False).logits[0, len(context) - 1 : -1]
                / trainer.args.loss_temperature
            ).log_softmax(-1)
            for context in (student, teacher)
        )
        per_token = (log_q.exp() * (log_q - log_p.detach())).sum(-1)
        terms, count = terms + (per_token * torch.tensor(own)).sum(), count + sum(own)
    loss = terms / count
    loss.backward()
    assert value == pytest.approx(loss.item(), **EXACT) and value > 0
    for name, parameter in model.named_parameters():
        assert (gradients[name] - parameter.grad).norm() <= 1e-5 * parameter.grad.norm(), name


def test_the_teacher_reads_the_tools_and_what_an_environment_showed(build, dataset, monkeypatch):
    trainer = build(
        environment_factory=Shop,
        tools=[calculate],
        scripts=((call("buy", what="ink"), "3<|im_end|>"),),
        prompt_template="Q: {prompt}",
        max_steps=1,
    )
    sampled, scored = [], []
    single, encode = trainer._generate_single_turn, trainer.scorer.encode
    monkeypatch.setattr(
        trainer,
        "_generate_single_turn",
        lambda ids, *a, **k: sampled.append(copy.deepcopy(ids)) or single(ids, *a, **k),
    )

    def keep(prompt, view, place):
        encoded = encode(prompt, view, place)
        scored.append((view.template, encoded.ids))
        return encoded

    monkeypatch.setattr(trainer.scorer, "encode", keep)
    rows = [dataset[index] for index in range(4)]
    trainer.model.train()
    trainer._prepare_inputs(rows)
    student = [trainer.tokenizer.decode(ids) for ids in sampled[0]]
    teacher = [trainer.tokenizer.decode(ids) for template, ids in scored if template == "teacher"]
    tools = student[0].split("<|im_start|>user")[0]
    assert "calculate(expression)" in tools and "buy(what)" in tools
    assert teacher and all(text.startswith(tools) for text in teacher)
    questions = [row["prompt"][0]["content"] for row in rows]
    assert all(f"Q: {question} (open)<|im_end|>" in text for question, text in zip(questions, student, strict=True))
    for question, row in zip(questions, rows, strict=True):
        assert any(text.count(f"{question} (open)\n") == 1 and row["solution"] in text for text in teacher), question
    assert not any("Q: " in text for text in teacher)


def test_what_an_environment_reports_is_read_by_the_teacher_of_its_rollout_alone(build, dataset):
    scripts = ((call("buy", what="ink"), "3<|im_end|>"), ("a<|im_end|>",))
    trainer = build(
        SDPOTrainer,
        environment_factory=Shop,
        scripts=scripts,
        reward_funcs=lambda completions, **columns: [0.0] * len(completions),
        num_generations=4,
        teacher_model_kind="base",
    )
    trainer.model.train()
    trainer._prepare_inputs([dataset[0]] * 4)
    rollouts, contexts = trainer._batch.rollouts, trainer._batch.contexts
    assert [rollout.note for rollout in rollouts] == ["bought ink after 1", None] * 2
    assert [len(views) for views in contexts] == [1, 0, 1, 0]
    assert "bought ink after 1" in contexts[0][0].slot
    assert [turn["role"] for turn in rollouts[0].turns] == ["assistant", "tool", "assistant"]
    assert rollouts[0].turns[1]["content"] == "you have ink" and rollouts[1].turns[0]["content"] == "a"


class Judge(Shop):
    """An environment that owns the reward, and reports when it is asked for it."""

    def get_reward(self) -> float:
        self.feedback = f"{self.calls} bought"
        return float(self.calls)


def test_an_environment_that_owns_the_reward_is_asked_before_its_report_is_read(build, dataset):
    scripts = ((call("buy", what="ink"), "3<|im_end|>"), ("a<|im_end|>",))
    rows = Dataset.from_list([{"prompt": row["prompt"]} for row in dataset])
    trainer = build(SDPOTrainer, environment_factory=Judge, scripts=scripts, rows=rows, num_generations=4)
    trainer.model.train()
    trainer._prepare_inputs([rows[0]] * 4)
    assert [rollout.reward for rollout in trainer._batch.rollouts] == [1.0, 0.0] * 2
    assert [rollout.note for rollout in trainer._batch.rollouts] == ["1 bought", "0 bought"] * 2


def says_turns(rollout):
    """A prompt of the teacher's from what was said."""
    return (
        f"{rollout.prompt[-1]['content']} {[turn['role'] for turn in rollout.turns]} {rollout.columns.get('feedback')}"
    )


def test_a_function_reads_turns_and_report(build, dataset):
    trainer = build(
        environment_factory=Shop,
        scripts=((call("buy", what="ink"), "3<|im_end|>"),),
        teacher_prompt_template=f"{__name__}:says_turns",
    )
    trainer.model.train()
    trainer._prepare_inputs([dataset[0]] * 4)
    assert (
        trainer._batch.rollouts[0].teacher_prompt == "1=? (open) ['assistant', 'tool', 'assistant'] bought ink after 1"
    )


def test_answers_that_verify_early_wait_for_what_environments_report(build, dataset):
    template = "{prompt} {feedback} {solution}"
    rows = dataset.add_column("feedback", [None] * len(dataset))
    trainer = build(
        environment_factory=Shop,
        scripts=((call("buy", what="ink"), "3<|im_end|>"),),
        rows=rows,
        teacher_prompt_template=template,
    )
    trainer.model.train()
    trainer._prepare_inputs([rows[0]] * 4)
    assert trainer._batch.contexts[0][0].texts == (("feedback", "bought ink after 1"),)


# Logs


def test_the_completions_table_is_written_whatever_types_the_arguments_of_tools_have(build, tmp_path):
    def both(a: int) -> str:
        """Both.

        Args:
            a: a number.
        """
        return str(a)

    scripts = ((call("both", a=1), "3<|im_end|>"), (call("both", a="x"), "a<|im_end|>"), (call("both", a=[1]), "a"))
    trainer = build(scripts=scripts, tools=[both], log_completions=True, num_completions_to_print=0)
    trainer.train()
    (file,) = (tmp_path / "out" / "completions").glob("*.parquet")
    table = read_table(file).to_pylist()
    assert len(table) == 4 and "both" in str(table[0]["completion"])


def test_printed_rollouts_show_calls_and_which_tool_answered():
    turns = [
        {
            "role": "assistant",
            "content": "I add.",
            "tool_calls": [{"type": "function", "function": {"name": "calculate", "arguments": {"expression": "1+2"}}}],
        },
        {"role": "tool", "name": "calculate", "content": "3"},
        {"role": "assistant", "content": "so 3"},
    ]
    text = rollouts_text([{"prompt": "1+2=?", "completion": turns, "reward": 1.0}], 1, None)
    assert "assistant: I add.\n[calls calculate with {'expression': '1+2'}]" in text
    assert "tool calculate: 3\nassistant: so 3" in text


def test_a_saved_rollout_of_several_turns_is_not_inspected_as_its_last():
    turns = [
        {"role": "assistant", "content": "x"},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "y"},
    ]
    with pytest.raises(ValueError, match=r"f\.jsonl: row 3 is a rollout of several turns"):
        _text(turns, "f.jsonl: row 3")
    with pytest.raises(ValueError, match="several turns"):
        _text([{"role": "assistant", "content": "", "tool_calls": [{}]}], "row 0")
    assert _text([{"role": "assistant", "content": "y", "tool_calls": None}], "row 0") == "y"


# What is refused


def test_a_dict_of_environments_is_refused(build):
    with pytest.raises(ValueError, match=r"environment_factory is a dict of \['shop'\]"):
        build(environment_factory={"shop": Shop})


@pytest.mark.parametrize(
    ("trainer_class", "says"),
    [
        (PBSDTrainer, "tools: PBSD trains on sequences that the model writes in one turn"),
        (BRTSTrainer, "tools is given, but BRTS has the reward functions judge texts that call no tool"),
    ],
)
def test_a_method_that_trains_on_what_the_model_writes_in_one_turn_is_refused(build, trainer_class, says):
    with pytest.raises(ValueError, match=says):
        build(trainer_class)


def test_prompts_that_are_text_are_refused(build):
    rows = Dataset.from_list([{"prompt": "1+2=?", "solution": "\\boxed{3}"}] * 4)
    with pytest.raises(ValueError, match="tools: `prompt` of the first row is text"):
        build(rows=rows)


def test_a_chat_template_without_tools_is_refused(build, tokenizer):
    with pytest.raises(ValueError, match="does not support tool calling"):
        build(processing_class=copy.deepcopy(tokenizer))


def test_a_tool_that_does_not_say_what_it_takes_is_refused_before_training(build):
    def nameless(a):
        """No hint."""
        return a

    with pytest.raises(ValueError, match=r"tools: nameless cannot be described to the model.*type hint"):
        build(tools=[nameless])


def test_an_environment_that_shows_something_else_than_text_is_refused():
    shown = [{"role": "user", "content": [{"type": "text", "text": "1=?"}, {"type": "image", "image": None}]}]
    with pytest.raises(ValueError, match="environment_factory: `reset` returned parts of a message"):
        observation_of([{"role": "user", "content": "1=?"}], shown)


def test_a_tool_that_returns_something_else_than_text_is_refused():
    said = {"role": "assistant", "content": "", "tool_calls": [{}]}
    assert turns_of([said, {"role": "tool", "name": "paint", "content": "ink"}])[1]["content"] == "ink"
    with pytest.raises(ValueError, match="tools: paint returned parts of a message"):
        turns_of([said, {"role": "tool", "name": "paint", "content": [{"type": "image", "image": None}]}])


class Mute(Shop):
    def buy(self, what: str) -> str:
        """Buys.

        Args:
            what: a thing.
        """
        self.feedback = 7
        return ""


def test_a_report_that_is_no_text_is_refused(build, dataset):
    trainer = build(environment_factory=Mute, scripts=((call("buy", what="ink"), "a<|im_end|>"),))
    trainer.model.train()
    with pytest.raises(ValueError, match="the attribute `feedback` of an environment is 7"):
        trainer._prepare_inputs([dataset[0]] * 4)


def test_an_evaluation_of_one_turn_is_refused(build, dataset):
    with pytest.raises(ValueError, match="EvaluationCallback samples answers of one turn"):
        EvaluationCallback(build(), [dataset[0]])


def ranks(num=2, kind="MULTI_GPU", stage=None):
    plugin = None if stage is None else SimpleNamespace(zero_stage=stage)
    return SimpleNamespace(num_processes=num, distributed_type=kind, state=SimpleNamespace(deepspeed_plugin=plugin))


def engine(mode=None, parallel=1, sleep=False):
    names = {"vllm_mode": mode, "vllm_tensor_parallel_size": parallel, "vllm_enable_sleep_mode": sleep}
    return SimpleNamespace(use_vllm=mode is not None, **names)


@pytest.mark.parametrize(
    ("accelerator", "args", "says"),
    [
        (ranks(), engine("server"), "vllm_mode='server'"),
        (ranks(), engine("colocate", parallel=2), "vllm_tensor_parallel_size=2"),
        (ranks(stage=3), engine(), "sharded weights"),
        (ranks(kind="DistributedType.FSDP"), engine(), "sharded weights"),
        (ranks(stage=3), engine("colocate", sleep=True), "sharded weights"),
        (ranks(num=1), engine("server"), None),
        (ranks(), engine(), None),
        (ranks(stage=2), engine("colocate", sleep=True), None),
        (ranks(stage=3), engine("colocate"), None),
    ],
)
def test_engines_in_which_ranks_would_wait_for_each_others_turns_are_refused(accelerator, args, says):
    if says is None:
        check_tool_ranks(accelerator, args)
    else:
        with pytest.raises(ValueError, match=f"tools on 2 processes with {says}"):
            check_tool_ranks(accelerator, args)
