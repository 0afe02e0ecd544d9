# SPDX-License-Identifier: Apache-2.0
"""Rows are checked in batches, on one process and once; rendered are the few that may come near a limit."""

import copy
import os
import random
import subprocess
from pathlib import Path

import pytest
from datasets import Dataset, load_dataset
from launching import TORCHRUN
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from trl_opsd.rows import passes
from trl_opsd.rows.checks import check_dataset
from trl_opsd.rows.passes import check_all_rows
from trl_opsd.rows.token_counts import TokenCounts
from trl_opsd.teacher.prompts import TeacherCollator
from trl_opsd.trainers.prompt_checks import _MARGIN, check_prompts

TEMPLATES = {"teacher": "{prompt}\n{solution}", "reference": "{solution}"}


def conversation(text):
    return [{"role": "user", "content": text}]


def make_rows(number, length=40):
    return [{"prompt": conversation(f"{n}+{n}=?"), "solution": "so " * length + f"{2 * n}"} for n in range(number)]


@pytest.fixture
def from_file(tmp_path):
    """A function that loads rows as `load_dataset` does: mapped from a file, with a cache beside it."""

    def load(rows):
        Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
        files = {"data_files": str(tmp_path / "rows.parquet"), "cache_dir": str(tmp_path / "cache")}
        return load_dataset("parquet", split="train", **files)

    return load


@pytest.fixture
def renders(tokenizer, monkeypatch):
    """A list that grows by one with each rendering."""
    made, render = [], TeacherCollator._render
    monkeypatch.setattr(TeacherCollator, "_render", lambda *args: made.append(1) or render(*args))
    return made


@pytest.mark.parametrize("limits", [{"max_positions": 250}, {"max_length": 200, "max_positions": 250}, {}])
def test_how_many_prompts_are_rendered_does_not_grow_with_the_rows(tokenizer, renders, limits):
    counts = {}
    for number in (10, 300):
        renders.clear()
        collator = TeacherCollator(tokenizer, TEMPLATES, **limits)
        rows = make_rows(number)
        assert len(rows[0]["solution"].encode()) + 70 < 250  # within the positions, but not for bytes of a repr
        check_prompts(collator, Dataset.from_list(rows), None)
        counts[number] = len(renders)
    assert counts[10] == counts[300] < 16


@pytest.mark.parametrize("place", [0, 7, 12])
@pytest.mark.parametrize(
    ("row", "limits", "told"),
    [
        ({"solution": "so " * 100}, {"max_positions": 250}, "model has positions for 250"),
        ({"prompt": conversation("1+" * 150)}, {"max_positions": 250}, "model has positions for 250"),
        ({"prompt": conversation("1+" * 100)}, {"max_length": 200}, "max_teacher_prompt_length=200 leaves nothing"),
        ({"solution": "a<|im_end|>b"}, {}, "`solution` spells out '<|im_end|>'"),
        ({"solution": "\u00df" * 260}, {"max_positions": 250}, "model has positions for 250"),
    ],
)
def test_a_row_that_is_wrong_is_named_whatever_batch_it_is_in(tokenizer, monkeypatch, place, row, limits, told):
    monkeypatch.setattr(passes, "BATCH_ROWS", 5)
    rows = make_rows(15)
    rows[place] |= row
    with pytest.raises(ValueError, match=rf"^train_dataset row {place}: ") as raised:
        check_prompts(TeacherCollator(tokenizer, TEMPLATES, **limits), Dataset.from_list(rows), None)
    assert told in str(raised.value)


def test_what_is_trained_on_first_is_checked_first(tokenizer):
    rows = make_rows(15)
    for place in (3, 11):
        rows[place]["solution"] = "so " * 100
    collator = TeacherCollator(tokenizer, TEMPLATES, max_positions=250)
    with pytest.raises(ValueError, match=r"^train_dataset row 11: "):
        check_prompts(collator, Dataset.from_list(rows), None, first_rows=[11])


def test_a_later_row_whose_turns_the_template_refuses_is_named_before_training(tokenizer):
    refusing = copy.deepcopy(tokenizer)
    refusing.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + (
        tokenizer.chat_template
    )
    rows = make_rows(15)
    rows[9]["prompt"] = [{"role": "system", "content": "Add."}, *rows[9]["prompt"]]
    with pytest.raises(ValueError, match=r"^train_dataset row 9: .*no system.*takes no system message"):
        check_prompts(TeacherCollator(refusing, TEMPLATES), Dataset.from_list(rows), None)


@pytest.mark.parametrize("place", [0, 9])
def test_a_row_that_the_students_own_template_makes_too_long_is_named_before_training(tokenizer, place):
    rows = make_rows(15)
    rows[place]["prompt"] = conversation("1+" * 80)
    limits, template = {"max_positions": 250, "max_length": 240}, "so " * 35 + "{prompt}"
    check_prompts(TeacherCollator(tokenizer, TEMPLATES, **limits), Dataset.from_list(rows), None)
    collator = TeacherCollator(tokenizer, TEMPLATES, prompt_template=template, **limits)
    with pytest.raises(ValueError, match=rf"^train_dataset row {place}: A prompt has .* positions for 250"):
        check_prompts(collator, Dataset.from_list(rows), None)


def byte_level_tokenizer(texts):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


TEXTS = [
    Path(passes.__file__).read_text()[:2000],
    "Let $x^2 + 3x - 5 = 0$; then\n\n  \\frac{-3 \\pm \\sqrt{29}}{2} is (nearly) 1.19, isn't it?",
    "\u4e8c\u52a0\u4e09\u7b49\u4e8e\u4e94, caf\u00e9   na\u00efve \U0001f600",
    " leading, double  spaces and\ttabs ",
]


