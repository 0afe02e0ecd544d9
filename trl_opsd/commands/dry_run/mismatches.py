# SPDX-License-Identifier: Apache-2.0
"""Mismatches of prompts, templates and rewards that users of such trainers fell into, found before training.

Each check returns a warning that says what to set, or None.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ...rewards import make_accuracy_reward
from ...rows.texts import Prompt
from ...teacher.prompts import TeacherCollator
from ...verification import which_verify

# Answers that no reference solution has: a reward that calls one right calls everything right.
_WRONG_ANSWER = "\\boxed{-271828182845904}"


def think_state(tail: str) -> str:
    """Where a prompt's end leaves a think block: "open", "closed", or "none" where it holds no mark."""
    marks = re.findall(r"</?think>", tail)
    if not marks:
        return "none"
    return "open" if marks[-1] == "<think>" else "closed"


def generation_tail(collator: TeacherCollator, kwargs: dict[str, Any], prefix: str | None = None) -> str:
    """The text that a chat template puts behind the user's turn to open the answer, with the teacher's prefix."""
    turn = [{"role": "user", "content": "?"}]

    def render(opens: bool) -> str:
        return collator.tokenizer.apply_chat_template(
            turn, add_generation_prompt=opens, tokenize=False, **collator.render_kwargs, **kwargs
        )

    opened, bare = render(True), render(False)
    return (opened[len(bare) :] if opened.startswith(bare) else opened) + (prefix or "")


def check_first_token(student_tail: str, teacher_tail: str, num_skipped: int) -> str | None:
    """The student's prompt opens the answer where the teacher's opens, or awaits, a think block."""
    student, teacher = think_state(student_tail), think_state(teacher_tail)
    if student == teacher or num_skipped > 0:
        return None
    return (
        f"think tag at the first token: the student's prompt ends with {student_tail!r} (think block: {student}), the "
        f"teacher's with {teacher_tail!r} ({teacher}), so they disagree about the first token whatever the problem. This "
        "is what OPSD's paper runs with thinking off and on. To take it out of the loss set num_loss_tokens_to_skip=1, or "
        "make the ends equal with teacher_prefix or teacher_chat_template_kwargs."
    )


def check_generation_prompt(tail: str) -> str | None:
    """The chat template opens no turn for the answer."""
    if tail.strip():
        return None
    return (
        "template without generation prompt: the chat template renders the same with and without "
        "add_generation_prompt, so the model may go on writing the user's turn. Use the model's own template, or one "
        "that ends with the assistant's header."
    )


def check_thinking_switch(collator: TeacherCollator) -> str | None:
    """`enable_thinking` differs between the roles, but the template does not read it."""
    roles = [collator.student_kwargs.get("enable_thinking"), collator.teacher_kwargs.get("enable_thinking")]
    if roles[0] == roles[1]:
        return None
    tails = [generation_tail(collator, {"enable_thinking": value}) for value in (True, False)]
    if tails[0] != tails[1]:
        return None
    return (
        f"thinking switch without effect: enable_thinking is {roles[0]} for the student and {roles[1]} for the teacher, "
        "but the chat template renders both alike. Remove it, or set teacher_prefix."
    )


def check_template_whole(template_name: str, template: str, rendered: str) -> str | None:
    """A piece of the teacher's template is not in what the teacher reads."""
    pieces = [piece.strip() for piece in re.split(r"\{\w+\}", template)]
    lost = [piece for piece in pieces if piece and piece not in rendered]
    if not lost:
        return None
    return (
        f"truncated template: {template_name} has {lost[0][-60:]!r}, which is not in the rendered prompt. The chat "
        "template or the tokenizer cuts messages; the teacher would not know what to do."
    )


def check_subtracted(columns: Mapping[str, Sequence[str]], own_templates: Mapping[str, str]) -> str | None:
    """A column stands in the teacher's template and not in the one whose view is subtracted from it."""
    extra = [name for name in columns["teacher"] if name not in columns["reference"]]
    if "reference" not in own_templates or not extra:
        return None
    return (
        f"column that is not subtracted: `{{{extra[0]}}}` stands in teacher_prompt_template but not in reference_prompt_template, "
        "so what it says without the problem is taught. Put it into both, unless you mean that."
    )


def check_lengths(longest: int, rollout: int, limits: dict[str, int | None]) -> str | None:
    """Prompt and rollout together exceed what the model or the engine takes."""
    small = {name: limit for name, limit in limits.items() if limit is not None and longest + rollout > limit}
    if not small:
        return None
    name, limit = min(small.items(), key=lambda item: item[1])
    return (
        f"too long: a prompt of {longest} tokens and a rollout of {rollout} exceed {name}={limit}. Shorten "
        "max_completion_length or max_teacher_prompt_length, or raise the limit."
    )


def check_solutions(solutions: Sequence[str | None], verifier: str) -> str | None:
    """Solutions in which the verifier reads no answer."""
    bad = [index for index, read in enumerate(which_verify(solutions, verifier)) if solutions[index] and not read]
    if not bad:
        return None
    return (
        f"solution that does not verify: {len(bad)} of {len(solutions)} rows hold no answer that verifier={verifier!r} can read "
        f"(rows {', '.join(map(str, bad[:8]))}). Their rollouts get no reward: box the answer, set another verifier, or drop the rows."
    )


def check_reward_splits(
    solutions: Sequence[str | None],
    *,
    threshold: float,
    num_generations: int | None,
    temperature: float,
    verifier: str = "math",
) -> str | None:
    """No group can have both right and wrong rollouts, whatever the model samples."""
    known = [solution for solution in solutions if solution]
    reward = make_accuracy_reward(verifier)
    right = reward(known, known)
    wrong = reward([_WRONG_ANSWER] * len(known), known)
    pairs = [(best, worst) for best, worst in zip(right, wrong, strict=True) if best is not None]
    reason = None
    if num_generations is not None and num_generations < 2:
        reason = f"num_generations={num_generations} makes groups of one"
    elif temperature == 0:
        reason = "temperature=0 makes all rollouts of a group equal"
    elif not any(best >= threshold > worst for best, worst in pairs):
        reason = (
            f"with reward_threshold={threshold} the reference solutions and a wrong answer fall on the same side in all "
            f"{len(pairs)} rows that verify"
        )
    return None if reason is None else f"reward that never splits: {reason}, so no group has right and wrong rollouts."


def check_shortened(num_shortened: int, num_rows: int, budget: int | None) -> str | None:
    """Solutions that lost text to the teacher's budget."""
    if not num_shortened:
        return None
    return (
        f"shortened solution: {num_shortened} of {num_rows} rows, to max_teacher_prompt_length={budget}. The template is "
        "whole, the solution is not; raise the budget or drop long rows."
    )


def check_prompt_kinds(prompts: Sequence[Prompt]) -> str | None:
    """Some rows are text and some are conversations, so only some go through the chat template."""
    kinds = {type(prompt).__name__ for prompt in prompts}
    if len(kinds) < 2:
        return None
    return f"mixed prompts: rows are of the kinds {sorted(kinds)}; only conversations go through the chat template."
