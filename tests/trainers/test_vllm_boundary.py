# SPDX-License-Identifier: Apache-2.0
"""Our trainers over vLLM, at the boundary TRL draws: a stand-in takes the place of its `VLLMGeneration`.

The stand-in returns given ids and log-probabilities the way TRL's two modes do and keeps what it was asked and which
weights it was given. A real engine runs in tests/vllm_engine.
"""

import copy
import re
import sys
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from trl.trainer import grpo_trainer

from trl_opsd import BRTSTrainer, OGLSSDTrainer, OPSDTrainer, PurifiedOPSDTrainer
from trl_opsd.trainers.engine_check import EngineCheck

LONGEST = 9
GROUP_SIZES = {OPSDTrainer: 2, OGLSSDTrainer: 4, PurifiedOPSDTrainer: 1}
DRAFTS = {
    "num_generations": 2,
    "teacher_model_kind": "live",
    "guided_prompt_template": "{solution} {prompt}",
    "max_steps": 1,
}
MODES = ("colocate", "server")


def answers_of(tokenizer):
    """Rollouts of uneven length: whole, cut at the limit, spelled as no tokenizer would, with a special token inside."""
    end = [tokenizer.eos_token_id]
    spelled = [*"wait", "<|unk|>", "4"]  # `wait` is one token, and decoding drops <|unk|>
    return [
        tokenizer("4")["input_ids"] + end,
        tokenizer.convert_tokens_to_ids(spelled) + end,
        tokenizer("it is 10 or")["input_ids"][:LONGEST],
        tokenizer("so \\boxed{3}")["input_ids"] + end,
        tokenizer.convert_tokens_to_ids(["<|im_start|>", "7"]) + end,
    ]


