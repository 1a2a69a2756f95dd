// The page of a training run: it asks for the newest figures again and again, as long as it is seen.

import { getJson } from "./api.js";
import { Chart, short } from "./chart.js";
import { makeTheme } from "./theme.js";

const byId = (id) => document.getElementById(id);
const SLOW = 5000; // milliseconds until it asks again where nobody answered
const charts = {
  loss: new Chart(byId("loss"), "Loss", ["training (one batch)", "validation"]),
  lr: new Chart(byId("lr"), "Learning rate", ["learning rate"]),
  speed: new Chart(byId("speed"), "Tokens per second", ["tokens/s"]),
};
let sampled; // the checkpoint whose sample is shown

function clock(seconds) {
  const all = Math.round(seconds);
  const two = (n) => String(n).padStart(2, "0");
  const hours = Math.floor(all / 3600);
  return `${hours ? `${hours}:${two(Math.floor(all / 60) % 60)}` : Math.floor(all / 60)}:${two(all % 60)}`;
}

function figures(run) {
  const whole = (n) => n.toLocaleString("en");
  const shown = [
    ["Step", run.planned_steps === null ? whole(run.step) : `${whole(run.step)} of ${whole(run.planned_steps)}`],
    ["Loss of the last batch", run.loss?.toFixed(4)],
    ["Validation loss", run.val_loss?.toFixed(4)],
    ["Best validation loss", run.best?.val_loss && `${run.best.val_loss.toFixed(4)} at step ${whole(run.best.step)}`],
    ...Object.entries(run.metrics).map(([name, value]) => [name, value?.toFixed(4)]),
    ["Learning rate", run.lr === null ? null : short(run.lr)],
    ["Tokens per second", run.tokens_per_second === null ? null : whole(Math.round(run.tokens_per_second))],
    ["Share of the machine's peak", run.mfu === null ? null : `${(100 * run.mfu).toFixed(0)}%`],
    ["Norm of the gradient", run.grad_norm === null ? null : short(run.grad_norm)],
    ["Time so far", run.seconds === null ? null : clock(run.seconds)],
    ["Time left", run.seconds_left === null ? null : clock(run.seconds_left)],
    ["Checkpoint", run.checkpoint_step === null ? null : `step ${whole(run.checkpoint_step)}`],
  ];
  return shown.filter(([, value]) => value !== null && value !== undefined).flatMap(([name, value]) => {
    const [title, text] = [document.createElement("dt"), document.createElement("dd")];
    title.textContent = name;
    text.textContent = value;
    return [title, text];
  });
}

function show(run) {
  byId("run").textContent = run.run;
  byId("state").textContent = run.message[0].toUpperCase() + run.message.slice(1);
  byId("state").className = `state ${run.state}`;
  if (!run.curves) return; // there is no run yet, or its files are damaged
  const share = run.planned_steps ? run.step / run.planned_steps : null;
  byId("progress").hidden = share === null;
  byId("progress").value = share ?? 0;
  document.title = `${share === null ? run.step : `${Math.floor(100 * share)}%`} ${run.run}`;
  byId("figures").replaceChildren(...figures(run));
  charts.loss.draw([run.curves.loss, run.curves.val_loss]);
  charts.lr.draw([run.curves.lr]);
  charts.speed.draw([run.curves.tokens_per_second]);
  byId("alarm-panel").hidden = !run.alarms.length;
  byId("alarms").replaceChildren(...run.alarms.map(({ step, text }) => {
    const line = document.createElement("li");
    line.textContent = `step ${step.toLocaleString("en")}: ${text}`;
    return line;
  }).reverse());
}

function showSamples(samples) {
  byId("samples").replaceChildren(...samples.map(({ step, prompt, text, note }) => {
    const block = document.createElement("div");
    const name = document.createElement("span");
    const body = document.createElement("span");
    const begun = document.createElement("b");
    block.className = "turn";
    name.className = "who";
    body.className = "body";
    name.textContent = `Step ${step.toLocaleString("en")}`;
    begun.textContent = prompt;
    body.append(note || begun, note ? "" : text);
    block.append(name, body);
    return block;
  }).reverse());
}

function complain(words) {
  byId("notice").textContent = words;
  byId("notice").hidden = !words;
}

async function refresh() {
  let wait = SLOW;
  try {
    const run = await getJson("/run");
    wait = 1000 * run.every;
    show(run);
    complain("");
    if (run.checkpoint_step !== undefined && run.checkpoint_step !== sampled) {
      const samples = await getJson("/samples");
      showSamples(samples);
      sampled = samples.at(-1)?.step;
    }
  } catch (error) {
    complain(error.status === 0 ? "gptfast watch does not answer: it has ended, or this machine cannot be reached. What is here is the last that it said." : error.message);
  }
  setTimeout(() => (document.hidden ? addEventListener("visibilitychange", refresh, { once: true }) : refresh()), wait);
}

makeTheme(byId("theme"));
refresh();
