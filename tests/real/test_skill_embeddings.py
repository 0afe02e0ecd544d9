# SPDX-License-Identifier: Apache-2.0
"""SGSD's bank searched by the real sentence-transformers, over a tiny random BERT whose embeddings are derived a second time."""

import json
import math
from importlib.util import find_spec

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from trl_opsd.rows.skill_bank import SkillBank
from trl_opsd.settings.sgsd import SGSDSettings

pytestmark = pytest.mark.skipif(
    find_spec("sentence_transformers") is None,
    reason="sentence-transformers is not installed: `make .venv/real`, or `pip install sentence-transformers`",
)

WORDS = [
    "count",
    "the",
    "apples",
    "of",
    "a",
    "circle",
    "twice",
    "carry",
    "tens",
    "add",
    "units",
    "do",
    "not",
    "guess",
    "how",
    "many",
]
SKILLS = ["Count the apples twice.", "Carry the tens.", "Do not guess."]
MISTAKES = ["guess tens", "count a circle of units"]
PROBLEM = "How many apples of the circle?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A sentence-transformers model: BERT from a config, and the mean over its tokens."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    bert, saved = tmp_path_factory.mktemp("bert"), tmp_path_factory.mktemp("sentences")
    (bert / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "?", *WORDS]))
    BertTokenizerFast(vocab=str(bert / "vocab.txt")).save_pretrained(bert)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=7 + len(WORDS), initializer_range=0.5, **sizes)).save_pretrained(bert)
    reader = Transformer(str(bert))
    SentenceTransformer(modules=[reader, Pooling(16, pooling_mode="mean")]).save(str(saved))
    return str(bert), str(saved)


def embedding_by_hand(folder, text):
    """Mean of the last hidden states over all tokens, of length 1."""
    encoded = BertTokenizerFast.from_pretrained(folder)(text, return_tensors="pt")
    with torch.no_grad():
        states = BertModel.from_pretrained(folder).eval()(**encoded).last_hidden_state[0]
    return torch.nn.functional.normalize(states.double().mean(0), dim=0)


def test_the_nearest_skills_by_embeddings_come_first_with_the_mistakes_of_their_rank(folder, tmp_path):
    bert, model = folder
    given = [0.5 - index / 16 for index in range(16)]
    rows = [{"skill": text} for text in SKILLS] + [{"mistake": text} for text in MISTAKES]
    path = tmp_path / "bank.jsonl"
    path.write_text("\n".join(map(json.dumps, [*rows, {"skill": "anything", "embedding": given}])))
    settings = SGSDSettings(skill_bank=str(path), skill_embedding_model=model)
    settings.check()
    found = SkillBank.read(path, settings.skill_embedding_model).retrieve(PROBLEM, 4)

    wanted, own = embedding_by_hand(bert, PROBLEM), torch.tensor(given, dtype=torch.float64)
    near = {text: (embedding_by_hand(bert, text) @ wanted).item() for text in (*SKILLS, *MISTAKES)}
    near["anything"] = (own @ wanted).item() / math.hypot(*given)
    skills = sorted([*SKILLS, "anything"], key=near.get, reverse=True)
    mistakes = sorted(MISTAKES, key=near.get, reverse=True)
    pairs = {}
    for rank, skill in enumerate(skills):
        other = mistakes[rank] if rank < 2 else None
        text = skill if other is None else f"{skill}\nA mistake that is often made: {other}"
        pairs[text] = near[skill] if other is None else (near[skill] + near[other]) / 2
    assert dict(found) == pytest.approx(pairs, abs=1e-5)
    assert [text for text, _ in found] == sorted(pairs, key=pairs.get, reverse=True)
    by_words = SkillBank.read(path).retrieve(PROBLEM, 4)
    assert [text for text, _ in by_words] != [text for text, _ in found]
