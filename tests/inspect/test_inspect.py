# SPDX-License-Identifier: Apache-2.0
"""The inspector's numbers against the plain formulas, its page against hostile text, its ways to rollouts."""

import json
import re
from dataclasses import dataclass, replace

import pytest
import torch

from trl_opsd import OGLSSDConfig, OPSDConfig, OPSDTrainer, PurifiedOPSDConfig
from trl_opsd.errors import UsageError
from trl_opsd.inspect.compute import Inspector
from trl_opsd.inspect.page import page_payload, write_page
from trl_opsd.inspect.records import RolloutRecord, SampledRollout, ViewRecord
from trl_opsd.inspect.rollouts import sample_groups, saved_groups
from trl_opsd.inspect.run import run_inspect
from trl_opsd.inspect.text import marker_flags
from trl_opsd.losses import purified_logits, steered_logits, token_divergence
from trl_opsd.methods import OGLS_SD, OPSD, PURIFIED_OPSD, Method
from trl_opsd.methods.controls import controlled
from trl_opsd.rows.token_texts import token_texts
from trl_opsd.teacher.contexts import Rollout, TeacherContext

TEMPLATES = {
    "teacher_prompt_template": "{prompt}\n[reference]\n{solution}\n[end]",
    "teacher_chat_template_kwargs": {"enable_thinking": False},
}
REFERENCE = "[reference]\n{solution}\n[end]"  # the teacher's without the problem, as other methods make it themselves
PROMPT = [{"role": "user", "content": "1+2=?"}]


@pytest.fixture
def make_inspector(make_model, make_args, tokenizer):
    """A function that makes an inspector of two small random models."""

    def make(method, config_class=OPSDConfig, step=0, **settings):
        own = {} if config_class is not PurifiedOPSDConfig else {"reference_prompt_template": REFERENCE}
        args = make_args(config_class, **(TEMPLATES | own | settings))
        return Inspector(make_model(seed=1).eval(), make_model(seed=0).eval(), tokenizer, method, args, step)

    return make


