"use strict";
// Steps through responses: text coloured token by token, tracks of entropy, ratio and gap, a table of segments.
// Everything from a run is set as text, never as markup.

const DATA = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";
const SEGMENT_COLOURS = ["#1f77b4", "#b8860b", "#2ca089", "#8e5ea2", "#7f7f7f", "#bc5090"];
const MOST_ROWS = 60;
const state = { run: 0, step: 0, sample: 0, colour: "entropy", token: -1 };
const byId = (id) => document.getElementById(id);

function element(name, attributes = {}, text) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function shape(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

const known = (value) => typeof value === "number" && Number.isFinite(value);
function number(value, digits = 4) {
  if (!known(value)) return "-";
  const size = Math.abs(value);
  const text = size !== 0 && (size < 1e-3 || size >= 1e5)
    ? value.toExponential(digits - 2).replace(/\.?0*e/, "e") : String(+value.toPrecision(digits));
  return text.replaceAll("-", "\u2212");
}
const signed = (value) => `${value > 0 ? "+" : ""}${number(value, 3)} %`;
const percent = (ratio) => (known(ratio) ? signed((ratio - 1) * 100) : "-");
const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;
const mean = (values) => values.reduce((a, b) => a + b, 0) / Math.max(values.length, 1);

function run() { return DATA.runs[state.run]; }
function line() { return run().steps[state.step]; }
function sample() { return line().samples[state.sample]; }

// --- what is known of a token ---

function gap(own, i) { return known(own.rollout[i]) && known(own.old[i]) ? own.old[i] - own.rollout[i] : null; }
function ownRatio(own, i) { return known(own.new[i]) && known(own.old[i]) ? Math.exp(own.new[i] - own.old[i]) : null; }
function isClipped(own, i) {
  if (own.segment[i] < 0) return false;
  return own.clipped_tokens ? own.clipped_tokens.includes(i) : own.segments.clipped[own.segment[i]] > 0;
}
// Where every token is a segment of its own there is no border to show.
const shares = (own) => own.segments.tokens.some((count) => count > 1);
function begins(own, i) { return i > 0 && shares(own) && own.segment[i] !== own.segment[i - 1]; }
function segmentColour(own, id) {
  const count = own.segments.tokens.length;
  if (id < 0) return "#cccccc";
  if (!shares(own)) return SEGMENT_COLOURS[0];
  return SEGMENT_COLOURS[count <= SEGMENT_COLOURS.length ? id : id % 2];
}

function mix(from, to, share) {
  const part = Math.max(0, Math.min(1, share));
  return `rgb(${from.map((value, i) => Math.round(value + (to[i] - value) * part)).join(",")})`;
}
const WHITE = [255, 255, 255], ORANGE = [255, 150, 60], RED = [240, 130, 120], BLUE = [120, 170, 240], VIOLET = [190, 140, 230];
const COLOURINGS = {
  entropy: {
    word: "entropy of the policy at the start of the step, nats",
    keys: [[0, "0"], [0.5, "0.5"], [2, "2 and above"]],
    of: (own, i) => own.entropy[i],
    paint: (value) => mix(WHITE, ORANGE, Math.sqrt(value / 2)),
  },
  ratio: {
    word: "the token's own ratio, new / old probability",
    keys: [[0.8, "0.8 and below"], [1, "1"], [1.25, "1.25 and above"]],
    of: ownRatio,
    paint: (value) => mix(WHITE, value > 1 ? RED : BLUE, Math.abs(Math.log(value)) / 0.22),
  },
  gap: {
    word: "gap between the log-probs of rollout and trainer, nats",
    keys: [[1e-6, "1e-6 and below"], [1e-3, "1e-3"], [1, "1 and above"]],
    of: (own, i) => (gap(own, i) === null ? null : Math.abs(gap(own, i))),
    paint: (value) => mix(WHITE, VIOLET, (Math.log10(Math.max(value, 1e-6)) + 6) / 6),
  },
};

// --- drawing ---

function drawTokens(own) {
  const colouring = COLOURINGS[state.colour];
  const place = byId("tokens");
  place.replaceChildren();
  own.text.forEach((text, i) => {
    const shown = text === "" ? "\u25ab" : text.replace(/\n/g, "\u23ce\n");
    const token = element("span", { class: "token", "data-token": i }, shown);
    const value = colouring.of(own, i);
    if (known(value)) token.style.backgroundColor = colouring.paint(value);
    token.style.borderBottomColor = segmentColour(own, own.segment[i]);
    token.classList.toggle("begins", begins(own, i));
    token.classList.toggle("clipped", isClipped(own, i));
    token.classList.toggle("untrained", own.segment[i] < 0);
    place.append(token);
    if (text.includes("\n")) place.append(element("br"));
  });
  const legend = byId("legend");
  legend.replaceChildren(element("span", { class: "key" }, `Background: ${colouring.word}:`));
  for (const [value, word] of colouring.keys) {
    const key = element("span", { class: "key" });
    const patch = element("i");
    patch.style.backgroundColor = colouring.paint(value);
    key.append(patch, word);
    legend.append(key);
  }
}

function ticks(low, high, log) {
  if (log) {
    const out = [];
    const first = Math.ceil(Math.log10(low)), last = Math.floor(Math.log10(high));
    for (let p = first; p <= last; p += Math.max(1, Math.ceil((last - first) / 3))) out.push(10 ** p);
    return out;
  }
  const raw = (high - low) / 5, base = 10 ** Math.floor(Math.log10(raw));
  const step = base * [1, 2, 5, 10].find((factor) => base * factor >= raw);
  const out = [];
  for (let k = Math.ceil(low / step); k * step <= high + step * 1e-6; k++) out.push(k * step);
  return out;
}

const WIDTH = 1180, LEFT = 96, RIGHT = 12, HEIGHT = 118;

function track(picture, number_, title, low, high, log, tickText) {
  const top = 22 + number_ * (HEIGHT + 30), bottom = top + HEIGHT;
  const at = (v) => {
    const [a, b, c] = log ? [low, high, Math.max(v, low)].map(Math.log10) : [low, high, v];
    return Math.max(top, Math.min(bottom, bottom - ((c - a) / (b - a)) * HEIGHT));
  };
  picture.append(shape("text", { x: LEFT, y: top - 7, "font-size": 12, "font-weight": "bold" }, title));
  for (const value of ticks(low, high, log)) {
    picture.append(shape("line", { x1: LEFT, x2: WIDTH - RIGHT, y1: at(value), y2: at(value), stroke: "#dddddd" }));
    const text = tickText ? tickText(value) : number(value, 3);
    picture.append(shape("text", { x: LEFT - 6, y: at(value) + 4, "font-size": 11, "text-anchor": "end" }, text));
  }
  picture.append(shape("line", { x1: LEFT, x2: LEFT, y1: top, y2: bottom, stroke: "#888888" }));
  return { top, bottom, at };
}

function drawTracks(own) {
  const count = own.text.length, wide = Math.min(40, (WIDTH - LEFT - RIGHT) / Math.max(count, 1));
  const x = (i) => LEFT + i * wide;
  const hasRatio = own.segments.ratio.some(known);
  const picture = shape("svg", { viewBox: `0 0 ${WIDTH} ${22 + 3 * (HEIGHT + 30) + 6}`, role: "img", fill: "#222222" });

  const highest = Math.max(0.1, ...own.entropy.filter(known));
  const entropy = track(picture, 0, "Entropy of each token, nats (colour: its segment)", 0, highest * 1.05, false);
  const ratios = own.segments.ratio.filter(known).map((s) => (s - 1) * 100);
  const lower = (own.segments.low || []).filter(known).map((w) => -w * 100);
  const upper = (own.segments.high || []).filter(known).map((w) => w * 100);
  const lowest = Math.min(-1e-5, ...ratios, ...lower) * 1.15, largest = Math.max(1e-5, ...ratios, ...upper) * 1.15;
  const title = own.segments.low
    ? `Importance ratio of the segment, distance from 1 (line), in its window (grey); red: ${run().clipped}`
    : "Importance ratio of the segment, distance from 1 (this objective has no window)";
  const ratio = track(picture, 1, title, lowest, largest, false, signed);
  const gaps = own.text.map((_, i) => gap(own, i)).filter(known).map(Math.abs).filter((v) => v > 0);
  const most = Math.max(1e-6, ...gaps), least = Math.min(most / 100, ...gaps);
  const gapTrack = track(picture, 2, "Gap of each token: |log-prob of the trainer \u2212 of the rollout|, nats", least / 2, most * 2, true);

  own.text.forEach((_, i) => {
    const id = own.segment[i];
    if (begins(own, i) && count <= 400)
      picture.append(shape("line", { x1: x(i), x2: x(i), y1: entropy.top, y2: gapTrack.bottom, stroke: "#b9c0c8", "stroke-dasharray": "2 3" }));
    const bar = (t, value, fill) => picture.append(shape("rect", {
      x: x(i) + 0.1 * wide, width: 0.8 * wide, y: t.at(value), height: Math.max(t.bottom - t.at(value), 0.6), fill }));
    if (known(own.entropy[i])) bar(entropy, own.entropy[i], segmentColour(own, id));
    const apart = gap(own, i);
    if (known(apart) && apart !== 0) bar(gapTrack, Math.abs(apart), "#8a5fbf");
    if (id < 0 || !hasRatio) return;
    const s = own.segments;
    if (s.low && known(s.low[id]) && known(s.high[id])) {
      const above = ratio.at(s.high[id] * 100), below = ratio.at(-s.low[id] * 100);
      picture.append(shape("rect", { x: x(i), width: wide + 0.4, y: above, height: Math.max(below - above, 1), fill: "#c9d1da" }));
      const active = own.advantage > 0 ? above : below;
      if (own.advantage) picture.append(shape("line", { x1: x(i), x2: x(i) + wide, y1: active, y2: active, stroke: "#4d5966", "stroke-width": 1.5 }));
    }
    const y = ratio.at((s.ratio[id] - 1) * 100), fill = isClipped(own, i) ? "#c00020" : "#1f5fa8";
    picture.append(shape("rect", { x: x(i), width: Math.max(wide, 1), y: y - 2, height: 4, fill }));
  });
  for (let i = 0; i < count; i++)
    picture.append(shape("rect", { x: x(i), width: wide, y: 0, height: gapTrack.bottom, fill: "transparent", "data-token": i }));
  const marker = shape("rect", { id: "marker", y: entropy.top, width: Math.max(wide, 2), height: gapTrack.bottom - entropy.top, fill: "#1f5fa8", "fill-opacity": 0.14, visibility: "hidden", "pointer-events": "none" });
  picture.append(marker);
  picture.append(shape("text", { x: WIDTH - RIGHT, y: gapTrack.bottom + 15, "font-size": 11, "text-anchor": "end" }, `${plural(count, "token")}, left to right`));
  byId("tracks").replaceChildren(picture);
}

function segmentText(own, id) {
  const parts = [];
  own.segment.forEach((other, i) => {
    if (other !== id) return;
    if (parts.length && own.segment[i - 1] !== id) parts.push(" \u2026 ");
    parts.push(own.text[i]);
  });
  const text = parts.join("").replace(/\n/g, "\u23ce");
  return text.length > 70 ? `${text.slice(0, 69)}\u2026` : text;
}

function verdict(own, id) {
  const s = own.segments, share = s.clipped[id];
  if (!own.advantage) return "advantage 0: nothing to learn";
  if (!s.low && share === 0) return "no window";
  if (share > 0 && share < 1) return `${number(share * 100, 3)} % of its tokens ${run().clipped}`;
  return share ? run().clipped : "trains";
}

function drawSegments(own) {
  const body = byId("segments");
  const s = own.segments, count = s.tokens.length;
  body.replaceChildren();
  for (let id = 0; id < Math.min(count, MOST_ROWS); id++) {
    const row = element("tr", { "data-segment": id });
    const patch = element("td");
    const box = element("code", {}, segmentText(own, id));
    box.style.borderBottom = `4px solid ${segmentColour(own, id)}`;
    patch.append(box);
    const window = s.low ? `\u2212${number(s.low[id] * 100, 3)} % \u2026 +${number(s.high[id] * 100, 3)} %` : "-";
    row.append(element("td", { class: "number" }, String(id + 1)), patch);
    for (const cell of [String(s.tokens[id]), number(s.entropy[id], 3), window, `${number(s.ratio[id], 6)} (${percent(s.ratio[id])})`])
      row.append(element("td", { class: "number" }, cell));
    row.append(element("td", { class: s.clipped[id] > 0 ? "falls" : "" }, verdict(own, id)));
    body.append(row);
  }
  byId("more").textContent = count > MOST_ROWS ? `and ${count - MOST_ROWS} more segments` : "";
}

function drawDetail(own) {
  const i = state.token, detail = byId("detail");
  document.querySelectorAll(".chosen").forEach((node) => node.classList.remove("chosen"));
  const marker = byId("marker");
  if (i < 0 || i >= own.text.length) {
    detail.textContent = "Point at a token, in the text or in the tracks, for its numbers.";
    marker.setAttribute("visibility", "hidden");
    return;
  }
  const id = own.segment[i], s = own.segments;
  const words = [`token ${i + 1} ${JSON.stringify(own.text[i])}`];
  if (id < 0) words.push("not trained");
  else words.push(`entropy ${number(own.entropy[i])} nats`, `log-prob: rollout ${number(own.rollout[i])}, old ${number(own.old[i])}, new ${number(own.new[i])}`,
    `own ratio ${number(ownRatio(own, i), 5)}`, `gap ${number(gap(own, i), 3)} nats`, `segment ${id + 1} (${plural(s.tokens[id], "token")}): ratio ${number(s.ratio[id], 6)}, ${verdict(own, id)}`);
  detail.textContent = words.join("  \u00b7  ");
  document.querySelectorAll(`#tokens [data-token="${i}"], tr[data-segment="${id}"]`).forEach((node) => node.classList.add("chosen"));
  const over = byId("tracks").querySelector(`[data-token="${i}"]`);
  marker.setAttribute("x", over.getAttribute("x"));
  marker.setAttribute("visibility", "visible");
}

function drawFacts(own) {
  const facts = byId("facts");
  const sign = own.advantage > 0 ? ["rises", "\u25b2 advantage +"] : own.advantage < 0 ? ["falls", "\u25bc advantage \u2212"] : ["", "advantage "];
  const cut = own.text.length < own.tokens;
  const shown = cut ? `${own.tokens} tokens, the first ${own.text.length} shown` : plural(own.tokens, "token");
  const clipped = own.segments.clipped.filter((share) => share > 0).length;
  facts.replaceChildren(
    element("span", {}, `response ${own.id}`),
    element("span", {}, own.reward === null ? "no reward" : `reward ${number(own.reward)}`),
    element("span", { class: sign[0] }, sign[1] + number(Math.abs(own.advantage))),
    element("span", {}, shown),
    element("span", {}, `${plural(own.all_segments, "segment")}, ${clipped} ${run().clipped}${cut ? " among those shown" : ""}`),
    element("span", {}, `mean gap ${number(mean(own.text.map((_, i) => gap(own, i)).filter(known).map(Math.abs)), 2)} nats`),
  );
  byId("prompt").textContent = own.prompt;
}

function drawControls() {
  const steps = run().steps;
  byId("step").max = steps.length - 1;
  byId("step").value = state.step;
  byId("where").textContent = `step ${line().step} (${state.step + 1} of ${steps.length} shown)`;
  const choices = byId("responses");
  choices.replaceChildren();
  line().samples.forEach((own, i) => {
    const sign = own.advantage > 0 ? "\u25b2" : own.advantage < 0 ? "\u25bc" : "\u00b7";
    choices.append(element("button", { type: "button", "data-sample": i, "aria-pressed": i === state.sample }, `${i + 1} ${sign}`));
  });
}

function draw() {
  state.step = Math.max(0, Math.min(run().steps.length - 1, state.step));
  state.sample = Math.max(0, Math.min(line().samples.length - 1, state.sample));
  state.token = -1;
  const own = sample();
  drawControls();
  drawFacts(own);
  drawTokens(own);
  drawTracks(own);
  drawSegments(own);
  drawDetail(own);
}

// --- what people do ---

function go(changes) {
  Object.assign(state, changes);
  draw();
}

function point(event) {
  const over = event.target.closest("[data-token]");
  if (!over || +over.dataset.token === state.token) return;
  state.token = +over.dataset.token;
  drawDetail(sample());
}

if (DATA.runs.length) {
  DATA.runs.forEach((own, i) => byId("run").append(element("option", { value: i }, own.label)));
  byId("run").addEventListener("change", (event) => go({ run: +event.target.value }));
  byId("colour").addEventListener("change", (event) => go({ colour: event.target.value }));
  byId("step").addEventListener("input", (event) => go({ step: +event.target.value }));
  byId("previous").addEventListener("click", () => go({ step: state.step - 1 }));
  byId("next").addEventListener("click", () => go({ step: state.step + 1 }));
  byId("responses").addEventListener("click", (event) => {
    if (event.target.dataset.sample !== undefined) go({ sample: +event.target.dataset.sample });
  });
  byId("tokens").addEventListener("mouseover", point);
  byId("tracks").addEventListener("mouseover", point);
  draw();
}
