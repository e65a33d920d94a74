"""params.json and config.json: the published models, what absence means, and what is refused, by name."""

from __future__ import annotations

import copy
import json
import os
import time
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.errors import assert_says, refused, warned
from support.published import ALIKE, MODELS, ORIGINAL, PUBLISHED, config_json_of, params_json_of

from mistral_ref.config import MixtureOfExperts, ModelConfig, QueryTemperature, Yarn
from mistral_ref.errors import CheckpointError, ConfigError, MistralRefError, MistralRefWarning, short_repr
from mistral_ref.files.config_files import read_config
from mistral_ref.files.generation_config import read_eos_ids
from mistral_ref.files.json_file import MAX_JSON_BYTES, read_json

# A reading that should be silent is one: every warning that is not expected fails its test.
pytestmark = pytest.mark.filterwarnings("error")

Values = dict[str, Any]
GONE = object()
FULL, SLIDING = "full_attention", "sliding_attention"
M_16 = 1.2772588722239782  # 0.1 ln 16 + 1

# The least that each file must say, of one and the same model.
PARAMS: Values = {"dim": 64, "n_layers": 4, "n_heads": 8, "head_dim": 8, "hidden_dim": 96}
PARAMS |= {"vocab_size": 320, "norm_eps": 1e-5, "rope_theta": 1e6}
CONFIG: Values = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 96}
CONFIG |= {"vocab_size": 320, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None, "model_type": "mistral"}

