# SPDX-License-Identifier: Apache-2.0
"""The shipped demo model, and the script that makes it."""

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_opsd.demo import build, model_path
from trl_opsd.demo.build import IGNORED, answer_logits, main, tokenize, train
from trl_opsd.demo.corpus import Example, draw_example
from trl_opsd.demo.measure import build_views, longest_attempt
from trl_opsd.demo.tokenizer import build_tokenizer
from trl_opsd.evaluation.measures import evaluate

OFF = {"enable_thinking": False}


@pytest.fixture(autouse=True)
def one_thread_and_small_batches(monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for each other are slow beside other test workers
    monkeypatch.setattr(build, "BATCH_SIZE", 8)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def shipped():
    model = AutoModelForCausalLM.from_pretrained(model_path())
    return model, AutoTokenizer.from_pretrained(model_path())


@pytest.fixture(scope="module")
def views():
    return build_views("validation", 64, seed=1)


def test_the_shipped_folder_is_small_and_complete(shipped):
    model, tokenizer = shipped
    folder = Path(model_path())
    assert sum(path.stat().st_size for path in folder.iterdir()) < 4_000_000
    assert (folder / "README.md").is_file() and (folder / "generation_config.json").is_file()
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert model.dtype == torch.float32
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.config.vocab_size == len(tokenizer)
    assert build_tokenizer().get_vocab() == tokenizer.get_vocab()


def test_the_model_knows_its_arithmetic(shipped, views):
    greedy = evaluate(
        *shipped,
        views["plain"],
        num_samples=1,
        temperature=0.0,
        max_new_tokens=longest_attempt(),
        chat_template_kwargs=OFF,
    )
    assert greedy.avg_at_k > 0.75


def test_a_reference_helps_and_a_wrong_attempt_does_not(shipped, views):
    scores = {
        name: evaluate(*shipped, views[name], num_samples=1, max_new_tokens=longest_attempt(), chat_template_kwargs=OFF)
        for name in ("plain", "solution", "wrong attempt", "stranger")
    }
    assert scores["plain"].avg_at_k < 0.6
    assert scores["solution"].avg_at_k > 0.9
    assert scores["wrong attempt"].avg_at_k < scores["solution"].avg_at_k - 0.15
    assert scores["stranger"].avg_at_k < scores["solution"].avg_at_k - 0.1
    assert all(result.cut_share < 0.05 for result in scores.values())


def test_thinking_puts_the_chain_into_the_think_block(shipped, views):
    result = evaluate(*shipped, views["plain"][:16], num_samples=1, temperature=0.0, max_new_tokens=longest_attempt())
    texts = [group[0].text for group in result.completions]
    assert all(text.startswith("<think>") and "</think>\n\\boxed{" in text for text in texts)


def test_what_is_only_read_has_no_label():
    tokenizer = build_tokenizer()
    pieces = (("1+1=", True), ("3\n", False), ("wait 1+1=2\n\\boxed{2}", True))
    ids, labels = tokenize("1+1=?", Example("1+1=?", False, pieces, "1+1=?"), tokenizer)
    assert len(ids) == len(labels)
    trained = [token for token, label in zip(ids, labels, strict=True) if label != IGNORED]
    assert tokenizer.decode(trained) == "1+1=wait 1+1=2\n\\boxed{2}<|im_end|>"
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))


def test_only_a_strangers_solution_is_as_good_as_none():
    generator = random.Random(0)
    for share, is_stranger in (("stranger", True), ("solution", False), ("wrong", False), ("plain", False)):
        for _ in range(20):
            example = draw_example(generator, {share: 1.0})
            assert (example.alike != example.user) is is_stranger
            assert example.alike in example.user


def test_a_target_behind_another_turn_is_of_the_same_tokens(shipped):
    model, tokenizer = shipped
    generator = random.Random(0)
    batch = [draw_example(generator, {"stranger": 1.0}) for _ in range(3)]
    with torch.no_grad():
        logits, ids = answer_logits(model, [example.user for example in batch], batch, tokenizer)
        alike, same_ids = answer_logits(model, [example.alike for example in batch], batch, tokenizer)
    assert ids.tolist() == same_ids.tolist() and len(logits) == len(ids)
    # What the last phase is for: hardly anything is left between the two.
    kl = (alike.softmax(-1) * (alike.log_softmax(-1) - logits.log_softmax(-1))).sum(-1)
    assert 0 < kl.mean() < 0.01


def test_two_builds_are_equal_to_the_bit():
    tokenizer = build_tokenizer()
    first, second = (train(tokenizer, seed=7, num_steps=5, progress=False).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = train(tokenizer, seed=8, num_steps=5, progress=False).state_dict()
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_the_command_writes_a_loadable_folder(tmp_path, capsys):
    main(["--output", str(tmp_path), "--steps", "2", "--problems", "4", "--threads", "1"])
    assert "| plain, greedy |" in capsys.readouterr().out
    assert "--steps 2" in (tmp_path / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.generation_config.eos_token_id == AutoTokenizer.from_pretrained(tmp_path).eos_token_id


def test_the_hard_base_goes_on_from_the_shipped_one_with_longer_chains(tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(build, "draw_example", lambda *given: seen.append(given[2]) or draw_example(*given))
    main(["--hard", "--output", str(tmp_path), "--steps", "1", "--problems", "2"])
    assert set(seen) == {(8, 9, 10)}
    card = (tmp_path / "README.md").read_text()
    assert (
        "chains of eight to ten operations" in card
        and "Made from the shipped one" in card
        and "--steps 1 --hard" in card
    )
    hard, shipped = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (tmp_path, model_path()))
    distance = sum((hard[name] - shipped[name]).norm() ** 2 for name in hard) ** 0.5
    assert 0 < distance < 0.3 * sum(weight.norm() ** 2 for weight in shipped.values()) ** 0.5
    with pytest.raises(SystemExit):
        main(["--hard"])
    assert "--hard needs --output" in capsys.readouterr().err
