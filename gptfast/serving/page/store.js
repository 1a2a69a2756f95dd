// What this tab remembers when it is loaded again. Browsers may forbid it; then nothing is remembered.

export function recall(name, otherwise) {
  try {
    return JSON.parse(sessionStorage.getItem(`gptfast.${name}`)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

export function remember(name, value) {
  try {
    sessionStorage.setItem(`gptfast.${name}`, JSON.stringify(value));
  } catch {
    // a full or forbidden store
  }
}
