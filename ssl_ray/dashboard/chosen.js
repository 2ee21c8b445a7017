"use strict";
// Which trials the figures show: the filter and the selection of `view`.

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

