// The page: a conversation or a text with a model of this server, and views of its next token.

import { setKey, streamInRoom } from "./api.js";
import { asCurl, asPython, makeDialog } from "./code.js";
import { connect, connectSoon } from "./connection.js";
import { makeSettings, reset, sampling, setting } from "./settings.js";
import { recall, remember } from "./store.js";
import { makeTheme } from "./theme.js";
import { TokenText, tokensOf } from "./tokens.js";
import { makeViews } from "./views.js";

const byId = (id) => document.getElementById(id);
const ALTERNATIVES = 5;

const state = {
  mode: recall("mode", "chat"),
  turns: recall("turns", []), // of the conversation: role, content, and tokens of replies
  written: recall("written", null), // of the completion: prompt, content, tokens
  keyed: false,
  running: null, // the AbortController of the text that is being written
};

// ---- what is asked of the server ----

function model() {
  return byId("model").value;
}

function messages() {
  const system = byId("system").value.trim();
  const said = state.turns.map(({ role, content }) => ({ role, content }));
  return system ? [{ role: "system", content: system }, ...said] : said;
}

function request() {
  const common = { model: model(), ...sampling() };
  if (state.mode === "chat") {
    const all = messages();
    if (all.at(-1)?.role === "assistant") all.pop();
    if (all.at(-1)?.role !== "user" && byId("input").value) all.push({ role: "user", content: byId("input").value });
    return ["/v1/chat/completions", { ...common, messages: all, max_completion_tokens: setting("max_tokens") }];
  }
  return ["/v1/completions", { ...common, prompt: byId("input").value, max_tokens: setting("max_tokens") }];
}

// The text whose next token is shown; null where there is none.
function context() {
  if (state.mode === "completion") {
    const prompt = byId("input").value;
    const more = state.written?.prompt === prompt ? state.written.content : "";
    return prompt ? { model: model(), prompt, continuation: more } : null;
  }
  const all = messages();
  const typed = byId("input").value;
  if (typed) all.push({ role: "user", content: typed });
  const reply = all.at(-1)?.role === "assistant" ? all.pop().content : "";
  return all.some((message) => message.role === "user") ? { model: model(), messages: all, continuation: reply } : null;
}

// ---- what is shown ----

function complain(error) {
  byId("notice").textContent = error ? error.message : "";
  byId("notice").hidden = !error;
  if (error?.status === 401) {
    byId("key-label").hidden = false;
    byId("key").focus();
  }
  if (error?.gone) connectSoon(greet, complain);
}

function turn(who) {
  const block = document.createElement("div");
  const name = document.createElement("span");
  const body = document.createElement("span");
  block.className = "turn";
  name.className = "who";
  body.className = "body";
  name.textContent = who;
  block.append(name, body);
  byId("output").append(block);
  return body;
}

function showTurn(who, content, tokens) {
  const text = new TokenText(turn(who), byId("tip"));
  text.add(content, tokens ?? []);
  if (content) text.end();
  return text;
}

function showAll() {
  byId("output").replaceChildren();
  if (state.mode === "chat") {
    for (const one of state.turns) showTurn(one.role === "user" ? "You" : "Model", one.content, one.tokens);
  } else if (state.written) {
    showTurn("Prompt", state.written.prompt);
    showTurn("Text", state.written.content, state.written.tokens);
  }
  showState();
}

function showState() {
  const chat = state.mode === "chat";
  byId("stop").disabled = !state.running;
  byId("send").disabled = Boolean(state.running);
  byId("again").disabled = Boolean(state.running) || !(chat ? state.turns.length : state.written);
  byId("send").textContent = chat ? "Send" : "Continue the text";
  byId("input-label").textContent = chat ? "Message" : "Prompt";
  byId("system-label").hidden = !chat;
  byId("format").hidden = !chat || !byId("format").textContent;
  for (const name of ["mode", "turns", "written"]) remember(name, state[name]);
  remember("input", byId("input").value);
  remember("system", byId("system").value);
}

// ---- writing ----

// Resolves to the text, whole or as far as it came, and whether an error ended it.
async function write(path, body, who) {
  const text = showTurn(who, "", []);
  const started = performance.now();
  let count = 0;
  let failed = false;
  state.running = new AbortController();
  complain(null);
  showState();
  byId("status").textContent = "Reading…";
  const asked = path.includes("chat")
    ? { ...body, logprobs: true, top_logprobs: ALTERNATIVES }
    : { ...body, logprobs: ALTERNATIVES };
  try {
    for await (const chunk of streamInRoom(path, asked, state.running.signal)) {
      for (const choice of chunk.choices) {
        const tokens = tokensOf(choice.logprobs);
        text.add(choice.delta?.content ?? choice.text ?? "", tokens);
        count += tokens.length;
      }
      byId("output").scrollTop = byId("output").scrollHeight;
      const seconds = (performance.now() - started) / 1000;
      byId("status").textContent = `${count} tokens, ${(count / seconds).toFixed(0)} tokens/s`;
    }
  } catch (error) {
    failed = error.name !== "AbortError";
    if (failed) complain(error);
    if (count) byId("status").textContent += failed ? ", broken off" : ", stopped";
    else byId("status").textContent = failed ? "" : "Stopped";
  } finally {
    state.running = null;
    text.end();
  }
  return { text: text.text, tokens: text.tokens, failed };
}

