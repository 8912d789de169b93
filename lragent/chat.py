"""The one renderer: messages of a trajectory to token ids, the same in training and in serving.

Each turn is put together from separately tokenised pieces: what opens it, its content, what ends it. So the ids of a
longer trajectory always begin with the ids of a shorter one, and caches can be found by tokens. The LoRA role that
wrote an assistant message (its `name`) never reaches the text: all roles share one token prefix.
"""

import copy
import dataclasses
import hashlib
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from lragent.chat_frames import Frame, Pair, special_ids, turn_form
from lragent.chat_messages import read_messages
from lragent.chat_tools import ToolForm, tool_form
from lragent.errors import UserError
from lragent.modes import PrefixWriter
from lragent.token_memo import TokenMemo

BASE = "base"
"""The role without an adapter."""

Recall = Callable[[list[int], str], Sequence[int] | None]
"""`(ids up to and with the opening, content)` to the content ids that were generated there, without end-of-turn."""


@dataclass(frozen=True)
class Rendered:
    """A trajectory as tokens.

    `authors[t]` is the role that authored token t: the `name` of the assistant message, for its content and its
    end-of-turn token; None for all else. `openings` are the half-open spans of the tokens that open assistant turns
    ("<|im_start|>assistant\\n"); when a turn was asked for, its opening is the last span and ends the ids. `unlearnt`
    are the spans that were authored and are not to be imitated (messages of `weight: 0`).
    """

    token_ids: list[int]
    authors: list[str | None]
    openings: list[tuple[int, int]]
    unlearnt: tuple[tuple[int, int], ...] = ()
    tool_spans: tuple[tuple[int, int], ...] = ()
    """The half-open spans of what tools have said."""

    @property
    def first_authored(self) -> int:
        """The index of the first authored token; the length where nothing is authored."""
        return next((at for at, author in enumerate(self.authors) if author is not None), len(self.authors))


@dataclass(frozen=True)
class _FrameIds:
    before: list[int]
    opening: list[int]
    end_of_turn: list[int]
    """What the author of an assistant turn writes after the content: one token; empty for other speakers."""
    after: list[int]


