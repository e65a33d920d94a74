"""Train the demonstration model: Mistral's block, small, with a sliding window, on little stories.

    python docs/demo-model/train.py --corpora FOLDER --out FOLDER

Four stages, each of which may be run alone with --stage: `corpus` writes the stories and the tokenizer, `train` the
weights, `export` a directory that mistral_ref loads, `curve` a picture. Training goes on from its last checkpoint when
it was interrupted, and ends with the same weights as if it had not been: everything random is a function of the seed
and the step. Needs torch (2.5 or later), sentencepiece and rich, and matplotlib for the picture.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import time
from pathlib import Path

import corpus
import sentencepiece
import torch
import torch.nn.functional as F
from network import Mistral, Shape
from optimizers import decay, make_optimizers, rate
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

BOS, EOS = 1, 2


class Rows:
    """Endless rows of T + 1 tokens: every epoch all stories in a new order, end to end, and cut where it falls."""

    def __init__(self, stories: list[list[int]], T: int, batch: int, seed: int) -> None:
        self.stories, self.T, self.batch, self.seed = stories, T, batch, seed
        self.steps_per_epoch = (sum(map(len, stories)) - T - 1) // (T * batch)
        self.epoch = -1

    def at(self, step: int) -> Tensor:
        """Return the rows (B, T + 1) of one step, a function of seed and step alone."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            chance = random.Random(f"{self.seed} {epoch}")
            order = chance.sample(self.stories, len(self.stories))
            stream = torch.tensor([token for story in order for token in story])
            self.epoch, self.stream = epoch, stream[chance.randrange(self.T) :]
        start = within * self.T * self.batch
        return torch.stack([self.stream[start + b * self.T :][: self.T + 1] for b in range(self.batch)])


def read_tokens(out: Path, name: str) -> list[list[int]]:
    """Return each story of `name`.json as BOS, its pieces, EOS."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(out / "tokenizer.model"))
    stories = json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
    return [[BOS, *ids, EOS] for ids in processor.encode(stories)]


@torch.no_grad()
def held_out_loss(model: Mistral, stories: list[list[int]], T: int) -> float:
    """Return the mean loss in nats of every token of the held-out stories end to end, in rows of T."""
    stream = torch.tensor([token for story in stories for token in story])
    rows = stream[: (len(stream) - 1) // T * T + 1]
    total = 0.0
    for start in range(0, len(rows) - 1, 8 * T):
        inputs, targets = rows[start : start + 8 * T], rows[start + 1 : start + 8 * T + 1]
        logits = model(inputs[: len(targets)].view(-1, T))
        total += float(F.cross_entropy(logits.flatten(0, 1), targets, reduction="sum"))
    return total / (len(rows) - 1)


@torch.no_grad()
def sample(model: Mistral, out: Path, seed: int, prompt: str = "Once upon a time", tokens: int = 80) -> str:
    """Return a continuation at temperature 0.8, the whole text read again for every token."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(out / "tokenizer.model"))
    ids, chance, W = [BOS, *processor.encode(prompt)], torch.Generator().manual_seed(seed), model.shape.sliding_window
    for _ in range(tokens):
        padded = torch.tensor([ids + [EOS] * (-len(ids) % W)])
        odds = (model(padded)[0, len(ids) - 1] / 0.8).softmax(-1)
        ids.append(int(torch.multinomial(odds, 1, generator=chance)))
        if ids[-1] == EOS:
            break
    return processor.decode(ids)


