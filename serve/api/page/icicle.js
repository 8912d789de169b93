// The picture of the cache: draws what tree.js laid out, and lets a pointer or the arrow keys go from node to node.

import { setAttribute, svg } from "./dom.js";
import { look } from "./palette.js";
import { describe, layOut } from "./tree.js";

const TITLE_HEIGHT = 24;
const GROUP_GAP = 10;
const ROW = { base: [22, 44], lr: [14, 22] }; // px: the least, and the most where few rows would leave the space empty
const STRIP = 4;
const BADGE_WIDTH = 20;
const LETTER_WIDTH = 7.2;
const LEAST_WIDTH = 3; // a run of one token in a long context stays something to point at

/** drawing, axis: the two <svg>. tell(node or null) is told which node is looked at. */
export function makeIcicle(drawing, axis, { tell }) {
  const shown = new Map(); // id → {element, node, signature}
  let current = null; // the node that Tab reaches; it is the one looked at last
  let looked = null;
  let latest = null;

  function redraw() {
    if (latest) draw(...latest);
  }

  function draw(nodes, hasStrips) {
    latest = [nodes, hasStrips];
    const width = drawing.parentElement.clientWidth;
    const groups = layOut(nodes);
    const end = niceEnd(Math.max(1, ...nodes.map((node) => node.start + node.length)));
    const scale = { x: (position) => (position / end) * width, width, hasStrips };
    drawAxis(axis, end, scale);
    const height = placeRows(groups, drawing.parentElement.clientHeight);
    setAttribute(drawing, "width", width);
    setAttribute(drawing, "height", height);
    drawTitles(groups);
    const placed = groups.flatMap((group) => group.placed);
    forget(new Set(placed.map((node) => node.id)), placed);
    for (const node of placed) show(node, scale);
    if (!shown.has(current)) current = placed[0]?.id ?? null;
    for (const [id, { element }] of shown) setAttribute(element, "tabindex", id === current ? 0 : -1);
    if (looked !== null) tell(shown.get(looked)?.node ?? null);
  }

  function drawTitles(groups) {
    const titles = drawing.querySelector(".group-titles");
    const texts = groups.map((group) => {
      const text = svg("text", { x: 0, y: group.y - 8 });
      text.textContent = group.title;
      return text;
    });
    titles.replaceChildren(...texts);
  }

  function show(node, scale) {
    const known = shown.get(node.id) ?? add(node);
    known.node = node;
    const { start, length, writers, held, readers, part, level, box } = node;
    const place = [part, level, box, scale.x(1), scale.hasStrips];
    const signature = JSON.stringify([start, length, writers, held, readers, place]);
    if (signature === known.signature) return;
    known.signature = signature;
    const { title, written, held: holders, read } = describe(node);
    setAttribute(known.element, "aria-label", [`${title}.`, written, read, holders].join(" "));
    setAttribute(known.element, "aria-level", level);
    known.element.replaceChildren(...paint(node, scale));
  }

  function add(node) {
    const element = svg("g", { class: "node", role: "treeitem", tabindex: -1 });
    element.dataset.id = node.id;
    drawing.querySelector(".nodes").append(element);
    const known = { element };
    shown.set(node.id, known);
    return known;
  }

  /** Where the focused node was evicted or split, what is now at its place is focused instead: focus is never lost. */
  function forget(kept, placed) {
    for (const [id, { element, node }] of shown) {
      if (kept.has(id)) continue;
      if (element === document.activeElement) {
        const covers = ({ start, length }) => start <= node.start && node.start < start + length;
        const heir = placed.find((each) => each.part === node.part && covers(each));
        const heirElement = heir && (shown.get(heir.id) ?? add(heir)).element;
        if (heirElement) setAttribute(heirElement, "tabindex", 0);
        (heirElement ?? drawing.parentElement).focus();
      }
      element.remove();
      shown.delete(id);
      if (looked === id) lookAt(null);
    }
  }

  function lookAt(id) {
    looked = id;
    if (id !== null) current = id;
    tell(id === null ? null : (shown.get(id)?.node ?? null));
  }

  function nodeOf(event) {
    const element = event.target.closest(".node");
    return element ? [...shown.values()].find((each) => each.element === element)?.node : null;
  }

  drawing.addEventListener("pointerover", (event) => {
    const node = nodeOf(event);
    if (node) lookAt(node.id);
  });
  drawing.addEventListener("focusin", (event) => {
    const node = nodeOf(event);
    if (!node) return;
    lookAt(node.id);
    for (const [id, { element }] of shown) setAttribute(element, "tabindex", id === current ? 0 : -1);
  });
  drawing.addEventListener("keydown", (event) => {
    const node = nodeOf(event);
    const target = node && goal(event.key, node, [...shown.values()].map((each) => each.node));
    if (!target) return;
    event.preventDefault();
    const { element } = shown.get(target.id);
    element.focus();
    element.scrollIntoView({ block: "nearest" });
  });
  new ResizeObserver(redraw).observe(drawing.parentElement);
  return { draw };
}

function goal(key, node, all) {
  const inOrder = (first) => all.reduce((best, each) => (best && !first(each, best) ? best : each), null);
  switch (key) {
    case "ArrowRight":
      return node.down;
    case "ArrowLeft":
      return node.up;
    case "ArrowDown":
      return node.after;
    case "ArrowUp":
      return node.before;
    case "Home":
      return inOrder((a, b) => a.box.y < b.box.y || (a.box.y === b.box.y && a.start < b.start));
    case "End":
      return inOrder((a, b) => a.box.y > b.box.y || (a.box.y === b.box.y && a.start > b.start));
    default:
      return null;
  }
}