# Files that say everything.
YARN = {"rope_type": "yarn", "factor": 16.0, ORIGINAL: 256}
FULL_PARAMS = PARAMS | {
    "n_kv_heads": 2,
    "sliding_window": [None, 8],
    "max_seq_len": 4096,
    "tied_embeddings": False,
    "moe": {"num_experts": 4, "num_experts_per_tok": 2},
    "yarn": {"factor": 16, "beta": 32, "alpha": 1, ORIGINAL: 256, "apply_scale": False},
    "llama_4_scaling": {"beta": 0.1, ORIGINAL: 256},
}
FULL_CONFIG = CONFIG | {
    "model_type": "mixtral",
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 8,
    "layer_types": [SLIDING] * 4,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "rope_scaling": YARN | {"beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 0.5, "truncate": True},
}
MINISTRAL_3_ROPE = YARN | {"rope_theta": 1e6, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}
MINISTRAL_3 = CONFIG | {"model_type": "ministral3", "head_dim": 16, "rope_parameters": MINISTRAL_3_ROPE}
del MINISTRAL_3["rope_theta"]
WRAPPER = {"model_type": "mistral3", "text_config": MINISTRAL_3, "tie_word_embeddings": False}
FULL_FILES = [("params.json", FULL_PARAMS), ("config.json", FULL_CONFIG), ("config.json", WRAPPER)]


def changed(values: Values, changes: Values) -> Values:
    """Return a deep copy with new values under dotted names; GONE takes a field out."""
    values = copy.deepcopy(values)
    for dotted, value in changes.items():
        *blocks, name = dotted.split(".")
        block = values
        for part in blocks:
            block = block.setdefault(part, {}) if isinstance(block, dict) else {}
        if isinstance(block, dict):
            block[name] = value
            if value is GONE:
                del block[name]
    return values


def dotted_names(values: Any, before: str = "") -> list[str]:
    """Return the dotted name of every field, blocks included."""
    if not isinstance(values, dict):
        return []
    return [name for key, value in values.items() for name in (before + key, *dotted_names(value, f"{before}{key}."))]


def read(directory: Path, name: str, values: Values, **changes: Any) -> ModelConfig:
    (directory / name).write_text(json.dumps(changed(values, changes)))
    return read_config(directory)


def refusal(directory: Path, name: str, values: Values, **changes: Any) -> str:
    """Return the message with which a file, alone in its directory, is refused, less the path."""
    for other in {"params.json", "config.json"} - {name}:
        (directory / other).unlink(missing_ok=True)
    with refused(ConfigError, directory / name) as caught:
        read(directory, name, values, **changes)
    message = str(caught.value)
    assert len(message) < 500
    return message.replace(str(directory / name), "")


# The published models


def known(model: Values, row_order: Any) -> ModelConfig:
    windows = model["sliding_window"] if isinstance(model["sliding_window"], list) else [model["sliding_window"]]
    yarn = temperature = None
    if rope := model.get("rope_scaling"):
        length: Values = {ORIGINAL: rope[ORIGINAL]}
        factors = {"factor": rope["factor"], "attention_factor": model["attention_factor"]}
        yarn = Yarn(beta_fast=32, beta_slow=1, **factors, **length)
        temperature = QueryTemperature(beta=0.1, **length) if "llama_4_scaling_beta" in rope else None
    return ModelConfig(
        **{field: model[field] for field in (*ALIKE, "max_seq_len")},
        sliding_window=tuple(windows * (model["n_layers"] // len(windows))),
        rope_row_order=row_order,
        yarn=yarn,
        query_temperature=temperature,
        moe=MixtureOfExperts(**model["moe"]) if "moe" in model else None,
        tied_embeddings=model.get("tied", False),
    )


@pytest.mark.parametrize("name", MODELS)
def test_every_spelling_of_a_published_model(name: str, tmp_path: Path) -> None:
    model = MODELS[name]
    for transformers in (4, 5):
        assert read(tmp_path, "config.json", config_json_of(model, transformers)) == known(model, "halves")
    # config.json stays beside it, and agrees.
    assert read(tmp_path, "params.json", params_json_of(model)) == known(model, "interleaved")


@pytest.mark.parametrize("name", PUBLISHED["files"])
def test_published_files_as_they_are(name: str, tmp_path: Path) -> None:
    for file_name, values in PUBLISHED["files"][name].items():
        expected = known(MODELS[name], "interleaved" if file_name == "params.json" else "halves")
        says_length = {"max_seq_len", "max_position_embeddings"} & values.keys()
        config = read(tmp_path, file_name, values)
        assert config == (expected if says_length else expected.replace(max_seq_len=None))


# YaRN and the query temperature


@pytest.mark.parametrize(
    ("rope", "attention_factor"),
    [
        ({}, M_16),  # only the factor, as in Yarn-Mistral
        ({"factor": 8}, 1.2079441541679836),
        ({"factor": 1}, 1.0),
        ({"mscale": 1, "mscale_all_dim": 1}, 1.0),  # Ministral 3
        ({"mscale": 2, "mscale_all_dim": 1}, 1.5545177444479564 / M_16),
        ({"factor": 64, "mscale": 1.0, "mscale_all_dim": 0.0}, 1.4158883083359673),  # Devstral 2 123B: 0 is absence
        ({"mscale": 0, "mscale_all_dim": 1}, M_16),
        ({"mscale": 0.5}, M_16),  # one without the other counts for nothing
        ({"mscale": None, "mscale_all_dim": 2, "attention_factor": None}, M_16),
        ({"mscale": 2, "mscale_all_dim": 1, "attention_factor": 1.5}, 1.5),
    ],
)
@pytest.mark.parametrize("block", ["rope_scaling", "rope_parameters"])
def test_attention_factor(rope: Values, attention_factor: float, block: str, tmp_path: Path) -> None:
    yarn = read(tmp_path, "config.json", CONFIG, **{block: YARN | rope}).yarn
    assert yarn is not None
    assert yarn.attention_factor == pytest.approx(attention_factor, rel=1e-15)


@pytest.mark.parametrize(("apply_scale", "attention_factor"), [(False, 1.0), (True, M_16)])
def test_yarn_in_params_json(apply_scale: bool, attention_factor: float, tmp_path: Path) -> None:
    length: Values = {ORIGINAL: 256}
    block = length | {"factor": 16, "beta": 4, "alpha": 2, "apply_scale": apply_scale}
    expected = Yarn(factor=16, beta_fast=4, beta_slow=2, attention_factor=attention_factor, **length)
    assert read(tmp_path, "params.json", PARAMS, yarn=block).yarn == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"beta_fast": 32, "beta_slow": 1, "truncate": True, ORIGINAL: 256, "factor": 16}),
        ({"rope_parameters.beta_fast": None, "rope_parameters.beta_slow": 0}, {"beta_fast": 32, "beta_slow": 1}),
        ({"rope_parameters.beta_fast": 4, "rope_parameters.beta_slow": 2}, {"beta_fast": 4, "beta_slow": 2}),
        ({"rope_parameters.truncate": False}, {"truncate": False}),
        ({f"rope_parameters.{ORIGINAL}": GONE}, {ORIGINAL: 4096}),  # max_position_embeddings
        ({ORIGINAL: 512}, {ORIGINAL: 512}),  # the top level goes first
        ({"rope_parameters.factor": None}, {"factor": 16, "attention_factor": M_16}),  # 4096 / 256
    ],
)
def test_yarn_in_config_json(changes: Values, expected: Values, tmp_path: Path) -> None:
    base = CONFIG | {"max_position_embeddings": 4096, "rope_parameters": YARN}
    yarn = read(tmp_path, "config.json", base, **changes).yarn
    assert {field: getattr(yarn, field) for field in expected} == expected


