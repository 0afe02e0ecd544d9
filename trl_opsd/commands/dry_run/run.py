# SPDX-License-Identifier: Apache-2.0
"""`trl-opsd dry-run METHOD ...`: takes the training command's words, loads no weights, needs no accelerator."""

import itertools
import warnings
from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from ..._trl.versions import trusts_remote_code
from ...errors import UsageError
from ...methods import Method
from ...methods.controls import controlled, with_other_solutions
from ...methods.privileged import PrivilegedText
from ...model.checks import check_model_config
from ...rows.checks import check_rows
from ...teacher.prompts import TeacherCollator
from ...trainers.checks import check_columns, check_fills_a_batch
from ...verification import warn_of_golds, which_verify
from ..train import TRAINERS, load_rows, parse_as_one_of
from ..user_errors import sentence_of
from . import mismatches
from .facts import model_facts, num_processes, run_facts
from .options import make_parser
from .views import View, row_lines, views_of

# Settings that a machine without a GPU refuses; nothing here reads them. The last word of an option wins.
_NEUTRAL = ("--use_cpu=true", "--bf16=false", "--fp16=false", "--report_to=none")
_ROWS_READ = 64


def run(arguments: list[str]) -> int:
    """Print the run that a command line describes; 0 if it would start, warnings or not, 1 if it would be refused."""
    options, rest = make_parser().parse_known_args(arguments)
    try:
        found = _report(options.method, rest, options.rows)
    except UsageError:
        raise
    except Exception as error:
        told = sentence_of(error)
        if told is None:
            raise
        print(f"\nERROR, the run would not start: {told}")
        return 1
    print(f"\nWarnings: {len(found) or 'none'}")
    for warning in found:
        print(f"  ! {warning}")
    return 0


def _report(name: str, arguments: Sequence[str], num_rows: int) -> list[str]:
    processes = num_processes(arguments, name)
    script_args, args, model_args = parse_as_one_of(processes, name, arguments, *_NEUTRAL)
    method = controlled(TRAINERS[name].method, args)
    rows = with_other_solutions(load_rows(script_args, script_args.dataset_train_split), args, "train_dataset")
    check_columns(method, args, rows, "train_dataset")
    check_fills_a_batch(args, rows)
    size = len(rows) if hasattr(rows, "__len__") else None
    rows = list(itertools.islice(rows, max(num_rows, _ROWS_READ)))
    check_rows(rows, "train_dataset", needs_solution=method.needs_solution)
    for index, row in enumerate(rows):
        PrivilegedText(method, args).check_row(row, f"train_dataset row {index}")
    config, tokenizer = load_config_and_tokenizer(args, model_args)
    check_model_config(config)
    collator = TeacherCollator.from_settings(tokenizer, args, templates=method.templates(args))
    with warnings.catch_warnings(
        record=True
    ) as caught:  # of the user's functions, which are called on stand-in rollouts
        warnings.simplefilter("always")
        views = [views_of(row, method, args, collator) for row in rows]
    print(f"{method.name} on {model_args.model_name_or_path}, data {script_args.dataset_name}\n")
    facts = run_facts(args, processes, size, method, rows[0])
    for label, text in facts + model_facts(config, model_args, views, args, name, arguments):
        print(f"  {label:11}{text}")
    for index in range(min(num_rows, len(rows))):
        print(f"\n--- row {index} " + "-" * 60)
        print("\n".join(row_lines(views[index], rows[index], tokenizer)))
    told = dict.fromkeys(str(each.message) for each in caught)
    return [*told, *find_mismatches(method, args, collator, rows, views, config)]


def load_config_and_tokenizer(args: Any, model_args: Any) -> tuple[Any, Any]:
    """Config and tokenizer of the model, without its weights."""
    if not model_args.model_name_or_path:
        raise UsageError("--model_name_or_path is not set. Give a Hub id or a folder.")
    chosen = {"revision": model_args.model_revision, "trust_remote_code": trusts_remote_code(args)}
    config = AutoConfig.from_pretrained(model_args.model_name_or_path, **chosen)
    return config, AutoTokenizer.from_pretrained(model_args.model_name_or_path, **chosen)


def find_mismatches(
    method: Method, args: Any, collator: TeacherCollator, rows: list[dict], views: list[list[View]], config: Any
) -> list[str]:
    """Warnings about the set-up, in the order of what they spoil."""
    found: list[str | None] = [mismatches.check_prompt_kinds([row["prompt"] for row in rows])]
    if not isinstance(rows[0]["prompt"], str):
        student = mismatches.generation_tail(collator, collator.student_kwargs)
        teacher = mismatches.generation_tail(collator, collator.teacher_kwargs, collator.prefix)
        found += [
            mismatches.check_generation_prompt(student),
            mismatches.check_thinking_switch(collator),
        ]
        if any(view.is_target for view in views[0]):
            found.append(mismatches.check_first_token(student, teacher, args.num_loss_tokens_to_skip))
    found += _template_mismatches(collator, rows, views)
    found.append(mismatches.check_subtracted(PrivilegedText(method, args).slots, method.templates(args)))
    longest = max(len(view.ids) for row in views for view in row)
    limits = {"config.max_position_embeddings": getattr(config.get_text_config(), "max_position_embeddings", None)}
    if args.use_vllm and args.vllm_mode == "colocate":
        longest_student = max(len(row[0].ids) for row in views)
        limit = {"vllm_max_model_length": getattr(args, "vllm_max_model_length", None)}
        found.append(mismatches.check_lengths(longest_student, args.max_completion_length, limit))
    found.append(mismatches.check_lengths(longest, args.max_completion_length, limits))
    num_shortened = sum(any(view.shortened for view in row) for row in views)
    found.append(mismatches.check_shortened(num_shortened, len(rows), args.max_teacher_prompt_length))
    solutions = [row.get("solution") for row in rows]
    found.append(mismatches.check_solutions(solutions, args.verifier))
    found.append(warn_of_golds(solutions, args.verifier, "gold answers that are no mathematics"))
    if method.needs_reward or args.reward_weight > 0:
        _require_verifiable(method, solutions, args.verifier)
        threshold = getattr(args, "reward_threshold", 0.5)
        in_groups = method.needs_group or args.reward_weight > 0  # else each rollout is right or wrong by itself
        found.append(
            mismatches.check_reward_splits(
                solutions,
                threshold=threshold,
                num_generations=args.num_generations if in_groups else None,
                temperature=args.temperature,
                verifier=args.verifier,
            )
        )
    return [warning for warning in found if warning is not None]


def _template_mismatches(collator: TeacherCollator, rows: list[dict], views: list[list[View]]) -> list[str | None]:
    """Whether the first row's prompts hold their templates, and the student's is what sampling renders."""
    found = []
    for view in views[0][1:]:
        name = view.name.split(" ")[0]
        if view.template:
            rendered = collator.tokenizer.decode(view.ids)
            found.append(mismatches.check_template_whole(f"the {name} template", view.template, rendered))
    return found


def _require_verifiable(method: Method, solutions: list[str | None], verifier: str) -> None:
    if not any(which_verify(solutions, verifier)):
        raise ValueError(
            f"no `solution` of the first {len(solutions)} rows holds an answer that verifier={verifier!r} can read, but "
            f"{method.name} needs to know which rollouts are right. Box the answers, set another verifier, or train from Python "
            "with reward_funcs."
        )