def answer_to(prompt, place, answers):
    """The completion that an engine gives to prompt ids at a place of their group."""
    return answers[(len(prompt) // 2 + place) % len(answers)]


def log_probabilities(prompt, completion):
    """One number a token that no other token of the batch has."""
    return [-(sum(prompt) % 101) - index / 16 - token / 4096 for index, token in enumerate(completion)]


class EngineStandIn:
    """What a trainer of TRL asks of `VLLMGeneration`."""

    def __init__(self, model, mode, answers, **settings):
        self.model, self.mode, self.answers, self.settings = model, mode, answers, settings
        self.synced, self.asked = [], []
        self.max_completion_length = None
        self.temperature, self.top_p = settings["temperature"], settings["top_p"]
        self.drawn = []
        self.vllm_client = SimpleNamespace(
            get_server_info=lambda: {"model_config": {"logprobs_mode": "processed_logprobs"}}
        )

    def sync_weights(self):
        weights = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
        self.synced.append(weights)

    def generate(self, prompts, images, num_generations, profiler):
        with profiler:
            # A server is sent every group once and asked for so many samples; a colocated engine is sent every row.
            copies = num_generations if self.mode == "server" else 1
            sent = prompts[::copies]
            completions = [
                answer_to(prompt, (row * copies + sample) % num_generations, self.answers)
                for row, prompt in enumerate(sent)
                for sample in range(copies)
            ]
        self.asked.append((prompts, completions))
        self.drawn.append((self.temperature, self.top_p))
        logps = [
            [[value] for value in log_probabilities(prompt, completion)]
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        return prompts, completions, logps, [[[token] for token in completion] for completion in completions]


class HonestEngine(EngineStandIn):
    """Reports what the weights say that it was sent last, off by `shift`; with `deaf` it never takes new ones."""

    shift, deaf = 0.0, False

    def sync_weights(self):
        if not self.deaf or not self.synced:
            super().sync_weights()

    def generate(self, prompts, images, num_generations, profiler):
        prompts, completions, _, tokens = super().generate(prompts, images, num_generations, profiler)
        logps = [
            [[value - self.shift] for value in self.reported(prompt, completion)]
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        return prompts, completions, logps, tokens

    def reported(self, prompt, completion):
        """By plain transformers: a copy with the synced weights, and the library's own warpers."""
        model = copy.deepcopy(self.model)
        for module in model.modules():  # the trainer's patch calls the student, whatever weights the copy has
            module.__dict__.pop("forward", None)
        model.load_state_dict(self.synced[-1], strict=False)
        settings = self.settings
        with torch.no_grad():
            logits = model.eval()(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        scores = TemperatureLogitsWarper(settings["temperature"])(None, logits)
        scores = TopKLogitsWarper(settings["top_k"])(None, scores) if settings["top_k"] else scores
        scores = TopPLogitsWarper(settings["top_p"])(None, scores)
        logps = scores.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]
        # Given rollouts may hold what truncated sampling would never draw; an engine's own never do.
        plain = (logits / settings["temperature"]).log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]
        kept = scores.isfinite().double()
        mass = ((logits / settings["temperature"]).softmax(-1) * kept).sum(-1)
        added = torch.where(logps.isfinite(), logps, plain - (mass + plain.exp()).log())
        return added.tolist()


@pytest.fixture
def honest(build, monkeypatch):
    """A function that makes a trainer whose engine is honest, and checked."""

    def make(shift=0.0, deaf=False, **settings):
        monkeypatch.setattr(EngineCheck, "check", CHECK)
        monkeypatch.setattr(HonestEngine, "shift", shift)
        monkeypatch.setattr(HonestEngine, "deaf", deaf)
        monkeypatch.setattr(sys.modules[__name__], "EngineStandIn", HonestEngine)
        return build(**settings)

    return make


CHECK = EngineCheck.check


@pytest.fixture(autouse=True)
def unchecked(monkeypatch):
    """The plain stand-in reports numbers of its own, one a token, which nothing is to stop."""
    monkeypatch.setattr(EngineCheck, "check", lambda self, batch, step: {})


def differences(trainer):
    name = "engine/log_prob_difference"
    return {entry["step"]: entry[name] for entry in trainer.state.log_history if name in entry}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cuts", [{}, {"top_p": 0.9, "top_k": 7}], ids=["untruncated", "truncated"])
def test_an_engine_that_samples_from_the_students_weights_passes(honest, mode, cuts):
    trainer = honest(mode=mode, max_steps=5, **{"top_p": 1.0, "top_k": 0, **cuts})
    trainer.train()
    assert trainer.vllm_generation.__class__ is HonestEngine
    found = differences(trainer)
    assert sorted(found) == [1, 2, 4]  # logged at the end of the step: generation batches 1, 2 and 4
    assert all(value < 1e-4 for value in found.values())


def test_an_engine_with_other_weights_stops_the_run_at_its_first_rollouts_with_both_numbers(honest):
    trainer = honest(shift=0.5)
    with pytest.raises(ValueError, match=r"vLLM does not sample from the weights that train: at step 0") as raised:
        trainer.train()
    numbers = [float(found) for found in re.findall(r"-?\d+\.\d{3}\b", str(raised.value))]
    engine, own, difference = numbers[:3]
    assert engine == pytest.approx(own - 0.5, abs=2e-3) and difference == pytest.approx(0.5, abs=2e-3)
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("shift", [0.2, -0.2])
def test_rounding_passes_and_is_logged(honest, shift):
    trainer = honest(shift=shift, max_steps=1)
    trainer.train()
    assert differences(trainer)[1] == pytest.approx(0.2, abs=1e-3)


def test_an_engine_that_never_gets_the_adapter_stops_the_run_when_it_has_grown(honest):
    from peft import LoraConfig

    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])
    settings = {"peft_config": adapter, "learning_rate": 0.3, "max_steps": 4, "guard": "off", "max_grad_norm": 0}
    honest(**settings).train()
    trainer = honest(deaf=True, **settings)
    with pytest.raises(ValueError, match=r"at step [13] its log-probabilities"):  # at step 0 it adds nothing
        trainer.train()


def test_what_tools_wrote_and_what_was_not_reported_is_not_compared():
    torch.manual_seed(0)
    logits = torch.randn(1, 7, 5)
    args = SimpleNamespace(temperature=1.0, top_k=0, top_p=1.0, min_p=None, repetition_penalty=1.0)
    model = torch.nn.Module()
    model.forward = lambda input_ids, use_cache: SimpleNamespace(logits=logits)
    accelerator = SimpleNamespace(device=torch.device("cpu"), reduce=lambda value, reduction: value)
    tokens = torch.tensor([[1, 2, 3, 4]])
    own = logits[0, 2:-1].log_softmax(-1).gather(1, tokens[0, :, None])[:, 0][None].clone()
    reported = own.clone()
    reported[0, 1], reported[0, 3] = 0.0, float("nan")
    ones = torch.ones(1, 4, dtype=torch.long)
    batch = {"prompt_ids": torch.tensor([[0, 1, 2]]), "prompt_mask": torch.ones(1, 3), "completion_ids": tokens}
    batch |= {"completion_mask": ones, "sampling_per_token_logps": reported}
    with pytest.raises(ValueError, match="of 3 tokens"):
        CHECK(EngineCheck(model, accelerator, args), batch, 0)
    batch["tool_mask"] = torch.tensor([[1, 0, 1, 1]])
    found = CHECK(EngineCheck(model, accelerator, args), batch, 0)
    assert found["engine/log_prob_difference"] == pytest.approx(0, abs=1e-6)
    args.repetition_penalty = 1.1
    assert CHECK(EngineCheck(model, accelerator, args), batch, 0) == {}


def reward_boxed(completions, **kwargs):
    return [float("boxed" in completion[0]["content"]) for completion in completions]


@pytest.fixture
def build(make_model, make_args, dataset, tokenizer, monkeypatch):
    answers = answers_of(tokenizer)

    def build(trainer_class=OPSDTrainer, mode="colocate", **settings):
        keywords = {key: settings.pop(key) for key in ("peft_config", "eval_dataset") if key in settings}
        if mode is not None:
            monkeypatch.setattr(grpo_trainer, "VLLMGeneration", lambda **given: EngineStandIn(answers=answers, **given))
            settings |= {"use_vllm": True, "vllm_mode": mode}
        defaults = {
            "num_generations": GROUP_SIZES.get(trainer_class),
            "max_completion_length": LONGEST,
            "distillation_length": None,
            "teacher_prompt_template": "{prompt} {solution}",
            "max_steps": 2,
            "learning_rate": 1e-2,
            "max_grad_norm": 1.0,
        }
        if trainer_class is PurifiedOPSDTrainer:
            defaults["reference_prompt_template"] = "{solution}"
        trainer = trainer_class(
            model=make_model(),
            reward_funcs=reward_boxed,
            args=make_args(trainer_class.config_class, **{**defaults, **settings}),
            train_dataset=dataset,
            processing_class=copy.deepcopy(tokenizer),
            **keywords,
        )
        if mode is None:
            monkeypatch.setattr(trainer.model, "generate", in_place_of_generate(trainer, answers))
        return trainer

    return build


def in_place_of_generate(trainer, answers):
    """transformers' `generate` with the same rollouts: padded prompts, then completions padded after their end."""

    def generate(input_ids, attention_mask, **kwargs):
        size = trainer.num_generations
        prompts = [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]
        completions = [answer_to(prompt, row % size, answers) for row, prompt in enumerate(prompts)]
        width = max(map(len, completions))
        pad = trainer.tokenizer.pad_token_id
        padded = [ids + [pad] * (width - len(ids)) for ids in completions]
        return torch.cat([input_ids, torch.tensor(padded)], dim=1)

    return generate


def record_batches(trainer, monkeypatch):
    """Every micro-batch that reaches the loss."""
    batches, step_loss = [], trainer.step_loss

    def record(model, batch):
        batches.append(batch)
        return step_loss(model, batch)

    monkeypatch.setattr(trainer, "step_loss", record)
    return batches


def rows_of(batches):
    """Prompt ids, completion ids and log-probabilities of every row without its padding, sorted."""
    rows = []
    for batch in batches:
        for prompt, seen, completion, mask, logps in zip(
            batch["prompt_ids"],
            batch["prompt_mask"],
            batch["completion_ids"],
            batch["completion_mask"],
            batch["sampling_per_token_logps"],
            strict=True,
        ):
            assert mask.tolist() == sorted(mask.tolist(), reverse=True), "a completion is padded on the right"
            assert seen.tolist() == sorted(seen.tolist()), "a prompt is padded on the left"
            assert logps[mask == 0].tolist() == [0.0] * int((mask == 0).sum())
            own = mask.bool()
            rows.append((prompt[seen.bool()].tolist(), completion[own].tolist(), logps[own].tolist()))
    return sorted(rows)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("trainer_class", GROUP_SIZES, ids=lambda cls: cls.__name__)
def test_ids_and_log_probabilities_go_verbatim_from_the_engine_to_the_loss(build, monkeypatch, trainer_class, mode):
    trainer = build(trainer_class, mode)
    batches = record_batches(trainer, monkeypatch)
    trainer.train()
    given = [
        (prompt, completion, pytest.approx(log_probabilities(prompt, completion), rel=1e-6))
        for prompts, completions in trainer.vllm_generation.asked
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    seen = rows_of(batches)
    assert len(seen) == len(given) == 2 * 4
    for row, wanted in zip(seen, sorted(given, key=lambda row: row[:2]), strict=True):
        assert row == wanted
    lengths = {len(completion) for _, completion, _ in seen}
    assert lengths >= {2, LONGEST}


@pytest.mark.parametrize("trainer_class", GROUP_SIZES, ids=lambda cls: cls.__name__)
def test_the_distilled_positions_are_the_rollouts_own(build, monkeypatch, trainer_class):
    trainer = build(trainer_class)
    batches = record_batches(trainer, monkeypatch)
    trainer.train()
    end = trainer.tokenizer.eos_token_id
    cut = 0
    for batch in batches:
        for ids, mask, distilled in zip(
            batch["completion_ids"], batch["completion_mask"], batch["distillation_mask"], strict=True
        ):
            wide = torch.nn.functional.pad(
                distilled, (0, len(mask) - len(distilled))
            )  # cut to the longest distilled one
            assert wide.tolist() in (mask.tolist(), [0] * len(mask))  # OGLS-SD leaves right rollouts out
            last = ids[mask.bool()][-1].item()
            assert last == end or mask.sum() == LONGEST
            cut += last != end and bool(distilled.any())
    assert cut, "a rollout that was cut at the limit is distilled too"


def count_forwards(trainer):
    """A list of one entry a forward of the backbone: whether it kept a graph."""
    calls = []
    trainer.model.model.register_forward_hook(lambda *args: calls.append(torch.is_grad_enabled()))
    return calls


@pytest.mark.parametrize(
    ("trainer_class", "mode"),
    [
        (OPSDTrainer, "server"),
        (OGLSSDTrainer, "server"),
        (OGLSSDTrainer, "colocate"),
        (PurifiedOPSDTrainer, "colocate"),
    ],
)
def test_a_run_equals_the_one_over_transformers_on_the_same_rollouts_forward_by_forward(build, trainer_class, mode):
    keys = ("loss", "grad_norm", "divergence", "student_entropy", "completions/clipped_ratio", "reward")
    histories, weights, forwards = [], [], []
    for runs_over in (mode, None):
        trainer = build(trainer_class, runs_over)
        start = copy.deepcopy(trainer.model.state_dict())
        forwards.append(count_forwards(trainer))
        trainer.train()
        histories.append([[entry[key] for key in keys] for entry in trainer.state.log_history if "divergence" in entry])
        weights.append(trainer.model.state_dict())
    assert histories[0] == histories[1] and len(histories[0]) == 2
    assert any(row[0] != 0.0 for row in histories[0])
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name
    assert any(not torch.equal(value, start[name]) for name, value in weights[0].items())
    # Without a reward in the loss nothing of the student is computed for the engine's sake.
    assert forwards[0] == forwards[1] and forwards[0].count(True) == 2


@pytest.mark.parametrize(
    ("settings", "steps_of_syncs"),
    [
        ({}, [0, 1, 2, 3]),
        ({"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}, [0, 1, 2, 3]),
        ({"steps_per_generation": 2}, [0, 2]),
        ({"num_iterations": 2}, [0, 2]),
    ],
    ids=["every step", "accumulation", "two steps a generation", "two iterations"],
)
def test_the_engine_gets_the_students_weights_when_trl_says_so(build, settings, steps_of_syncs):
    trainer = build(teacher_model_kind="ema", teacher_update_rate=0.5, max_steps=4, **settings)
    after_step = [copy.deepcopy(dict(trainer.model.named_parameters()))]
    original = trainer.teacher.update

    def update():  # runs at the end of every optimizer step
        after_step.append({name: value.detach().clone() for name, value in trainer.model.named_parameters()})
        return original()

    trainer.teacher.update = update
    trainer.train()
    synced = trainer.vllm_generation.synced
    assert len(synced) == len(trainer.vllm_generation.asked) == len(steps_of_syncs)
    for weights, step in zip(synced, steps_of_syncs, strict=True):
        for name, value in weights.items():
            assert torch.equal(value, after_step[step][name]), (step, name)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert all(not torch.equal(first[name], second[name]) for first, second in pairwise(synced))


def test_an_evaluation_samples_with_the_weights_of_its_step(build, dataset):
    trainer = build(eval_dataset=dataset.select(range(4)), max_steps=1, num_generations_eval=1)
    trainer.evaluate()
    trainer.train()
    trainer.evaluate()
    engine = trainer.vllm_generation
    assert len(engine.asked) == 3
    assert len(engine.synced) == 2  # before the first batch and after the step; not twice for one step
    assert torch.equal(engine.synced[-1]["lm_head.weight"], trainer.model.lm_head.weight)


@pytest.mark.filterwarnings("ignore:.* is experimental")
@pytest.mark.parametrize("mode", MODES)
def test_drafts_are_drawn_by_the_engine_at_their_own_temperature_one_a_row(build, mode):
    trainer = build(BRTSTrainer, mode, **DRAFTS)
    trainer.train()
    engine = trainer.vllm_generation
    assert engine.drawn == [(1.0, 1.0), *[(0.7, 0.95)] * (len(engine.drawn) - 1)] and len(engine.drawn) in (3, 4)
    assert (engine.temperature, engine.top_p) == (1.0, 1.0)
    assert all(len(completions) == 4 for _, completions in engine.asked)


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_trls_correction_of_the_engine_costs_a_forward_only_where_a_reward_is_in_the_loss(build, monkeypatch, weight):
    trainer = build(mode="server", reward_weight=weight, top_p=1.0, top_k=0, max_steps=1)
    batches, calls = record_batches(trainer, monkeypatch), count_forwards(trainer)
    trainer.train()
    batch, corrections = batches[0], {"old_per_token_logps", "importance_sampling_ratio"}
    assert trainer.args.vllm_importance_sampling_correction == (weight > 0)
    assert corrections & batch.keys() == (corrections if weight else set())
    assert calls.count(True) == 1
    if not weight:
        return
    plain = build(mode="server", max_steps=1)
    fewer = count_forwards(plain)
    plain.train()
    assert calls.count(False) == fewer.count(False) + 1
    own = batch["completion_mask"].bool()
    difference = (batch["old_per_token_logps"] - batch["sampling_per_token_logps"])[own]
    assert difference.abs().mean() > 0.1  # the student's own log-probabilities are not the stand-in's numbers


def test_lora_the_engine_is_asked_and_the_adapter_trains(build):
    from peft import LoraConfig

    trainer = build(peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    trainer.train()
    synced = trainer.vllm_generation.synced
    assert len(synced) == 2
    moved = {name for name in synced[0] if not torch.equal(synced[0][name], synced[-1][name])}
    assert moved and all("lora_" in name for name in moved)
