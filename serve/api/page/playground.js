// The playground: a question, the steps, and the trajectory as it is played.

import { byId, isActive, setActive, setHidden, setText } from "./dom.js";
import { makeCard } from "./card.js";
import { count, counted } from "./format.js";
import { makeSteps } from "./steps.js";
import { play } from "./trajectory.js";

/** onLocked(): the server asked for an API key. */
export function makePlayground({ onLocked }) {
  const steps = makeSteps();
  const run = byId("run");
  const stop = byId("stop");
  let running = null;

  byId("play-form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (isActive(run)) start();
  });
  stop.addEventListener("click", () => running?.abort());
  setActive(stop, false);

  async function start() {
    const order = readForm();
    if (!order) return;
    running = new AbortController();
    begin();
    try {
      await play(order, running.signal, (index) => showStep(order.steps, index));
      setText(byId("play-status"), `The trajectory has ended after ${counted(order.steps.length, "step")}.`);
    } catch (error) {
      if (running.signal.aborted) setText(byId("play-status"), "Stopped.");
      else fail(error);
    } finally {
      running = null;
      setActive(run, true);
      setActive(stop, false);
    }
  }

  function begin() {
    setActive(run, false);
    setActive(stop, true);
    byId("cards").replaceChildren();
    setHidden(byId("cards-empty"), true);
    complain("");
  }

  function showStep(order, index) {
    const { role } = order[index];
    setText(byId("play-status"), `Step ${index + 1} of ${order.length}: ${role} is answering.`);
    const card = makeCard(role, index + 1);
    byId("cards").append(card.element);
    return card;
  }

  function fail(error) {
    setText(byId("play-status"), "The trajectory broke off.");
    const lost = error instanceof TypeError; // what fetch raises where there is no connection
    complain(lost ? "The server could not be reached." : error.message);
    if (error.status === 401) onLocked();
  }

  function readForm() {
    const order = {
      question: byId("question").value.trim(),
      system: byId("system").value.trim(),
      steps: steps.chosen(),
      maxTokens: byId("max-tokens").valueAsNumber,
      temperature: byId("temperature").valueAsNumber,
    };
    const missing = !order.question ? "Write a question first." : order.steps.length ? "" : "Add a step first.";
    complain(missing);
    return missing ? null : order;
  }

  return function offer(state) {
    steps.offerRoles(state.roles.map((role) => role.name));
    byId("max-tokens").max = state.max_model_len;
    setText(byId("max-tokens-hint"), `at most ${count(state.max_model_len)}`);
  };
}

function complain(text) {
  setText(byId("play-error"), text);
  setHidden(byId("play-error"), !text);
}
