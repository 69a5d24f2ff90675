"use strict";
// Draws what the server tells. Nothing is asked of anybody else, nothing is kept but what is on the screen.

const COLOURS = 8;
const CURVES = [
  ["loss", "Loss", (v) => v.toPrecision(5)],
  ["grad_norm", "Gradient norm", (v) => v.toPrecision(4)],
  ["tokens_per_s", "Tokens per second", count],
  ["mfu", "Model FLOPs utilisation", (v) => `${(100 * v).toFixed(1)} %`],
  ["lr", "Learning rate", (v) => (v === 0 ? "0" : v.toExponential(2))],
  ["step_s", "Seconds of a step", seconds],
  ["exposed_comm_s", "Waiting for other ranks", seconds],
  ["memory_bytes", "Memory of rank 0", bytes],
];
/** Columns of a point as the server appends them. */
const COLUMNS = ["loss", "grad_norm", "lr", "tokens_per_s", "mfu", "memory_bytes", "step_s", "exposed_comm_s", "mtp_loss"];
/** Points appended to a curve before neighbours are left to the server to gather. */
const APPENDED_MAX = 4096;

const runs = [];
const charts = new Map();
let zoomed = null;
let dirty = false;

const $ = (id) => document.getElementById(id);

/** An element; `children` are elements or text, never markup. */
function el(name, attributes = {}, ...children) {
  const e = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "style") for (const [k, v] of Object.entries(value)) e.style.setProperty(k, v);
    else if (key.startsWith("on")) e.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) e.setAttribute(key, value === true ? "" : value);
  }
  e.append(...children.filter((c) => c !== null && c !== undefined));
  return e;
}

function count(v) {
  for (const [unit, size] of [["T", 1e12], ["B", 1e9], ["M", 1e6], ["k", 1e3]]) if (Math.abs(v) >= 0.9995 * size) return `${(v / size).toPrecision(3)}${unit}`;
  return Number.isInteger(v) ? String(v) : v.toPrecision(3);
}

