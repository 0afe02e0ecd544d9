# SPDX-License-Identifier: Apache-2.0
"""The bank of skills: what a line may hold, which skills suit a problem, and a file that changes while a run reads it."""

import json
import math
import sys
from types import SimpleNamespace

import pytest

from trl_opsd.rows.skill_bank import Entry, SkillBank, SkillBankFile, _encoder
from trl_opsd.settings.sgsd import SGSDSettings

LINES = [
    {"skill": "Count the apples in pairs."},
    {"skill": "Draw a circle first.", "mistake": "Forgetting half of the circle."},
    {"mistake": "Counting an apple twice."},
    {"skill": "Use a sum formula."},
]


@pytest.fixture
def write(tmp_path):
    def write(*lines):
        path = tmp_path / "bank.jsonl"
        path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
        return str(path)

    return write


def cosine_by_hand(problem, text, texts):
    """Words weighed by how rare they are among `texts`, compared by the angle between them."""

    def words(text):
        return [word.strip(".?").lower() for word in text.split()]

    def vector(text):
        known = {word for each in texts for word in words(each)}
        rarity = {w: math.log((1 + len(texts)) / (1 + sum(w in words(each) for each in texts))) + 1 for w in known}
        return [words(text).count(w) * rarity[w] for w in sorted(known)]

    one, other = vector(problem), vector(text)
    norms = math.hypot(*one) * math.hypot(*other)
    return sum(a * b for a, b in zip(one, other, strict=True)) / norms if norms else 0.0


def test_the_nearest_skills_come_first_each_with_the_mistake_of_its_rank(write):
    bank, problem = SkillBank.read(write(*LINES)), "How many apples are in the circle of apples?"
    texts = [line[kind] for kind in ("skill", "mistake") for line in LINES if kind in line]
    near = {text: cosine_by_hand(problem, text, texts) for text in texts}
    skills = sorted((line["skill"] for line in LINES if "skill" in line), key=near.get, reverse=True)
    mistakes = sorted((line["mistake"] for line in LINES if "mistake" in line), key=near.get, reverse=True)
    got = bank.retrieve(problem, 8)
    assert len(got) == 3 and got == sorted(got, key=lambda pair: -pair[1])
    for rank, skill in enumerate(skills):
        wanted, score = skill, near[skill]
        if rank < 2:
            wanted += "\nA mistake that is often made: " + mistakes[rank]
            score = (score + near[mistakes[rank]]) / 2
        assert dict(got)[wanted] == pytest.approx(score, abs=1e-12)
    assert near[skills[0]] > near[skills[1]] > near[skills[2]] == 0
    assert bank.retrieve(problem, 1) == [(f"{skills[0]}\nA mistake that is often made: {mistakes[0]}", got[0][1])]


def test_skills_that_are_equally_near_stay_in_the_order_of_the_file(write):
    bank = SkillBank.read(write({"skill": "b"}, {"skill": "a"}))
    assert bank.retrieve("nothing of it", 8) == [("b", 0.0), ("a", 0.0)]


class Encoder:
    """Stands in for a model: one number a letter of "ab"."""

    def __init__(self, model):
        self.model = model

    def encode(self, text):
        return [text.count("a") + 0.0, text.count("b") + 0.0]


@pytest.fixture
def embeds(monkeypatch):
    module = SimpleNamespace(SentenceTransformer=Encoder, __spec__=SimpleNamespace(name="sentence_transformers"))
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    _encoder.cache_clear()
    yield
    _encoder.cache_clear()


def test_with_a_model_texts_are_compared_by_embeddings_and_the_files_own_are_used(write, embeds):
    path = write({"skill": "aab"}, {"skill": "b"}, {"skill": "other", "embedding": [3, 4]})
    scores = dict(SkillBank.read(path, "tiny").retrieve("ab", 8))
    assert scores == pytest.approx({"aab": 3 / math.sqrt(10), "b": 1 / math.sqrt(2), "other": 1.4 / math.sqrt(2)})


def test_embeddings_of_another_model_are_refused(write, embeds):
    bank = SkillBank.read(write({"skill": "a", "embedding": [1, 2, 3]}), "tiny")
    with pytest.raises(ValueError, match="an `embedding` has 3 numbers and skill_embedding_model gives 2"):
        bank.retrieve("a", 1)


def test_without_the_library_a_model_is_refused_by_name(write, monkeypatch):
    monkeypatch.setattr("trl_opsd.rows.skill_bank.find_spec", lambda name: None)
    settings = SGSDSettings(skill_bank=write(*LINES), skill_embedding_model="tiny")
    with pytest.raises(
        ValueError, match=r"skill_embedding_model='tiny' needs sentence-transformers.*trl-opsd\[skills\]"
    ):
        settings.check()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{"], "line 1 is no JSON"),
        ([{"skill": "a"}, [1]], "line 2 holds neither a text `skill` nor"),
        ([{"skill": " "}], "line 1 holds neither"),
        ([{"skill": 3}], "line 1 holds neither"),
        ([{"mistake": "a"}], "holds no `skill`"),
        ([], "holds no `skill`"),
        ([{"skill": "a", "embedding": "b"}], "line 1: `embedding` is no list of numbers"),
    ],
)
def test_a_file_that_is_no_bank_is_refused_by_its_line(write, lines, message):
    with pytest.raises(ValueError, match="skill_bank: .*bank.jsonl.*" + message):
        SGSDSettings(skill_bank=write(*lines)).check()


def test_a_missing_file_is_refused():
    with pytest.raises(ValueError, match=r"skill_bank: nowhere\.jsonl cannot be read"):
        SGSDSettings(skill_bank="nowhere.jsonl").check()


def test_a_file_is_read_again_when_it_is_due_and_not_before(write):
    file = SkillBankFile(write({"skill": "old"}))
    first = file.current(None, due=True)
    write({"skill": "new"})
    assert file.current(first.digest, due=False) is first
    second = file.current(first.digest, due=True)
    assert second.skills == (Entry("new"),) and file.current(second.digest, due=True) is second


def test_a_resumed_run_that_finds_another_file_says_so(write):
    before = SkillBankFile(write({"skill": "old"})).current(None, due=True)
    assert SkillBankFile(write({"skill": "old"})).current(before.digest, due=False) == before
    file = SkillBankFile(write({"skill": "new"}))
    with pytest.warns(UserWarning, match="is another file than the run used before"):
        after = file.current(before.digest, due=False)
    assert file.current(after.digest, due=False) is after


def test_a_file_that_is_broken_when_it_is_due_leaves_the_bank_as_it_was(write):
    file = SkillBankFile(write({"skill": "old"}))
    first = file.current(None, due=True)
    write("{half a li")
    with pytest.warns(UserWarning, match="skill_bank is left as it was, for .* line 1 is no JSON"):
        assert file.current(first.digest, due=True) is first
