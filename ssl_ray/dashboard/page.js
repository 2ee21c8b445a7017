"use strict";
// The page: what is looked at is in the address (#tab=...), what is shown comes from the server or, in a file, from the page itself.

const LIVE = document.body.dataset.live === "yes";
const POLL_MS = 1000 * Number(document.body.dataset.poll);
const INLINED = LIVE ? null : JSON.parse(document.getElementById("data").textContent);
const MOST_VALUES = 24; // of a key, to have a box each
const NARROW_PX = 600;
const MANY_TRIALS = 100;
const FAILED_SHOWN = 20;
const TABS = [
  ["studies", "studies"],
  ["trials", "trials"],
  ["projector", "projector"],
  ["training", "training"],
  ["pareto", "pareto"],
  ["map", "views × data"],
  ["representation", "representation"],
  ["loss", "loss & speed"],
  ["parameters", "parameters"],
  ["compare", "compare"],
  ["gallery", "gallery"],
].filter(([tab]) => LIVE || tab !== "studies");
// Figures that hold means or what follows from all trials: the server draws them anew for the chosen ones.
const DRAWN_ANEW = new Set(["dim", "beta", "pareto-minutes", "pareto-cost", "map-accuracy", "map-minutes", "importance"]);
const LABELS = { "views.count": "m (views.count)", "model.projector_dim": "d (model.projector_dim)", "loss.beta": "β (loss.beta)" };

const at = (id) => document.getElementById(id);
let view = readView();
let study = null; // what the server said last
let studyTag = null;
let answeredAt = 0;
let slots = []; // figures of the open tab
let known = new Map(); // figures of all trials: {version, drawn}
let keptRows = null;
let turns = 0;

// The address ----------------------------------------------------------------------------------------------------------

function readView() {
  const made = { f: {}, r: {} };
  for (const [key, text] of new URLSearchParams(location.hash.slice(1))) {
    try {
      if (key.startsWith("f.")) made.f[key.slice(2)] = [].concat(JSON.parse(text)).map((value) => JSON.stringify(value));
      else if (key.startsWith("r.")) made.r[key.slice(2)] = text.split(":").map((end) => (end === "" ? null : Number(end)));
      else if (key !== "f" && key !== "r") made[key] = text;
    } catch {
      // a broken link: what can be read of it is shown
    }
  }
  return made;
}

function writeView(push = false) {
  const said = new URLSearchParams();
  for (const [key, value] of Object.entries(view)) {
    if (key === "f") for (const [name, values] of Object.entries(value)) said.set(`f.${name}`, `[${values.join(",")}]`);
    else if (key === "r") for (const [name, ends] of Object.entries(value)) said.set(`r.${name}`, ends.map((end) => end ?? "").join(":"));
    else if (value !== undefined && value !== null && value !== "") said.set(key, value);
  }
  const to = `#${said}`;
  if (to !== location.hash) history[push ? "pushState" : "replaceState"](null, "", location.pathname + to);
}

function changeView(changes, { push = false, whole = false } = {}) {
  Object.assign(view, changes);
  keptRows = null;
  writeView(push);
  if (whole) showAll();
  else refresh();
}

// Data -----------------------------------------------------------------------------------------------------------------

class Unread extends Error {}

async function ask(what, parameters, tag = null) {
  const said = new URLSearchParams(Object.entries(parameters).filter(([, value]) => value !== null && value !== undefined && value !== ""));
  const answer = await fetch(`api/${what}?${said}`, { headers: tag ? { "If-None-Match": tag } : {}, cache: "no-store" });
  if (answer.status === 304) return { same: true };
  if (!answer.ok) {
    let text = `${answer.status} ${answer.statusText}`;
    try {
      text = (await answer.json()).error;
    } catch {
      // no JSON: the status says it
    }
    throw new Unread(text);
  }
  return { value: await answer.json(), tag: answer.headers.get("ETag") };
}

function column(key) {
  return study.columns.find((each) => each.key === key);
}

// A function from a trial's name to its value of a column.
function byName(key) {
  const values = column(key).values;
  return (name) => values[study.rowOf.get(name)];
}

function takeStudy(value) {
  study = value;
  study.rowOf = new Map(column("name").values.map((name, row) => [name, row]));
  keptRows = null;
}

// The figure `name` of all trials.
async function figureOfAll(name) {
  if (!LIVE) return INLINED.figures[name];
  const key = `${name} ${view.target ?? ""}`;
  const before = known.get(key);
  if (before && before.version === study.version) return before.drawn;
  const version = study.version;
  const answer = await ask("figure", { study: view.study, figure: name, target: view.target }, before && before.tag);
  const drawn = answer.same ? before.drawn : answer.value;
  known.set(key, { version, drawn, tag: answer.same ? before.tag : answer.tag });
  return drawn;
}

// The frame -----------------------------------------------------------------------------------------------------------------

function moment(seconds) {
  return seconds === null || seconds === undefined ? "" : new Date(1000 * seconds).toISOString().replace("T", " ").slice(0, 19) + " UTC";
}

function tabNow() {
  const asked = TABS.some(([tab]) => tab === view.tab) ? view.tab : null;
  if (LIVE && !view.study) return "studies";
  return asked ?? "trials";
}

function showTabs() {
  const open = tabNow();
  const made = TABS.map(([tab, label]) => {
    const button = element("button", { type: "button", role: "tab", id: `tab-${tab}`, "aria-selected": tab === open, "aria-controls": "main", tabindex: tab === open ? "0" : "-1" }, label);
    button.disabled = tab !== "studies" && !study;
    button.addEventListener("click", () => openTab(tab));
    return button;
  });
  const held = at("tabs").contains(document.activeElement);
  at("tabs").replaceChildren(...made);
  if (held) at(`tab-${open}`).focus();
  at(`tab-${open}`).scrollIntoView({ block: "nearest", inline: "center" });
}

