// The page: asks the API for frames, draws them, and turns clicked words into a template.
"use strict";

const $ = (id) => document.getElementById(id);
const SLIDERS = ["n", "num_steps", "clamp", "temperature", "cfg_weight"];
const SETTLED = 3; // steps without a change
let about = null; // the model
let frames = []; // of the last request
let locked = null; // {text, places}: the words to keep, of one text of the last frame
let running = null; // the request under way, to end it
let playing = null; // the timer of the film

// --- settings

async function begin() {
  about = await (await fetch("/v1/model")).json();
  const size = (about.parameters / 1e6).toFixed(1);
  $("about").textContent =
    `${about.name}: ${size}M parameters, ${about.vocabulary} tokens, up to ${about.length - 2} a text`;
  document.title = `${about.name} · dlm_jax`;
  for (const name of about.solvers) $("solver").add(new Option(name, name));
  const own = about.defaults;
  $("num_steps").max = Math.max(128, own.num_steps);
  for (const name of ["num_steps", "solver", "clamp", "temperature", "cfg_weight"])
    $(name).value = own[name];
  if (about.distilled_steps) $("num_steps").disabled = true;
  $("source-label").hidden = $("cfg-label").hidden = !about.pairs;
  $("semantic-label").hidden = about.pairs;
  $("pos-label").hidden = about.pairs || !about.classifiers.includes("pos");
  if (about.pairs) $("source").value = about.example;
  for (const name of SLIDERS) {
    $(name).addEventListener("input", () => showValue(name));
    showValue(name);
  }
  $("run").disabled = false;
}

function showValue(name) {
  const value = Number($(name).value);
  $(`${name}-value`).textContent = name === "clamp" && value < 0 ? "off" : value;
}

function fields(text) {
  const pairs = text.split(",").filter((part) => part.trim()).map((part) => part.split(":"));
  for (const pair of pairs)
    if (pair.length !== 2) throw new Error("fields: write field: value, field: value");
  return Object.fromEntries(pairs.map(([name, value]) => [name.trim(), value.trim()]));
}

const words = (text) => text.trim().split(/\s+/).filter(Boolean);

function settings() {
  const own = about.defaults;
  const asked = { n: Number($("n").value), seed: Number($("seed").value) };
  if (!about.distilled_steps) asked.num_steps = Number($("num_steps").value);
  asked.solver = $("solver").value;
  const clamp = Number($("clamp").value);
  asked.clamp = clamp < 0 ? -1 : clamp;
  const temperature = Number($("temperature").value);
  if (temperature !== own.temperature) asked.temperature = temperature;
  if ($("template").value.trim()) asked.template = $("template").value;
  if ($("contains").value.trim()) asked.contains = $("contains").value.trim();
  if ($("lacks").value.trim()) asked.lacks = words($("lacks").value);
  if ($("length").value) asked.length = Number($("length").value);
  if (about.pairs) {
    asked.sources = [$("source").value];
    asked.cfg_weight = Number($("cfg_weight").value);
    return asked;
  }
  if ($("semantic").value.trim()) asked.semantic = fields($("semantic").value);
  if ($("pos").value.trim()) asked.pos = words($("pos").value);
  return asked;
}

// --- the API

async function post(path, body, signal) {
  const answer = await fetch(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  if (answer.ok) return answer;
  const text = await answer.text();
  let line = text || answer.statusText;
  try { line = JSON.parse(text).error; } catch { /* not the API's own answer */ }
  throw new Error(line);
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const [name, data] = block.split("\n");
      yield [name.slice("event: ".length), JSON.parse(data.slice("data: ".length))];
    }
  }
}

async function sample() {
  if (!about) return;
  running?.abort();
  const own = (running = new AbortController());
  stop();
  $("error").textContent = "";
  $("run").disabled = true;
  let finished = false;
  try {
    const answer = await post("/v1/stream", settings(), own.signal);
    frames = [];
    setLocked(null);
    for await (const [name, data] of events(answer)) {
      if (name === "error") throw new Error(data.error);
      if (name === "done") finished = true;
      if (name !== "frame") continue;
      frames.push(data);
      $("film").hidden = false;
      $("scrub").max = data.num_steps;
      draw(frames.length);
    }
    if (!finished) throw new Error("the server ended the answer early: try again");
  } catch (error) {
    if (running === own) $("error").textContent = error.message;
  } finally {
    if (running === own) {
      running = null;
      $("run").disabled = false;
    }
  }
}

// --- the canvas

