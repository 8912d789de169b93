"""An engine in this process as a `Complete`: no HTTP between the agent and the cache."""

import time

from lragent.eval.agent import Complete, Message, OutOfContextError, Reply
from lragent.serve import Engine
from lragent.serve.engine.types import Chunk, ContextFullError


def engine_complete(engine: Engine, *, salt: str = "") -> Complete:
    """Generates greedily; safe to call from several threads, whose turns the engine then batches."""

    def complete(role: str, messages: list[Message], max_tokens: int) -> Reply:
        start = time.perf_counter()
        pieces: list[float] = []  # one thread is woken once for its turn, however many tokens that has

        def see(chunk: Chunk) -> None:
            if not pieces:
                pieces.append(time.perf_counter() - start)

        try:
            answer = engine.generate(role, messages, salt=salt, watch=see, max_tokens=max_tokens, temperature=0.0)
        except ContextFullError as error:
            raise OutOfContextError(str(error)) from error
        usage = answer.usage
        assert usage is not None  # of a whole answer it is there
        return Reply(
            answer.text,
            prompt_tokens=usage.prompt_tokens,
            generated_tokens=usage.completion_tokens,
            tokens_computed=usage.tokens_computed,
            tokens_reused=usage.base_reused,
            lr_reused=usage.lr_reused,
            ttft_s=pieces[0],
            total_s=time.perf_counter() - start,
        )

    return complete
