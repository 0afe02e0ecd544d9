# SPDX-License-Identifier: Apache-2.0
"""What the pages of SDPO's tree share: the blocks of text that their teacher reads, feedback, and the weight of a token."""

import re
from collections.abc import Sequence
from hashlib import sha256
from typing import Any

import torch

from ..losses import Facts
from ..rows.texts import fill_template, is_missing, without_blocks
from ..teacher.contexts import Contexts, Moment, Rollout, TeacherContext
from ..user_functions import said_of
from .groups import ratio_weight

_END_OF_THINKING = r"</think>\s*"


def block(template: str, text: str | None) -> str:
    """The template around a text, and nothing where the text is None or blank."""
    return "" if is_missing(text) else fill_template(template, text=text)


def blocks(settings: Any, **texts: str | None) -> str:
    """The texts one after the other, each in the setting `NAME_block`; nothing for one that is None or blank."""
    return "".join(block(getattr(settings, f"{name}_block"), text) for name, text in texts.items())


def shown_text(text: str, settings: Any) -> str:
    """A text of the model as the teacher reads it, under `strip_thinking` without its thinking, that of an opened turn too."""
    if not settings.strip_thinking:
        return text
    text = without_blocks(text, "<think>", _END_OF_THINKING)
    return re.split(_END_OF_THINKING, text, maxsplit=1)[-1]  # some chat templates open the block in the prompt


def feedback_notes(rollouts: Sequence[Rollout], settings: Any, moment: Moment) -> list[str | None]:
    """What an environment says of each rollout: `feedback_function` if it is set, else the column `feedback`.

    Where the function fails there is no feedback, and a warning.

    Raises:
        ValueError: it is neither text nor None.
    """
    said = said_of(rollouts, settings, column="feedback", function="feedback_function", failing="have no feedback")
    texts = [None if isinstance(text, Exception) else text for text in said]
    wrong = [text for text in texts if not (text is None or isinstance(text, str))]
    if wrong:
        name = settings.feedback_function
        place = "The column `feedback`" if name is None else f"feedback_function={name!r}"
        raise ValueError(f"{place} gave {wrong[0]!r}; it must be text, or None where there is nothing to say.")
    return texts


def prompt_key(rollout: Rollout) -> str:
    """A short name of a rollout's prompt."""
    return sha256(repr(rollout.prompt).encode()).hexdigest()[:16]


def anchored_views(blocks: str, settings: Any) -> Contexts:
    """The teacher's view of the blocks as the target, or under `live_share` the mix of two owners' views."""
    share, slot = settings.live_share, ("peer", blocks, settings.max_rollout_context_length)
    if share is None:
        return (TeacherContext(*slot, anchor=1.0),)
    shares = {"base": 1 - share, "live": share}
    return tuple(TeacherContext(*slot, anchor=part, weights=owner) for owner, part in shares.items() if part)


def mix_owners(settings: Any) -> tuple[str, ...]:
    """Whose weights `anchored_views` asks for beside the teacher's."""
    return () if settings.live_share is None else ("base", "live")


def corrected_weight(facts: Facts, settings: Any, moment: Moment) -> torch.Tensor:
    """(n,) min(q(y) / q_old(y), `importance_cap`), times the engine's weight under `engine_weight_cap`."""
    return ratio_weight(facts, settings, moment) * engine_weight(facts, settings, moment)


def engine_weight(facts: Facts, settings: Any, moment: Moment) -> torch.Tensor:
    """(n,) min(q_old(y) / q_engine(y), `engine_weight_cap`), as TRL takes it; 1 where the cap is None."""
    weight = facts.given["engine_weight"]
    return torch.ones_like(weight) if settings.engine_weight_cap is None else weight
