# SPDX-License-Identifier: Apache-2.0
"""The private parts of TRL that we wrap are there, and a TRL without them is refused by name."""

import types

import pytest
import trl
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from trl_opsd import OPSDTrainer, UnsupportedTRLError
from trl_opsd._trl import versions
from trl_opsd._trl.versions import NEWEST_TESTED_TRL, SUPPORTED_TRL, check_trl, warn_if_untested


def test_the_installed_trl_has_every_name():
    check_trl()


def test_the_installed_trl_is_in_the_supported_range():
    assert trl.__version__ in SpecifierSet(SUPPORTED_TRL)


def test_a_constructed_trainer_has_every_attribute(make_model, make_args, dataset, tokenizer):
    trainer = OPSDTrainer(model=make_model(), args=make_args(), train_dataset=dataset, processing_class=tokenizer)
    check_trl(instance=trainer)


def test_the_wrapped_names_are_a_frozen_set():
    assert set(versions.METHODS) == {
        "_calculate_rewards",
        "_compute_loss",
        "_generate_and_score_completions",
        "_generate_single_turn",
        "_get_output_dir",
        "_get_per_token_logps_and_entropies",
        "_get_train_sampler",
        "_load_optimizer_and_scheduler",
        "_log_completion_extra",
        "_log_metric",
        "_prepare_inputs",
        "_push_from_checkpoint",
        "_save_checkpoint",
    }
    assert set(versions.ATTRIBUTES) == {
        "_buffered_inputs",
        "_logs",
        "_metrics",
        "_step",
        "_tokenizer",
        "max_completion_length",
        "num_generations",
        "num_generations_eval",
        "use_vllm",
    }


@pytest.mark.parametrize("name", versions.LATER_ATTRIBUTES)
def test_a_name_that_only_a_running_trainer_has_is_missed_in_the_code(name, monkeypatch):
    names = versions._names_in_code(trl.GRPOTrainer)
    assert name in names
    monkeypatch.setattr(versions, "_names_in_code", lambda trainer_class: names - {name})
    with pytest.raises(UnsupportedTRLError, match=rf"has no {name} in GRPOTrainer"):
        check_trl()


def test_an_engine_without_its_limit_and_sampling_is_missed():
    instance = types.SimpleNamespace(**dict.fromkeys(versions.ATTRIBUTES, True), vllm_generation=object())
    with pytest.raises(UnsupportedTRLError, match="has no max_completion_length, temperature, top_p in GRPOTrainer"):
        check_trl(instance=instance)


def without(name):
    """A trainer class that lacks one method."""
    return type("OlderTrainer", (trl.GRPOTrainer,), {name: None})


@pytest.mark.parametrize("name", versions.METHODS)
def test_a_missing_method_is_named_with_version_and_range(name):
    with pytest.raises(UnsupportedTRLError) as raised:
        check_trl(without(name))
    for text in (
        f"has no {name} in OlderTrainer",
        trl.__version__,
        f"Supported versions of TRL: {SUPPORTED_TRL}",
        "pip",
    ):
        assert text in str(raised.value)


@pytest.mark.parametrize(("name", "argument"), [(name, arg) for name, args in versions.METHODS.items() for arg in args])
def test_a_missing_argument_is_named(name, argument):
    class OlderTrainer(trl.GRPOTrainer):
        pass

    setattr(OlderTrainer, name, lambda self: None)
    with pytest.raises(UnsupportedTRLError) as raised:
        check_trl(OlderTrainer)
    assert f"{name}({argument})" in str(raised.value)


@pytest.mark.parametrize("name", versions.ATTRIBUTES)
def test_a_missing_attribute_is_named(name):
    instance = type("Older", (), {other: None for other in versions.ATTRIBUTES if other != name})()
    with pytest.raises(UnsupportedTRLError, match=rf"has no {name} in GRPOTrainer"):
        check_trl(instance=instance)


def test_every_missing_name_is_told_at_once():
    with pytest.raises(UnsupportedTRLError) as raised:
        check_trl(object, instance=object())
    for name in (*versions.METHODS, *versions.ATTRIBUTES):
        assert name in str(raised.value)


def test_the_suggested_install_is_one_that_pip_reads():
    with pytest.raises(UnsupportedTRLError, match=rf"pip install 'trl{SUPPORTED_TRL}'"):
        check_trl(object)


def test_users_can_catch_it_as_an_import_error():
    assert issubclass(UnsupportedTRLError, ImportError)


def test_a_trl_newer_than_any_tested_is_told_and_not_refused(monkeypatch):
    monkeypatch.setattr(trl, "__version__", "1.18.2")
    assert "1.18.2" in SpecifierSet(SUPPORTED_TRL)
    with pytest.warns(UserWarning, match=r"trl 1\.18\.2 is newer than 1\.16.*pip install 'trl==1\.16\.\*'"):
        warn_if_untested()
    monkeypatch.setattr(trl, "__version__", "1.16.3")
    warn_if_untested()  # warnings are errors


def test_the_newest_tested_version_is_the_one_that_the_tests_run_on():
    assert Version(trl.__version__).release[:2] <= NEWEST_TESTED_TRL
