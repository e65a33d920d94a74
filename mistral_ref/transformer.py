"""The Mistral transformer. If you read one file, read this one.

The forward pass is a generator of named steps. Its caller receives each step and sends a value back. There are two
callers. `drain` sends every value straight back and so computes the logits. A Walk hands the steps to a reader, who may
look at them or send back other values. Two kinds of lines below yield steps:

    x = yield step(name, value)     yields the step; x is the value that comes back
    x = yield from f(...)           yields the steps of f; x is the value that f returns

    tokens ─ embedding ─┬─ norm ─ attention ─ + ─┬─ norm ─ feed-forward ─ + ─ ... L blocks ... ─ norm ─ output ─ logits
                        └──────────>──────────┘  └──────────>───────────┘

Shapes: T tokens in this pass, S keys visible, D model width, H query heads, G key/value heads, K head width,
F feed-forward width, E experts, N (token, expert) pairs, V vocabulary. The letters after the last underscore of a name
are the shape of the array: x_TD has shape (T, D).

Sources: the block is Llama's (arXiv:2302.13971). Mistral 7B adds grouped queries and a sliding window
(arXiv:2310.06825). Mixtral adds a mixture of experts (arXiv:2401.04088).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mistral_ref.cache import Pass
from mistral_ref.config import ModelConfig
from mistral_ref.joined_pass import JoinedPass
from mistral_ref.ops import Ops
from mistral_ref.rope import Rotation
from mistral_ref.steps import StepFactory, Steps, step_factory
from mistral_ref.weights import ExpertFeedForward, FeedForward, Weights


@dataclass(frozen=True, eq=False)
class Transformer:
    """A configuration, the weights of this configuration, and the operations that compute with them."""

    config: ModelConfig
    weights: Weights
    ops: Ops

    def forward_steps(
        self,
        tokens_T: np.ndarray,
        this_pass: Pass | JoinedPass,
        *,
        last_only: bool = False,
        observe_attention: bool = False,
    ) -> Steps:
        """Yield every step of one pass and return logits (T, V); with `last_only` the last token's logits (1, V).

        tokens_T            the token ids, (T,)
        last_only           in the last layer the steps that are neither keys nor values, and those after it, have only
                            the last token: nothing else reaches its logits
        this_pass           reads and writes the cache, or the caches of several sequences that lie end to end. The
                            tokens of this pass are among a cache's tokens only after the caller has sent back the value
                            of the last step
        observe_attention   yield "scores" and "attention_weights" too
        """
        config, weights, ops = self.config, self.weights, self.ops
        step = step_factory(config)
        rotation = ops.rotation(this_pass.positions, config)
        x_TD = yield step("embedding", ops.embed(tokens_T, weights.tok_embeddings))
        for index in range(config.n_layers):
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
        this_pass: Pass | JoinedPass,
        rows: slice,
        observe_attention: bool,
    ) -> Steps:
        """Yield the steps of one block, return its x_TD: x + attention(norm(x)), then x + feed_forward(norm(x)).

        Keys and values are those of all tokens; everything else is computed for the tokens `rows` alone.
        """
        config, ops, layer = self.config, self.ops, self.weights.layers[index]
        step = step_factory(config, index)
        order, eps = config.rope_row_order, config.norm_eps

        a_TD = yield step("attention_norm", ops.rms_norm(x_TD, layer.attention_norm, eps))
        q_THK = yield step("q", ops.split_heads(ops.linear(a_TD[rows], layer.wq), config.n_heads, order))
        k_TGK = yield step("k", ops.split_heads(ops.linear(a_TD, layer.wk), config.n_kv_heads, order))
        v_TGK = yield step("v", ops.split_heads(ops.linear(a_TD, layer.wv), config.n_kv_heads, "interleaved"))
        q_THK = yield step("q_rotated", ops.rotate(q_THK, rotation.query_cos[rows], rotation.query_sin[rows]))
        k_TGK = yield step("k_rotated", ops.rotate(k_TGK, rotation.key_cos, rotation.key_sin))
        this_pass.write(index, k_TGK, v_TGK)  # written before they are read, for a prompt and for a single token
        heads_THK = yield from ops.attention(q_THK, this_pass.views(index, rows), step if observe_attention else None)
        heads_THK = yield step("heads", heads_THK)
        out_TD = yield step("attention_out", ops.linear(heads_THK.reshape(len(q_THK), -1), layer.wo))
        x_TD = yield step("residual_after_attention", x_TD[rows] + out_TD)

        b_TD = yield step("ffn_norm", ops.rms_norm(x_TD, layer.ffn_norm, eps))
        if isinstance(layer.feed_forward, FeedForward):
            out_TD = yield from self.feed_forward_steps(b_TD, layer.feed_forward, step)
        else:
            out_TD = yield from self.expert_steps(b_TD, layer.feed_forward, step)
        x_TD = yield step("residual_after_ffn", x_TD + out_TD)
        return x_TD

    def feed_forward_steps(self, b_TD: np.ndarray, weights: FeedForward, step: StepFactory) -> Steps:
        """Yield the steps of SwiGLU and return w2 · (silu(w1 · b) * (w3 · b)), (T, D)."""
        ops = self.ops
        gate_TF = yield step("gate", ops.linear(b_TD, weights.w1))
        up_TF = yield step("up", ops.linear(b_TD, weights.w3))
        hidden_TF = yield step("ffn_hidden", ops.swiglu(gate_TF, up_TF))
        out_TD = yield step("ffn_out", ops.linear(hidden_TF, weights.w2))
        return out_TD

    def expert_steps(self, b_TD: np.ndarray, weights: ExpertFeedForward, step: StepFactory) -> Steps:
        """Yield the steps of a mixture of SwiGLUs and return the mixed outputs (T, D).

        Each token goes through the experts whose weight for it is not 0. The output of each is multiplied by its
        weight. Then the outputs are added.
        """
        ops = self.ops
        assert self.config.moe is not None
        router_TE = yield step("router_logits", ops.linear(b_TD, weights.gate))
        weights_TE = yield step("expert_weights", ops.route(router_TE, self.config.moe.num_experts_per_tok))
        tokens_N, experts_N = np.nonzero(weights_TE)
        b_ND = b_TD[tokens_N]
        gate_NF = yield step("gate", ops.expert_linear(b_ND, experts_N, [expert.w1 for expert in weights.experts]))
        up_NF = yield step("up", ops.expert_linear(b_ND, experts_N, [expert.w3 for expert in weights.experts]))
        hidden_NF = yield step("ffn_hidden", ops.swiglu(gate_NF, up_NF))
        y_ND = ops.expert_linear(hidden_NF, experts_N, [expert.w2 for expert in weights.experts])
        out_TD = yield step("ffn_out", ops.mix_experts(y_ND, tokens_N, experts_N, weights_TE))
        return out_TD


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
