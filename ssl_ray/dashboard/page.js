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

// Filter and selection ---------------------------------------------------------------------------------------------------

function chosenRows() {
  const rows = new Set();
  if (!view.sel) return rows;
  try {
    const bytes = atob(view.sel.replaceAll("-", "+").replaceAll("_", "/"));
    for (let i = 0; i < study.settings.length; i += 1) if ((bytes.charCodeAt(i >> 3) >> (i & 7)) & 1) rows.add(i);
  } catch {
    // a broken link: nothing is chosen
  }
  return rows;
}

function bitsOf(rows) {
  const bytes = new Uint8Array(Math.ceil(study.settings.length / 8));
  for (const row of rows) bytes[row >> 3] |= 1 << (row & 7);
  let text = "";
  for (const byte of bytes) text += String.fromCharCode(byte);
  return btoa(text).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}

function passes(row) {
  for (const [key, allowed] of Object.entries(view.f)) {
    const there = column(key);
    if (there && !allowed.includes(JSON.stringify(there.values[row]))) return false;
  }
  for (const [key, [low, high]] of Object.entries(view.r)) {
    const there = column(key);
    const value = there && there.values[row];
    if (there && ((low !== null && !(value >= low)) || (high !== null && !(value <= high)))) return false;
  }
  return !view.q || column("name").values[row].toLowerCase().includes(view.q.toLowerCase());
}

function filteredRows() {
  return study.settings.map((_, row) => row).filter(passes);
}

// Rows that the figures show.
function kept() {
  if (!keptRows) {
    const chosen = chosenRows();
    keptRows = filteredRows().filter((row) => !chosen.size || chosen.has(row));
  }
  return keptRows;
}

function toggleChosen(rows) {
  const chosen = chosenRows();
  const all = rows.every((row) => chosen.has(row));
  for (const row of rows) if (all) chosen.delete(row);
    else chosen.add(row);
  changeView({ sel: chosen.size ? bitsOf(chosen) : undefined });
}

function filterFields() {
  const box = at("filter-fields");
  const name = element("input", { type: "search", value: view.q ?? "", "aria-label": "text in the trial's name", placeholder: "text in the name" });
  name.addEventListener("input", () => changeView({ q: name.value }));
  const fields = [element("fieldset", {}, element("legend", {}, "trial"), name)];
  for (const key of ["status", "seed", ...study.swept]) {
    const given = column(key).values;
    const texts = new Map(given.map((value) => [JSON.stringify(value), value]));
    const values = [...texts.keys()].sort((a, b) => compareCells(texts.get(a), texts.get(b)));
    if (values.length < 2 && !(key in view.f) && !(key in view.r)) continue;
    const field = element("fieldset", { "data-key": key }, element("legend", {}, LABELS[key] ?? key));
    const inside = element("div", { class: "field-values" });
    if (values.length > MOST_VALUES && given.every((value) => typeof value === "number")) inside.append(...rangeFields(key));
    else for (const text of values.slice(0, 200)) inside.append(valueBox(key, text, texts.get(text), values));
    field.append(inside);
    fields.push(field);
  }
  const clear = element("button", { type: "button" }, "show all");
  clear.addEventListener("click", () => {
    Object.assign(view, { f: {}, r: {}, q: undefined, sel: undefined });
    filterFields();
    changeView({});
  });
  box.replaceChildren(...fields, clear);
}

function valueBox(key, text, value, all) {
  const tick = element("input", { type: "checkbox" });
  tick.checked = !view.f[key] || view.f[key].includes(text);
  tick.addEventListener("change", () => {
    const before = view.f[key] ?? all;
    const after = tick.checked ? [...before, text] : before.filter((other) => other !== text);
    view.f = { ...view.f, [key]: after };
    if (all.every((each) => after.includes(each))) delete view.f[key];
    changeView({});
  });
  return element("label", {}, tick, shownCell(value).slice(0, 60) || "none");
}

