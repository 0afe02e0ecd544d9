# SPDX-License-Identifier: Apache-2.0
"""The saliency reward: masks against a second forward from raw weights, what they find, what is refused, and runs."""

import copy
import math
import warnings
from importlib.resources import files

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel
from trl import GRPOConfig, GRPOTrainer

from trl_opsd import OPSDTrainer
from trl_opsd.demo.task import build_dataset
from trl_opsd.experimental.atmanrl.cutting import CutRollout, cut_rollout
from trl_opsd.experimental.atmanrl.masking import MaskedReader, find_masks
from trl_opsd.experimental.atmanrl.reward import make_saliency_reward
from trl_opsd.experimental.atmanrl.settings import SaliencySettings

pytestmark = pytest.mark.filterwarnings("ignore:The saliency reward is experimental")

ROLLOUTS = [
    CutRollout([5, 6, 7, 8], [11, 12, 13], [20, 21, 22, 23], [False, False, True, True]),
    CutRollout([9, 4], [14, 15, 16, 17, 18, 19, 21], [20, 24], [False, True]),
    CutRollout([5, 6, 7, 8, 9, 10], [12], [20, 25, 26], [False, True, True]),
]
SHORT = SaliencySettings(mask_steps=4, mask_start=-1.5, mask_rate=3.0, sparsity=0.3)
COMPLETIONS = ["1+2=3\n\\boxed{3}", "1+2=3, so it is 3, wait: \\boxed{3}", "1+2=4\n\\boxed{4}", "3"]
GOLD = ["so \\boxed{3}"] * 4
PROMPT = [{"role": "user", "content": "1+2=?"}]


def normed(hidden, norm):
    return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + norm.variance_epsilon) * norm.weight.double()


