"""The ledger of one server: reserve before a request, write down what it cost after it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from lragent.errors import LRAgentError
from lragent.serve.engine.types import Usage
from lragent.serve.ledger.budgets import Budget, Budgets, Left, Reservation, Scope
from lragent.serve.ledger.entry import Entry
from lragent.serve.ledger.prices import Prices
from lragent.serve.ledger.store import MOST_PENDING, LedgerStore, new_run


class LedgerFailingError(LRAgentError):
    """The ledger's file cannot be written, and too much waits for it."""


@dataclass(frozen=True)
class Claim:
    """Whose a request is."""

    request_id: str
    endpoint: str
    key: str
    role: str
    trajectory: str

    @property
    def names(self) -> dict[Scope, str]:
        """By scope of budgets."""
        return {"key": self.key, "role": self.role, "trajectory": self.trajectory}


@dataclass(frozen=True)
class Times:
    """Of one request, in milliseconds since it arrived. first: to its first token, None where it had none."""

    first: float | None
    total: float


class Ledger:
    """All methods may be called from any thread."""

    def __init__(self, path: Path, prices: Prices, budgets: Sequence[Budget]) -> None:
        """Raises UserError where the file cannot be used."""
        self.prices = prices
        self.store = LedgerStore(path)
        self.run = new_run()
        self.budgets = Budgets(budgets, self._spent)

    def reserve(self, claim: Claim, prompt: int, answer: int | None, most: int) -> tuple[Reservation, int]:
        """Set aside what a request can cost at most. prompt: its tokens. answer: the tokens that it asks for; None:
        as many as the budgets and `most` allow. Returns the tokens that it may have too.

        Raises OverBudgetError, and LedgerFailingError where nothing can be written down.
        """
        if self.store.pending > MOST_PENDING:
            raise LedgerFailingError("The ledger cannot be written, so no request is taken; its log says why.")
        allowed = most if answer is None else answer

        def amount(left: int | None) -> int:
            nonlocal allowed
            if answer is None and left is not None:
                affordable = self.prices.affordable(prompt, left)
                allowed = most if affordable is None else max(1, min(most, affordable))
            return self.prices.most(prompt, allowed)

        return self.budgets.reserve(claim.names, amount), allowed

    def settle(
        self, claim: Claim, reservation: Reservation, usage: Usage | None, finish: str, tool_tokens: int, times: Times
    ) -> Future[None] | None:
        """A request has ended. usage: None where the engine never took it, which costs nothing and is not written.

        Returns what is done once the entry is on disk.
        """
        if usage is None:
            self.budgets.settle(reservation, 0)
            return None
        cost = self.prices.cost(usage)
        done = self.store.append(
            Entry(
                run=self.run,
                ended_at=time.time(),
                request_id=claim.request_id,
                endpoint=claim.endpoint,
                key=claim.key,
                role=claim.role,
                trajectory=claim.trajectory,
                finish=finish,
                prompt_tokens=usage.prompt_tokens,
                tokens_computed=usage.tokens_computed,
                base_reused=usage.base_reused,
                lr_reused=usage.lr_reused,
                lr_prefilled=usage.lr_prefilled,
                generated=usage.completion_tokens,
                tool_tokens=tool_tokens,
                ttft_ms=times.first,
                total_ms=times.total,
                kv_byte_seconds=usage.kv_byte_seconds,
                cost=cost,
            )
        )
        # Only now: an account that is read from the file meanwhile must find the entry, or know of the reservation.
        self.budgets.settle(reservation, cost)
        return done

    def left(self, claim: Claim) -> list[Left]:
        """What the budgets that concern a request have left."""
        return self.budgets.left(claim.names)

    def close(self) -> None:
        """Write what is left, and let go of the file."""
        self.store.close()

    def _spent(self, scope: Scope, name: str, since: float) -> int:
        self.store.flush()
        return int(self.store.sums(where={scope: name}, since=since).values["cost"])