def test_rope_scaling_goes_before_rope_parameters_and_these_before_rope_theta(tmp_path: Path) -> None:
    base = CONFIG | {"rope_parameters": YARN | {"rope_theta": 5e5}}
    config = read(tmp_path, "config.json", base)
    assert (config.rope_theta, config.yarn is None) == (5e5, False)
    config = read(tmp_path, "config.json", base, rope_scaling={"type": "default"})
    assert (config.rope_theta, config.yarn is None) == (1e6, True)


def test_query_temperature(tmp_path: Path) -> None:
    expected = QueryTemperature(beta=0.1, original_max_position_embeddings=256)
    plain = {"rope_type": "default", "llama_4_scaling_beta": 0.1, ORIGINAL: 256}
    assert read(tmp_path, "config.json", CONFIG, rope_parameters=plain).query_temperature == expected
    assert read(tmp_path, "config.json", MINISTRAL_3).query_temperature == expected
    beta_0 = {"rope_parameters.llama_4_scaling_beta": 0.0}
    assert read(tmp_path, "config.json", MINISTRAL_3, **beta_0).query_temperature is None
    (tmp_path / "config.json").unlink()
    block = {"beta": 0.1, ORIGINAL: 256}
    for value, temperature in ((block, expected), (block | {"beta": 0}, None), (None, None)):
        assert read(tmp_path, "params.json", PARAMS, llama_4_scaling=value).query_temperature == temperature


# What absence means


@pytest.mark.parametrize(
    ("model_type", "theta", "window", "eps"),
    [("mistral", 1e4, 4096, 1e-6), ("mixtral", 1e6, None, 1e-5), ("llama", 1e4, None, 1e-6)],
)
def test_absence_by_model_type(model_type: str, theta: float, window: int | None, eps: float, tmp_path: Path) -> None:
    gone = dict.fromkeys(("rope_theta", "sliding_window", "rms_norm_eps"), GONE)
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    config = read(tmp_path, "config.json", CONFIG | experts, model_type=model_type, **gone)
    assert (config.rope_theta, config.sliding_window, config.norm_eps) == (theta, (window,) * 4, eps)


def test_absence_in_ministral(tmp_path: Path) -> None:
    base = CONFIG | {"model_type": "ministral"}
    config = read(tmp_path, "config.json", base, sliding_window=GONE, rms_norm_eps=GONE)
    assert (config.sliding_window, config.norm_eps) == ((4096,) * 4, 1e-6)
    assert_says(refusal(tmp_path, "config.json", base, rope_theta=GONE), "rope_parameters.rope_theta", "missing")


@pytest.mark.parametrize(
    "field", ["rope_parameters.llama_4_scaling_beta", "sliding_window", "rms_norm_eps", "head_dim"]
)
def test_nothing_is_assumed_in_ministral3(field: str, tmp_path: Path) -> None:
    assert_says(refusal(tmp_path, "config.json", MINISTRAL_3, **{field: GONE}), field, "missing")
    no_rope = refusal(tmp_path, "config.json", MINISTRAL_3, rope_parameters=GONE)
    assert_says(no_rope, "rope_parameters.rope_type", "missing")


NEEDED = [
    ("params.json", FULL_PARAMS, "dim n_layers n_heads head_dim hidden_dim vocab_size norm_eps rope_theta"),
    (
        "params.json",
        FULL_PARAMS,
        "yarn.factor yarn.beta yarn.alpha yarn.apply_scale moe.num_experts llama_4_scaling.beta",
    ),
    ("params.json", FULL_PARAMS, f"yarn.{ORIGINAL} llama_4_scaling.{ORIGINAL} moe.num_experts_per_tok"),
    ("config.json", FULL_CONFIG, "model_type hidden_size num_hidden_layers num_attention_heads intermediate_size"),
    ("config.json", FULL_CONFIG, "vocab_size num_local_experts num_experts_per_tok rope_scaling.factor"),
    ("config.json", WRAPPER, "text_config.model_type text_config.hidden_size text_config.rope_parameters.factor"),
    ("config.json", CONFIG | {"rope_parameters": {"llama_4_scaling_beta": 1}}, f"rope_parameters.{ORIGINAL}"),
]


@pytest.mark.parametrize(("name", "base", "fields"), NEEDED)
def test_missing_field(name: str, base: Values, fields: str, tmp_path: Path) -> None:
    for field in fields.split():
        assert_says(refusal(tmp_path, name, base, **{field: GONE}), field, "missing")


