"use strict";
// Live page: fetches the page again when the server says that a file changed, and replaces curves and tables. The viewer
// keeps its run, step and response; at the newest step it follows the run.

const SECTIONS = ["runs", "differences", "curves", "clips", "mismatch", "times"];
let isFetching = false, isOld = false;

function showState(text) { byId("live").textContent = text; }

function followViewer(fresh) {
  const hadViewer = DATA.runs.length > 0;
  if (!hadViewer || fresh.runs.length !== DATA.runs.length) {
    if (fresh.runs.length) location.reload(); // the viewer itself is new
    return;
  }
  const isNewest = state.step === run().steps.length - 1, step = line().step, id = sample().id;
  DATA.runs = fresh.runs;
  const steps = run().steps, found = steps.findIndex((entry) => entry.step >= step);
  state.step = isNewest || found < 0 ? steps.length - 1 : found;
  if (line().samples[state.sample] && sample().id === id) drawControls(); // the response on the screen stays untouched
  else draw();
}

async function refresh() {
  isOld = true;
  if (isFetching) return;
  isFetching = true;
  while (isOld) {
    isOld = false;
    const answer = await fetch("/");
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    for (const id of SECTIONS) byId(id).replaceChildren(...page.getElementById(id).childNodes);
    followViewer(JSON.parse(page.getElementById("data").textContent));
    showState(`live, updated ${new Date().toLocaleTimeString()}`);
  }
  isFetching = false;
}

const events = new EventSource("/events");
events.addEventListener("open", () => { showState("live"); refresh(); }); // also after the connection was lost
events.addEventListener("message", refresh);
events.addEventListener("error", () => showState("not connected: megatron-rl report has ended"));
