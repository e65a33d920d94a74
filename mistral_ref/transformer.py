"""The Mistral transformer. If you read one file, read this one.

The forward pass is a generator of named steps. Its caller receives each step and sends a value back. There are two
callers. `drain` sends every value straight back and so computes the logits. A Walk hands the steps to a reader, who may
look at them or send back other values. Two kinds of lines below yield steps:

    x = yield step(name, value)     yields the step; x is the value that comes back
    x = yield from f(...)           yields the steps of f; x is the value that f returns

    tokens ─ embedding ─┬─ norm ─ attention ─ + ─┬─ norm ─ feed-forward ─ + ─ ... L blocks ... ─ norm ─ output ─ logits
                        └──────────>──────────┘  └──────────>───────────┘

Shapes: T tokens in this pass, S keys visible, D model width, H query heads, G key/value heads, K head width,
F feed-forward width, E experts, N (token, expert) pairs, R rank of an adapter, V vocabulary. The letters after the last
underscore of a name are the shape of the array: x_TD has shape (T, D).

Sources: the block is Llama's (arXiv:2302.13971). Mistral 7B adds grouped queries and a sliding window
(arXiv:2310.06825). Mixtral adds a mixture of experts (arXiv:2401.04088). Adapters are LoRA's (arXiv:2106.09685).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from mistral_ref.config import ModelConfig
from mistral_ref.ops import AnyPass, Ops, Rows
from mistral_ref.rope import Rotation
from mistral_ref.steps import Step, StepFactory, Steps, step_factory
from mistral_ref.weights import ExpertFeedForward, FeedForward, Lora, Matrix, Weights

MaybeSteps = Generator[Step, np.ndarray, np.ndarray | None]  # Steps, or no step and None
LoraSteps = Callable[..., MaybeSteps | tuple[()]]  # Transformer.lora_steps for one layer, or no_steps


@dataclass(frozen=True, eq=False)
class Transformer:
    """A configuration, the weights of this configuration, and the operations that compute with them."""

    config: ModelConfig
    weights: Weights
    ops: Ops

    def forward_steps(
        self,
        tokens_T: np.ndarray,
        this_pass: AnyPass,
        *,
        last_only: bool = False,
        observe_attention: bool = False,
        first_layer: int = 0,
        x_TD: np.ndarray | None = None,
    ) -> Steps:
        """Yield every step of one pass and return logits (T, V); with `last_only` the last token's logits (1, V).

        tokens_T            the token ids, (T,)
        last_only           in the last layer the steps that are neither keys nor values, and those after it, have only
                            the last token: nothing else reaches its logits
        this_pass           reads and writes keys and values: a Pass those of one cache, a JoinedPass those of several
                            sequences that lie end to end. The tokens of this pass are among a cache's tokens only after
                            the caller has sent back the value of the last step
        observe_attention   yield "scores" and "attention_weights" too
        first_layer, x_TD   begin at this layer, with the residual stream that goes into it; without one, at the
                            embedding
        """
        config, weights, ops = self.config, self.weights, self.ops
        step = step_factory(config)
        rotation = ops.rotation(this_pass.positions, config)
        if x_TD is None:
            x_TD = yield step("embedding", ops.embed(tokens_T, weights.tok_embeddings))
        for index in range(first_layer, config.n_layers):
            rows = this_pass.last if last_only and index == config.n_layers - 1 else slice(None)
            x_TD = yield from self.block_steps(x_TD, index, rotation, this_pass, rows, observe_attention)
        x_TD = yield step("norm", ops.rms_norm(x_TD, weights.norm, config.norm_eps))
        logits_TV = yield step("logits", ops.linear(x_TD, weights.output))
        this_pass.commit(tokens_T)
        return logits_TV

    def block_steps(
        self,
        x_TD: np.ndarray,
        index: int,
        rotation: Rotation,
        this_pass: AnyPass,
        rows: Rows,
        observe_attention: bool,
    ) -> Steps:
        """Yield the steps of one block, return its x_TD: x + attention(norm(x)), then x + feed_forward(norm(x)).

        Keys and values are those of all tokens; everything else is computed for the tokens `rows` alone.
        """
        config, ops, layer = self.config, self.ops, self.weights.layers[index]
        step = step_factory(config, index)
        n_heads, n_kv_heads = config.n_heads, config.n_kv_heads
        order, eps = config.rope_row_order, config.norm_eps
        lora_steps = partial(self.lora_steps, layer.lora, step) if layer.lora else no_steps

        a_TD = yield step("attention_norm", ops.rms_norm(x_TD, layer.attention_norm, eps))
        lora = yield from lora_steps("q", a_TD[rows], n_heads=n_heads)
        q_THK = yield step("q", added(ops.split_heads(ops.linear(a_TD[rows], layer.wq), n_heads, order), lora))
        lora = yield from lora_steps("k", a_TD, n_heads=n_kv_heads)
        k_TGK = yield step("k", added(ops.split_heads(ops.linear(a_TD, layer.wk), n_kv_heads, order), lora))
        lora = yield from lora_steps("v", a_TD, n_heads=n_kv_heads)
        v_TGK = yield step("v", added(ops.split_heads(ops.linear(a_TD, layer.wv), n_kv_heads, "interleaved"), lora))
        q_THK = yield step("q_rotated", ops.rotate(q_THK, rotation.query_cos[rows], rotation.query_sin[rows]))
        k_TGK = yield step("k_rotated", ops.rotate(k_TGK, rotation.key_cos, rotation.key_sin))
        this_pass.write(index, k_TGK, v_TGK)  # written before they are read, for a prompt and for a single token
        heads_THK = yield from ops.attention(q_THK, this_pass.views(index, rows), step if observe_attention else None)
        heads_THK = yield step("heads", heads_THK)
        heads_TI = heads_THK.reshape(len(q_THK), -1)
        lora = yield from lora_steps("attention_out", heads_TI)
        out_TD = yield step("attention_out", added(ops.linear(heads_TI, layer.wo), lora))
        x_TD = yield step("residual_after_attention", x_TD[rows] + out_TD)

        b_TD = yield step("ffn_norm", ops.rms_norm(x_TD, layer.ffn_norm, eps))
        if isinstance(layer.feed_forward, FeedForward):
            out_TD = yield from self.feed_forward_steps(b_TD, layer.feed_forward, step, lora_steps)
        else:
            out_TD = yield from self.expert_steps(b_TD, layer.feed_forward, step, lora_steps)
        x_TD = yield step("residual_after_ffn", x_TD + out_TD)
        return x_TD

    def feed_forward_steps(
        self, b_TD: np.ndarray, weights: FeedForward, step: StepFactory, lora_steps: LoraSteps
    ) -> Steps:
        """Yield the steps of SwiGLU and return w2 · (silu(w1 · b) * (w3 · b)), (T, D)."""
        ops = self.ops
        lora = yield from lora_steps("gate", b_TD)
        gate_TF = yield step("gate", added(ops.linear(b_TD, weights.w1), lora))
        lora = yield from lora_steps("up", b_TD)
        up_TF = yield step("up", added(ops.linear(b_TD, weights.w3), lora))
        hidden_TF = yield step("ffn_hidden", ops.swiglu(gate_TF, up_TF))
        lora = yield from lora_steps("ffn_out", hidden_TF)
        out_TD = yield step("ffn_out", added(ops.linear(hidden_TF, weights.w2), lora))
        return out_TD

    def expert_steps(
        self, b_TD: np.ndarray, weights: ExpertFeedForward, step: StepFactory, lora_steps: LoraSteps
    ) -> Steps:
        """Yield the steps of a mixture of SwiGLUs and return the mixed outputs (T, D).

        Each token goes through the experts whose weight for it is not 0. The output of each is multiplied by its
        weight. Then the outputs are added.
        """
        ops = self.ops
        assert self.config.moe is not None
        lora = yield from lora_steps("router_logits", b_TD)
        router_TE = yield step("router_logits", added(ops.linear(b_TD, weights.gate), lora))
        weights_TE = yield step("expert_weights", ops.route(router_TE, self.config.moe.num_experts_per_tok))
        tokens_N, experts_N = np.nonzero(weights_TE)
        b_ND, experts = b_TD[tokens_N], weights.experts
        lora = yield from lora_steps("gate", b_ND, experts_N=experts_N)
        gate_NF = yield step("gate", added(ops.expert_linear(b_ND, experts_N, [one.w1 for one in experts]), lora))
        lora = yield from lora_steps("up", b_ND, experts_N=experts_N)
        up_NF = yield step("up", added(ops.expert_linear(b_ND, experts_N, [one.w3 for one in experts]), lora))
        hidden_NF = yield step("ffn_hidden", ops.swiglu(gate_NF, up_NF))
        lora = yield from lora_steps("ffn_out", hidden_NF, experts_N=experts_N)
        y_ND = added(ops.expert_linear(hidden_NF, experts_N, [one.w2 for one in experts]), lora)
        out_TD = yield step("ffn_out", ops.mix_experts(y_ND, tokens_N, experts_N, weights_TE))
        return out_TD

    def lora_steps(
        self,
        loras: Mapping[str, Lora],
        step: StepFactory,
        name: str,
        x_TI: np.ndarray,
        *,
        n_heads: int | None = None,
        experts_N: np.ndarray | None = None,
    ) -> MaybeSteps:
        """Yield the two steps of an adapter, return what it adds to the step `name`: scale (x · Aᵀ) · Bᵀ.

        Without an adapter of this product there are no steps, and the result is None.

        n_heads     the result is cut into so many heads
        experts_N   the expert of each row of x
        """
        if name not in loras:
            return None
        lora, ops = loras[name], self.ops

        def product(x_TI: np.ndarray, matrices: tuple[Matrix, ...]) -> np.ndarray:
            return ops.linear(x_TI, matrices[0]) if experts_N is None else ops.expert_linear(x_TI, experts_N, matrices)

        a_TR = yield step(f"{name}_lora_a", product(x_TI, lora.a))
        b_TO = product(a_TR * lora.scale_R.astype(a_TR.dtype), lora.b)
        b = b_TO if n_heads is None else ops.split_heads(b_TO, n_heads, "interleaved")
        b = yield step(f"{name}_lora_b", b)
        return b


def no_steps(*_: object, **__: object) -> tuple[()]:
    """Return no step, in place of `lora_steps` in a layer without adapters: `yield from` then gives None."""
    return ()


def added(y: np.ndarray, lora: np.ndarray | None) -> np.ndarray:
    """Return a product with what an adapter adds to it; None: there is no adapter."""
    return y if lora is None else y + lora


def drain(steps: Steps, ops: Ops, *, until: str | None = None) -> np.ndarray:
    """Run a pass to its end and return its result, or only to the step `until` and return the step's value.

    Every value is sent straight back.
    """
    with ops.running():
        step = next(steps)
        try:
            while step.name != until:
                step = steps.send(step.value)
        except StopIteration as end:
            return end.value
    return step.value