async function send() {
  if (state.running || !(model() || await connect(greet, complain))) return;
  await (state.mode === "completion" ? complete() : say());
  showState();
  refreshSoon();
}

async function complete() {
  const before = state.written;
  const [path, body] = request();
  const written = { prompt: body.prompt, content: "", tokens: [] };
  state.written = written;
  showAll();
  byId("output").lastElementChild.remove();
  const { text, tokens, failed } = await write(path, body, "Text");
  Object.assign(written, { content: text, tokens });
  if (!failed || text || state.written !== written) return;
  state.written = before; // nothing came in its place
  showAll();
}

async function say() {
  const typed = byId("input").value;
  const turns = state.turns;
  if (typed.trim()) {
    turns.push({ role: "user", content: typed });
    byId("input").value = "";
    showTurn("You", typed);
  }
  if (turns.at(-1)?.role !== "user" || await reply() || !typed.trim()) return;
  if (byId("input").value || turns !== state.turns) return;
  turns.pop(); // the message is there to be sent again
  byId("input").value = typed;
  showAll();
}

// Resolves to whether the model answered, or was stopped.
async function reply() {
  const turns = state.turns; // others after Clear
  const { text, tokens, failed } = await write(...request(), "Model");
  if (text) turns.push({ role: "assistant", content: text, tokens });
  else showAll();
  return Boolean(text) || !failed;
}

async function again() {
  if (state.running || !(model() || await connect(greet, complain))) return;
  const seed = byId("set-seed");
  seed.value = (setting("seed") + 1) % 1001;
  seed.dispatchEvent(new Event("input"));
  if (state.mode === "completion") {
    byId("input").value = state.written.prompt;
    return send();
  }
  const turns = state.turns;
  const before = turns.at(-1)?.role === "assistant" ? turns.pop() : null;
  showAll();
  if (!(await reply()) && before) {
    turns.push(before);
    showAll();
  }
  showState();
  refreshSoon();
}

// ---- the beginning ----

const { drawBeams, refreshSoon } = makeViews(context, () => Boolean(state.running), complain);

// What the server serves, now or again.
function greet(models, template) {
  const chosen = model();
  byId("model").replaceChildren(...models.map((id) => new Option(id, id)));
  if (models.includes(chosen)) byId("model").value = chosen;
  byId("format").textContent = template === null
    ? "The tokenizer has no chat template: the conversation is a plain transcript (System:, User:, Assistant:)."
    : "";
  complain(null);
  showState();
  refreshSoon();
}

function begin() {
  makeTheme(byId("theme"));
  makeSettings(byId("settings"), (name) => (name === "beams" ? byId("beams").open && drawBeams() : refreshSoon()));
  byId("input").value = recall("input", "");
  byId("system").value = recall("system", "");
  document.querySelector(`input[name=mode][value=${state.mode}]`).checked = true;
  for (const radio of document.querySelectorAll("input[name=mode]")) {
    radio.addEventListener("change", () => {
      state.running?.abort();
      state.mode = radio.value;
      showAll();
      refreshSoon();
    });
  }
  const on = (id, kind, call) => byId(id).addEventListener(kind, call);
  on("form", "submit", (event) => { event.preventDefault(); send(); });
  on("input", "keydown", (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) send(); });
  on("input", "input", () => { showState(); refreshSoon(); });
  on("system", "input", () => { showState(); refreshSoon(); });
  on("model", "change", refreshSoon);
  on("key", "change", () => { setKey(byId("key").value); state.keyed = Boolean(byId("key").value); connect(greet, complain); });
  on("stop", "click", () => state.running?.abort());
  on("again", "click", again);
  on("clear", "click", () => { state.running?.abort(); Object.assign(state, { turns: [], written: null }); complain(null); showAll(); refreshSoon(); });
  on("reset", "click", () => { reset(); refreshSoon(); });
  on("next", "toggle", refreshSoon);
  on("draw-beams", "click", drawBeams);
  const show = makeDialog(byId("code"));
  on("as-curl", "click", () => show("The same request with curl", asCurl(...request(), state.keyed)));
  on("as-python", "click", () => show("The same request in Python", asPython(...request(), state.keyed)));
  showAll();
  connect(greet, complain);
}

begin();
