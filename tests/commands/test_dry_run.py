# SPDX-License-Identifier: Apache-2.0
"""The dry run: a healthy set-up is shown without a warning, and each known mismatch is named."""

import json
import re
import sys

import pytest
from transformers import AutoConfig

from trl_opsd.commands import cli
from trl_opsd.commands.dry_run import mismatches
from trl_opsd.commands.dry_run.views import check_completion_ids
from trl_opsd.demo import build_rows, model_path
from trl_opsd.demo.tokenizer import CHAT_TEMPLATE, build_tokenizer
from trl_opsd.pages import PAGES

ALWAYS_THINKING = CHAT_TEMPLATE.replace("assistant\\n' }}", "assistant\\n<think>' }}")
NO_SWITCH = CHAT_TEMPLATE.split("{%- if enable_thinking")[0] + "{%- endif %}"
NO_GENERATION_PROMPT = CHAT_TEMPLATE.split("{%- if add_generation_prompt")[0]
CUTS_MESSAGES = CHAT_TEMPLATE.replace("message['content'] +", "message['content'][:24] +")


@pytest.fixture
def dry_run(tmp_path, capsys):
    """A function that runs the command on a small set-up and returns its exit code and what it printed."""

    def run(*settings, method="opsd", rows=None, template=None, launcher=(), **config):
        folder, data = tmp_path / "model", tmp_path / "rows.jsonl"
        tokenizer = build_tokenizer()
        tokenizer.chat_template = template or CHAT_TEMPLATE
        tokenizer.save_pretrained(folder)
        made = AutoConfig.from_pretrained(model_path())
        made.update(config)
        made.save_pretrained(folder)
        assert not list(folder.glob("*.safetensors"))  # there are no weights to load
        data.write_text("".join(json.dumps(row) + "\n" for row in rows or build_rows("train", 8)))
        recipe = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_completion_length": 16}
        recipe |= {"teacher_prompt_template": "{prompt}\n[reference]\n{solution}\n[end]", "bf16": True}
        recipe |= {"reference_prompt_template": "[reference]\n{solution}\n[end]", "max_steps": 5, "clip": "none"}
        recipe |= {"chat_template_kwargs": {"enable_thinking": False}}
        recipe |= {"teacher_chat_template_kwargs": {"enable_thinking": False}, "output_dir": str(tmp_path / "out")}
        recipe |= dict(settings)
        if method == "ogls-sd":
            recipe = {"distillation_length": 8, **recipe}
        (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
        words = ["--config", str(tmp_path / "recipe.yaml"), "--model_name_or_path", str(folder)]
        code = cli.main(["dry-run", method, *words, "--dataset_name", str(data), *launcher])
        return code, capsys.readouterr().out

    return run


@pytest.mark.parametrize("method", ["opsd", "ogls-sd", "purified-opsd"])
def test_a_healthy_set_up_gives_no_warning(dry_run, method):
    code, text = dry_run(method=method)
    assert code == 0 and text.endswith("Warnings: none\n"), text


# What the methods of the table read beside prompt and solution.
COLUMNS = {
    "skills": ["Add in pairs.", "Do not guess."],
    "rubric": ["adds"],
    "plan": "add the numbers",
    "feedback": "wrong",
}
COLUMNS |= {"critique": "the second step is wrong", "translation": "1+1=?"}
COLUMNS |= {"spans": [{"start": 0, "end": 2, "kind": "K", "type": "a sum"}]}
SHORT = {"popd": [("distillation_length", 8)]}


@pytest.mark.parametrize("method", PAGES)
def test_every_method_is_shown_with_what_it_reads(dry_run, method):
    rows = [{**row, **COLUMNS} for row in build_rows("train", 8)]
    code, text = dry_run(("clip", None), *SHORT.get(method, ()), method=method, rows=rows)
    assert code == 0, text
    assert "\n  teacher    " in text and "\n  way        " in text
    assert len(re.findall(r"^\S.*: \d+ tokens", text, flags=re.MULTILINE)) >= 2 * 2


@pytest.mark.parametrize(
    ("method", "told"),
    [
        ("sdpo", ["peer (anchor +1), of a wrong rollout", "1 x peer (target)", "weighed token by token"]),
        ("demopsd", ["plain (direction +1), of a wrong rollout", "1 x teacher (target), 1 x plain (target)"]),
        ("antisd", ["of a right rollout", "it is correct", "it is incorrect", "1 x verdict (read)"]),
        ("sgsd", ["skill (read, weight +0.5)", "2 x skill (read)", "a loss of its own"]),
        ("rcsd", ["analysis (the model answers it before scoring)", "written    a text of up to 16 tokens"]),
        ("pbsd", ["of the sequence beside the rollout", "read by 1 x teacher (read)"]),
        ("sort", ["plan (read, weight +1), of the sequence beside", "reads no rollout", "policy-gradient loss"]),
    ],
)
def test_views_texts_and_sequences_of_a_method_are_named(dry_run, method, told):
    rows = [{**row, **COLUMNS} for row in build_rows("train", 8)]
    _, text = dry_run(("clip", None), method=method, rows=rows)
    assert [part for part in told if part not in text] == [], text


def test_a_column_that_the_method_reads_and_the_data_lack_is_an_error(dry_run):
    code, text = dry_run(method="sgsd")
    assert code == 1 and "has no column `skills`, which SGSD reads" in text


def test_rollouts_that_are_judged_one_by_one_need_no_groups(dry_run):
    rows = [{**row, **COLUMNS} for row in build_rows("train", 8)]
    assert "Warnings: none" in dry_run(("num_generations", 1), method="egrsd", rows=rows)[1]


def test_the_demos_recipe_gives_no_warning(tmp_path, capsys):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in build_rows("train", 64)))
    recipe = f"{model_path()}/../opsd.yaml"
    words = ["--config", recipe, "--model_name_or_path", model_path(), f"--dataset_name={data}", "--rows", "1"]
    assert cli.main(["dry-run", "opsd", *words, f"--output_dir={tmp_path}"]) == 0
    text = capsys.readouterr().out
    assert text.endswith("Warnings: none\n") and "--- row 0" in text and "--- row 1" not in text


