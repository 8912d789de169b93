// How a role looks, everywhere on the page: a colour, a pattern and a letter, so that no one of them is needed alone.
// `base` is always the plain grey; the others take the next free look in the order in which the page met them.

import { byId, svg } from "./dom.js";

const HUES = 7; // page.css gives --role-1 … --role-7, chosen to be told apart with any colour vision; --role-0 is grey
const TILE = 8;

// What is drawn in a tile of 8 × 8. Diagonals run past the corners, so that tiles join without a notch.
const PATTERNS = [
  "M-2 2L2 -2M-2 10L10 -2M6 10L10 6",
  "M1 4h0.01M5 0h0.01M5 8h0.01",
  "M-2 6L2 10M-2 -2L10 10M6 -2L10 2",
  "M0 4h8",
  "M4 0v8",
  "M0 4h8M4 0v8",
  "M-1 5L2 2L6 6L9 3",
];

const looks = new Map();

/** {index, letter, fill, hue}: `fill` is a reference to the role's pattern, `hue` the class that carries its colours. */
export function look(role) {
  if (!looks.has(role)) {
    const index = role === "base" ? 0 : 1 + [...looks.keys()].filter((name) => name !== "base").length;
    const known = { letter: freeLetter(role), fill: `url(#pattern-${index})`, hue: `hue-${hueOf(index)}` };
    byId("patterns").append(pattern(index));
    looks.set(role, known);
  }
  return looks.get(role);
}

function hueOf(index) {
  return index === 0 ? 0 : 1 + ((index - 1) % HUES);
}

/** After seven roles the hues come again, each with the next pattern. */
function pattern(index) {
  const tile = svg("pattern", {
    id: `pattern-${index}`,
    class: `hue-${hueOf(index)}`,
    width: TILE,
    height: TILE,
    patternUnits: "userSpaceOnUse",
  });
  tile.append(svg("rect", { class: "tint", width: TILE, height: TILE }));
  if (index > 0) {
    const drawn = PATTERNS[(index - 1 + Math.floor((index - 1) / HUES)) % PATTERNS.length];
    tile.append(svg("path", { class: "mark", d: drawn }));
  }
  return tile;
}

function freeLetter(role) {
  const taken = new Set([...looks.values()].map((known) => known.letter));
  const own = [...role.toUpperCase()].filter((letter) => /[\p{L}\p{N}]/u.test(letter));
  return [...own, ..."123456789"].find((letter) => !taken.has(letter)) ?? own[0] ?? "?";
}

/** A small square in the role's look, with its letter. The role's name stands beside it, so it is hidden from readers. */
export function swatch(role) {
  const { letter, fill, hue } = look(role);
  return svg(
    "svg",
    { class: `swatch ${hue}`, width: 20, height: 20, viewBox: "0 0 20 20", "aria-hidden": "true", focusable: "false" },
    svg("rect", { class: "run", x: 0.5, y: 0.5, width: 19, height: 19, rx: 4, fill }),
    Object.assign(svg("text", { class: "run-label", x: 10, y: 14.5, "text-anchor": "middle" }), { textContent: letter }),
  );
}