def train_step(
    model: Mistral, optimizers: list[torch.optim.Optimizer], rows: Rows, step: int, args: argparse.Namespace
) -> float:
    """Take one step and return its loss."""
    torch.manual_seed(args.seed * 1_000_000 + step)  # what dropout leaves out depends on the step alone
    model.dropout = args.dropout * decay(step, args.steps)
    batch = rows.at(step)
    logits = model(batch[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * rate(step, args.steps)
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach())


def save(path: Path, content: object) -> None:
    """Write a file whole or not at all, so that being killed here leaves the last one."""
    torch.save(content, path.with_suffix(".partial"))
    os.replace(path.with_suffix(".partial"), path)


def resume(out: Path, model: Mistral, optimizers: list[torch.optim.Optimizer]) -> dict:
    """Load the last checkpoint if there is one, and cut the log off where it was made; return where training stands."""
    state = {"step": 0, "seconds": 0.0, "best": float("inf")}
    if (out / "last.pt").exists():
        last = torch.load(out / "last.pt", weights_only=True)
        model.load_state_dict(last["model"])
        for optimizer, content in zip(optimizers, last["optimizers"], strict=True):
            optimizer.load_state_dict(content)
        state = last["state"]
    log = out / "log.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    kept = [line for line in lines if json.loads(line)["step"] <= state["step"]]
    log.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    return state


def train(args: argparse.Namespace, shape: Shape) -> None:
    """Train to the last step; leave last.pt (everything), best.pt (weights of the lowest held-out loss), log.jsonl."""
    torch.manual_seed(args.seed)
    model = Mistral(shape, args.dropout)
    optimizers = make_optimizers(model, args.optimizer, args.muon_lr, args.adam_lr, args.weight_decay)
    rows = Rows(read_tokens(args.out, "train"), args.tokens, args.rows, args.seed)
    hidden = read_tokens(args.out, "heldout")
    state = resume(args.out, model, optimizers)
    began = time.monotonic() - state["seconds"]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn()) as progress:
        task = progress.add_task("training", total=args.steps, completed=state["step"])
        losses: list[float] = []
        for step in range(state["step"], args.steps):
            losses.append(train_step(model, optimizers, rows, step, args))
            done = step + 1
            progress.update(task, completed=done, description=f"loss {losses[-1]:.3f}")
            if done % args.check_every and done != args.steps:
                continue
            state = {**state, "step": done, "seconds": time.monotonic() - began}
            entry = check(model, args, hidden, state, losses)
            progress.console.print(
                f"step {done}: held-out loss {entry['heldout']:.4f}\n{entry['sample']}", markup=False
            )
            contents = [optimizer.state_dict() for optimizer in optimizers]
            save(args.out / "last.pt", {"model": model.state_dict(), "optimizers": contents, "state": state})
            losses = []


def check(model: Mistral, args: argparse.Namespace, hidden: list[list[int]], state: dict, losses: list[float]) -> dict:
    """Measure the held-out loss, write a sample, add a line to the log, and keep the weights if they are the best."""
    model.eval()
    loss = held_out_loss(model, hidden, args.tokens)
    tokens = state["step"] * args.tokens * args.rows
    entry = {"step": state["step"], "tokens": tokens, "seconds": round(state["seconds"], 1)}
    entry |= {"train": sum(losses) / len(losses), "heldout": loss, "sample": sample(model, args.out, args.seed)}
    model.train()
    if loss < state["best"]:
        state["best"] = loss
        save(args.out / "best.pt", model.state_dict())
    with (args.out / "log.jsonl").open("a", encoding="utf-8") as log:
        log.write(json.dumps(entry, ensure_ascii=False) + "\n")
    return entry


def export(args: argparse.Namespace, shape: Shape) -> None:
    """Write the best weights in bfloat16 (rounded to nearest, ties to even) beside params.json and the tokenizer."""
    args.export.mkdir(parents=True, exist_ok=True)
    weights = torch.load(args.out / "best.pt", weights_only=True)
    tensors = {name: weight.to(torch.bfloat16).contiguous() for name, weight in weights.items()}
    (args.export / "consolidated.safetensors").write_bytes(safetensors_bytes(tensors))
    params = json.dumps(dataclasses.asdict(shape), indent=4) + "\n"
    (args.export / "params.json").write_text(params, encoding="utf-8")
    (args.export / "tokenizer.model").write_bytes((args.out / "tokenizer.model").read_bytes())


def draw_curve(log: Path, picture: Path) -> None:
    """Draw training and held-out loss against tokens seen."""
    import matplotlib.pyplot as plt  # noqa: PLC0415 (needed for this stage alone)

    entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    seen = [entry["tokens"] / 1e6 for entry in entries]
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    axes.plot(seen, [entry["train"] for entry in entries], label="training (with dropout)", color="#999999")
    axes.plot(seen, [entry["heldout"] for entry in entries], label="held out", color="#d9480f")
    last = entries[-1]["heldout"]
    axes.annotate(f"{last:.3f}", (seen[-1], last), xytext=(0, 8), textcoords="offset points", ha="right")
    axes.set(xlabel="tokens seen (millions)", ylabel="loss (nats a token)", ylim=(None, 4.5))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(picture, dpi=110)


