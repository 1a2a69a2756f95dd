// A text as tokens, coloured by probability; pointing at one, or reaching it with the arrow keys, shows its alternatives.

const LEVELS = [0.01, 0.1, 0.3, 0.6, 0.9];

// The bytes of a token as the server writes it: its text, or "bytes:\xf0\x9f" for a part of a character.
function bytesOf(token) {
  if (!token.startsWith("bytes:")) return new TextEncoder().encode(token);
  return Uint8Array.from(token.matchAll(/\\x([0-9a-f]{2})/g), ([, hex]) => parseInt(hex, 16));
}

export function percent(p) {
  return p >= 0.9995 ? "100%" : p >= 0.001 ? `${(100 * p).toFixed(1)}%` : p > 0 ? "<0.1%" : "0%";
}

// A token so that one can see it: blanks and line ends have signs.
export function visible(token) {
  return token.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥") || "∅";
}

// The tokens of a chunk, of completions or of chats: text, logprob, and alternatives as [text, logprob].
export function tokensOf(logprobs) {
  if (!logprobs) return [];
  if (logprobs.content) {
    return logprobs.content.map((one) => ({
      text: one.token, logprob: one.logprob, others: one.top_logprobs.map((top) => [top.token, top.logprob]),
    }));
  }
  return logprobs.tokens.map((text, n) => ({
    text, logprob: logprobs.token_logprobs[n], others: Object.entries(logprobs.top_logprobs?.[n] ?? {}),
  }));
}

// A text in `place` that grows. `text` is what was sent; tokens beyond it, such as a stop string, are not shown.
export class TokenText {
  constructor(place, tip) {
    this.place = place;
    this.tip = tip;
    this.text = "";
    this.tokens = [];
    this.decoder = new TextDecoder();
    this.pending = [];
    this.spans = 0;
    place.addEventListener("pointerover", (event) => this.#point(event.target));
    place.addEventListener("pointerleave", () => hideTip(tip));
    place.addEventListener("focusin", (event) => this.#point(event.target));
    place.addEventListener("focusout", () => hideTip(tip));
    place.addEventListener("keydown", (event) => this.#move(event));
  }

  // Adds text, and its tokens where the server told them.
  add(text, tokens) {
    this.text += text;
    if (!tokens.length && !this.tokens.length) {
      this.place.textContent = this.text;
      return;
    }
    for (const token of tokens) {
      this.tokens.push(token);
      this.pending.push(token);
      const shown = this.decoder.decode(bytesOf(token.text), { stream: true });
      if (shown) this.#show(shown);
    }
    this.#fit();
  }

  // After the last token: what its bytes leave of a character.
  end() {
    const rest = this.decoder.decode();
    const last = this.place.lastElementChild;
    if (rest && this.pending.length) this.#show(rest);
    else if (rest && last) last.whole += rest;
    if (last) this.#fit();
  }

  #show(text) {
    const span = document.createElement("span");
    const [token] = this.pending.slice(-1);
    const p = Math.exp(this.pending.reduce((sum, one) => sum + (one.logprob ?? 0), 0));
    this.pending = [];
    span.className = `token p${LEVELS.filter((level) => p >= level).length}`;
    span.textContent = text;
    span.tabIndex = this.spans++ ? -1 : 0;
    span.token = token;
    span.whole = text;
    this.place.append(span);
  }

  // Cuts what the text sent so far does not have: blanks at its beginning, a stop string at its end.
  #fit() {
    const spans = [...this.place.children];
    const joined = spans.map((span) => span.whole).join("");
    const lead = this.text && /^\s/.test(this.text) ? 0 : joined.length - joined.trimStart().length;
    let left = 0;
    for (const span of spans) {
      const from = Math.max(0, lead - left);
      const to = Math.max(0, lead + this.text.length - left);
      const shown = span.whole.slice(from, to);
      if (span.textContent !== shown) span.textContent = shown;
      left += span.whole.length;
    }
  }

  #point(span) {
    if (span.token) showTip(this.tip, span);
  }

  #move(event) {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const spans = [...this.place.children];
    const at = spans.indexOf(event.target);
    if (event.key === "Escape") hideTip(this.tip);
    if (!step || at < 0) return;
    const next = spans[at + step];
    if (!next) return;
    event.preventDefault();
    spans[at].tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  }
}

function row(text, probability, chosen) {
  const line = document.createElement("li");
  const name = document.createElement("code");
  const number = document.createElement("span");
  name.textContent = visible(text);
  number.textContent = percent(probability);
  line.className = chosen ? "chosen" : "";
  line.append(name, number);
  return line;
}

function showTip(tip, span) {
  const { text, logprob, others } = span.token;
  const list = document.createElement("ol");
  const all = others.some(([other]) => other === text) ? others : [[text, logprob], ...others];
  list.append(...all.map(([other, value]) => row(other, Math.exp(value), other === text)));
  tip.replaceChildren("The model's probabilities here:", list);
  tip.hidden = false;
  const box = span.getBoundingClientRect();
  const left = Math.max(4, Math.min(box.left, innerWidth - tip.offsetWidth - 4));
  const below = box.bottom + 6 + tip.offsetHeight < innerHeight;
  tip.style.left = `${left}px`;
  tip.style.top = `${below ? box.bottom + 6 : Math.max(4, box.top - tip.offsetHeight - 6)}px`;
}

export function hideTip(tip) {
  tip.hidden = true;
}