@pytest.mark.parametrize("absent", [GONE, None])
def test_heads_that_are_not_given(absent: Any, tmp_path: Path) -> None:
    assert read(tmp_path, "config.json", CONFIG, num_key_value_heads=absent).n_kv_heads == 8
    assert read(tmp_path, "config.json", CONFIG, head_dim=absent).head_dim == 8
    message = refusal(tmp_path, "config.json", CONFIG, head_dim=absent, hidden_size=60)
    assert_says(message, "num_attention_heads", 8, "hidden_size", 60, "head_dim")
    (tmp_path / "config.json").unlink()
    assert read(tmp_path, "params.json", PARAMS, n_kv_heads=absent).n_kv_heads == 8


@pytest.mark.parametrize("absent", [GONE, None])
@pytest.mark.parametrize(("window", "theta"), [(4096, 1e4), ("4096", 1e4), (GONE, 1e6), (None, 1e6)])
def test_theta_absent_from_params_json(window: Any, theta: float, absent: Any, tmp_path: Path) -> None:
    with warned(tmp_path / "params.json", "rope_theta", f"{theta:g}"):
        config = read(tmp_path, "params.json", PARAMS, rope_theta=absent, sliding_window=window)
    assert config.rope_theta == theta


def test_longest_sequence(tmp_path: Path) -> None:
    assert read(tmp_path, "config.json", CONFIG).max_seq_len is None
    assert read(tmp_path, "config.json", CONFIG, max_position_embeddings=7).max_seq_len == 7
    (tmp_path / "config.json").unlink()
    assert read(tmp_path, "params.json", PARAMS).max_seq_len is None
    assert read(tmp_path, "params.json", PARAMS, max_position_embeddings=7).max_seq_len == 7
    assert read(tmp_path, "params.json", PARAMS, max_seq_len=9, max_position_embeddings=7).max_seq_len == 9


@pytest.mark.parametrize("top", [GONE, None, True, False])
@pytest.mark.parametrize("text", [GONE, None, True, False])
def test_tying_in_a_wrapper(top: Any, text: Any, tmp_path: Path) -> None:
    tying = {"tie_word_embeddings": top, "text_config.tie_word_embeddings": text}
    config = read(tmp_path, "config.json", WRAPPER, **tying)
    assert config.tied_embeddings == (True in (top, text) or False not in (top, text))


@pytest.mark.parametrize(("value", "tied"), [(GONE, False), (False, False), (True, True)])
def test_tying_without_a_wrapper(value: Any, tied: bool, tmp_path: Path) -> None:
    assert read(tmp_path, "config.json", CONFIG, tie_word_embeddings=value).tied_embeddings == tied
    assert read(tmp_path, "params.json", PARAMS, tied_embeddings=value).tied_embeddings == tied


# Windows


@pytest.mark.parametrize("field", ["sliding_window", "_sliding_window"])
@pytest.mark.parametrize(
    ("value", "windows"),
    [
        (None, (None,) * 4),
        (8, (8,) * 4),
        (2**39, (2**39,) * 4),
        ([8], (8,) * 4),
        ([None, 8], (None, 8, None, 8)),
        ([None, 8, 16, 8], (None, 8, 16, 8)),
        ("8", (8,) * 4),
        ("null", (None,) * 4),
        ("[null, 8]", (None, 8, None, 8)),
        ("[None, 8]", (None, 8, None, 8)),
    ],
)
def test_windows_in_params_json(field: str, value: Any, windows: tuple[int | None, ...], tmp_path: Path) -> None:
    assert read(tmp_path, "params.json", PARAMS, **{field: value}).sliding_window == windows


@pytest.mark.parametrize("field", ["sliding_window", "_sliding_window"])
@pytest.mark.parametrize(
    ("value", "found"),
    [
        *[(value, repr(value)) for value in (0, 8.0, True, "", "eight", "[8,")],
        *[([8] * length, f"{length} entries") for length in (0, 3, 8)],
        *[([8, 0], "0"), ([8, "8"], "'8'"), ("8.5", "8.5"), ('"8"', "'8'")],
    ],
)
def test_windows_refused_in_params_json(field: str, value: Any, found: str, tmp_path: Path) -> None:
    assert_says(refusal(tmp_path, "params.json", PARAMS, **{field: value}), field, found)


