"""Tiny SentencePiece models for tests, trained in memory on the paragraph below; the same bytes each time."""

from __future__ import annotations

import functools
import io

from sentencepiece import SentencePieceTrainer

PARAGRAPH = """\
The mill stood where the river bends, and the miller counted in sacks: one for the baker, two for the inn.
"Grain is patient," she would say, "but water is not." When the river ran low she mended the wheel; when it ran high she
slept badly, and listened.
Her neighbour, a clockmaker from Zürich, kept his own count: café, naïve, œuvre, collected as others keep coins.
He wrote them on slips of paper, 12 to a page, with the date and the weather: ☀, ☂, and once, after a feast, 🙂.
When the wheel broke in March they mended it together. It took nine days, 41 nails and a good deal of bread.
"""

# What the variants differ in: whether a space is put before the text (and dropped again when decoding), and whether
# spaces at the ends and in rows are removed. "mistral" is as in Mistral's files, "verbatim" changes nothing at all.
VARIANTS: dict[str, dict[str, object]] = {
    "mistral": {"normalization_rule_name": "identity", "add_dummy_prefix": True, "remove_extra_whitespaces": False},
    "verbatim": {"normalization_rule_name": "identity", "add_dummy_prefix": False, "remove_extra_whitespaces": False},
    "default": {"normalization_rule_name": "nmt_nfkc", "add_dummy_prefix": True, "remove_extra_whitespaces": True},
    "no_prefix": {"normalization_rule_name": "nmt_nfkc", "add_dummy_prefix": False, "remove_extra_whitespaces": True},
}


@functools.cache
def tiny_tokenizer(variant: str = "mistral") -> bytes:
    """Return the model file of one variant: BPE with byte fallback; <unk> 0, <s> 1, </s> 2, [INST] 3, [/INST] 4."""
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(PARAGRAPH.splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=384,
        byte_fallback=True,
        control_symbols=["[INST]", "[/INST]"],
        user_defined_symbols=["▁▁"],
        unk_id=0,
        bos_id=1,
        eos_id=2,
        num_threads=1,
        minloglevel=2,
        **VARIANTS[variant],
    )
    return model.getvalue()


def more_pieces(n: int, text: str = "%07x", tail: bytes = b"") -> bytes:
    """Return n pieces to be put behind a model: in protobuf, a field is a tag, a length and a content.

    text    of a piece, with its number; tail: the fields behind the text
    """
    fields = [b"\x0a" + bytes([len(piece)]) + piece + tail for piece in ((text % i).encode() for i in range(n))]
    return b"".join(b"\x0a" + bytes([len(field)]) + field for field in fields)
