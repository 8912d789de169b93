// The list of steps of a trajectory: which role speaks when, and which tool result comes after it.

import { byId, el, isActive, reconcile, setActive, setHidden } from "./dom.js";

export function makeSteps() {
  const list = byId("steps");
  let roles = [];
  const steps = []; // {item, select, tool, …}; `tool` is the textarea of the tool result
  byId("add-step").addEventListener("click", () => {
    const step = add(steps.at(-1)?.select.value ?? roles[0]);
    step?.select.focus();
  });

  function add(role) {
    if (role === undefined) return null;
    const step = makeStep({ move, remove });
    steps.push(step);
    list.append(step.item);
    offer(step, roles);
    step.select.value = role;
    number();
    return step;
  }

  function move(step, by) {
    const from = steps.indexOf(step);
    const to = from + by;
    if (to < 0 || to >= steps.length) return;
    const focused = document.activeElement;
    steps.splice(to, 0, ...steps.splice(from, 1));
    // The neighbour moves instead of this step, so that the pressed button keeps the focus.
    const neighbour = steps[from].item;
    if (by < 0) step.item.after(neighbour);
    else step.item.before(neighbour);
    focused.focus();
    number();
  }

  function remove(step) {
    const at = steps.indexOf(step);
    steps.splice(at, 1);
    step.item.remove();
    number();
    (steps[Math.min(at, steps.length - 1)]?.select ?? byId("add-step")).focus();
  }

  function number() {
    steps.forEach((step, index) => {
      const name = `step ${index + 1}`;
      step.number.textContent = `${index + 1}`;
      step.select.setAttribute("aria-label", `Role of ${name}`);
      step.up.setAttribute("aria-label", `Move ${name} up`);
      step.down.setAttribute("aria-label", `Move ${name} down`);
      step.away.setAttribute("aria-label", `Remove ${name}`);
      step.tool.setAttribute("aria-label", `Tool result after ${name}`);
      step.toggle.setAttribute("aria-label", `${step.tool.hidden ? "Add" : "Drop"} the tool result after ${name}`);
      setActive(step.up, index > 0);
      setActive(step.down, index < steps.length - 1);
    });
  }

  return {
    /** The roles that may be chosen. The first time, one step for each but `base`, unless `base` is all there is. */
    offerRoles(names) {
      const first = roles.length === 0;
      roles = names;
      for (const step of steps) offer(step, names);
      if (!first) return;
      const adapters = names.filter((name) => name !== "base");
      for (const name of adapters.length ? adapters : names) add(name);
    },
    chosen: () => steps.map(({ select, tool }) => ({ role: select.value, tool: tool.hidden ? "" : tool.value })),
  };

  function makeStep(actions) {
    const button = (text, action) => el("button", { type: "button", class: "small", onclick: action }, text);
    const step = { number: el("span", { class: "step-number", "aria-hidden": "true" }), select: el("select") };
    step.up = button("↑", () => isActive(step.up) && actions.move(step, -1));
    step.down = button("↓", () => isActive(step.down) && actions.move(step, 1));
    step.away = button("✕", () => actions.remove(step));
    step.tool = el("textarea", { rows: 2, hidden: true, placeholder: "What a tool answers after this step" });
    step.toggle = button("+ tool result", () => {
      setHidden(step.tool, !step.tool.hidden);
      step.toggle.textContent = step.tool.hidden ? "+ tool result" : "− tool result";
      number();
      if (!step.tool.hidden) step.tool.focus();
    });
    const line = el("div", { class: "step-line" }, step.number, step.select);
    line.append(step.up, step.down, step.away, step.toggle);
    step.item = el("li", {}, line, step.tool);
    return step;
  }
}

/** A role that was chosen and is no longer loaded stays in the list: the server's own words will say what is wrong. */
function offer({ select }, names) {
  const all = select.value && !names.includes(select.value) ? [...names, select.value] : names;
  reconcile(select, all, (name) => name, (name) => el("option", { value: name }, name), () => {});
}
