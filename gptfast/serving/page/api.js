// Requests to the server that this page came from, and its errors in words.

const GONE = "The server does not answer. Is gptfast serve still running? Nothing is lost; this page goes on as soon as it answers.";

export class ServerError extends Error {
  constructor(message, status, told = {}) {
    super(message);
    this.status = status;
    this.gone = Boolean(told.gone); // nobody answers
    this.tooLong = told.code === "context_length_exceeded" && /tokens$/.test(told.param);
  }
}

let key = "";

export function setKey(value) {
  key = value;
}

async function ask(path, body, signal) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const options = { headers, signal };
  if (body) {
    options.method = "POST";
    options.body = JSON.stringify(body);
    headers["Content-Type"] = "application/json";
  }
  let answer;
  try {
    answer = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(GONE, 0, { gone: true });
  }
  if (!answer.ok) {
    const told = (await answer.json().catch(() => null))?.error ?? {};
    throw new ServerError(words(answer.status, told.message), answer.status, told);
  }
  return answer;
}

function words(status, told) {
  if (status === 401) return "The server asks for an API key: enter it above.";
  if (status === 429) return "The server is busy; try again in a moment.";
  const message = told || `the server answered with status ${status}`;
  return message[0].toUpperCase() + message.slice(1) + ".";
}

// As `stream`, with fewer tokens where the context has no room for as many as the body asks for.
export async function* streamInRoom(path, body, signal) {
  try {
    yield* stream(path, body, signal);
  } catch (error) {
    if (!error.tooLong) throw error;
    const { max_tokens, max_completion_tokens, ...rest } = body; // a chat without them takes the room
    if (max_completion_tokens) return yield* stream(path, rest, signal);
    const { count, max_model_len } = await postJson("/tokenize", { prompt: body.prompt }, signal);
    yield* stream(path, { ...rest, max_tokens: max_model_len - count }, signal);
  }
}

export async function getJson(path) {
  return (await ask(path)).json();
}

export async function postJson(path, body, signal) {
  return (await ask(path, body, signal)).json();
}

// Yields the chunks of a streamed answer.
export async function* stream(path, body, signal) {
  const answer = await ask(path, { ...body, stream: true }, signal);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let read;
    try {
      read = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ServerError("The connection broke before the text was complete.", 0);
    }
    if (read.done) break;
    const events = (rest + read.value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ServerError(chunk.error.message, 0);
      yield chunk;
    }
  }
  throw new ServerError("The connection broke before the text was complete.", 0);
}
