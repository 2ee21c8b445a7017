"use strict";
// What is left of a figure when only some trials are chosen: pure functions, no page.
//
// A trace says in meta.trials whose results it shows, and customdata has for each point the positions of its trials in that list.
// A mean over trials of which some are chosen is computed anew; what cannot be (intervals, best beta, importance) is left out and
// counted, and a page that has a server asks it for the figure of the chosen ones.

// Of a trial, by figure, what the axes show the means of. column: a function from the key of a column to one from names to values.
function meansOf(figure, study, column) {
  const accuracy = column(study.accuracy);
  switch (figure) {
    case "dim": return { y: column(study.objective) };
    case "pareto-minutes": return { x: column("readout_minutes"), y: (name) => 1 - accuracy(name) };
    case "pareto-cost": return { x: column("cost"), y: (name) => 1 - accuracy(name) };
    case "map-accuracy": return { z: accuracy };
    default: return null;
  }
}

function mean(values) {
  return values.reduce((sum, value) => sum + value, 0) / values.length;
}

// The figure with the trials in `keep` (a Set of names) only, and how many points and traces could not be computed anew.
function restricted(figure, drawn, keep, study, column) {
  const means = meansOf(figure, study, column);
  const data = [];
  let lost = 0;
  for (const trace of drawn.data) {
    if (!trace.meta || !trace.meta.trials) {
      if (figure !== "beta") data.push(trace); // the laws are those of all trials
    } else if (!trace.customdata) {
      lost += 1;
      data.push(trace);
    } else if (trace.type === "heatmap") {
      const made = restrictedMap(trace, keep, means);
      lost += made.lost;
      data.push(made.trace);
    } else if (!["best", "front"].includes(trace.meta.derived) || figure === "beta") {
      const made = restrictedPoints(trace, keep, trace.meta.derived === "band" ? null : means);
      lost += made.lost;
      if (made.trace.x.length) data.push(made.trace);
    } else data.push(trace);
  }
  if (figure === "beta") data.push(...laws(data));
  const remade = data.map((trace) => {
    if (trace.meta && trace.meta.derived === "best" && figure === "dim") return bestLine(trace, data, study);
    if (trace.meta && trace.meta.derived === "front") return frontLine(trace, data);
    return trace;
  });
  return { data: remade, layout: drawn.layout, lost };
}

function positions(of) {
  return Array.isArray(of) ? of : [of];
}

function restrictedPoints(trace, keep, means) {
  const there = trace.meta.trials.map((name) => keep.has(name));
  const kept = [];
  const x = [];
  const y = [];
  const who = [];
  let lost = 0;
  trace.customdata.forEach((of, i) => {
    const mine = positions(of).filter((position) => there[position]);
    if (!mine.length) return;
    const whole = mine.length === positions(of).length;
    if (!whole && !means) {
      lost += 1;
      return;
    }
    const names = mine.map((position) => trace.meta.trials[position]);
    kept.push(i);
    x.push(whole || !means.x ? trace.x[i] : mean(names.map(means.x)));
    y.push(whole || !means.y ? trace.y[i] : mean(names.map(means.y)));
    who.push(whole ? of : mine);
  });
  const pick = (values) => (Array.isArray(values) && values.length === trace.customdata.length ? kept.map((i) => values[i]) : values);
  const made = { ...trace, x, y, customdata: who, text: pick(trace.text) };
  if (Array.isArray(made.text)) {
    made.text = made.text.map((text, i) => (who[i] === trace.customdata[kept[i]] ? text : `${text}<br>here the mean of ${who[i].length} of them`));
  }
  if (trace.error_y) {
    const bars = (values) => kept.map((i, at) => (who[at] === trace.customdata[i] ? values[i] : null));
    made.error_y = { ...trace.error_y, array: bars(trace.error_y.array), arrayminus: bars(trace.error_y.arrayminus) };
  }
  if (trace.marker) {
    made.marker = { ...trace.marker };
    for (const key of ["color", "opacity", "size", "symbol"]) made.marker[key] = pick(trace.marker[key]);
  }
  return { trace: made, lost };
}