function bytes(v) {
  for (const [unit, size] of [["TiB", 2 ** 40], ["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10]]) if (v >= size) return `${(v / size).toPrecision(4)} ${unit}`;
  return `${v} B`;
}

function seconds(s) {
  if (s >= 86400) return `${Math.floor(s / 86400)} d ${Math.round((s % 86400) / 3600)} h`;
  if (s >= 3600) return `${Math.floor(s / 3600)} h ${Math.round((s % 3600) / 60)} min`;
  if (s >= 100) return `${Math.floor(s / 60)} min ${Math.round(s % 60)} s`;
  if (s >= 1) return `${s.toPrecision(3)} s`;
  if (s >= 1e-3) return `${(1e3 * s).toPrecision(3)} ms`;
  return `${(1e6 * s).toPrecision(3)} µs`;
}

const clock = (ms) => new Date(ms).toLocaleString();
const colour = (i) => `var(--c${i % COLOURS})`;

// ---- what the server tells

function whole(message) {
  const run = (runs[message.run] ??= { shown: true });
  run.facts = message.facts;
  run.evals = message.evals;
  run.columns = columns(message.curves);
}

/** Series by name, with the places that they are drawn over. */
function columns(curves) {
  const series = Object.fromEntries(curves.series.map((s) => [s.name, s]));
  return { step: curves.step, tokens: curves.tokens, time: curves.time_ms, series, width: curves.step.length };
}

function points(message) {
  const run = runs[message.run];
  if (!run?.columns) return;
  const c = run.columns;
  for (const [step, tokens, time, ...values] of message.points) {
    c.step.push(step);
    c.tokens.push(tokens);
    c.time.push(time);
    values.forEach((v, i) => {
      let s = c.series[COLUMNS[i]];
      if (!s) {
        if (v === null) return;
        const before = c.step.length - 1;
        s = c.series[COLUMNS[i]] = { name: COLUMNS[i], mean: Array(before).fill(null) };
      }
      s.mean.push(v);
      s.min?.push(v);
      s.max?.push(v);
    });
    const latest = run.facts.latest ?? (run.facts.latest = {});
    Object.assign(latest, { step, tokens, time_ms: time }, Object.fromEntries(values.map((v, i) => [COLUMNS[i], v])));
  }
  if (c.step.length > c.width + APPENDED_MAX) c.width = c.step.length;
}

function listen() {
  const wide = Math.min(1024, Math.max(300, Math.round(window.innerWidth / 2)));
  const source = new EventSource(`/api/live?points=${wide}`);
  const told = (name, take) =>
    source.addEventListener(name, (e) => {
      take(JSON.parse(e.data));
      redraw();
    });
  told("whole", whole);
  told("points", points);
  told("facts", (all) => all.forEach((m) => Object.assign(runs[m.run] ?? {}, { facts: m.facts, evals: m.evals })));
  source.onopen = () => link("live", "live");
  source.onerror = () => link("lost", "connection lost, trying again");
}

function link(state, text) {
  $("link").className = state;
  $("link").textContent = text;
}

/** Once a frame at most, however fast the server tells. */
function redraw() {
  if (dirty) return;
  dirty = true;
  requestAnimationFrame(() => {
    dirty = false;
    showRuns();
    for (const chart of charts.values()) chart.draw();
    slowly();
    document.documentElement.dataset.ready = "yes";
  });
}

let slowAt = 0;
/** Tables need not follow every step. */
function slowly() {
  const now = performance.now();
  if (now - slowAt < 500) {
    setTimeout(slowly, 520 - (now - slowAt));
    return;
  }
  slowAt = now;
  showRanks();
  showNotes();
}

// ---- cards of runs

function showRuns() {
  const box = $("runs");
  while (box.children.length < runs.length) box.append(card(box.children.length));
  runs.forEach((run, i) => {
    if (run?.facts) fill(box.children[i], run);
  });
}

function card(i) {
  const tick = el("input", { type: "checkbox", "aria-label": "draw this run", onchange: (e) => { runs[i].shown = e.target.checked; redraw(); } });
  tick.checked = true;
  const name = el("span", { class: "name" });
  return el("article", { class: "run", "data-run": i, style: { "--run": colour(i) } },
    el("header", {}, el("h3", {}, el("label", {}, tick, name)), el("span", { class: "tag" })),
    el("p", { class: "where" }), el("ul", { class: "facts" }), el("div", { class: "bar", hidden: true }, el("i")), el("div", { class: "words" }));
}

function fill(box, { facts: f }) {
  const put = (selector, text) => {
    const e = box.querySelector(selector);
    if (e.textContent !== text) e.textContent = text;
    return e;
  };
  const state = f.silent_s ? "silent" : f.state;
  put(".name", f.name);
  put(".tag", state === "silent" ? `silent for ${seconds(f.silent_s)}` : state).className = `tag ${state}`;
  const s = f.started;
  put(".where", s ? `${f.dir}: ${count(s.parameters)} parameters, ${s.world} rank${s.world === 1 ? "" : "s"}, ${s.host}, ${s.device}, version ${s.version}` : `${f.dir}: no record yet`);
  const l = f.latest ?? {};
  const rows = [["step", "step", f.steps_wanted ? `${l.step ?? 0} of ${f.steps_wanted}` : l.step]];
  for (const [key, title, text] of CURVES) {
    if (l[key] !== null && l[key] !== undefined) rows.push([key, { tokens_per_s: "tokens/s", mfu: "MFU", grad_norm: "gradient norm", step_s: "a step", exposed_comm_s: "of it waiting", memory_bytes: "memory" }[key] ?? title.toLowerCase(), text(l[key])]);
  }
  if (Number.isFinite(l.mtp_loss)) rows.push(["mtp_loss", "loss of one token more", l.mtp_loss.toPrecision(5)]);
  if (l.step && l.loss === null) rows.push(["loss", "loss", "not finite"]);
  if (f.eval) rows.push(["eval", `held out, step ${f.eval.step}`, f.eval.loss === null ? "not finite" : f.eval.loss.toFixed(4)]);
  if (l.tokens) rows.push(["tokens", "tokens", count(l.tokens)]);
  if (f.goodput !== null) rows.push(["goodput", "goodput", `${(100 * f.goodput).toFixed(1)} %`]);
  const restarts = Object.values(f.restarts).reduce((a, b) => a + b, 0);
  if (restarts) rows.push(["restarts", "restarts", restarts]);
  if (f.eta_s !== null) rows.push(["eta", "to go", seconds(f.eta_s)]);
  const list = box.querySelector(".facts");
  for (const [key, title, value] of rows) {
    let item = list.querySelector(`[data-fact="${key}"]`);
    if (!item) list.append((item = el("li", { "data-fact": key }, el("b"), el("span"))));
    item.firstChild.textContent = String(value ?? "-");
    item.lastChild.textContent = title;
  }
  for (const item of [...list.children]) if (!rows.some(([key]) => key === item.dataset.fact)) item.remove();
  const bar = box.querySelector(".bar");
  bar.hidden = !f.steps_wanted;
  if (f.steps_wanted) bar.firstChild.style.width = `${Math.min(100, (100 * (l.step ?? 0)) / f.steps_wanted)}%`;
  words(box.querySelector(".words"), f);
}

function words(box, f) {
  const said = [];
  if (f.preview) said.push(["", `reading the journal, ${Math.round((100 * f.read_bytes) / Math.max(1, f.of_bytes))} %: curves are samples until then`]);
  const failed = f.state === "failed" && f.notes.findLast((n) => n.kind === "failed");
  if (failed) said.push(["bad", `failed at step ${failed.step}: ${failed.text}`]);
  if (f.ranks_total > 1 && f.state === "running" && f.ranks_alive < f.ranks_total) said.push(["warn", `${f.ranks_alive} of ${f.ranks_total} ranks wrote lately`]);
  for (const s of f.stragglers.slice(0, 3)) said.push(["warn", `rank ${s.rank} is slow, ${s.factor.toFixed(2)} times: ${s.why}`]);
  if (f.damage.lines) said.push(["warn", `${f.damage.lines} damaged line${f.damage.lines === 1 ? "" : "s"} passed over, the first ${f.damage.first}`]);
  const unknown = Object.entries(f.unknown);
  if (unknown.length) said.push(["warn", `records of a newer version passed over: ${unknown.map(([k, n]) => `${k} (${n})`).join(", ")}`]);
  const key = JSON.stringify(said);
  if (box.dataset.key === key) return;
  box.dataset.key = key;
  box.replaceChildren(...said.map(([how, text]) => el("p", { class: `word ${how}` }, text)));
}

// ---- curves

const over = () => $("x").value;

/** Places of a column of points: steps, tokens, or hours since the run's first point. */
function places(run, c) {
  if (over() === "step") return c.step;
  if (over() === "tokens") return c.tokens;
  const origin = run.columns.time[0] ?? 0;
  return (c.time ?? c.time_ms).map((t) => (t - origin) / 3.6e6);
}

function lines(key) {
  const weight = Number($("smooth").value) / 100;
  const found = [];
  runs.forEach((run, i) => {
    if (!run?.columns || !run.shown) return;
    const c = zoomed?.columns[i] ?? run.columns;
    const s = c.series[key];
    const tint = css(`--c${i % COLOURS}`);
    const name = runs.length > 1 ? run.facts.name : key === "loss" ? "training" : "";
    if (s) found.push({ name, colour: tint, xs: places(run, c), mean: smoothed(s.mean, weight), min: s.min, max: s.max });
    const ahead = key === "loss" && c.series.mtp_loss;
    if (ahead) found.push({ name: `${runs.length > 1 ? `${name} ` : ""}one token more`, colour: css(`--c${(i + 2) % COLOURS}`), xs: places(run, c), mean: smoothed(ahead.mean, weight), min: ahead.min, max: ahead.max });
    const held = key === "loss" && run.evals?.series[0];
    if (held) found.push({ name: `${runs.length > 1 ? `${name} ` : ""}held out`, colour: css(`--c${(i + 1) % COLOURS}`), xs: places(run, { ...run.evals, time: run.evals.time_ms }), mean: held.mean, dots: held.mean.length < 200 });
  });
  return found;
}

function makeCharts() {
  for (const [key, title, text] of CURVES) {
    const says = el("span", { class: "says", "aria-live": "off" });
    const canvas = el("canvas", { role: "img", "aria-label": title });
    $("curves").append(el("figure", { class: "chart", "data-curve": key }, el("figcaption", {}, el("h3", {}, title), says), canvas));
    charts.set(key, new Chart(canvas, {
      lines: () => lines(key),
      log: () => $("log").checked,
      range: () => zoomed?.range ?? null,
      text,
      xText: (x) => (over() === "time" ? `${Number(x.toPrecision(4))} h` : count(x)),
      xSays: (x) => (over() === "time" ? `${x.toFixed(3)} h` : `${over() === "step" ? "step " : ""}${over() === "step" ? x : count(x)}${over() === "tokens" ? " tokens" : ""}`),
      said: (t) => { if (says.textContent !== t) says.textContent = t; },
      latest: () => {
        const all = runs.filter((r) => r?.shown && Number.isFinite(r.facts?.latest?.[key]));
        return all.map((r) => `${runs.length > 1 ? `${r.facts.name} ` : ""}${text(r.facts.latest[key])}`).join("  ");
      },
      zoom,
    }));
  }
}

/** Looks closer at a range, with finer points from the server; without one, at everything. */
async function zoom(from, to) {
  zoomed = from === null || !(to > from) ? null : { range: [from, to], columns: {} };
  $("all").hidden = !zoomed;
  redraw();
  const mine = zoomed;
  if (!mine) return;
  await Promise.all(runs.map(async (run, i) => {
    const xs = places(run, run.columns);
    if (!xs.length) return;
    const [a, b] = [nearest(xs, from), nearest(xs, to)];
    const [first, last] = [run.columns.step[Math.max(0, a - 1)], run.columns.step[Math.min(xs.length - 1, b + 1)]];
    const answer = await fetch(`/api/curves?run=${i}&from=${first}&to=${last}&points=1024`);
    if (!answer.ok || zoomed !== mine) return;
    mine.columns[i] = columns(await answer.json());
    redraw();
  }));
}

// ---- tables

function table(head, rows, caption) {
  const cell = (c) => (c instanceof Node ? el("td", {}, c) : el("td", { class: typeof c === "object" ? c.class : null }, String(typeof c === "object" ? c.text : c)));
  return el("div", { class: "rows", tabindex: 0, role: "region", "aria-label": caption },
    el("table", {}, el("thead", {}, el("tr", {}, ...head.map((h) => el("th", { scope: "col", class: h.startsWith(">") ? "n" : null }, h.replace(/^>/, ""))))),
      el("tbody", {}, ...rows.map((r) => el("tr", { "data-row": r[0]?.text ?? r[0] }, ...r.map(cell))))));
}

const n = (text) => ({ class: "n", text });

/** Replaces what a box shows if `key` changed. */
function put(box, key, make) {
  if (box.dataset.key === key) return;
  box.dataset.key = key;
  const at = box.querySelector(".rows")?.scrollTop ?? 0;
  box.replaceChildren(...make());
  const rows = box.querySelector(".rows");
  if (rows) rows.scrollTop = at;
}

const heading = (run, i) => (runs.length > 1 ? [el("h3", { class: "of", style: { "--run": colour(i) } }, run.facts.name)] : []);

function showRanks() {
  const all = runs.map((r) => r?.facts).filter(Boolean);
  const several = all.some((f) => f.ranks_total > 1);
  $("s-ranks").hidden = !several;
  if (!several) return;
  put($("ranks"), JSON.stringify(all.map((f) => [f.ranks, f.ranks_total])), () => runs.flatMap((run, i) => {
    const f = run.facts;
    if (f.ranks_total < 2) return [];
    const axes = [...new Set(f.ranks.flatMap((r) => Object.keys(r.waits_s)))].sort();
    const slow = new Set(f.stragglers.map((s) => s.rank));
    const most = Math.max(...f.ranks.map((r) => r.step_s), 1e-9);
    const rows = f.ranks.map((r) => {
      const busy = Math.max(0, r.step_s - r.wait_s);
      const meter = el("span", { class: "meter", role: "img", "aria-label": `${seconds(busy)} busy, ${seconds(r.wait_s)} waiting` },
        el("span", { class: "part", style: { width: `${(100 * busy) / most}%`, background: slow.has(r.rank) ? "var(--bad)" : "var(--c0)" } }),
        el("span", { class: "part", style: { width: `${(100 * r.wait_s) / most}%`, background: "var(--c1)" } }));
      return [n(r.rank), r.host, n(r.step), n(seconds(r.step_s)), n(seconds(busy)), n(seconds(r.wait_s)),
        ...axes.map((a) => n(r.waits_s[a] === undefined ? "-" : seconds(r.waits_s[a]))), n(bytes(r.memory_bytes)), meter];
    });
    const left = f.ranks_total - f.ranks.length;
    return [...heading(run, i), el("p", { class: "says2" }, `Means over the last steps. Blue computes, orange waits for others${slow.size ? "; red keeps the others waiting" : ""}.${left > 0 ? ` ${left} more ranks are not shown.` : ""}`),
      table([">rank", "host", ">step", ">a step", ">computes", ">waits", ...axes.map((a) => `>on ${a}`), ">memory", ""], rows, "Ranks")];
  }));
}

function showNotes() {
  put($("notes"), JSON.stringify(runs.map((r) => r?.facts?.notes)), () => runs.flatMap((run, i) => {
    if (!run?.facts) return [];
    const lost = Object.entries(run.facts.lost_s).filter(([, s]) => s > 0).map(([cause, s]) => `${cause} ${seconds(s)}`);
    const restarts = Object.entries(run.facts.restarts).map(([how, k]) => `${k} after it was ${how}`);
    const said = [...(restarts.length ? [`Started again: ${restarts.join(", ")}.`] : []), ...(lost.length ? [`Seconds that did not count: ${lost.join(", ")}.`] : [])];
    const rows = run.facts.notes.slice().reverse().map((e) => [{ class: "n", text: clock(e.time_ms) }, n(e.step), e.kind, { class: "wide", text: e.text }]);
    return [...heading(run, i), ...(said.length ? [el("p", { class: "says2" }, said.join(" "))] : []),
      table([">when", ">step", "what", ""], rows, "What happened")];
  }));
}

// ---- the last recorded step

async function showLine() {
  const boxes = { line: [], ops: [] };
  const keys = [];
  for (const [i, run] of runs.entries()) {
    if (!run?.facts?.recorded) continue;
    const answer = await fetch(`/api/timeline?run=${i}`);
    if (!answer.ok) continue;
    const t = await answer.json();
    if (!t.ranks.length) continue;
    keys.push([i, t.step]);
    boxes.line.push(...heading(run, i), ...timeline(t));
    boxes.ops.push(...heading(run, i), ...ops(t));
  }
  $("s-line").hidden = $("s-ops").hidden = !keys.length;
  put($("line"), JSON.stringify(keys), () => boxes.line);
  put($("ops"), JSON.stringify(keys), () => boxes.ops);
  for (const c of $("line").querySelectorAll("canvas")) c.paint();
}

function timeline(t) {
  const LANE = 13, GAP = 8;
  const says = el("p", { class: "says2" });
  const rest = `Step ${t.step}, ${seconds(t.length_us / 1e6)}; above computes, below talks.${t.left_out ? ` ${t.left_out} ranks are not drawn.` : ""} Idle: ${t.ranks.slice(0, 8).map((r) => `rank ${r.rank} ${((100 * r.idle_us) / Math.max(1, t.length_us)).toFixed(1)} %`).join(", ")}`;
  says.textContent = rest;
  const canvas = el("canvas", { role: "img", "aria-label": `What ranks did in step ${t.step}` });
  const height = t.ranks.length * (2 * LANE + GAP);
  canvas.style.height = `${height}px`;
  const left = 52;
  canvas.paint = () => {
    const ratio = window.devicePixelRatio || 1, w = canvas.clientWidth;
    if (w < 80) return;
    canvas.width = w * ratio;
    canvas.height = height * ratio;
    const c = canvas.getContext("2d");
    c.scale(ratio, ratio);
    c.font = "11px system-ui, sans-serif";
    c.textBaseline = "middle";
    const tints = Array.from({ length: COLOURS }, (_, i) => css(`--c${i}`));
    t.ranks.forEach((r, i) => {
      const y = i * (2 * LANE + GAP);
      c.fillStyle = css("--soft");
      c.fillText(`rank ${r.rank}`, 0, y + LANE);
      c.fillStyle = css("--free");
      c.fillRect(left, y, w - left, 2 * LANE);
      for (const [lane, at] of [[r.compute, y], [r.comm, y + LANE]]) for (const [from, to, name] of lane) {
        c.fillStyle = tints[name % COLOURS];
        const x = left + ((w - left) * from) / t.length_us;
        c.fillRect(x, at, Math.max(0.5, ((w - left) * (to - from)) / t.length_us), LANE - 1);
      }
    });
  };
  canvas.addEventListener("pointermove", (e) => {
    const box = canvas.getBoundingClientRect();
    const us = ((e.clientX - box.left - left) / (box.width - left)) * t.length_us;
    const row = Math.floor((e.clientY - box.top) / (2 * LANE + GAP));
    const r = t.ranks[row];
    const lane = r && ((e.clientY - box.top) % (2 * LANE + GAP) < LANE ? r.compute : r.comm);
    const hit = lane?.find(([from, to]) => from <= us && us < to);
    says.textContent = hit ? `rank ${r.rank}: ${t.names[hit[2]]}, ${seconds((hit[1] - hit[0]) / 1e6)}, ${seconds(hit[0] / 1e6)} into the step` : rest;
  });
  canvas.addEventListener("pointerleave", () => { says.textContent = rest; });
  new ResizeObserver(() => canvas.paint()).observe(canvas);
  return [says, canvas];
}

function ops(t) {
  const rows = t.ops.map((o) => {
    const ratio = o.planned_s ? (o.measured_s / o.planned_s).toFixed(2) : "-";
    return [o.name, n(o.rank), n(o.runs), n(o.planned_s === null ? "-" : seconds(o.planned_s)), n(seconds(o.measured_s)), n(ratio)];
  });
  return [...(t.unplanned ? [el("p", { class: "says2" }, `Nothing was planned of them: ${t.unplanned}.`)] : []),
    table(["op", ">rank", ">runs", ">planned", ">measured", ">ratio"], rows, "Ops")];
}

makeCharts();
for (const id of ["x", "smooth", "log"]) $(id).addEventListener("input", () => {
  $("smooth-said").textContent = $("smooth").value === "0" ? "off" : `${$("smooth").value} %`;
  if (id === "x") zoom(null, null);
  redraw();
});
$("all").addEventListener("click", () => zoom(null, null));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { redraw(); showLine(); });
for (const kind of ["error", "unhandledrejection", "securitypolicyviolation"]) addEventListener(kind, (e) => {
  document.documentElement.dataset.error = String(e.message ?? e.reason ?? e.violatedDirective);
});
$("s-ranks").hidden = $("s-line").hidden = $("s-ops").hidden = true;
listen();
(async () => {
  for (;;) {
    // While nobody looks at the page, nobody is asked.
    if (!document.hidden) await showLine().catch(() => {});
    await new Promise((done) => setTimeout(done, $("s-line").hidden ? 1000 : 4000));
  }
})();
