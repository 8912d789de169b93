"""An engine in this process as a `Complete`: no HTTP between the agent and the cache."""

import time

from lragent.eval.agent import Complete, Message, OutOfContextError, Reply
from lragent.serve import Engine
from lragent.serve.engine.types import ContextFullError


def engine_complete(engine: Engine, *, salt: str = "") -> Complete:
    """Generates greedily; safe to call from several threads, whose turns the engine then batches."""

    def complete(role: str, messages: list[Message], max_tokens: int) -> Reply:
        start = time.perf_counter()
        first: float | None = None
        text, usage = "", None
        try:
            for chunk in engine.stream(role, messages, salt=salt, max_tokens=max_tokens, temperature=0.0):
                first = first or time.perf_counter() - start
                text += chunk.text
                usage = chunk.usage or usage
        except ContextFullError as error:
            raise OutOfContextError(str(error)) from error
        assert usage is not None  # the last chunk has it
        return Reply(
            text,
            prompt_tokens=usage.prompt_tokens,
            generated_tokens=usage.completion_tokens,
            tokens_computed=usage.tokens_computed,
            tokens_reused=usage.base_reused,
            lr_reused=usage.lr_reused,
            ttft_s=first,
            total_s=time.perf_counter() - start,
        )

    return complete
