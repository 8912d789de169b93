"""What becomes of requests, roles and figures where replicas come and go."""

from __future__ import annotations

import asyncio
import pickle
import socket
import threading
from collections.abc import Callable, Coroutine
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import httpx
import pytest
from replica_fakes import FACTS, FakeReplica, fake_fleet, wait_for
from tiny import make_adapter_set, tiny_model

from lragent.errors import UserError
from lragent.serve.api.app import create_app
from lragent.serve.api.settings import ServeSettings
from lragent.serve.engine.engine import EngineStats, TokenSums
from lragent.serve.engine.types import (
    Chunk,
    EngineDeadError,
    FinishReason,
    GenerationRequest,
    Prompt,
    QueueFullError,
    ReplicaLostError,
    SamplingParams,
)
from lragent.serve.replicas.service import MOST_TRIES, ReplicatedService
from lragent.serve.replicas.wire import Stats, Wire

GREEDY = SamplingParams(temperature=0.0)


def request(name: str = "r", *, whole: bool = True, params: SamplingParams = GREEDY) -> GenerationRequest:
    return GenerationRequest(name, "plan", Prompt((5, 6, 7)), params, whole=whole)


async def gathered(service: ReplicatedService, asked: GenerationRequest, seen: list[Chunk] | None = None) -> Chunk:
    chunks = [chunk async for chunk in service.stream(asked, None if seen is None else seen.append)]
    assert [chunk.finish_reason is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    return chunks[-1]


def having(replicas: list[FakeReplica]) -> FakeReplica | None:
    return next((each for each in replicas if each.submitted), None)


def played(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(work(), 10))


async def met(holds: Callable[[], Any]) -> Any:
    return await asyncio.to_thread(wait_for, holds)


def test_a_whole_answer_is_made_anew_elsewhere_and_ends_once() -> None:
    async def work() -> None:
        with fake_fleet() as (service, replicas):
            seen: list[Chunk] = []
            answering = asyncio.create_task(gathered(service, request(), seen))
            first = await met(partial(having, replicas))
            first.say("r", Chunk("lost", (9,)))
            await met(lambda: seen)
            first.die()
            other = next(each for each in replicas if each is not first)
            await met(lambda: other.submitted)
            other.finish("r")
            answer = await answering
            assert (answer.text, answer.token_ids, answer.finish_reason) == ("done", (7,), FinishReason.STOP)
            assert [chunk.finish_reason for chunk in seen] == [None, None, FinishReason.STOP]
            assert service.replicas[0].left + service.replicas[1].left == 1
            assert service.alive
            assert sum(each.alive for each in service.replicas) == 1

    played(work)


def test_a_stream_is_made_anew_only_before_its_first_piece() -> None:
    async def work() -> None:
        with fake_fleet() as (service, replicas):
            answering = asyncio.create_task(gathered(service, request(whole=False)))
            first = await met(partial(having, replicas))
            first.die()
            other = next(each for each in replicas if each is not first)
            await met(lambda: other.submitted)
            chunks = []
            other.say("r", Chunk("a", (9,)))
            other.die()
            last = await answering
            chunks.append(last)
            assert last.finish_reason is FinishReason.ERROR
            assert isinstance(last.fault, ReplicaLostError)
            assert "send the request again" in str(last.fault)

    played(work)


def test_a_request_that_ends_every_replica_does_not_end_them_all() -> None:
    async def work() -> None:
        with fake_fleet(MOST_TRIES + 1) as (service, replicas):
            answering = asyncio.create_task(gathered(service, request()))
            left = list(replicas)
            for _ in range(MOST_TRIES):
                poor = await met(partial(having, left))
                left.remove(poor)
                poor.die()
            assert isinstance((await answering).fault, ReplicaLostError)
            assert not having(left)

    played(work)


def test_a_request_that_was_given_up_is_not_made_anew() -> None:
    async def work() -> None:
        with fake_fleet() as (service, replicas):
            seen: list[Chunk] = []
            answering = asyncio.create_task(gathered(service, request(), seen))
            first = await met(partial(having, replicas))
            service._runs["r"].cancelled = True  # its message is on the way when the replica goes
            first.die()
            assert (await answering).finish_reason is FinishReason.CANCELLED
            assert not any(each.submitted for each in replicas if each is not first)

    played(work)


def test_leaving_early_cancels_in_the_replica() -> None:
    async def work() -> None:
        with fake_fleet() as (service, replicas):
            chunks = service.stream(request(whole=False))
            first = await met(partial(having, replicas))
            first.say("r", Chunk("a", (9,)))
            await anext(chunks)
            await chunks.aclose()
            await met(lambda: first.cancelled == ["r"])
            await met(lambda: not service._runs)

    played(work)


def test_the_queue_is_one_and_bounded() -> None:
    async def work() -> None:
        with fake_fleet(max_waiting=2) as (service, _):
            waiting = [asyncio.create_task(gathered(service, request(name))) for name in "ab"]
            await asyncio.sleep(0.05)
            with pytest.raises(QueueFullError, match="2 requests are open"):
                service.stream(request("c"))
            service.cancel("a")
            assert (await waiting[0]).finish_reason is FinishReason.CANCELLED
            service.cancel("b")
            await waiting[1]

    played(work)


def test_without_any_replica_nothing_is_taken_and_one_that_comes_back_serves() -> None:
    async def work() -> None:
        with fake_fleet() as (service, replicas):
            for each in replicas:
                each.die()
            await met(lambda: not service.alive)
            assert "started anew" in (service.failure or "")
            with pytest.raises(EngineDeadError, match="No replica runs"):
                service.stream(request())
            assert not service._runs
            new = FakeReplica(service)
            assert new.began
            assert service.alive
            assert [state.starts for state in service.replicas] == [2, 1]
            answering = asyncio.create_task(gathered(service, request()))
            await met(lambda: new.submitted)
            new.finish("r")
            assert (await answering).text == "done"

    played(work)


def test_while_none_runs_clients_are_told_when_to_come_again() -> None:
    async def work() -> None:
        with fake_fleet() as (service, replicas):
            for each in replicas:
                each.die()
            await met(lambda: not service.alive)
            app = create_app(service, ServeSettings(roles_folder=Path(".")))
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as http:
                asked = {"model": "plan", "prompt": [5, 6]}
                answers = [await http.get("/health"), await http.post("/v1/completions", json=asked)]
                answers.append(await http.post("/v1/completions", json=asked | {"stream": True}))
                form = {"response_format": {"type": "regex", "pattern": "a*"}}
                answers.append(await http.post("/v1/completions", json=asked | form))
                answers.append(await http.post("/v1/unload_lora_adapter", json={"lora_name": "plan"}))
            for answer in answers:
                assert (answer.status_code, answer.headers.get("retry-after")) == (503, "5"), answer.text
                assert answer.json()["error"]["code"] == "no_replica"

    played(work)


def test_what_cannot_be_placed_leaves_nothing_open() -> None:
    async def work() -> None:
        with fake_fleet() as (service, replicas):
            answering = asyncio.create_task(gathered(service, request()))
            first = await met(partial(having, replicas))

            def choose(*given: object) -> int:
                raise ValueError("a bug")

            service._affinity.choose = choose  # type: ignore[method-assign]
            with pytest.raises(ValueError, match="a bug"):
                service.stream(request("second"))
            assert set(service._runs) == {"r"}
            first.die()
            assert isinstance((await answering).fault, ReplicaLostError)
            assert not service._runs

    played(work)


def test_what_is_wrong_with_a_request_is_told_and_not_tried_elsewhere() -> None:
    async def work() -> None:
        with fake_fleet() as (service, replicas):
            answering = asyncio.create_task(gathered(service, request()))
            first = await met(partial(having, replicas))
            first.say("r", Chunk(finish_reason=FinishReason.ERROR, error="no", fault=UserError("prompt: no")))
            last = await answering
            assert isinstance(last.fault, UserError)
            assert sum(len(each.submitted) for each in replicas) == 1

    played(work)


def test_a_long_prompt_travels_once_and_takes_little_more_than_its_ids() -> None:
    async def work() -> None:
        with fake_fleet(1) as (service, replicas):
            roles = [f"role {at // 500 % 3}" for at in range(50_000)]
            asked = GenerationRequest("r", "plan", Prompt(range(50_000), roles, 3), GREEDY, whole=True)
            assert len(pickle.dumps(asked, pickle.HIGHEST_PROTOCOL)) < 50_000 * 4 + 5_000
            service.check(asked)
            assert replicas[0].questions[-1].args[0].prompt.ids.size == 1
            answering = asyncio.create_task(gathered(service, asked))
            (there,) = await met(lambda: replicas[0].submitted)
            assert there.prompt.ids.tolist() == list(range(50_000))
            assert there.prompt.opening == 3
            assert [name for name, count in there.prompt.speakers for _ in range(count)] == roles
            replicas[0].finish("r")
            await answering

    played(work)


def test_draws_do_not_depend_on_the_replica() -> None:
    async def work() -> None:
        with fake_fleet(seed=40) as (service, replicas):
            names = "abcd"
            streams = [service.stream(request(name, params=SamplingParams())) for name in names]
            await met(lambda: sum(len(each.submitted) for each in replicas) == 4)
            seeds = {each.request_id: each.params.seed for one in replicas for each in one.submitted}
            assert seeds == dict(zip(names, range(41, 45), strict=True))
            for stream in streams:
                await stream.aclose()

    played(work)


def test_counters_of_a_replica_that_has_gone_stay() -> None:
    with fake_fleet() as (service, replicas):
        for at, each in enumerate(replicas):
            roles = {"plan": TokenSums(finished=at + 1)}
            each.wire.send(Stats(EngineStats(finished=at + 1, running=3, slots_total=100, roles=roles)))
        wait_for(lambda: service.stats().finished == 3)
        assert (service.stats().running, service.stats().slots_total) == (6, 200)
        replicas[1].die()
        wait_for(lambda: service.stats().running == 3)
        assert service.stats().finished == 3
        assert service.stats().roles["plan"].finished == 3
        assert service.stats().slots_total == 100


def test_roles_come_and_go_on_all_replicas_and_on_those_that_begin_later() -> None:
    with fake_fleet() as (service, replicas):
        adapters = make_adapter_set(tiny_model(), ("plan", "action"))
        prepared = service.prepare_role(adapters, "plan", name="new", root="/roles/new")
        assert prepared.digest == "digest"
        service.load_role(prepared).result(5)
        service.unload_role("plan").result(5)
        assert [card.name for card in service.roles] == ["base", "new"]
        for each in replicas:
            assert each.asked == ["_prepare", "_load", "_unload"]
        replicas[0].die()
        wait_for(lambda: not all(state.alive for state in service.replicas))
        late = FakeReplica(service)
        assert late.asked == ["_unload", "_load"]
        kept = late.questions[-1].args[0].adapters
        assert kept.role_names == ("plan",), "the others of its pack are not kept"
        assert kept.role_digest("plan") == adapters.role_digest("plan")


def test_who_gives_up_waiting_for_a_role_does_not_break_off_its_loading() -> None:
    with fake_fleet() as (service, _):
        with service._loaded.lock:  # another change is being made
            unloading = service.unload_role("plan")
            wait_for(unloading.running)
            assert not unloading.cancel()
        unloading.result(5)
        assert [card.name for card in service.roles] == ["base"]


def test_a_role_that_does_not_fit_is_refused_and_one_replica_that_fails_alone_begins_anew() -> None:
    with fake_fleet() as (service, replicas):
        adapters = make_adapter_set(tiny_model(), ("plan", "action"))
        replicas[0].refusal = UserError("lora_path: is of another base.")
        with pytest.raises(UserError, match="another base"):
            service.prepare_role(adapters, "plan", name="new", root="/roles/new")
        replicas[0].refusal = None
        prepared = service.prepare_role(adapters, "plan", name="new", root="/roles/new")
        replicas[0].refusal = RuntimeError("out of memory")
        service.load_role(prepared).result(5)
        wait_for(lambda: sum(state.alive for state in service.replicas) == 1)
        assert [card.name for card in service.roles] == ["base", "plan", "new"]


def test_stopping_ends_what_runs() -> None:
    async def work() -> None:
        with fake_fleet() as (service, replicas):
            answering = asyncio.create_task(gathered(service, request()))
            await met(partial(having, replicas))
            await asyncio.to_thread(service.stop, False, 5.0)
            assert (await answering).finish_reason is FinishReason.CANCELLED
            assert not service.alive
            with pytest.raises(EngineDeadError, match="shutting down"):
                service.stream(request("late"))

    played(work)


def a_pair() -> tuple[socket.socket, Wire]:
    """A replica's end, and the front's wire."""
    mine, front = socket.socketpair()
    return mine, Wire(Connection(front.detach()))


def test_a_replica_that_went_while_it_came_in_is_given_nothing() -> None:
    with fake_fleet(1) as (service, replicas):
        replicas[0].die()
        wait_for(lambda: not service.alive)
        for _ in range(20):
            gone, front = a_pair()
            gone.close()
            service.run(front, FACTS, lambda: None)
        assert not service.alive


def test_one_that_comes_before_a_place_is_free_is_sent_away() -> None:
    with fake_fleet(2) as (service, _):
        late, front = a_pair()
        service.run(front, FACTS, lambda: None)
        assert late.recv(1) == b"", "it was hung up on"
        assert [each.alive for each in service.replicas] == [True, True]


def test_one_that_does_not_listen_keeps_nobody_waiting() -> None:
    async def work() -> None:
        service = ReplicatedService(FACTS, 1, max_waiting=100, seed=0)
        deaf, front = a_pair()
        threading.Thread(target=service.run, args=(front, FACTS, lambda: None), daemon=True).start()
        await met(lambda: service.alive)
        long = Prompt(tuple(range(300)) * 4000)  # more than the socket holds
        service.stream(GenerationRequest("long", "plan", long, GREEDY, whole=True))
        service.cancel("long")
        deaf.close()

    played(work)


def test_who_fails_to_take_a_piece_ends_that_request_only() -> None:
    def fail(chunk: Chunk) -> None:
        raise ValueError("full")

    async def work() -> None:
        with fake_fleet(1) as (service, replicas):
            service.stream(request("bad"), fail)
            good = asyncio.create_task(gathered(service, request("good")))
            await met(lambda: len(replicas[0].submitted) == 2)
            replicas[0].say("bad", Chunk("x", (9,)))
            await met(lambda: replicas[0].cancelled == ["bad"])
            replicas[0].finish("good")
            assert (await good).text == "done"
            assert service.alive

    played(work)


def test_one_that_cannot_be_told_what_it_is_asked_is_given_up() -> None:
    with fake_fleet(1) as (service, _):
        (link,) = service._live()
        with pytest.raises(ReplicaLostError):
            link.ask(lambda engine: engine).result(5)
        assert not service.alive
