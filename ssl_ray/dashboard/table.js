"use strict";
// A table of thousands of rows of which only those in sight are elements. Sorted by a click on a head, chosen by a box a row.

const ROW_PX = 32;
const SPARE_ROWS = 10;

function shownCell(value, kind) {
  if (value === null || value === undefined) return "";
  if (kind === "percent" || kind === "points") return (100 * value).toFixed(2);
  if (typeof value === "number") return shownNumber(value);
  return typeof value === "string" ? value : JSON.stringify(value);
}

function shownNumber(value) {
  if (Number.isInteger(value) && Math.abs(value) < 1e9) return String(value);
  return String(Number(value.toPrecision(4)));
}

// Numbers by size, then texts; what is missing is last, whatever the direction.
function compareCells(a, b, falling) {
  const absent = (value) => value === null || value === undefined;
  if (absent(a) || absent(b)) return absent(a) - absent(b);
  let order;
  if (typeof a === "number" && typeof b === "number") order = a - b;
  else order = String(shownCell(a)).localeCompare(String(shownCell(b)), "en", { numeric: true });
  return falling ? -order : order;
}

// options: columns, rows (positions in the columns' values), sort {key, falling}, chosen (a Set of positions),
// onSort(key), onChoose(position), onOpen(position). Returns the element.
function trialTable(options) {
  const { columns, rows } = options;
  const box = element("div", { class: "scroll", tabindex: "-1" });
  const table = element("table", { class: "trials", "aria-rowcount": rows.length + 1, "aria-label": "trials" });
  const group = element("colgroup");
  group.append(width(36));
  let total = 36;
  for (const column of columns) {
    let longest = 4;
    for (const row of rows) longest = Math.max(longest, shownCell(column.values[row], column.kind).length);
    const px = Math.max(Math.min(longest, 30) * 8 + (column.key === "status" ? 48 : 26), column.label.length * 9 + 40);
    total += px;
    group.append(width(px));
  }
  table.style.width = `${total}px`;
  const head = element("tr");
  head.append(element("th", { scope: "col" }, element("span", { "aria-label": "chosen" }, "☑")));
  for (const column of columns) {
    const sorted = options.sort.key === column.key;
    const arrow = sorted ? (options.sort.falling ? " ▼" : " ▲") : "";
    const button = element("button", { type: "button", title: `sort by ${column.label} (${column.key})` }, column.label + arrow);
    button.addEventListener("click", () => options.onSort(column.key));
    const state = sorted ? (options.sort.falling ? "descending" : "ascending") : "none";
    head.append(element("th", { scope: "col", "aria-sort": state, class: column.kind === "text" ? "" : "number" }, button));
  }
  const body = element("tbody");
  table.append(group, element("thead", {}, head), body);
  box.append(table);
  let active = 0;
  let first = -1;

  function fill() {
    const from = Math.max(0, Math.floor(box.scrollTop / ROW_PX) - SPARE_ROWS);
    const seen = Math.ceil((box.clientHeight || 640) / ROW_PX) + 2 * SPARE_ROWS;
    if (from === first) return;
    first = from;
    const to = Math.min(rows.length, from + seen);
    const made = [gap(from)];
    for (let i = from; i < to; i += 1) made.push(line(i));
    made.push(gap(rows.length - to));
    const held = body.contains(document.activeElement);
    body.replaceChildren(...made);
    if (held) focusRow();
  }

  function gap(count) {
    const cell = element("td", { colspan: columns.length + 1 });
    cell.style.height = `${count * ROW_PX}px`;
    return element("tr", { class: "gap", "aria-hidden": "true" }, cell);
  }

  function line(i) {
    const row = rows[i];
    const chosen = options.chosen.has(row);
    const tr = element("tr", { "aria-selected": chosen, "aria-rowindex": i + 2, tabindex: i === active ? "0" : "-1" });
    tr.dataset.row = i;
    const tick = element("input", { type: "checkbox", tabindex: "-1", "aria-label": `choose ${columns[0].values[row]}` });
    tick.checked = chosen;
    tick.addEventListener("change", () => options.onChoose(row));
    tr.append(element("td", {}, tick));
    for (const column of columns) {
      const text = shownCell(column.values[row], column.kind);
      const cell = element("td", { class: column.kind === "text" ? "" : "number", title: text.length > 28 ? text.slice(0, 400) : "" });
      if (column.key === "status") cell.append(element("span", { class: `status ${text}` }, text));
      else cell.append(text.length > 300 ? text.slice(0, 300) : text);
      tr.append(cell);
    }
    tr.addEventListener("click", (event) => {
      active = i;
      if (event.target !== tick) options.onOpen(row);
    });
    return tr;
  }

  function focusRow() {
    for (const tr of body.querySelectorAll("tr[tabindex='0']")) tr.tabIndex = -1;
    const tr = body.querySelector(`tr[data-row='${active}']`);
    if (tr) {
      tr.tabIndex = 0;
      tr.focus({ preventScroll: true });
    }
  }

  body.addEventListener("keydown", (event) => {
    const page = Math.max(1, Math.floor(box.clientHeight / ROW_PX) - 2);
    const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -rows.length, End: rows.length };
    if (event.key in steps) {
      active = Math.min(rows.length - 1, Math.max(0, active + steps[event.key]));
      const top = active * ROW_PX;
      if (top < box.scrollTop) box.scrollTop = top;
      if (top + 2 * ROW_PX > box.scrollTop + box.clientHeight) box.scrollTop = top + 2 * ROW_PX - box.clientHeight;
      fill();
      focusRow();
    } else if (event.key === " " && event.target.tagName === "TR") options.onChoose(rows[active]);
    else if (event.key === "Enter" && event.target.tagName === "TR") options.onOpen(rows[active]);
    else return;
    event.preventDefault();
  });
  box.addEventListener("scroll", fill, { passive: true });
  requestAnimationFrame(() => {
    first = -1;
    fill();
  });
  fill();
  return box;
}

function width(px) {
  const column = element("col");
  column.style.width = `${px}px`;
  return column;
}

// An element with attributes and children; texts are texts, never HTML.
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) if (value !== "" || key === "value") made.setAttribute(key, value);
  made.append(...children);
  return made;
}

// A spreadsheet takes a text that begins so for a formula.
function csvCell(value) {
  if (value === null || value === undefined) return "";
  let text = typeof value === "string" ? value : typeof value === "object" ? JSON.stringify(value) : String(value);
  if (typeof value !== "number" && /^[=+\-@\t\r]/.test(text)) text = `'${text}`;
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

function asCsv(columns, rows) {
  const lines = [columns.map((column) => csvCell(column.key)).join(",")]; // shares are shares here, not percent
  for (const row of rows) lines.push(columns.map((column) => csvCell(column.values[row])).join(","));
  return `${lines.join("\r\n")}\r\n`;
}

function asJson(columns, rows) {
  return JSON.stringify(rows.map((row) => Object.fromEntries(columns.map((column) => [column.key, column.values[row]]))), null, 1);
}

function saveFile(name, text, kind) {
  const link = element("a", { href: URL.createObjectURL(new Blob([text], { type: kind })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
