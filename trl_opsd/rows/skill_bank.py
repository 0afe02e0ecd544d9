# SPDX-License-Identifier: Apache-2.0
"""A bank of skills and mistakes in a file, and what of it suits a problem (SGSD, arXiv 2605.28791).

The file is JSONL: an object a line with the text `skill`, the text `mistake`, or both, and perhaps `embedding`, a list of
numbers. The paper compares by embeddings. Without a model for these, texts are compared by the words they share, which needs
nothing but is ours.
"""

import hashlib
import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

_MISTAKE = "\nA mistake that is often made: "
_WORD = re.compile(r"\w+")
Vector = Mapping[str, float]


class Entry(NamedTuple):
    """A text of the bank, with its embedding where the file holds one."""

    text: str
    embedding: tuple[float, ...] | None = None


@dataclass(frozen=True)
class SkillBank:
    """What a file held when it was read.

    Attributes:
        skills: at least one.
        mistakes: any number.
        digest: SHA-256 of the file.
        embedding_model: of sentence-transformers, by name or folder; None compares words.
    """

    skills: tuple[Entry, ...]
    mistakes: tuple[Entry, ...]
    digest: str = ""
    embedding_model: str | None = None

    @classmethod
    def read(cls, path: str | Path, embedding_model: str | None = None) -> "SkillBank":
        """The bank in a file.

        Raises:
            ValueError: there is no such file, or a line is no entry; names the line.
        """
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error}.") from error
        kinds: dict[str, list[Entry]] = {"skill": [], "mistake": []}
        for number, line in enumerate(content.decode("utf-8", "replace").splitlines(), 1):
            if line.strip():
                for kind, entry in _entries(line, f"{path} line {number}").items():
                    kinds[kind].append(entry)
        if not kinds["skill"]:
            raise ValueError(f'{path} holds no `skill`. Write one object a line, such as {{"skill": "..."}}.')
        digest = hashlib.sha256(content).hexdigest()
        return cls(tuple(kinds["skill"]), tuple(kinds["mistake"]), digest, embedding_model)

    def retrieve(self, problem: str, k: int) -> list[tuple[str, float]]:
        """The k skills nearest to a problem, best first, each paired with the mistake of its own rank, while there are some.

        Args:
            problem: text.
            k: at most so many, >= 1.

        Returns:
            Texts and scores in [-1, 1], the mean of skill's and mistake's.
        """
        skills, mistakes = (self._ranked(problem, kind)[:k] for kind in ("skills", "mistakes"))
        pairs = []
        for rank, (skill, score) in enumerate(skills):
            if rank < len(mistakes):
                mistake, other = mistakes[rank]
                pairs.append((f"{skill}{_MISTAKE}{mistake}", (score + other) / 2))
            else:
                pairs.append((skill, score))
        return sorted(pairs, key=lambda pair: -pair[1])

    def _ranked(self, problem: str, kind: str) -> list[tuple[str, float]]:
        vectors, wanted = self._vectors[kind], self._vector(problem)
        scored = [
            (entry.text, _product(wanted, vector)) for entry, vector in zip(getattr(self, kind), vectors, strict=True)
        ]
        return sorted(scored, key=lambda pair: -pair[1])  # stable: ties stay in the file's order

    @cached_property
    def _vectors(self) -> dict[str, list[Any]]:
        return {kind: [self._vector(*entry) for entry in getattr(self, kind)] for kind in ("skills", "mistakes")}

    def _vector(self, text: str, embedding: Sequence[float] | None = None) -> Vector | list[float]:
        """Of length 1: an embedding, or the words by how often they stand here and how rare they are in the bank."""
        if self.embedding_model is not None:
            values = embedding or [float(x) for x in _encoder(self.embedding_model).encode(text)]
            norm = math.hypot(*values) or 1.0
            return [value / norm for value in values]
        counts = {word: count * self._rarity.get(word, 0.0) for word, count in Counter(_words(text)).items()}
        norm = math.hypot(*counts.values()) or 1.0
        return {word: value / norm for word, value in counts.items()}

    @cached_property
    def _rarity(self) -> Vector:
        """log((1 + N) / (1 + n)) + 1 of every word that n of the N texts hold."""
        texts = [set(_words(entry.text)) for entry in (*self.skills, *self.mistakes)]
        found = Counter(word for words in texts for word in words)
        return {word: math.log((1 + len(texts)) / (1 + count)) + 1 for word, count in found.items()}