@pytest.mark.parametrize("model_type", ["mistral", "ministral3"])
def test_layer_types_mean_something_in_ministral_alone(model_type: str, tmp_path: Path) -> None:
    base = CONFIG | {
        "model_type": model_type,
        "rope_parameters": YARN | {"llama_4_scaling_beta": 0, "rope_theta": 1e6},
        "head_dim": 8,
    }
    assert read(tmp_path, "config.json", base, sliding_window=8, layer_types=[SLIDING] * 4).sliding_window == (8,) * 4
    assert (
        read(tmp_path, "config.json", base, sliding_window=None, layer_types=[FULL] * 4).sliding_window == (None,) * 4
    )
    for layer_types in ([FULL, SLIDING] * 2, [FULL] * 4):
        message = refusal(tmp_path, "config.json", base, sliding_window=8, layer_types=layer_types)
        assert_says(message, "layer_types", "sliding_window", 8, "ministral")


def test_layer_types(tmp_path: Path) -> None:
    base = CONFIG | {"model_type": "ministral", "layer_types": [FULL, SLIDING, SLIDING, FULL]}
    assert read(tmp_path, "config.json", base, sliding_window=8).sliding_window == (None, 8, 8, None)
    assert read(tmp_path, "config.json", base, sliding_window=8, layer_types=None).sliding_window == (8,) * 4
    assert read(tmp_path, "config.json", base, layer_types=[FULL] * 4).sliding_window == (None,) * 4
    assert_says(refusal(tmp_path, "config.json", base), "sliding_window", None, "whole number")
    wrongs: list[Any] = [
        [FULL] * 3,
        [FULL] * 5,
        [FULL, SLIDING, 8, FULL],
        ["chunked_attention"] * 4,
        [[]] * 4,
        FULL,
        {},
    ]
    for wrong in wrongs:
        message = refusal(tmp_path, "config.json", base, layer_types=wrong)
        assert_says(message, "layer_types", short_repr(wrong), FULL, SLIDING, "4 layers")


# Refusals


@pytest.mark.parametrize(
    ("name", "base", "field", "value"),
    [
        ("config.json", CONFIG, "hidden_act", "gelu"),
        ("config.json", CONFIG, "attention_bias", True),
        ("config.json", CONFIG, "mlp_bias", True),
        ("config.json", CONFIG, "partial_rotary_factor", 0.5),
        ("config.json", CONFIG, "rope_parameters.partial_rotary_factor", 0.5),
        ("config.json", CONFIG, "rope_scaling.partial_rotary_factor", 0.5),
        ("config.json", CONFIG, "kv_lora_rank", 512),
        ("config.json", CONFIG, "q_lora_rank", 1536),
        ("config.json", CONFIG | {"model_type": "llama"}, "sliding_window", 8),
        ("config.json", CONFIG, "rope_parameters", {FULL: {"rope_theta": 1e6}, SLIDING: {"rope_theta": 1e4}}),
        ("config.json", WRAPPER, "text_config.hidden_act", "gelu"),
        ("params.json", PARAMS, "model_type", "mamba"),
        ("params.json", PARAMS, "lora", {"rank": 64}),
        ("params.json", PARAMS, "kv_lora_rank", 512),
        ("params.json", PARAMS, "q_lora_rank", 1536),
        ("params.json", PARAMS, "activation", "gelu"),
        ("params.json", PARAMS, "use_biases", True),
        ("params.json", PARAMS, "causal", False),
        ("params.json", PARAMS, "ada_rms_norm_t_cond", True),
    ],
)
def test_what_would_be_silently_wrong_is_refused(
    name: str, base: Values, field: str, value: Any, tmp_path: Path
) -> None:
    found = "kind of layer" if field == "rope_parameters" else short_repr(value)
    assert_says(refusal(tmp_path, name, base, **{field: value}), field, found)


def test_harmless_values_of_the_same_fields(tmp_path: Path) -> None:
    harmless = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": None, "partial_rotary_factor": 1.0}
    read(tmp_path, "config.json", CONFIG, q_lora_rank=None, **harmless)
    harmless = {"model_type": "transformer", "activation": "silu", "causal": True, "use_biases": False}
    read(tmp_path, "params.json", PARAMS, lora=None, **harmless)


@pytest.mark.parametrize("rope_type", ["linear", "dynamic", "llama3", "longrope", "proportional", 1, ["yarn"]])
@pytest.mark.parametrize("field", ["rope_scaling.type", "rope_parameters.rope_type"])
def test_rope_type_refused(rope_type: Any, field: str, tmp_path: Path) -> None:
    message = refusal(tmp_path, "config.json", CONFIG, **{field: rope_type})
    assert_says(message, field, repr(rope_type), "default", "yarn")