function rangeFields(key) {
  const ends = [0, 1].map((i) => {
    const field = element("input", { type: "number", step: "any", placeholder: i ? "to" : "from", "aria-label": `${key} ${i ? "to" : "from"}` });
    field.value = view.r[key]?.[i] ?? "";
    field.style.width = "7rem";
    field.addEventListener("change", () => {
      const made = [...(view.r[key] ?? [null, null])];
      made[i] = field.value === "" ? null : Number(field.value);
      view.r = { ...view.r, [key]: made };
      if (made[0] === null && made[1] === null) delete view.r[key];
      changeView({});
    });
    return field;
  });
  return ends;
}

// Figures ----------------------------------------------------------------------------------------------------------------

// A place for a figure. name: a function that says which; drawn, another that gives it where it is not one of all trials.
function figureSlot(heading, name, drawn = null) {
  const plot = element("div", { class: "plot" });
  const note = element("p", { class: "note" });
  const head = element("div", { class: "figure-head" }, element("h2", {}, heading));
  for (const format of ["png", "svg"]) {
    const save = element("button", { type: "button", "aria-label": `save ${heading} as ${format}` }, format.toUpperCase());
    save.addEventListener("click", () => {
      Plotly.downloadImage(plot, { format, filename: `${study.name}-${name()}`.replace(/[^\w.-]+/g, "_"), width: 1000, height: 600 });
    });
    head.append(save);
  }
  slots.push({ plot, note, name, drawn, turn: 0 });
  return element("section", {}, head, plot, note);
}

async function fillSlot(slot) {
  const turn = (slot.turn = turns += 1);
  const name = slot.name();
  try {
    const all = slot.drawn ? await slot.drawn() : await figureOfAll(name);
    if (slot.turn !== turn) return;
    if (slot.drawn || kept().length === study.settings.length) {
      put(slot, name, all, "");
      return;
    }
    const names = column("name").values;
    const made = restricted(name, all, new Set(kept().map((row) => names[row])), study, byName);
    // With many trials a curve has few points, with fewer of them more.
    const finer = study.settings.length > MANY_TRIALS && kept().length <= study.settings.length / 2;
    const anew = LIVE && (DRAWN_ANEW.has(name) || finer);
    let note = "";
    if (name === "importance") note = anew ? "computing …" : "Of all trials: a file cannot compute it anew for the chosen ones.";
    else if (made.lost && !anew) note = "Left out: what stands for several trials of which not all are chosen. `ssl-ray dashboard` draws it anew.";
    put(slot, name, made, note);
    if (!anew) return;
    const answer = await ask("figure", { study: view.study, figure: name, target: view.target, only: bitsOf(kept()) });
    if (slot.turn === turn) put(slot, name, answer.value, "");
  } catch (error) {
    if (slot.turn === turn) slot.note.textContent = error instanceof Unread || error instanceof TypeError ? `Cannot be shown: ${error.message}` : String(error);
    if (!(error instanceof Unread)) console.error(error);
  }
}

