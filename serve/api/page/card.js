// One step of a trajectory as it is spoken, and what it cost.

import { el, setShare, setText } from "./dom.js";
import { count, milliseconds } from "./format.js";
import { swatch } from "./palette.js";

export function makeCard(role, number) {
  const text = el("p", { class: "answer" });
  const state = el("span", { class: "fine" }, "answering…");
  const head = el("h4", {}, swatch(role), el("span", {}, `${number}. ${role}`));
  const element = el("li", { class: "card speaking" }, el("div", { class: "card-head" }, head, state), text);

  return {
    element,
    text: (piece) => text.append(piece),
    tool: (result) => element.append(el("p", { class: "tool" }, el("span", { class: "fine" }, "tool result"), result)),
    stopped() {
      element.classList.remove("speaking");
      setText(state, "broken off");
    },
    done({ usage, firstTokenMs, totalMs }) {
      element.classList.remove("speaking");
      setText(state, `first token after ${milliseconds(firstTokenMs)}, all after ${milliseconds(totalMs)}`);
      if (usage) element.append(...cost(usage));
    },
  };
}

function cost({ prompt_tokens: prompt, completion_tokens: generated, lragent, prompt_tokens_details: details }) {
  const { tokens_computed: computed, base_reused: base, lr_reused: lr, lr_prefilled: prefilled } = lragent;
  const bar = el("div", { class: "bar tall", "aria-hidden": "true" });
  const parts = [["reused", details.cached_tokens], ["prefilled", prefilled], ["computed", computed - prefilled]];
  for (const [name, tokens] of parts) {
    const part = el("span", { class: `bar-part ${name}` });
    setShare(part, tokens / prompt);
    bar.append(part);
  }
  const facts = [
    [count(prompt), "prompt tokens"],
    [count(base), "base reused", "reused"],
    [count(lr), "LR reused"],
    [count(prefilled), "LR prefill", "prefilled"],
    [count(computed), "computed", "computed"],
    [count(generated), "generated"],
  ];
  const list = el("dl", { class: "facts" });
  for (const [number, name, key] of facts) {
    if (key === "prefilled" && !prefilled) continue;
    const dot = key ? [el("span", { class: `dot bar-part ${key}`, "aria-hidden": "true" })] : [];
    list.append(el("div", {}, el("dt", {}, ...dot, name), el("dd", {}, number)));
  }
  return [bar, list];
}
