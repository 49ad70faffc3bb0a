"use strict";
// The chat page: conversations in the browser's storage, requests to this server, and what is drawn of both.
// The shapes of both are in chat_page_data.js. Texts of a model are drawn by chat_page_markdown.js or as text nodes; nothing here sets HTML.

const $ = (id) => document.getElementById(id);
const THEMES = { auto: "as the system", light: "light", dark: "dark" };
const SAVE_EVERY_MS = 1000, RECONNECT_MS = 5000, NEAR_END_PX = 80;

function h(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name.includes("-") || name === "role") node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

const iconButton = (name, label, onclick) => h("button", { type: "button", className: "quiet", title: label, "aria-label": label, onclick }, icon(name));
const say = (text) => { $("status").textContent = text; };

// ---- conversations and where they are kept: one entry each, so that a reply rewrites only its own ----

const PREFIX = "gemcutter.chat.";

function read(key) {
  try {
    return JSON.parse(localStorage.getItem(key));
  } catch {
    return null; // no JSON: not written by this page
  }
}

function write(key, value) {
  try {
    localStorage.setItem(key, JSON.stringify(value));
  } catch {
    banner("storage", "The browser keeps no more: export your conversations, then delete some.");
  }
}

const keptChats = () => Object.keys(localStorage).filter((key) => key.startsWith(PREFIX)).map((key) => cleanChat(read(key))).filter(Boolean);

function newChat() {
  const settings = Object.fromEntries(SETTINGS.map((name) => [name, text(state.defaults[name])]));
  return { id: newId(), title: "New conversation", updated: Date.now(), settings, messages: [] };
}

function save(chat) {
  if (state.chats.includes(chat)) write(PREFIX + chat.id, chat);
}

const state = { chats: [], chat: null, defaults: read("gemcutter.defaults") ?? {}, models: [], runs: new Map(), views: new Map(), editing: null, follow: true, isLeaving: false };

// ---- requests ----

