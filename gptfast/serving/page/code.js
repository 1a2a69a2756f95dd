// The request that the page would send, as a command and as a program.

function quoted(text) {
  return `'${text.replaceAll("'", `'\\''`)}'`;
}

export function asCurl(path, body, keyed) {
  const lines = [`curl ${quoted(location.origin + path)}`, "-H 'Content-Type: application/json'"];
  if (keyed) lines.push('-H "Authorization: Bearer $GPTFAST_API_KEY"');
  lines.push(`-d ${quoted(JSON.stringify(body))}`);
  return lines.join(" \\\n     ");
}

// A value as Python writes it. JSON's texts are texts of Python.
function python(value, indent) {
  if (value === true) return "True";
  if (value === false) return "False";
  if (value === null) return "None";
  if (typeof value !== "object") return JSON.stringify(value);
  const pad = `${indent}    `;
  const inner = Array.isArray(value)
    ? value.map((one) => `${pad}${python(one, pad)},`)
    : Object.entries(value).map(([key, one]) => `${pad}${JSON.stringify(key)}: ${python(one, pad)},`);
  const [open, close] = Array.isArray(value) ? "[]" : "{}";
  return inner.length ? `${open}\n${inner.join("\n")}\n${indent}${close}` : open + close;
}

const OWN = ["top_k", "repetition_penalty"]; // extensions of the protocol, which the client sends in extra_body

export function asPython(path, body, keyed) {
  const chat = path.includes("chat");
  const extra = Object.fromEntries(Object.entries(body).filter(([key]) => OWN.includes(key)));
  const rest = Object.entries(body).filter(([key]) => !OWN.includes(key));
  const all = Object.keys(extra).length ? [...rest, ["extra_body", extra]] : rest;
  return [
    ...(keyed ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${JSON.stringify(`${location.origin}/v1`)}, api_key=${keyed ? 'os.environ["GPTFAST_API_KEY"]' : '"unused"'})`,
    `answer = client.${chat ? "chat.completions" : "completions"}.create(`,
    ...all.map(([key, value]) => `    ${key}=${python(value, "    ")},`),
    ")",
    `print(answer.choices[0].${chat ? "message.content" : "text"})`,
  ].join("\n");
}

// Makes the dialog that shows a text to copy; returns what opens it.
export function makeDialog(dialog) {
  const find = (id) => dialog.querySelector(id);
  const text = find("#code-text");
  find("#close").addEventListener("click", () => dialog.close());
  find("#copy").addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text.textContent);
      find("#copied").textContent = "Copied.";
    } catch {
      getSelection().selectAllChildren(text);
      find("#copied").textContent = "Selected: press Ctrl-C.";
    }
  });
  return (title, content) => {
    find("#code-title").textContent = title;
    text.textContent = content;
    find("#copied").textContent = "";
    dialog.showModal();
  };
}