function restrictedMap(trace, keep, means) {
  const there = trace.meta.trials.map((name) => keep.has(name));
  const z = [];
  const text = [];
  let lost = 0;
  trace.customdata.forEach((row, i) => {
    z.push([]);
    text.push([]);
    row.forEach((of, j) => {
      const mine = of.filter((position) => there[position]);
      const whole = mine.length === of.length;
      const again = mine.length && !whole && means;
      const value = whole ? trace.z[i][j] : again ? mean(mine.map((position) => means.z(trace.meta.trials[position]))) : null;
      if (mine.length && !whole && !means) lost += 1;
      z[i].push(value);
      text[i].push(whole ? trace.text[i][j] : again ? `${(100 * value).toFixed(1)} %` : "");
    });
  });
  return { trace: { ...trace, z, text }, lost };
}

function better(a, b, study) {
  if (study.mode === "near") return Math.abs(a - study.target) < Math.abs(b - study.target);
  return study.mode === "max" ? a > b : a < b;
}

// The best of the means at each d.
function bestLine(trace, data, study) {
  const best = new Map();
  for (const other of data) {
    if (!other.meta || !other.customdata || other.meta.derived) continue;
    other.x.forEach((d, i) => {
      const there = best.get(d);
      if (there === undefined || better(other.y[i], there, study)) best.set(d, other.y[i]);
    });
  }
  const widths = [...best.keys()].sort((a, b) => a - b);
  return { ...trace, x: widths, y: widths.map((d) => best.get(d)), customdata: undefined };
}

// beta = c / d and the line that fits best through the best betas, as ssl_ray.study.analysis has them, without intervals.
function laws(data) {
  const points = data.flatMap((trace) => trace.x.map((d, i) => [Math.log(d), Math.log(trace.y[i])]));
  if (!points.length) return [];
  const x = points.map(([d]) => d);
  const c = Math.exp(mean(points.map(([d, beta]) => d + beta)));
  const ends = [Math.exp(Math.min(...x)), Math.exp(Math.max(...x))];
  const line = (y, name, dash) => ({ type: "scatter", mode: "lines", x: ends, y, name, line: { color: "#888888", dash, width: 1.5 }, hoverinfo: "name" });
  const made = [line(ends.map((d) => c / d), `β = c / d, c = ${shownNumber(c)}`, "dot")];
  const middle = [mean(x), mean(points.map(([, beta]) => beta))];
  const spread = mean(x.map((d) => (d - middle[0]) ** 2));
  if (spread > 1e-12) {
    const slope = mean(points.map(([d, beta]) => (d - middle[0]) * (beta - middle[1]))) / spread;
    const y = ends.map((d) => Math.exp(middle[1] + slope * (Math.log(d) - middle[0])));
    made.push(line(y, `fit, slope ${slope.toFixed(2)}`, "dash"));
  }
  return made;
}

// The points than which no other is as cheap and as good; what they dominate is dimmed.
function frontLine(trace, data) {
  const points = [];
  for (const other of data) {
    if (!other.meta || !other.customdata || other.meta.derived) continue;
    other.x.forEach((x, i) => points.push({ x, y: other.y[i], marker: other.marker, i }));
  }
  points.sort((a, b) => a.x - b.x || a.y - b.y);
  const front = [];
  for (const point of points) {
    const last = front[front.length - 1];
    const on = !last || point.y < last.y || (point.y === last.y && point.x === last.x);
    if (on) front.push(point);
    if (Array.isArray(point.marker.opacity)) point.marker.opacity[point.i] = on ? 1 : 0.35;
  }
  return { ...trace, x: front.map((point) => point.x), y: front.map((point) => point.y), customdata: undefined };
}