class Renderer:
    """Renders messages for one tokenizer; safe to call from several threads."""

    def __init__(self, tokenizer: Any) -> None:
        """Probe the chat template of a transformers `tokenizer`, once (`lragent.chat_frames` says how).

        Raises `UserError` where the tokenizer can render no chats at all.
        """
        self._given = tokenizer
        form = turn_form(tokenizer)
        self.form: Literal["template", "plain"] = form.name
        self.reason = form.reason
        # Whether special tokens in a text are parsed is state of a tokenizer, so the one that reads content is private.
        self._tokenizer = copy.deepcopy(tokenizer)
        self._lock = threading.Lock()
        self._encode = TokenMemo(self._tokenise_contents)
        self._write = form.write
        self._frames: dict[Pair, _FrameIds] = {pair: self._tokenise(pair, frame) for pair, frame in form.frames.items()}
        self.end_of_turn: int = self._frames["user", "assistant"].end_of_turn[0]
        self._check_specials_are_spelt_out()

    @cached_property
    def tool_form(self) -> ToolForm | None:
        """How this tokenizer's chat template writes tool calls; None where it has no form that is known."""
        return tool_form(self._given) if self.form == "template" else None

    def with_tools(self, tools: Sequence[Mapping[str, Any]]) -> "Renderer":
        """A renderer that shows `tools`, OpenAI's, where the chat template does. Takes some tens of milliseconds.

        Raises `UserError` where the template's form would not keep what it wrote.
        """
        shown = json.dumps(tools, ensure_ascii=False)
        for index in special_ids(self._tokenizer):
            name = self._tokenizer.convert_ids_to_tokens(index)
            if name in shown:
                raise UserError(f"tools: hold {name!r}, which is a special token of this model.")
        form = turn_form(self._given, tools)
        other = copy.copy(self)
        with self._lock:
            other._frames = {pair: self._tokenise(pair, frame) for pair, frame in form.frames.items()}
        other._write = form.write
        return other

    def digest(self) -> str:
        """What the renderer makes of messages, as one digest: of the tokenizer and of the frames of its turns."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        words = backend.to_str() if backend is not None else json.dumps(sorted(self._tokenizer.get_vocab().items()))
        frames = sorted((str(pair), dataclasses.astuple(frame)) for pair, frame in self._frames.items())
        return hashlib.sha256(json.dumps([words, self.form, frames]).encode()).hexdigest()

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, ask: bool = False, recall: Recall | None = None
    ) -> Rendered:
        """Render `messages`; with `ask`, also the opening of the assistant turn that is now asked for.

        Content is always read as text: a special token's name in it is spelt out, never parsed. `recall` may give the
        ids that were generated for an assistant message, so that another tokenisation of the same text costs no miss;
        it must not keep or change the list it is given. Raises `UserError` that begins with the field.
        """
        turns = read_messages(messages, tools=self.tool_form)
        contents = self._encode([self._write[turn.speaker](turn.text) for turn in turns])
        ids: list[int] = []
        authors: list[str | None] = []
        openings: list[tuple[int, int]] = []
        unlearnt: list[tuple[int, int]] = []
        tool_spans: list[tuple[int, int]] = []
        before: str | None = None
        for at, turn in enumerate(turns):
            frame = self._frame(before, turn.speaker, f"messages[{at}]")
            ids += frame.before
            start = len(ids)
            ids += frame.opening
            content: Sequence[int] | None = None
            if turn.speaker == "assistant":
                openings.append((start, len(ids)))
                content = recall(ids, turn.text) if recall else None
            authors += [None] * (len(ids) - len(authors))
            if turn.speaker == "tool":
                tool_spans.append((len(ids), len(ids) + len(contents[at])))
            ids += contents[at] if content is None else content
            ids += frame.end_of_turn
            if not turn.learnt:
                unlearnt.append((len(authors), len(ids)))
            authors += [turn.author] * (len(ids) - len(authors))
            ids += frame.after
            authors += [None] * len(frame.after)
            before = turn.speaker
        if ask:
            frame = self._frame(before, "assistant", "messages")
            ids += frame.before
            openings.append((len(ids), len(ids) + len(frame.opening)))
            ids += frame.opening
            authors += [None] * (len(ids) - len(authors))
        return Rendered(ids, authors, openings, tuple(unlearnt), tuple(tool_spans))

    def render_text(self, prompt: str, completion: str, *, author: str) -> Rendered:
        """Render a plain text and what `author` makes of it, up to the end-of-turn token; there are no turns.

        Both are tokenised as the completions endpoint tokenises a prompt: special tokens are parsed, and a tokenizer
        that begins texts with a token of its own does so. For data, whose owner writes them; not for tools' output.
        """
        with self._lock:
            ids = self._tokenizer(prompt, verbose=False).input_ids
            authored = self._tokenizer(completion, add_special_tokens=False, verbose=False).input_ids
        if authored[-1:] != [self.end_of_turn]:
            authored = [*authored, self.end_of_turn]
        return Rendered([*ids, *authored], [None] * len(ids) + [author] * len(authored), [])

    def _frame(self, before: str | None, speaker: str, where: str) -> _FrameIds:
        frame = self._frames.get((before, speaker))
        if frame is None:
            raise UserError(f"{where}.role: this model's chat template takes a system message only as the first one.")
        return frame

    def _tokenise_contents(self, texts: list[str]) -> list[list[int]]:
        """The lock: a call sets state of the tokenizer that a call beside it would read."""
        with self._lock:
            return self._tokenizer(
                texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
            ).input_ids

    def _check_specials_are_spelt_out(self) -> None:
        """Refuse a tokenizer with which a tool's output could forge the end of a turn."""
        specials = special_ids(self._tokenizer) - {self._tokenizer.unk_token_id}
        names = [self._tokenizer.convert_ids_to_tokens(index) for index in sorted(specials)]
        for name, ids in zip(names, self._encode(names), strict=True):
            if specials & set(ids):
                raise UserError(
                    f"The tokenizer cannot be used for chats: it reads {name!r} in a text as a special token."
                )

    def _tokenise(self, pair: Pair, frame: Frame) -> _FrameIds:
        """Tokenise a frame, whose special tokens are meant as such. Called at construction, or under the lock."""
        before, opening, ending = (
            self._tokenizer(text, add_special_tokens=False, split_special_tokens=False).input_ids
            for text in (frame.before, frame.opening, frame.ending)
        )
        authored = 1 if pair[1] == "assistant" else 0
        return _FrameIds(before, opening, ending[:authored], ending[authored:])


def position_roles(rendered: Rendered, *, asker: str | None, prefix_writer: PrefixWriter | str) -> list[str]:
    """Return the role that processes each position, one name per token.

    That is the author of the next authored token (training runs as serving does); after the last authored
    token `asker`, or the last author where nobody asks. With `prefix_writer` "base", what comes before the first
    authored token is the base's, except the opening of that turn (or of the turn asked for, where nothing is authored
    yet): its logits are the speaker's first word. Where nothing is authored and nobody asks, all is the base's.
    """
    authors = rendered.authors
    roles = [BASE] * len(authors)
    speaker = asker
    if speaker is None:
        speaker = next((author for author in reversed(authors) if author is not None), BASE)
    for at in range(len(authors) - 1, -1, -1):
        roles[at] = speaker
        speaker = authors[at] or speaker
    if prefix_writer == PrefixWriter.BASE:
        first = rendered.first_authored
        prefix = next((start for start, end in rendered.openings if end == first), first)
        roles[:prefix] = [BASE] * prefix
    return roles
