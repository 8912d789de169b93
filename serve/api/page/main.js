// Asks the server for its state once a second while the page can be seen, and hands it to the parts of the page.

import { getState, hasKey, rememberKey } from "./api.js";
import { makeCache } from "./cache.js";
import { byId, setHidden, setText } from "./dom.js";
import { showHeader, showHealth } from "./header.js";
import { makeLedger } from "./ledger.js";
import { makePlayground } from "./playground.js";
import { showRoles } from "./roles.js";
import { makeTraffic } from "./traffic.js";

const INTERVAL_MS = 1000;

const showTraffic = makeTraffic();
const showCache = makeCache();
const showLedger = makeLedger();
const offerPlayground = makePlayground({ onLocked: lock });
let locked = false;
let timer = null;
let asking = false;

function show(state) {
  showHeader(state);
  showCache(state); // first of those that draw roles: it gives them their looks, in the order of the roles
  showRoles(state.roles);
  showTraffic(state);
  showLedger(state.ledger);
  offerPlayground(state);
}

/** The next poll waits for this one's answer: a slow server is not asked more often than it can tell. */
async function poll() {
  timer = null;
  if (locked || asking || document.hidden) return;
  asking = true;
  try {
    show(await getState());
    setHidden(byId("lock"), true);
  } catch (error) {
    if (error.status === 401) lock();
    else {
      console.warn("The server's state could not be shown:", error.message);
      showHealth("silent");
    }
  } finally {
    asking = false;
  }
  if (!locked) timer = setTimeout(poll, INTERVAL_MS);
}

function lock() {
  locked = true;
  showHealth("locked");
  const words = hasKey() ? "The server does not know this API key." : "This server asks for an API key.";
  setText(byId("lock-words"), words);
  setHidden(byId("lock"), false);
}

byId("lock").addEventListener("submit", (event) => {
  event.preventDefault();
  rememberKey(byId("key").value.trim());
  byId("key").value = "";
  locked = false;
  poll();
});

document.addEventListener("visibilitychange", () => {
  if (!document.hidden && timer === null) poll();
});

poll();
