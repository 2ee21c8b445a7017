"use strict";
// Places for figures, and what fills them.

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