class SkillBankFile:
    """A bank whose file another process may rewrite while a run reads it; read anew only when it is due."""

    def __init__(self, path: str, embedding_model: str | None = None):
        self.path, self.embedding_model = path, embedding_model
        self._bank: SkillBank | None = None

    def current(self, digest: str | None, *, due: bool) -> SkillBank:
        """The bank to use now.

        Args:
            digest: of the bank that the run used last, None at its start; another one is told where no refresh is due, which
                a resumed run comes to.
            due: whether the file is to be read again.

        Raises:
            ValueError: the file is no bank, and none was read before.
        """
        if self._bank is not None and not due and self._bank.digest == digest:
            return self._bank
        self._bank = self._read_again()
        if not due and self._bank.digest != digest:
            warnings.warn(
                f"skill_bank={self.path!r} is another file than the run used before: it goes on with this one, and is not the "
                "run that it would have been without a break.",
                stacklevel=2,
            )
        return self._bank

    def _read_again(self) -> SkillBank:
        try:
            bank = SkillBank.read(self.path, self.embedding_model)
        except ValueError as error:
            if self._bank is None:
                raise ValueError(f"skill_bank: {error}") from error
            warnings.warn(f"skill_bank is left as it was, for {error}", stacklevel=3)
            return self._bank
        return self._bank if self._bank is not None and self._bank.digest == bank.digest else bank


@lru_cache(maxsize=4)
def skill_bank_file(path: str, embedding_model: str | None = None) -> SkillBankFile:
    """The one reader of a file in this process, so that it is parsed and embedded once."""
    return SkillBankFile(path, embedding_model)


def check_embeddings(model: str) -> None:
    """Check that texts can be embedded.

    Raises:
        ValueError: sentence-transformers is not installed.
    """
    if find_spec("sentence_transformers") is None:
        raise ValueError(
            f"skill_embedding_model={model!r} needs sentence-transformers, which is not installed. Install it (pip install "
            "'trl-opsd[skills]'), or leave skill_embedding_model unset: then words are compared."
        )


@lru_cache(maxsize=2)
def _encoder(model: str) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(model)


def _entries(line: str, place: str) -> dict[str, Entry]:
    """What a line holds, by its kind."""
    try:
        found = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place} is no JSON: {error}.") from error
    texts = {kind: found.get(kind) for kind in ("skill", "mistake")} if isinstance(found, dict) else {}
    texts = {kind: text for kind, text in texts.items() if text is not None}
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts.values()):
        raise ValueError(f"{place} holds neither a text `skill` nor a text `mistake`. Give it one, or remove the line.")
    embedding = found.get("embedding")
    if embedding is not None and not (
        isinstance(embedding, list) and all(isinstance(x, int | float) for x in embedding)
    ):
        raise ValueError(f"{place}: `embedding` is no list of numbers. Give one, or leave it out.")
    return {kind: Entry(text, None if embedding is None else tuple(embedding)) for kind, text in texts.items()}


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _product(one: Vector | Sequence[float], other: Vector | Sequence[float]) -> float:
    if isinstance(one, Mapping):
        return sum(value * other.get(word, 0.0) for word, value in one.items())
    if len(one) != len(other):
        raise ValueError(
            f"skill_bank: an `embedding` has {len(other)} numbers and skill_embedding_model gives {len(one)}. Leave `embedding` out of "
            "the file, or set the model that made it."
        )
    return sum(a * b for a, b in zip(one, other, strict=True))
