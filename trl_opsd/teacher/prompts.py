# SPDX-License-Identifier: Apache-2.0
"""From a teacher's context to token ids: chat template, length budget, left padding.

The rollout's ids are appended as they were sampled. Nothing here decodes and re-encodes a prompt or a completion.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from typing import Any

import torch

from ..rows.checks import check_no_special_token
from ..rows.texts import OWN_PROMPT, Prompt, as_text_turns, fill_template, rewrite_last_turn, without_empty_lines
from .contexts import TeacherContext, all_templates

_CUT = " [...] "


@dataclass(frozen=True)
class EncodedContext:
    """Token ids of a teacher's prompt, and whether its slot was shortened to fit the budget."""

    ids: list[int]
    shortened: bool = False


@dataclass
class TeacherCollator:
    """Renders what the teacher reads before the rollout.

    Args:
        tokenizer: the model's tokenizer, with a chat template where prompts are conversations.
        templates: prompt template by the name a `TeacherContext` uses, except "plain".
        student_kwargs: chat-template arguments of the student, used for "plain" contexts.
        teacher_kwargs: chat-template arguments of every other context.
        prefix: text that opens the teacher's turn after the generation prompt.
        max_length: budget of a privileged prompt in tokens; the slot's text is shortened to it, the template never.
        render_kwargs: passed to `apply_chat_template` for every context (tools, another chat template).
        max_positions: tokens that the model has positions for; None for no limit.
        prompt_template: into which the last turn of the student's prompts is put when they are sampled from. Checks put it there;
            `encode` gets a "plain" prompt that holds it.
    """

    tokenizer: Any
    templates: dict[str, str]
    student_kwargs: dict[str, Any] = field(default_factory=dict)
    teacher_kwargs: dict[str, Any] = field(default_factory=dict)
    prefix: str | None = None
    max_length: int | None = None
    render_kwargs: dict[str, Any] = field(default_factory=dict)
    max_positions: int | None = None
    prompt_template: str | None = None

    @cached_property
    def special_tokens(self) -> tuple[str, ...]:
        """Control tokens that a text must not spell out; `<think>` and its like are tokens of their own but no control."""
        added = getattr(self.tokenizer, "added_tokens_decoder", {}).values()
        return tuple(dict.fromkeys([*self.tokenizer.all_special_tokens, *(t.content for t in added if t.special)]))

    @classmethod
    def from_settings(
        cls,
        tokenizer: Any,
        settings: Any,
        render_kwargs: dict[str, Any] | None = None,
        templates: Mapping[str, str] | None = None,
        **limits: int | None,
    ):
        """The collator that an `OPSDConfig` describes, with the method's own `templates` and `limits` of the model."""
        return cls(
            tokenizer=tokenizer,
            templates=all_templates(settings, templates),
            student_kwargs=settings.chat_template_kwargs or {},
            teacher_kwargs=settings.teacher_chat_template_kwargs or {},
            prefix=settings.teacher_prefix,
            max_length=settings.max_teacher_prompt_length,
            prompt_template=getattr(settings, "prompt_template", None),
            render_kwargs=render_kwargs or {},
            **limits,
        )

    def encode(self, prompt: Prompt, context: TeacherContext) -> EncodedContext:
        """Token ids of `context` for a row's `prompt`, the slot shortened to the budget if it must be.

        Raises:
            ValueError: the template and the problem alone exceed `max_teacher_prompt_length`, the chat template
                refuses its arguments, the slot's text spells out a control token, or the model has fewer positions.
        """
        if context.template == "plain":
            return EncodedContext(self._within_positions(self._render(prompt, self.student_kwargs)))
        if context.own_prompt:
            return EncodedContext(self._within_positions(self._own_ids(prompt, context)))
        for text in (context.slot, context.opening, *(text for _, text in context.texts)):
            check_no_special_token({"prompt": "", "solution": text}, "teacher context", self.special_tokens)
        slot, cut = self._within_slot_budget(context)
        context = replace(context, slot=slot)
        ids = self._context_ids(prompt, context, slot)
        if self.max_length is None or len(ids) <= self.max_length:
            return EncodedContext(self._within_positions(ids), shortened=cut)
        return EncodedContext(self._shortened_ids(prompt, context), shortened=True)

    def _own_ids(self, prompt: Prompt, context: TeacherContext) -> list[int]:
        """Ids of a row's own prompt: messages as they are, a text in place of the last user turn; never shortened."""
        own = json.loads(context.own_prompt)
        check_no_special_token({"prompt": "", OWN_PROMPT: own}, "teacher context", self.special_tokens, [OWN_PROMPT])
        turns = rewrite_last_turn(prompt, lambda _: own) if isinstance(own, str) else own
        ids = self._opened(self._render(turns, self.teacher_kwargs), context.opening)
        if self.max_length is not None and len(ids) > self.max_length:
            raise ValueError(
                f"`{OWN_PROMPT}` takes {len(ids)} tokens, more than max_teacher_prompt_length={self.max_length}, and is not "
                "shortened. Raise max_teacher_prompt_length, or shorten the row's text."
            )
        return ids

    def _within_slot_budget(self, context: TeacherContext) -> tuple[str, bool]:
        """The slot's text within its own budget, and whether it was cut."""
        if context.slot_tokens is None or context.slot is None:
            return context.slot or "", False
        ends = token_ends(self.tokenizer, context.slot)
        if len(ends) <= context.slot_tokens:
            return context.slot, False
        return shorten_text(context.slot, ends, context.slot_tokens), True

    def _within_positions(self, ids: list[int]) -> list[int]:
        if self.max_positions is not None and len(ids) > self.max_positions:
            raise ValueError(
                f"A prompt has {len(ids)} tokens, but the model has positions for {self.max_positions}. Set "
                f"max_teacher_prompt_length below {self.max_positions} to shorten the solution, or drop the row."
            )
        return ids

    def check_renders(self, prompt: Prompt) -> None:
        """Render a prompt for the student and for every template.

        Raises:
            ValueError: the chat template refuses or leaves the text of the message out, or the model has fewer positions
                than the student's prompt has tokens.
        """
        sampled = self.as_sampled(prompt)
        ids = self._within_positions(self._render(sampled, self.student_kwargs))
        self._check_shows_text(sampled, ids)
        for template in self.templates:
            self._privileged_ids(prompt, template, _CUT)

    def as_sampled(self, prompt: Prompt) -> Prompt:
        """The student's prompt as it is sampled from."""
        if self.prompt_template is None:
            return prompt
        return rewrite_last_turn(prompt, lambda text: fill_template(self.prompt_template, prompt=text))

    def _check_shows_text(self, prompt: Prompt, ids: list[int]) -> None:
        """Templates of vision-language models may render nothing of a text that stands in no list of parts."""
        longer = rewrite_last_turn(prompt, lambda text: f"{text} ?")
        if not isinstance(prompt, str) and self._render(longer, self.student_kwargs) == ids:
            raise ValueError(
                "The chat template renders a message without its text: the model would be asked nothing. It may want the text "
                "as a list of parts, as templates of vision-language models do; give the tokenizer a template for text."
            )

    @cached_property
    def template_length(self) -> int:
        """Tokens of the longest prompt, the student's among them, around an empty problem."""
        has_template = getattr(self.tokenizer, "chat_template", None) or "chat_template" in self.render_kwargs
        turn = [{"role": "user", "content": "?"}] if has_template else "?"
        prompts = [self._privileged_ids(turn, template, _CUT) for template in self.templates]
        return max(map(len, [*prompts, self._render(self.as_sampled(turn), self.student_kwargs)]))

    def settings_key(self) -> str:
        """All that decides how a prompt is encoded, as text."""
        tokenizer = self.tokenizer
        vocabulary = (
            tokenizer.backend_tokenizer.to_str() if getattr(tokenizer, "is_fast", False) else tokenizer.get_vocab()
        )
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "tokenizer"}
        return repr((vocabulary, tokenizer.all_special_tokens, getattr(tokenizer, "chat_template", None), own))

    def check_budget(
        self, prompt: Prompt, template: str, texts: Sequence[tuple[str, str | None]] = (), opening: str = ""
    ) -> None:
        """Check that the budget leaves room for some of the slot's text.

        Raises:
            ValueError: it does not; names the field and the length that would.
        """
        if self.max_length is None:
            return
        needed = len(self._privileged_ids(prompt, template, _CUT, texts, opening)) + 1
        if needed > self.max_length:
            raise ValueError(
                f"max_teacher_prompt_length={self.max_length} leaves nothing of the solution: template and problem "
                f"alone take {needed} tokens{', columns included' * bool(texts)}. Raise max_teacher_prompt_length, or drop prompts "
                "this long."
            )

    def _context_ids(self, prompt: Prompt, context: TeacherContext, slot: str) -> list[int]:
        return self._privileged_ids(prompt, context.template, slot, context.texts, context.opening)

    def _privileged_ids(
        self, prompt: Prompt, template: str, slot: str, texts: Sequence[tuple[str, str | None]] = (), opening: str = ""
    ) -> list[int]:
        given = {name: text or "" for name, text in texts}
        whole = without_empty_lines(self.templates[template], [name for name, text in texts if text is None])
        filled = partial(fill_template, whole, solution=slot, **given)
        prompt = rewrite_last_turn(prompt, lambda problem: filled(prompt=problem))
        return self._opened(self._render(prompt, self.teacher_kwargs), opening)

    def _opened(self, ids: list[int], opening: str) -> list[int]:
        """The ids with what opens the teacher's turn behind them."""
        for text in filter(None, (self.prefix, opening)):
            ids = ids + self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _render(self, prompt: Prompt, template_kwargs: dict[str, Any]) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer(text=prompt)["input_ids"]
        try:
            encoded = self.tokenizer.apply_chat_template(
                as_text_turns(prompt),
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                **self.render_kwargs,
                **template_kwargs,
            )
        except Exception as error:
            has_system = any(turn.get("role") == "system" for turn in prompt)
            raise ValueError(
                f"The chat template refused a prompt with the arguments {template_kwargs!r} ({error}). Check "
                "chat_template_kwargs and teacher_chat_template_kwargs, and that the tokenizer has a chat template."
                + has_system
                * " If it takes no system message, move its text into the user message."
            ) from error
        return list(encoded["input_ids"])

    def _shortened_ids(self, prompt: Prompt, context: TeacherContext) -> list[int]:
        """The longest rendering within the budget, by bisection over the tokens of the slot that are kept."""
        self.check_budget(prompt, context.template, context.texts, context.opening)
        ends = token_ends(self.tokenizer, context.slot)
        low, high, best = 0, min(len(ends), self.max_length), None
        while low <= high:
            kept = (low + high) // 2
            text = shorten_text(context.slot, ends, kept)
            ids = self._context_ids(prompt, context, text)
            if len(ids) <= self.max_length:
                best, low = ids, kept + 1
            else:
                high = kept - 1
        assert best is not None, "check_budget admitted a prompt that does not fit"
        return best