/** Gives groups their `y`, nodes their `box`, and returns the height. Rows are as tall as the space allows. */
function placeRows(groups, space) {
  const fixed = groups.length * (TITLE_HEIGHT + GROUP_GAP);
  const weight = (group) => group.rows * (group.part === "lr" ? 0.5 : 1);
  const fair = (space - fixed) / Math.max(1, groups.reduce((sum, group) => sum + weight(group), 0));
  let y = 0;
  for (const group of groups) {
    const [least, most] = ROW[group.part];
    const row = Math.floor(Math.min(most, Math.max(least, group.part === "lr" ? fair / 2 : fair)));
    y += TITLE_HEIGHT;
    group.y = y;
    for (const node of group.placed) node.box = { y: y + node.row * row, height: node.rows * row - 2 };
    y += group.rows * row + GROUP_GAP;
  }
  return y;
}

/** Runs, LR strip, outline, badges: the shapes of one node. */
function paint(node, { x, hasStrips }) {
  const { y, height } = node.box;
  const strip = hasStrips && node.part === "base" ? STRIP : 0;
  const left = x(node.start);
  const whole = Math.max(LEAST_WIDTH, x(node.start + node.length) - left - 1);
  const body = height - (strip ? strip + 1 : 0);
  const shapes = [svg("rect", { class: "ground", x: left, y, width: whole, height })];
  const badges = badgesOf(node, left + whole, y, whole, body);
  const room = whole - badges.length * BADGE_WIDTH;
  let at = node.start;
  for (const [role, length] of node.writers) {
    const { fill, hue } = look(role);
    const from = Math.min(x(at), left + whole - 1);
    const width = Math.max(1, Math.min(x(at + length), left + whole) - from);
    shapes.push(svg("rect", { class: `run ${hue}`, x: from, y, width, height: body, fill }));
    if (strip) shapes.push(svg("rect", { class: `strip ${hue}`, x: from, y: y + body + 1, width, height: strip }));
    const label = labelOf(role, length, Math.min(width, left + room - from), body);
    if (label) shapes.push(labelAt(label, from + 5, y + Math.min(body / 2, 60) + 4));
    at += length;
  }
  const outline = node.held ? "outline held" : "outline";
  const inner = { width: Math.max(1, whole - 2), height: Math.max(1, height - 2) };
  shapes.push(svg("rect", { class: outline, x: left + 1, y: y + 1, ...inner, rx: 2 }));
  return [...shapes, ...badges];
}

function labelOf(role, length, width, height) {
  if (height < 12) return null;
  const long = `${role} · ${length}`;
  return [long, role, look(role).letter].find((text) => text.length * LETTER_WIDTH + 8 <= width) ?? null;
}

function labelAt(text, x, y) {
  const label = svg("text", { class: "run-label", x, y });
  label.textContent = text;
  return label;
}

/** At the right end: a full disc with the number of requests that hold it, a diamond with the number of its readers. */
function badgesOf(node, right, y, width, height) {
  const badges = [];
  const middle = y + Math.min(height / 2, 60);
  let at = right - 12;
  for (const [kind, number] of [["held", node.held], ["shared", node.readers.length > 1 ? node.readers.length : 0]]) {
    if (!number || right - at > width - 4 || height < 12) continue;
    badges.push(badge(kind, number, at, middle));
    at -= BADGE_WIDTH;
  }
  return badges;
}

export function badge(kind, number, x, y) {
  const shape =
    kind === "held"
      ? svg("circle", { cx: x, cy: y, r: 8 })
      : svg("path", { d: `M${x - 10} ${y}L${x} ${y - 10}L${x + 10} ${y}L${x} ${y + 10}Z` });
  const text = svg("text", { x, y: y + 4, "text-anchor": "middle" });
  text.textContent = number;
  return svg("g", { class: `badge ${kind}` }, shape, text);
}

/** The scale grows in steps, so that the picture does not shift with every token. */
function niceEnd(end) {
  const step = 10 ** Math.floor(Math.log10(end));
  return [1, 1.5, 2, 3, 4, 5, 6, 8, 10].map((factor) => factor * step).find((nice) => nice >= end);
}

function drawAxis(axis, end, { x, width }) {
  const many = width > 600 ? 8 : 4;
  const power = 10 ** Math.floor(Math.log10(Math.max(10, end) / many));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((each) => end / each <= many);
  const signature = `${end} ${width}`;
  if (axis.dataset.signature === signature) return;
  axis.dataset.signature = signature;
  setAttribute(axis, "width", width);
  const ticks = [];
  for (let position = 0; position <= end; position += Math.max(1, step)) {
    const last = x(position) > width - 20;
    const anchor = position === 0 ? "start" : last ? "end" : "middle";
    const text = svg("text", { x: x(position), y: 12, "text-anchor": anchor });
    text.textContent = position.toLocaleString("en");
    ticks.push(svg("path", { class: "tick", d: `M${Math.min(width - 0.5, x(position) + 0.5)} 17v5` }), text);
  }
  axis.replaceChildren(...ticks);
}
