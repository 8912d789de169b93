"""The requests of OpenAI's chat and completions endpoints, as far as they are understood here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict, ValidationError

from lragent.chat_tools import ToolChoice, check_tools
from lragent.errors import UserError
from lragent.serve.api.errors import shown
from lragent.serve.api.formats import grammar_of_format, grammar_of_structured
from lragent.serve.api.unsupported import check_unsupported
from lragent.serve.engine.grammar import Grammar
from lragent.serve.engine.types import MAX_BIASED, MAX_LOGPROBS, SamplingParams

MAX_PROMPTS = 128
"""In one completions request; `n` for each of them counts."""


def _listed(value: Any) -> Any:
    """OpenAI's `stop`: nothing, one string, or several."""
    if value is None:
        return []
    return [value] if isinstance(value, str) else value


def _numbered(value: Any) -> Any:
    """Completions' `logprobs`: chat's word for off is taken too."""
    return None if value is False else value


Text = Annotated[str, Strict()]
Label = Annotated[str, Strict(), Field(max_length=512)]
Whole = Annotated[int, Strict()]
Number = Annotated[float, Strict()]
Flag = Annotated[bool, Strict()]
Stops = Annotated[list[Text], BeforeValidator(_listed)]


class StreamOptions(BaseModel):
    """How a stream ends. include_usage: a last chunk without choices carries the usage."""

    include_usage: Flag | None = None


class TextRequest(BaseModel):
    """The fields that both endpoints know. Unknown ones are ignored, as OpenAI servers do."""

    model_config = ConfigDict(extra="ignore")

    model: Label
    n: Whole | None = None
    """Answers to each prompt."""
    max_tokens: Whole | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: Whole | None = None
    min_p: Number | None = None
    seed: Whole | None = None
    stop: Stops = []
    include_stop_str_in_output: Flag | None = None
    stop_token_ids: list[Whole] | None = None
    min_tokens: Whole | None = None
    ignore_eos: Flag | None = None
    skip_special_tokens: Flag | None = None
    response_format: Any = None
    """What the text must match: OpenAI's json_object and json_schema, and regex and grammar (Lark)."""
    structured_outputs: Any = None
    """vLLM's form of the same."""
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    repetition_penalty: Number | None = None
    logit_bias: Any = None
    """Token id, as a string, to a number."""
    return_token_ids: Flag | None = None
    """Put the ids of prompt and answer beside the text, as vLLM does."""
    stream: Flag | None = None
    stream_options: StreamOptions | None = None
    cache_salt: Label | None = None
    """Isolates a tenant's cache."""
    user: Label | None = None
    trajectory_id: Label | None = None

    def choices(self, limit: int) -> int:
        """How many answers to each prompt. Raises UserError where they are more than `limit`."""
        count = 1 if self.n is None else self.n
        if not 1 <= count <= limit:
            raise UserError(f"n: must be between 1 and {limit}, not {count}.")
        return count

    def grammar(self) -> Grammar | None:
        """What the text must match. Raises UserError naming the field."""
        if self.response_format is not None and self.structured_outputs is not None:
            raise UserError("structured_outputs: cannot be used together with response_format.")
        return grammar_of_format(self.response_format) or grammar_of_structured(self.structured_outputs)

    def grammar_field(self) -> str:
        """The field that asks for a grammar, where one does."""
        return "response_format" if self.response_format is not None else "structured_outputs"

    @property
    def salt(self) -> str:
        return self.cache_salt or ""

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def wants_tokens(self) -> bool:
        """Whether every token is to be told of, those without text of their own too."""
        return bool(self.return_token_ids) or self.alternatives() is not None

    def requested_tokens(self) -> tuple[str, int | None]:
        """The field that limits the answer, and its value."""
        return "max_tokens", self.max_tokens

    def check_length(self, max_model_len: int) -> None:
        """Raise UserError unless the answer's limit can be held in a context of `max_model_len` tokens."""
        name, value = self.requested_tokens()
        if value is not None and not 1 <= value <= max_model_len:
            raise UserError(f"{name}: must be between 1 and {max_model_len} (the context of this model), not {value}.")

    def alternatives(self) -> int | None:
        """How many alternatives to report beside each token's log-probability; None: report none. Raises UserError."""
        raise NotImplementedError

    def biases(self) -> tuple[tuple[int, float], ...]:
        """`logit_bias` as token ids and numbers. Raises UserError."""
        given = {} if self.logit_bias is None else self.logit_bias
        if not isinstance(given, dict) or not all(
            key.isascii() and key.isdecimal() and len(key) <= 10 and type(value) in (int, float)
            for key, value in given.items()
        ):
            raise UserError(
                f"logit_bias: must map at most {MAX_BIASED} token ids to numbers from -100 to 100, not {shown(given)}."
            )
        return tuple((int(key), value) for key, value in given.items())

    def sampling(self, *, default_max_tokens: int) -> SamplingParams:
        """Raises UserError naming the field that is out of range."""
        _, max_tokens = self.requested_tokens()
        given = {
            "max_tokens": default_max_tokens if max_tokens is None else max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": 0 if self.top_k == -1 else self.top_k,  # vLLM's word for off
            "min_p": self.min_p,
            "seed": self.seed,
            "stop": tuple(self.stop),
            "include_stop": self.include_stop_str_in_output,
            "stop_token_ids": self.stop_token_ids,
            "min_tokens": self.min_tokens,
            "skip_special_tokens": self.skip_special_tokens,
            "grammar": self.grammar(),
            "ignore_eos": self.ignore_eos,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
            "logit_bias": self.biases(),
            "logprobs": self.alternatives(),
        }
        return SamplingParams(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]


