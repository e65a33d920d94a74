"""A port of the Mistral transformer by hand, in NumPy alone, and the dumps that the conformance kit asks for.

    python port.py KIT DUMPS

It reads Mistral's layout and computes a text in one pass, without a cache. It shows what a port has to get right.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file


def read_tensors(path):
    """Return the tensors of a safetensors file as float32; fp8 tensors are multiplied by their scales."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    tensors = {}
    for name, entry in json.loads(data[8:end]).items():
        if name == "__metadata__":
            continue
        first, last = entry["data_offsets"]
        raw = np.frombuffer(
            data[end + first : end + last], {"BF16": "<u2", "F32": "<f4", "F8_E4M3": "u1"}[entry["dtype"]]
        )
        if entry["dtype"] == "BF16":  # the upper half of a float32
            raw = (raw.astype(np.uint32) << 16).view(np.float32)
        elif entry["dtype"] == "F8_E4M3":  # sign, four bits of exponent, three of mantissa
            exponent, mantissa = raw >> 3 & 15, raw & 7
            size = np.where(
                exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent.astype(int) - 7)
            )
            raw = np.where(raw < 128, size, -size)
        tensors[name] = raw.reshape(entry["shape"]).astype(np.float32)
    for name in [name for name in tensors if name.endswith(".qscale_weight")]:
        tensors[name.replace("qscale_", "")] *= tensors[name]
    return tensors


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


class Port:
    def __init__(self, directory):
        self.params = json.loads((directory / "params.json").read_text())
        self.weights = read_tensors(directory / "consolidated.safetensors")

    def norm(self, x, name):
        return (
            x
            / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + self.params["norm_eps"])
            * self.weights[f"{name}.weight"]
        )

    def linear(self, x, name):
        return x @ self.weights[f"{name}.weight"].T

    def angles(self, positions):
        """Return the angle of each pair at each position, and by what cosines and sines are multiplied."""
        width, theta = self.params["head_dim"], self.params["rope_theta"]
        pair, yarn = np.arange(width // 2), self.params.get("yarn")
        turn, scale = theta ** (-2.0 * pair / width), 1.0
        if yarn:
            length = yarn["original_max_position_embeddings"]
            ends = [
                width * math.log(length / (r * 2 * math.pi)) / (2 * math.log(theta))
                for r in (yarn["beta"], yarn["alpha"])
            ]
            low, high = max(math.floor(ends[0]), 0), min(math.ceil(ends[1]), width - 1)
            share = np.clip((pair - low) / (high - low), 0, 1)
            turn = turn / yarn["factor"] * share + turn * (1 - share)
            scale = 0.1 * math.log(yarn["factor"]) + 1 if yarn["apply_scale"] else 1.0
        return np.outer(positions, turn), scale

    def rotate(self, x, angle, scale):
        """Turn the pairs (0, 1), (2, 3), ... of each head."""
        cos, sin = scale * np.cos(angle)[:, None], scale * np.sin(angle)[:, None]
        turned = np.empty_like(x)
        turned[..., ::2] = x[..., ::2] * cos - x[..., 1::2] * sin
        turned[..., 1::2] = x[..., ::2] * sin + x[..., 1::2] * cos
        return turned

    def temperature(self, positions):
        scaling = self.params.get("llama_4_scaling")
        if not scaling:
            return np.ones((len(positions), 1, 1))
        multiple = positions // scaling["original_max_position_embeddings"]
        return 1 + scaling["beta"] * np.log(1 + multiple)[:, None, None]

    def visible(self, positions, layer):
        windows = self.params.get("sliding_window")
        distance = positions[:, None] - positions
        return (distance >= 0) & (distance < windows[layer] if windows and windows[layer] else True)

    def of_query_heads(self, x):
        return np.repeat(x, self.params["n_heads"] // self.params["n_kv_heads"], axis=1)

    def attention(self, x, layer):
        name, n_tokens, positions = f"layers.{layer}.attention", len(x), np.arange(len(x))
        q, k, v = (
            self.linear(x, f"{name}.{one}").reshape(n_tokens, -1, self.params["head_dim"]) for one in ("wq", "wk", "wv")
        )
        angle, scale = self.angles(positions)
        q, k = self.rotate(q, angle, scale) * self.temperature(positions), self.rotate(k, angle, scale)
        scores = np.einsum("thk,shk->hts", q, self.of_query_heads(k)) / math.sqrt(self.params["head_dim"])
        weights = softmax(np.where(self.visible(positions, layer), scores, -np.inf))
        heads = np.einsum("hts,shk->thk", weights, self.of_query_heads(v))
        return self.linear(heads.reshape(n_tokens, -1), f"{name}.wo")

    def network(self, x, name):
        gate = self.linear(x, f"{name}.w1")
        return self.linear(gate / (1 + np.exp(-gate)) * self.linear(x, f"{name}.w3"), f"{name}.w2")

    def feed_forward(self, x, layer):
        name, moe = f"layers.{layer}.feed_forward", self.params.get("moe")
        if not moe:
            return self.network(x, name)
        router = self.linear(x, f"{name}.gate")
        chosen = np.argsort(-router, axis=-1)[:, : moe["num_experts_per_tok"]]
        shares = np.zeros_like(router)
        np.put_along_axis(shares, chosen, softmax(np.take_along_axis(router, chosen, axis=-1)), axis=-1)
        return sum(shares[:, e, None] * self.network(x, f"{name}.experts.{e}") for e in range(moe["num_experts"]))

    def logits(self, tokens):
        x = self.weights["tok_embeddings.weight"][tokens]
        for layer in range(self.params["n_layers"]):
            x = x + self.attention(self.norm(x, f"layers.{layer}.attention_norm"), layer)
            x = x + self.feed_forward(self.norm(x, f"layers.{layer}.ffn_norm"), layer)
        return self.linear(self.norm(x, "norm"), "tok_embeddings" if self.params["tied_embeddings"] else "output")


def dump(kit, dumps, port=Port):
    """Write the logits of every text of a kit."""
    dumps.mkdir(exist_ok=True)
    for model in json.loads((kit / "kit.json").read_text())["models"]:
        engine = port(kit / model["name"] / "mistral")
        for text, about in model["texts"].items():
            logits = engine.logits(np.array(about["tokens"])).astype(np.float32)
            save_file({"logits": np.ascontiguousarray(logits)}, dumps / f"{model['name']}-{text}.safetensors")


if __name__ == "__main__":
    dump(Path(sys.argv[1]), Path(sys.argv[2]))
