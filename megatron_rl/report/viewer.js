"use strict";
// Viewer of responses: text colored per token, tracks of entropy, ratio and gap, table of segments.
// Text of runs is always inserted as text, never as markup.

const DATA = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";
const SEGMENT_COLORS = ["#1f77b4", "#b8860b", "#2ca089", "#8e5ea2", "#7f7f7f", "#bc5090"];
const MAX_ROWS = 60;
const state = { run: 0, step: 0, sample: 0, color: "entropy", token: -1 };
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

// --- values of a token ---

function gap(response, i) { return known(response.rollout[i]) && known(response.old[i]) ? response.old[i] - response.rollout[i] : null; }
function tokenRatio(response, i) { return known(response.new[i]) && known(response.old[i]) ? Math.exp(response.new[i] - response.old[i]) : null; }
function isClipped(response, i) {
  if (response.segment[i] < 0) return false;
  return response.clipped_tokens ? response.clipped_tokens.includes(i) : response.segments.clipped[response.segment[i]] > 0;
}
// If every token is a segment, borders are not shown.
const hasBorders = (response) => response.segments.tokens.some((count) => count > 1);
function begins(response, i) { return i > 0 && hasBorders(response) && response.segment[i] !== response.segment[i - 1]; }
function segmentColor(response, id) {
  const count = response.segments.tokens.length;
  if (id < 0) return "#cccccc";
  if (!hasBorders(response)) return SEGMENT_COLORS[0];
  return SEGMENT_COLORS[count <= SEGMENT_COLORS.length ? id : id % 2];
}

function mix(from, to, share) {
  const part = Math.max(0, Math.min(1, share));
  return `rgb(${from.map((value, i) => Math.round(value + (to[i] - value) * part)).join(",")})`;
}
const WHITE = [255, 255, 255], ORANGE = [255, 150, 60], RED = [240, 130, 120], BLUE = [120, 170, 240], VIOLET = [190, 140, 230];
const COLORINGS = {
  entropy: {
    word: "entropy of the policy at the start of the step, nats",
    keys: [[0, "0"], [0.5, "0.5"], [2, "2 and above"]],
    of: (response, i) => response.entropy[i],
    paint: (value) => mix(WHITE, ORANGE, Math.sqrt(value / 2)),
  },
  ratio: {
    word: "ratio of the token, new / old probability",
    keys: [[0.8, "0.8 and below"], [1, "1"], [1.25, "1.25 and above"]],
    of: tokenRatio,
    paint: (value) => mix(WHITE, value > 1 ? RED : BLUE, Math.abs(Math.log(value)) / 0.22),
  },
  gap: {
    word: "gap between log-probs of rollout and trainer, nats",
    keys: [[1e-6, "1e-6 and below"], [1e-3, "1e-3"], [1, "1 and above"]],
    of: (response, i) => (gap(response, i) === null ? null : Math.abs(gap(response, i))),
    paint: (value) => mix(WHITE, VIOLET, (Math.log10(Math.max(value, 1e-6)) + 6) / 6),
  },
};

// --- drawing ---

