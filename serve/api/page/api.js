// What the page asks of the server: its state, and chat completions as a stream.

const KEY = "lragent-api-key";
const STATE_TIMEOUT_MS = 5000;

/** The server answered, and said no. `status` is HTTP's; 0 where an error came in the middle of a stream. */
export class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** The key lives as long as the tab: sessionStorage, and nowhere else. */
export function rememberKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

export function hasKey() {
  return sessionStorage.getItem(KEY) !== null;
}

function headers(more = {}) {
  const key = sessionStorage.getItem(KEY);
  return key ? { ...more, Authorization: `Bearer ${key}` } : more;
}

async function refusal(response) {
  let message = `The server answered ${response.status} ${response.statusText}`.trim();
  try {
    const body = await response.json();
    if (typeof body.error?.message === "string") message = body.error.message;
  } catch {
    // A proxy's error page is no JSON: the status alone has to do.
  }
  return new ServerError(message, response.status);
}

export async function getState() {
  const response = await fetch("/page/state.json", {
    headers: headers(),
    cache: "no-store",
    signal: AbortSignal.timeout(STATE_TIMEOUT_MS),
  });
  if (!response.ok) throw await refusal(response);
  return response.json();
}

/** The chunks of a streamed answer, as they come. */
export async function* streamChat(body, signal) {
  const response = await fetch("/v1/chat/completions", {
    method: "POST",
    headers: headers({ "Content-Type": "application/json" }),
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  if (!response.ok) throw await refusal(response);
  let whole = false;
  for await (const data of events(response.body)) {
    if (data === "[DONE]") {
      whole = true;
      break;
    }
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError(chunk.error.message ?? "The stream broke off.", 0);
    yield chunk;
  }
  if (!whole) throw new ServerError("The answer broke off: the connection ended before its last event.", 0);
}

/** The data of server-sent events. A piece that arrives may end anywhere, even within a character. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
    }
  } finally {
    await reader.cancel().catch(() => {}); // the connection may be gone already
  }
}
