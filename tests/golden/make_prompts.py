"""Write `tests/golden/prompts.json.gz`: the prompts that HF transformers makes of the conversations of the tests.

    pip install transformers
    python -m tests.golden.make_prompts

For each template and conversation: the prompt (or the template's refusal), its token ids by the embedded tokenizer as a
SHA-256, and whether transformers makes the same of the messages as a user of ours gives them ("same"), makes something
else ("other") or fails ("error").
"""

from __future__ import annotations

import gzip
import hashlib
import json
from typing import Any

import transformers
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from checkpoints import TINY
from tests.helpers.conversations import CONVERSATIONS, PROMPTS, TEMPLATE_NAMES, Conversation, template_text


def render(tokenizer: Any, template: str, messages: list[dict[str, Any]], conversation: Conversation) -> dict[str, Any]:
    """The prompt of transformers, or its refusal."""
    options = {
        "tools": conversation.tools,
        "chat_template": template,
        "add_generation_prompt": conversation.add_generation_prompt,
        **conversation.kwargs,
    }
    try:
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, **options)
        ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
    except TemplateError as error:
        return {"refusal": str(error)}
    except Exception as error:
        return {"error": repr(error)}
    return {"prompt": prompt, "ids": hashlib.sha256(json.dumps(ids).encode()).hexdigest()}


def main() -> None:
    """Write the file."""
    config = json.loads((TINY / "tokenizer_config.json").read_text(encoding="utf-8"))
    special = {name: config[name] for name in ("eos_token", "pad_token")}
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(TINY / "tokenizer.json"), **special)
    answers: dict[str, Any] = {"transformers_version": transformers.__version__, "prompts": {}}
    for name in TEMPLATE_NAMES:
        template = template_text(name)
        for title, conversation in CONVERSATIONS.items():
            raw = render(tokenizer, template, conversation.messages, conversation)
            plain = render(tokenizer, template, conversation.plain or conversation.messages, conversation)
            if "error" in plain:
                raise ValueError(f"{name}, {title}: {plain}")
            how = "same" if raw == plain else "error" if "error" in raw else "other"
            answers["prompts"].setdefault(name, {})[title] = {**plain, "as_given": how}
    PROMPTS.write_bytes(gzip.compress(json.dumps(answers, ensure_ascii=False, indent=1).encode(), mtime=0))
    print(f"{PROMPTS}: {PROMPTS.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
