// Making and changing elements. Text goes in as text, and what has not changed is not touched: a poll once a second must
// neither move the reader's focus nor make a screen reader speak.

const SVG = "http://www.w3.org/2000/svg";

export function byId(id) {
  return document.getElementById(id);
}

function furnish(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else setAttribute(node, name, value);
  }
  node.append(...children);
  return node;
}

/** An HTML element. A child that is a string becomes a text node; `onclick` and the like become listeners. */
export function el(tag, attributes = {}, ...children) {
  return furnish(document.createElement(tag), attributes, children);
}

export function svg(tag, attributes = {}, ...children) {
  return furnish(document.createElementNS(SVG, tag), attributes, children);
}

/** null and false take the attribute away. */
export function setAttribute(node, name, value) {
  if (value === null || value === undefined || value === false) node.removeAttribute(name);
  else if (node.getAttribute(name) !== String(value)) node.setAttribute(name, value === true ? "" : value);
}

export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export function setHidden(node, hidden) {
  if (node.hidden !== hidden) node.hidden = hidden;
}

/** A share from 0 to 1 as the width of a bar. */
export function setShare(node, share) {
  node.style.width = `${(100 * Math.min(1, Math.max(0, share || 0))).toFixed(2)}%`;
}

/**
 * Make `parent`'s children those of `items`, in order. The element of a key that stays is kept, and moved only where the
 * order changed, since moving an element takes the focus from it. make(item) gives an element, update(element, item)
 * fills it in.
 */
export function reconcile(parent, items, key, make, update) {
  const wanted = new Set(items.map((item) => String(key(item))));
  const kept = new Map();
  for (const child of [...parent.children]) {
    if (wanted.has(child.dataset.key)) kept.set(child.dataset.key, child);
    else child.remove();
  }
  let place = parent.firstElementChild;
  for (const item of items) {
    const name = String(key(item));
    const child = kept.get(name) ?? make(item);
    child.dataset.key = name;
    if (child === place) place = place.nextElementSibling;
    else parent.insertBefore(child, place);
    update(child, item);
  }
}

/** The attributes of a button that acts or does not. `disabled` itself would take the focus away from it. */
export function setActive(button, active) {
  setAttribute(button, "aria-disabled", active ? null : "true");
}

export function isActive(button) {
  return button.getAttribute("aria-disabled") !== "true";
}
