# SPDX-License-Identifier: Apache-2.0
"""Every engine gives the numbers of one process, saves what it trained, and shards the teacher where it shards the student.

The covering subset of the matrix; all of it: `python tests/support/matrix.py --write docs/distributed.md`.
"""

from itertools import combinations, product

import pytest
from engines import CELL, COVER, ENGINES, KINDS, METHODS, flaws, launch, save_models

DISTRIBUTED = ENGINES[1:]
SHARDED = ("zero3", "fsdp2")
FSDP2_VARIANTS = {
    "checkpointed-layers": (["--fsdp_activation_checkpointing", "true"], {}, {}),
    "head-in-a-unit-of-its-own": (
        ["--fsdp_transformer_layer_cls_to_wrap", "Qwen3DecoderLayer,Linear"],
        {},
        {},
    ),
    "weights-on-rank-0-only": (
        ["--fsdp_cpu_ram_efficient_loading", "true", "--fsdp_sync_module_states", "true"],
        {},
        {},
    ),
    # FSDP2 casts parameters where autocast casts operations, so the numbers agree to bfloat16's.
    "bf16": (["--mixed_precision", "bf16"], {"bf16": True}, {"first_step": 0.05, "later": 0.2}),
}

pytestmark = pytest.mark.slow


def name_of(cell):
    return "-".join(str(value) if key in ("method", "kind") else key for key, value in cell.items())


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def launched(tmp_path_factory, models):
    """A function that gives the exit code, results and folder of a launch, which runs once."""
    done = {}

    def get(engine, **settings):
        if engine not in done:
            folder = tmp_path_factory.mktemp(engine) / "run"
            done[engine] = (*launch(engine, folder, COVER, models, **settings), folder)
        return done[engine]

    return get


@pytest.mark.parametrize("number", range(len(COVER)), ids=[name_of(cell) for cell in COVER])
@pytest.mark.parametrize("engine", DISTRIBUTED)
def test_a_cell_gives_the_numbers_of_one_process_and_is_saved_whole(launched, models, engine, number):
    ones = launched("single")[1]
    code, results, folder = launched(engine)
    assert code == 0
    if engine == "fsdp2" and COVER[number].get("seed_by_rank"):  # it sends no rank's weights to the others
        assert all(result["before_training"] and "different weights" in result["message"] for result in results[number])
        return
    assert flaws(engine, COVER[number], results[number], ones[number][0], folder / str(number), models) == []


@pytest.mark.parametrize("number", range(len(COVER)), ids=[name_of(cell) for cell in COVER])
@pytest.mark.parametrize("engine", SHARDED)
def test_no_rank_holds_a_whole_teacher_where_the_student_is_sharded(launched, engine, number):
    cell = {**CELL, **COVER[number]}
    if engine == "fsdp2" and cell["seed_by_rank"]:  # refused
        return
    for teacher, whole, student in launched(engine)[1][number][0]["parts"]:
        assert 0.45 * whole <= student <= 0.55 * whole or not whole
        if not cell["lora"]:
            assert teacher <= 0.55 * whole
        elif cell["head"]:  # the pairs are whole, the head is not
            assert teacher <= 0.65 * whole


@pytest.mark.parametrize(
    "engine, gathers",
    [
        # All weights, then LoRA. Three steps of a teacher forward and two micro-batches; backward passes gather some ahead.
        ("fsdp2", [3 * 4, 3 * 3]),
        ("zero3", [13, 14]),  # and the check of the head before the first step
    ],
)
def test_the_head_is_gathered_once_a_forward_however_many_tiles(tmp_path, models, engine, gathers):
    for tiles in (False, True):
        folder = tmp_path / f"tiles-{tiles}"
        code, results = launch(engine, folder, [{}, {"lora": True}], models, one_token_tiles=tiles)
        assert code == 0
        assert [result[0]["head_gathers"] for result in results] == gathers


@pytest.mark.exhaustive
@pytest.mark.parametrize("variant", FSDP2_VARIANTS)
def test_fsdp2_gives_the_same_numbers_however_it_is_set(tmp_path, models, variant):
    extra, options, tolerance = FSDP2_VARIANTS[variant]
    cells = [{**options}, {"kind": "ema", "lora": True, **options}, {"kind": "ema", "tied": True, **options}]
    _, ones = launch("single", tmp_path / "single", cells, models)
    code, results = launch("fsdp2", tmp_path / "fsdp2", cells, models, extra=extra)
    assert code == 0
    for number, cell in enumerate(cells):
        if variant == "checkpointed-layers" and cell.get("lora"):  # PEFT could not read what it saves
            assert all("activation_checkpointing" in result["message"] for result in results[number])
            continue
        if variant == "head-in-a-unit-of-its-own" and cell.get("tied"):  # torch's own refusal
            assert all("shared with a parameter already managed" in result["message"] for result in results[number])
            continue
        folder = tmp_path / "fsdp2" / str(number)
        found = flaws("fsdp2", cell, results[number], ones[number][0], folder, models, **tolerance)
        assert [flaw for flaw in found if not (options and "saved model" in flaw)] == []


def test_the_covering_cells_have_every_pair_of_the_matrixs_choices():
    cells = [{**CELL, **cell} for cell in COVER]
    choices = {"method": METHODS, "kind": KINDS, "lora": (False, True)}
    for a, b in combinations(choices, 2):
        missing = set(product(choices[a], choices[b])) - {(cell[a], cell[b]) for cell in cells}
        assert not missing
