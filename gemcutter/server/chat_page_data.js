"use strict";
// Conversations as data: their shape, whoever wrote them, the request made of one, and how the server's answer is read.
// Touches neither the page nor the browser's storage; chat_page.js does.

const SAMPLING = ["temperature", "top_p", "top_k", "max_tokens", "seed"];
const SETTINGS = ["system", "thinking", "tools", "model", ...SAMPLING];
const newId = () => Array.from(crypto.getRandomValues(new Uint8Array(8)), (byte) => byte.toString(16).padStart(2, "0")).join("");
const KINDS = ["image", "audio"];
const text = (value) => (typeof value === "string" ? value : "");
const number = (value) => (Number.isFinite(value) ? value : null);

/** Return a message with the fields that the page knows, whoever wrote it; null if it is none. */
function cleanMessage(raw) {
  if (!raw || !["user", "assistant", "tool"].includes(raw.role)) return null;
  const message = { role: raw.role, content: text(raw.content) };
  if (raw.role === "tool") return { ...message, name: text(raw.name), tool_call_id: text(raw.tool_call_id) };
  if (raw.role === "user") {
    const media = (Array.isArray(raw.media) ? raw.media : []).map(cleanMedia).filter(Boolean);
    return media.length ? { ...message, media } : message;
  }
  const calls = (Array.isArray(raw.calls) ? raw.calls : []).filter((call) => call && typeof call === "object");
  const stats = raw.stats && typeof raw.stats === "object" ? raw.stats : {};
  return {
    ...message, reasoning: text(raw.reasoning), end: text(raw.end) || "interrupted", error: text(raw.error),
    calls: calls.map((call) => ({ id: text(call.id), name: text(call.name), arguments: text(call.arguments) })),
    stats: Object.fromEntries(["first", "rate", "tokens", "thought", "prompt", "cached"].map((name) => [name, number(stats[name])])),
  };
}

/** Return an image or a sound; null if it is none, or lies elsewhere: nothing is fetched for a conversation that was imported. */
function cleanMedia(raw) {
  const kind = raw?.kind, url = text(raw?.url);
  return KINDS.includes(kind) && url.startsWith(`data:${kind}/`) ? { kind, url, name: text(raw.name) || kind } : null;
}

function cleanChat(raw) {
  if (!raw || typeof raw !== "object" || !Array.isArray(raw.messages)) return null;
  const settings = Object.fromEntries(SETTINGS.map((name) => [name, text(raw.settings?.[name])]));
  const messages = raw.messages.map(cleanMessage).filter(Boolean);
  return { id: text(raw.id) || newId(), title: text(raw.title) || "Untitled", updated: number(raw.updated) ?? Date.now(), settings, messages };
}

// ---- request and answer ----

/** Return the conversation in the API's layout. Thoughts go back only after the last user message, where a tool loop goes on. */
function history(chat) {
  const last = chat.messages.findLastIndex((message) => message.role === "user");
  const sent = chat.settings.system.trim() ? [{ role: "system", content: chat.settings.system }] : [];
  chat.messages.forEach((message, index) => {
    if (message.media) return sent.push({ role: "user", content: [...message.media.map(mediaPart), ...(message.content.trim() ? [{ type: "text", text: message.content }] : [])] });
    if (message.role !== "assistant") return sent.push(message);
    if (!message.content && !message.calls.length) return null; // failed, or stopped before its first word
    const calls = message.calls.map((call) => ({ id: call.id, type: "function", function: { name: call.name, arguments: call.arguments || "{}" } }));
    return sent.push({
      role: "assistant", content: message.content || (calls.length ? null : ""),
      ...(calls.length && { tool_calls: calls }), ...(index > last && message.reasoning && { reasoning_content: message.reasoning }),
    });
  });
  return sent;
}

function mediaPart({ kind, url }) {
  if (kind === "image") return { type: "image_url", image_url: { url } };
  const format = url.slice("data:audio/".length).split(/[;,]/)[0].replace(/^x-/, "");
  return { type: "input_audio", input_audio: { data: url.slice(url.indexOf(",") + 1), format } };
}

/** Return the body of a request; an empty setting is left to the server. Throws where the tools can't be read. */
function requestBody(chat, model) {
  const { settings } = chat;
  const body = { model, messages: history(chat), stream: true, stream_options: { include_usage: true } };
  for (const name of SAMPLING) if (settings[name] !== "") body[name] = Number(settings[name]);
  if (settings.thinking) body.chat_template_kwargs = { enable_thinking: settings.thinking === "on" };
  if (settings.tools.trim()) body.tools = readTools(settings.tools);
  return body;
}

function readTools(source) {
  let tools;
  try {
    tools = JSON.parse(source);
  } catch (error) {
    throw new Error(`The tools are not JSON (${error.message}); mend them in Settings.`);
  }
  if (!Array.isArray(tools)) throw new Error("The tools are JSON, but no list; mend them in Settings.");
  return tools;
}

/** Return the error that a refusal of the server is shown as, in its own words. */
async function refusal(response) {
  const body = await response.text();
  let message = body.slice(0, 500);
  try {
    const found = JSON.parse(body);
    message = found.error?.message ?? found.message ?? (typeof found.detail === "string" ? found.detail : message);
  } catch { /* no JSON: the text itself */ }
  const wait = response.headers.get("Retry-After");
  const error = new Error(`${message || response.statusText || "no message"} (HTTP ${response.status}${wait ? `, try again in ${wait} s` : ""})`);
  error.status = response.status;
  return error;
}

/** Yield the data of each server-sent event. */
async function* eventsOf(response) {
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    rest += done ? decoder.decode() : decoder.decode(value, { stream: true });
    const lines = rest.split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
    if (done) return;
  }
}

// ---- what is said of a reply ----

const ENDS = { length: "Cut at the token limit", stopped: "Stopped", interrupted: "Interrupted", repetition: "Ended: it repeated itself", content_filter: "Ended by a filter" };

/** Return how a reply ended, its speed and its counts, as far as they are known. */
function statsText(message, running) {
  const { first, rate, tokens, thought, prompt, cached } = message.stats;
  const parts = [ENDS[message.end]];
  if (rate) parts.push(`${tokens ? "" : "≈ "}${rate.toFixed(rate < 10 ? 2 : 1)} tokens/s`);
  if (first || first === 0) parts.push(`first token ${first.toFixed(2)} s`);
  if (tokens && !running) parts.push(`${tokens} tokens`);
  if (prompt && !running) parts.push(`prompt ${prompt}${cached ? ` (${cached} cached)` : ""}`);
  return parts.filter(Boolean).join(" · ");
}

/** Return JSON laid out to be read, and anything else as it is: arguments that still come, or that are no JSON. */
function pretty(source) {
  try {
    return JSON.stringify(JSON.parse(source), null, 2);
  } catch {
    return source;
  }
}
