// Numbers as people read them, in one locale: the page's words are English.

const WHOLE = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const COST = new Intl.NumberFormat("en", { minimumFractionDigits: 2, maximumFractionDigits: 6 });

export const NONE = "–";

export function count(value) {
  return value === null || value === undefined ? NONE : WHOLE.format(value);
}

/** "1 token", "2 tokens". */
export function counted(value, noun, plural = `${noun}s`) {
  return `${count(value)} ${value === 1 ? noun : plural}`;
}

/** Small rates keep a decimal. */
export function rate(value) {
  if (value === null) return NONE;
  return value < 10 && value > 0 ? value.toFixed(1) : WHOLE.format(value);
}

export function percent(part, whole) {
  return whole > 0 ? `${Math.round((100 * part) / whole)} %` : NONE;
}

export function milliseconds(value) {
  if (value === null || value === undefined) return NONE;
  return value >= 10_000 ? `${(value / 1000).toFixed(1)} s` : `${value < 100 ? value.toFixed(1) : WHOLE.format(value)} ms`;
}

export function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${unit === 0 || value >= 100 ? WHOLE.format(value) : value.toFixed(1)} ${units[unit]}`;
}

/** "4 s", "3 min 20 s", "2 h 5 min", "3 d 4 h". */
export function duration(seconds) {
  const whole = Math.floor(seconds);
  const parts = [
    [Math.floor(whole / 86_400), "d"],
    [Math.floor(whole / 3600) % 24, "h"],
    [Math.floor(whole / 60) % 60, "min"],
    [whole % 60, "s"],
  ];
  const first = parts.findIndex(([amount]) => amount > 0);
  if (first === -1) return "0 s";
  return parts
    .slice(first, first + 2)
    .filter(([amount]) => amount > 0)
    .map(([amount, unit]) => `${amount} ${unit}`)
    .join(" ");
}

/** Single requests cost little, so digits go on as far as they say something. */
export function cost(value, unit) {
  return `${COST.format(value)} ${unit}`;
}
