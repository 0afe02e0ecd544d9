# SPDX-License-Identifier: Apache-2.0
"""Which TRL is supported, every private name of it that we rely on, and what older versions lack."""

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import trl
from packaging.version import Version
from trl import GRPOConfig, GRPOTrainer

SUPPORTED_TRL = ">=1.0.0,<2"
NEWEST_TESTED_TRL = (1, 16)

# Method -> the arguments that our wrappers rely on.
METHODS = {
    "_generate_and_score_completions": ("inputs",),
    "_calculate_rewards": ("inputs", "prompts", "completions", "completion_ids_list"),
    "_compute_loss": ("model", "inputs"),
    "_prepare_inputs": ("generation_batch",),
    "_get_per_token_logps_and_entropies": ("model", "input_ids", "attention_mask", "logits_to_keep"),
    "_save_checkpoint": ("model", "trial"),
    "_push_from_checkpoint": ("checkpoint_folder",),
    "_load_optimizer_and_scheduler": ("checkpoint",),
    "_get_output_dir": ("trial",),
    "_get_train_sampler": ("dataset",),
    "_generate_single_turn": ("prompt_ids", "images", "multimodal_fields"),
    "_log_completion_extra": ("column", "values"),
    "_log_metric": ("name", "value"),
}
# Of the experimental GKDTrainer, public by name alone.
GKD_METHODS = {
    "training_step": ("model", "inputs", "num_items_in_batch"),
    "compute_loss": ("model", "inputs", "return_outputs", "num_items_in_batch"),
    "generate_on_policy_outputs": ("model", "inputs", "generation_config"),
}
# Of a constructed trainer.
ATTRIBUTES = (
    "_buffered_inputs",
    "_logs",
    "_metrics",
    "_step",
    "_tokenizer",
    "max_completion_length",
    "num_generations",
    "num_generations_eval",
    "use_vllm",
)
# Of a trainer that trains, or samples in one of two ways: checked by the code of its class, which must name them.
LATER_ATTRIBUTES = ("_globalstep_last_logged", "_tr_loss", "generation_config", "vllm_generation")
# Of `trainer.vllm_generation`.
ENGINE_ATTRIBUTES = ("max_completion_length", "temperature", "top_p")
# Which only some versions in the range have, so that each is asked for before it is read.
OPTIONAL_ATTRIBUTES = (
    "aux_loss_enabled",
    "chat_template",
    "environments",
    "eos_token_ids",
    "generation_kwargs",
    "tools",
)
# Which the model card reads of the class, and the command line of the config's class.
CLASS_ATTRIBUTES = ("_name", "_paper", "_tag_names")
CONFIG_ATTRIBUTES = ("_VALID_DICT_FIELDS",)

# What older versions in the range lack.
# TRL 1.7 added the router's loss: the argument `compute_aux_loss` and a third value of the log-probabilities.
HAS_ROUTER_LOSS = (
    "compute_aux_loss" in inspect.signature(inspect.unwrap(GRPOTrainer._get_per_token_logps_and_entropies)).parameters
)
NUM_LOGPS_VALUES = 3 if HAS_ROUTER_LOSS else 2


def dict_fields(config_class: type, *ours: str) -> list[str]:
    """Fields that the command line may write as JSON: those of TRL's config and ours."""
    # TRL 1.11 added `chat_template_kwargs` to GRPOConfig's.
    ours = ours or ("chat_template_kwargs", "teacher_chat_template_kwargs")
    return list(dict.fromkeys([*config_class._VALID_DICT_FIELDS, *ours]))


def installed_fields(*names: str) -> tuple[str, ...]:
    """Those of `names` that are fields of GRPOConfig: TRL 1.6 and 1.8 added some."""
    return tuple(name for name in names if name in GRPOConfig.__dataclass_fields__)


def engine_correction(cap: float) -> dict[str, Any]:
    """Fields of GRPOConfig that weigh a token by trainer over engine, at most `cap`; the bound's name is TRL's of now or before."""
    bounds = installed_fields("vllm_importance_sampling_clip_max") or ("vllm_importance_sampling_cap",)
    return {
        "vllm_importance_sampling_correction": True,
        "vllm_importance_sampling_mode": "token_truncate",
        **dict.fromkeys(bounds, cap),
    }


# What an optimizer step's micro-batches add up to does not depend on which rows share one: 'bnpo' divides by a micro-batch's
# own tokens, and a later one may.
_LOSSES_OF_ROWS = ("cispo", "dapo", "dr_grpo", "grpo", "luspo", "sapo", "vespo")


def adds_up_over_rows(config: GRPOConfig) -> bool:
    """Whether TRL's policy loss of an optimizer step is the same however its rows are grouped into micro-batches."""
    quantile = getattr(config, "top_entropy_quantile", 1.0)  # which is taken of a micro-batch
    bonus = getattr(config, "entropy_coef", 0.0) or getattr(config, "use_adaptive_entropy", False)  # and so is its mean
    return config.loss_type in _LOSSES_OF_ROWS and quantile == 1.0 and not bonus


