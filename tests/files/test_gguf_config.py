"""The configuration in a GGUF file: every field, what its absence means, and what is refused."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import FAMILIES
from support.errors import refused, warned
from support.gguf_files import write_gguf

import mistral_ref
from mistral_ref.config import ModelConfig
from mistral_ref.errors import ConfigError, InputError
from mistral_ref.files.gguf import open_gguf
from mistral_ref.files.gguf_config import gguf_config, lost_window
from mistral_ref.files.gguf_writer import Stored, Typed, config_fields, gguf_bytes

TINY = FAMILIES["dense_no_window"].config
LONG = FAMILIES["ministral3"].config
MIXTURE = FAMILIES["mixtral"].config
FIRST = TINY.replace(  # Mistral 7B v0.1
    dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, head_dim=128, hidden_dim=14336, vocab_size=32000, rope_theta=1e4,
    sliding_window=(None,) * 32,
)  # fmt: skip


def read(path: Path, config: ModelConfig, architecture: str = "llama", **changes: Any) -> ModelConfig:
    """Return the configuration of a file with these fields; a change of None takes a field away."""
    fields = config_fields(config, architecture)
    for field, value in changes.items():
        name = field.replace("__", ".")
        fields[name if name.startswith("general.") else f"{architecture}.{name}"] = value
    tensors = {"output.weight": Stored("F32", (1,), bytes(4))}
    file = path / "a.gguf"
    file.write_bytes(gguf_bytes({name: value for name, value in fields.items() if value is not None}, tensors))
    return gguf_config(open_gguf(file))


@pytest.mark.parametrize("config", [TINY, MIXTURE, LONG, FAMILIES["yarn_mistral"].config, FIRST])
def test_every_field(config: ModelConfig, tmp_path: Path) -> None:
    architecture = "mistral3" if config is LONG else "llama"
    assert read(tmp_path, config, architecture) == config.replace(tied_embeddings=False)


def test_what_absent_fields_mean(tmp_path: Path) -> None:
    absent = dict.fromkeys(["attention__head_count_kv", "rope__freq_base", "rope__dimension_count"])
    absent |= dict.fromkeys(["attention__value_length", "general__type", "context_length"])
    config = read(tmp_path, TINY, **absent)
    assert (config.n_kv_heads, config.rope_theta, config.max_seq_len) == (TINY.n_heads, 1e4, None)
    square = TINY.replace(head_dim=TINY.dim // TINY.n_heads)
    assert read(tmp_path, square, attention__key_length=None).head_dim == square.head_dim
    with refused(ConfigError, "llama.attention.head_count", 40, 3):
        read(tmp_path, TINY, attention__key_length=None, attention__head_count=3)


def test_numbers_for_each_layer_are_one_number(tmp_path: Path) -> None:
    same = Typed("u32", [TINY.hidden_dim] * 3)
    heads = Typed("i32", [TINY.n_heads] * 3)
    assert read(tmp_path, TINY, feed_forward_length=same, attention__head_count=heads) == TINY
    with refused(ConfigError, "llama.feed_forward_length", "[44, 45]"):
        read(tmp_path, TINY, feed_forward_length=Typed("u32", [44, 45]))
    with refused(ConfigError, "llama.feed_forward_length"):
        read(tmp_path, TINY, feed_forward_length=Typed("u32", []))


def test_ids_are_counted_if_no_field_says_how_many(tmp_path: Path) -> None:
    fields = config_fields(TINY)
    del fields["llama.vocab_size"]
    path = tmp_path / "a.gguf"
    rows = {"token_embd.weight": Stored("F32", (7, 2), bytes(56))}
    path.write_bytes(gguf_bytes(fields, rows))
    assert gguf_config(open_gguf(path)).vocab_size == 7
    path.write_bytes(gguf_bytes(fields | {"tokenizer.ggml.tokens": ["a", "b", "c"]}, rows))
    assert gguf_config(open_gguf(path)).vocab_size == 3
    path.write_bytes(gguf_bytes(fields))
    with refused(ConfigError, path, "llama.vocab_size"):
        gguf_config(open_gguf(path))


@pytest.mark.parametrize(
    ("changes", "factor"),
    [
        ({"rope__scaling__yarn_log_multiplier": 1.0}, 1.0),
        ({"rope__scaling__yarn_log_multiplier": None}, 1 + 0.1 * math.log(16)),
        ({"rope__scaling__yarn_log_multiplier": 0.0}, 1 + 0.1 * math.log(16)),
        ({"rope__scaling__yarn_log_multiplier": 0.5}, (1 + 0.1 * math.log(16)) / (1 + 0.05 * math.log(16))),
        ({"rope__scaling__attn_factor": 2.0}, 2.0),
    ],
)
def test_the_magnitude_of_yarn(changes: dict[str, Any], factor: float, tmp_path: Path) -> None:
    yarn = read(tmp_path, LONG, "mistral3", **changes).yarn
    assert yarn is not None
    assert yarn.attention_factor == pytest.approx(factor, rel=1e-12)
    assert yarn.truncate


def test_what_absent_fields_of_yarn_mean(tmp_path: Path) -> None:
    absent = {
        f"rope__scaling__{name}": None for name in ("yarn_beta_fast", "yarn_beta_slow", "original_context_length")
    }
    config = read(tmp_path, LONG, "mistral3", **absent)
    assert config.yarn is not None
    assert (config.yarn.beta_fast, config.yarn.beta_slow) == (32, 1)
    assert config.yarn.original_max_position_embeddings == config.max_seq_len == 2048
    with refused(ConfigError, "mistral3.rope.scaling.factor"):
        read(tmp_path, LONG, "mistral3", rope__scaling__factor=None)
    with refused(ConfigError, "mistral3.rope.scaling.original_context_length"):
        read(tmp_path, LONG, "mistral3", **absent, context_length=None)


def test_the_query_temperature_counts_in_the_first_context(tmp_path: Path) -> None:
    assert (
        read(tmp_path, LONG, "mistral3", attention__temperature_length=48).query_temperature == LONG.query_temperature
    )
    with refused(ConfigError, "mistral3.attention.temperature_length", 64, 48):
        read(tmp_path, LONG, "mistral3", attention__temperature_length=64)
    assert read(tmp_path, LONG, "mistral3", attention__temperature_scale=None).query_temperature is None


@pytest.mark.parametrize(
    "changes", [{"type": "none"}, {"type": "linear"}, {"type": "linear", "factor": 1.0}, {"factor": 0.0}]
)
def test_scalings_that_change_nothing(changes: dict[str, Any], tmp_path: Path) -> None:
    assert read(tmp_path, TINY, **{f"rope__scaling__{name}": value for name, value in changes.items()}).yarn is None


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"general__architecture": "qwen2"}, ("general.architecture", "'qwen2'", "llama", "mistral3")),
        ({"general__architecture": "deepseek2"}, ("general.architecture", "'deepseek2'")),
        ({"general__architecture": None}, ("general.architecture", None)),
        ({"general__architecture": Typed("u8", [1])}, ("general.architecture",)),
        ({"general__type": "adapter"}, ("general.type", "'adapter'", "model")),
        ({"block_count": None}, ("llama.block_count", "missing")),
        ({"block_count": "three"}, ("llama.block_count", "'three'")),
        ({"block_count": 2**31}, ("llama.block_count", 2**31)),
        ({"embedding_length": 0}, ("llama.embedding_length", 0)),
        ({"attention__head_count": 5}, ("llama.attention.head_count_kv", 2, 5)),
        ({"attention__layer_norm_rms_epsilon": float("nan")}, ("llama.attention.layer_norm_rms_epsilon", "nan")),
        ({"attention__value_length": 12}, ("llama.attention.value_length", 12, 10)),
        ({"rope__dimension_count": 5}, ("llama.rope.dimension_count", 5, 10)),
        ({"rope__scaling__type": "longrope"}, ("llama.rope.scaling.type", "'longrope'")),
        ({"rope__scaling__factor": 4.0}, ("llama.rope.scaling.type", "4.0")),
        ({"rope__scale_linear": 2.0}, ("llama.rope.scale_linear", "2.0")),
        ({"attention__kv_lora_rank": 512}, ("llama.attention.kv_lora_rank", 512)),
        ({"attention__key_length_mla": 192}, ("llama.attention.key_length_mla", 192)),
        ({"attention__causal": False}, ("llama.attention.causal", False, True)),
        ({"attention__clamp_kqv": 8.0}, ("llama.attention.clamp_kqv", "8.0")),
        ({"attention__scale": 0.5}, ("llama.attention.scale", "0.5")),
        ({"logit_scale": 0.0625}, ("llama.logit_scale", "0.0625")),
        ({"expert_shared_count": 1}, ("llama.expert_shared_count", 1)),
        ({"expert_count": 8}, ("llama.expert_used_count", "missing")),
        ({"expert_count": 8, "expert_used_count": 9}, ("llama.expert_used_count", 9, 8)),
        ({"attention__sliding_window": "4096"}, ("llama.attention.sliding_window", "'4096'")),
        ({"attention__sliding_window_pattern": 2}, ("llama.attention.sliding_window_pattern", 2)),
    ],
)
def test_what_is_not_computed_is_refused_by_name(
    changes: dict[str, Any], facts: tuple[object, ...], tmp_path: Path
) -> None:
    with refused(ConfigError, tmp_path / "a.gguf", *facts):
        read(tmp_path, TINY, **changes)


def test_unknown_fields_are_named(tmp_path: Path) -> None:
    with warned(tmp_path / "a.gguf", "'llama.new_thing'"):
        assert read(tmp_path, TINY, new_thing=3) == TINY
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(tmp_path, TINY, rope__scaling__finetuned=True, general__file_type=15)


def test_the_window_that_the_first_model_has_lost() -> None:
    assert lost_window(FIRST)
    assert lost_window(FIRST.replace(vocab_size=32002))  # a fine-tune with added tokens
    for changes in (
        {"rope_theta": 1e6},  # v0.2
        {"vocab_size": 32768},  # v0.3
        {"n_kv_heads": 32},  # Llama 2
        {"sliding_window": (4096,) * 32},
        {"dim": 2048},
    ):
        assert not lost_window(FIRST.replace(**changes)), changes


def test_a_window_overrules_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    write_gguf(path, FAMILIES["dense_windowed"])
    assert mistral_ref.load(path, backend="numpy").config.sliding_window == (5,) * 3
    assert mistral_ref.load(path, backend="numpy", window=3).config.sliding_window == (3,) * 3
    for wrong in (0, 2**41, 1.5, "4096"):
        with refused(InputError, "window", repr(wrong)):
            mistral_ref.load(path, backend="numpy", window=wrong)  # type: ignore[arg-type]


def test_the_lost_window_is_told_once_and_window_sets_it(tmp_path: Path) -> None:
    config = FIRST.replace(n_layers=1, sliding_window=(None,))
    shapes = {"token_embd": (32000, 4096), "output": (32000, 4096), "blk.0.attn_q": (4096, 4096)}
    shapes |= {f"blk.0.attn_{name}": (1024, 4096) for name in "kv"} | {"blk.0.attn_output": (4096, 4096)}
    shapes |= {f"blk.0.ffn_{name}": (14336, 4096) for name in ("gate", "up")} | {"blk.0.ffn_down": (4096, 14336)}
    path, end = tmp_path / "a.gguf", 0
    tensors = {
        f"{name}.weight": Stored("F32", (4096,), b"") for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm")
    }
    tensors |= {f"{name}.weight": Stored("Q4_0", shape, b"") for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        tensors[name] = tensor._replace(begin=end)
        end += math.prod(tensor.shape) * 4 if tensor.dtype == "F32" else math.prod(tensor.shape) // 32 * 18
    with path.open("wb") as file:
        start = file.write(gguf_bytes(config_fields(config), tensors))
        file.truncate(start + end)  # a hole, which takes no disk
    with warned(path, 4096, "--window"):
        mistral_ref.load(path, backend="numpy")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert mistral_ref.load(path, backend="numpy", window=4096).config.sliding_window == (4096,)
