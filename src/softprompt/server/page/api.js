// The server's public HTTP interface, and nothing else: JSON calls and streams of events.

const KEY = "softprompt-key";
let key = sessionStorage.getItem(KEY) ?? "";

export function apiKey() {
  return key;
}

export function setApiKey(value) {
  key = value.trim();
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

// What went wrong, in words for the person at the page.
export class Trouble extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

export function address(path) {
  return new URL(path, document.baseURI).href;
}

async function send(path, body, signal) {
  const headers = { Accept: "application/json" };
  if (body !== undefined) headers["Content-Type"] = "application/json";
  if (key) headers.Authorization = `Bearer ${key}`;
  let reply;
  try {
    reply = await fetch(address(path), {
      method: body === undefined ? "GET" : "POST",
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
      cache: "no-store",
      credentials: "same-origin",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Trouble("The server does not answer. Is it still running?");
  }
  if (!reply.ok) throw await refused(reply);
  return reply;
}

async function refused(reply) {
  let said = "";
  try {
    const content = await reply.json();
    said = content?.error?.message ?? (typeof content?.detail === "string" ? content.detail : "");
  } catch {
    // Not JSON: a proxy's page says less than the status.
  }
  const parts = [said.replace(/[^.!?]$/, "$&.") || `The server refused (${reply.status} ${reply.statusText}).`];
  if (reply.status === 401 || reply.status === 403) parts.push("Enter the server's key under “API key”.");
  const wait = reply.headers.get("Retry-After");
  if (reply.status === 429 && wait) parts.push(`Try again in ${wait} s.`);
  return new Trouble(parts.join(" "), reply.status);
}

export async function get(path, signal) {
  return (await send(path, undefined, signal)).json();
}

export async function post(path, body, signal) {
  return (await send(path, body, signal)).json();
}

// Yields the JSON of each server-sent event until [DONE].
export async function* events(path, body, signal) {
  const reply = await send(path, body, signal);
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      waiting += value;
      const blocks = waiting.split(/\r?\n\r?\n/);
      waiting = blocks.pop();
      for (const block of blocks) {
        const data = block.split(/\r?\n/).filter((line) => line.startsWith("data:"))
          .map((line) => line.slice(5).replace(/^ /, "")).join("\n");
        if (!data) continue;
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) throw new Trouble(event.error.message ?? "The answer broke off.");
        yield event;
      }
    }
  } catch (error) {
    if (error instanceof Trouble || error.name === "AbortError") throw error;
    throw new Trouble("The connection broke before the answer was whole.");
  } finally {
    reader.cancel().catch(() => {});
  }
  throw new Trouble("The connection broke before the answer was whole.");
}