def turned(states, base):
    """Rotary positions, with complex numbers."""
    half = states.size(-1) // 2
    angles = torch.arange(states.size(-2)).double()[:, None] * base ** (-torch.arange(half).double() / half)
    pairs = torch.complex(states[..., :half], states[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([pairs.real, pairs.imag], dim=-1)


def log_probs_by_hand(model, rollout, values):
    """Of the tail behind its first token, one whole sequence at a time; exp(m) multiplies the weights before they are normalised."""
    ids = [*rollout.prompt, *rollout.reasoning, *rollout.tail]
    first, size = len(rollout.prompt), len(ids)
    tail = first + len(rollout.reasoning)
    left = torch.ones(size, size, dtype=torch.float64)
    left = torch.cat(
        [left[:tail], torch.cat([left[tail:, :first], values.exp().expand(size - tail, -1), left[tail:, tail:]], 1)]
    )
    left = left * torch.ones(size, size, dtype=torch.float64).tril()
    hidden = model.model.embed_tokens.weight.double()[ids]
    base = model.config.rope_parameters["rope_theta"]
    for layer in model.model.layers:
        part, inputs = layer.self_attn, normed(hidden, layer.input_layernorm)

        def heads(projection, norm=None, inputs=inputs):
            states = (inputs @ projection.weight.double().T).unflatten(-1, (-1, 16)).transpose(0, 1)
            return states if norm is None else turned(normed(states, norm), base)

        query, key = heads(part.q_proj, part.q_norm), heads(part.k_proj, part.k_norm)
        weights = (query @ key.transpose(1, 2) / 4).exp() * left
        read = (weights / weights.sum(-1, keepdim=True)) @ heads(part.v_proj)
        hidden = hidden + read.transpose(0, 1).flatten(1) @ part.o_proj.weight.double().T
        inputs, mlp = normed(hidden, layer.post_attention_layernorm), layer.mlp
        gate = inputs @ mlp.gate_proj.weight.double().T
        up = gate * torch.sigmoid(gate) * (inputs @ mlp.up_proj.weight.double().T)
        hidden = hidden + up @ mlp.down_proj.weight.double().T
    logits = normed(hidden, model.model.norm) @ model.lm_head.weight.double().T
    return torch.stack([logits[i - 1].log_softmax(-1)[ids[i]] for i in range(tail + 1, size)])


def search_by_hand(model, rollout, settings):
    values = torch.full((len(rollout.reasoning),), settings.mask_start, dtype=torch.float64)
    for _ in range(settings.mask_steps):
        values.requires_grad_()
        said = log_probs_by_hand(model, rollout, values)[torch.tensor(rollout.is_answer[1:])]
        loss = -said.sum() / len(said) + settings.sparsity * values.exp().sum() / len(values)
        (slope,) = torch.autograd.grad(loss, values)
        values = torch.minimum(values.detach() - settings.mask_rate * slope, torch.zeros(()).double())
    return values


def rows_of(reader, masks):
    """(B, S) of masks by row."""
    values = torch.zeros(reader.ids.shape, dtype=torch.float64)
    values[reader.is_reasoning] = torch.cat(masks)
    return values


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_a_mask_multiplies_attention_before_it_is_normalised(make_model, kv_heads):
    model = make_model(torch.float64, num_key_value_heads=kv_heads).eval()
    reader = MaskedReader(model, ROLLOUTS, 0)
    generator = torch.Generator().manual_seed(3)
    masks = [-4 * torch.rand(len(r.reasoning), generator=generator, dtype=torch.float64) for r in ROLLOUTS]
    got = reader.log_probs(rows_of(reader, masks))
    for row, rollout, mask in zip(got, ROLLOUTS, masks, strict=True):
        expected = log_probs_by_hand(model, rollout, mask)
        torch.testing.assert_close(row[: len(expected)], expected, rtol=0, atol=2e-5)


def test_the_search_equals_one_by_hand(make_model):
    model = make_model(torch.float64).eval()
    found = find_masks(MaskedReader(model, ROLLOUTS, 0), SHORT)
    for row, rollout in enumerate(ROLLOUTS):
        expected = search_by_hand(model, rollout, SHORT)
        assert (expected - SHORT.mask_start).abs().max() > 0.05
        torch.testing.assert_close(found.masks[row], expected, rtol=0, atol=1e-4)
        assert found.saliency[row].item() == pytest.approx(expected.exp().mean().item(), abs=1e-4)


def test_a_mask_of_zeros_is_the_plain_forward(make_model):
    reader = MaskedReader(make_model(torch.float64).eval(), ROLLOUTS, 0)
    plain, masked = reader.plain_log_probs(), reader.log_probs(torch.zeros(reader.ids.shape, dtype=torch.float64))
    torch.testing.assert_close(masked[reader.is_answer], plain[reader.is_answer], rtol=0, atol=1e-6)


def test_eager_attention_finds_what_sdpa_finds(make_model):
    found = []
    for kind in ("eager", "sdpa"):
        model = make_model().eval()
        model.set_attn_implementation(kind)
        found.append(torch.cat(find_masks(MaskedReader(model, ROLLOUTS, 0), SHORT).masks))
    torch.testing.assert_close(*found, rtol=0, atol=1e-4)


def test_rows_beside_a_row_and_their_order_change_nothing(make_model):
    model = make_model(torch.float64).eval()
    alone = [find_masks(MaskedReader(model, [rollout], 0), SHORT).masks[0] for rollout in ROLLOUTS]
    together = find_masks(MaskedReader(model, ROLLOUTS[::-1], 3), SHORT).masks[::-1]
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_the_price_of_reading_lowers_the_mask(make_model):
    model = make_model(torch.float64).eval()
    free, dear = (
        find_masks(MaskedReader(model, ROLLOUTS, 0), SaliencySettings(mask_steps=4, mask_start=-1.5, sparsity=price))
        for price in (0.0, 3.0)
    )
    assert (dear.saliency < free.saliency).all()


@pytest.fixture(scope="module")
def embedded():
    path = str(files("trl_opsd.demo") / "model")
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation="sdpa"), AutoTokenizer.from_pretrained(path)


def test_the_mask_rises_at_the_result_that_the_answer_copies(embedded):
    """The embedded model copies the last result into its box; every other token stays hidden."""
    model, tokenizer = embedded
    prompt = [{"role": "user", "content": "(9-4)+8=?"}]
    ids = tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, tokenize=True, return_dict=True, enable_thinking=False
    )["input_ids"]
    answer = tokenizer("9-4=5\n5+8=13\n\\boxed{13}", add_special_tokens=False)["input_ids"]
    cut = cut_rollout(tokenizer, ids, answer, "\\boxed{", 32)
    found = find_masks(MaskedReader(model.eval(), [cut], tokenizer.pad_token_id), SaliencySettings())
    shares = found.masks[0].exp()
    assert tokenizer.decode(cut.reasoning[-3:]) == "13\n"
    assert set(shares.topk(2).indices.tolist()) == {len(cut.reasoning) - 3, len(cut.reasoning) - 2}
    others = torch.cat([shares[:-3], shares[-1:]])
    assert shares.topk(2).values.min() > 0.2 and others.max() < 2 * math.exp(-5)
    assert found.first_loss > 4 and found.last_loss < 1e-3 and found.plain_loss < 1e-3