def test_prompts_ids_and_numbers_are_shown_as_training_has_them(dry_run):
    rows = [{"prompt": [{"role": "user", "content": "1+1=?"}], "solution": "\\boxed{2}"}] * 8
    _, text = dry_run(rows=rows)
    tokenizer = build_tokenizer()
    ids = tokenizer.apply_chat_template(rows[0]["prompt"], add_generation_prompt=True, enable_thinking=False)[
        "input_ids"
    ]
    assert f"student: {len(ids)} tokens\n  | <|im_start|>user\n  | 1+1=?<|im_end|>\n  | <|im_start|>assistant\n" in text
    assert "  | [reference]\n  | \\boxed{2}\n  | [end]<|im_end|>\n" in text
    first = tokenizer("\\boxed{2}", add_special_tokens=False)["input_ids"][0]
    assert f"{ids[-1]}:'\\n' >> {first}:'\\\\boxed{{'" in text
    assert "completion ids: the same 3 in all 2 prompts" in text
    assert "student off, teacher off, evaluation off" in text
    assert "8 rollouts a step = 8 per device x 1 accumulation x 1 process\n" in text
    assert "8 prompts x 1 rollouts" in text and "5 optimizer steps, 5 epochs of 8 rows" in text


def test_the_batch_is_that_of_the_processes_the_launcher_would_start(dry_run):
    _, text = dry_run(method="ogls-sd", launcher=["--accelerate_config", "zero3_cpu"])
    assert "16 rollouts a step = 8 per device x 1 accumulation x 2 processes" in text
    assert "2 prompts x 8 rollouts a generation batch" in text
    _, text = dry_run(
        ("gradient_accumulation_steps", 3), launcher=["--num_processes", "4"], rows=build_rows("train", 96)
    )
    assert "96 rollouts a step = 8 per device x 3 accumulation x 4 processes" in text


def test_the_parameters_of_a_large_model_are_counted_without_making_them(dry_run):
    sizes = {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "layer_types": None}
    _, text = dry_run(**sizes)
    small = AutoConfig.from_pretrained(model_path())
    attention = 2 * (small.num_attention_heads + small.num_key_value_heads) * small.head_dim * 4096
    count = 36 * (attention + 3 * 4096 * 12288)  # embeddings and norms are below the digits shown
    assert f"memory     {count / 1e9:.3g}B parameters; " in text
    line = next(line for line in text.splitlines() if line.startswith("  memory"))
    # float32 weights, gradients, the frozen teacher's copy and two moments: the largest part, the moments, is 8 bytes.
    total, largest = re.fullmatch(
        r".*; (\S+) GiB on each GPU \(single, peak in \w+\), most for optimizer states: (\S+)", line
    ).groups()
    assert float(largest) == pytest.approx(8 * count / 2**30, rel=0.02) and float(total) > 2.5 * float(largest)


