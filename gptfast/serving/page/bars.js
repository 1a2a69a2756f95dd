// The next token as bars: an outline for what the model says, filled for how often it is drawn.

import { percent, visible } from "./tokens.js";

const SHOWN = 12;

export function drawBars(place, tokens) {
  const shown = tokens.slice(0, SHOWN);
  const most = Math.max(...shown.map((one) => Math.max(one.probability, Math.exp(one.logprob))), 1e-9);
  const rows = shown.map((one) => {
    const own = Math.exp(one.logprob);
    const row = document.createElement("li");
    const name = document.createElement("code");
    name.textContent = visible(one.token);
    const bar = document.createElement("span");
    bar.className = "bar";
    for (const [kind, value] of [["drawn", one.probability], ["own", own]]) {
      const part = document.createElement("i");
      part.className = kind;
      part.style.width = `${(100 * value) / most}%`;
      part.hidden = kind === "drawn" && value === 0;
      bar.append(part);
    }
    const number = document.createElement("span");
    number.className = "number";
    number.textContent = percent(one.probability);
    row.className = one.probability ? "" : "never";
    row.title = `${JSON.stringify(one.token)}: the model says ${percent(own)}, drawn ${percent(one.probability)}`;
    row.append(name, bar, number);
    return row;
  });
  place.replaceChildren(...rows);
}