class Pieces:
    """A tokenizer whose ids are places in a list of texts; the last of them is a control token."""

    def __init__(self, *pieces):
        self.pieces, self.all_special_ids = pieces, [len(pieces) - 1]

    def decode(self, ids, skip_special_tokens=False, **kwargs):
        return "".join(self.pieces[i] for i in ids if not (skip_special_tokens and i in self.all_special_ids))


@pytest.mark.parametrize(
    ("ids", "reasoning", "tail", "answer"),
    [
        ([0, 1, 2, 3, 5], [0], [1, 2, 3], [2, 3]),  # the end token is no answer
        ([0, 1, 2, 3, 1, 2, 5], [0, 1, 2, 3], [1, 2], [2]),  # the last marker counts
        (
            [0, 4, 3, 5],
            [0],
            [4, 3],
            [3],
        ),  # a token of marker and answer opens the tail and is not predicted under a mask
        ([0, 1, 2, 5, 3], [0], [1, 2, 5, 3], [2, 3]),  # a control token is read and no answer
    ],
)
def test_a_rollout_is_cut_where_its_last_answer_begins(ids, reasoning, tail, answer):
    cut = cut_rollout(Pieces("so ", "A:", "1", "2", "A:1", "<end>"), [9], ids, "A:", 32)
    assert (cut.prompt, cut.reasoning, cut.tail) == ([9], reasoning, tail)
    assert [token for token, kept in zip(cut.tail, cut.is_answer, strict=True) if kept] == answer


def test_long_answers_are_cut():
    cut = cut_rollout(Pieces("so ", "A:", "1", "<end>"), [9], [0, 1, 2, 2, 2, 3], "A:", 2)
    assert cut.tail == [1, 2, 2] and cut.is_answer == [False, True, True]


@pytest.mark.parametrize("ids", [[0, 2], [1, 2], [0, 1], [0, 1, 3], []])
def test_a_rollout_without_marker_reasoning_or_answer_is_not_cut(ids):
    assert cut_rollout(Pieces("so ", "A:", "1", "<end>"), [9], ids, "A:", 32) is None