def test_the_memory_line_is_of_the_launchers_engine_and_shares(dry_run):
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 8, "layer_types": None}
    totals = {}
    for engine, launcher in {
        "single": [],
        "zero3": ["--accelerate_config", "zero3_cpu", "--num_processes", "8"],
    }.items():
        _, text = dry_run(launcher=launcher, rows=build_rows("train", 64), **sizes)
        totals[engine] = float(re.search(rf"; (\S+) GiB on each GPU \({engine}, peak in", text).group(1))
    assert totals["zero3"] < 0.6 * totals["single"]


def test_a_model_that_cannot_be_planned_says_so_and_is_no_error(dry_run, monkeypatch):
    def refuse(*args):
        raise ValueError("it routes tokens")

    monkeypatch.setattr("trl_opsd.commands.dry_run.facts.Planned", refuse)
    code, text = dry_run()
    assert code == 0 and "parameters; not planned: it routes tokens\n" in text


@pytest.mark.parametrize(
    ("warning", "arguments"),
    [
        ("think tag at the first token", {"settings": [("teacher_chat_template_kwargs", {"enable_thinking": True})]}),
        ("think tag at the first token", {"settings": [("teacher_prefix", "<think>")]}),
        ("template without generation prompt", {"template": NO_GENERATION_PROMPT}),
        ("truncated template: the teacher template has '[reference]'", {"template": CUTS_MESSAGES}),
        ("shortened solution: ", {"settings": [("max_teacher_prompt_length", 50)]}),
        ("too long: a prompt of", {"config": {"max_position_embeddings": 64}}),
        (
            "thinking switch without effect",
            {"template": NO_SWITCH, "settings": [("teacher_chat_template_kwargs", {"enable_thinking": True})]},
        ),
        (
            "reward that never splits: with reward_threshold=1.5",
            {"method": "ogls-sd", "settings": [("reward_threshold", 1.5)]},
        ),
        (
            "reward that never splits: with reward_threshold=0",
            {"method": "ogls-sd", "settings": [("reward_threshold", 0)]},
        ),
    ],
)
def test_a_mismatch_is_named_and_nothing_else(dry_run, warning, arguments):
    arguments = dict(arguments)
    code, text = dry_run(*arguments.pop("settings", []), **arguments.pop("config", {}), **arguments)
    warnings = [line for line in text.splitlines() if line.startswith("  ! ")]
    assert code == 0 and len(warnings) == 1 and warnings[0].startswith(f"  ! {warning}"), text


def test_a_solution_that_does_not_verify_is_named_with_its_rows(dry_run):
    rows = build_rows("train", 8)
    rows[2]["solution"] = rows[5]["solution"] = "it follows at once"
    code, text = dry_run(rows=rows)
    assert code == 0 and "! solution that does not verify: 2 of 8 rows" in text and "(rows 2, 5)" in text


def test_skipping_the_first_token_answers_the_warning_about_it(dry_run):
    thinking = ("teacher_chat_template_kwargs", {"enable_thinking": True})
    assert "Warnings: none" in dry_run(thinking, ("num_loss_tokens_to_skip", 1))[1]
    assert "Warnings: none" in dry_run(thinking, ("teacher_prefix", "<think></think>\n"))[1]


@pytest.mark.parametrize(("method", "number"), [("opsd", "1"), ("ogls-sd", "none"), ("purified-opsd", "none")])
def test_views_whose_difference_is_taken_cancel_what_they_think_of_the_first_token(dry_run, method, number):
    _, text = dry_run(("teacher_chat_template_kwargs", {"enable_thinking": True}), method=method)
    assert f"Warnings: {number}\n" in text


