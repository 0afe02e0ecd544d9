# SPDX-License-Identifier: Apache-2.0
"""`trl-opsd eval --backend vllm` against a stand-in for the package `vllm`, which holds what is asked of the real one."""

import json
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_opsd.commands import cli
from trl_opsd.demo import build_rows, model_path
from trl_opsd.evaluation.sampling import generate_completions as by_transformers
from trl_opsd.evaluation.vllm_sampling import generate_completions, load_engine

OFF = {"enable_thinking": False}


class SamplingParams:
    """Takes the arguments that are used here and no other."""

    def __init__(self, *, n, temperature, top_p, top_k, seed, max_tokens, stop_token_ids, detokenize):
        assert temperature > 0 or (n == 1 and top_p == 1.0 and top_k == -1)
        self.__dict__.update({name: value for name, value in locals().items() if name != "self"})


class LLM:
    """Samples greedily with transformers, one request at a time, and ends where vLLM does: at a stop token or limit."""

    made: ClassVar[list] = []

    def __init__(self, *, model, dtype, **options):
        self.model, self.options, self.dtype = AutoModelForCausalLM.from_pretrained(model), options, dtype
        self.asked = []
        self.made.append(self)

    def generate(self, prompts, sampling_params, *, use_tqdm):
        assert len(prompts) == len(sampling_params)
        self.asked += zip(prompts, sampling_params, strict=True)
        return [self.answer(**prompt, params=params) for prompt, params in self.asked[-len(prompts) :]]

    def answer(self, prompt_token_ids, params):
        output = self.model.generate(
            torch.tensor([prompt_token_ids]),
            do_sample=False,
            max_new_tokens=params.max_tokens,
            eos_token_id=params.stop_token_ids,
        )
        ids = output[0, len(prompt_token_ids) :].tolist()
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(ids)) for _ in range(params.n)])


@pytest.fixture
def vllm(monkeypatch):
    module = ModuleType("vllm")
    module.__spec__ = ModuleSpec("vllm", None)
    module.LLM, module.SamplingParams = LLM, SamplingParams
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(LLM, "made", [])
    return module


def test_greedy_completions_are_those_of_transformers(vllm):
    engine, tokenizer = load_engine(model_path(), "auto")
    prompts = [row["prompt"] for row in build_rows("test", 4)]
    for limit in (5, 64):  # all cut, none cut
        settings = {"temperature": 0.0, "max_new_tokens": limit, "chat_template_kwargs": OFF}
        found = generate_completions(engine, tokenizer, prompts, **settings)
        assert found == by_transformers(
            AutoModelForCausalLM.from_pretrained(model_path()), tokenizer, prompts, **settings
        )
        assert all(group[0].is_cut == (limit == 5) for group in found)


def test_requests_hold_rendered_ids_the_models_stops_and_a_seed_of_their_own(vllm):
    engine, tokenizer = load_engine(model_path(), "float32", {"tensor_parallel_size": 2})
    assert engine.llm.options == {"tensor_parallel_size": 2} and engine.llm.dtype == "float32"
    rows = build_rows("test", 3)
    settings = {"num_samples": 2, "temperature": 0.6, "top_p": 0.9, "top_k": 7, "max_new_tokens": 9}
    for seed in (0, 0, 1):
        generate_completions(
            engine, tokenizer, [row["prompt"] for row in rows], seed=seed, chat_template_kwargs=OFF, **settings
        )
    first, again, other = engine.llm.asked[:3], engine.llm.asked[3:6], engine.llm.asked[6:]
    for row, (prompt, params) in zip(rows, first, strict=True):
        text = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False, **OFF)
        assert prompt == {"prompt_token_ids": tokenizer(text, add_special_tokens=False)["input_ids"]}
        assert (params.n, params.temperature, params.top_p, params.top_k, params.max_tokens) == (2, 0.6, 0.9, 7, 9)
        assert params.stop_token_ids == [tokenizer.eos_token_id]
    seeds = [[params.seed for _, params in asked] for asked in (first, again, other)]
    assert seeds[0] == seeds[1] and len({*seeds[0], *seeds[2]}) == 6


def test_all_tokens_are_kept_where_top_k_is_0(vllm):
    engine, tokenizer = load_engine(model_path(), "auto")
    generate_completions(engine, tokenizer, ["1+1"], temperature=1.0, top_k=0, max_new_tokens=2)
    assert engine.llm.asked[0][1].top_k == -1
    with pytest.raises(ValueError, match="num_samples is 2 at temperature 0"):
        generate_completions(engine, tokenizer, ["1+1"], temperature=0.0, num_samples=2)


def test_the_command_measures_by_the_engine_what_it_measures_by_transformers(vllm, tmp_path):
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in build_rows("test", 3)))
    results = {}
    for backend in ("transformers", "vllm"):
        folder = tmp_path / backend
        line = [
            "eval",
            "--models",
            model_path(),
            "--datasets",
            str(questions),
            "--backend",
            backend,
            "--thinking",
            "off",
        ]
        line += ["--num_samples", "1", "--temperature", "0", "--max_new_tokens", "64", "--output_dir", str(folder)]
        line += ["--vllm_options", '{"max_model_len": 256}'] if backend == "vllm" else []
        assert cli.main([*line, "--save_completions"]) == 0
        results[backend] = json.loads(next(folder.rglob("seed-0.json")).read_text())
    assert [engine.options for engine in LLM.made] == [{"max_model_len": 256}]
    assert results["vllm"].pop("settings")["backend"] == "vllm" != results["transformers"].pop("settings")["backend"]
    assert results["vllm"] == results["transformers"] and results["vllm"]["avg_at_k"] == 1.0


def test_without_vllm_the_command_says_how_to_get_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "vllm", None)
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps(build_rows("test", 1)[0]) + "\n")
    line = ["eval", "--models", model_path(), "--datasets", str(questions), "--backend", "vllm"]
    assert cli.main([*line, "--output_dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "vLLM cannot be imported" in error and "pip install 'trl-opsd[vllm]'" in error


def test_an_adapter_is_refused_with_what_to_do(vllm, tmp_path, capsys):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "a/b"}')
    with pytest.raises(ValueError, match=r"LoRA adapter of a/b.*merge_and_unload"):
        load_engine(str(tmp_path), "auto")


def test_a_model_without_a_generation_config_has_the_stops_of_its_config(vllm, tmp_path):
    AutoTokenizer.from_pretrained(model_path()).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(model_path())
    model.config.eos_token_id = 7
    model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    engine, tokenizer = load_engine(str(tmp_path), "auto")
    assert engine.stops == {7, tokenizer.eos_token_id}
