// Light, dark, or as the system.

import { recall, remember } from "./store.js";

const THEMES = { auto: "Auto", light: "Light", dark: "Dark" };

function set(button, name) {
  if (name === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  button.textContent = THEMES[name];
  button.setAttribute("aria-label", `Colours: ${name === "auto" ? "as the system" : name}`);
  remember("theme", name);
}

// Makes a button that goes through the themes.
export function makeTheme(button) {
  set(button, recall("theme", "auto"));
  button.addEventListener("click", () => {
    const names = Object.keys(THEMES);
    set(button, names[(names.indexOf(recall("theme", "auto")) + 1) % names.length]);
  });
}