@pytest.mark.parametrize(
    "model_type", ["mistral4", "voxtral", "voxtral_realtime", "mamba2", "qwen2", "gemma", "Mistral", "", None, 1, []]
)
def test_model_type_refused(model_type: Any, tmp_path: Path) -> None:
    message = refusal(tmp_path, "config.json", CONFIG, model_type=model_type)
    supported = ("mistral", "mixtral", "ministral", "ministral3", "llama", "mistral3")
    assert_says(message, "model_type", repr(model_type), *supported)
    message = refusal(tmp_path, "config.json", WRAPPER, **{"text_config.model_type": model_type})
    assert_says(message, "text_config.model_type", repr(model_type), "mistral", "ministral3")


@pytest.mark.parametrize(
    ("value", "found"),
    [
        *[(-1, "-1"), ("8.5", "8.5"), ([[1]], "[1]"), (float("nan"), "nan"), (float("inf"), "inf")],
        pytest.param(10**400, short_repr(10**400), id="huge"),
    ],
)
@pytest.mark.parametrize(("name", "base"), FULL_FILES)
def test_no_field_takes_a_mistyped_or_absurd_value(
    value: Any, found: str, name: str, base: Values, tmp_path: Path
) -> None:
    for field in dotted_names(base):
        assert_says(refusal(tmp_path, name, base, **{field: value}), field, found)


@pytest.mark.parametrize("value", [True, [1], 0, 1.5, 2**41])
def test_no_count_takes_a_value_out_of_range(value: Any, tmp_path: Path) -> None:
    params = "dim n_layers n_heads n_kv_heads head_dim hidden_dim vocab_size max_seq_len"
    params += f" moe.num_experts moe.num_experts_per_tok yarn.{ORIGINAL} llama_4_scaling.{ORIGINAL}"
    config = (
        "hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size vocab_size"
    )
    config += f" max_position_embeddings sliding_window num_local_experts num_experts_per_tok rope_scaling.{ORIGINAL}"
    for name, base, fields in (("config.json", FULL_CONFIG, config), ("params.json", FULL_PARAMS, params)):
        for field in fields.split():
            message = refusal(tmp_path, name, base, **{field: value})
            assert_says(message, field, value, "whole number", 1)


@pytest.mark.parametrize(
    ("name", "base", "field", "value", "expected"),
    [
        ("params.json", PARAMS, "n_kv_heads", 3, ("divisor", "n_heads", 8)),
        ("config.json", CONFIG, "num_key_value_heads", 3, ("divisor", "num_attention_heads", 8)),
        ("config.json", CONFIG, "head_dim", 7, ("even",)),
        ("config.json", WRAPPER, "text_config.head_dim", 7, ("even",)),
        ("params.json", FULL_PARAMS, "yarn.factor", 0.5, ("at least", 1)),
        ("config.json", FULL_CONFIG, "rope_scaling.factor", 0.5, ("at least", 1)),
        ("params.json", FULL_PARAMS, "moe.num_experts_per_tok", 5, ("at most", "moe.num_experts", 4)),
        ("config.json", FULL_CONFIG, "num_experts_per_tok", 5, ("at most", "num_local_experts", 4)),
        ("config.json", FULL_CONFIG, "rope_scaling", "yarn", ("object",)),
        ("params.json", FULL_PARAMS, "moe", [8, 2], ("object",)),
        ("config.json", WRAPPER, "text_config.tie_word_embeddings", "dim", ("true", "false")),
        ("params.json", PARAMS, "tied_embeddings", 1, ("true", "false")),
        ("params.json", FULL_PARAMS, "yarn.apply_scale", 1, ("true", "false")),
        ("config.json", FULL_CONFIG, "hidden_size", "dim", ("whole number",)),
    ],
)
def test_inconsistent_values(
    name: str, base: Values, field: str, value: Any, expected: tuple[object, ...], tmp_path: Path
) -> None:
    assert_says(refusal(tmp_path, name, base, **{field: value}), field, repr(value), *expected)


@pytest.mark.parametrize(
    ("field", "ours", "theirs", "value"),
    [
        ("rope_theta", "rope_theta", "rope_theta", 5e5),
        ("max_seq_len", "max_seq_len", "max_position_embeddings", 32768),
        ("tied_embeddings", "tied_embeddings", "tie_word_embeddings", True),
    ],
)
def test_what_only_config_json_says_counts(field: str, ours: str, theirs: str, value: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {theirs: value}))
    assert getattr(read(tmp_path, "params.json", PARAMS, **{ours: GONE}), field) == value


def test_a_value_that_reads_like_a_field_is_shown_as_it_is(tmp_path: Path) -> None:
    message = refusal(tmp_path, "config.json", CONFIG, model_type='my "dim" n_layers\' model')
    assert_says(message, "model_type", "'my \"dim\" n_layers\\' model'")


