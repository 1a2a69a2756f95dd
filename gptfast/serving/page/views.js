// Views of the next token: bars that follow text and sliders, and a tree of beams.

import { postJson } from "./api.js";
import { drawBars } from "./bars.js";
import { drawTree } from "./beams.js";
import { sampling, setting } from "./settings.js";

const byId = (id) => document.getElementById(id);
const WAIT = 200; // milliseconds between the last change and the question what follows

// about(): the text as fields of a request, null where there is none; isBusy(): whether a text is being written;
// complain(error): shows an error, null for none.
export function makeViews(about, isBusy, complain) {
  let timer = 0;
  let asking = null;

  async function refresh() {
    asking?.abort();
    const text = about();
    if (!byId("next").open || !text || isBusy()) {
      if (!text) byId("bars").replaceChildren();
      return;
    }
    asking = new AbortController();
    const { seed, ...options } = sampling();
    try {
      const { tokens } = await postJson("/next_tokens", { ...text, ...options, top: 20 }, asking.signal);
      drawBars(byId("bars"), tokens);
    } catch (error) {
      if (error.name === "AbortError") return;
      byId("bars").replaceChildren(error.message);
      if (error.gone) complain(error);
    }
  }

  async function drawBeams() {
    const text = about();
    if (!text) return complain(new Error("Write a prompt first."));
    complain(null);
    try {
      const { nodes } = await postJson("/beam_tree", { ...text, beams: setting("beams"), steps: 4 });
      drawTree(byId("tree"), nodes);
    } catch (error) {
      complain(error);
    }
  }

  function refreshSoon() {
    clearTimeout(timer);
    timer = setTimeout(refresh, WAIT);
  }

  return { drawBeams, refreshSoon };
}