function headers() {
  const key = sessionStorage.getItem("gemcutter.key");
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

/** Ask for a reply to the conversation as it stands, and add to its message what comes, until it ends in whatever way. */
async function reply(chat) {
  const message = { role: "assistant", content: "", reasoning: "", calls: [], stats: {}, end: "", error: "" };
  const run = { controller: new AbortController(), began: performance.now(), first: 0, last: 0, saved: 0, pieces: 0 };
  chat.messages.push(message);
  chat.updated = Date.now();
  state.runs.set(chat, { message, run });
  state.follow = true;
  draw();
  say("The model is writing.");
  try {
    await receive(chat, message, run);
    if (!message.end) throw new Error("The connection closed before the reply was complete.");
  } catch (error) {
    message.end = state.isLeaving ? "interrupted" : run.controller.signal.aborted ? "stopped" : "failed";
    if (message.end === "failed") {
      const unreachable = error instanceof TypeError; // what fetch throws without an answer
      message.error = unreachable ? "The server can’t be reached, or the connection broke." : error.message;
      if (error.status === 401) message.error += " Set the API key in Settings.";
      if (unreachable) connect();
    }
  }
  state.runs.delete(chat);
  chat.updated = Date.now();
  save(chat);
  state.views.get(message)?.update();
  follow();
  drawControls();
  drawChats();
  say(message.error ? `The reply failed. ${message.error}` : `${message.end === "stopped" ? "Stopped" : "Reply"}: ${message.content.slice(0, 2000)}`);
}

async function receive(chat, message, run) {
  const body = JSON.stringify(requestBody(chat, modelOf(chat)));
  const response = await fetch("v1/chat/completions", { method: "POST", headers: headers(), body, signal: run.controller.signal });
  if (!response.ok) throw await refusal(response);
  for await (const data of eventsOf(response)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Error(chunk.error.message ?? String(chunk.error));
    if (chunk.usage) countTokens(message, run, chunk.usage);
    const choice = chunk.choices?.[0];
    if (choice?.delta) addDelta(message, run, choice.delta);
    if (choice?.finish_reason) message.end = choice.finish_reason;
    drawSoon(chat, message);
    if (performance.now() - run.saved > SAVE_EVERY_MS) { run.saved = performance.now(); save(chat); }
  }
}

function addDelta(message, run, delta) {
  const reasoning = delta.reasoning_content ?? delta.reasoning; // some servers send the same text in both
  if (!reasoning && !delta.content && !delta.tool_calls?.length) return;
  const now = performance.now();
  run.first ||= now;
  run.last = now;
  run.pieces += 1;
  message.stats.first = (run.first - run.began) / 1000;
  if (reasoning) { message.reasoning += reasoning; message.stats.thought = (now - run.first) / 1000; }
  if (delta.content) message.content += delta.content;
  for (const part of delta.tool_calls ?? []) {
    let call = message.calls.find((known) => known.index === (part.index ?? 0));
    if (!call) message.calls.push(call = { index: part.index ?? 0, id: "", name: "", arguments: "" });
    call.id ||= part.id ?? "";
    call.name ||= part.function?.name ?? "";
    call.arguments += part.function?.arguments ?? "";
  }
  setRate(message, run, run.pieces); // until usage comes: one piece is about one token
}

function countTokens(message, run, usage) {
  message.stats.tokens = number(usage.completion_tokens);
  message.stats.prompt = number(usage.prompt_tokens);
  message.stats.cached = number(usage.prompt_tokens_details?.cached_tokens);
  if (message.stats.tokens) setRate(message, run, message.stats.tokens);
}

function setRate(message, run, tokens) {
  const seconds = (run.last - run.first) / 1000;
  message.stats.rate = tokens > 1 && seconds > 0.001 ? (tokens - 1) / seconds : null;
}

async function connect() {
  clearTimeout(connect.timer);
  try {
    const response = await fetch("v1/models", { headers: headers(), cache: "no-store" });
    if (!response.ok) throw await refusal(response);
    state.models = (await response.json()).data ?? [];
    banner("server", "");
  } catch (error) {
    if (error.status === 401) banner("server", "This server wants an API key: set it in Settings.");
    else {
      banner("server", error.status ? `The server refused: ${error.message}` : "Offline: the server can’t be reached. Trying again…");
      connect.timer = setTimeout(connect, RECONNECT_MS);
    }
  }
  drawModels();
  drawAttached();
}

function modelOf(chat) {
  const ids = state.models.map((model) => model.id);
  return ids.includes(chat.settings.model) ? chat.settings.model : ids[0] ?? chat.settings.model;
}

// ---- what the user does ----

const titleOf = ({ content, media }) => (content.trim() || media[0].name).replace(/\s+/g, " ").slice(0, 60);

function send(content) {
  if ((!content.trim() && !attached.length) || state.runs.has(state.chat)) return false;
  const chat = state.chat, media = takeAttached();
  const message = { role: "user", content, ...(media.length && { media }) };
  if (!chat.messages.length) chat.title = titleOf(message);
  if (!state.chats.includes(chat)) state.chats.push(chat);
  chat.messages.push(message);
  save(chat);
  reply(chat);
  return true;
}

/** Take back all from `message` on, and answer what is left. */
function retry(message) {
  const chat = state.chat;
  if (state.runs.has(chat)) return;
  chat.messages.length = chat.messages.indexOf(message);
  reply(chat);
  focusInput();
}

function saveEdit(message, content) {
  const chat = state.chat;
  if ((!content.trim() && !message.media) || state.runs.has(chat)) return;
  message.content = content;
  if (chat.messages[0] === message) chat.title = titleOf(message);
  chat.messages.length = chat.messages.indexOf(message) + 1;
  state.editing = null;
  save(chat);
  reply(chat);
  focusInput();
}

function edit(message) {
  state.editing = message;
  drawLog();
  if (!message) focusInput();
}

/** Put the cursor where the next message is written; on a phone that would open the keyboard over the reply. */
function focusInput() {
  if (matchMedia("(pointer: fine)").matches) $("input").focus();
}

function stop() {
  state.runs.get(state.chat)?.run.controller.abort();
  focusInput();
}

function show(chat) {
  state.chat = chat;
  state.editing = null;
  state.follow = true;
  showMenu(false);
  draw();
  focusInput();
}

function remove(chat) {
  if (!confirm(`Delete “${chat.title}”?`)) return;
  forget(chat);
  if (chat === state.chat) show(newChat());
  else drawChats();
}

function forget(chat) {
  state.runs.get(chat)?.run.controller.abort();
  state.chats = state.chats.filter((other) => other !== chat);
  localStorage.removeItem(PREFIX + chat.id);
}

function exportChats() {
  const file = new Blob([JSON.stringify({ format: "gemcutter-chats", version: 1, chats: state.chats }, null, 1)], { type: "application/json" });
  const link = h("a", { href: URL.createObjectURL(file), download: `gemcutter-chats-${new Date().toISOString().slice(0, 10)}.json` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

async function importChats(file) {
  let found = null;
  try {
    found = JSON.parse(await file.text()).chats.map(cleanChat).filter(Boolean);
  } catch { /* answered below */ }
  if (!found) return banner("import", `${file.name} holds no exported conversations.`);
  const known = new Set(state.chats.map((chat) => chat.id));
  for (const chat of found) {
    if (known.has(chat.id)) chat.id = newId();
    state.chats.push(chat);
    save(chat);
  }
  banner("import", "");
  say(`${found.length} conversations imported.`);
  return drawChats();
}

async function copy(content, button) {
  try {
    await navigator.clipboard.writeText(content);
  } catch { // not allowed without HTTPS, but for loopback
    const area = h("textarea", { value: content, className: "hidden" });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  const before = [...button.childNodes];
  button.replaceChildren(icon("check"), ...before.filter((node) => node.nodeType === Node.TEXT_NODE).map(() => "Copied"));
  setTimeout(() => button.replaceChildren(...before), 1500);
  say("Copied.");
}

// ---- drawing ----

const banners = new Map();

function banner(topic, message) {
  if (message) banners.set(topic, message);
  else banners.delete(topic);
  $("banner").textContent = [...banners.values()].join(" ");
  $("banner").hidden = !banners.size;
}

function draw() {
  drawChats();
  drawLog();
  drawModels();
  drawControls();
}

function drawChats() {
  state.chats.sort((a, b) => b.updated - a.updated);
  $("chats").replaceChildren(...state.chats.map((chat) => h("li", { className: chat === state.chat ? "current" : "" },
    h("button", {
      type: "button", className: `open${state.runs.has(chat) ? " running" : ""}`, onclick: () => show(chat), title: chat.title,
      ...(chat === state.chat && { "aria-current": "true" }),
    }, h("span", {}, chat.title)),
    h("button", { type: "button", className: "delete", "aria-label": `Delete ${chat.title}`, onclick: () => remove(chat) }, icon("trash")))));
  $("export").disabled = !state.chats.length;
}

function drawModels() {
  const ids = state.models.map((model) => model.id);
  const select = $("model");
  select.replaceChildren(...(ids.length ? ids : ["no model"]).map((id) => h("option", { value: id }, id)));
  if (ids.length) select.value = modelOf(state.chat);
  select.disabled = ids.length < 2;
  select.classList.toggle("single", ids.length < 2);
  const model = state.models.find((found) => found.id === modelOf(state.chat));
  const length = model?.max_model_len;
  $("about").textContent = model ? `${model.id}${length ? ` · ${length.toLocaleString("en")} tokens of context` : ""}` : "";
}

function drawControls() {
  const running = state.runs.has(state.chat);
  $("send").hidden = running;
  $("stop").hidden = !running;
  $("send").disabled = !$("input").value.trim() && !attached.length;
  document.title = state.chat.messages.length ? `${state.chat.title} · gemcutter` : "gemcutter";
}

function drawLog() {
  const { messages } = state.chat;
  const known = state.views; // kept, so that what the reader unfolded stays so
  state.views = new Map();
  $("empty").hidden = messages.length > 0;
  $("log").hidden = !messages.length;
  $("log").replaceChildren(...messages.map((message) => {
    if (message.role === "user") return message === state.editing ? editor(message) : userMessage(message);
    if (message.role === "tool") return toolResult(message);
    const view = known.get(message) ?? replyView(message);
    state.views.set(message, view);
    view.update();
    return view.node;
  }));
  follow();
  $("log").querySelector(".editor textarea")?.focus();
  $("log").querySelector(".editor")?.scrollIntoView({ block: "center" });
}

function userMessage(message) {
  const media = message.media ? h("div", { className: "media" }, ...message.media.map(mediaView)) : null;
  const bubble = message.content.trim() ? h("div", { className: "bubble" }, message.content) : null;
  return h("article", { className: "message user", "aria-label": "You" }, media, bubble,
    h("div", { className: "actions" }, iconButton("copy", "Copy message", (event) => copy(message.content, event.currentTarget)),
      iconButton("edit", "Edit message", () => state.runs.has(state.chat) || edit(message))));
}

function editor(message) {
  const area = h("textarea", { value: message.content, rows: 2, "aria-label": "Edit message" });
  const later = state.chat.messages.at(-1) === message ? "" : "What follows is replaced.";
  const form = h("form", { className: "editor", onsubmit: (event) => { event.preventDefault(); saveEdit(message, area.value); } }, area,
    h("div", { className: "row" }, h("span", { className: "fine" }, later), h("button", { type: "button", className: "quiet", onclick: () => edit(null) }, "Cancel"),
      h("button", { className: "primary" }, "Send")));
  area.addEventListener("keydown", (event) => {
    if (isEnter(event)) { event.preventDefault(); form.requestSubmit(); }
    if (event.key === "Escape") { event.stopPropagation(); edit(null); }
  });
  return h("article", { className: "message", "aria-label": "You" }, form);
}

function toolResult(message) {
  return h("article", { className: "message", "aria-label": `Result of ${message.name}` },
    h("details", { className: "call" }, h("summary", {}, icon("tool"), "Result of ", h("code", {}, message.name)), h("pre", {}, message.content)));
}

/** One reply: `update` draws what came since, and leaves alone what the reader may have opened or selected. */
function replyView(message) {
  const thoughts = { text: h("div", { className: "text inner" }), title: h("span") };
  thoughts.node = h("details", { className: "thoughts" }, h("summary", {}, thoughts.title), thoughts.text);
  thoughts.show = Markdown.view(thoughts.text);
  const body = h("div", { className: "text" }), calls = h("div"), foot = h("div");
  const showBody = Markdown.view(body);
  const waiting = h("div", { className: "working" }, h("i"), h("i"), h("i"));
  const node = h("article", { className: "message reply", "aria-label": "Reply" }, thoughts.node, body, calls, waiting, foot);
  const update = () => {
    const running = state.runs.get(state.chat)?.message === message;
    node.setAttribute("aria-busy", String(running));
    thoughts.node.hidden = !message.reasoning;
    const thinking = running && !message.content && !message.calls.length;
    const seconds = message.stats.thought ?? 0;
    thoughts.title.textContent = thinking ? `Thinking… ${seconds.toFixed(0)} s` : seconds < 0.1 ? "Thoughts" : `Thought for ${seconds.toFixed(1)} s`;
    thoughts.show(message.reasoning);
    showBody(message.content);
    drawCalls(calls, message);
    waiting.hidden = !running || message.content !== "" || message.calls.length > 0;
    drawFoot(foot, message, running);
  };
  return { node, update };
}

function drawCalls(holder, message) {
  message.calls.forEach((call, index) => {
    const title = h("summary", {}, icon("tool"), "Calls ", h("code", {}, call.name));
    if (!holder.children[index]) holder.append(h("details", { className: "call", open: true }, title, h("pre", { tabIndex: 0 })));
    holder.children[index].querySelector("pre").textContent = pretty(call.arguments);
  });
}

function drawFoot(foot, message, running) {
  const stats = h("span", { className: "stats" }, statsText(message, running));
  if (running) return foot.replaceChildren(h("div", { className: "actions" }, stats));
  const isLast = state.chat.messages.at(-1) === message;
  const copyIt = message.content ? iconButton("copy", "Copy reply", (event) => copy(message.content, event.currentTarget)) : null;
  const parts = [];
  if (message.error) parts.push(h("p", { className: "failure", role: "alert" }, message.error,
    message.error.endsWith("in Settings.") ? h("button", { type: "button", onclick: openSettings }, "Open Settings") : null));
  if (isLast && message.calls.length && !message.error) parts.push(resultsForm(message));
  parts.push(h("div", { className: "actions" }, copyIt, isLast ? iconButton("retry", "Try again", () => retry(message)) : null, stats));
  return foot.replaceChildren(...parts);
}

/** The page runs no tools: the user writes what each call returned. */
function resultsForm(message) {
  const areas = message.calls.map(() => h("textarea", { rows: 2, required: true, className: "mono" }));
  const submit = (event) => {
    event.preventDefault();
    message.calls.forEach((call, index) => state.chat.messages.push({ role: "tool", name: call.name, tool_call_id: call.id, content: areas[index].value }));
    reply(state.chat);
    focusInput();
  };
  return h("form", { className: "results", onsubmit: submit },
    ...message.calls.map((call, index) => h("label", {}, `Result of ${call.name}`, areas[index])), h("button", { className: "primary" }, "Send results"));
}

const changed = new Set();

function drawSoon(chat, message) {
  if (chat !== state.chat) return;
  if (!changed.size) requestAnimationFrame(() => {
    for (const one of changed) state.views.get(one)?.update();
    changed.clear();
    follow();
  });
  changed.add(message);
}

/** Keep the end in view, unless the reader scrolled up to read. */
function follow() {
  const box = $("scroller");
  if (state.follow) box.scrollTop = box.scrollHeight;
  $("jump").hidden = box.scrollHeight - box.scrollTop - box.clientHeight < NEAR_END_PX;
}

// ---- settings, theme, menu ----

function openSettings() {
  for (const field of document.querySelectorAll("[data-setting]")) field.value = state.chat.settings[field.dataset.setting];
  $("key").value = sessionStorage.getItem("gemcutter.key") ?? "";
  $("settings").showModal();
}

function changeSetting(name, value) {
  state.chat.settings[name] = value;
  state.defaults[name] = value;
  write("gemcutter.defaults", state.defaults);
  save(state.chat);
}

function checkField(field) {
  let fault = "";
  if (field.dataset.setting === "tools" && field.value.trim()) {
    try { readTools(field.value); } catch (error) { fault = error.message; }
  }
  field.setCustomValidity(fault);
  field.setAttribute("aria-invalid", String(!field.checkValidity()));
  return field.validity.valid;
}

function setTheme(theme) {
  const names = Object.keys(THEMES);
  const chosen = names.includes(theme) ? theme : "auto";
  document.documentElement.dataset.theme = chosen;
  $("theme").replaceChildren(icon(chosen));
  $("theme").setAttribute("aria-label", `Colours: ${THEMES[chosen]}`);
  $("theme").title = `Colours: ${THEMES[chosen]}`;
  $("theme").onclick = () => {
    const next = names[(names.indexOf(chosen) + 1) % names.length];
    write("gemcutter.theme", next);
    setTheme(next);
  };
}

function showMenu(shown) {
  $("sidebar").classList.toggle("shown", shown);
  $("scrim").hidden = !shown;
  $("main").inert = shown;
  $("open-menu").setAttribute("aria-expanded", String(shown));
  if (shown) $("new-chat").focus();
}

/** Let a field grow with its text, where the style sheet can't. */
function fit(area) {
  if (CSS.supports("field-sizing", "content")) return;
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight}px`;
}

const isEnter = (event) => event.key === "Enter" && !event.shiftKey && !event.isComposing;

function listen() {
  const input = $("input");
  input.addEventListener("input", () => { drawControls(); fit(input); });
  input.addEventListener("keydown", (event) => {
    if (isEnter(event)) { event.preventDefault(); $("composer").requestSubmit(); }
    if (event.key === "ArrowUp" && !input.value && !state.runs.has(state.chat)) {
      const last = state.chat.messages.findLast((message) => message.role === "user");
      if (last) { event.preventDefault(); edit(last); }
    }
  });
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    if (send(input.value)) { input.value = ""; drawControls(); fit(input); }
  });
  $("stop").addEventListener("click", stop);
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || $("settings").open) return;
    if ($("sidebar").classList.contains("shown")) { showMenu(false); $("open-menu").focus(); }
    else stop();
  });
  document.addEventListener("click", (event) => {
    const button = event.target.closest?.("[data-copy]");
    if (button) copy(button.closest(".block").querySelector("pre").textContent, button);
  });
  $("scroller").addEventListener("scroll", () => {
    const box = $("scroller");
    state.follow = box.scrollHeight - box.scrollTop - box.clientHeight < NEAR_END_PX;
    $("jump").hidden = state.follow;
  });
  $("jump").addEventListener("click", () => { state.follow = true; follow(); });
  $("new-chat").addEventListener("click", () => show(newChat()));
  $("export").addEventListener("click", exportChats);
  $("import").addEventListener("click", () => $("import-file").click());
  $("import-file").addEventListener("change", async (event) => {
    if (event.target.files[0]) await importChats(event.target.files[0]);
    event.target.value = "";
  });
  $("open-menu").addEventListener("click", () => showMenu(true));
  $("close-menu").addEventListener("click", () => { showMenu(false); $("open-menu").focus(); });
  $("scrim").addEventListener("click", () => showMenu(false));
  $("model").addEventListener("change", () => { changeSetting("model", $("model").value); drawModels(); drawAttached(); });
  $("open-settings").addEventListener("click", openSettings);
  $("settings").addEventListener("click", (event) => { if (event.target === $("settings")) $("settings").close(); });
  for (const field of document.querySelectorAll("[data-setting]")) {
    field.addEventListener("input", () => { if (checkField(field) || field.dataset.setting === "tools") changeSetting(field.dataset.setting, field.value); });
  }
  $("key").addEventListener("change", () => { sessionStorage.setItem("gemcutter.key", $("key").value.trim()); connect(); });
  $("delete-all").addEventListener("click", () => {
    if (!confirm(`Delete all ${state.chats.length} conversations?`)) return;
    [...state.chats].forEach(forget);
    $("settings").close();
    show(newChat());
  });
  addEventListener("online", connect);
  addEventListener("offline", connect);
  addEventListener("pagehide", () => { // the browser ends the requests; what came is kept
    state.isLeaving = true;
    state.runs.forEach((_, chat) => save(chat));
    write("gemcutter.current", state.chat.id);
  });
  addEventListener("pageshow", () => { state.isLeaving = false; });
  addEventListener("storage", (event) => { // another tab wrote: take over what this one isn't writing itself
    if (!event.key?.startsWith(PREFIX)) return;
    const chat = state.chats.find((kept) => PREFIX + kept.id === event.key);
    if (chat && (chat === state.chat || state.runs.has(chat))) return;
    const written = cleanChat(read(event.key));
    state.chats = state.chats.filter((kept) => kept !== chat).concat(written ?? []);
    drawChats();
  });
}

setTheme(read("gemcutter.theme"));
state.chats = keptChats();
state.chat = state.chats.find((chat) => chat.id === read("gemcutter.current")) ?? newChat();
listen();
listenForMedia();
draw();
connect();