function openTab(tab) {
  view.tab = tab;
  writeView(true);
  showAll();
}

at("tabs").addEventListener("keydown", (event) => {
  const tabs = TABS.map(([tab]) => tab).filter((tab) => study || tab === "studies");
  const i = tabs.indexOf(tabNow());
  const to = { ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: tabs.length - 1 }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  openTab(tabs[(to + tabs.length) % tabs.length]);
});

function showAbout() {
  const open = tabNow();
  const there = study && open !== "studies";
  at("filters").hidden = !there || ["compare", "gallery"].includes(open);
  at("title").textContent = there ? study.name : "ssl_ray studies";
  document.title = there ? `${study.name}: ${open}` : "ssl_ray studies";
  if (!there) {
    at("about").textContent = "";
    return;
  }
  const counts = {};
  for (const status of column("status").values) counts[status] = (counts[status] ?? 0) + 1;
  const said = Object.entries(counts).map(([status, n]) => `${n} ${status}`).join(", ");
  at("about").textContent = `${study.settings.length} trials: ${said} · objective: ${plainName(study.objective)}`;
  const chosen = chosenRows().size;
  const some = kept().length < study.settings.length;
  at("kept").textContent = some ? `filter: ${kept().length} of ${study.settings.length} trials shown${chosen ? ", of those chosen" : ""}` : "filter: all trials shown";
}

function showAll() {
  for (const slot of slots) if (slot.plot) Plotly.purge(slot.plot);
  slots = [];
  keptRows = null;
  showTabs();
  showAbout();
  const open = tabNow();
  at("main").setAttribute("role", "tabpanel");
  at("main").setAttribute("aria-labelledby", `tab-${open}`);
  if (open !== "studies" && !study) {
    at("main").replaceChildren(element("p", {}, "reading …"));
    return;
  }
  const needsTrial = ["representation", "compare", "gallery"].includes(open) && !study.settings.length;
  at("main").replaceChildren(...(needsTrial ? [element("p", {}, "The study has no trials.")] : BUILD[open]()));
  if (study) filterFields();
  refresh();
}

// Everything that depends on the filter, the selection or the data, in place.
function refresh() {
  if (study) showAbout();
  for (const slot of slots) if (slot.fill) slot.fill();
    else fillSlot(slot);
}

const THEMES = ["auto", "light", "dark"];

function showTheme() {
  const wanted = oneOf(view.theme, THEMES);
  const dark = wanted === "dark" || (wanted === "auto" && matchMedia("(prefers-color-scheme: dark)").matches);
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  at("theme").textContent = `theme: ${wanted}`;
}

at("theme").addEventListener("click", () => {
  const next = THEMES[(THEMES.indexOf(oneOf(view.theme, THEMES)) + 1) % THEMES.length];
  view.theme = next === "auto" ? undefined : next;
  showTheme();
  changeView({});
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  showTheme();
  refresh();
});
window.addEventListener("popstate", followAddress);

function followAddress() {
  const before = view.study;
  view = readView();
  showTheme();
  if (LIVE && view.study !== before) {
    study = null;
    studyTag = null;
    known = new Map();
    poll();
  }
  showAll();
}

function showFresh() {
  if (!LIVE) at("fresh").textContent = `as of ${moment(INLINED.made)}`;
  else if (study) at("fresh").textContent = `updated ${Math.max(0, Math.round((Date.now() - answeredAt) / 1000))} s ago`;
  else at("fresh").textContent = "";
}

function showProblem(text) {
  at("problem").hidden = !text;
  at("problem").textContent = text ?? "";
}

let polling = 0;

// Asks for the study, again and again; what has changed is shown in place.
async function poll() {
  const turn = (polling += 1);
  const of = view.study;
  try {
    if (!of && !view.tab) {
      const { value } = await ask("studies", {});
      if (value.studies.length === 1) {
        view.study = value.studies[0].study;
        writeView();
        poll();
        return;
      }
    }
    if (tabNow() === "studies" && study === null) refresh();
    if (of && !document.hidden) {
      const answer = await ask("study", { study: of }, studyTag);
      if (turn !== polling) return;
      answeredAt = Date.now();
      showProblem(null);
      if (!answer.same) {
        const first = !study;
        const before = study && [study.version, study.columns.find((each) => each.key === "status").values.join()].join();
        takeStudy(answer.value);
        studyTag = answer.tag;
        const after = [study.version, column("status").values.join()].join();
        if (first) showAll();
        else if (before !== after) {
          if (!at("filter-fields").contains(document.activeElement)) filterFields();
          refresh();
        }
      }
    }
  } catch (error) {
    if (turn !== polling) return;
    showProblem(error instanceof Unread ? error.message : `No answer from the server (${error.message}). What is shown was read before.`);
    if (!(error instanceof Unread || error instanceof TypeError)) console.error(error);
  }
  showFresh();
  if (turn === polling) setTimeout(() => turn === polling && poll(), POLL_MS);
}

function start() {
  // A token in the address has become a cookie: it is not to stay in the history.
  if (location.search) history.replaceState(null, "", location.pathname + location.hash);
  showTheme();
  setInterval(showFresh, 1000);
  document.addEventListener("visibilitychange", () => !document.hidden && LIVE && poll());
  if (LIVE) {
    showAll();
    poll();
  } else {
    takeStudy(INLINED.study);
    showAll();
    showFresh();
  }
}

start();