@pytest.mark.parametrize("kind", ["characters", "bytes"])
@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_the_bound_by_words_is_no_less_than_the_tokens_and_not_far_from_them(tokenizer, kind, text):
    tokenizer = tokenizer if kind == "characters" else byte_level_tokenizer(TEXTS)
    counts, tokens = TokenCounts(tokenizer), len(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert tokens <= counts.pieces.bounds([text])[0] < 1.16 * len(text.encode())
    assert counts.may_exceed([text, "a", text], tokens) == set()
    assert counts.may_exceed([text, "a", text], tokens - 1) == {0, 2}


def metaspace_tokenizer(texts):
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=2000, special_tokens=special))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("make_tokenizer", [byte_level_tokenizer, metaspace_tokenizer])
def test_no_slice_of_prose_and_code_has_more_tokens_than_its_bound_and_the_margin(make_tokenizer):
    root, draw = Path(passes.__file__).parents[2], random.Random(0)
    texts = [path.read_text() for path in (*root.glob("docs/*.md"), *root.glob("trl_opsd/**/*.py"))]
    tokenizer, slices = make_tokenizer(texts[::2]), []
    for _ in range(1000):
        text = draw.choice(texts)
        start = draw.randrange(len(text))
        slices.append(text[start : start + draw.randint(50, 2000)])
    tokens = [len(ids) for ids in tokenizer(slices, add_special_tokens=False)["input_ids"]]
    bounds = TokenCounts(tokenizer).pieces.bounds(slices)
    excess = max(count - bound for count, bound in zip(tokens, bounds, strict=True))
    print(f"most over a bound {excess}, bounds over tokens {sum(bounds) / sum(tokens):.2f}")
    assert excess <= _MARGIN


def test_pieces_are_encoded_once_and_are_not_kept_without_end(tokenizer, monkeypatch):
    counts = TokenCounts(tokenizer).pieces
    assert counts.bounds(["one two one", " two"]) == [12, 4] and set(counts) == {b"one", b" two", b" one"}
    monkeypatch.setattr("trl_opsd.rows.token_counts._PIECES_KEPT", 2)
    assert counts.bounds(["three"]) == [6] and set(counts) == {b"three"}


@pytest.mark.parametrize("texts_at_once", [1, 2, 100])
def test_the_bound_of_a_text_does_not_depend_on_the_texts_beside_it(tokenizer, monkeypatch, texts_at_once):
    counts = TokenCounts(tokenizer).pieces
    texts = ["", "word", "word ", " 1+2", "", "so\u00df ", "...", "a", ""]
    alone = [counts.bounds([text])[0] for text in texts]
    monkeypatch.setattr("trl_opsd.rows.token_counts._TEXTS_AT_ONCE", texts_at_once)
    assert counts.bounds(texts) == alone


def test_characters_outside_ascii_count_as_the_tokens_they_have_and_not_as_bytes():
    draw = random.Random(0)
    texts = ["".join(draw.choices("\u4e8c\u52a0\u4e09\u7b49\u4e8e\u4e94\uff0c", k=300)) for _ in range(20)]
    tokenizer = byte_level_tokenizer(texts)
    bound, tokens = TokenCounts(tokenizer).pieces.bounds(texts[:1])[0], len(tokenizer(texts[0])["input_ids"])
    assert tokens <= bound <= 300 < len(texts[0].encode()) / 2


@pytest.fixture
def small_caches(monkeypatch):
    monkeypatch.setattr(passes, "_ROWS_TO_CACHE", 10)


def seen_rows(dataset, key="a"):
    """Rows that a check is shown."""
    seen = []
    check_all_rows(dataset, lambda rows, start: seen.extend(range(start, start + len(rows))), lambda: key, "rows")
    return seen


def test_rows_of_a_file_that_passed_are_not_checked_again_unless_what_matters_changed(from_file, small_caches):
    dataset = from_file(make_rows(15))
    assert seen_rows(dataset) == [*range(15)]
    assert seen_rows(dataset) == []
    assert seen_rows(dataset, "another tokenizer") == [*range(15)]
    assert seen_rows(dataset.select(range(12))) == [*range(12)]
    assert seen_rows(Dataset.from_list(make_rows(15))) == [*range(15)]


def test_rows_that_did_not_pass_are_not_remembered(from_file, small_caches):
    rows = make_rows(15)
    rows[13]["solution"] = " "
    dataset = from_file(rows)
    for _ in range(2):
        with pytest.raises(ValueError, match="train_dataset row 13: `solution` is empty"):
            check_dataset(dataset, "train_dataset", needs_solution=True)


def test_where_no_cache_can_be_written_rows_are_checked_without(from_file, small_caches, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError("read-only")

    dataset = from_file(make_rows(15))
    monkeypatch.setattr(Dataset, "map", refuse)
    assert seen_rows(dataset) == [*range(15)] == seen_rows(dataset)


WORKER = """
import sys
from accelerate import PartialState
from datasets import Dataset
from trl_opsd.rows.passes import check_datasets
state = PartialState(cpu=True)
def check(dataset, name):
    print(f"rank {state.process_index} checks {name}", flush=True)
    raise (MemoryError if sys.argv[1] == "memory" else ValueError)(f"{name} row 3: broken")
try:
    check_datasets(check, Dataset.from_list([{"a": 1}]), None)
except Exception as error:
    print(f"rank {state.process_index} got {error}", flush=True)
state.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["value", "memory"])
def test_one_rank_checks_and_what_it_raises_reaches_the_other(tmp_path, kind):
    (tmp_path / "worker.py").write_text(WORKER)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [*TORCHRUN, str(tmp_path / "worker.py"), kind]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("checks train_dataset") == 1 and "rank 0 checks" in done.stdout
    for rank in (0, 1):
        assert f"rank {rank} got train_dataset row 3: broken" in done.stdout