def liger_enters_loss() -> bool:
    """Whether `use_liger_kernel` changes more of GRPOTrainer than the model's layers: until TRL 1.16 its loss too."""
    functions = {name: inspect.unwrap(value) for name, value in vars(GRPOTrainer).items() if callable(value)}
    functions.pop("__init__")
    return any(
        "use_liger_kernel" in code_of.__code__.co_names
        for code_of in functions.values()
        if hasattr(code_of, "__code__")
    )


def trusts_remote_code(config: GRPOConfig) -> bool:
    """Whether a model's own code may run; before TRL 1.7 `model_init_kwargs` alone says so."""
    default = getattr(config, "trust_remote_code", False)
    return (config.model_init_kwargs or {}).get("trust_remote_code", default)


def is_newer(than: tuple[int, int]) -> bool:
    """Whether the installed TRL is of a later minor version."""
    return Version(trl.__version__).release[:2] > than


def warn_if_untested() -> None:
    """Say that TRL is newer than any that the tests ran on; its names are checked all the same."""
    if is_newer(NEWEST_TESTED_TRL):
        newest = ".".join(map(str, NEWEST_TESTED_TRL))
        warnings.warn(
            f"trl {trl.__version__} is newer than {newest}, the newest that this version of trl_opsd was tested on. Every "
            f"name that it wraps is there; if a run looks wrong, compare with `pip install 'trl=={newest}.*'`.",
            stacklevel=2,
        )


class UnsupportedTRLError(ImportError):
    """The installed TRL lacks a name that the trainers wrap."""


def check_trl(trainer_class: type = GRPOTrainer, instance: Any = None) -> None:
    """Check that TRL has the private names wrapped here.

    Args:
        trainer_class: the class to check, with its methods' arguments.
        instance: a constructed trainer, to check its attributes too.

    Raises:
        UnsupportedTRLError: a name or argument is missing; names it, the installed version and the supported range.
    """
    missing = _missing_methods(trainer_class, METHODS)
    missing += sorted(set(LATER_ATTRIBUTES) - _names_in_code(trainer_class))
    missing += [name for name in CLASS_ATTRIBUTES if not hasattr(trainer_class, name)]
    if instance is not None:
        missing += [name for name in ATTRIBUTES if not hasattr(instance, name)]
        if getattr(instance, "use_vllm", False):
            missing += [name for name in ENGINE_ATTRIBUTES if not hasattr(instance.vllm_generation, name)]
    if missing:
        raise UnsupportedTRLError(
            f"trl {trl.__version__} has no {', '.join(missing)} in {trainer_class.__name__}, which trl_opsd wraps. "
            f"Supported versions of TRL: {SUPPORTED_TRL}. Install one of them, for instance "
            f"`pip install 'trl{SUPPORTED_TRL}'`."
        )


def _missing_methods(trainer_class: type, methods: dict[str, tuple[str, ...]]) -> list[str]:
    missing = []
    for name, arguments in methods.items():
        method = getattr(trainer_class, name, None)
        if method is None:
            missing.append(name)
            continue
        parameters = inspect.signature(inspect.unwrap(method)).parameters
        missing += [f"{name}({arg})" for arg in arguments if arg not in parameters]
    return missing


def _names_in_code(trainer_class: type) -> set[str]:
    """Every attribute that the methods of a class and of its parents name."""
    functions = [
        inspect.unwrap(value) for owner in trainer_class.__mro__ for value in vars(owner).values() if callable(value)
    ]
    return {name for function in functions if hasattr(function, "__code__") for name in function.__code__.co_names}


def gkd_classes() -> tuple[type, type]:
    """TRL's experimental GKDConfig and GKDTrainer, loaded here and nowhere else.

    Raises:
        UnsupportedTRLError: this TRL has none, or one that is not the one relied on.
    """
    supported = ">=1.12.0,<2"
    try:
        from trl.experimental.gkd import GKDConfig, GKDTrainer
    except ImportError as error:
        raise UnsupportedTRLError(
            f"trl {trl.__version__} has no trl.experimental.gkd, which OPSDGKDTrainer extends ({error}). Install "
            f"`trl{supported}`, or use OPSDTrainer."
        ) from error
    missing = _missing_methods(GKDTrainer, GKD_METHODS)
    # Until it lost this argument it found padding by the token's id: end tokens, and prompts that hold them, were masked.
    sample = getattr(GKDTrainer, "generate_on_policy_outputs", None)
    if sample is not None and "pad_token_id" in inspect.signature(sample).parameters:
        missing.append("mask of its own for rollouts (it masks by the id of the padding token)")
    if missing:
        raise UnsupportedTRLError(
            f"trl {trl.__version__}: its GKDTrainer has no {', '.join(missing)}, which OPSDGKDTrainer relies on. Install "
            f"`trl{supported}`, or use OPSDTrainer."
        )
    return GKDConfig, GKDTrainer


class _One(int):
    """The number 1 that passes GRPOConfig's test for at least two rollouts; a method without groups has one."""

    def __lt__(self, other: Any) -> bool:
        return False if other == 2 else int.__lt__(self, other)


@contextmanager
def allow_single_rollout(config: GRPOConfig) -> Iterator[None]:
    """Let `GRPOConfig.__post_init__` accept `num_generations=1`; every other check of it still runs."""
    if config.num_generations == 1:
        config.num_generations = _One(1)
    yield
    config.num_generations = int(config.num_generations)
