"""ModelConfig: which tensors a model has, and how many weights these are."""

from __future__ import annotations

import pytest
from support.checkpoints import FAMILIES

from mistral_ref.config import MixtureOfExperts, tensor_shapes
from mistral_ref.files.checkpoint import open_checkpoint
from mistral_ref.files.config_files import read_config
from mistral_ref.loading import DEMO_MODEL
from mistral_ref.measure.shapes import SHAPES


@pytest.mark.parametrize(("name", "published"), [("mistral-7b", 7_241_732_096), ("mixtral-8x7b", 46_702_792_704)])
def test_parameter_count_of_published_models(name: str, published: int) -> None:
    assert SHAPES[name].n_parameters == published


def test_the_demonstration_model_has_the_tensors_that_are_listed() -> None:
    found = {name: tensor.shape for name, tensor in open_checkpoint(DEMO_MODEL).tensors.items()}
    assert dict(tensor_shapes(read_config(DEMO_MODEL))) == found


def test_names_and_shapes_of_every_kind_of_layer() -> None:
    """Each letter of the table in the docstring has a size of its own here."""
    config = FAMILIES["mixtral_windowed"].config.replace(tied_embeddings=False)
    dim, hidden, vocabulary, q_out, kv_out, experts = 28, 34, 67, 32, 16, 5
    shapes = dict(tensor_shapes(config))
    assert list(shapes)[:2] == ["tok_embeddings.weight", "layers.0.attention_norm.weight"]
    assert list(shapes)[-2:] == ["norm.weight", "output.weight"]
    layer = {name.removeprefix("layers.1."): shape for name, shape in shapes.items() if name.startswith("layers.1.")}
    networks = {
        f"feed_forward.experts.{expert}.{matrix}.weight": (dim, hidden) if matrix == "w2" else (hidden, dim)
        for expert in range(experts)
        for matrix in ("w1", "w2", "w3")
    }
    assert layer == {
        "attention_norm.weight": (dim,),
        "attention.wq.weight": (q_out, dim),
        "attention.wk.weight": (kv_out, dim),
        "attention.wv.weight": (kv_out, dim),
        "attention.wo.weight": (dim, q_out),
        "ffn_norm.weight": (dim,),
        "feed_forward.gate.weight": (experts, dim),
        **networks,
    }
    assert shapes["tok_embeddings.weight"] == shapes["output.weight"] == (vocabulary, dim)
    assert len(shapes) == 3 + 2 * len(layer)
    assert "output.weight" not in dict(tensor_shapes(config.replace(tied_embeddings=True)))


def test_tensors_are_listed_one_by_one() -> None:
    """A hostile configuration may claim twelve million of them, of which a reader misses the first."""
    config = FAMILIES["mixtral_windowed"].config
    huge = config.replace(
        n_layers=1024,
        sliding_window=(None,) * 1024,
        moe=MixtureOfExperts(num_experts=4096, num_experts_per_tok=2),
    )
    assert next(iter(tensor_shapes(huge))) == ("tok_embeddings.weight", (67, 28))
