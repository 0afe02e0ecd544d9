# SPDX-License-Identifier: Apache-2.0
"""The loop of every builder: batches of rows are sampled, verified, tried again where they may be, and written down."""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from ..evaluation.sampling import read_completion, stop_tokens
from ..monitoring.repetition import is_loop
from ..rows.texts import is_missing
from ..verification import start_verifying, which_verify
from .drawing import Choice, Draws, draw_completions, row_random
from .journal import Journal
from .readers import Reader

Row = Mapping[str, Any]
RIGHT = "right"
# Of rows that were not sampled; nothing of them is ever written.
NO_REFERENCE, UNREAD_REFERENCE, TOO_LONG = "no reference", "unreadable reference", "too long"
UNSAMPLED = (NO_REFERENCE, UNREAD_REFERENCE, TOO_LONG)


@dataclass(frozen=True)
class Source:
    """What completions are drawn from.

    Attributes:
        names: of the readers, for the report.
        models: of each reader.
        prompts: token ids of a row's prompt for each reader.
        choice: makes the rule of a row.
        tokenizer: that reads and writes the completions.
    """

    names: tuple[str, ...]
    models: tuple[Any, ...]
    prompts: Callable[[Row], list[list[int]]]
    choice: Callable[[], Choice]
    tokenizer: Any

    def longest(self) -> float:
        """Tokens that every one of the models has positions for."""
        limits = [getattr(model.config, "max_position_embeddings", None) for model in self.models]
        return min([limit for limit in limits if limit], default=float("inf"))

    def stops(self) -> set[int]:
        """Tokens that end a completion, of any of the models."""
        return set().union(*(stop_tokens(self.tokenizer, model.generation_config) for model in self.models))


@dataclass(frozen=True)
class Plan:
    """How a build goes on.

    Attributes:
        needs_reference: rows whose answer cannot be read are not sampled.
        tries: completions of a row until one is right, 1 or more.
        batch_size: rows sampled at once; batches are the same in a build that was interrupted.
        seed, verifier, max_new_tokens, temperature, top_k: of sampling and verification.
    """

    needs_reference: bool
    tries: int
    batch_size: int
    seed: int
    verifier: str
    max_new_tokens: int
    temperature: float
    top_k: int


def build(rows: Sequence[Row], source: Callable[[], Source], plan: Plan, journal: Journal) -> None:
    """Bring the journal to its last row.

    Args:
        rows: of `prompt` and `solution`, checked.
        source: called once, and only if something is missing.
        plan: how.
        journal: gets a line for each row.
    """
    done = len(journal.entries)
    if done == len(rows):
        return
    drawn_from = source()
    bar = tqdm(total=len(rows), initial=done, desc="building", unit="row")
    for start in range(done - done % plan.batch_size, len(rows), plan.batch_size):
        batch = range(start, min(start + plan.batch_size, len(rows)))
        entries = build_batch([rows[index] for index in batch], start, drawn_from, plan)
        missing = entries[len(journal.entries) - start :]
        journal.add(missing)
        bar.update(len(missing))
    bar.close()


def build_batch(rows: Sequence[Row], start: int, source: Source, plan: Plan) -> list[dict[str, Any]]:
    """The journal's lines of some rows; a function of the rows, their place, the models and the plan.

    Args:
        rows: one batch.
        start: place of the first in the input.
        source: what is drawn from.
        plan: how.
    """
    prompts = [source.prompts(row) for row in rows]
    kinds = why_unsampled(rows, prompts, source.longest() - plan.max_new_tokens, plan)
    entries = [
        {"row": start + place, "kind": kind, "tries": 0, "tokens": 0, "draws": [0] * len(source.names)}
        for place, kind in enumerate(kinds)
    ]
    waiting = [place for place, kind in enumerate(kinds) if kind is None]
    for attempt in range(plan.tries):
        if not waiting:
            break
        randoms = [row_random(plan.seed, start + place, attempt) for place in waiting]
        drawn = _draw([prompts[place] for place in waiting], randoms, source, plan)
        told = judge([rows[place] for place in waiting], drawn, source, plan)
        for place, draws, (kind, text) in zip(waiting, drawn, told, strict=True):
            entry = entries[place]
            counts = [before + draws.readers.count(index) for index, before in enumerate(entry["draws"])]
            entry |= {"kind": kind, "text": text, "tries": attempt + 1, "draws": counts}
            entry["tokens"] = len(draws.ids)
        waiting = [place for place in waiting if entries[place]["kind"] != RIGHT]
    return entries