@pytest.fixture
def sample(tokenizer):
    """A function that makes a rollout of a text, ended by the eos token."""

    def make(text, reward=None, solution="1+2 is 3"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        return SampledRollout(Rollout(PROMPT, solution, text, reward), ids)

    return make


def logits_of(model, tokenizer, content, ids):
    """(T, V) logits that predict `ids` behind a user message."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    before = tokenizer(text, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        return model(torch.tensor([[*before, *ids]])).logits[0, len(before) - 1 : -1]


def teacher_text(reference):
    return f"1+2=?\n[reference]\n{reference}\n[end]"


def close(numbers, expected):
    torch.testing.assert_close(torch.tensor(numbers), expected, atol=1e-4, rtol=1e-4)


def test_opsd_divergence_is_that_of_student_and_teacher_logits(make_inspector, sample, tokenizer):
    inspector, rollout = make_inspector(OPSD, temperature=1.3, clip_value=0.02), sample("1+2=4")
    (record,) = inspector.inspect_group([rollout])
    student = logits_of(inspector.student, tokenizer, "1+2=?", rollout.ids)
    teacher = logits_of(inspector.teacher, tokenizer, teacher_text("1+2 is 3"), rollout.ids)
    unclipped = token_divergence(student, teacher, temperature=1.3)
    clipped = token_divergence(student, teacher, temperature=1.3, clip="upper", clip_value=0.02)
    close(record.values["divergence"], unclipped)
    close(record.values["clipped_away"], unclipped - clipped)
    assert max(record.values["clipped_entries"]) > 0
    assert "shift" not in record.values and not record.strengths


def test_purified_target_is_the_formula_on_three_views(make_inspector, sample, tokenizer):
    inspector, rollout = make_inspector(PURIFIED_OPSD, PurifiedOPSDConfig, temperature=0.8), sample("3")
    (record,) = inspector.inspect_group([rollout])
    student = logits_of(inspector.student, tokenizer, "1+2=?", rollout.ids)
    views = [
        logits_of(inspector.teacher, tokenizer, text, rollout.ids) / 0.8
        for text in ("1+2=?", teacher_text("1+2 is 3"), "[reference]\n1+2 is 3\n[end]")
    ]
    target = purified_logits(*views)
    close(record.values["divergence"], token_divergence(student / 0.8, target, divergence="jsd"))
    index = torch.tensor(rollout.ids)[:, None]
    expected = (target - views[0].log_softmax(-1)).gather(1, index)[:, 0]
    close(record.values["shift"], expected)
    assert [view.name for view in record.views] == ["student", "target", "plain", "teacher", "reference"]


def test_ogls_target_is_steered_by_right_against_wrong_for_every_lambda(make_inspector, sample, tokenizer):
    settings = {"steering_strength": 2.0, "steering_warmup_steps": 0, "num_generations": 3, "distillation_length": None}
    inspector = make_inspector(
        OGLS_SD, OGLSSDConfig, per_device_train_batch_size=3, per_device_eval_batch_size=3, **settings
    )
    right, wrong, other = sample("1+2=3", 1.0), sample("1+2=4", 0.0), sample("5", 0.0)
    records = inspector.inspect_group([right, wrong, other])
    assert [record.rollout.completion for record in records] == ["1+2=4", "5"], "only wrong rollouts are distilled"
    ids, temperature = wrong.ids, inspector.settings.temperature
    student = logits_of(inspector.student, tokenizer, "1+2=?", ids) / temperature
    plain, *pools = [
        logits_of(inspector.teacher, tokenizer, text, ids) / temperature
        for text in ("1+2=?", *(teacher_text(t) for t in ("1+2=3", "1+2 is 3", "1+2=4", "5")))
    ]
    right_pool, wrong_pool = torch.stack(pools[:2]), torch.stack(pools[2:])
    assert records[0].strengths == [0.0, 0.5, 1.0, 1.5, 2.0]
    for index, strength in enumerate(records[0].strengths):
        target = steered_logits(plain, right_pool, wrong_pool, strength=strength)
        close(records[0].values[f"divergence@{index}"], token_divergence(student, target))
    assert records[0].values["divergence"] == records[0].values["divergence@4"]
    counts = {view.name: view.num_contexts for view in records[0].views}
    assert counts["teacher +"] == counts["teacher -"] == 2


def test_reference_and_question_parts_add_up_to_what_showing_the_solution_does(make_inspector, sample, tokenizer):
    inspector, rollout = make_inspector(OPSD, temperature=1.0), sample("1+2=4")
    (record,) = inspector.inspect_group([rollout])
    student, teacher, reference = (
        logits_of(model, tokenizer, text, rollout.ids).log_softmax(-1)
        for model, text in (
            (inspector.student, "1+2=?"),
            (inspector.teacher, teacher_text("1+2 is 3")),
            (inspector.teacher, "[reference]\n1+2 is 3\n[end]"),
        )
    )
    index = torch.tensor(rollout.ids)[:, None]
    close(record.values["reference_induced"], (reference - student).gather(1, index)[:, 0])
    close(record.values["question_conditioned"], (teacher - reference).gather(1, index)[:, 0])
    close(record.values["norm_total"], (teacher - student).square().sum(-1).sqrt())
    parts = torch.tensor(record.values["reference_induced"]) + torch.tensor(record.values["question_conditioned"])
    close(record.values["total"], parts)


def test_views_tell_probability_rank_and_likeliest_tokens_of_the_rollouts_own_token(make_inspector, sample, tokenizer):
    inspector, rollout = make_inspector(OPSD, temperature=1.0), sample("1+2=4")
    (record,) = inspector.inspect_group([rollout])
    expected = logits_of(inspector.student, tokenizer, "1+2=?", rollout.ids).softmax(-1)
    student = record.views[0]
    for position, token in enumerate(rollout.ids):
        order = expected[position].argsort(descending=True).tolist()
        assert student.rank[position] == order.index(token) + 1
        assert student.top_ids[position] == order[:5]
    close(student.log_prob, expected.gather(1, torch.tensor(rollout.ids)[:, None])[:, 0].log())


def test_a_method_of_someone_else_can_be_inspected(make_inspector, sample):
    @dataclass(frozen=True)
    class Doubled:
        uses_direction = True

        def __call__(self, direction):
            return 2 * direction

    def contexts(group, settings, draw):
        views = (TeacherContext("plain", None, anchor=1.0), TeacherContext("reference", "3", direction=0.5))
        return [views for _ in group]

    method = Method("Mine", contexts, lambda settings, step: Doubled())
    (record,) = make_inspector(method).inspect_group([sample("1+2=4", solution=None)])
    assert [view.name for view in record.views] == ["student", "target", "plain", "reference"]
    target, reference = record.views[1], record.views[3]
    close(target.log_prob, torch.tensor(_sum_of_views(record)))
    assert "total" not in record.values and reference.num_contexts == 1


def _sum_of_views(record):
    """The target of anchor + 2 * 0.5 * direction has the log-probability of a sum of logits; here from the records."""
    shift = torch.tensor(record.values["shift"])
    return (torch.tensor(record.views[2].log_prob) + shift).tolist()


def test_what_rows_bring_is_read_and_shown(make_inspector, sample, tokenizer):
    template = "{prompt}\n[hint] {hint}\n[reference]\n{solution}\n[end]"
    settings = {"teacher_prompt_template": template, "shown_solution": 0.5}
    inspector, rollout = make_inspector(OPSD, **settings), sample("3", solution="1+2\nis 3")
    rollout = replace(rollout, rollout=replace(rollout.rollout, columns={"hint": ["add", "it"]}))
    (record,) = inspector.inspect_group([rollout])
    shown = "1+2=?\n[hint] add\nit\n[reference]\n1+2\n[end]"
    assert shown in next(view.reads for view in record.views if view.name == "teacher")
    student = logits_of(inspector.student, tokenizer, "1+2=?", rollout.ids)
    teacher = logits_of(inspector.teacher, tokenizer, shown, rollout.ids)
    close(record.values["divergence"], token_divergence(student, teacher, temperature=1.1))
    reference = "[hint] add\nit\n[reference]\n1+2\n[end]"
    alone = logits_of(inspector.teacher, tokenizer, reference, rollout.ids)
    ids = torch.tensor(rollout.ids)[:, None]
    log_p, log_q = (each.div(1.1).log_softmax(-1).gather(-1, ids)[:, 0] for each in (alone, student))
    close(record.values["reference_induced"], log_p - log_q)


@pytest.mark.parametrize(
    ("control", "text"), [("empty", ""), ("shuffled", "of another"), ("shortest_rollout", "\\boxed{3}, right")]
)
def test_a_control_stands_in_place_of_the_solution(make_inspector, sample, tokenizer, control, text):
    template = "{prompt}\n[reference]\n{solution}\n[end]"
    settings = {"teacher_prompt_template": template, "shown_solution": control, "num_generations": 4}
    inspector = make_inspector(OPSD, **settings)
    inspector = replace(inspector, method=controlled(OPSD, inspector.settings))
    group = [sample(answer, solution="the row's own") for answer in ("3", "\\boxed{3}, right")]
    columns = {"solution_of_another_row": "of another"}
    rewarded = [
        replace(each.rollout, columns=columns, reward=reward) for each, reward in zip(group, (0.0, 1.0), strict=True)
    ]
    group = [replace(each, rollout=rollout) for each, rollout in zip(group, rewarded, strict=True)]
    record = inspector.inspect_group(group)[0]
    shown = f"1+2=?\n[reference]\n{text}\n[end]"
    assert shown in next(view.reads for view in record.views if view.name == "teacher")
    teacher = logits_of(inspector.teacher, tokenizer, shown, group[0].ids)
    student = logits_of(inspector.student, tokenizer, "1+2=?", group[0].ids)
    close(record.values["divergence"], token_divergence(student, teacher, temperature=1.1))
    assert ("reference_induced" in record.values) == (control == "shuffled")


def test_a_rows_own_prompt_is_read_and_has_no_reference_part(make_inspector, sample, tokenizer):
    inspector, rollout = make_inspector(OPSD), sample("3")
    rollout = replace(rollout, rollout=replace(rollout.rollout, columns={"teacher_prompt": "mine alone"}))
    (record,) = inspector.inspect_group([rollout])
    student = logits_of(inspector.student, tokenizer, "1+2=?", rollout.ids)
    teacher = logits_of(inspector.teacher, tokenizer, "mine alone", rollout.ids)
    close(record.values["divergence"], token_divergence(student, teacher, temperature=1.1))
    assert "reference_induced" not in record.values and "mine alone" in record.views[-1].reads
    page = page_payload([record], tokenizer.decode, "t", {})
    assert page["rollouts"][0]["reads"] == [["teacher", record.views[-1].reads]]


def test_equal_weights_and_contexts_give_zero(make_model, make_args, tokenizer, sample):
    model = make_model().eval()
    args = make_args(teacher_chat_template_kwargs={"enable_thinking": False})
    method = Method("Same", lambda group, settings, draw: [(TeacherContext("plain", None, anchor=1.0),)] * len(group))
    (record,) = Inspector(model, model, tokenizer, method, args).inspect_group([sample("1+2=4")])
    assert max(map(abs, record.values["divergence"])) == 0.0
    assert max(map(abs, record.values["target_ratio"])) == 0.0


class BytesTokenizer:
    """Tokens are bytes, as in the rare tokens of byte-level vocabularies."""

    def decode(self, ids, **kwargs):
        return bytes(ids).decode("utf-8", errors="replace")


@pytest.mark.parametrize("text", ["plain", "na\u00efve \u4e2d\u6587 \U0001f600!", "x" * 100 + "\u4e2d" * 40])
def test_token_texts_join_to_the_text_and_keep_split_characters_whole(text):
    texts = token_texts(BytesTokenizer(), list(text.encode()))
    assert "".join(texts) == text
    assert len(texts) == len(text.encode())


def test_a_marker_marks_every_token_it_covers_and_no_part_of_a_longer_word():
    texts = ["Wa", "it", ", ", "waiter", " may", "be"]
    assert marker_flags(texts, ("wait", "maybe")) == [True, True, False, False, True, True]


# The page


def make_record(text="a", solution="b", reward=1.0):
    view = ViewRecord("student", 0, [-0.5], [1], [0.25], [[7]], [[-0.5]])
    rollout = Rollout([{"role": "user", "content": text}], solution, text, reward)
    values = {"divergence": [0.1234567], "clipped_away": [0.0], "clipped_entries": [0.0], "target_ratio": [-2.0]}
    return RolloutRecord(rollout, [7], [text], [False], [view], values, [])


def payload_of(path):
    (text,) = re.findall(r'<script type="application/json" id="payload">(.*?)</script>', path.read_text(), re.DOTALL)
    return json.loads(text)


HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>\u2028 {{payload}} {{title}}"


def test_hostile_text_never_reaches_the_page_as_markup(tmp_path):
    path = write_page(
        tmp_path / "page.html", [make_record(HOSTILE, HOSTILE)], lambda token: HOSTILE, HOSTILE, {"x": HOSTILE}
    )
    page = path.read_text()
    assert page.count("<script") == page.count("</script>") == 2, "the payload and the page's own"
    assert "<img" not in page
    payload = payload_of(path)
    assert payload["title"] == HOSTILE and HOSTILE in payload["strings"]
    assert payload["rollouts"][0]["solution"] == HOSTILE


def test_the_page_builds_nodes_from_text_alone():
    from importlib.resources import files

    template = (files("trl_opsd.inspect") / "page.html").read_text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", template)


def test_the_page_loads_nothing_from_anywhere(tmp_path):
    page = write_page(tmp_path / "page.html", [make_record()], str, "t", {}).read_text()
    assert "default-src 'none'" in page
    assert not re.search(r"https?://|src=|@import|url\(|fetch\(|XMLHttpRequest|<link", page)


def test_numbers_are_whole_thousandths_and_probability_zero_stays_finite():
    record = make_record()
    record.views[0].log_prob = [-torch.inf]
    payload = page_payload([record], str, "t", {})
    assert payload["rollouts"][0]["values"]["divergence"] == [123]
    assert payload["rollouts"][0]["views"][0]["logp"] == [-99_999]
    json.dumps(payload, allow_nan=False)


@pytest.mark.parametrize("reward", [float("nan"), float("inf"), None, 0.5])
def test_a_page_loads_whatever_reward_a_run_saved(tmp_path, reward):
    record = make_record(reward=reward)
    record.values["divergence"] = [torch.inf]
    path = write_page(tmp_path / "page.html", [record], str, "t", {})
    (text,) = re.findall(r'id="payload">(.*?)</script>', path.read_text(), re.DOTALL)

    def refuse(constant):  # as JSON.parse does, where Python's own reader is lenient
        raise AssertionError(constant)

    (shown,) = json.loads(text, parse_constant=refuse)["rollouts"]
    assert shown["reward"] == {"nan": "nan", "inf": "inf", "None": None, "0.5": 0.5}[str(reward)]


# Where rollouts come from


def test_fresh_rollouts_are_sampled_like_a_runs_and_end_at_eos(make_inspector, dataset, tokenizer):
    inspector = make_inspector(OPSD, max_completion_length=12)
    groups = list(sample_groups(inspector, list(dataset)[:3]))
    assert [len(group) for group in groups] == [1, 1, 1]
    for (sampled,) in groups:
        assert 0 < len(sampled.ids) <= 12
        assert tokenizer.eos_token_id not in sampled.ids[:-1]
        assert sampled.rollout.reward in (0.0, 1.0)
    again = list(sample_groups(inspector, list(dataset)[:3]))
    assert groups == again, "a function of the seed"


def test_the_completions_that_a_run_saved_are_read_with_the_datasets_solutions(
    make_model, make_args, tokenizer, dataset, given_rollouts, make_inspector
):
    pytest.importorskip("trl", minversion="1.16")
    args = make_args(log_completions=True, num_completions_to_print=0, prompt_template="Solve {prompt}", guard="off")
    trainer = OPSDTrainer(make_model(), args=args, train_dataset=dataset, processing_class=tokenizer)
    given_rollouts(trainer).train()
    inspector = make_inspector(OPSD, prompt_template="Solve {prompt}")
    groups = list(saved_groups(inspector, args.output_dir, list(dataset)))
    solutions = {json.dumps(row["prompt"]): row["solution"] for row in dataset}
    assert len(groups) == 4
    for (sampled,) in groups:
        assert sampled.rollout.solution == solutions[json.dumps(sampled.rollout.prompt)]
        assert sampled.rollout.completion in ("1+2=3", "so 4", "wait, 10 it", "a"), "the third is cut at the limit"
        assert tokenizer.decode(sampled.ids) == sampled.rollout.completion
    assert inspector.inspect_group(groups[0])


def test_a_saved_completion_without_a_solution_anywhere_is_refused(make_inspector, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": PROMPT, "completion": "3"}))
    with pytest.raises(ValueError, match=r"row 0 has no `solution` .*dataset_name"):
        list(saved_groups(make_inspector(OPSD), file, None))
    file.write_text(json.dumps({"prompt": PROMPT}))
    with pytest.raises(ValueError, match="needs `prompt` and `completion`"):
        list(saved_groups(make_inspector(OPSD), file, None))
    with pytest.raises(ValueError, match="log_completions=True"):
        list(saved_groups(make_inspector(OPSD), tmp_path, None))


def test_saved_rollouts_of_one_prompt_and_step_are_a_group(make_inspector, tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": PROMPT, "completion": text, "solution": "\\boxed{3}"} for text in ("3", "\\boxed{3}")]
    rows += [{**rows[0], "step": 2, "reward": 0.75}]
    file.write_text("\n".join(map(json.dumps, rows)))
    settings = {"num_generations": 2, "distillation_length": None}
    inspector = make_inspector(
        OGLS_SD, OGLSSDConfig, per_device_train_batch_size=2, per_device_eval_batch_size=2, **settings
    )
    groups = list(saved_groups(inspector, file, None))
    assert [len(group) for group in groups] == [2, 1]
    assert groups[1][0].rollout.reward == 0.75


def test_the_command_writes_a_page_of_the_demo_model(tmp_path, capsys):
    from trl_opsd.demo import model_path

    file = tmp_path / "rows.jsonl"
    row = {"prompt": PROMPT, "completion": "1+2=4<script>\n\\boxed{4}", "solution": "1+2=3\n\\boxed{3}"}
    file.write_text(json.dumps(row))
    page = tmp_path / "deep" / "page.html"
    words = ["--method", "purified-opsd", "--model_name_or_path", model_path(), "--completions", str(file)]
    run_inspect([*words, "--num_rollouts", "1", "--output", str(page), "--output_dir", str(tmp_path / "unused")])
    assert str(page) in capsys.readouterr().out
    payload = payload_of(page)
    assert payload["rollouts"][0]["values"].keys() >= {"total", "reference_induced", "question_conditioned", "shift"}
    assert payload["facts"]["method"] == "Purified OPSD"
    assert not (tmp_path / "unused").exists()


@pytest.mark.parametrize("as_key", [False, True])
def test_a_misspelt_setting_is_refused_with_the_nearest_name(tmp_path, as_key):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("num_rolouts: 1\n")
    with pytest.raises(UsageError, match=r"num_rolouts.*Did you mean `num_rollouts`"):
        run_inspect(["--config", str(recipe)] if as_key else ["--num_rolouts", "1"])


def test_the_command_says_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="model_name_or_path is not set"):
        run_inspect(["--dataset_name", "rows.jsonl", "--output_dir", str(tmp_path)])
    with pytest.raises(ValueError, match="num_rollouts=0"):
        run_inspect(["--num_rollouts", "0", "--output_dir", str(tmp_path)])
