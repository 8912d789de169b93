"""Which roles are loaded, in which places of the model, and which others are still at work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from lragent.errors import LRAgentError
from lragent.serve.cache.lease import Reader


class RoleRoomError(LRAgentError):
    """All places for roles are taken."""


@dataclass(frozen=True)
class EngineRole:
    """A role as the engine runs it: its index in the model's `RoleLinear`s (0 = base) and its name in the cache."""

    name: str
    index: int
    reader: Reader


class RoleTable:
    """The roles of one engine. Changed by the engine's thread alone; `named` may be read by any.

    A role that is unloaded, or replaced under its name, keeps its place until the last request that began with it has
    ended: what a request was promised, it gets. room: places beside the base's.
    """

    def __init__(self, roles: Mapping[str, EngineRole], room: int) -> None:
        self.named: Mapping[str, EngineRole] = dict(roles)
        """What a request may ask for. Replaced as a whole, never changed."""
        self.room = room
        self.role_of: dict[int, int] = {}
        """Place by writer tag, of all roles that hold a place."""
        self._leaving: list[EngineRole] = []
        self._open: Counter[EngineRole] = Counter()
        self._note_writers()

    @property
    def writers(self) -> list[int]:
        """The tags of loaded roles, whose cache entries may be read."""
        return [role.reader.writer for role in self.named.values()]

    def free_place(self) -> int:
        """A place that nobody has. Raises RoleRoomError where there is none."""
        taken = {role.index for role in (*self.named.values(), *self._leaving)}
        place = next((at for at in range(1, self.room + 1) if at not in taken), None)
        if place is None:
            waiting = len(self._leaving)
            raise RoleRoomError(
                f"All {self.room} places for roles are taken"
                + (f", {waiting} by roles whose requests still run; try again when they have ended" if waiting else "")
                + "; unload one, or start the server with a larger --max-roles."
            )
        return place

    def put(self, role: EngineRole) -> EngineRole | None:
        """From now on `role` is what its name means. Returns one that has left its place."""
        before = self.named.get(role.name)
        self.named = dict(self.named) | {role.name: role}
        return self._leave(before)

    def drop(self, name: str) -> EngineRole | None:
        """From now on nobody may ask for `name`, which must be loaded. Returns one that has left its place."""
        before = self.named[name]
        self.named = {each: role for each, role in self.named.items() if each != name}
        return self._leave(before)

    def begin(self, role: EngineRole) -> None:
        """A request works with `role`."""
        self._open[role] += 1

    def end(self, role: EngineRole) -> EngineRole | None:
        """It has ended. Returns `role` if it has left its place by that."""
        self._open[role] -= 1
        if self._open[role]:
            return None
        del self._open[role]
        if role not in self._leaving:
            return None
        self._leaving.remove(role)
        self._note_writers()
        return role

    def running(self) -> dict[str, int]:
        """Open requests by the name of their role."""
        names: Counter[str] = Counter()
        for role, count in list(self._open.items()):
            names[role.name] += count
        return dict(names)

    def _leave(self, role: EngineRole | None) -> EngineRole | None:
        if role is not None and self._open[role]:
            self._leaving.append(role)
            role = None
        self._note_writers()
        return role

    def _note_writers(self) -> None:
        """Roles of equal weights are one writer: any of them can do its work, loaded ones first."""
        self.role_of.clear()
        for role in (*self._leaving, *self.named.values()):
            self.role_of[role.reader.writer] = role.index
