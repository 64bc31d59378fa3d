"""Presets: the published counts come out, and what nobody published is labelled."""

from __future__ import annotations

import pytest

from corral.model.checkpoint.names import expected_parameters
from corral.spec.errors import InputError
from corral.spec.parameters import active_parameters, parameters
from corral.spec.presets import HERD, PRESETS, preset_named

PUBLISHED = [name for name, preset in PRESETS.items() if preset.published_total]


@pytest.mark.parametrize("name", PUBLISHED)
def test_total_with_the_vision_tower_is_as_published(name: str) -> None:
    preset = PRESETS[name]
    total = parameters(preset.model).total() + preset.vision_parameters
    assert total == pytest.approx(preset.published_total, rel=0.005)


@pytest.mark.parametrize(("name", "tolerance"), [("scout", 0.02), ("maverick", 0.02), ("behemoth", 0.005)])
def test_active_is_as_published(name: str, tolerance: float) -> None:
    preset = PRESETS[name]
    assert active_parameters(preset.model) == pytest.approx(preset.published_active, rel=tolerance)


def test_the_text_decoder_of_scout_by_hand() -> None:
    attention, expert, router, norms, table = 62_914_560, 125_829_120, 81_920, 10_240, 1_034_485_760
    layer = attention + 17 * expert + router + norms
    assert parameters(PRESETS["scout"].model).total() == 48 * layer + 2 * table + 5120 == 107_769_861_120


@pytest.mark.parametrize("name", PRESETS)
def test_counts_are_those_of_the_parameters_that_a_checkpoint_must_have(name: str) -> None:
    import math

    config = PRESETS[name].model
    assert parameters(config).total() == sum(math.prod(shape) for shape in expected_parameters(config).values())


def test_a_tied_head_is_counted_once() -> None:
    import dataclasses

    config = PRESETS["debug"].model
    tied = dataclasses.replace(config, tie_word_embeddings=True)
    assert parameters(config).total() - parameters(tied).total() == config.vocab_size * config.hidden_size


def test_a_dense_model_uses_every_parameter() -> None:
    config = PRESETS["guard"].model
    assert not any(layer.moe for layer in config.layers)
    assert active_parameters(config) == parameters(config).total()


def test_structure_is_as_published() -> None:
    scout, maverick = PRESETS["scout"].model, PRESETS["maverick"].model
    assert sum(layer.rope for layer in scout.layers) == 36
    assert all(layer.moe for layer in scout.layers) and scout.num_local_experts == 16
    assert [i for i, layer in enumerate(maverick.layers) if layer.moe] == list(range(1, 48, 2))
    assert (scout.use_qk_norm, maverick.use_qk_norm) == (True, False)
    assert scout.rope_scaling is not None and maverick.rope_scaling is None
    assert (scout.max_position_embeddings, maverick.max_position_embeddings) == (10 << 20, 1 << 20)


def test_only_behemoth_is_inferred_and_every_changed_field_says_so() -> None:
    assert [name for name, preset in PRESETS.items() if preset.inferred] == ["behemoth"]
    behemoth = PRESETS["behemoth"]
    assert behemoth.config.keys() <= set(behemoth.inferred) <= HERD.keys()


def test_an_unknown_preset_names_the_known() -> None:
    with pytest.raises(InputError, match="scout, maverick, behemoth, guard, debug"):
        preset_named("scouty")
