"""What stands around the content of a turn: taken from a tokenizer's chat template, or our own plain form.

Serving from a shared cache needs a rendering that only ever grows: whatever comes next, the text so far stays. Chat
templates are programs and promise nothing, so one is *probed* once, with conversations that bring every speaker after
every other, twice, and with content that tempts it to rewrite. Where it proves to be local (what frames a turn depends
on its speaker and the one before), stable (no earlier turn changes) and faithful to content (verbatim, trimmed or
escaped), its frames are read off, and the template is never run again: no content can ever act on it. Otherwise our own
plain form is used, and `TurnForm.reason` says why.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lragent.chat_messages import SPEAKERS
from lragent.errors import UserError

Pair = tuple[str | None, str]
"""The speaker of the turn before (None: there is none), and of this turn."""


@dataclass(frozen=True)
class Frame:
    """The texts around one turn's content: `before + opening + content + ending`.

    `opening` is the same for all turns of a speaker that open alike ("<|im_start|>assistant\\n"); `before` is what else
    a template puts there, such as a default system prompt. An assistant's `ending` begins with the end-of-turn token.
    """

    before: str
    opening: str
    ending: str


@dataclass(frozen=True)
class TurnForm:
    """All frames of a tokenizer, and how each speaker's content is written between them.

    `name`: whether the frames are the chat template's own; `reason`: why, in a sentence. A pair that is missing
    from `frames` cannot be rendered.
    """

    name: Literal["template", "plain"]
    reason: str
    frames: Mapping[Pair, Frame]
    write: Mapping[str, Callable[[str], str]]


def turn_form(tokenizer: Any, tools: Sequence[Mapping[str, Any]] = ()) -> TurnForm:
    """Probe the chat template of a transformers `tokenizer`; fall back to the plain form where it is unsuitable.

    tools: shown by the template, wherever it does so; they cannot be shown in the plain form. Raises `UserError` where
    that would be needed, and where the tokenizer has no token to end a turn of the plain form with.
    """
    if not getattr(tokenizer, "chat_template", None):
        return _plain_form(tokenizer, "the tokenizer has no chat template")
    try:
        return _template_form(tokenizer, tools)
    except _UnsuitableError as unsuitable:
        if tools:
            raise UserError(f"tools: cannot be shown: the chat template {unsuitable} when there are any.") from None
        return _plain_form(tokenizer, f"the chat template {unsuitable}")


def special_ids(tokenizer: Any) -> set[int]:
    """Return the ids that stand for special tokens, which no content may produce."""
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


class _UnsuitableError(Exception):
    """Why a chat template cannot be used, as the end of a sentence that begins with "the chat template"."""


# Every one of user, assistant and tool after every one of them, in two different orders.
_WALK = tuple({"u": "user", "a": "assistant", "t": "tool"}[letter] for letter in "uuaattutauttatuaauu")
_WALKS = (
    _WALK,
    ("system", *_WALK),
    ("system", "assistant", "user"),
    ("system", "tool", "assistant"),
    ("assistant", "assistant", "user"),
    ("tool", "assistant", "user"),
)
# Not needed: a template may refuse system messages later than the first.
_LATE_SYSTEM = (
    "user",
    "system",
    "user",
    "assistant",
    "system",
    "assistant",
    "tool",
    "system",
    "tool",
    "system",
    "system",
)

_TEMPTING = (' \t"a" \\ <think>b</think>\n\n{{ c }} é\n ', '\n\n<tool_call>{"a": 1}</tool_call>\n- b\n\n')


def _escaped(text: str) -> str:
    """As `tojson` writes a text, without the quotes, which belong to the frame (Llama 3.1 does so with tool output)."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


_WRITERS: tuple[Callable[[str], str], ...] = (str, str.strip, str.lstrip, str.rstrip, _escaped)