function put(slot, name, made, note) {
  const narrow = document.documentElement.clientWidth <= NARROW_PX;
  const ink = getComputedStyle(document.documentElement).getPropertyValue("--ink").trim();
  const panel = getComputedStyle(document.documentElement).getPropertyValue("--panel").trim();
  const layout = structuredClone(made.layout);
  layout.uirevision = name;
  layout.autosize = true;
  layout.font = { ...(layout.font ?? {}), color: ink, family: "system-ui, sans-serif" };
  layout.hoverlabel = { bgcolor: panel, font: { color: ink }, namelength: -1 };
  layout.legend = { ...(layout.legend ?? {}), bgcolor: "rgba(0,0,0,0)" };
  const height = layout.height ?? (narrow ? 400 : 430);
  const entries = made.data.length < 2 ? 0 : new Set(made.data.filter((trace) => trace.showlegend !== false).map((trace) => trace.legendgroup ?? trace.name)).size;
  layout.height = height;
  if (narrow) {
    layout.margin = { ...layout.margin, l: 45, r: name === "parallel" ? 50 : 8 };
    for (const key of Object.keys(layout)) {
      if (!/^[xy]axis/.test(key) || !layout[key].title) continue;
      const text = key.startsWith("x") && layout[key].title.text.length > 36 ? wrapped(layout[key].title.text) : layout[key].title.text;
      layout[key] = { ...layout[key], title: { ...layout[key].title, text, font: { size: 11 } } };
    }
    if (name.startsWith("map")) layout.margin.r = 0;
    else if (name === "parallel") {
      layout.showlegend = false; // the last axis says it
      layout.margin.b = 110;
      layout.xaxis = { ...layout.xaxis, tickangle: -40, title: undefined, tickfont: { size: 10 } };
    } else if (entries) {
      const below = 22 * Math.ceil(Math.min(12, entries) / 2) + 30;
      layout.height = height + below;
      layout.legend = { ...layout.legend, orientation: "h", y: -70 / height, x: 0, yanchor: "top", font: { size: 11 } };
      layout.margin.b = 60 + below;
    }
  }
  slot.plot.style.minHeight = `${layout.height}px`;
  if (!made.data.length && !(layout.annotations ?? []).length) {
    const text = "None of the chosen trials has anything to show here.";
    layout.annotations = [{ xref: "paper", yref: "paper", x: 0.5, y: 0.5, showarrow: false, text, font: { size: 16 } }];
  }
  const back = getComputedStyle(document.documentElement).getPropertyValue("--back").trim();
  for (const each of layout.annotations ?? []) {
    if (made.data.length) each.bgcolor = back; // ticks of axes that lines cross
    else if (narrow) each.text = wrapped(each.text);
  }
  for (const key of Object.keys(layout)) if (!made.data.length && /^[xy]axis/.test(key)) layout[key] = { ...layout[key], visible: false };
  const buttons = [["zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]];
  const config = { responsive: true, displaylogo: false, modeBarButtons: buttons, displayModeBar: narrow ? false : "hover" };
  const first = !slot.plot.data;
  Plotly.react(slot.plot, made.data.map((trace) => ({ ...trace })), layout, config);
  if (first) slot.plot.on("plotly_click", clicked);
  slot.note.textContent = note;
  slot.plot.dataset.points = made.data.reduce((sum, trace) => sum + (trace.x ?? trace.z?.flat() ?? []).filter((each) => each !== null).length, 0);
}

function wrapped(text) {
  return text.replace(/(.{1,34})(\s|$)/g, "$1<br>");
}

// A click on a point chooses its trials, or no longer.
function clicked(event) {
  const rows = new Set();
  for (const point of event.points) {
    const names = point.data.meta?.trials;
    const of = point.data.type === "heatmap" ? point.data.customdata?.[point.pointIndex[0]]?.[point.pointIndex[1]] : point.data.customdata?.[point.pointIndex];
    if (names && of !== undefined && of !== null) for (const position of positions(of)) rows.add(study.rowOf.get(names[position]));
  }
  if (rows.size) toggleChosen([...rows]);
}

// Tabs --------------------------------------------------------------------------------------------------------------------

function choice(label, key, options, fallback) {
  const select = element("select");
  for (const [value, text] of options) select.append(element("option", { value }, text));
  select.value = view[key] ?? fallback;
  select.addEventListener("change", () => changeView({ [key]: select.value }));
  return element("label", {}, label, select);
}

function trialChoice(label, key, fallback, changed) {
  const select = element("select", { "data-choice": key });
  for (const name of column("name").values) select.append(element("option", { value: name }, name.slice(0, 80)));
  select.value = study.rowOf.has(view[key]) ? view[key] : fallback;
  select.addEventListener("change", () => {
    view[key] = select.value;
    changed();
  });
  return element("label", {}, label, select);
}

function targetField() {
  const field = element("input", { type: "number", min: "0", max: "100", step: "any", "aria-label": "target accuracy in percent" });
  field.value = view.target !== undefined ? 100 * view.target : study.target_accuracy === null ? "" : +(100 * study.target_accuracy).toFixed(6);
  field.style.width = "6rem";
  field.disabled = !LIVE;
  field.addEventListener("change", () => {
    const share = Number(field.value) / 100;
    changeView({ target: field.value !== "" && share >= 0 && share <= 1 ? String(share) : undefined });
  });
  return element("label", {}, "target (%)", field);
}

function controls(...parts) {
  return element("div", { class: "controls" }, ...parts);
}

function objectiveFirst() {
  const values = column(study.objective).values;
  const good = (row) => (study.mode === "near" ? -Math.abs(values[row] - study.target) : study.mode === "max" ? values[row] : -values[row]);
  const rows = kept().filter((row) => values[row] !== null);
  const best = rows.reduce((a, b) => (a === null || good(b) > good(a) ? b : a), null);
  return best ?? kept()[0] ?? 0;
}

const nameOf = (row) => column("name").values[row];

const BUILD = {
  studies: buildStudies,
  trials: buildTrials,
  projector: () => [
    controls(targetField()),
    figureSlot(`${plainName(study.objective)} over projector dimension`, () => "dim"),
    figureSlot("Best β over projector dimension", () => "beta"),
  ],
  training: () => [
    controls(
      choice("over", "x", [["minutes", "minutes of training"], ["views", "views seen"], ["epochs", "epochs"]], "minutes"),
      targetField(),
    ),
    figureSlot(`${plainName(study.accuracy)} while training`, () => `training-${oneOf(view.x, ["minutes", "views", "epochs"])}`),
    element("p", { class: "note" }, "Dashed: still running. Dotted: failed or stopped. A tick on the target line: where a trial reached it."),
  ],
  pareto: () => [
    controls(choice("against", "cost", [["minutes", "minutes of training"], ["cost", "cost"]], "minutes"), targetField()),
    figureSlot("Error against what it took", () => `pareto-${oneOf(view.cost, ["minutes", "cost"])}`),
    element("p", { class: "note" }, "A point is a setting, the mean over its seeds. Colour: views m. Symbol: fraction of the images. Dim: another is as cheap and as good."),
  ],
  map: () => [
    controls(choice("show", "show", [["accuracy", "accuracy"], ["minutes", "minutes to the target"]], "accuracy"), targetField()),
    figureSlot("Views per image × fraction of the images", () => `map-${oneOf(view.show, ["accuracy", "minutes"])}`),
    element("p", { class: "note" }, "A cell is the mean over its trials, whatever else differs between them: choose those of one d and β above."),
  ],
  representation: buildRepresentation,
  loss: () => [figureSlot("Loss and its terms", () => "loss"), figureSlot("Throughput and waiting for data", () => "throughput")],
  parameters: () => [
    figureSlot("Settings, minutes and result of each complete trial", () => "parallel"),
    figureSlot("What the result depends on", () => "importance"),
  ],
  compare: buildCompare,
  gallery: buildGallery,
};

function oneOf(value, allowed) {
  return allowed.includes(value) ? value : allowed[0];
}

function plainName(objective) {
  return { linear_accuracy: "Linear accuracy", knn_accuracy: "kNN accuracy", alpha: "Alpha", rankme: "RankMe" }[objective];
}

function buildStudies() {
  const box = element("div");
  const fill = async () => {
    try {
      const { value } = await ask("studies", {});
      const body = element("tbody");
      for (const row of value.studies) {
        const link = element("a", { href: `#${new URLSearchParams({ study: row.study, tab: "trials" })}` }, row.name ?? row.study);
        const counts = row.counts ? Object.entries(row.counts).map(([key, n]) => `${n} ${key}`).join(", ") : "";
        const cells = row.error ? [row.error] : [row.objective, `${row.trials}`, counts, row.swept.join(", "), moment(row.created), row.uri];
        const tr = element("tr", {}, element("th", { scope: "row" }, row.error ? row.study : link));
        if (row.error) tr.append(element("td", { colspan: 6, class: "wide-text problem" }, row.error));
        else for (const cell of cells) tr.append(element("td", { class: "wide-text" }, cell));
        body.append(tr);
      }
      const heads = ["study", "objective", "trials", "as last seen", "swept keys", "begun", "place"].map((text) => element("th", { scope: "col" }, text));
      const table = element("table", {}, element("thead", {}, element("tr", {}, ...heads)), body);
      box.replaceChildren(element("p", { class: "about" }, `Studies at ${value.uri}`), element("div", { class: "scroll" }, table));
      if (!value.studies.length) box.append(element("p", {}, "No study here yet (no study.json). Begin one: ssl-ray study run projector --small"));
    } catch (error) {
      box.replaceChildren(element("p", { class: "problem" }, error.message));
    }
  };
  slots.push({ fill });
  return [element("h2", {}, "Studies"), box];
}

function shownColumns() {
  const given = view.cols ? view.cols.split("~") : null;
  return study.columns.filter((each) => (given ? given.includes(each.key) : each.shown) || each.key === "name");
}

function sortedRows(rows) {
  const key = view.sort ?? "";
  const by = column(key.replace(/^-/, ""));
  if (!by) return rows;
  return [...rows].sort((a, b) => compareCells(by.values[a], by.values[b], key.startsWith("-")) || a - b);
}

function buildTrials() {
  const table = element("div");
  const counts = element("p", { class: "note", id: "rows" });
  const opened = element("section", { "aria-live": "polite" });
  const failed = element("section");
  const facts = element("section");
  let openRow = null;
  let scroller = null;

  const columns = element("details", { class: "columns" }, element("summary", {}, "columns"));
  const boxes = element("div", { class: "field-values" });
  for (const each of study.columns.filter((one) => one.key !== "name")) {
    const tick = element("input", { type: "checkbox" });
    tick.checked = shownColumns().includes(each);
    tick.addEventListener("change", () => {
      const keys = new Set(shownColumns().map((one) => one.key));
      if (tick.checked) keys.add(each.key);
      else keys.delete(each.key);
      changeView({ cols: study.columns.map((one) => one.key).filter((key) => keys.has(key)).join("~") });
    });
    boxes.append(element("label", {}, tick, each.label));
  }
  columns.append(boxes);

  const save = (label, make, ending, kind) => {
    const button = element("button", { type: "button" }, label);
    button.addEventListener("click", () => saveFile(`${study.name.replace(/[^\w.-]+/g, "_")}.${ending}`, make(study.columns, sortedRows(kept())), kind));
    return button;
  };
  const none = element("button", { type: "button" }, "choose none");
  none.addEventListener("click", () => changeView({ sel: undefined }));

  const fill = () => {
    const rows = sortedRows(filteredRows());
    const chosen = chosenRows();
    const sort = { key: (view.sort ?? "").replace(/^-/, ""), falling: (view.sort ?? "").startsWith("-") };
    const before = scroller ? [scroller.scrollTop, scroller.scrollLeft] : [0, 0];
    const focused = table.contains(document.activeElement) ? document.activeElement.closest("tr")?.dataset.row : undefined;
    scroller = trialTable({
      columns: shownColumns(),
      rows,
      sort,
      chosen,
      onSort: (key) => changeView({ sort: sort.key === key && !sort.falling ? `-${key}` : key }),
      onChoose: (row) => toggleChosen([row]),
      onOpen: (row) => {
        openRow = openRow === row ? null : row;
        showOpened();
      },
    });
    table.replaceChildren(scroller);
    [scroller.scrollTop, scroller.scrollLeft] = before;
    if (focused !== undefined) requestAnimationFrame(() => scroller.querySelector(`tr[data-row='${focused}']`)?.focus({ preventScroll: true }));
    counts.textContent = `${rows.length} of ${study.settings.length} trials${chosen.size ? `, ${chosen.size} chosen: figures show these only` : ""}. Space or a box chooses, Enter or a click opens.`;
    none.hidden = !chosen.size;
    showOpened();
    showFailed(failed);
    facts.replaceChildren(...studyFacts());
  };
  const showOpened = () => opened.replaceChildren(...(openRow === null ? [] : trialFacts(openRow)));
  slots.push({ fill });
  return [
    controls(columns, save("CSV", asCsv, "csv", "text/csv"), save("JSON", asJson, "json", "application/json"), none),
    counts,
    table,
    opened,
    failed,
    facts,
  ];
}

function listed(pairs) {
  const list = element("dl", { class: "facts" });
  for (const [term, text] of pairs) {
    if (text === null || text === undefined || text === "") continue;
    const parts = typeof text === "object" ? Object.entries(text).map(([key, value]) => `${key} ${typeof value === "string" ? value : JSON.stringify(value)}`) : [text];
    list.append(element("dt", {}, term), element("dd", {}, parts.join(", ")));
  }
  return list;
}

function trialFacts(row) {
  const skipped = new Set(["name", "why", "heartbeat"]);
  const pairs = study.columns.filter((each) => !skipped.has(each.key)).map((each) => [each.label, shownCell(each.values[row], each.kind)]);
  const made = [element("h2", {}, nameOf(row)), listed(pairs)];
  const why = column("why").values[row];
  if (why) made.push(element("pre", {}, why));
  const heard = column("heartbeat").values[row];
  if (heard && ["running", "stale"].includes(column("status").values[row])) {
    made.push(element("p", {}, `Heard of ${moment(heard)}. To stop it:`), element("pre", {}, `ssl-ray study stop ${quoted(study.uri)} ${quoted(nameOf(row))}`));
  }
  return made;
}

// As a shell takes it for one word.
function quoted(text) {
  return /^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`;
}

function showFailed(box) {
  const statuses = column("status").values;
  const rows = statuses.map((_, row) => row).filter((row) => ["failed", "stale"].includes(statuses[row]));
  if (!rows.length) {
    box.replaceChildren();
    return;
  }
  const parts = [element("h2", {}, "Failed and stale trials")];
  for (const row of rows.slice(0, FAILED_SHOWN)) {
    const why = statuses[row] === "stale" ? `Says that it runs, but was last heard of ${moment(column("heartbeat").values[row])}.` : column("why").values[row];
    const inside = element("details", {}, element("summary", {}, element("span", { class: `status ${statuses[row]}` }, statuses[row]), ` ${nameOf(row)}`));
    inside.append(element("pre", {}, why ?? "It left no error."));
    parts.push(inside);
  }
  if (rows.length > FAILED_SHOWN) parts.push(element("p", { class: "note" }, `and ${rows.length - FAILED_SHOWN} more: filter by status.`));
  // What was open stays open.
  const open = new Set([...box.querySelectorAll("details[open] summary")].map((each) => each.textContent));
  for (const each of parts) if (each.tagName === "DETAILS") each.open = open.has(each.querySelector("summary").textContent);
  box.replaceChildren(...parts);
}

function studyFacts() {
  const total = (key) => column(key).values.reduce((sum, value) => sum + (value ?? 0), 0);
  const costs = column("cost").values.filter((value) => value !== null);
  const pairs = [
    ["study", study.uri],
    ["hash", study.hash],
    ["begun", moment(study.created)],
    ["objective", `${study.objective}, ${study.mode === "near" ? `near ${study.target}` : study.mode === "max" ? "much is good" : "little is good"}`],
    ["target accuracy", study.target_accuracy === null ? null : `${+(100 * study.target_accuracy).toFixed(6)} %`],
    ["budget of a trial", study.budget],
    ["seeds", study.seeds.join(", ")],
    ["swept keys", study.swept.join(", ")],
    ["predicted", study.predicted],
    ["real", study.summary && study.summary.real],
    ["wall-clock of all trials", `${shownNumber(total("wall"))} min`],
    ["cost", costs.length ? `${shownNumber(total("cost"))} ${study.currency ?? ""}`.trim() : null],
    ["prices of an hour of a trial", study.prices],
    ["machine", study.machine],
    ["ssl_ray", study.ssl_ray],
  ];
  const base = element("details", {}, element("summary", {}, "configuration of all trials, before their settings"));
  base.append(element("pre", {}, Object.entries(study.base).map(([key, value]) => `${key}=${JSON.stringify(value)}`).join("\n")));
  return [element("h2", {}, "About the study"), listed(pairs), base];
}

function buildRepresentation() {
  const which = () => (study.rowOf.has(view.trial) ? view.trial : LIVE ? nameOf(objectiveFirst()) : Object.keys(INLINED.spectra)[0] ?? nameOf(objectiveFirst()));
  const none = { data: [], layout: { annotations: [{ xref: "paper", yref: "paper", x: 0.5, y: 0.5, showarrow: false, text: "Not stored in this file for this trial.", font: { size: 14 } }] } };
  const drawn = async () => (LIVE ? (await ask("spectrum", { study: view.study, trial: which() })).value : INLINED.spectra[which()] ?? none);
  return [
    figureSlot("Alpha and RankMe at each read-out", () => "representation"),
    controls(trialChoice("trial", "trial", which(), () => changeView({}))),
    figureSlot("Eigenspectrum of the features", () => "spectrum", drawn),
  ];
}

function buildCompare() {
  const rows = kept();
  const names = [nameOf(rows[0] ?? 0), nameOf(rows[1] ?? rows[0] ?? 0)];
  const box = element("div");
  const fill = () => {
    const pair = ["a", "b"].map((key, i) => study.rowOf.get(study.rowOf.has(view[key]) ? view[key] : names[i]));
    const settings = pair.map((row) => ({ ...study.base, ...study.settings[row], seed: column("seed").values[row] }));
    const keys = [...new Set(settings.flatMap(Object.keys))].sort();
    const differ = keys.filter((key) => JSON.stringify(settings[0][key]) !== JSON.stringify(settings[1][key]));
    const shown = (value) => (value === undefined ? "absent" : typeof value === "string" ? value : JSON.stringify(value));
    const table = (heading, lines) => {
      const body = element("tbody", {}, ...lines.map(([key, ...cells]) => element("tr", {}, element("th", { scope: "row" }, key), ...cells.map((cell) => element("td", { class: "wide-text" }, cell)))));
      const heads = [heading, ...pair.map(nameOf)].map((text) => element("th", { scope: "col", class: "wide-text" }, text));
      return element("div", { class: "scroll" }, element("table", {}, element("thead", {}, element("tr", {}, ...heads)), body));
    };
    const results = study.columns.filter((each) => !["name", "seed", "hash", "heartbeat", ...study.swept].includes(each.key));
    const lines = results.map((each) => [each.label, ...pair.map((row) => shownCell(each.values[row], each.kind).slice(-400))]).filter((line) => line[1] || line[2]);
    const only = element("button", { type: "button" }, "show only these two in all figures");
    only.addEventListener("click", () => changeView({ sel: bitsOf(pair) }));
    box.replaceChildren(
      element("h2", {}, `Configuration: ${differ.length} of ${keys.length} keys differ`),
      differ.length ? table("key", differ.map((key) => [key, shown(settings[0][key]), shown(settings[1][key])])) : element("p", {}, "No difference."),
      element("h2", {}, "Results"),
      table("", lines),
      controls(only),
    );
  };
  slots.push({ fill });
  const changed = () => changeView({});
  return [controls(trialChoice("first", "a", names[0], changed), trialChoice("second", "b", names[1], changed)), box];
}

function buildGallery() {
  const box = element("div", { class: "gallery" });
  const which = () => (study.rowOf.has(view.trial) ? view.trial : LIVE ? nameOf(objectiveFirst()) : Object.keys(INLINED.gallery.pictures)[0] ?? nameOf(0));
  const picture = (source) => {
    const image = element("img", { src: source, alt: `views of some images as trial ${which()} sees them` });
    box.replaceChildren(image, element("p", { class: "note" }, "A row is an image: first its plain view, then the m views of epoch 0, drawn from the trial's seed."));
  };
  const show = async () => {
    box.replaceChildren(element("p", {}, "drawing …"));
    const wanted = which();
    const answer = await fetch(`api/gallery?${new URLSearchParams({ study: view.study, trial: wanted })}`);
    if (wanted !== which()) return;
    if (answer.ok) picture(URL.createObjectURL(await answer.blob()));
    else box.replaceChildren(element("p", { class: "problem" }, "The pictures cannot be drawn here."), element("p", { class: "wide-text" }, (await answer.json()).error));
  };
  const draw = element("button", { type: "button" }, "draw");
  draw.addEventListener("click", () => show().catch((error) => box.replaceChildren(element("p", { class: "problem" }, error.message))));
  draw.hidden = !LIVE;
  const about = element("p", { class: "note" });
  const fill = () => {
    const row = study.rowOf.get(which());
    about.textContent = `Data: ${study.settings[row]["data.uri"] ?? study.base["data.uri"]}`;
    if (LIVE) box.replaceChildren();
    else if (INLINED.gallery.pictures[which()]) picture(INLINED.gallery.pictures[which()]);
    else box.replaceChildren(element("p", {}, INLINED.gallery.reason ?? "Not in this file for this trial."));
  };
  fill();
  return [element("h2", {}, "What the encoder sees"), controls(trialChoice("trial", "trial", which(), () => (writeView(), fill())), draw), about, box];
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
  at(`tab-${open}`).scrollIntoView({ block: "nearest", inline: "nearest" });
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
