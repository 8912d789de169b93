"""An engine in this process as a `Complete`: no HTTP between the agent and the cache."""

import itertools
import time

from lragent.eval.agent import Complete, Message, OutOfContextError, Reply
from lragent.serve.engine.service import EngineService
from lragent.serve.engine.types import Chunk, ContextFullError, GenerationRequest, SamplingParams


def engine_complete(service: EngineService, *, salt: str = "") -> Complete:
    """Generates greedily; safe to call from several threads, whose turns the engine then batches."""
    numbers = itertools.count()

    def complete(role: str, messages: list[Message], max_tokens: int) -> Reply:
        prompt = service.chat.prepare(messages, role, salt)
        name = f"{salt}/{id(numbers)}/{next(numbers)}"
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        first: list[float] = []

        def see(chunk: Chunk) -> None:
            if not first:
                first.append(time.perf_counter())

        start = time.perf_counter()
        try:
            answer = service.generate(GenerationRequest(name, role, prompt, params, salt), watch=see)
        except ContextFullError as error:
            raise OutOfContextError(str(error)) from error
        usage = answer.usage
        assert usage is not None
        return Reply(
            answer.text,
            prompt_tokens=usage.prompt_tokens,
            generated_tokens=usage.completion_tokens,
            tokens_computed=usage.tokens_computed,
            tokens_reused=usage.base_reused,
            lr_reused=usage.lr_reused,
            ttft_s=first[0] - start,
            total_s=time.perf_counter() - start,
        )

    return complete
