# SPDX-License-Identifier: Apache-2.0
"""OPSDConfig: what it refuses and warns of, and that a file or a command line can set every field."""

import json
import warnings
from dataclasses import MISSING, fields

import pytest
from transformers import HfArgumentParser
from trl import GRPOConfig, TrlParser

from trl_opsd import OGLSSDConfig, OPSDConfig, PurifiedOPSDConfig
from trl_opsd.trainers.config import REWARD_ONLY_FIELDS


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"clip_value": 0.0}, ("clip_value=0.0", "set one")),
        ({"clip_value": -0.1}, ("clip_value=-0.1", "clip=None")),
        ({"clip_value": float("nan")}, ("clip_value=nan", "finite")),
        ({"clip": "both"}, ("clip='both'", "'upper', 'symmetric', 'token'")),
        ({"divergence": "kl"}, ("divergence='kl'", "forward_kl")),
        ({"mixture_weight": 0.0}, ("mixture_weight=0.0", "(0, 1)")),
        ({"mixture_weight": 1.0}, ("mixture_weight=1.0", "reverse_kl")),
        ({"temperature": 0.0}, ("temperature=0.0", "above 0")),
        ({"loss_temperature": 0.0}, ("loss_temperature=0.0", "above 0")),
        ({"loss_reduction": "mean"}, ("loss_reduction='mean'", "'token' or 'sequence'")),
        ({"reward_weight": -1.0}, ("reward_weight=-1.0", "0 or more")),
        ({"verifier": "maths"}, ("verifier='maths'", "math, exact, choice, or `module:function`")),
        ({"num_loss_tokens_to_skip": -1}, ("num_loss_tokens_to_skip=-1", "0 or more")),
        ({"distillation_length": 0}, ("distillation_length=0", "positive")),
        (
            {"distillation_length": 4, "num_loss_tokens_to_skip": 4},
            ("num_loss_tokens_to_skip=4", "distillation_length=4", "fewer"),
        ),
        ({"distillation_length": "0..4 in 2"}, ("distillation_length='0..4 in 2'", "256..1024 in 50")),
        ({"distillation_length": "4..4 in 2"}, ("distillation_length='4..4 in 2'", "linearly more")),
        ({"distillation_length": "2..4 in 0"}, ("distillation_length='2..4 in 0'", "256..1024 in 50")),
        ({"distillation_length": "half"}, ("distillation_length='half'", "256..1024 in 50")),
        ({"distillation_length": True}, ("distillation_length=True", "positive")),
        (
            {"distillation_length": "8..16 in 2"},
            ("distillation_length='8..16 in 2'", "nowhere to grow", "max_completion_length=8"),
        ),
        (
            {"distillation_length": "3..6 in 2", "num_loss_tokens_to_skip": 3},
            ("num_loss_tokens_to_skip=3", "distillation_length=3"),
        ),
        ({"num_loss_tokens_to_skip": 8}, ("num_loss_tokens_to_skip=8", "max_completion_length=8", "fewer")),
        ({"teacher_model_kind": "frozen"}, ("teacher_model_kind='frozen'", "'base', 'live', 'ema'")),
        ({"teacher_update_rate": 0.0}, ("teacher_update_rate=0.0", "above 0 and at most 1")),
        ({"teacher_update_rate": 1.1}, ("teacher_update_rate=1.1", "above 0 and at most 1")),
        ({"teacher_tokens_per_forward": 0}, ("teacher_tokens_per_forward=0", "1 or more")),
        ({"max_teacher_prompt_length": 0}, ("max_teacher_prompt_length=0", "None")),
        ({"teacher_prompt_template": "{prompt}"}, ("teacher_prompt_template", "{solution}", "Put")),
        ({"teacher_prompt_template": "{solution}"}, ("teacher_prompt_template", "{prompt}", "Put")),
        ({"teacher_prompt_template": None}, ("teacher_prompt_template=None", "{prompt} and {solution}")),
        ({"prompt_template": "no slot"}, ("prompt_template", "{prompt}", "no slot")),
        ({"chat_template_kwargs": "thinking"}, ("chat_template_kwargs='thinking'", "JSON")),
        ({"teacher_chat_template_kwargs": "{broken"}, ("teacher_chat_template_kwargs='{broken'", "JSON")),
        ({"guard": "loud"}, ("guard='loud'", "'off', 'warn', 'stop'")),
        ({"num_generations": 0}, ("num_generations=0", "1 or more")),
        ({"num_generations": None}, ("num_generations=None", "1 or more")),
        ({"reward_weight": 0.5}, ("num_generations=1", "reward_weight=0.5", "2 or more")),
        (
            {"steps_per_generation": 3, "gradient_accumulation_steps": 2},
            ("steps_per_generation=3", "gradient_accumulation_steps=2", "multiple"),
        ),
        (
            {"generation_batch_size": 12, "gradient_accumulation_steps": 2},
            ("steps_per_generation=3", "multiple"),
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_value_out_of_range_is_refused_with_its_field_value_and_fix(make_args, settings, told):
    with pytest.raises(ValueError) as raised:
        make_args(**settings)
    for text in told:
        assert text in str(raised.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"teacher_update_rate": 1.0},
        {"mixture_weight": 0.999, "divergence": "jsd"},
        {"clip": None},
        {"num_loss_tokens_to_skip": 7},
        {"distillation_length": 8},
        {"distillation_length": "7..8 in 1"},
        {"max_teacher_prompt_length": 1},
        {"chat_template_kwargs": None, "teacher_chat_template_kwargs": None},
        {"prompt_template": "Solve: {prompt}"},
        {"num_iterations": 2},
        {"steps_per_generation": 4, "gradient_accumulation_steps": 2},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_a_value_at_the_edge_of_its_range_is_taken_in_silence(make_args, settings):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        config = make_args(**settings)
    for name, value in settings.items():
        assert getattr(config, name) == value


def test_a_distillation_length_over_the_completion_length_warns(make_args):
    with pytest.warns(UserWarning, match=r"distillation_length=9 .*max_completion_length=8"):
        make_args(distillation_length=9)


def test_a_length_that_was_not_set_is_not_warned_of(make_args):
    """OGLS-SD distils 1,024 tokens by default."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        make_args(OGLSSDConfig, num_generations=2, max_completion_length=8)
    with pytest.warns(UserWarning, match=r"distillation_length=9 .*max_completion_length=8"):
        make_args(OGLSSDConfig, num_generations=2, max_completion_length=8, distillation_length=9)


def other_value(config_field):
    """A valid value of a reward-only field that is not its default."""
    special = {
        "importance_sampling_level": "sequence",
        "loss_type": "grpo",
        "scale_rewards": "batch",
        "delta": 2.0,
        "epsilon_high": 0.3,
        "off_policy_mask_threshold": 1.0,
        "top_entropy_quantile": 0.5,
        "vllm_importance_sampling_mode": "token_truncate",
        "vllm_importance_sampling_clip_min": 0.1,
    }
    default = config_field.default
    if config_field.name in special:
        return special[config_field.name]
    return not default if isinstance(default, bool) else default + 1


@pytest.mark.parametrize("name", REWARD_ONLY_FIELDS)
def test_a_setting_of_the_policy_gradient_loss_alone_warns_without_a_reward_weight(make_args, name):
    by_name = {config_field.name: config_field for config_field in fields(GRPOConfig)}
    value = other_value(by_name[name])
    with pytest.warns(UserWarning, match=rf"unused.*: {name}\. Set reward_weight"):
        make_args(**{name: value})
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        make_args(**{name: value}, reward_weight=0.5, num_generations=2)


def test_the_list_of_such_settings_holds_whole_families_of_trls_names():
    families = (
        "beta",
        "delta",
        "entropy_",
        "epsilon",
        "ref_model_",
        "sapo_",
        "vespo_",
        "vllm_importance_sampling_",
    )
    names = {config_field.name for config_field in fields(GRPOConfig) if config_field.name.startswith(families)}
    # `correction` is switched off by the config itself, `cap` is TRL's old name of another one.
    ours = {"vllm_importance_sampling_correction", "vllm_importance_sampling_cap"}
    assert names - ours <= set(REWARD_ONLY_FIELDS) <= {config_field.name for config_field in fields(GRPOConfig)}


def test_every_unused_setting_is_named_at_once(make_args):
    with pytest.warns(UserWarning, match="beta, epsilon, loss_type"):
        make_args(beta=0.1, epsilon=0.3, loss_type="grpo")


def test_another_spelling_of_a_default_does_not_warn(make_args):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert make_args(scale_rewards=True).scale_rewards == "group"


@pytest.mark.parametrize(("batch_size", "steps"), [(1, 1), (3, 1), (1, 5), (3, 5), (7, 2)])
def test_one_rollout_a_prompt_fits_any_batch_size(make_args, batch_size, steps):
    config = make_args(per_device_train_batch_size=batch_size, gradient_accumulation_steps=steps)
    assert config.num_generations == 1 and type(config.num_generations) is int
    assert config.generation_batch_size == batch_size * steps


def test_trls_own_checks_still_run_with_one_rollout_a_prompt(make_args):
    with pytest.raises(ValueError, match="can not be both configured"):
        make_args(generation_batch_size=4, steps_per_generation=1)
    with pytest.raises(ValueError, match=r"generation_batch_size \(3\) must be divisible by num_generations \(2\)"):
        make_args(per_device_train_batch_size=3, num_generations=2)


def test_the_loss_takes_the_sampling_temperature_unless_it_has_its_own(make_args):
    assert make_args(temperature=0.7).loss_divergence().temperature == 0.7
    assert make_args(temperature=0.7, loss_temperature=2.0).loss_divergence().temperature == 2.0


def test_the_divergence_holds_every_setting_of_the_loss(make_args):
    rule = make_args(divergence="jsd", mixture_weight=0.2, clip="symmetric", clip_value=0.3).loss_divergence()
    assert (rule.name, rule.mixture_weight, rule.clip, rule.clip_value) == ("jsd", 0.2, "symmetric", 0.3)


@pytest.mark.parametrize("name", ["chat_template_kwargs", "teacher_chat_template_kwargs"])
@pytest.mark.parametrize("text", ['{"enable_thinking": true}', '{"enable_thinking": "true"}'])
def test_template_arguments_can_be_written_as_json(make_args, name, text):
    assert getattr(make_args(**{name: text}), name) == {"enable_thinking": True}


@pytest.mark.parametrize("text", ["none", "None"])
def test_no_clip_can_be_written_as_a_word(make_args, text):
    assert make_args(clip=text).clip is None


def added_fields():
    inherited = {config_field.name for config_field in fields(GRPOConfig)}
    return {config_field.name for config_field in fields(OPSDConfig)} - inherited


def redefined_fields():
    def default(config_field):
        factory = config_field.default_factory
        return config_field.default if factory is MISSING else factory()

    inherited = {config_field.name: default(config_field) for config_field in fields(GRPOConfig)}
    ours = {config_field.name: default(config_field) for config_field in fields(OPSDConfig)}
    return {name for name in inherited if ours[name] != inherited[name]}


def test_it_adds_few_fields():
    assert len(added_fields()) <= 21


def test_the_fields_it_adds_are_a_frozen_set():
    assert added_fields() == {
        "clip",
        "clip_value",
        "distillation_length",
        "divergence",
        "guard",
        "mixture_weight",
        "loss_reduction",
        "loss_temperature",
        "max_teacher_prompt_length",
        "num_loss_tokens_to_skip",
        "prompt_template",
        "reward_weight",
        "shown_solution",
        "teacher_chat_template_kwargs",
        "teacher_model_kind",
        "teacher_prefix",
        "teacher_prompt_template",
        "teacher_tokens_per_forward",
        "teacher_update_rate",
        "verifier",
    }


def test_the_defaults_it_changes_are_a_frozen_set():
    assert redefined_fields() == {
        "chat_template_kwargs",
        "gradient_accumulation_steps",
        "learning_rate",
        "logging_first_step",
        "logging_nan_inf_filter",
        "max_completion_length",
        "max_grad_norm",
        "max_steps",
        "num_generations",
        "per_device_train_batch_size",
        "save_steps",
        "temperature",
        "top_k",
        "top_p",
    }


def test_every_field_has_a_help_text():
    assert not [config_field.name for config_field in fields(OPSDConfig) if not config_field.metadata.get("help")]


def test_mutable_defaults_are_not_shared(make_args):
    make_args().teacher_chat_template_kwargs["x"] = 1
    fresh = make_args()
    assert "x" not in fresh.teacher_chat_template_kwargs


COMMAND_LINE = {
    "clip": ("none", None),
    "clip_value": ("0.1", 0.1),
    "distillation_length": ("3..5 in 2", "3..5 in 2"),
    "divergence": ("jsd", "jsd"),
    "guard": ("stop", "stop"),
    "mixture_weight": ("0.25", 0.25),
    "loss_reduction": ("sequence", "sequence"),
    "loss_temperature": ("1.5", 1.5),
    "max_teacher_prompt_length": ("512", 512),
    "num_loss_tokens_to_skip": ("1", 1),
    "prompt_template": ("Solve {prompt}", "Solve {prompt}"),
    "reward_weight": ("0", 0.0),
    "verifier": ("exact", "exact"),
    "teacher_chat_template_kwargs": ('{"enable_thinking": false}', {"enable_thinking": False}),
    "teacher_model_kind": ("ema", "ema"),
    "teacher_prefix": ("<think>", "<think>"),
    "shown_solution": ("0.5", 0.5),
    "teacher_prompt_template": ("{prompt} {solution}", "{prompt} {solution}"),
    "teacher_tokens_per_forward": ("64", 64),
    "teacher_update_rate": ("0.5", 0.5),
    "chat_template_kwargs": ('{"enable_thinking": true}', {"enable_thinking": True}),
    "gradient_accumulation_steps": ("2", 2),
    "learning_rate": ("1e-4", 1e-4),
    "logging_first_step": ("false", False),
    "logging_nan_inf_filter": ("true", True),
    "max_completion_length": ("16", 16),
    "max_grad_norm": ("0.5", 0.5),
    "max_steps": ("3", 3),
    "num_generations": ("1", 1),
    "per_device_train_batch_size": ("3", 3),
    "save_steps": ("7", 7),
    "temperature": ("0.9", 0.9),
    "top_k": ("5", 5),
    "top_p": ("0.5", 0.5),
}


@pytest.mark.parametrize("config", [OGLSSDConfig, PurifiedOPSDConfig])
def test_a_page_declares_its_settings_in_a_dataclass_of_its_own_with_their_check(config):
    own = next(kind for kind in config.__mro__ if kind.__name__ == config.__name__.replace("Config", "Settings"))
    assert own.__mro__ == (own, object) and "check" in vars(own)
    added = set(config.__dataclass_fields__) - set(OPSDConfig.__dataclass_fields__)
    assert added and added < set(own.__dataclass_fields__) and not vars(config).get("__annotations__")
    own().check()
    bad = {"OGLSSDSettings": {"steering_teacher": "x"}, "PurifiedOPSDSettings": {"decomposition_steps": -1}}[
        own.__name__
    ]
    with pytest.raises(ValueError, match=next(iter(bad))):
        own(**bad).check()


def test_a_setting_of_a_page_is_checked_in_its_config_too(make_args):
    with pytest.raises(ValueError, match="steering_warmup_steps=-1 is not valid"):
        make_args(OGLSSDConfig, num_generations=2, steering_warmup_steps=-1)
    with pytest.raises(ValueError, match=r"reference_prompt_template does not contain \{solution\}"):
        make_args(PurifiedOPSDConfig, reference_prompt_template="no slot")


def test_every_field_can_be_set_from_the_command_line(tmp_path):
    assert COMMAND_LINE.keys() == added_fields() | redefined_fields()
    words = [
        "--output_dir",
        str(tmp_path),
        "--bf16",
        "false",
        "--use_cpu",
        "--gradient_checkpointing",
        "false",
    ]
    for name, (text, _) in COMMAND_LINE.items():
        words += [f"--{name}", text]
    (config,) = HfArgumentParser(OPSDConfig).parse_args_into_dataclasses(words)
    assert {name: getattr(config, name) for name in COMMAND_LINE} == {
        name: value for name, (_, value) in COMMAND_LINE.items()
    }


def test_every_field_can_be_set_from_a_recipe_file(tmp_path):
    values = {name: value for name, (_, value) in COMMAND_LINE.items()}
    recipe = {
        **values,
        "output_dir": str(tmp_path),
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe))  # JSON is YAML
    (config,) = TrlParser(OPSDConfig).parse_args_and_config(["--config", str(path)])
    assert {name: getattr(config, name) for name in values} == values


def test_help_prints_every_field(capsys):
    with pytest.raises(SystemExit) as left:
        TrlParser(OPSDConfig).parse_args_into_dataclasses(["--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert not [name for name in added_fields() if f"--{name}" not in text]


def test_a_config_survives_its_dict_and_its_json(make_args):
    config = make_args(divergence="jsd", teacher_prefix="<think>", chat_template_kwargs='{"a": 1}', clip="none")
    for saved in (config.to_dict(), json.loads(config.to_json_string())):
        del saved["generation_batch_size"]  # TRL writes it beside steps_per_generation and takes only one of them
        again = OPSDConfig(**{key: value for key, value in saved.items() if key in config.__dataclass_fields__})
        assert {name: getattr(again, name) for name in COMMAND_LINE} == {
            name: getattr(config, name) for name in COMMAND_LINE
        }


def test_weights_of_the_engine_that_sampling_biases_are_told(tmp_path):
    settings = {"use_vllm": True, "reward_weight": 0.5, "num_generations": 2, "bf16": False}
    with pytest.warns(UserWarning, match=r"top_p=0\.95 and top_k=20.*too small by the kept mass"):
        OPSDConfig(str(tmp_path), **settings)
    OPSDConfig(str(tmp_path), **settings, top_p=1.0, top_k=0)  # warnings are errors
    OPSDConfig(str(tmp_path), **settings, vllm_importance_sampling_correction=False)
    OPSDConfig(str(tmp_path), **{**settings, "reward_weight": 0.0})
