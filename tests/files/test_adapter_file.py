"""Adapters' files: what three programs write is read, and what would be computed wrongly is refused by name."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.adapters import WRITERS, draw_deltas, stored, write_finetune, write_mlx, write_peft
from support.checkpoints import FAMILIES, write_tensor_file
from support.errors import refused, warned
from support.hostile import header_of, tensor_file

from mistral_ref.errors import CheckpointError, InputError, MistralRefError
from mistral_ref.files.adapter_file import read_adapter
from mistral_ref.files.adapters import with_adapters
from mistral_ref.weights import Weights

DENSE, MIXTURE = FAMILIES["dense_windowed"].config, FAMILIES["mixtral_windowed"].config
WQ = ["layers.0.attention.wq"]
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


def write_tensors(path: Path, tensors: dict[str, np.ndarray], dtype: str = "F32") -> None:
    write_tensor_file(path, {name: stored(values, dtype) for name, values in tensors.items()})


def peft_with(directory: Path, tensors: dict[str, np.ndarray], dtype: str = "F32", **fields: Any) -> Path:
    """Write an adapter of PEFT with these tensors in place of its own."""
    write_peft(directory, DENSE, draw_deltas(DENSE, WQ), **fields)
    write_tensors(directory / "adapter_model.safetensors", tensors, dtype)
    return directory


def fit(path: Path, config: Any = DENSE) -> None:
    """Give a model of this configuration, without weights, an adapter."""
    with_adapters(config, Weights(None, (), None, None), [path])  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("made_by", WRITERS)
def test_an_adapter_says_who_made_it_and_its_scale(made_by: str, tmp_path: Path) -> None:
    deltas = draw_deltas(DENSE, rank=3, scale=1.5)
    adapter = read_adapter(WRITERS[made_by](tmp_path, DENSE, deltas))
    assert adapter.form.made_by == made_by
    assert adapter.pairs.keys() == deltas.keys()
    for name, (a, b, scale) in adapter.pairs.items():
        assert (a.shape, b.shape, scale) == (deltas[name].a.shape, deltas[name].b.shape, 1.5)


def test_a_file_may_be_given_in_place_of_its_directory(tmp_path: Path) -> None:
    for name, write in WRITERS.items():
        directory = write(tmp_path / name, DENSE, draw_deltas(DENSE, WQ, scale=1.25))
        (file,) = directory.glob("*.safetensors")
        (pair,) = read_adapter(file).pairs.values()
        assert pair.scale == 1.25


def test_the_scale_of_peft(tmp_path: Path) -> None:
    def scales(**fields: Any) -> list[float]:
        names = [*WQ, "layers.1.attention.wq", "layers.1.feed_forward.w2"]
        path = write_peft(tmp_path / "a", DENSE, draw_deltas(DENSE, names, rank=4), lora_alpha=6, **fields)
        return [pair.scale for pair in read_adapter(path).pairs.values()]

    assert scales() == [1.5, 1.5, 1.5]
    assert scales(use_rslora=True) == [3.0, 3.0, 3.0]  # divided by the root of the rank
    assert scales(alpha_pattern={"q_proj": 8, "layers.1.self_attn.q_proj": 2}) == [2.0, 2.0, 1.5]  # the first one wins
    assert scales(alpha_pattern={"layers.1.self_attn.q_proj": 2, "j": 9}) == [1.5, 0.5, 1.5]  # no end of a name
    assert scales(alpha_pattern={"^model.layers.0.self_attn.q_proj": 1, "^down_proj": 9}) == [0.25, 1.5, 1.5]
    assert scales(rank_pattern={"q_proj": 9}) == [1.5, 1.5, 1.5]  # the rank is that of the tensors


def test_the_scale_of_mistral_finetune_is_2_if_no_file_says_it(tmp_path: Path) -> None:
    path = write_finetune(tmp_path, DENSE, draw_deltas(DENSE, WQ))
    (path / "params.json").write_text('{"dim": 40}')
    with warned(path / "params.json", "2.0"):
        assert [pair.scale for pair in read_adapter(path).pairs.values()] == [2.0]
    (path / "params.json").unlink()
    with warned(path / "params.json", "2.0"):
        read_adapter(path / "lora.safetensors")


def test_mlx_lm_wrote_no_type_at_first(tmp_path: Path) -> None:
    path = write_mlx(tmp_path, DENSE, draw_deltas(DENSE, WQ, scale=20.0))
    about = json.loads((path / "adapter_config.json").read_text())
    del about["fine_tune_type"]
    (path / "adapter_config.json").write_text(json.dumps(about))
    assert [pair.scale for pair in read_adapter(path).pairs.values()] == [20.0]


def test_fields_that_say_how_it_was_trained_change_nothing(tmp_path: Path) -> None:
    of_training = {
        "lora_dropout": 0.1,
        "target_modules": "all-linear",
        "layers_to_transform": [0],
        "task_type": "CAUSAL_LM",
    }
    path = write_peft(
        tmp_path, DENSE, draw_deltas(DENSE, WQ), **of_training, init_lora_weights="gaussian", loftq_config={}
    )
    assert read_adapter(path).form.made_by == "PEFT"


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model.", "model."])
def test_adapters_of_multimodal_models_are_read_without_their_other_parts(prefix: str, tmp_path: Path) -> None:
    halves = {"lora_A.weight": np.ones((2, 40)), "lora_B.weight": np.ones((48, 2))}
    text = {f"base_model.model.{prefix}layers.0.self_attn.q_proj.{end}": half for end, half in halves.items()}
    vision = {f"base_model.model.model.vision_tower.layers.0.q_proj.{end}": half for end, half in halves.items()}
    assert read_adapter(peft_with(tmp_path, text)).pairs.keys() == set(WQ)
    with warned(tmp_path / "adapter_model.safetensors", "vision_tower"):
        assert read_adapter(peft_with(tmp_path, text | vision)).pairs.keys() == set(WQ)
    with refused(CheckpointError, tmp_path / "adapter_model.safetensors", "no matrix"), warned("vision_tower"):
        read_adapter(peft_with(tmp_path, vision))


# ----------------------------------------------------------------------------------------- what is refused by name


@pytest.mark.parametrize(
    ("fields", "facts"),
    [
        ({"peft_type": "LOHA"}, ("peft_type", "'LOHA'", "'LORA'")),
        ({"use_rslora": "false"}, ("use_rslora", "'false'")),
        ({"use_dora": True}, ("use_dora", "True")),
        ({"bias": "lora_only"}, ("bias", "'lora_only'")),
        ({"lora_bias": True}, ("lora_bias", "True")),
        ({"fan_in_fan_out": True}, ("fan_in_fan_out", "True")),
        ({"modules_to_save": ["lm_head"]}, ("modules_to_save", "lm_head")),
        ({"trainable_token_indices": [5]}, ("trainable_token_indices", "[5]")),
        ({"layer_replication": [[0, 2]]}, ("layer_replication",)),
        ({"target_parameters": ["mlp.experts.down_proj"]}, ("target_parameters", "mlp.experts.down_proj")),
        ({"alora_invocation_tokens": [1, 2]}, ("alora_invocation_tokens",)),
        ({"use_qalora": True}, ("use_qalora",)),
        ({"use_bdlora": {"a": 1}}, ("use_bdlora",)),
        ({"megatron_config": {"a": 1}}, ("megatron_config",)),
        ({"arrow_config": {"a": 1}}, ("arrow_config",)),
        ({"kasa_config": {"a": 1}}, ("kasa_config",)),
        ({"velora_config": {"a": 1}}, ("velora_config",)),
        ({"monteclora_config": {"a": 1}}, ("monteclora_config",)),
        ({"of_the_future": 7}, ("of_the_future", 7)),
        ({"init_lora_weights": "pissa"}, ("init_lora_weights", "'pissa'")),
        ({"init_lora_weights": "pissa_niter_16"}, ("init_lora_weights", "'pissa_niter_16'")),
        ({"init_lora_weights": "olora"}, ("init_lora_weights", "'olora'")),
        ({"init_lora_weights": "loftq"}, ("init_lora_weights", "'loftq'")),
        ({"init_lora_weights": "corda"}, ("init_lora_weights", "'corda'")),
        ({"lora_alpha": None}, ("lora_alpha", "None")),
        ({"lora_alpha": "16"}, ("lora_alpha", "'16'")),
        ({"lora_alpha": True}, ("lora_alpha", "True")),
        ({"lora_alpha": 10**400}, ("lora_alpha",)),
        ({"alpha_pattern": {".*q_proj": 4}}, ("alpha_pattern", "'.*q_proj'")),
        ({"alpha_pattern": {"(a+)+$": 4}}, ("alpha_pattern", "'(a+)+$'")),
        ({"alpha_pattern": {"q_proj": "a"}}, ("alpha_pattern.q_proj", "'a'")),
        ({"alpha_pattern": [1]}, ("alpha_pattern", "[1]")),
        ({"rank_pattern": "a"}, ("rank_pattern", "'a'")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_peft_says_and_we_do_not_compute(
    fields: dict[str, Any], facts: tuple[object, ...], tmp_path: Path
) -> None:
    path = write_peft(tmp_path, DENSE, draw_deltas(DENSE, WQ), **fields)
    with refused(CheckpointError, path / "adapter_config.json", *facts):
        read_adapter(path)


@pytest.mark.parametrize(
    ("fields", "facts"),
    [
        ({"fine_tune_type": "dora"}, ("fine_tune_type", "'dora'", "'lora'")),
        ({"fine_tune_type": "full"}, ("fine_tune_type", "'full'")),
        ({"lora_parameters": None}, ("lora_parameters", "None")),
        ({"lora_parameters": {"rank": 2}}, ("lora_parameters.scale", "None")),
        ({"peft_type": "LORA"}, ("peft_type", "fine_tune_type", "both")),
    ],
)
def test_what_mlx_lm_says_and_we_do_not_compute(
    fields: dict[str, Any], facts: tuple[object, ...], tmp_path: Path
) -> None:
    path = write_mlx(tmp_path, DENSE, draw_deltas(DENSE, WQ), **fields)
    with refused(CheckpointError, path / "adapter_config.json", *facts):
        read_adapter(path)


def test_a_configuration_of_neither(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with refused(CheckpointError, tmp_path / "adapter_config.json", "peft_type", "fine_tune_type", "neither"):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        (f"{Q_PROJ}.lora_magnitude_vector", ("DoRA",)),
        (f"{Q_PROJ}.lora_magnitude_vector.weight", ("DoRA",)),
        (f"{Q_PROJ}.lora_B.bias", ("bias",)),
        ("base_model.model.lm_head.weight", ("whole weight",)),
        ("base_model.model.model.embed_tokens.weight", ("whole weight",)),
        ("base_model.model.model.layers.0.input_layernorm.weight", ("whole weight",)),
        ("base_model.model.model.embed_tokens.lora_embedding_A", ("embedding",)),
        ("base_model.model.model.embed_tokens.lora_A.weight", ("tok_embeddings",)),
        ("base_model.model.lm_head.lora_A.weight", ("output",)),
        (f"{Q_PROJ}.base_layer.weight", ("whole weight",)),
        (f"{Q_PROJ}.lora_A.default.weight", ("whole weight",)),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", ("PEFT",)),  # its prefix is missing
        ("base_model.model.model.layers.0.self_attn.qkv_proj.lora_A.weight", ("no model",)),
        ("base_model.model.layers.0.attention.wq.lora_A.weight", ("no model",)),  # Mistral's name: which row order?
        ("base_model.model.model.layers.0.mlp.experts.lora_A.weight", ("no model",)),
        ("\x1b[2J", ("PEFT",)),
    ],
)
def test_tensors_that_are_no_part_of_such_a_sum(name: str, facts: tuple[object, ...], tmp_path: Path) -> None:
    tensors = {name: np.ones((2, 40)), name.replace("_A", "_B"): np.ones((48, 2))}
    peft_with(
        tmp_path, tensors | {f"{Q_PROJ}.lora_A.weight": np.ones((2, 40)), f"{Q_PROJ}.lora_B.weight": np.ones((48, 2))}
    )
    with refused(CheckpointError, tmp_path / "adapter_model.safetensors", *facts):
        read_adapter(tmp_path)


def test_whole_weights_in_an_adapter_of_mistral_finetune(tmp_path: Path) -> None:
    write_finetune(tmp_path, DENSE, draw_deltas(DENSE, WQ))
    write_tensors(tmp_path / "lora.safetensors", {"layers.0.attention_norm.weight": np.ones(40)})
    with refused(CheckpointError, tmp_path / "lora.safetensors", "layers.0.attention_norm.weight", "whole weight"):
        read_adapter(tmp_path)
    tensors = {f"model.layers.0.self_attn.q_proj.lora_{x}.weight": np.ones((2, 2)) for x in "AB"}
    write_tensors(tmp_path / "lora.safetensors", tensors)  # Hugging Face's names: which row order?
    with refused(CheckpointError, tmp_path / "lora.safetensors", "model.layers.0.self_attn.q_proj.lora_A.weight"):
        read_adapter(tmp_path)


def test_magnitudes_of_dora_in_an_adapter_of_mlx_lm(tmp_path: Path) -> None:
    write_mlx(tmp_path, DENSE, draw_deltas(DENSE, WQ))
    write_tensors(tmp_path / "adapters.safetensors", {"model.layers.0.self_attn.q_proj.m": np.ones(48)})
    with refused(CheckpointError, tmp_path / "adapters.safetensors", "DoRA"):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("a", "b", "facts"),
    [
        ((0, 40), (48, 0), ("rank 0",)),
        ((2, 40), (48, 3), ("rank 2", "has 3")),
        ((40,), (48, 2), ("lora_A.weight", "(40,)")),
        ((2, 4, 10), (48, 2), ("(2, 4, 10)",)),
        ((3, 40), (48, 3), ("rank 3", "[2]")),
    ],
)
def test_shapes_that_do_not_fit_each_other(a: Any, b: Any, facts: tuple[object, ...], tmp_path: Path) -> None:
    peft_with(tmp_path, {f"{Q_PROJ}.lora_A.weight": np.ones(a), f"{Q_PROJ}.lora_B.weight": np.ones(b)})
    with refused(CheckpointError, tmp_path / "adapter_model.safetensors", *facts):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("a", "b"), [((10**9, 0, 3), (10**9, 3, 0)), ((2, 1, 28), (3, 34, 1)), ((), ()), ((2, 28), (34, 2))]
)
def test_shapes_of_all_experts(a: Any, b: Any, tmp_path: Path) -> None:
    write_mlx(tmp_path, MIXTURE, draw_deltas(MIXTURE, ["layers.0.feed_forward.gate"]))
    module = "model.layers.0.block_sparse_moe.switch_mlp.gate_proj"
    tensors = {f"{module}.lora_{x}": ("F32", np.ones(shape, np.float32)) for x, shape in (("a", a), ("b", b))}
    write_tensor_file(tmp_path / "adapters.safetensors", tensors)
    with refused(CheckpointError, tmp_path / "adapters.safetensors", f"{module}.lora_a", "experts"):
        read_adapter(tmp_path)


@pytest.mark.parametrize("half", ["A", "B"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite(value: float, half: str, tmp_path: Path) -> None:
    tensors = {f"{Q_PROJ}.lora_A.weight": np.ones((2, 40)), f"{Q_PROJ}.lora_B.weight": np.ones((48, 2))}
    tensors[f"{Q_PROJ}.lora_{half}.weight"][1, 1] = value
    peft_with(tmp_path, tensors)
    with refused(CheckpointError, tmp_path / "adapter_model.safetensors", f"{Q_PROJ}.lora_{half}.weight", "NaN"):
        read_adapter(tmp_path)


def test_a_half_that_is_missing_and_dtypes_that_are_no_floats(tmp_path: Path) -> None:
    peft_with(tmp_path, {f"{Q_PROJ}.lora_B.weight": np.ones((48, 2))})
    with refused(CheckpointError, tmp_path / "adapter_model.safetensors", f"{Q_PROJ}.lora_B.weight", "lora_A.weight"):
        read_adapter(tmp_path)
    for dtype, values in {"F8_E4M3": np.ones((2, 40), np.uint8), "I32": np.ones((2, 40), np.int32)}.items():
        tensors = {f"{Q_PROJ}.lora_{half}.weight": (dtype, values) for half in "AB"}
        write_tensor_file(tmp_path / "adapter_model.safetensors", tensors)
        with refused(CheckpointError, tmp_path / "adapter_model.safetensors", f"{Q_PROJ}.lora_A.weight", dtype):
            read_adapter(tmp_path)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapters.npz", "lora.pt"])
def test_pickles_are_never_opened(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with refused(CheckpointError, tmp_path, name, "pickles"):
        read_adapter(tmp_path)
    with refused(CheckpointError, tmp_path / name, "pickles"):
        read_adapter(tmp_path / name)


def test_paths_that_lead_to_no_adapter(tmp_path: Path) -> None:
    with refused(CheckpointError, tmp_path / "nowhere", "no such"):
        read_adapter(tmp_path / "nowhere")
    with refused(CheckpointError, tmp_path, "lora.safetensors", "adapter_config.json"):
        read_adapter(tmp_path)
    (tmp_path / "adapter.gguf").write_bytes(b"GGUF")
    with refused(CheckpointError, tmp_path / "adapter.gguf"):
        read_adapter(tmp_path / "adapter.gguf")
    os.mkfifo(tmp_path / "lora.safetensors")
    with refused(CheckpointError, tmp_path / "lora.safetensors"), warned("2.0"):
        read_adapter(tmp_path)


# --------------------------------------------------------------------------------------- what does not fit the model


@pytest.mark.parametrize("made_by", WRITERS)
def test_an_adapter_of_another_model(made_by: str, tmp_path: Path) -> None:
    other = DENSE.replace(dim=44)
    path = WRITERS[made_by](tmp_path / "shape", other, draw_deltas(other, WQ))
    with refused(CheckpointError, next(path.glob("*.safetensors")), (48, 44), (48, 40), WQ[0]):
        fit(path)
    deeper = DENSE.replace(n_layers=4, sliding_window=(None,) * 4)
    path = WRITERS[made_by](tmp_path / "depth", deeper, draw_deltas(deeper, ["layers.3.attention.wk"]))
    with refused(CheckpointError, next(path.glob("*.safetensors")), "3 layers"):
        fit(path)
    path = WRITERS[made_by](tmp_path / "experts", MIXTURE, draw_deltas(MIXTURE))
    with refused(CheckpointError, next(path.glob("*.safetensors")), "without experts"):
        fit(path, MIXTURE.replace(moe=None))


def test_experts_are_adapted_alike(tmp_path: Path) -> None:
    some = [f"layers.0.feed_forward.experts.{expert}.w1" for expert in range(4)]  # of five
    path = write_peft(tmp_path / "some", MIXTURE, draw_deltas(MIXTURE, some))
    with refused(CheckpointError, path / "adapter_model.safetensors", "layers.0.feed_forward", "all"):
        with_adapters(MIXTURE, _hollow(MIXTURE), [path])
    deltas = draw_deltas(MIXTURE, [*some, "layers.0.feed_forward.experts.4.w1"])
    path = write_peft(tmp_path / "unlike", MIXTURE, deltas, alpha_pattern={"experts.2.w1": 3})
    with refused(CheckpointError, path / "adapter_model.safetensors", "layers.0.feed_forward", "one scale"):
        with_adapters(MIXTURE, _hollow(MIXTURE), [path])


def _hollow(config: Any) -> Weights:
    from support.tiny import model_of  # noqa: PLC0415

    return model_of(config).weights


@pytest.mark.parametrize(
    ("adapters", "facts"),
    [
        ("a/path", ("adapters", "'a/path'")),
        ([5], ("adapters", 5)),
        ([("a", 1, 2)], ("adapters",)),
        ([("a", "b")], ("a", "'b'")),
        ([("a", float("nan"))], ("a", "nan")),
        ([("a", float("inf"))], ("a", "inf")),
    ],
)
def test_arguments_that_are_no_adapters(adapters: Any, facts: tuple[object, ...]) -> None:
    with refused(InputError, *facts):
        with_adapters(DENSE, Weights(None, (), None, None), adapters)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------- hostile files


@settings(max_examples=100)
@given(data=st.data())
def test_damaged_files_are_one_line(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("adapter")
    made_by = data.draw(st.sampled_from(list(WRITERS)))
    WRITERS[made_by](directory, DENSE, draw_deltas(DENSE, WQ))
    path = data.draw(st.sampled_from(sorted(directory.iterdir())))
    content = path.read_bytes()
    match data.draw(st.sampled_from(["cut", "byte", "header"])):
        case "cut":
            content = content[: data.draw(st.integers(0, len(content)))]
        case "byte":
            at = data.draw(st.integers(0, len(content) - 1))
            content = content[:at] + bytes([data.draw(st.integers(0, 255))]) + content[at + 1 :]
        case "header" if path.suffix == ".safetensors":
            header, values = header_of(content)
            name = data.draw(st.sampled_from(sorted(header)))
            header[data.draw(st.text(max_size=9))] = header.pop(name)
            content = tensor_file(header, values)
    path.write_bytes(content)
    message = ""
    try:
        fit(directory)
    except MistralRefError as error:
        message = str(error)
    assert message.isprintable()