def ask(reward, tokenizer, completions=COMPLETIONS, **columns):
    ids = [[*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for text in completions]
    turns = [[{"role": "assistant", "content": text}] for text in completions]
    columns = {"solution": GOLD[: len(ids)], **columns}
    return reward(prompts=[PROMPT] * len(ids), completions=turns, completion_ids=ids, **columns)


QUICK = {"mask_steps": 3, "mask_start": -1.5}


def test_right_rollouts_have_their_saliency_and_wrong_or_unread_ones_zero(make_model, tokenizer):
    model, logged = make_model(torch.float64), {}
    reward = make_saliency_reward(model, tokenizer, **QUICK)
    got = ask(reward, tokenizer, solution=[*GOLD[:3], "3"], log_metric=lambda name, value: logged.update({name: value}))
    assert 0 < got[0] < 1 and 0 < got[1] < 1 and got[0] != got[1] and got[2:] == [0.0, 0.0]
    assert logged["saliency/mean"] == pytest.approx((got[0] + got[1]) / 2)
    assert logged["saliency/unread"] == pytest.approx(1 / 3)  # "3" is right and has no marker
    assert ask(reward, tokenizer, COMPLETIONS[:2], solution=[None, GOLD[1]])[0] is None
    prompt_ids = tokenizer.apply_chat_template(PROMPT, add_generation_prompt=True, return_dict=True)["input_ids"]
    ids = [*tokenizer(COMPLETIONS[0], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    cut = cut_rollout(tokenizer, prompt_ids, ids, "\\boxed{", 32)
    expected = search_by_hand(model, cut, SaliencySettings(**QUICK)).exp().mean().item()
    assert got[0] == pytest.approx(expected, abs=1e-5)


def test_rewards_do_not_depend_on_order_and_rows_at_once(make_model, tokenizer):
    model = make_model(torch.float64)
    one, all_ = (make_saliency_reward(model, tokenizer, **QUICK, rows_at_once=n) for n in (1, 8))
    assert ask(one, tokenizer)[:3] == pytest.approx(ask(all_, tokenizer, COMPLETIONS[::-1])[:0:-1], abs=1e-7)


def test_a_call_leaves_no_gradient_and_no_mode_behind(make_model, tokenizer):
    model = make_model(attention_dropout=0.5).train()
    model.model.layers[0].eval()
    reward = make_saliency_reward(model, tokenizer, **QUICK)
    before = [module.training for module in model.modules()]
    with torch.no_grad():
        assert ask(reward, tokenizer) == ask(reward, tokenizer)
    assert [module.training for module in model.modules()] == before
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_prompt_is_rendered_with_the_given_arguments(make_model, tokenizer):
    model = make_model(torch.float64)
    with_think, without = (
        ask(make_saliency_reward(model, tokenizer, chat_template_kwargs={"enable_thinking": on}, **QUICK), tokenizer)
        for on in (True, False)
    )
    assert with_think[0] != without[0] and with_think[2:] == without[2:] == [0.0, 0.0]


def test_adapters_are_read_through_the_model_that_was_there_before_them(make_model, tokenizer):
    base = make_model(torch.float64)
    reward = make_saliency_reward(base, tokenizer, **QUICK)
    without = ask(reward, tokenizer)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    of_adapted = make_saliency_reward(adapted.train(), tokenizer, **QUICK)
    assert ask(reward, tokenizer) == ask(of_adapted, tokenizer) != without
    assert all(module.training for module in adapted.modules())


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"mask_steps": 0}, "mask_steps=0"),
        ({"mask_steps": 2.5}, "mask_steps=2.5"),
        ({"max_answer_tokens": 0}, "max_answer_tokens=0"),
        ({"rows_at_once": True}, "rows_at_once=True"),
        ({"mask_start": 0.0}, "mask_start=0.0"),
        ({"mask_start": -math.inf}, "mask_start=-inf"),
        ({"mask_rate": 0.0}, "mask_rate=0.0"),
        ({"sparsity": -0.1}, "sparsity=-0.1"),
        ({"sparsity": math.nan}, "sparsity=nan"),
        ({"answer_marker": " "}, "answer_marker=' '"),
        ({"verifier": "judge"}, "judge"),
    ],
)
def test_settings_outside_their_range_are_named(make_model, tokenizer, settings, named):
    with pytest.raises(ValueError, match=named.replace(".", r"\.")):
        make_saliency_reward(make_model(), tokenizer, **settings)


