// What the server serves; where it does not answer, it can be asked again until it does.

import { getJson } from "./api.js";

const WAIT = 2000; // milliseconds between two questions

let timer = 0;

// Calls `found(models, template)` or `failed(error)`; resolves to whether the server answers.
export async function connect(found, failed) {
  try {
    const { data } = await getJson("/v1/models");
    const { chat_template: template } = await getJson("/tokenizer_info");
    found(data.map(({ id }) => id), template);
    return true;
  } catch (error) {
    failed(error);
    return false;
  }
}

// The same in a while, when the page is seen.
export function connectSoon(found, failed) {
  const ask = () => connect(found, failed);
  timer ||= setTimeout(() => {
    timer = 0;
    if (document.hidden) addEventListener("visibilitychange", ask, { once: true });
    else ask();
  }, WAIT);
}
