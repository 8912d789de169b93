// One trajectory: the steps take turns on one growing list of messages, which is what lets them share its cache.

import { streamChat } from "./api.js";

/**
 * Plays `steps` ({role, tool}) one after another. onStep(index) returns what shows the step: {text(piece),
 * done({usage, firstTokenMs, totalMs}), tool(text), stopped()}. Raises what the server or `signal` ends it with.
 */
export async function play({ question, system, steps, maxTokens, temperature }, signal, onStep) {
  const messages = system ? [{ role: "system", content: system }] : [];
  messages.push({ role: "user", content: question });
  const trajectory = `page-${crypto.getRandomValues(new Uint32Array(2)).join("-")}`;
  for (const [index, { role, tool }] of steps.entries()) {
    const card = onStep(index);
    const request = { model: role, messages, max_tokens: maxTokens, temperature, trajectory_id: trajectory };
    let content;
    try {
      content = await speak(request, signal, card);
    } catch (error) {
      card.stopped();
      throw error;
    }
    messages.push(role === "base" ? { role: "assistant", content } : { role: "assistant", name: role, content });
    if (tool) {
      messages.push({ role: "tool", content: tool });
      card.tool(tool);
    }
  }
}

async function speak(request, signal, card) {
  const began = performance.now();
  let content = "";
  let firstTokenMs = null;
  let usage = null;
  for await (const chunk of streamChat(request, signal)) {
    usage = chunk.usage ?? usage;
    const piece = chunk.choices?.[0]?.delta?.content;
    if (!piece) continue;
    firstTokenMs ??= performance.now() - began;
    content += piece;
    card.text(piece);
  }
  card.done({ usage, firstTokenMs, totalMs: performance.now() - began });
  return content;
}
