"""Limits on what keys, roles and trajectories may cost, which concurrent requests cannot overspend.

A request reserves the most that it can cost before it begins, and settles for what it did cost when it has ended. So
what is spent and reserved together never exceeds a limit.
"""

from __future__ import annotations

import calendar
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from lragent.errors import LRAgentError, UserError
from lragent.serve.ledger.prices import WHOLE, in_units

Scope = Literal["key", "role", "trajectory"]
Spent = Callable[[Scope, str, float], int]
"""What a name of a scope has spent since a Unix time, in `WHOLE`ths, by the ledger's file."""

KEPT = 10_000
"""Accounts that are kept in memory."""
ANY = "*"


@dataclass(frozen=True)
class Budget:
    """At most `limit` units for each `name` of a scope (`*`: for every name, each its own) in each period.

    hard: refuse what would exceed it; else only tell how much is left. period: total, or by UTC day or month.
    """

    scope: Scope
    limit: float
    name: str = ANY
    hard: bool = True
    period: Literal["total", "day", "month"] = "total"

    def __post_init__(self) -> None:
        if not 0 <= self.limit <= 10**6:
            raise UserError(f"limit: must be 0 to 1000000 units, not {self.limit}.")

    def since(self, now: float) -> float:
        """When the period began that `now` is in, Unix time."""
        if self.period == "total":
            return 0.0
        day = time.gmtime(now)
        first = day.tm_mday if self.period == "day" else 1
        return float(calendar.timegm((day.tm_year, day.tm_mon, first, 0, 0, 0)))


class OverBudgetError(LRAgentError):
    """A request may cost more than is left. retry_s: seconds until the period ends; None: it never does."""

    def __init__(self, message: str, retry_s: int | None) -> None:
        super().__init__(message)
        self.retry_s = retry_s


@dataclass
class _Account:
    since: float
    spent: int
    reserved: int = 0


@dataclass(frozen=True)
class Left:
    """What is left of one budget, in units. Reserved are requests that run."""

    budget: Budget
    name: str
    spent: float
    reserved: float

    @property
    def left(self) -> float:
        return max(0.0, self.budget.limit - self.spent - self.reserved)


@dataclass(eq=False)
class Reservation:
    """What one request has reserved, until it is settled."""

    amount: int
    _accounts: tuple[tuple[Budget, str, _Account], ...]
    _open: bool = field(default=True)


class Budgets:
    """All budgets of one server. May be used from any thread."""

    def __init__(self, budgets: Sequence[Budget], spent: Spent, clock: Callable[[], float] = time.time) -> None:
        self.budgets = tuple(budgets)
        self._spent, self._clock = spent, clock
        self._accounts: OrderedDict[tuple[Budget, str], _Account] = OrderedDict()
        self._lock = threading.Lock()

    def reserve(self, names: dict[Scope, str], most: Callable[[int | None], int]) -> Reservation:
        """Set aside what a request can cost at most.

        names: its key, role and trajectory; a scope that it does not name has no budget. most: asked with what is left
        under the tightest hard budget (None: nothing limits it), gives the amount, which may not be more. Raises
        OverBudgetError where it is, naming the budget.
        """
        with self._lock:
            now = self._clock()
            held = tuple(self._applying(names, now))
            hard = [(each, name, self._rest(each, account)) for each, name, account in held if each.hard]
            tightest = min(hard, key=lambda entry: entry[2], default=None)
            amount = most(None if tightest is None else tightest[2])
            if tightest is not None and amount > tightest[2]:
                raise _over(tightest[0], tightest[1], tightest[2], amount, now)
            for _, _, account in held:
                account.reserved += amount
            return Reservation(amount, held)

    def settle(self, reservation: Reservation, cost: int) -> None:
        """The request has ended and cost so much. Settling again does nothing."""
        with self._lock:
            if not reservation._open:
                return
            reservation._open = False
            now = self._clock()
            for budget, _, account in reservation._accounts:
                account.reserved -= reservation.amount
                self._turn_over(budget, account, now)
                account.spent += cost

    def left(self, names: dict[Scope, str]) -> list[Left]:
        """How much each budget that applies has left."""
        with self._lock:
            applying = list(self._applying(names, self._clock()))
            return [_left(budget, name, account) for budget, name, account in applying]

    def all(self) -> list[Left]:
        """The budgets that have been used since the start, the latest last."""
        with self._lock:
            return [_left(budget, name, account) for (budget, name), account in self._accounts.items()]

    def _applying(self, names: dict[Scope, str], now: float) -> list[tuple[Budget, str, _Account]]:
        found = []
        for budget in self.budgets:
            name = names.get(budget.scope, "")
            if name and budget.name in (ANY, name):
                found.append((budget, name, self._account(budget, name, now)))
        return found

    def _account(self, budget: Budget, name: str, now: float) -> _Account:
        account = self._accounts.get((budget, name))
        if account is None:
            since = budget.since(now)
            account = self._accounts[budget, name] = _Account(since, self._spent(budget.scope, name, since))
            self._forget()
        self._accounts.move_to_end((budget, name))
        self._turn_over(budget, account, now)
        return account

    def _turn_over(self, budget: Budget, account: _Account, now: float) -> None:
        """Begin anew where a new period has begun."""
        since = budget.since(now)
        if since > account.since:
            account.since, account.spent = since, 0

    def _forget(self) -> None:
        """Accounts without open requests can be read from the file again."""
        for key, account in list(self._accounts.items()):
            if len(self._accounts) <= KEPT:
                break
            if not account.reserved:
                del self._accounts[key]

    @staticmethod
    def _rest(budget: Budget, account: _Account) -> int:
        return max(0, round(budget.limit * WHOLE) - account.spent - account.reserved)


def _left(budget: Budget, name: str, account: _Account) -> Left:
    return Left(budget, name, in_units(account.spent), in_units(account.reserved))


def _over(budget: Budget, name: str, rest: int, amount: int, now: float) -> OverBudgetError:
    begins = {"total": None, "day": 86_400.0, "month": 31 * 86_400.0}[budget.period]
    retry = None
    if begins is not None:
        retry = max(1, round(budget.since(budget.since(now) + begins) - now))
    again = "" if retry is None else f"; it begins anew in {retry} seconds"
    return OverBudgetError(
        f"{budget.scope}: the budget of {name!r} has {in_units(rest):.6g} of {budget.limit:.6g} left, and this request "
        f"may cost {in_units(amount):.6g}; ask for fewer tokens, or have the budget raised{again}.",
        retry,
    )
