"""What requests cost, written down, priced and held within budgets."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lragent.errors import UserError
from lragent.serve.engine.types import Usage
from lragent.serve.ledger.budgets import Budget, Budgets, OverBudgetError
from lragent.serve.ledger.entry import SUMS, Entry
from lragent.serve.ledger.ledger import Claim, Ledger, LedgerFailingError, Times
from lragent.serve.ledger.prices import WHOLE, Prices, in_units
from lragent.serve.ledger.store import LedgerStore

USAGE = Usage(
    prompt_tokens=100, completion_tokens=7, tokens_computed=40, base_reused=60, lr_reused=60, lr_prefilled=0,
    kv_byte_seconds=1.5,
)  # fmt: skip
TIMES = Times(12.0, 80.0)


def claim(number: int = 0, role: str = "plan", key: str = "alice", trajectory: str = "t") -> Claim:
    return Claim(f"r{number}", "chat", key, role, trajectory)


def settled(ledger: Ledger, *claims: Claim) -> None:
    for each in claims:
        reservation, _ = ledger.reserve(each, 100, 7, 7)
        done = ledger.settle(each, reservation, USAGE, "stop", 3, TIMES)
        assert done is not None
        done.result(10)


# -- prices --------------------------------------------------------------------------------------------------------


def test_a_price_has_a_rate_for_each_kind_of_token() -> None:
    prices = Prices("USD", 1_000_000, fresh=2.0, reused=0.2, generated=8.0)
    assert in_units(prices.cost(USAGE)) == pytest.approx((40 * 2.0 + 60 * 0.2 + 7 * 8.0) / 1e6, rel=1e-12)


def test_an_lr_prefill_has_its_own_rate() -> None:
    usage = Usage(100, 5, tokens_computed=100, base_reused=90, lr_reused=0, lr_prefilled=90)
    assert Prices(fresh=1.0, lr_prefill=0.25).cost(usage) == round((10 + 90 * 0.25 + 5) * WHOLE)
    assert Prices(fresh=1.0).cost(usage) == 105 * WHOLE


@given(
    st.integers(0, 2000), st.integers(0, 2000), st.integers(0, 500), st.floats(0, 9), st.floats(0, 9), st.floats(0, 9)
)
def test_no_request_costs_more_than_was_set_aside(
    computed: int, reused: int, answer: int, fresh: float, used: float, said: float
) -> None:
    prices = Prices("x", 1000, fresh=fresh, reused=used, generated=said)
    usage = Usage(computed + reused, answer, computed, reused, reused, 0)
    assert prices.cost(usage) <= prices.most(computed + reused, answer)


@given(st.integers(0, 10**15), st.integers(0, 1000), st.floats(0, 9), st.floats(0.001, 9))
def test_what_is_affordable_is_and_one_more_is_not(left: int, prompt: int, fresh: float, said: float) -> None:
    prices = Prices("x", 1000, fresh=fresh, generated=said)
    tokens = prices.affordable(prompt, left)
    if tokens == -1:
        assert prices.most(prompt, 0) > left
    elif tokens is not None:
        assert prices.most(prompt, tokens) <= left < prices.most(prompt, tokens + 1)


@pytest.mark.parametrize("bad", [{"fresh": -1.0}, {"generated": float("nan")}, {"reused": 1e9}, {"per": 0}])
def test_bad_rates_are_named(bad: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(bad))):
        Prices(**bad)


# -- the file ------------------------------------------------------------------------------------------------------


def test_sums_by_every_group_and_filter(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "new" / "ledger.sqlite", Prices(), ())
    settled(ledger, claim(1), claim(2, role="action"), claim(3, key="bob"), claim(4, trajectory="u"))
    store = ledger.store
    whole = store.sums()
    assert whole.requests == 4
    assert whole.values["tokens_computed"] == 160
    assert whole.values["tool_tokens"] == 12
    assert whole.values["cost"] == 4 * 47 * WHOLE
    for group in ("role", "key", "trajectory"):
        groups = store.groups(group)
        assert sum(each.requests for each in groups) == 4
        for name in SUMS:
            assert sum(each.values[name] for each in groups) == whole.values[name]
    assert {each.name: each.requests for each in store.groups("role")} == {"plan": 3, "action": 1}
    assert store.sums(where={"role": "plan", "key": "alice"}).requests == 2
    assert store.sums(where={"run": "another"}).requests == 0
    assert store.sums(since=1e12).requests == 0
    assert store.sums(until=1.0).requests == 0
    assert len(store.groups("key", limit=1)) == 1
    with pytest.raises(UserError, match="group_by"):
        store.groups("cost; DROP TABLE entries")
    ledger.close()


def test_names_from_clients_are_values_never_sql(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite", Prices(), ())
    evil = "'; DROP TABLE entries; --\0\n\U0001f642"
    settled(ledger, claim(1, trajectory=evil))
    assert [each.name for each in ledger.store.groups("trajectory")] == [evil]
    assert ledger.store.sums(where={"trajectory": evil}).requests == 1
    ledger.close()


def test_it_survives_a_restart_and_begins_a_new_run(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    first = Ledger(path, Prices(), ())
    settled(first, claim(1), claim(2))
    first.close()
    second = Ledger(path, Prices(), (Budget("role", 1000.0),))
    settled(second, claim(3))
    assert second.store.sums().requests == 3
    assert second.store.sums(where={"run": second.run}).requests == 1
    (left,) = second.left(claim(4))
    assert left.spent == 3 * 47
    second.close()


def test_what_was_answered_is_on_disk_when_the_process_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    script = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_ledger import Ledger, Prices, claim, settled
ledger = Ledger(Path({str(path)!r}), Prices(), ())
settled(ledger, *(claim(at) for at in range(5)))
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script], env=os.environ, timeout=60, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    again = LedgerStore(path)
    assert again.sums().requests == 5
    again.close()


def test_one_server_a_file(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    first = LedgerStore(path)
    with pytest.raises(UserError, match="in use by another server"):
        LedgerStore(path)
    first.close()
    LedgerStore(path).close()


def test_what_is_no_ledger_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("not a database, and longer than a header is" * 10)
    before = text.read_bytes()
    with pytest.raises(UserError, match=r"notes\.txt"):
        LedgerStore(text)
    assert text.read_bytes() == before
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE mine (x)")
    with pytest.raises(UserError, match="no ledger of this version"):
        LedgerStore(other)
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(UserError, match="ledger: "):
        LedgerStore(folder)


def test_a_disk_that_fails_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LedgerStore(tmp_path / "ledger.sqlite")
    monkeypatch.setattr("lragent.serve.ledger.store._RETRY_S", 0.05)
    real, fails = store._writing, threading.Event()
    fails.set()

    class Failing:
        """A connection to a full disk."""

        in_transaction = False

        def execute(self, *words: Any) -> Any:
            if fails.is_set():
                raise sqlite3.OperationalError("database or disk is full")
            return real.execute(*words)

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

    store._writing = Failing()  # type: ignore[assignment]
    entry = Entry("run", 1.0, "r", "chat", "", "plan", "", "stop", 1, 1, 0, 0, 0, 1, 0, None, 1.0, 0.0, 5)
    with pytest.raises(sqlite3.OperationalError):
        store.append(entry).result(10)
    assert store.pending == 1
    fails.clear()
    deadline = threading.Event()
    while store.pending:
        assert not deadline.wait(0.02)
    assert store.sums().requests == 1
    store.close()


def test_too_much_that_waits_stops_new_requests(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite", Prices(), ())
    ledger.store.pending = 10_001
    with pytest.raises(LedgerFailingError, match="cannot be written"):
        ledger.reserve(claim(), 1, 1, 1)
    ledger.store.pending = 0
    ledger.close()


# -- budgets -------------------------------------------------------------------------------------------------------


def budgets(*given_: Budget, spent: int = 0, clock: Any = lambda: 1e9) -> Budgets:
    return Budgets(given_, lambda scope, name, since: spent, clock)


def test_a_hard_budget_refuses_and_says_what_is_left() -> None:
    one = budgets(Budget("key", 10.0))
    first = one.reserve({"key": "alice"}, lambda left: 8 * WHOLE)
    with pytest.raises(OverBudgetError, match=r"key: the budget of 'alice' has 2 of 10 left.*may cost 3"):
        one.reserve({"key": "alice"}, lambda left: 3 * WHOLE)
    one.reserve({"key": "bob"}, lambda left: 3 * WHOLE)
    one.settle(first, 1 * WHOLE)
    assert [each.left for each in one.left({"key": "alice"})] == [9.0]


def test_a_soft_budget_only_tells() -> None:
    one = budgets(Budget("role", 10.0, name="plan", hard=False))
    one.settle(one.reserve({"role": "plan"}, lambda left: 25 * WHOLE), 25 * WHOLE)
    (left,) = one.left({"role": "plan"})
    assert (left.spent, left.left) == (25.0, 0.0)
    assert one.left({"role": "action"}) == []


def test_the_tightest_hard_budget_decides() -> None:
    seen: list[int | None] = []
    one = budgets(Budget("key", 10.0), Budget("role", 4.0), Budget("trajectory", 1.0, hard=False))
    one.reserve({"key": "a", "role": "plan", "trajectory": "t"}, lambda left: seen.append(left) or WHOLE)
    one.reserve({"trajectory": "t"}, lambda left: seen.append(left) or WHOLE)
    assert seen == [4 * WHOLE, None]


def test_settling_twice_counts_once() -> None:
    one = budgets(Budget("key", 10.0))
    reservation = one.reserve({"key": "a"}, lambda left: 5 * WHOLE)
    for _ in range(2):
        one.settle(reservation, 2 * WHOLE)
    assert one.left({"key": "a"})[0].left == 8.0


def test_a_refusal_reserves_nothing() -> None:
    one = budgets(Budget("key", 10.0), Budget("role", 1.0))
    for _ in range(3):
        with pytest.raises(OverBudgetError):
            one.reserve({"key": "a", "role": "plan"}, lambda left: 2 * WHOLE)
    assert one.left({"key": "a"})[0].left == 10.0


def test_a_day_begins_anew() -> None:
    now = [1_000_000_000.0]
    one = budgets(Budget("key", 10.0, period="day"), clock=lambda: now[0])
    open_over_midnight = one.reserve({"key": "a"}, lambda left: 6 * WHOLE)
    one.settle(one.reserve({"key": "a"}, lambda left: 4 * WHOLE), 4 * WHOLE)
    with pytest.raises(OverBudgetError) as refused:
        one.reserve({"key": "a"}, lambda left: WHOLE)
    assert 0 < refused.value.retry_s <= 86_400
    now[0] += refused.value.retry_s
    assert one.left({"key": "a"})[0].left == 4.0
    one.settle(open_over_midnight, 1 * WHOLE)
    assert one.left({"key": "a"})[0].left == 9.0


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(1, 8), st.integers(0, 8)), min_size=1, max_size=40), st.integers(1, 40))
def test_many_at_once_never_overspend(asked: list[tuple[int, int]], limit: int) -> None:
    """Whatever the order and the company: spent and reserved stay within the limit, and nothing stays reserved."""
    one = budgets(Budget("key", float(limit)), Budget("trajectory", float(2 * limit)))
    most_seen: list[float] = []
    start = threading.Barrier(4)

    def work(part: list[tuple[int, int]]) -> None:
        start.wait()
        for amount, cost in part:
            try:
                reservation = one.reserve({"key": "a", "trajectory": "t"}, lambda left, a=amount: a * WHOLE)
            except OverBudgetError:
                continue
            state = one.left({"key": "a"})[0]
            most_seen.append(state.spent + state.reserved)
            one.settle(reservation, min(cost, amount) * WHOLE)

    threads = [threading.Thread(target=work, args=(asked[at::4],)) for at in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most_seen, default=0.0) <= limit
    assert one.left({"key": "a"})[0].reserved == 0.0


def test_an_answer_of_no_length_gets_what_the_budget_affords(tmp_path: Path) -> None:
    prices = Prices("x", 1, fresh=1.0, generated=2.0)
    ledger = Ledger(tmp_path / "ledger.sqlite", prices, (Budget("role", 120.0),))
    reservation, allowed = ledger.reserve(claim(), prompt=100, answer=None, most=500)
    assert allowed == 10
    with pytest.raises(OverBudgetError):
        ledger.reserve(claim(), prompt=100, answer=None, most=500)
    ledger.settle(claim(), reservation, None, "", 0, TIMES)
    assert ledger.store.sums().requests == 0
    with pytest.raises(OverBudgetError):
        ledger.reserve(claim(), prompt=100, answer=500, most=500)
    assert ledger.reserve(claim(), prompt=100, answer=10, most=500)[1] == 10
    ledger.close()


def test_accounts_in_memory_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lragent.serve.ledger.budgets.KEPT", 5)
    one = budgets(Budget("trajectory", 10.0))
    held = one.reserve({"trajectory": "held"}, lambda left: WHOLE)
    for at in range(50):
        one.settle(one.reserve({"trajectory": f"t{at}"}, lambda left: WHOLE), 0)
    assert len(one.all()) <= 6
    one.settle(held, 3 * WHOLE)
    assert one.left({"trajectory": "held"})[0].spent == 3.0
