// What is served, how it shares, and whether it is well.

import { byId, setAttribute, setText } from "./dom.js";
import { count, duration } from "./format.js";

const MODES = {
  non_shared: "Every role keeps a full cache of its own: exact, and nothing is shared between roles.",
  full_shared: "All roles read one full cache as whichever role wrote it: the fastest, and the roughest, way to share.",
  base_shared:
    "All roles share the base cache; each role writes its own LR cache, by an LR prefill, over context that is new to it.",
  base_lr_shared:
    "All roles share the base cache and the LR cache beside it, so that a new role runs over new tokens only.",
};

const STATES = {
  waiting: ["…", "Waiting for the server's first answer"],
  alive: ["✓", "Alive: the engine takes requests"],
  dead: ["✕", "Dead: the engine has stopped, restart the server"],
  silent: ["!", "No answer from the server: what you see is old"],
  locked: ["!", "Locked: the server asks for an API key"],
};

export function showHealth(name) {
  const [sign, words] = STATES[name];
  setAttribute(byId("health"), "data-state", name);
  setText(byId("health-sign"), sign);
  setText(byId("health-words"), words);
}

export function showHeader(state) {
  setText(byId("model"), state.model);
  setText(byId("mode"), state.sharing);
  setText(byId("mode-words"), MODES[state.sharing] ?? "");
  setText(byId("uptime"), duration(state.uptime_s));
  setText(byId("device"), state.device + replicas(state.replicas ?? []));
  setText(byId("context"), `${count(state.max_model_len)} tokens`);
  setText(byId("prefix-writer"), state.prefix_writer ?? "–");
  setText(byId("version"), state.version);
  showHealth(state.alive ? "alive" : "dead");
}

function replicas(all) {
  return all.length ? `, ${all.filter((each) => each.alive).length} of ${all.length} replicas` : "";
}
