"""Roles that are loaded and unloaded while several replicas run: on all of them, or on none."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from lragent.adapter_set import AdapterSet
from lragent.serve.engine.role_weights import PreparedRole
from lragent.serve.engine.service import EngineService
from lragent.serve.engine.types import NoReplicaError, RoleCard
from lragent.serve.replicas.link import Link
from lragent.stacking import single

T = TypeVar("T")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Source:
    """From which a role can be loaded again. adapters: of it alone, as they were read and checked. Its file may have
    changed or gone by the time that a replica begins anew, which could then never serve what the others do."""

    adapters: AdapterSet
    role: str
    name: str
    root: str


class LoadedRoles:
    """What every replica serves, in addition to what it was built with. Whoever calls holds `lock`."""

    def __init__(self, cards: Sequence[RoleCard]) -> None:
        """cards: of what replicas are built with, the base first."""
        self.lock = threading.Lock()
        self.cards = list(cards)
        """The base first. Replaced as a whole, never changed."""
        self._built_with = {card.name for card in cards}
        self._changes: dict[str, _Source | None] = {}
        """By name; None is a role that was unloaded."""
        self._prepared: dict[str, _Source] = {}

    def prepare(self, links: Sequence[Link], adapters: AdapterSet, role: str, name: str, root: str) -> PreparedRole:
        """See Service.prepare_role: read and checked everywhere, and a place found. `up` stays with the replicas.

        Raises UserError where it does not fit, RoleRoomError where a replica has no free place for it, and
        ReplicaLostError where one goes meanwhile; NoReplicaError where none is there.
        """
        source = _Source(single(adapters, role), role, name, root)
        answers = [link.ask(partial(_prepare, source)) for link in links]
        digests = [answer.result() for answer in answers]
        if not digests:
            raise NoReplicaError
        self._prepared = {name: source}
        return PreparedRole(name, digests[0], root, {})

    def load(self, links: Sequence[Link], prepared: PreparedRole, parent: str) -> None:
        """Serve what `prepare` has returned. Every replica has a place for it: they are taken under `lock` alone."""
        source = self._prepared.pop(prepared.name)
        _on_all(links, partial(_load, source))
        self._changes[source.name] = source
        card = RoleCard(prepared.name, parent, prepared.root, prepared.digest)
        self.cards = [*(each for each in self.cards if each.name != card.name), card]

    def unload(self, links: Sequence[Link], name: str) -> None:
        """Serve it no longer. Raises UnknownRoleError where it is not loaded."""
        _on_all(links, partial(_unload, name))
        self._changes.pop(name, None)
        if name in self._built_with:
            self._changes[name] = None
        self.cards = [each for each in self.cards if each.name != name]

    def catch_up(self, link: Link) -> None:
        """Bring a replica that has just begun to what the others serve. Raises what its questions do."""
        for name in self._changes.keys() & self._built_with:  # first, so that there are places for the new ones
            link.ask(partial(_unload, name)).result()
        for source in self._changes.values():
            if source is not None:
                link.ask(partial(_load, source)).result()


def _on_all(links: Sequence[Link], question: Callable[[EngineService], T]) -> list[T]:
    """The answers. A replica that goes meanwhile is not missed: it begins anew, and catches up.

    Raises what one raises where no other has done it; else whoever failed to do as the others begins anew too. Raises
    ReplicaLostError where no replica is left, NoReplicaError where none was there.
    """
    asked = [(link, link.ask(question)) for link in links]
    answers: list[T] = []
    faults: list[tuple[Link, Exception]] = []
    for link, answer in asked:
        try:
            answers.append(answer.result())
        except Exception as fault:
            faults.append((link, fault))
    if not answers:
        raise faults[0][1] if faults else NoReplicaError()
    for link, reason in faults:
        logger.error("replica %d did not do as the others and begins anew: %s", link.place, reason)
        link.hang_up()
    return answers


def _prepare(source: _Source, service: EngineService) -> str:
    prepared = service.prepare_role(source.adapters, source.role, name=source.name, root=source.root)
    service.ask(lambda engine: engine.roles.free_place()).result()
    return prepared.digest


def _load(source: _Source, service: EngineService) -> None:
    prepared = service.prepare_role(source.adapters, source.role, name=source.name, root=source.root)
    service.load_role(prepared).result()


def _unload(name: str, service: EngineService) -> None:
    service.unload_role(name).result()
