"""Make chat_templates.json: the ids that transformers makes of conversations by chat templates.

    pip install "transformers==5.24.0" jinja2
    python tests/golden/make_chat_templates_golden.py

The tokenizers are small ones of tokenizer_json.json, with control tokens that tokenizer_config.json adds.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

HERE = Path(__file__).parent
CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and message.role != 'system' %}"
    "{{ '<|im_start|>system\nYou mend wheels.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HEADS = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role not in ('system', 'user', 'assistant') %}
        {{- raise_exception('no place for ' ~ message.role) }}
    {%- endif %}
    {{- '<|im_start|>' ~ message.role ~ '<|im_end|>\n\n' ~ message.content | trim ~ eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant<|im_end|>\n\n' }}
{%- endif %}
"""
TOOLS = """\
{% set found = namespace(calls=0) %}
{% if tools %}
<|im_start|>system
{% for tool in tools %}
{{ tool | tojson(indent=2) }}
{% endfor %}
<|im_end|>
{% endif %}
{% for message in messages %}
<|im_start|>{{ message.role }}
{% for call in message.tool_calls %}
{% set found.calls = found.calls + 1 %}
<tool>{{ found.calls }} {{ call.function.name }} {{ call.function.arguments | tojson }}
{% endfor %}
{{ message.content }}<|im_end|>
{% endfor %}
<|im_start|>assistant
"""


def said(*texts: str, system: str = "") -> list[dict[str, Any]]:
    turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    return [*([{"role": "system", "content": system}] if system else []), *turns]


FUNCTION = {"name": "mill", "description": "the é mill", "parameters": {"type": "object", "properties": {}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "mill", "arguments": {"wheel": "é", "n": 1.5}}}
CONVERSATIONS: list[dict[str, Any]] = [
    {"messages": said("Hi")},
    {"messages": said("")},
    {"messages": said("Hello 12345", " Yo!\n", "  it's\n\n the mill 🙂 漢 ")},
    {"messages": said("Hi", "", "Bye", system="She mended the wheel.\n")},
]
WITH_TOOLS: list[dict[str, Any]] = [
    {"messages": said("Hi"), "tools": [{"type": "function", "function": FUNCTION}] * 2},
    {
        "messages": [
            *said("Hi"),
            {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
            {"role": "tool", "content": '{"x": 1}', "tool_call_id": "c1"},
        ],
        "tools": [{"type": "function", "function": FUNCTION}],
    },
]


def tokenizer_config(template: str, n_pieces: int) -> dict[str, Any]:
    off = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    names = enumerate(("<|im_start|>", "<|im_end|>"), start=n_pieces)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": {str(token_id): off | {"content": name} for token_id, name in names},
        "bos_token": "<s>",
        "eos_token": "<|im_end|>",
        "chat_template": template,
        "clean_up_tokenization_spaces": False,
    }


def cases(document: dict[str, Any], config: dict[str, Any], conversations: list[dict[str, Any]]) -> list[Any]:
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "tokenizer.json").write_text(json.dumps(document))
        Path(directory, "tokenizer_config.json").write_text(json.dumps(config))
        tokenizer = AutoTokenizer.from_pretrained(directory)
    found = []
    for one in conversations:
        encoded = tokenizer.apply_chat_template(one["messages"], tools=one.get("tools"), add_generation_prompt=True)
        found.append(one | {"ids": encoded["input_ids"]})
    return found


if __name__ == "__main__":
    documents = {one["name"]: one["tokenizer"] for one in json.loads((HERE / "tokenizer_json.json").read_text())}
    golden = []
    for name in ("GPT-2", "single digits", "Llama 3"):
        n_ids = 1 + max(token["id"] for token in documents[name]["added_tokens"])
        for template, conversations in (
            (CHATML, CONVERSATIONS),
            (HEADS, CONVERSATIONS),
            (TOOLS, CONVERSATIONS + WITH_TOOLS),
        ):
            config = tokenizer_config(template, n_ids)
            found = cases(documents[name], config, conversations)
            golden.append({"tokenizer": name, "tokenizer_config": config, "cases": found})
    (HERE / "chat_templates.json").write_text(json.dumps(golden, ensure_ascii=True, separators=(",", ":")) + "\n")
