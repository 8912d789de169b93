// How busy the server is. It only counts; rates are the differences between two polls.

import { byId, setAttribute, setText } from "./dom.js";
import { count, milliseconds, percent, rate } from "./format.js";

const SPAN_S = 120;
const GAP_S = 5; // after a longer silence (a hidden tab) a difference says nothing about the last second
const WIDTH = 240;
const HEIGHT = 40;

export function makeTraffic() {
  let last = null;
  let samples = [];

  function sample(state, now) {
    const { prompt_tokens: prompt, generated } = state.totals;
    const restarted = last !== null && (prompt < last.prompt || generated < last.generated);
    if (restarted) samples = [];
    const seconds = last === null || restarted ? Infinity : now - last.at;
    if (seconds <= GAP_S) {
      const each = (after, before) => (after - before) / seconds;
      samples.push({ at: now, prompt: each(prompt, last.prompt), generated: each(generated, last.generated) });
    }
    last = { at: now, prompt, generated };
    samples = samples.filter(({ at }) => now - at <= SPAN_S);
  }

  return function showTraffic(state) {
    const now = performance.now() / 1000;
    sample(state, now);
    for (const measure of ["prompt", "generated"]) {
      const values = samples.map((each) => each[measure]);
      const peak = Math.max(0, ...values);
      setText(byId(`${measure}-rate`), rate(samples.at(-1)?.at === now ? values.at(-1) : null));
      setText(byId(`${measure}-peak`), `peak ${rate(peak)}`);
      setAttribute(byId(`${measure}-line`), "d", line(samples, measure, peak, now));
    }
    showTotals(state);
  };
}

/** A path from two minutes ago, left, to now, right. It is broken where there was nothing to measure. */
function line(samples, measure, peak, now) {
  return samples
    .map((each, index) => {
      const x = WIDTH * (1 - (now - each.at) / SPAN_S);
      const y = HEIGHT - 2 - (HEIGHT - 4) * (peak > 0 ? each[measure] / peak : 0);
      const joined = index > 0 && each.at - samples[index - 1].at <= GAP_S;
      return `${joined ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`;
    })
    .join("");
}

function showTotals({ totals, ttft_ms: first, inter_token_ms: between }) {
  setText(byId("running"), count(totals.running));
  setText(byId("waiting"), count(totals.waiting));
  setText(byId("finished"), count(totals.requests));
  setText(byId("preempted"), count(totals.preempted));
  setText(byId("ttft-50"), milliseconds(first.p50));
  setText(byId("ttft-95"), milliseconds(first.p95));
  setText(byId("between-50"), milliseconds(between.p50));
  setText(byId("between-95"), milliseconds(between.p95));
  const reused = totals.prompt_tokens - totals.tokens_computed;
  setText(byId("total-share"), percent(reused, totals.prompt_tokens));
  setText(byId("total-prompt"), count(totals.prompt_tokens));
  setText(byId("total-computed"), count(totals.tokens_computed));
  setText(byId("total-reused"), count(reused));
  setText(byId("total-lr-prefilled"), count(totals.lr_prefilled));
  setText(byId("total-generated"), count(totals.generated));
}