function draw(step) {
  const frame = frames[step - 1];
  if (!frame) return;
  $("scrub").value = step;
  $("step").textContent = `step ${step} of ${frame.num_steps}`;
  $("canvas").replaceChildren(...frame.texts.map((text, i) => drawText(text, i, step)));
}

function drawText(text, i, step) {
  const line = document.createElement("p");
  line.className = "text";
  text.tokens.forEach((token, place) => {
    const word = document.createElement("button");
    word.type = "button";
    word.className = classes(text, i, place, step).join(" ");
    word.textContent = about.words ? token : token.replace(/[▁Ġ]/g, " ");
    word.title = `${text.confidence[place]}% sure; click to keep this word`;
    word.addEventListener("click", () => lock(i, place, step));
    line.append(word, about.words ? " " : "");
  });
  return line;
}

function classes(text, i, place, step) {
  const found = ["token", `s${Math.min(4, Math.floor(text.confidence[place] / 20))}`];
  const age = unchanged(i, place, step);
  if (step > 1 && age === 0) found.push("fresh");
  else if (age >= SETTLED && (text.confidence[place] >= 90 || step === frames.length))
    found.push("settled");
  if (locked && locked.text === i && locked.places.has(place)) found.push("locked");
  return found;
}

function unchanged(i, place, step) {
  const word = frames[step - 1].texts[i].tokens[place];
  let age = 0;
  while (step - 2 - age >= 0 && frames[step - 2 - age].texts[i].tokens[place] === word) age++;
  return age;
}

function lock(i, place, step) {
  if (running || step !== frames.length) return draw(frames.length);
  const places = locked && locked.text === i ? new Set(locked.places) : new Set();
  if (!places.delete(place)) places.add(place);
  setLocked(places.size ? { text: i, places } : null);
  const tokens = frames.at(-1).texts[i].tokens;
  const parts = tokens.map((token, k) => (places.has(k) ? token : "___"));
  $("template").value = places.size ? joined(parts) : "";
  draw(step);
}

function joined(parts) {
  if (about.words) return parts.join(" ");
  return parts.join("").replace(/[▁Ġ]/g, " ").trim();
}

function setLocked(value) {
  locked = value;
  $("unlock").hidden = !value && !$("template").value;
}

// --- the film

function stop() {
  clearInterval(playing);
  playing = null;
  $("play").textContent = "Play";
}

function play() {
  if (playing) return stop();
  let step = Number($("scrub").value) >= frames.length ? 1 : Number($("scrub").value);
  $("play").textContent = "Stop";
  playing = setInterval(() => {
    draw(step);
    if (++step > frames.length) stop();
  }, 120);
}

// --- the likelihood

async function score() {
  $("scores").textContent = "…";
  const body = { texts: [$("text").value] };
  if (about.pairs) body.sources = [$("source").value];
  try {
    const text = (await (await post("/v1/nll", body)).json()).texts[0];
    const row = document.createElement("div");
    row.className = "scored";
    row.append(...text.tokens.map((token, i) => drawScore(token, text.nats[i])));
    const sum = document.createElement("p");
    sum.textContent =
      `${text.total.toFixed(1)} ± ${text.stderr.toFixed(1)} nats in all, ` +
      `${(text.total / text.tokens.length).toFixed(2)} per token` +
      (text.length ? `; ${text.length.toFixed(1)} of them for the length` : "");
    $("scores").replaceChildren(row, sum);
  } catch (error) {
    $("scores").textContent = error.message;
  }
}

function drawScore(token, nats) {
  const figure = document.createElement("figure");
  const bar = document.createElement("meter");
  Object.assign(bar, { min: 0, max: 12, low: 4, high: 8, optimum: 0, value: Math.max(0, nats) });
  figure.title = `${nats.toFixed(2)} nats`;
  figure.append(bar, token);
  return figure;
}

// --- events

$("settings").addEventListener("submit", (event) => { event.preventDefault(); sample(); });
$("again").addEventListener("click", () => { $("seed").value = Number($("seed").value) + 1; sample(); });
$("unlock").addEventListener("click", () => {
  $("template").value = "";
  setLocked(null);
  if (frames.length) draw(frames.length);
});
$("scrub").addEventListener("input", () => { stop(); draw(Math.min(frames.length, Number($("scrub").value))); });
$("play").addEventListener("click", play);
$("score").addEventListener("submit", (event) => { event.preventDefault(); score(); });
begin().catch((error) => { $("about").textContent = `the server does not answer: ${error.message}`; });
