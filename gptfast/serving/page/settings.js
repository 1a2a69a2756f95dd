// The sliders: each is a range and a number that say the same.

import { recall, remember } from "./store.js";

const SETTINGS = [
  // name, label, least, most, step, default, field of the request ("" for none)
  ["temperature", "Temperature", 0, 2, 0.05, 0.8, true],
  ["top_k", "Top-k (0: all)", 0, 100, 1, 0, true],
  ["top_p", "Top-p", 0.05, 1, 0.05, 1, true],
  ["presence_penalty", "Presence penalty", -2, 2, 0.1, 0, true],
  ["frequency_penalty", "Frequency penalty", -2, 2, 0.1, 0, true],
  ["repetition_penalty", "Repetition penalty", 0.5, 2, 0.05, 1, true],
  ["seed", "Seed", 0, 1000, 1, 0, true],
  ["max_tokens", "Most tokens", 1, 512, 1, 100, false],
  ["beams", "Beams", 1, 8, 1, 3, false],
];

const values = Object.fromEntries(SETTINGS.map(([name, , , , , usual]) => [name, usual]));
const inputs = new Map();

export function setting(name) {
  return values[name];
}

// The fields of a request that draws tokens.
export function sampling() {
  return Object.fromEntries(SETTINGS.filter((one) => one[6]).map(([name]) => [name, values[name]]));
}

function set(name, value) {
  values[name] = value;
  for (const input of inputs.get(name)) input.value = value;
  remember("settings", values);
}

export function reset() {
  for (const [name, , , , , usual] of SETTINGS) set(name, usual);
}

// Makes the sliders in `place`; `changed(name)` is called when one moves.
export function makeSettings(place, changed) {
  const kept = recall("settings", {});
  for (const [name, label, least, most, step] of SETTINGS) {
    const row = document.createElement("div");
    row.className = "setting";
    const title = document.createElement("label");
    title.textContent = label;
    title.htmlFor = `set-${name}`;
    const made = ["range", "number"].map((type) => {
      const input = document.createElement("input");
      Object.assign(input, { type, min: least, max: most, step });
      input.addEventListener("input", () => {
        const value = Number(input.value);
        if (input.value === "" || !Number.isFinite(value) || value < least || value > most) return;
        set(name, value);
        changed(name);
      });
      return input;
    });
    made[0].id = `set-${name}`;
    made[1].setAttribute("aria-label", `${label}, as a number`);
    made[1].addEventListener("blur", () => (made[1].value = values[name]));
    inputs.set(name, made);
    row.append(title, ...made);
    place.append(row);
    set(name, typeof kept[name] === "number" ? kept[name] : values[name]);
  }
}