class ChatRequest(TextRequest):
    """POST /v1/chat/completions."""

    messages: list[Any]
    """As they came: the renderer checks them."""
    max_completion_tokens: Whole | None = None
    logprobs: Flag | None = None
    top_logprobs: Whole | None = None
    tools: list[Any] | None = None
    """Functions that may be called, where the model's chat template knows of any."""
    tool_choice: Any = None
    """none, auto, required, or `{"type": "function", "function": {"name": …}}`."""
    parallel_tool_calls: Flag | None = None

    def grammar_field(self) -> str:
        return "tools" if self.tools else super().grammar_field()

    def offered_tools(self) -> tuple[list[dict[str, Any]], ToolChoice]:
        """The tools that the answer may call, and whether it may. Raises UserError naming the field."""
        tools, choice = check_tools(self.tools, self.tool_choice)
        if choice.mode != "none" and self.grammar() is not None:
            raise UserError("tools: cannot be used together with response_format or structured_outputs.")
        return tools, choice

    def alternatives(self) -> int | None:
        count = self.top_logprobs or 0
        if not 0 <= count <= MAX_LOGPROBS:
            raise UserError(f"top_logprobs: must be between 0 and {MAX_LOGPROBS}, not {count}.")
        if count and not self.logprobs:
            raise UserError("top_logprobs: is only allowed together with `logprobs: true`.")
        return count if self.logprobs else None

    def requested_tokens(self) -> tuple[str, int | None]:
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return super().requested_tokens()

    def given_messages(self) -> list[Any]:
        """The messages without their null fields: clients append answers as they were parsed, gaps and all."""
        return listed_messages(self.messages)


class CompletionRequest(TextRequest):
    """POST /v1/completions."""

    prompt: Any
    echo: Flag | None = None
    """Put the prompt before the text."""
    add_special_tokens: Flag | None = None
    """Of a text prompt: whether the tokenizer puts its own in front; yes unless told otherwise."""
    logprobs: Annotated[Whole | None, BeforeValidator(_numbered)] = None
    top_logprobs: Whole | None = None
    """Chat's: taken where it is 0."""

    def alternatives(self) -> int | None:
        if self.top_logprobs:
            raise UserError("top_logprobs: is a field of chat completions; here `logprobs` says how many.")
        return self.logprobs

    def prompts(self, n: int) -> list[str | tuple[int, ...]]:
        """The prompts, each a text or token ids, with `n` answers each. Raises UserError."""
        found = self._prompts()
        if len(found) * n > MAX_PROMPTS:
            raise UserError(f"n: {n} answers to {len(found)} prompts are more than {MAX_PROMPTS} in one request.")
        return found

    def _prompts(self) -> list[str | tuple[int, ...]]:
        given = self.prompt
        if isinstance(given, str):
            return [given]
        if isinstance(given, list) and given:
            if _are_token_ids(given):
                return [tuple(given)]
            if len(given) > MAX_PROMPTS:
                raise UserError(f"prompt: at most {MAX_PROMPTS} prompts go in one request, not {len(given)}.")
            if all(isinstance(each, str) for each in given):
                return list(given)
            if all(isinstance(each, list) and _are_token_ids(each) for each in given):
                return [tuple(each) for each in given]
        raise UserError(
            "prompt: must be a text, a list of texts, a list of token ids or a list of such lists; none may be empty."
        )


def _are_token_ids(items: list[Any]) -> bool:
    return bool(items) and all(type(item) is int for item in items)


M = TypeVar("M", bound=BaseModel)
R = TypeVar("R", bound=TextRequest)


def listed_messages(messages: list[Any]) -> list[Any]:
    """Messages without their null fields."""
    return [
        {key: value for key, value in message.items() if value is not None} if isinstance(message, dict) else message
        for message in messages
    ]


def parse_body(cls: type[M], body: Mapping[str, Any]) -> M:
    """Read `body` as a `cls`. Raises UserError: one sentence that begins with the field at fault."""
    try:
        return cls.model_validate(body)
    except ValidationError as error:
        raise UserError(_sentence(error)) from None


def parse_request(cls: type[R], body: Mapping[str, Any]) -> R:
    """The same of a request for text, in which nothing may be asked for that is not supported."""
    request = parse_body(cls, body)
    check_unsupported(body, cls.model_fields)
    if request.stream_options is not None and not request.stream:
        raise UserError("stream_options: is only allowed together with `stream: true`.")
    return request


def _sentence(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False)[0]
    name = _path(first["loc"])
    if first["type"] == "missing":
        return f"{name}: is missing."
    problem = first["msg"].removeprefix("Input ").removeprefix("Value error, ")
    problem = problem[0].lower() + problem[1:]
    return f"{name}: {problem}, not {shown(first['input'])}."


def _path(location: Sequence[str | int]) -> str:
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    return path