def test_a_billion_layers_fail_at_once(tmp_path: Path) -> None:
    start = time.process_time()
    assert_says(refusal(tmp_path, "config.json", CONFIG, num_hidden_layers=10**9), "num_hidden_layers", 10**9)
    assert_says(refusal(tmp_path, "params.json", PARAMS, n_layers=10**9, sliding_window=[8]), "n_layers", 10**9)
    assert time.process_time() - start < 0.5


# Both files, neither, and fields of no meaning here


def test_neither_file(tmp_path: Path) -> None:
    with refused(ConfigError, tmp_path, "params.json", "config.json"):
        read_config(tmp_path)


def test_params_json_wins_and_it_is_said_where_config_json_differs(tmp_path: Path) -> None:
    config_json = tmp_path / "config.json"
    config_json.write_text(json.dumps(CONFIG | {"sliding_window": 8, "rope_theta": 1e4, "rope_scaling": YARN}))
    yarn = Yarn(factor=16, beta_fast=32, beta_slow=1, attention_factor=M_16, original_max_position_embeddings=256)
    values = ("rope_theta", 1e4, 1e6, "sliding_window", 8, (None, 8, None, 8), "yarn", yarn, None)
    with warned(config_json, "params.json", *values) as caught:
        config = read(tmp_path, "params.json", PARAMS, sliding_window=[None, 8])
    assert (config.sliding_window, config.rope_theta, config.yarn) == ((None, 8, None, 8), 1e6, None)
    assert len(caught) == 1


def test_saying_less_is_not_disagreeing(tmp_path: Path) -> None:
    text = CONFIG | {"max_position_embeddings": 4096}  # a length; nothing about tying
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral3", "text_config": text}))
    assert not read(tmp_path, "params.json", PARAMS).tied_embeddings
    with warned("max_seq_len", 4096, "params.json", 64):
        assert read(tmp_path, "params.json", PARAMS, max_seq_len=64).max_seq_len == 64