def _template_form(tokenizer: Any, tools: Sequence[Mapping[str, Any]]) -> TurnForm:
    frames: dict[Pair, tuple[str, str]] = {}
    for walk in _WALKS:
        _read_frames(tokenizer, walk, frames, tools)
    with_late_system = dict(frames)
    try:
        _read_frames(tokenizer, _LATE_SYSTEM, with_late_system, tools)
        frames = with_late_system
    except _UnsuitableError:
        pass
    write = _read_writers(tokenizer, frames, tools)

    opening, ending = frames["user", "assistant"]
    if not _ids(tokenizer, opening):
        raise _UnsuitableError("has nothing that opens an assistant turn")
    if not set(_ids(tokenizer, ending)[:1]) & special_ids(tokenizer):
        raise _UnsuitableError("does not end assistant turns with a special token")
    split = {}
    for pair, (head, tail) in frames.items():
        if pair[1] != "assistant":
            split[pair] = Frame("", head, tail)
        elif head.endswith(opening) and tail == ending:
            split[pair] = Frame(head.removesuffix(opening), opening, tail)
        else:
            raise _UnsuitableError("does not open and end all assistant turns alike")
    return TurnForm("template", "the chat template keeps what it wrote, turn after turn", split, write)


def _read_frames(
    tokenizer: Any, walk: tuple[str, ...], frames: dict[Pair, tuple[str, str]], tools: Sequence[Mapping[str, Any]]
) -> None:
    """Add the (head, tail) of every pair in `walk` to `frames`; refuse where a pair is framed in two ways."""
    contents = [f"qz{at}zq" for at in range(len(walk))]
    for at, (pair, segment) in enumerate(_segments(tokenizer, walk, contents, tools)):
        head, found, tail = segment.partition(contents[at])
        if not found or contents[at] in tail:
            raise _UnsuitableError(f"does not write the content of {pair[1]} messages where they stand")
        if frames.setdefault(pair, (head, tail)) != (head, tail):
            raise _UnsuitableError(
                f"writes a turn of {pair[1]} in different ways, depending on more than the turn before"
            )


def _read_writers(
    tokenizer: Any, frames: Mapping[Pair, tuple[str, str]], tools: Sequence[Mapping[str, Any]]
) -> dict[str, Callable[[str], str]]:
    """Find what the template does to each speaker's content."""
    possible = {speaker: list(_WRITERS) for speaker in SPEAKERS}
    for walk in _WALKS:
        for content in _TEMPTING:
            for pair, segment in _segments(tokenizer, walk, [content] * len(walk), tools):
                head, tail = frames[pair]
                fitting = [write for write in possible[pair[1]] if segment == head + write(content) + tail]
                if not fitting:
                    raise _UnsuitableError(f"rewrites the content of {pair[1]} messages")
                possible[pair[1]] = fitting
    return {speaker: fitting[0] for speaker, fitting in possible.items()}


def _segments(
    tokenizer: Any, walk: tuple[str, ...], contents: list[str], tools: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[Pair, str]]:
    """Yield what each message of `walk` adds to the text rendered so far."""
    before = ""
    for at, speaker in enumerate(walk):
        messages = [{"role": role, "content": content} for role, content in zip(walk[: at + 1], contents, strict=False)]
        previous = walk[at - 1] if at else None
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, tools=list(tools) or None)
        except Exception as error:  # a template is a program: it may raise anything
            after = f"a turn of {previous}" if previous else "nothing"
            raise _UnsuitableError(f"refuses a turn of {speaker} after {after} ({error})") from error
        if not text.startswith(before):
            raise _UnsuitableError(f"rewrites earlier turns when a turn of {speaker} follows one of {previous}")
        yield (previous, speaker), text[len(before) :]
        before = text


def _plain_form(tokenizer: Any, reason: str) -> TurnForm:
    """Our own form: ChatML where the tokenizer has its tokens, else `### speaker`, content, end-of-sequence token."""
    known = {tokenizer.convert_ids_to_tokens(index) for index in special_ids(tokenizer)}
    if {"<|im_start|>", "<|im_end|>"} <= known:
        opening, ending = "<|im_start|>{}\n", "<|im_end|>\n"
    elif tokenizer.eos_token:
        opening, ending = "### {}\n", f"{tokenizer.eos_token}\n"
    else:
        raise UserError(f"The tokenizer cannot render chats: {reason}, and it has no eos_token to end a turn with.")
    begin = tokenizer.bos_token if _adds_bos(tokenizer) else ""
    frames = {
        (before, speaker): Frame("" if before else begin, opening.format(speaker), ending)
        for before in (None, *SPEAKERS)
        for speaker in SPEAKERS
    }
    return TurnForm("plain", reason, frames, dict.fromkeys(SPEAKERS, str))


def _adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts a beginning-of-sequence token before plain text by itself."""
    return tokenizer.bos_token_id is not None and tokenizer("a").input_ids[0] == tokenizer.bos_token_id


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids
