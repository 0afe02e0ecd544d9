# SPDX-License-Identifier: Apache-2.0
"""benchmarks/limits.py: its counts against torch's own, loops over tokens, and the tables of the docs."""

from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3Config, Qwen3ForCausalLM

from trl_opsd.experimental.planning.workload import Workload

ROOT = Path(__file__).parents[2]
LORA = LoraConfig(r=4, target_modules="all-linear")
HEAD_SIZE, HIDDEN, VOCABULARY = 8, 32, 96


@pytest.fixture
def limits(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return import_module("limits")


def config(tied=True):
    return Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=HEAD_SIZE,
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )


def counted(run):
    with FlopCounterMode(display=False) as counter:
        result = run()
    return counter.get_total_flops(), result


@pytest.mark.parametrize("lora", [False, True], ids=["all", "lora"])
def test_flop_of_a_forward_and_a_backward_are_what_torch_counts(limits, lora):
    length = 11
    sizes = limits.Sizes.of(config(), LORA if lora else None)
    model = Qwen3ForCausalLM(config())
    backbone = (get_peft_model(model, LORA).get_base_model() if lora else model).model
    embedded = torch.randn(1, length, HIDDEN, requires_grad=True)  # as a layer that has one below it
    forward, output = counted(lambda: backbone(inputs_embeds=embedded).last_hidden_state)
    backward, _ = counted(lambda: output.sum().backward())
    whole = length**2  # eager attention computes the pairs that the mask hides, too
    assert limits.forward_flop(sizes, length, whole) == forward
    assert limits.backward_flop(sizes, length, whole) == backward


@pytest.mark.parametrize("lora", [False, True], ids=["all", "lora"])
@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied"])
def test_sizes_are_those_of_a_real_model(limits, tied, lora):
    sizes = limits.Sizes.of(config(tied), LORA if lora else None)
    model = Qwen3ForCausalLM(config(tied))
    by_hand = 3 * HIDDEN * (4 * HEAD_SIZE * 2 + 2 * HEAD_SIZE * 2 + 3 * 48)
    assert sizes.layers == by_hand and sizes.head == VOCABULARY * HIDDEN
    cache = model(torch.zeros(1, 1, dtype=torch.long), use_cache=True).past_key_values
    assert sizes.cache == sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    model = get_peft_model(model, LORA) if lora else model
    assert sizes.total == sum(p.numel() for p in model.parameters())
    assert sizes.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sizes.adapters == (sizes.trained if lora else 0)


def test_pairs_of_a_causal_row_are_counted_one_token_at_a_time(limits):
    assert limits.causal_pairs(7) == sum(range(1, 8))
    assert limits.causal_pairs(7, 3) == 5 + 6 + 7


@pytest.mark.parametrize("lora", [False, True], ids=["all", "lora"])
def test_a_step_is_that_of_loops_over_rows_and_tokens(limits, lora):
    prompt, solution, new, rows = 5, 13, 7, 6
    args = SimpleNamespace(
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        max_completion_length=new,
        gradient_checkpointing=True,
        teacher_tokens_per_forward=60,
    )
    sizes = limits.Sizes.of(config(), LORA if lora else None)
    work = limits.step_work(sizes, args, Workload(prompt, solution), "zero2", 4)
    layers, head, width = 3 * HIDDEN * 240, VOCABULARY * HIDDEN, 3 * 4 * HEAD_SIZE
    adapters = sizes.trained if lora else 0

    def forward(first, last, entries=layers):
        return rows * sum(2 * entries + 4 * width * place for place in range(first, last + 1))

    assert work["prefill"].flop == forward(1, prompt)
    assert work["sampling"].flop == forward(prompt + 1, prompt + new, layers + head)
    cache = [2 * 3 * 2 * 2 * HEAD_SIZE * place for place in range(prompt + 1, prompt + new + 1)]
    assert work["sampling"].memory == new * 2 * (layers + head) + rows * sum(cache)
    assert work["teacher"].flop == forward(1, prompt + solution + new)
    assert work["head"].flop == rows * new * 2 * head * (3 if lora else 4)
    trains = adapters or layers
    tokens = prompt + new
    recomputed = 2 * forward(1, tokens, layers + adapters)
    attention = rows * sum(8 * width * place for place in range(1, tokens + 1))
    assert work["student"].flop == recomputed + rows * tokens * 2 * (layers + adapters + trains) + attention
    assert work["optimizer"].memory == 28 * sizes.trained / 4


def ring(size, count):
    """Bytes that one of `count` GPUs sends on in a ring, where each has a part of `size`."""
    return sum(size / count for _ in range(count - 1))


def test_collectives_send_what_rings_send(limits):
    sizes, count = limits.Sizes.of(config(), LORA), 4
    gradients = ring(4 * sizes.trained, count)
    assert limits.link_bytes(sizes, "ddp", count, 3, 2) == gradients + gradients  # scattered, then gathered
    assert limits.link_bytes(sizes, "single", 1, 3, 2) == 0
    half = ring(2 * sizes.trained, count)
    assert limits.link_bytes(sizes, "zero2", count, 3, 2) == 3 * half + half
    weights = ring(2 * sizes.total, count)
    gathers = 3 + 3 + 2 + 1  # forwards, backwards, the teacher's forwards, sampling
    assert limits.link_bytes(sizes, "zero3", count, 3, 2) == pytest.approx(3 * half + gathers * weights)
    with pytest.raises(ValueError, match="engine='fsdp2' is not counted; set it to"):
        limits.link_bytes(sizes, "fsdp2", count, 3, 2)


def test_a_step_takes_its_phases_in_turn_and_each_what_it_has_most_of(limits):
    device = limits.Device(flop=10.0, memory=4.0, link=2.0)
    assert limits.Work(flop=30, memory=20, link=2).seconds(device) == 5.0
    names = ("prefill", "sampling", "teacher", "student", "head", "optimizer")
    work = {name: limits.Work(flop=10.0 * 2**place) for place, name in enumerate(names)}
    assert limits.step_seconds({**work, "collectives": limits.Work(link=2 * 28)}, device) == 63.0  # 28 s are hidden
    assert limits.step_seconds({**work, "collectives": limits.Work(link=2 * 30)}, device) == 65.0


def test_reading_a_context_once_saves_what_loops_count(limits):
    sizes = limits.Sizes.of(config())
    layers, width = 3 * HIDDEN * 240, 3 * 4 * HEAD_SIZE

    def flop(places):
        return sum(2 * layers + 4 * width * place for place in places)

    context, span, count = range(1, 10), range(10, 14), 3
    tokens, ratio = limits.sharing(sizes, count, 9, 4)
    assert tokens == count * 13 / (9 + count * 4)
    assert ratio == pytest.approx(count * (flop(context) + flop(span)) / (flop(context) + count * flop(span)))
    assert limits.sharing(sizes, 1, 9, 4) == (1, 1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
def test_the_tables_of_the_docs_are_what_the_command_prints(limits, capsys):
    limits.main([])
    first, *others = capsys.readouterr().out.strip().split("\n\n")
    assert first in (ROOT / "docs" / "scale.md").read_text()
    page = (ROOT / "benchmarks" / "README.md").read_text()
    assert len(others) == 2 and all(table in page for table in others)