def parse() -> argparse.Namespace:
    """Read the command line; its defaults are those of the model in the package."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--corpora", type=Path, help=f"folder that holds {corpus.CASED} and {corpus.LOWERED}")
    add("--out", type=Path, required=True, help="folder for stories, tokenizer, checkpoints and log (not committed)")
    add("--export", type=Path, help="folder for the finished model; default: OUT/model")
    add("--stage", choices=("all", "corpus", "train", "export", "curve"), default="all", help="default: %(default)s")
    add("--seed", type=int, default=1, help="of the hold-out, the weights, the order and dropout (%(default)s)")
    add("--held-out", type=int, default=200, help="how many stories are never trained on (%(default)s)")
    add("--vocab-size", type=int, default=2048, help="V: pieces of the tokenizer (%(default)s)")
    add("--dim", type=int, default=224, help="D: width of the residual stream (%(default)s)")
    add("--layers", type=int, default=5, help="L: number of blocks (%(default)s)")
    add("--heads", type=int, default=8, help="H: query heads, of 32 dimensions each (%(default)s)")
    add("--kv-heads", type=int, default=2, help="G: key/value heads, each shared by H/G query heads (%(default)s)")
    add("--hidden-dim", type=int, default=512, help="F: width of the feed-forward network (%(default)s)")
    add("--window", type=int, default=64, help="W: tokens that one sees in a layer, itself included (%(default)s)")
    add("--untied", action="store_true", help="train an output matrix of its own instead of using the embeddings'")
    add("--tokens", type=int, default=512, help="T: tokens of a row, a multiple of W, over (W-1) L (%(default)s)")
    add("--rows", type=int, default=8, help="B: rows of a step (%(default)s)")
    add("--steps", type=int, default=4000, help="how many steps; the learning rate ends at 0 (%(default)s)")
    add("--check-every", type=int, default=100, help="steps between checkpoints, each with a sample (%(default)s)")
    add("--optimizer", choices=("muon", "adamw"), default="muon", help="for the blocks' matrices (%(default)s)")
    add("--muon-lr", type=float, default=0.02, help="peak learning rate of Muon (%(default)s)")
    add("--adam-lr", type=float, default=0.004, help="peak learning rate of AdamW (%(default)s)")
    add("--weight-decay", type=float, default=0.2, help="pull towards 0, but for norms (%(default)s)")
    add("--dropout", type=float, default=0.2, help="share of the updates left out; to 0 with the rate (%(default)s)")
    add("--threads", type=int, default=2, help="CPU threads; results are the same for the same number (%(default)s)")
    args = parser.parse_args()
    if args.tokens % args.window or args.tokens < (args.window - 1) * args.layers + 1:
        parser.error("--tokens must be a multiple of --window and at least (window - 1) * layers + 1")
    if args.corpora is None and args.stage in ("all", "corpus"):
        parser.error("--corpora is needed to make the training text")
    return args


def main() -> None:
    args = parse()
    args.export = args.export or args.out / "model"
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)
    shape = Shape(
        dim=args.dim, n_layers=args.layers, n_heads=args.heads, n_kv_heads=args.kv_heads, head_dim=32,
        hidden_dim=args.hidden_dim, vocab_size=args.vocab_size, sliding_window=args.window,
        tied_embeddings=not args.untied,
    )  # fmt: skip
    if args.stage == "corpus" or (args.stage == "all" and not (args.out / "heldout.json").exists()):
        facts = corpus.prepare(args.corpora, args.out, args.vocab_size, args.held_out, args.seed)
        (args.out / "corpus.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    if args.stage in ("all", "train"):
        train(args, shape)
    if args.stage in ("all", "export"):
        export(args, shape)
    if args.stage in ("all", "curve"):
        draw_curve(args.out / "log.jsonl", args.out / "curve.png")


if __name__ == "__main__":
    main()
