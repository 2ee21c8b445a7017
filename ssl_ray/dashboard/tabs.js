"use strict";
// What each tab holds.

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

// The best of the chosen trials; in a file, of those of which it holds something.
function firstOf(held) {
  const best = nameOf(objectiveFirst());
  return !held || best in held ? best : Object.keys(held)[0] ?? best;
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
        const link = element("a", { href: `#${new URLSearchParams({ study: row.study, tab: "trials" })}` }, row.study === "." ? row.name : row.study);
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

// Of an object its keys and values, those that are null left out.
function inWords(value) {
  if (typeof value === "number") return shownNumber(value);
  if (typeof value !== "object") return `${value}`;
  const there = Object.entries(value).filter(([, each]) => each !== null);
  return there.map(([key, each]) => (typeof each === "object" ? `${key} (${inWords(each)})` : `${key} ${inWords(each)}`)).join(", ");
}

function listed(pairs) {
  const list = element("dl", { class: "facts" });
  for (const [term, text] of pairs) {
    if (text === null || text === undefined || text === "") continue;
    list.append(element("dt", {}, term), element("dd", {}, inWords(text)));
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
  const which = () => (study.rowOf.has(view.trial) ? view.trial : firstOf(INLINED?.spectra));
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
  const setting = (row) => JSON.stringify(study.settings[row]);
  const other = rows.find((row) => setting(row) !== setting(rows[0])) ?? rows[1] ?? rows[0];
  const names = [nameOf(rows[0] ?? 0), nameOf(other ?? 0)];
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
  const which = () => (study.rowOf.has(view.trial) ? view.trial : firstOf(INLINED?.gallery.pictures));
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

