"""docs/lm_eval_adapter.py: what it answers the lm-evaluation-harness, and that the harness accepts it."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.errors import refused
from support.paths import ROOT

import mistral_ref
from mistral_ref import InputError

Case = tuple[Any, ...]


def adapter(model: mistral_ref.Model, monkeypatch: pytest.MonkeyPatch | None = None, **options: Any) -> Any:
    """Return the adapter of a model; with `monkeypatch` it inherits from nothing."""
    if monkeypatch is not None:
        for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setattr(sys.modules["lm_eval.api.model"], "LM", object, raising=False)
    spec = importlib.util.spec_from_file_location("lm_eval_adapter", ROOT / "docs" / "lm_eval_adapter.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.MistralRefLM(model, **options)


def asked(*cases: Case) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=case) for case in cases]


@pytest.fixture(scope="module")
def model() -> mistral_ref.Model:
    return mistral_ref.load(backend="numpy")


def test_likelihoods_are_those_of_the_continuation(model: mistral_ref.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = adapter(model, monkeypatch)
    cases = [("Once upon a", " time"), ("Once upon a ", "time"), ("Once upon a", " car is"), ("", "Once")]
    found = lm.loglikelihood(asked(*cases))
    assert found[0] == pytest.approx(found[1], abs=1e-6)
    assert [is_greedy for _, is_greedy in found] == [True, True, False, True]
    ids = model.token_ids("Once upon a car is")
    n = len(ids) - len(model.token_ids("Once upon a"))
    assert found[2][0] == pytest.approx(model.score(ids)[-n:].sum(), abs=1e-3)
    with refused(InputError, "continuation", "no token"):
        lm.loglikelihood(asked(("A", "")))


def test_a_text_that_is_too_long_is_cut(model: mistral_ref.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    config = model.config.replace(max_seq_len=7)
    short = mistral_ref.Model(config, model.weights, model.ops, tokenizer=model.tokenizer)
    lm, text = adapter(short, monkeypatch), "Once upon a time there was a little girl named Lily. She loved to play."
    ids = model.token_ids(text)
    assert len(ids) > 14
    expected = sum(model.score(ids[start : start + 7]).sum() for start in range(0, len(ids) - 1, 6))
    assert lm.loglikelihood_rolling(asked((text,), ("A",))) == [
        pytest.approx(expected, abs=1e-3),
        pytest.approx(model.score("A").sum(), abs=1e-3),
    ]
    ((logprob, _),) = lm.loglikelihood(asked((text, " She")))
    assert logprob == pytest.approx(model.score(model.token_ids(f"{text} She")[-7:])[-1], abs=1e-3)
    (generated,) = lm.generate_until(asked((text, {"until": ["\n"], "max_gen_toks": 3})))
    assert generated == model.complete(ids[-4:], max_tokens=3, stop="\n")


def test_texts_are_generated_in_the_order_of_the_requests(
    model: mistral_ref.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ({"until": ["."], "max_gen_toks": 12}, {"until": "the", "max_gen_toks": 9, "do_sample": False})
    cases = [("Once upon a time", settings[0]), ("The dog", settings[1]), ("Tom had a red", settings[0])]
    found = adapter(model, monkeypatch, at_once=2).generate_until(asked(*cases))
    for text, (prompt, how) in zip(found, cases, strict=True):
        assert text == model.complete(prompt, max_tokens=how["max_gen_toks"], stop=how["until"])


@pytest.mark.soak
def test_the_harness_itself_evaluates_a_task_of_each_kind(model: mistral_ref.Model) -> None:
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from datasets import Dataset  # noqa: PLC0415
    from lm_eval.api.task import ConfigurableTask  # noqa: PLC0415

    texts = Dataset.from_list([{"before": "Once upon a", "after": " time"}, {"before": "She is", "after": " glad"}])
    common = {"dataset_path": None, "custom_dataset": lambda **_: {"test": texts}, "test_split": "test"}
    until = {"until": ["."], "max_gen_toks": 2}
    kinds: dict[str, dict[str, Any]] = {
        "loglikelihood": {"metric_list": [{"metric": "perplexity"}, {"metric": "acc"}]},
        "loglikelihood_rolling": {"metric_list": [{"metric": "word_perplexity"}], "doc_to_text": ""},
        "generate_until": {"metric_list": [{"metric": "exact_match"}], "generation_kwargs": until},
    }
    for kind, own in kinds.items():
        config = {"task": kind, "output_type": kind, "doc_to_text": "{{before}}", "doc_to_target": "{{after}}"}
        task = ConfigurableTask(config=common | config | own)
        found = lm_eval.simple_evaluate(adapter(model), tasks=[task], bootstrap_iters=0)["results"][kind]
        numbers = [value for value in found.values() if isinstance(value, float)]
        assert numbers
        assert np.isfinite(numbers).all()
