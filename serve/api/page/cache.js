// The live cache: the picture, what one looks at, the legend, the meters, and all of it as a table.

import { byId, el, reconcile, setAttribute, setHidden, setShare, setText } from "./dom.js";
import { bytes, count, counted, percent } from "./format.js";
import { badge, makeIcicle } from "./icicle.js";
import { look, swatch } from "./palette.js";
import { describe } from "./tree.js";

const HINT = "Point at a run of tokens, or reach the picture with Tab and go on with the arrow keys.";

export function makeCache() {
  const icicle = makeIcicle(byId("icicle"), byId("icicle-axis"), { tell });
  let latest = [];
  byId("legend-held").append(badge("held", 1, 10, 11));
  byId("legend-shared").append(badge("shared", 2, 11, 11));
  tell(null);
  byId("cache-details").addEventListener("toggle", () => showTable(latest));

  return function showCache({ cache, sharing, roles }) {
    latest = cache.nodes;
    const writers = latest.flatMap((node) => node.writers.map(([role]) => role));
    const named = new Set([...roles.map((role) => role.name), ...writers]);
    named.forEach(look); // in the order of the roles, so that colours do not depend on who writes first
    icicle.draw(latest, sharing === "base_lr_shared");
    setHidden(byId("cache-empty"), latest.length > 0);
    setHidden(byId("cache-truncated"), !cache.truncated);
    setHidden(byId("legend-strip"), sharing !== "base_lr_shared");
    reconcile(byId("legend-roles"), [...named], (name) => name, legendEntry, () => {});
    showMeters(cache);
    showTable(latest);
  };
}

function legendEntry(name) {
  return el("li", {}, swatch(name), el("span", {}, name));
}

/** Idle time stands outside the live region: once a second, it would never let a screen reader rest. */
function tell(node) {
  const { title, written, read, held, idle } = node ? describe(node) : { title: HINT };
  setText(byId("node-title"), title);
  setText(byId("node-written"), written ?? "");
  setText(byId("node-read"), read ?? "");
  setText(byId("node-held"), held ?? "");
  setText(byId("node-idle"), idle ?? "");
}

function showMeters(cache) {
  meter("slots", cache.slots_used, cache.slots_total, count);
  meter("base", cache.base_bytes_used, cache.base_bytes_total, bytes);
  meter("lr", cache.lr_bytes_used, cache.lr_bytes_total, bytes);
  setText(byId("cached"), counted(cache.slots_cached, "slot"));
  setText(byId("evicted"), counted(cache.evicted, "slot"));
}

function meter(name, used, total, shown) {
  const bar = byId(`${name}-meter`);
  const words = total > 0 ? `${shown(used)} of ${shown(total)} (${percent(used, total)})` : "none in this sharing mode";
  setShare(bar.firstElementChild, used / total);
  setAttribute(bar, "aria-valuemax", total);
  setAttribute(bar, "aria-valuenow", used);
  setAttribute(bar, "aria-valuetext", words);
  setText(byId(`${name}-words`), words);
}

/** Only while it is open: hundreds of rows are not kept up for nobody. */
function showTable(nodes) {
  if (!byId("cache-details").open) return;
  reconcile(byId("nodes-body"), nodes, (node) => node.id, () => el("tr"), fillRow);
}

function fillRow(row, node) {
  const cells = [
    `${node.start}–${node.start + node.length - 1}`,
    count(node.length),
    `${node.part === "lr" ? "LR" : "base"} · ${node.owner}`,
    node.writers.map(([role, length]) => `${role} ${length}`).join(", "),
    node.readers.join(", ") || "–",
    count(node.held),
    `${node.idle_s.toFixed(1)} s`,
  ];
  if (!row.cells.length) row.append(el("th", { scope: "row" }), ...cells.slice(1).map(() => el("td")));
  cells.forEach((text, index) => setText(row.cells[index], text));
}