def test_a_template_that_always_opens_a_think_block_agrees_with_itself(dry_run):
    kwargs = [(name, None) for name in ("chat_template_kwargs", "teacher_chat_template_kwargs")]
    _, text = dry_run(*kwargs, template=ALWAYS_THINKING)
    assert "Warnings: none" in text and "student as the template has it" in text


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("num_generations", {"settings": [("num_generations", 3)]}),
        ("max_teacher_prompt_length=20 leaves nothing", {"settings": [("max_teacher_prompt_length", 20)]}),
        ("no `solution` of the first 8 rows", {"method": "ogls-sd", "solution": "it follows"}),
        ("`solution` is empty", {"solution": " "}),
    ],
)
def test_what_training_would_refuse_is_an_error_with_exit_code_1(dry_run, message, arguments):
    arguments = dict(arguments)
    solution = arguments.pop("solution", None)
    rows = build_rows("train", 8)
    if solution is not None:
        rows = [{**row, "solution": solution} for row in rows]
    code, text = dry_run(*arguments.pop("settings", []), rows=rows, **arguments)
    assert code == 1 and "ERROR, the run would not start" in text and message in text


def test_a_misspelt_setting_is_refused_with_the_nearest_name(dry_run, capsys):
    assert cli.main(["dry-run", "opsd", "--clip_valu", "1"]) == 2
    assert "Did you mean `clip_value`?" in capsys.readouterr().err


def test_a_group_of_one_or_without_temperature_never_splits():
    split = {"threshold": 0.5, "num_generations": 8, "temperature": 1.0}
    assert mismatches.check_reward_splits(["\\boxed{2}"], **split) is None
    assert "groups of one" in mismatches.check_reward_splits(["\\boxed{2}"], **{**split, "num_generations": 1})
    assert "equal" in mismatches.check_reward_splits(["\\boxed{2}"], **{**split, "temperature": 0})


def test_text_and_conversations_in_one_dataset_are_noticed():
    assert mismatches.check_prompt_kinds(["a", "b"]) is None
    assert "only conversations" in mismatches.check_prompt_kinds(["a", [{"role": "user", "content": "b"}]])


def test_the_engines_length_limit_is_checked_against_the_students_prompt():
    assert mismatches.check_lengths(10, 20, {"vllm_max_model_length": 30}) is None
    assert "vllm_max_model_length=29" in mismatches.check_lengths(10, 20, {"vllm_max_model_length": 29, "b": 40})


def test_the_check_of_completion_ids_sees_a_lost_token(monkeypatch):
    module = sys.modules["trl_opsd.commands.dry_run.views"]
    check_completion_ids([[1, 2, 3], [4]], [7, 8], pad_id=0)
    padded = module.left_pad

    def pad_on_the_right(sequences, pad_id):
        ids, mask = padded(sequences, pad_id)
        return ids.flip(1), mask

    monkeypatch.setattr(module, "left_pad", pad_on_the_right)
    with pytest.raises(AssertionError, match="lost tokens"):
        check_completion_ids([[1, 2, 3], [4]], [7, 8], pad_id=0)


def test_gold_answers_that_are_no_mathematics_are_named_unless_another_verifier_reads_them(dry_run):
    rows = [{**row, "solution": "\\boxed{olleh}"} for row in build_rows("train", 8)]
    code, text = dry_run(rows=rows)
    assert code == 0 and "! gold answers that are no mathematics: 8 of 8" in text and "'olleh' in row 0, a word" in text
    code, text = dry_run(("verifier", "exact"), rows=rows)
    assert code == 0 and text.endswith("Warnings: none\n"), text


@pytest.mark.parametrize(
    ("method", "settings", "columns", "wanted"),
    [
        ("sgsd", {}, {"skills": ["Count on."]}, "skill (read, weight +1)"),
        ("rcsd", {}, {"rubric": ["adds"]}, "analysis (the model answers it before scoring)"),
        ("critique", {}, {"critique": "look again"}, "teacher (anchor +1)"),
        ("critique", {"write_critique": True}, {}, "critic (the model answers it before scoring)"),
    ],
)
def test_prompts_of_a_methods_own_are_shown_with_its_columns(dry_run, method, settings, columns, wanted):
    rows = [{**row, **columns} for row in build_rows("train", 8)]
    code, text = dry_run(*settings.items(), method=method, rows=rows, max_position_embeddings=4096)
    assert (
        code == 0
        and f"\n{wanted}: " in text
        and all(value in text for value in columns.values() if isinstance(value, str))
    )
    assert text.endswith("Warnings: none\n"), text[-800:]


def speak_of(rollout):
    """A prompt of the row's own, and a failure on one row."""
    if rollout.completion.startswith("1+1"):
        raise OSError("no server")
    return f"Of {rollout.columns['hint']}: {rollout.completion}"


