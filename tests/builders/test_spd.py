# SPDX-License-Identifier: Apache-2.0
"""`trl-opsd build spd`: the subspace by hand, the folded copy against hooks, and a folder that SFT does not start from."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, PhiConfig, PhiForCausalLM

from trl_opsd.builders.readers import Reader
from trl_opsd.builders.spd import calibration, decisive_tokens, fold, gradient_grams, projected_layers
from trl_opsd.commands import cli
from trl_opsd.demo import build_rows, model_path
from trl_opsd.losses.subspace import sensitive_projection

IDS, DECISIVE = [5, 6, 7, 8, 9, 10], [False, False, False, True, False, True]


@pytest.fixture
def model(tokenizer):
    """A Phi, whose norms stay in float64, unlike Qwen's."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    return PhiForCausalLM(PhiConfig(vocab_size=len(tokenizer), initializer_range=0.3, **sizes)).double().eval()


def test_middle_and_last_block_are_projected_and_others_by_number(model):
    assert {name.split(".")[2] for name in projected_layers(model, None)} == {"1", "2"}
    assert {name.rpartition(".")[2] for name in projected_layers(model, [0])} == {"k_proj", "v_proj"}
    with pytest.raises(ValueError, match="the model has the blocks 0 to 2"):
        projected_layers(model, [3])
    with pytest.raises(ValueError, match="Linear has no linear layers k_proj and v_proj"):
        projected_layers(torch.nn.Linear(2, 2), None)


def test_decisive_tokens_are_those_of_the_last_boxs_content(tokenizer):
    text = "3+4=7\n\\boxed{7} no, \\boxed{12}"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    marks = decisive_tokens(tokenizer, ids, text)
    assert tokenizer.decode([token for token, mark in zip(ids, marks, strict=True) if mark]) == "12"
    assert not any(decisive_tokens(tokenizer, ids, "no box"))


def test_gradients_are_those_of_finite_differences_of_the_answers_loss(model):
    """Of one row, whose gram has one row of G a position: perturbed at the layer's output."""
    layers = projected_layers(model, [1])
    name = next(iter(layers))
    gram = gradient_grams(model, layers, [(IDS, DECISIVE)])[name]
    shift = torch.zeros(1, len(IDS), layers[name].out_features, dtype=torch.float64)
    hook = layers[name].register_forward_hook(lambda module, given, output: output + shift)

    def loss():
        with torch.no_grad():
            log_probs = model(torch.tensor([IDS])).logits[0].log_softmax(-1)
        return -(log_probs[2, IDS[3]] + log_probs[4, IDS[5]]).item() / 2

    by_hand = torch.zeros_like(shift[0])
    for place in range(by_hand.numel()):
        values = []
        for step in (1e-5, -1e-5):
            shift.view(-1)[place] = step
            values.append(loss())
        shift.view(-1)[place] = 0
        by_hand.view(-1)[place] = (values[0] - values[1]) / 2e-5
    hook.remove()
    torch.testing.assert_close(gram, by_hand.T @ by_hand, rtol=1e-5, atol=1e-9)
    assert gram.abs().max() > 1e-4


def test_the_folded_model_gives_the_logits_of_the_model_with_hooks(model):
    layers, ids = projected_layers(model, None), torch.tensor([[3, 4, 5, 6, 7, 8, 9]])
    grams = gradient_grams(model, layers, [(IDS, DECISIVE)])
    plain, hooks = model(ids).logits, []
    for name, layer in layers.items():
        projection = sensitive_projection(grams[name], len(grams[name]) // 2)
        hooks.append(layer.register_forward_hook(lambda module, given, output, p=projection: output @ p))
    hooked = model(ids).logits
    for hook in hooks:
        hook.remove()
    fold(model, layers, [(IDS, DECISIVE)], 0.5)
    torch.testing.assert_close(model(ids).logits, hooked, rtol=0, atol=1e-12)
    assert (hooked - plain).abs().max() > 1e-3


def test_at_full_rank_the_model_is_the_plain_one(model):
    before = Reader(model, [IDS], 0).logits
    fold(model, projected_layers(model, None), [(IDS, DECISIVE)], 1.0)
    assert torch.equal(Reader(model, [IDS], 0).logits, before)


def test_rows_without_a_box_do_not_calibrate(tokenizer):
    rows = [{"prompt": "1+1=?", "solution": text} for text in ("two", "\\boxed{2}", None, "\\boxed{}")]
    ((ids, marks),) = calibration(tokenizer, rows, lambda row: row["prompt"], {})
    assert len(ids) == len(marks) and sum(marks) == 1
    with pytest.raises(ValueError, match="none of the first 1 rows"):
        calibration(tokenizer, rows[:1], lambda row: row["prompt"], {})


def test_the_command_samples_from_a_folded_copy_and_leaves_the_model(tmp_path):
    data, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in build_rows("test", 3)))
    line = ["build", "spd", "--model_name_or_path", model_path(), "--dataset_name", str(data), "--output", str(out)]
    assert cli.main([*line, "--max_new_tokens", "16"]) == 0
    rows = [json.loads(text) for text in out.read_text().splitlines()]
    assert [row["row"] for row in rows] == [0, 1, 2] and {row["tries"] for row in rows} == {1}
    folded, plain = (
        AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (f"{out}.folded", model_path())
    )
    changed = {name for name in plain if not torch.equal(folded[name], plain[name])}
    assert changed and all("k_proj" in name or "v_proj" in name for name in changed)
