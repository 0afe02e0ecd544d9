# SPDX-License-Identifier: Apache-2.0
"""Texts of a row: prompts as a string or as messages, their parts, and templates with named slots."""

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

Prompt = str | list[dict[str, Any]]
ROLES = ("system", "user", "assistant", "tool")
OWN_PROMPT = "teacher_prompt"  # the column with a row's own prompt for the teacher
_SLOT = re.compile(r"\{(\w+)\}")
# What stands in front of braces that are LaTeX: a command with its arguments so far, a superscript or a subscript.
_LATEX = re.compile(r"(?:\\[A-Za-z]+\*?(?:\[[^\]\n]*\])?(?:\{[^{}\n]*\})*|[\^_])\Z")


def is_missing(solution: Any) -> bool:
    """Whether a row has no reference solution: None, or blank text."""
    return solution is None or (isinstance(solution, str) and not solution.strip())


def check_template(name: str, template: str, *slots: str) -> None:
    """Check that a prompt template holds each of `slots`.

    Raises:
        ValueError: it is not text or a slot is missing; names the config field `name`.
    """
    if not isinstance(template, str):
        raise ValueError(f"{name}={template!r} is not text. Give a template that contains {' and '.join(slots)}.")
    for slot in slots:
        if slot not in template:
            raise ValueError(f"{name} does not contain {slot}: {template!r}. Put {slot} where that text should stand.")


def slots_of(template: str) -> tuple[str, ...]:
    """Names in braces, each once; a number, and an argument of LaTeX as in `\\boxed{answer}`, is none."""
    found = (slot for slot in _SLOT.finditer(template) if not _LATEX.search(template[: slot.start()]))
    return tuple(dict.fromkeys(slot[1] for slot in found if slot[1].isidentifier()))


def without_empty_lines(template: str, empty: Collection[str]) -> str:
    """The template without the lines on which nothing but empty slots stand; of two blank lines around one, one stays.

    Args:
        template: with slots.
        empty: names of the slots that have no text.
    """
    kept: list[str] = []
    dropped = False
    for line in template.split("\n") if empty else [template]:
        slots = set(_SLOT.findall(line))
        if slots and slots <= set(empty):
            dropped = True
        elif not (dropped and not line.strip() and not (kept and kept[-1].strip())):
            kept.append(line)
            dropped = False
    if dropped and kept and not kept[-1].strip():
        kept.pop()
    return "\n".join(kept)


def column_text(value: Any, place: str) -> str | None:
    """What a column puts into a slot: its text, a list of texts as lines, None where it is empty.

    Raises:
        ValueError: it is something else, or no Unicode; the message starts with `place`.
    """
    parts = [value] if isinstance(value, str) else value
    if parts is None:
        return None
    if not isinstance(parts, list | tuple) or not all(isinstance(part, str) for part in parts):
        raise ValueError(f"{place} is {type(value).__name__}; a slot takes text, a list of texts, or None.")
    text = "\n".join(parts)
    check_text(text, place, may_be_empty=True)
    return text if text.strip() else None


def own_prompt(row: Mapping[str, Any]) -> Any:
    """A row's own prompt for the teacher, None where it is empty."""
    value = row.get(OWN_PROMPT)
    return None if is_missing(value) or value == [] else value


def fill_template(template: str, *, prompt: str = "", solution: str = "", **texts: str) -> str:
    """Put texts into `{prompt}`, `{solution}` and slots of other names, in one pass: braces in the texts are data."""
    texts |= {"prompt": prompt, "solution": solution}
    return _SLOT.sub(lambda match: texts.get(match[1], match[0]), template)


def without_blocks(text: str, opening: str, closing: str) -> str:
    """`text` without its blocks: from an opening mark to the next closing one, both included.

    Linear in the length of `text`, where a lazy regular expression reads the rest anew for every unclosed mark.

    Args:
        text: the text; what follows an unclosed mark stays in it.
        opening: the mark that opens a block.
        closing: regular expression of what closes one.
    """
    *parts, rest = re.split(f"({closing})", text)
    kept: list[str] = []
    for part, mark in zip(parts[::2], parts[1::2], strict=True):
        before, found, _ = part.partition(opening)
        kept += (before,) if found else (part, mark)
    return "".join([*kept, rest])