def why_unsampled(
    rows: Sequence[Row], prompts: Sequence[list[list[int]]], longest: float, plan: Plan
) -> list[str | None]:
    """Of each row why it is not sampled, None where it is.

    Args:
        rows: with a `solution` or without.
        prompts: token ids of each row, one list a reader.
        longest: tokens that a prompt may have.
        plan: whether a reference is needed, and who reads it.
    """
    golds = [row.get("solution") for row in rows]
    read = which_verify(golds, plan.verifier) if plan.needs_reference else [True] * len(rows)
    kinds: list[str | None] = []
    for gold, is_read, ids in zip(golds, read, prompts, strict=True):
        if plan.needs_reference and is_missing(gold):
            kinds.append(NO_REFERENCE)
        elif not is_read:
            kinds.append(UNREAD_REFERENCE)
        else:
            kinds.append(TOO_LONG if max(map(len, ids)) > longest else None)
    return kinds


def judge(rows: Sequence[Row], drawn: Sequence[Draws], source: Source, plan: Plan) -> list[tuple[str, str]]:
    """Kind and text of each completion: right, wrong, unscored, no answer to compare with, cut at the limit, or a loop."""
    stops = source.stops()
    read = [read_completion(draws.ids, stops, source.tokenizer) for draws in drawn]
    golds = [None if is_missing(row.get("solution")) else row["solution"] for row in rows]
    pairs = [(each.text, gold) for each, gold in zip(read, golds, strict=True) if gold is not None]
    verdicts = iter(start_verifying(pairs, plan.verifier)())
    kinds = []
    for each, gold in zip(read, golds, strict=True):
        is_right = None if gold is None else next(verdicts).is_right
        kind = "unverified" if gold is None else {True: RIGHT, False: "wrong", None: "unscored"}[is_right]
        kinds.append(("cut" if each.is_cut else "loop" if is_loop(each.text) else kind, each.text))
    return kinds


def _draw(prompts: Sequence[list[list[int]]], randoms: Sequence[Any], source: Source, plan: Plan) -> list[Draws]:
    readers = [
        Reader(model, [row[index] for row in prompts], source.tokenizer.pad_token_id)
        for index, model in enumerate(source.models)
    ]
    return draw_completions(
        readers,
        [source.choice() for _ in prompts],
        randoms,
        source.stops(),
        max_new_tokens=plan.max_new_tokens,
        temperature=plan.temperature,
        top_k=plan.top_k,
    )


def output_row(row: Row, entry: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """A row as `trl-opsd sft` reads it (`prompt`, `solution`) and TRL's SFTTrainer (`prompt`, `completion`)."""
    text = entry["text"]
    told = text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": text}]
    correct = {RIGHT: True, "unverified": None, "unscored": None}.get(entry["kind"], False)
    return {
        "prompt": row["prompt"],
        "completion": told,
        "solution": text,
        "reference": row.get("solution"),
        "correct": correct,
        "kind": entry["kind"],
        "tries": entry["tries"],
        "tokens": entry["tokens"],
        "seed": seed,
        "row": entry["row"],
    }


def kept_entries(journal: Journal, writes_failures: bool, never: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The lines that become rows of the output.

    Args:
        journal: of a build.
        writes_failures: whether completions that are not right are written too.
        never: kinds that are not written even then.
    """
    dropped = {*UNSAMPLED, *never}
    return [
        entry
        for entry in journal.entries
        if entry["kind"] == RIGHT or (writes_failures and entry["kind"] not in dropped)
    ]


def report(journal: Journal, kept: Sequence[Mapping[str, Any]], names: Sequence[str], start: float) -> str:
    """What `trl-opsd build` prints at its end.

    Args:
        journal: of the build, runs before this one included.
        kept: lines that became rows.
        names: of the readers.
        start: when this run began, by `time.perf_counter`.
    """
    entries = journal.entries
    discarded = Counter(entry["kind"] for entry in entries) - Counter(entry["kind"] for entry in kept)
    kinds = ", ".join(f"{count} {kind}" for kind, count in discarded.most_common()) or "none"
    draws = [sum(counts) for counts in zip(*(entry["draws"] for entry in entries), strict=True)]
    total = sum(draws)
    shares = ", ".join(f"{name} {count / max(total, 1):.3f}" for name, count in zip(names, draws, strict=True))
    right = sum(entry["kind"] == RIGHT for entry in entries)
    first = sum(entry["kind"] == RIGHT and entry["tries"] == 1 for entry in entries)
    lines = [
        f"rows {len(entries)}, right {right}, of these at the first try {first}, tries {sum(entry['tries'] for entry in entries)}",
        f"kept {len(kept)}, discarded {sum(discarded.values())} ({kinds})",
        f"tokens drawn {total} (all tries), of rows kept {sum(entry['tokens'] for entry in kept)}; share drawn from: {shares}",
        f"{time.perf_counter() - start:.1f} s in this run",
    ]
    return "\n".join(lines)