def test_models_that_cannot_be_read_are_refused_by_name(make_model, tokenizer):
    flex = make_model()
    flex.config._attn_implementation = "flex_attention"
    windows = make_model(use_sliding_window=True, sliding_window=4, max_window_layers=1)
    prompted = get_peft_model(make_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    for model, named in (
        ("Qwen/Qwen3", "model="),
        (flex, "attn_implementation='flex"),
        (windows, "sliding"),
        (prompted, "prompt"),
    ):
        with pytest.raises(ValueError, match=named):
            make_saliency_reward(model, tokenizer)


def test_a_model_whose_parameters_an_engine_shards_is_refused_at_the_first_batch(make_model, tokenizer):
    model = make_model()
    reward = make_saliency_reward(model, tokenizer, **QUICK)
    model.lm_head.weight.ds_tensor = torch.zeros(1)
    with pytest.raises(ValueError, match="sharded"):
        ask(reward, tokenizer)


def test_rows_that_cannot_be_rewarded_are_refused_by_name(make_model, tokenizer):
    reward = make_saliency_reward(make_model(), tokenizer, **QUICK)
    with pytest.raises(ValueError, match="`solution`"):
        reward(prompts=[PROMPT], completions=["a"], completion_ids=[[1]])
    with pytest.raises(ValueError, match="tools"):
        ask(reward, tokenizer, environments=[object()])
    with pytest.raises(ValueError, match="tools"):
        reward([PROMPT], [[{"role": "tool", "content": "3"}]], [[1]], [GOLD[0]])


def test_a_model_that_does_not_read_the_mask_is_refused(make_model, tokenizer, monkeypatch):
    model = make_model()
    original = type(model.model).forward
    monkeypatch.setattr(
        model.model, "forward", lambda **kw: original(model.model, **{**kw, "attention_mask": None}), raising=True
    )
    with pytest.raises(ValueError, match="changes nothing"):
        ask(make_saliency_reward(model, tokenizer, **QUICK), tokenizer, COMPLETIONS[:1])


def test_learned_positions_are_read_and_a_model_without_position_ids_is_refused(tokenizer):
    size = {"vocab_size": len(tokenizer), "n_layer": 1, "n_head": 2}
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=16, n_positions=64, **size, bos_token_id=0, eos_token_id=0))
    assert ask(make_saliency_reward(gpt2, tokenizer, **QUICK), tokenizer)[0] > 0
    bloom = BloomForCausalLM(BloomConfig(hidden_size=16, **size))
    with pytest.raises(ValueError, match="bloom"):
        make_saliency_reward(bloom, tokenizer, **QUICK)


def test_the_parts_that_are_inferred_are_told(make_model, tokenizer):
    with pytest.warns(UserWarning, match="are inferred"):
        make_saliency_reward(make_model(), tokenizer)


def run(embedded, make_args, trainer_class, config_class, **settings):
    model, tokenizer = copy.deepcopy(embedded[0]), embedded[1]
    kwargs = {"enable_thinking": False}
    reward = make_saliency_reward(model, tokenizer, chat_template_kwargs=kwargs, mask_steps=5)
    args = make_args(
        config_class, max_steps=2, max_completion_length=64, chat_template_kwargs=kwargs, seed=1, **settings
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = trainer_class(
            model=model,
            reward_funcs=[reward],
            args=args,
            train_dataset=build_dataset("train", 8),
            processing_class=tokenizer,
        )
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.train()
    assert trainer.state.global_step == 2
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("bf16", [False, True])
def test_grpo_of_trl_runs_on_the_embedded_model(embedded, make_args, bf16):
    logs = run(embedded, make_args, GRPOTrainer, GRPOConfig, num_generations=4, learning_rate=1e-3, bf16=bf16)
    assert all(log["rewards/saliency_reward/mean"] > 0 and log["saliency/mean"] > 0 for log in logs)
    assert any(log["grad_norm"] > 0 for log in logs)


def test_a_trainer_of_ours_takes_it(embedded, make_args):
    logs = run(embedded, make_args, OPSDTrainer, None, num_generations=4, reward_weight=1.0)
    assert all(log["rewards/saliency_reward/mean"] > 0 for log in logs)
