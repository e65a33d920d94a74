"""The Mistral transformer. If you read one file, read this one.

The forward pass is a generator of named steps, written once. Whoever drives it receives each step and sends a value
back: `drain` sends every value straight back and so computes the logits; a Walk hands the steps to a reader, who may
look at them, or send back something else. So, in what follows,

    x = yield step(name, value)     shows this value, and goes on with whatever comes back
    x = yield from f(...)           takes the steps of f here, and what f returns

    tokens ─ embedding ─┬─ norm ─ attention ─ + ─┬─ norm ─ feed-forward ─ + ─ ... L blocks ... ─ norm ─ output ─ logits
                        └──────────>──────────┘  └──────────>───────────┘

Shapes: T tokens in this pass, S keys visible, D model width, H query heads, G key/value heads, K head width,
F feed-forward width, E experts, N (token, expert) pairs, V vocabulary. Sources: the block is Llama's (arXiv:2302.13971)
with grouped queries and a sliding window (Mistral 7B, arXiv:2310.06825), with experts Mixtral's (arXiv:2401.04088).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mistral_ref.cache import Pass
from mistral_ref.config import ModelConfig
from mistral_ref.ops import Ops
from mistral_ref.rope import Rotation
from mistral_ref.steps import StepFactory, Steps, step_factory
from mistral_ref.weights import ExpertFeedForward, FeedForward, Weights


@dataclass(frozen=True, eq=False)
class Transformer:
    """A configuration, weights that fit it, and the operations that compute with them."""

    config: ModelConfig
    weights: Weights
    ops: Ops

    def forward_steps(
        self, tokens_T: np.ndarray, this_pass: Pass, *, last_only: bool = False, observe_attention: bool = False
    ) -> Steps:
        """Yield every step of one pass and return logits (T, V), or (1, V) of the last token with `last_only`.

        `this_pass` is its place in a cache, which counts the tokens once the last step has gone back.
        """
        config, weights, ops = self.config, self.weights, self.ops
        step = step_factory(config)
        rotation = ops.rotation(this_pass.positions, config)
        x_TD = yield step("embedding", ops.embed(tokens_T, weights.tok_embeddings))
        for index in range(config.n_layers):
            x_TD = yield from self.block_steps(x_TD, index, rotation, this_pass, observe_attention)
        if last_only:
            x_TD = x_TD[-1:]
        x_TD = yield step("norm", ops.rms_norm(x_TD, weights.norm, config.norm_eps))
        logits_TV = yield step("logits", ops.linear(x_TD, weights.output))
        this_pass.cache.commit(this_pass)
        return logits_TV

    def block_steps(
        self, x_TD: np.ndarray, index: int, rotation: Rotation, this_pass: Pass, observe_attention: bool
    ) -> Steps:
        """One block: x + attention(norm(x)), then x + feed_forward(norm(x))."""
        config, ops, layer = self.config, self.ops, self.weights.layers[index]
        step = step_factory(config, index)
        order, eps = config.rope_row_order, config.norm_eps

        a_TD = yield step("attention_norm", ops.rms_norm(x_TD, layer.attention_norm, eps))
        q_THK = yield step("q", ops.split_heads(ops.linear(a_TD, layer.wq), config.n_heads, order))
        k_TGK = yield step("k", ops.split_heads(ops.linear(a_TD, layer.wk), config.n_kv_heads, order))
        v_TGK = yield step("v", ops.split_heads(ops.linear(a_TD, layer.wv), config.n_kv_heads, "interleaved"))
        q_THK = yield step("q_rotated", ops.rotate(q_THK, rotation.query_cos, rotation.query_sin))
        k_TGK = yield step("k_rotated", ops.rotate(k_TGK, rotation.key_cos, rotation.key_sin))
        this_pass.write(index, k_TGK, v_TGK)  # always write, then read: one rule for a prompt and a single token
        heads_THK = yield from ops.attention(q_THK, this_pass.keys(index), step if observe_attention else None)
        heads_THK = yield step("heads", heads_THK)
        out_TD = yield step("attention_out", ops.linear(heads_THK.reshape(len(x_TD), -1), layer.wo))
        x_TD = yield step("residual_after_attention", x_TD + out_TD)

        b_TD = yield step("ffn_norm", ops.rms_norm(x_TD, layer.ffn_norm, eps))
        if isinstance(layer.feed_forward, FeedForward):
            out_TD = yield from self.feed_forward_steps(b_TD, layer.feed_forward, step)
        else:
            out_TD = yield from self.expert_steps(b_TD, layer.feed_forward, step)
        x_TD = yield step("residual_after_ffn", x_TD + out_TD)
        return x_TD

    def feed_forward_steps(self, b_TD: np.ndarray, weights: FeedForward, step: StepFactory) -> Steps:
        """SwiGLU: w2 · (silu(w1 · b) * (w3 · b))."""
        ops = self.ops
        gate_TF = yield step("gate", ops.linear(b_TD, weights.w1))
        up_TF = yield step("up", ops.linear(b_TD, weights.w3))
        hidden_TF = yield step("ffn_hidden", ops.swiglu(gate_TF, up_TF))
        out_TD = yield step("ffn_out", ops.linear(hidden_TF, weights.w2))
        return out_TD

    def expert_steps(self, b_TD: np.ndarray, weights: ExpertFeedForward, step: StepFactory) -> Steps:
        """A mixture of SwiGLUs: each token goes through the experts whose weight is not 0; their outputs are mixed."""
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


def drain(steps: Steps, ops: Ops) -> np.ndarray:
    """Run a pass to its end, sending every value straight back; return what it returns."""
    with ops.running():
        step = next(steps)
        try:
            while True:
                step = steps.send(step.value)
        except StopIteration as end:
            return end.value