def token_ends(tokenizer: Any, text: str) -> list[int]:
    """Character offset behind each token of `text`, so that a cut never splits a character."""
    if getattr(tokenizer, "is_fast", False):
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return [end for _, end in offsets]
    return list(range(1, len(text) + 1))


def shorten_text(text: str, ends: Sequence[int], kept: int) -> str:
    """`text` with only `kept` of its tokens: head and tail, where the answer usually stands, and a mark at the cut between.

    Args:
        text: the text.
        ends: character offset behind each of its tokens.
        kept: number of tokens to keep, at most `len(ends)`.
    """
    head = (kept + 1) // 2
    tail = kept - head
    start = text[: ends[head - 1]] if head else ""
    return start + _CUT + (text[ends[len(ends) - tail - 1] :] if tail else "")


def left_pad(sequences: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Stack token ids of unequal length with padding on the left.

    Args:
        sequences: B lists of token ids.
        pad_id: id of the padding token.

    Returns:
        ids (B, S) and mask (B, S), both int64; the mask is 1 on tokens.
    """
    length = max(map(len, sequences))
    ids = torch.full((len(sequences), length), pad_id)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        if sequence:
            ids[row, length - len(sequence) :] = torch.tensor(sequence)
            mask[row, length - len(sequence) :] = 1
    return ids, mask


def positions_from_mask(mask: torch.Tensor) -> torch.Tensor:
    """Position ids (B, S) that count tokens only, so that padding on the left changes nothing."""
    return (mask.cumsum(dim=-1) - 1).clamp(min=0)
