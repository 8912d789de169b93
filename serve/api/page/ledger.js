// What each role, key or trajectory has cost, and what its budget leaves.

import { byId, el, reconcile, setAttribute, setHidden, setShare, setText } from "./dom.js";
import { bytes, cost, count, counted } from "./format.js";

export function makeLedger() {
  const select = byId("ledger-group");
  let latest = null;
  select.addEventListener("change", () => latest && showGroup(latest, select.value));

  return function showLedger(ledger) {
    latest = ledger;
    setHidden(byId("ledger-off"), ledger !== null);
    setHidden(byId("ledger-on"), ledger === null);
    if (ledger === null) return;
    setText(byId("ledger-total"), cost(ledger.cost, ledger.unit));
    setText(byId("ledger-rows"), counted(ledger.rows, "request"));
    showGroup(ledger, select.value);
    showBudgets(ledger);
  };
}

function showGroup(ledger, by) {
  setText(byId("ledger-by"), by === "key" ? "API key" : by === "role" ? "Role" : "Trajectory");
  const groups = ledger.groups[by] ?? [];
  // The group is part of the key, so that a role and an API key of one name do not share a row.
  reconcile(byId("ledger-body"), groups, (group) => `${by} ${group.name}`, makeRow, (row, group) => {
    const cells = [
      count(group.requests),
      count(group.tokens_computed),
      count(group.base_reused),
      count(group.lr_reused),
      count(group.generated),
      count(group.tool_tokens),
      `${bytes(group.kv_byte_seconds)}·s`,
      cost(group.cost, ledger.unit),
    ];
    cells.forEach((text, index) => setText(row.cells[index + 1], text));
  });
  setHidden(byId("ledger-none"), groups.length > 0);
}

function makeRow(group) {
  const row = el("tr", {}, el("th", { scope: "row" }, group.name || "(none given)"));
  for (let cell = 0; cell < 8; cell += 1) row.append(el("td"));
  return row;
}

function showBudgets({ budgets, unit }) {
  setHidden(byId("budgets-none"), budgets.length > 0);
  reconcile(byId("budgets"), budgets, (each) => `${each.scope} ${each.name}`, makeBudget, (item, budget) => {
    const part = (name) => item.querySelector(`.${name}`);
    setText(part("budget-left"), `${cost(budget.left, unit)} left of ${cost(budget.limit, unit)}`);
    const reserved = budget.reserved > 0 ? `, ${cost(budget.reserved, unit)} reserved by running requests` : "";
    setText(part("budget-spent"), `${cost(budget.spent, unit)} spent${reserved}`);
    setShare(part("spent"), budget.spent / budget.limit);
    setShare(part("reserved"), budget.reserved / budget.limit);
    setAttribute(item, "data-low", budget.left <= 0.1 * budget.limit);
    setText(part("budget-low"), budget.left <= 0 ? "Used up" : budget.left <= 0.1 * budget.limit ? "Nearly used up" : "");
  });
}

function makeBudget(budget) {
  const bar = el("div", { class: "bar", "aria-hidden": "true" }, el("span", { class: "bar-part spent" }));
  bar.append(el("span", { class: "bar-part reserved" }));
  const scope = budget.scope === "key" ? "API key" : budget.scope;
  const name = el("p", { class: "budget-name" }, el("span", { class: "fine" }, `${scope} `), el("strong", {}, budget.name));
  name.append(el("span", { class: "budget-low" }));
  return el("li", {}, name, el("p", { class: "budget-left" }), bar, el("p", { class: "fine budget-spent" }));
}
