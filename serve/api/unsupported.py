"""Fields that other servers act on and this one does not yet: refused by name unless they say what happens anyway."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from lragent.errors import UserError
from lragent.serve.api.errors import shown

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "prompt_logprobs": (),
    "length_penalty": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    # vLLM's and SGLang's own
    "bad_words": ([],),
    "allowed_token_ids": (),
    "use_beam_search": (False,),
    "truncate_prompt_tokens": (),
    "prompt_embeds": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "regex": (),
    "json_schema": (),
    "ebnf": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "add_generation_prompt": (True,),
}
"""Field -> the values that change nothing. null never changes anything."""


def check_unsupported(body: Mapping[str, Any], known: Collection[str]) -> None:
    """Raise UserError naming the first field of `body` that asks for what is not supported. known: the fields that its
    endpoint acts on."""
    if body.get("chat_template") is not None:
        raise UserError("chat_template: templates are not taken from requests; leave it out, the model's own is used.")
    for name, neutral in NEUTRAL.items():
        value = body.get(name)
        if name in known or value is None or any(_same(value, each) for each in neutral):
            continue
        instead = f" or send {' or '.join(map(repr, neutral))}" if neutral else ""
        raise UserError(f"{name}: {shown(value)} is not supported yet; leave it out{instead}.")


def _same(value: Any, neutral: Any) -> bool:
    """Equal, where a bool is not a number."""
    return isinstance(value, bool) == isinstance(neutral, bool) and bool(value == neutral)
