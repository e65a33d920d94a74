"""The doctor on configurations: silent on published ones, and what it finds in those of planted faults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import FAMILIES, Tensors, hf_config, write_hf
from support.gguf_files import config_fields, gguf_bytes, write_gguf
from support.patients import (
    assert_finds,
    assert_healthy,
    change_json,
    changed_weights,
    family,
    write_json,
    write_patient,
)
from support.published import MODELS, PUBLISHED, config_json_of, params_json_of

from mistral_ref.measure.shapes import SHAPES


@pytest.mark.parametrize("name", MODELS)
def test_published_configurations_are_healthy(name: str, tmp_path: Path) -> None:
    files = {"params.json": params_json_of(MODELS[name])}
    for version in (4, 5):
        files["config.json"] = config_json_of(MODELS[name], version)
        for file, content in files.items():
            write_json(tmp_path / file, content)
            assert_healthy(tmp_path / file)
        assert assert_healthy(tmp_path).left_out  # the weights and the tokenizer
    for file, content in PUBLISHED["files"].get(name, {}).items():
        write_json(tmp_path / file, content)
        assert_healthy(tmp_path / file)


DEVSTRAL_2 = {"rope_type": "yarn", "factor": 64, "original_max_position_embeddings": 4096, "beta_fast": 4}
DEVSTRAL_2 |= {"beta_slow": 1, "mscale": 1, "mscale_all_dim": 0, "llama_4_scaling_beta": 0, "rope_theta": 1e6}


def test_unusual_configurations_that_were_published_are_healthy(tmp_path: Path) -> None:
    small = hf_config(FAMILIES["ministral3"]) | {"rope_parameters": DEVSTRAL_2}
    write_json(tmp_path / "config.json", small)
    assert_healthy(tmp_path / "config.json")
    # 7B v0.1: no theta beside a window
    first = {**params_json_of(MODELS["Mistral-7B-v0.1"])}
    del first["rope_theta"]
    write_json(tmp_path / "first.json", first)
    assert_healthy(tmp_path / "first.json")
    # 7B v0.2 as it was first uploaded: a window as long as the longest text
    window = params_json_of(MODELS["Mistral-7B-v0.2"]) | {"sliding_window": 32768}
    write_json(tmp_path / "params.json", window)
    assert_healthy(tmp_path / "params.json")


@pytest.mark.parametrize(
    ("name", "field", "value", "facts"),
    [
        ("dense_windowed", "sliding_window", 9, ["sliding_window"]),
        ("dense_windowed", "rope_parameters", {"rope_type": "default", "rope_theta": 1e6}, ["rope_theta", 1e6, 1e4]),
        ("dense_windowed", "head_dim", 10, ["head_dim", 10, 8]),
        ("dense_windowed", "hidden_size", 44, ["dim", "hidden_size", 44, 40]),
        ("dense_windowed", "num_key_value_heads", 3, ["n_kv_heads", "num_key_value_heads", 3, 2]),
        ("dense_windowed", "vocab_size", 1500, ["vocab_size", 1500, 1456]),
        ("dense_windowed", "rms_norm_eps", 1e-6, ["norm_eps", 1e-6, 1e-5]),
        ("mixtral", "num_experts_per_tok", 3, ["moe.num_experts_per_tok", 3, 2]),
        ("ministral3", "rope_parameters.factor", 8, ["yarn.factor", 8.0, 16.0]),
        ("ministral3", "rope_parameters.mscale_all_dim", 0, ["yarn.attention_factor", 1.0]),
        ("ministral3", "rope_parameters.llama_4_scaling_beta", 0.2, ["query_temperature.beta", 0.2, 0.1]),
        ("ministral3", "rope_parameters.llama_4_scaling_beta", 0, ["query_temperature", None]),
        ("ministral3", "tie_word_embeddings", False, ["tie_word_embeddings", False, "tied_embeddings"]),
    ],
)
def test_params_json_and_config_json_disagree(
    tmp_path: Path, name: str, field: str, value: Any, facts: list[object]
) -> None:
    write_patient(tmp_path, name, hf=False)
    write_json(tmp_path / "config.json", hf_config(family(name)))
    assert_healthy(tmp_path, quick=True)

    def plant(content: dict[str, Any]) -> None:
        *blocks, last = field.split(".")
        for block in blocks:
            content = content[block]
        content[last] = value

    change_json(tmp_path / "config.json", plant)
    # The factor of YaRN alone, without its temperature, is one more thing that is strange.
    n = 2 if "mscale_all_dim" in field or (field.endswith("scaling_beta") and not value) else 1
    severity = "suspicious" if field == "tie_word_embeddings" else "wrong"
    assert_finds(tmp_path, severity, tmp_path / "config.json", *facts, "params.json", n=n, quick=True)


def test_the_lengths_disagree(tmp_path: Path) -> None:
    write_patient(tmp_path, hf=False)
    write_json(tmp_path / "config.json", hf_config(family()) | {"max_position_embeddings": 4096})
    assert_finds(tmp_path, "suspicious", tmp_path / "config.json", "max_seq_len", 4096, 2048, quick=True)


def test_config_json_has_one_window_where_params_json_has_a_pattern(tmp_path: Path) -> None:
    """As in Ministral 8B."""
    write_patient(tmp_path, "interleaved_windows", hf=False)
    other = hf_config(family("interleaved_windows")) | {"model_type": "mistral"}
    del other["layer_types"]
    write_json(tmp_path / "config.json", other)
    assert_finds(tmp_path, "wrong", tmp_path / "config.json", "sliding_window", quick=True)


def lone(tmp_path: Path, file: str, content: dict[str, Any]) -> Path:
    write_json(tmp_path / file, content)
    return tmp_path / file


V3 = MODELS["Mistral-7B-v0.3"]
MINISTRAL_3 = MODELS["Ministral-3-8B-2512"]


@pytest.mark.parametrize(
    ("model", "field", "value", "facts"),
    [
        (MODELS["Mistral-7B-v0.1"], "sliding_window", None, ["sliding window", 4096]),
        (V3, "rope_theta", 1e4, ["rope_theta", 10000, 32768]),
        (MINISTRAL_3, "yarn.apply_scale", True, ["attention factor", 1.277, 1]),
        (MINISTRAL_3, "llama_4_scaling", None, ["attention factor", "query temperature"]),
        (MINISTRAL_3, "llama_4_scaling.original_max_position_embeddings", 8192, [8192, 16384]),
        (V3, "head_dimension", 128, ["head_dimension"]),
        (V3, "rope_theta", None, ["rope_theta", "missing", "1e+06"]),
    ],
)
def test_a_lone_params_json(
    tmp_path: Path, model: dict[str, Any], field: str, value: object, facts: list[object]
) -> None:
    content = params_json_of(model)
    block, _, last = field.rpartition(".")
    (content[block] if block else content)[last] = value
    path = lone(tmp_path, "params.json", content)
    assert_finds(path, "suspicious", path, *facts)


@pytest.mark.parametrize(
    ("absent", "assumed"), [("sliding_window", 4096), ("rms_norm_eps", 1e-06), ("rope_theta", 1e4)]
)
def test_absence_means_something_in_a_lone_config_json(tmp_path: Path, absent: str, assumed: float) -> None:
    content = config_json_of(MODELS["Mistral-7B-v0.1"], 4)
    del content[absent]
    path = lone(tmp_path, "config.json", content)
    assert_finds(path, "suspicious", path, absent, "missing", assumed)
    llama = {"model_type": "llama", "sliding_window": None, "intermediate_size": 11008, "max_position_embeddings": 2048}
    assert_healthy(lone(tmp_path, "other.json", content | llama))


def test_heads_that_follow_from_the_width_are_too_wide(tmp_path: Path) -> None:
    content = config_json_of(MODELS["Mistral-Nemo-Base-2407"], 5)
    assert_healthy(lone(tmp_path, "config.json", content))
    path = lone(tmp_path, "config.json", content | {"head_dim": None})
    assert_finds(path, "suspicious", path, "head_dim", 160, 128)


def test_embeddings_are_tied_at_one_level_alone(tmp_path: Path) -> None:
    content = config_json_of(MINISTRAL_3, 5)
    assert content["tie_word_embeddings"] is content["text_config"]["tie_word_embeddings"] is False
    path = lone(tmp_path, "config.json", content | {"tie_word_embeddings": True})
    assert_finds(path, "suspicious", path, "text_config.tie_word_embeddings", "tie_word_embeddings", True, False)


def test_embeddings_are_called_tied_beside_another_output_matrix(tmp_path: Path) -> None:
    write_patient(tmp_path, consolidated=False)
    change_json(tmp_path / "config.json", lambda content: content.update(tie_word_embeddings=True))
    assert_finds(tmp_path, "wrong", tmp_path / "config.json", "tie_word_embeddings", "output matrix", quick=True)

    def tie(weights: Tensors) -> None:
        weights["output.weight"] = weights["tok_embeddings.weight"]

    write_patient(tmp_path, consolidated=False)
    write_hf(tmp_path, family(), changed_weights("dense_windowed", tie))
    change_json(tmp_path / "config.json", lambda content: content.update(tie_word_embeddings=True))
    assert_healthy(tmp_path)


def test_a_gguf_file_has_lost_its_window(tmp_path: Path) -> None:
    fields = config_fields(SHAPES["mistral-7b"])
    del fields["llama.attention.sliding_window"]
    path = tmp_path / "tiny.gguf"
    path.write_bytes(gguf_bytes(fields))
    assert_finds(path, "suspicious", path, "sliding window", 4096)
    path.write_bytes(gguf_bytes(fields | {"llama.attention.sliding_window": 4096}))
    assert "weights" in " ".join(assert_healthy(path).left_out)


def test_a_gguf_file_has_lost_yarns_multiplier(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, FAMILIES["ministral3"])
    assert_healthy(path)
    write_gguf(path, FAMILIES["ministral3"], {"mistral3.rope.scaling.yarn_log_multiplier": 0.0})
    assert_finds(path, "suspicious", path, "attention factor", 1)
    write_gguf(path, FAMILIES["ministral3"], {"mistral3.attention.unheard_of": 1})
    assert_finds(path, "suspicious", path, "mistral3.attention.unheard_of")


def test_a_configuration_that_cannot_be_used(tmp_path: Path) -> None:
    for file, content, fact in (
        ("params.json", params_json_of(V3) | {"dim": -1}, "dim"),
        ("config.json", config_json_of(V3, 5) | {"hidden_act": "gelu"}, "hidden_act"),
    ):
        path = lone(tmp_path, file, content)
        assert_finds(path, "wrong", path, fact)
        path.write_text(json.dumps(content)[:-9])
        assert_finds(path, "wrong", path, "JSON")