def check_text(text: Any, place: str, *, may_be_empty: bool = False) -> None:
    """Check that `text` is a string that a tokenizer can read.

    Raises:
        ValueError: it is no string, blank, or holds half of a surrogate pair; the message starts with `place`.
    """
    if not isinstance(text, str):
        raise ValueError(f"{place} is not text but {type(text).__name__}. Give a string, or remove the row.")
    if not may_be_empty and not text.strip():
        raise ValueError(f"{place} is empty. Remove the row or give it a text.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{place} is not valid Unicode: half of a surrogate pair ({text[error.start]!r}) at character "
            f"{error.start}. Repair how the file was decoded, or remove the row."
        ) from None


def check_prompt(prompt: Any, row: str, field: str = "prompt") -> None:
    """Check that a dataset prompt, or what stands in another `field`, is text or a text-only conversation that ends with a user turn.

    Raises:
        ValueError: it is not; the message starts with `row`, which names the place.
    """
    if isinstance(prompt, str):
        check_text(prompt, f"{row}: `{field}`")
        return
    if not isinstance(prompt, list) or not prompt or not all(isinstance(m, dict) for m in prompt):
        raise ValueError(
            f"{row}: `{field}` is {type(prompt).__name__}, not text or a list of messages. Give a string or "
            '[{"role": "user", "content": ...}].'
        )
    if prompt[-1].get("role") != "user":
        raise ValueError(
            f"{row}: `{field}` ends with a {repr(prompt[-1].get('role'))[:40]} turn, but the model answers a user. End "
            "it with a message of role 'user' and move an answer to `solution`."
        )
    for index, message in enumerate(prompt):
        _check_message(message, f"{row}: `{field}`", index)
    message_text(prompt[-1], f"{row}: `{field}`" if field != "prompt" else row)


def _check_message(message: dict[str, Any], place: str, index: int) -> None:
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:  # a chat template may leave out a turn whose role it does not know
        raise ValueError(f"{place} message {index} has the role {repr(role)[:40]}. Use one of {ROLES}.")
    if content is None and role == "assistant" and isinstance(message.get("tool_calls"), list):
        return
    for part in content if isinstance(content, list) else [content]:
        if isinstance(content, list):
            if not isinstance(part, dict) or part.get("type") != "text":
                raise ValueError(
                    f"{place} holds a part that is not text: {str(part)[:80]!r}. Images are not carried into the "
                    "teacher's prompt; remove the row or the part."
                )
            part = part.get("text")
        check_text(part, f"{place} message {index} `content`", may_be_empty=True)


def message_text(message: dict[str, Any], row: str = "prompt") -> str:
    """The text of a message whose content is a string or a list of text parts.

    Raises:
        ValueError: the content is empty or holds something other than text.
    """
    content = joined_parts(message).get("content")
    if not isinstance(content, str) or not content.strip():
        raise ValueError(
            f"{row}: the last message's content is not text: {str(content)[:80]!r}. Only non-empty text in "
            "`prompt` can be shown to the teacher."
        )
    return content


def joined_parts(message: dict[str, Any]) -> dict[str, Any]:
    """The message with a list of text parts as one string: templates of text models leave lists out or fail on them."""
    content = message.get("content")
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        return message
    texts = [part.get("text") if part.get("type") == "text" else None for part in content]
    return {**message, "content": "".join(texts)} if all(isinstance(text, str) for text in texts) else message


def as_text_turns(prompt: Prompt) -> Prompt:
    """The prompt with every message's text parts joined; one without parts is returned as it is."""
    return prompt if isinstance(prompt, str) else [joined_parts(message) for message in prompt]


def rewrite_last_turn(prompt: Prompt, rewrite: Callable[[str], str]) -> Prompt:
    """The prompt with the text of its last user turn replaced; system and earlier turns stay."""
    if isinstance(prompt, str):
        return rewrite(prompt)
    return [*prompt[:-1], {**prompt[-1], "content": rewrite(message_text(prompt[-1]))}]