function drawTokens(response) {
  const coloring = COLORINGS[state.color];
  const place = byId("tokens");
  place.replaceChildren();
  response.text.forEach((text, i) => {
    const shown = text === "" ? "\u25ab" : text.replace(/\n/g, "\u23ce\n");
    const token = element("span", { class: "token", "data-token": i }, shown);
    const value = coloring.of(response, i);
    if (known(value)) token.style.backgroundColor = coloring.paint(value);
    token.style.borderBottomColor = segmentColor(response, response.segment[i]);
    token.classList.toggle("begins", begins(response, i));
    token.classList.toggle("clipped", isClipped(response, i));
    token.classList.toggle("untrained", response.segment[i] < 0);
    place.append(token);
    if (text.includes("\n")) place.append(element("br"));
  });
  const legend = byId("legend");
  legend.replaceChildren(element("span", { class: "key" }, `Background: ${coloring.word}:`));
  for (const [value, word] of coloring.keys) {
    const key = element("span", { class: "key" });
    const patch = element("i");
    patch.style.backgroundColor = coloring.paint(value);
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

function drawTracks(response) {
  const count = response.text.length, wide = Math.min(40, (WIDTH - LEFT - RIGHT) / Math.max(count, 1));
  const x = (i) => LEFT + i * wide;
  const hasRatio = response.segments.ratio.some(known);
  const picture = shape("svg", { viewBox: `0 0 ${WIDTH} ${22 + 3 * (HEIGHT + 30) + 6}`, role: "img", fill: "#222222" });

  const highest = Math.max(0.1, ...response.entropy.filter(known));
  const entropy = track(picture, 0, "Entropy of each token, nats (color: its segment)", 0, highest * 1.05, false);
  const ratios = response.segments.ratio.filter(known).map((s) => (s - 1) * 100);
  const lower = (response.segments.low || []).filter(known).map((w) => -w * 100);
  const upper = (response.segments.high || []).filter(known).map((w) => w * 100);
  const lowest = Math.min(-1e-5, ...ratios, ...lower) * 1.15, largest = Math.max(1e-5, ...ratios, ...upper) * 1.15;
  const title = response.segments.low
    ? `Importance ratio of the segment, distance from 1 (line), in its window (gray); red: ${run().clipped}`
    : "Importance ratio of the segment, distance from 1 (this objective has no window)";
  const ratio = track(picture, 1, title, lowest, largest, false, signed);
  const gaps = response.text.map((_, i) => gap(response, i)).filter(known).map(Math.abs).filter((v) => v > 0);
  const most = Math.max(1e-6, ...gaps), least = Math.min(most / 100, ...gaps);
  const gapTrack = track(picture, 2, "Gap of each token: |log-prob of the trainer \u2212 of the rollout|, nats", least / 2, most * 2, true);

  response.text.forEach((_, i) => {
    const id = response.segment[i];
    if (begins(response, i) && count <= 400)
      picture.append(shape("line", { x1: x(i), x2: x(i), y1: entropy.top, y2: gapTrack.bottom, stroke: "#b9c0c8", "stroke-dasharray": "2 3" }));
    const bar = (t, value, fill) => picture.append(shape("rect", {
      x: x(i) + 0.1 * wide, width: 0.8 * wide, y: t.at(value), height: Math.max(t.bottom - t.at(value), 0.6), fill }));
    if (known(response.entropy[i])) bar(entropy, response.entropy[i], segmentColor(response, id));
    const difference = gap(response, i);
    if (known(difference) && difference !== 0) bar(gapTrack, Math.abs(difference), "#8a5fbf");
    if (id < 0 || !hasRatio) return;
    const s = response.segments;
    if (s.low && known(s.low[id]) && known(s.high[id])) {
      const above = ratio.at(s.high[id] * 100), below = ratio.at(-s.low[id] * 100);
      picture.append(shape("rect", { x: x(i), width: wide + 0.4, y: above, height: Math.max(below - above, 1), fill: "#c9d1da" }));
      const active = response.advantage > 0 ? above : below;
      if (response.advantage) picture.append(shape("line", { x1: x(i), x2: x(i) + wide, y1: active, y2: active, stroke: "#4d5966", "stroke-width": 1.5 }));
    }
    const y = ratio.at((s.ratio[id] - 1) * 100), fill = isClipped(response, i) ? "#c00020" : "#1f5fa8";
    picture.append(shape("rect", { x: x(i), width: Math.max(wide, 1), y: y - 2, height: 4, fill }));
  });
  for (let i = 0; i < count; i++)
    picture.append(shape("rect", { x: x(i), width: wide, y: 0, height: gapTrack.bottom, fill: "transparent", "data-token": i }));
  const marker = shape("rect", { id: "marker", y: entropy.top, width: Math.max(wide, 2), height: gapTrack.bottom - entropy.top, fill: "#1f5fa8", "fill-opacity": 0.14, visibility: "hidden", "pointer-events": "none" });
  picture.append(marker);
  picture.append(shape("text", { x: WIDTH - RIGHT, y: gapTrack.bottom + 15, "font-size": 11, "text-anchor": "end" }, `${plural(count, "token")}, left to right`));
  byId("tracks").replaceChildren(picture);
}

function segmentText(response, id) {
  const parts = [];
  response.segment.forEach((other, i) => {
    if (other !== id) return;
    if (parts.length && response.segment[i - 1] !== id) parts.push(" \u2026 ");
    parts.push(response.text[i]);
  });
  const text = parts.join("").replace(/\n/g, "\u23ce");
  return text.length > 70 ? `${text.slice(0, 69)}\u2026` : text;
}

function verdict(response, id) {
  const s = response.segments, share = s.clipped[id];
  if (!response.advantage) return "advantage 0: no gradient";
  if (!s.low && share === 0) return "no window";
  if (share > 0 && share < 1) return `${number(share * 100, 3)} % of its tokens ${run().clipped}`;
  return share ? run().clipped : "trains";
}

function drawSegments(response) {
  const body = byId("segments");
  const s = response.segments, count = s.tokens.length;
  body.replaceChildren();
  for (let id = 0; id < Math.min(count, MAX_ROWS); id++) {
    const row = element("tr", { "data-segment": id });
    const patch = element("td");
    const box = element("code", {}, segmentText(response, id));
    box.style.borderBottom = `4px solid ${segmentColor(response, id)}`;
    patch.append(box);
    const window = s.low ? `\u2212${number(s.low[id] * 100, 3)} % \u2026 +${number(s.high[id] * 100, 3)} %` : "-";
    row.append(element("td", { class: "number" }, String(id + 1)), patch);
    for (const cell of [String(s.tokens[id]), number(s.entropy[id], 3), window, `${number(s.ratio[id], 6)} (${percent(s.ratio[id])})`])
      row.append(element("td", { class: "number" }, cell));
    row.append(element("td", { class: s.clipped[id] > 0 ? "falls" : "" }, verdict(response, id)));
    body.append(row);
  }
  byId("more").textContent = count > MAX_ROWS ? `and ${count - MAX_ROWS} more segments` : "";
}

function drawDetail(response) {
  const i = state.token, detail = byId("detail");
  document.querySelectorAll(".chosen").forEach((node) => node.classList.remove("chosen"));
  const marker = byId("marker");
  if (i < 0 || i >= response.text.length) {
    detail.textContent = "Point at a token in the text or in the tracks to see its values.";
    marker.setAttribute("visibility", "hidden");
    return;
  }
  const id = response.segment[i], s = response.segments;
  const words = [`token ${i + 1} ${JSON.stringify(response.text[i])}`];
  if (id < 0) words.push("not trained");
  else words.push(`entropy ${number(response.entropy[i])} nats`, `log-prob: rollout ${number(response.rollout[i])}, old ${number(response.old[i])}, new ${number(response.new[i])}`,
    `token ratio ${number(tokenRatio(response, i), 5)}`, `gap ${number(gap(response, i), 3)} nats`, `segment ${id + 1} (${plural(s.tokens[id], "token")}): ratio ${number(s.ratio[id], 6)}, ${verdict(response, id)}`);
  detail.textContent = words.join("  \u00b7  ");
  document.querySelectorAll(`#tokens [data-token="${i}"], tr[data-segment="${id}"]`).forEach((node) => node.classList.add("chosen"));
  const over = byId("tracks").querySelector(`[data-token="${i}"]`);
  marker.setAttribute("x", over.getAttribute("x"));
  marker.setAttribute("visibility", "visible");
}

function drawFacts(response) {
  const facts = byId("facts");
  const sign = response.advantage > 0 ? ["rises", "\u25b2 advantage +"] : response.advantage < 0 ? ["falls", "\u25bc advantage \u2212"] : ["", "advantage "];
  const truncated = response.text.length < response.tokens;
  const shown = truncated ? `${response.tokens} tokens, the first ${response.text.length} shown` : plural(response.tokens, "token");
  const clipped = response.segments.clipped.filter((share) => share > 0).length;
  facts.replaceChildren(
    element("span", {}, `response ${response.id}`),
    element("span", {}, response.reward === null ? "no reward" : `reward ${number(response.reward)}`),
    element("span", { class: sign[0] }, sign[1] + number(Math.abs(response.advantage))),
    element("span", {}, shown),
    element("span", {}, `${plural(response.all_segments, "segment")}, ${clipped} ${run().clipped}${truncated ? " among those shown" : ""}`),
    element("span", {}, `mean gap ${number(mean(response.text.map((_, i) => gap(response, i)).filter(known).map(Math.abs)), 2)} nats`),
  );
  byId("prompt").textContent = response.prompt;
}

function drawControls() {
  const steps = run().steps;
  byId("step").max = steps.length - 1;
  byId("step").value = state.step;
  byId("where").textContent = `step ${line().step} (${state.step + 1} of ${steps.length} shown)`;
  const choices = byId("responses");
  choices.replaceChildren();
  line().samples.forEach((response, i) => {
    const sign = response.advantage > 0 ? "\u25b2" : response.advantage < 0 ? "\u25bc" : "\u00b7";
    choices.append(element("button", { type: "button", "data-sample": i, "aria-pressed": i === state.sample }, `${i + 1} ${sign}`));
  });
}

function draw() {
  state.step = Math.max(0, Math.min(run().steps.length - 1, state.step));
  state.sample = Math.max(0, Math.min(line().samples.length - 1, state.sample));
  state.token = -1;
  const response = sample();
  drawControls();
  drawFacts(response);
  drawTokens(response);
  drawTracks(response);
  drawSegments(response);
  drawDetail(response);
}

// --- events ---

function update(changes) {
  Object.assign(state, changes);
  draw();
  history.replaceState(null, "", `#view=${state.run},${line().step},${state.sample},${state.color}`);
}

// A link to a response: #view=RUN,STEP,RESPONSE,COLOR. A step that is not shown becomes the next one that is.
function follow() {
  const [, place] = location.hash.match(/^#view=(.*)$/) || [];
  if (!place) return;
  const [runs, step, response, color] = place.split(",");
  state.run = Math.max(0, Math.min(DATA.runs.length - 1, Math.trunc(+runs) || 0));
  const found = run().steps.findIndex((entry) => entry.step >= +step);
  state.step = found < 0 ? run().steps.length - 1 : found;
  state.sample = Math.max(0, Math.trunc(+response) || 0);
  if (Object.hasOwn(COLORINGS, color)) state.color = color;
  byId("run").value = state.run;
  byId("color").value = state.color;
  draw();
  byId("viewer").scrollIntoView();
}

function press(event) {
  if (event.ctrlKey || event.altKey || event.metaKey || ["INPUT", "SELECT"].includes(event.target.tagName)) return;
  const changes = {
    ArrowLeft: { step: state.step - 1 },
    ArrowRight: { step: state.step + 1 },
    "[": { sample: state.sample - 1 },
    "]": { sample: state.sample + 1 },
  }[event.key];
  if (!changes) return;
  event.preventDefault();
  update(changes);
}

function point(event) {
  const over = event.target.closest("[data-token]");
  if (!over || +over.dataset.token === state.token) return;
  state.token = +over.dataset.token;
  drawDetail(sample());
}

if (DATA.runs.length) {
  DATA.runs.forEach((entry, i) => byId("run").append(element("option", { value: i }, entry.label)));
  byId("run").addEventListener("change", (event) => update({ run: +event.target.value }));
  byId("color").addEventListener("change", (event) => update({ color: event.target.value }));
  byId("step").addEventListener("input", (event) => update({ step: +event.target.value }));
  byId("previous").addEventListener("click", () => update({ step: state.step - 1 }));
  byId("next").addEventListener("click", () => update({ step: state.step + 1 }));
  byId("responses").addEventListener("click", (event) => {
    if (event.target.dataset.sample !== undefined) update({ sample: +event.target.dataset.sample });
  });
  byId("tokens").addEventListener("mouseover", point);
  byId("tracks").addEventListener("mouseover", point);
  document.addEventListener("keydown", press);
  window.addEventListener("hashchange", follow);
  draw();
  follow();
}