def test_what_rows_bring_is_shown_as_rendered(dry_run):
    template = "{prompt}\n[hint] {hint}\n[reference]\n{solution}\n[end]"
    rows = [{**row, "hint": None if place == 0 else "carry"} for place, row in enumerate(build_rows("train", 8))]
    code, text = dry_run(("teacher_prompt_template", template), ("shown_solution", "1.0..0.5 in 2"), rows=rows)
    first, second = text.split("--- row 1")
    assert code == 0 and "[hint]" not in first and "  | [hint] carry\n" in second
    assert "the teacher also reads columns hint; of the solution's steps a share of 1.0..0.5 in 2" in text
    assert text.endswith("Warnings: none\n")


def test_a_rows_own_prompt_is_shown_and_a_function_that_fails_is_a_warning(dry_run):
    rows = [{**row, "hint": "sums", "teacher_prompt": "All of this"} for row in build_rows("train", 8)]
    _, text = dry_run(rows=rows)
    assert "own prompt of the row (anchor +1): " in text and "  | All of this<|im_end|>\n" in text
    rows[3]["solution"] = "1+1 is \\boxed{2}"
    code, text = dry_run(("teacher_prompt_template", "test_dry_run:speak_of"), rows=rows)
    assert f"Of sums: {rows[0]['solution']}<|im_end|>" in text.replace("\n  | ", "\n")
    assert code == 0 and "! teacher_prompt_template='test_dry_run:speak_of' failed on 1 of 1 rollouts" in text


@pytest.mark.parametrize(
    ("control", "read", "told"),
    [
        ("empty", "[reference]\n\n[end]", "in place of the row's solution nothing"),
        ("shuffled", "[reference]\n{other}\n[end]", "in place of the row's solution that of another problem"),
        (
            "shortest_rollout",
            "[reference]\n{own}\n[end]",
            "in place of the row's solution the shortest other right rollout",
        ),
    ],
)
def test_what_a_control_shows_is_rendered_and_told(dry_run, control, read, told):
    rows = build_rows("train", 8)
    rows = rows[:1] + [{**row, "solution": rows[1]["solution"]} for row in rows[1:]]
    settings = [("shown_solution", control), ("num_generations", 4)]
    code, text = dry_run(*settings, rows=rows)
    text = text.split("--- row 1")[0]  # which is shown the first row's
    shown = read.replace("{other}", rows[1]["solution"]).replace("{own}", rows[0]["solution"])
    assert code == 0 and shown in text.replace("\n  | ", "\n") and told in text
    assert (rows[0]["solution"] in text.replace("\n  | ", "\n")) == (control == "shortest_rollout")


@pytest.mark.parametrize(("reference", "number"), [("{solution}", "1"), ("{hint} {solution}", "none")])
def test_a_column_that_the_reference_lacks_is_a_warning(dry_run, reference, number):
    rows = [{**row, "hint": "carry"} for row in build_rows("train", 8)]
    templates = [("teacher_prompt_template", "{prompt} {hint} {solution}"), ("reference_prompt_template", reference)]
    _, text = dry_run(*templates, method="purified-opsd", rows=rows)
    assert f"Warnings: {number}\n" in text and ("! column that is not subtracted: `{hint}`" in text) == (number == "1")


@pytest.mark.parametrize(
    ("columns", "settings", "message"),
    [
        ({"hnt": "x"}, [("teacher_prompt_template", "{prompt} {hint} {solution}")], "Did you mean `{hnt}`?"),
        (
            {"hint": 3},
            [("teacher_prompt_template", "{prompt} {hint} {solution}")],
            "train_dataset row 0: `hint` is int",
        ),
        ({"teacher_prompt": "x"}, [("method", "purified-opsd")], "which Purified OPSD does not take"),
        ({}, [("method", "sdpo"), ("shown_solution", "empty")], "shown_solution='empty' is not possible with SDPO"),
        ({"solution": "\\boxed{1}"}, [("shown_solution", "shuffled")], "no row of train_dataset differs from row"),
        ({}, [("method", "sdpo"), ("shown_solution", 0.5)], "shown_solution=0.5 is not possible with SDPO"),
    ],
)
def test_what_rows_cannot_bring_is_an_error(dry_run, columns, settings, message):
    rows, given = [{**row, **columns} for row in build_rows("train", 8)], dict(settings)
    method = given.pop("method", "opsd")
    code, text = dry_run(*given.items(), method=method, rows=rows)
    assert code == 1 and message in text
