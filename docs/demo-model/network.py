"""Mistral's block in PyTorch, for training: the mathematics of mistral_ref with gradients.

Axes: B rows, T tokens, D width, H query heads, G key/value heads, R = H/G query heads of a group, K head width,
W window, N = T/W blocks, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """The architecture; the fields are those of Mistral's params.json."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int
    vocab_size: int
    sliding_window: int
    tied_embeddings: bool
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0


class Attention(nn.Module):
    """Grouped-query attention in which position i sees positions j with 0 <= i - j < W."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        q_out, kv_out = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
        self.wq = nn.Linear(shape.dim, q_out, bias=False)
        self.wk = nn.Linear(shape.dim, kv_out, bias=False)
        self.wv = nn.Linear(shape.dim, kv_out, bias=False)
        self.wo = nn.Linear(q_out, shape.dim, bias=False)

    def forward(self, x_BTD: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        """Attend in blocks of W queries, which see no keys but their own block's and those of the block before.

        That is the band mask over all T keys without the part of it that is empty everywhere. The R query heads that
        share a key/value head become further rows of one product.
        """
        B, T, _ = x_BTD.shape
        W, G, K = self.shape.sliding_window, self.shape.n_kv_heads, self.shape.head_dim
        N, R = T // W, self.shape.n_heads // G
        q = rotate(self.wq(x_BTD).view(B, T, G * R, K), rotation).view(B, N, W, G, R, K)
        k = with_block_before(rotate(self.wk(x_BTD).view(B, T, G, K), rotation), W)
        v = with_block_before(self.wv(x_BTD).view(B, T, G, K), W)
        q = q.permute(0, 1, 3, 4, 2, 5).reshape(B * N, G, R * W, K)
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.repeat(B, 1, R, 1))
        heads = heads.view(B, N, G, R, W, K).permute(0, 1, 4, 2, 3, 5)
        return self.wo(heads.reshape(B, T, G * R * K))


def with_block_before(x_BTGK: Tensor, W: int) -> Tensor:
    """Cut T into blocks of W and put before each the one that precedes it: (B * N, G, 2 W, K)."""
    B, T, G, K = x_BTGK.shape
    blocks = F.pad(x_BTGK, (0, 0, 0, 0, W, 0)).view(B, T // W + 1, W, G, K)
    return torch.cat((blocks[:, :-1], blocks[:, 1:]), dim=2).flatten(0, 1).transpose(1, 2)


def window_mask(T: int, W: int) -> Tensor:
    """Return (N, 1, W, 2 W): may query w of block n see key s of that block and the one before? 0 <= i - j < W."""
    distance = torch.arange(W, 2 * W)[:, None] - torch.arange(2 * W)
    mask = ((distance >= 0) & (distance < W)).repeat(T // W, 1, 1, 1)
    mask[0, ..., :W] = False  # nothing stands before the first block
    return mask


def rotation_table(T: int, shape: Shape) -> tuple[Tensor, Tensor]:
    """Return cosines and sines (T, 1, K/2) of position * theta^(-2j/K), computed in float64."""
    frequencies = shape.rope_theta ** (-torch.arange(0, shape.head_dim, 2, dtype=torch.float64) / shape.head_dim)
    angles = torch.outer(torch.arange(T, dtype=torch.float64), frequencies)[:, None]
    return angles.cos().float(), angles.sin().float()


def rotate(x_BTHK: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """RoPE on neighbouring pairs (x0, x1), (x2, x3), ..., as in Mistral's own files."""
    cos, sin = rotation
    even, odd = x_BTHK[..., 0::2], x_BTHK[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.w1 = nn.Linear(shape.dim, shape.hidden_dim, bias=False)
        self.w2 = nn.Linear(shape.hidden_dim, shape.dim, bias=False)
        self.w3 = nn.Linear(shape.dim, shape.hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(shape.dim, eps=shape.norm_eps)
        self.attention = Attention(shape)
        self.ffn_norm = nn.RMSNorm(shape.dim, eps=shape.norm_eps)
        self.feed_forward = FeedForward(shape)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor, dropout: float) -> Tensor:
        x = x + F.dropout(self.attention(self.attention_norm(x), rotation, mask), dropout, self.training)
        return x + F.dropout(self.feed_forward(self.ffn_norm(x)), dropout, self.training)


class Mistral(nn.Module):
    """The whole model; the names of its parameters are those in Mistral's own files."""

    def __init__(self, shape: Shape, dropout: float = 0.0) -> None:
        super().__init__()
        self.shape, self.dropout = shape, dropout
        self.tok_embeddings = nn.Embedding(shape.vocab_size, shape.dim)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.n_layers))
        self.norm = nn.RMSNorm(shape.dim, eps=shape.norm_eps)
        if not shape.tied_embeddings:
            self.output = nn.Linear(shape.dim, shape.vocab_size, bias=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:  # what writes to the residual stream starts smaller, by the number of writers
                writes = name.endswith(("wo.weight", "w2.weight"))
                nn.init.normal_(weight, std=0.02 / (math.sqrt(2 * shape.n_layers) if writes else 1))

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Return logits (B, T, V); T is a multiple of W."""
        T = tokens_BT.shape[1]
        rotation, mask = rotation_table(T, self.shape), window_mask(T, self.shape.sliding_window)
        x = F.dropout(self.tok_embeddings(tokens_BT), self.dropout, self.training)
        for layer in self.layers:
            x = layer(x, rotation, mask, self.dropout)
        matrix = self.tok_embeddings.weight if self.shape.tied_embeddings else self.output.weight
        return F.linear(self.norm(x), matrix)