@pytest.mark.parametrize("content", ["{", '{"model_type": "mistral4"}', "[]"])
def test_config_json_of_no_use_beside_params_json(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with warned(tmp_path / "config.json", "params.json"):
        assert read(tmp_path, "params.json", PARAMS).dim == 64


def test_params_json_of_no_use_is_not_passed_over(tmp_path: Path) -> None:
    read(tmp_path, "config.json", CONFIG)
    assert_says(refusal(tmp_path, "params.json", PARAMS, dim=GONE), "dim", "missing")
    (tmp_path / "params.json").unlink()
    (tmp_path / "params.json").symlink_to("lost")
    with refused(ConfigError, tmp_path / "params.json", "No such file"):
        read_config(tmp_path)


def test_unknown_fields_of_params_json(tmp_path: Path) -> None:
    harmless = {"vision_encoder": {"dim": 8}, "audio": {}, "quantization": {"qformat_weight": "fp8_e4m3"}}
    read(tmp_path, "params.json", FULL_PARAMS, max_batch_size=4, multimodal={}, model_parallel=1, **harmless)
    with warned(tmp_path / "params.json", "unknown", "'logit_cap'", "'moe.shared_experts'"):
        read(tmp_path, "params.json", FULL_PARAMS, **{"logit_cap": 30.0, "moe.shared_experts": 1})
    with warned(tmp_path / "params.json", "unknown", "'a\\n0'") as caught:
        read(tmp_path, "params.json", PARAMS, **{f"a\n{i}": i for i in range(1000)})
    assert len(str(caught[0].message)) < 1000


# End-of-text ids


@pytest.mark.parametrize(
    ("generation", "config", "ids"),
    [
        (None, None, ()),
        (None, {}, ()),
        (None, {"eos_token_id": 2}, (2,)),
        (None, {"eos_token_id": None, "text_config": {"eos_token_id": 3}}, (3,)),
        (None, {"eos_token_id": 2, "text_config": {"eos_token_id": 3}}, (2,)),
        ({"eos_token_id": [2, 0]}, {"eos_token_id": 3}, (2, 0)),
        ({"bos_token_id": 1}, {"eos_token_id": 3}, (3,)),
    ],
)
def test_eos_ids(generation: Any, config: Any, ids: tuple[int, ...], tmp_path: Path) -> None:
    for name, values in (("generation_config.json", generation), ("config.json", config)):
        if values is not None:
            (tmp_path / name).write_text(json.dumps(values))
    assert read_eos_ids(tmp_path) == ids


@pytest.mark.parametrize("ids", [-1, "2", 2.0, True, {}, [2, -1], [[2]], [None]])
def test_eos_ids_refused(ids: Any, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    with refused(ConfigError, tmp_path / "generation_config.json", "eos_token_id", repr(ids), "token ids"):
        read_eos_ids(tmp_path)


# Hostile files


def read_in_bounds(directory: Path, name: str, content: bytes) -> str:
    """Read one file; return the one-line refusal or "". Nothing else may happen, nor take long or much memory."""
    path = directory / name
    path.write_bytes(content)
    message, start = "", time.process_time()
    tracemalloc.start()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MistralRefWarning)
            (read_eos_ids if name == "generation_config.json" else read_config)(directory)
    except MistralRefError as error:
        message = str(error)
        assert_says(message, path)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        path.unlink()
    assert time.process_time() - start < 1
    assert peak < len(content) + 16 * 2**20
    return message


def filled(unit: str) -> bytes:
    """Return a list of `unit` as long as a file may be."""
    return ('{"a":[' + unit * ((MAX_JSON_BYTES - 9) // len(unit)) + "1]}").encode()


@pytest.mark.parametrize(
    ("content", "facts"),
    [
        (b"", ("Expecting value",)),
        (b"{", ("Expecting property name",)),
        (b"\xff\xfe", ("decode",)),
        (b"[]", ("[]", "object")),
        (b'"' + b"a" * 1000 + b'"', (short_repr("a" * 1000), "object")),
        (b'{"dim": 1, "dim": 1}', ("'dim'", "twice")),
        (b'{"a": {"\\n": 1, "b": 1, "\\n": 2}}', (r"'\n'", "twice")),
        (b'{"dim": ' + b"9" * 5000 + b"}", ("Exceeds the limit",)),
        (b"[" * 10_000 + b"]" * 10_000, ("nested",)),
        (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, ("nested",)),
        (b"{}" + b" " * (MAX_JSON_BYTES - 1), (MAX_JSON_BYTES, "bytes")),
        (filled("[],"), (20000, "lists", "objects")),
        (filled("{},"), (20000, "lists", "objects")),
        (filled("[" * 400 + "]" * 400 + ","), (20000, "lists", "objects")),
        (filled("1e9,"), ("n_layers", "missing")),
        (b"{" + b",".join(b'"%x":1e9' % i for i in range(42_000)) + b',"\xf0\x9f\x98\x80":1}', ("n_layers", "missing")),
        (b'{"sliding_window": "' + b"[" * 10_000 + b'", "n_layers": 4}', ("sliding_window", "'[[[")),
    ],
)
def test_hostile_files(content: bytes, facts: tuple[object, ...], tmp_path: Path) -> None:
    assert_says(read_in_bounds(tmp_path, "params.json", content), tmp_path / "params.json", *facts)


def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    (tmp_path / "directory").mkdir()
    for name in ("fifo", "zeros", "directory"):
        with refused(CheckpointError, tmp_path / name, "regular file"):
            read_json(tmp_path / name, CheckpointError)
    (tmp_path / "file").write_text('{"a": 1}')
    (tmp_path / "link").symlink_to("file")
    assert read_json(tmp_path / "link") == {"a": 1}


FILES = [*FULL_FILES, ("generation_config.json", {"eos_token_id": [2, 3]})]
NUMBERS = [0, -1, 1, 2, 0.5, 1e30, 1e308, 10**400, float("nan"), float("-inf")]
ODD: list[Any] = [*NUMBERS, None, True, "", "8", "[8", "\n", [], {}, [[]]]
VALUES = st.just(GONE) | st.recursive(
    st.sampled_from(ODD).map(copy.deepcopy) | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


@given(file=st.sampled_from(FILES), data=st.data())
@settings(max_examples=400)
def test_changed_files_load_or_are_refused(file: Any, data: st.DataObject, tmp_path_factory: Any) -> None:
    name, base = file
    changes = data.draw(st.dictionaries(st.sampled_from(dotted_names(base)), VALUES, min_size=1, max_size=3))
    read_in_bounds(tmp_path_factory.getbasetemp(), name, json.dumps(changed(base, changes)).encode())


@given(file=st.sampled_from(FILES), noise=st.binary(max_size=20), cut=st.floats(0, 1), rest=st.booleans())
@settings(max_examples=200)
def test_broken_bytes_are_refused(file: Any, noise: bytes, cut: float, rest: bool, tmp_path_factory: Any) -> None:
    name, base = file
    content = json.dumps(base).encode()
    at = int(cut * len(content))
    read_in_bounds(tmp_path_factory.getbasetemp(), name, content[:at] + noise + content[at:] * rest)
