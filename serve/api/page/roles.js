// The table of loaded roles and what each has asked for.

import { byId, el, reconcile, setShare, setText } from "./dom.js";
import { count, percent } from "./format.js";
import { swatch } from "./palette.js";

const NUMBERS = ["requests", "running", "prompt_tokens", "tokens_computed", "reused", "generated"];

export function showRoles(roles) {
  reconcile(byId("roles-body"), roles, (role) => role.name, makeRow, fillRow);
}

function makeRow(role) {
  const origin = role.digest ? `adapter ${role.digest.slice(0, 8)}` : "no adapter";
  const name = el("th", { scope: "row" }, el("span", { class: "role-name" }, swatch(role.name), el("span", {}, role.name)));
  name.append(el("span", { class: "fine" }, origin));
  return el("tr", {}, name, ...NUMBERS.map((field) => (field === "reused" ? reusedCell() : el("td"))));
}

function reusedCell() {
  const bar = el("span", { class: "bar", "aria-hidden": "true" }, el("span", { class: "bar-part reused" }));
  return el("td", {}, el("span", { class: "with-bar" }, bar, el("span", { class: "share" })));
}

function fillRow(row, role) {
  NUMBERS.forEach((field, index) => {
    const cell = row.cells[index + 1];
    if (field !== "reused") return setText(cell, count(role[field]));
    // Tokens of an LR prefill are found in the base cache and computed all the same, so reuse is what was not computed.
    const reused = role.prompt_tokens - role.tokens_computed;
    setText(cell.querySelector(".share"), percent(reused, role.prompt_tokens));
    setShare(cell.querySelector(".reused"), reused / role.prompt_tokens);
  });
}
