"use strict";
// Charts on canvas: a band from least to most, a line of means, values under the pointer, dragging to look closer.

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

const PAD = { left: 68, right: 10, top: 8, bottom: 22 };

/** Round steps between `low` and `high`, about `count` of them. */
function ticks(low, high, count) {
  const span = high - low;
  if (!(span > 0)) return [low];
  const raw = span / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw) ?? raw;
  const found = [];
  for (let i = Math.ceil(low / step); i * step <= high + step * 1e-9; i++) found.push(i * step);
  return found;
}

/** Powers of ten and, where they are few, their doubles and fives. */
function logTicks(low, high) {
  const found = [];
  const few = Math.log10(high / low) < 3;
  for (let p = Math.floor(Math.log10(low)); p <= Math.ceil(Math.log10(high)); p++) {
    for (const m of few ? [1, 2, 5] : [1]) {
      const v = m * 10 ** p;
      if (v >= low && v <= high) found.push(v);
    }
  }
  return found.length > 1 ? found : ticks(low, high, 4);
}

/** Exponential mean that begins unbiased and passes over gaps; `weight` of the past. */
function smoothed(values, weight) {
  if (!(weight > 0)) return values;
  let sum = 0, mass = 0;
  return values.map((v) => {
    if (v === null || !Number.isFinite(v)) return v;
    sum = weight * sum + (1 - weight) * v;
    mass = weight * mass + (1 - weight);
    return sum / mass;
  });
}

/** Index of the value nearest to `x` in ascending `xs`. */
function nearest(xs, x) {
  let low = 0, high = xs.length - 1;
  while (low < high) {
    const mid = (low + high) >> 1;
    if (xs[mid] < x) low = mid + 1;
    else high = mid;
  }
  return low > 0 && x - xs[low - 1] < xs[low] - x ? low - 1 : low;
}

class Chart {
  /** `lines()` gives [{name, colour, xs, mean, min, max, dots}], `said(texts)` shows what is under the pointer. */
  constructor(canvas, options) {
    this.canvas = canvas;
    this.options = options;
    this.at = null;
    this.drag = null;
    const place = (e) => e.clientX - canvas.getBoundingClientRect().left;
    canvas.addEventListener("pointermove", (e) => {
      this.at = place(e);
      this.draw();
      this.options.hover?.(this);
    });
    canvas.addEventListener("pointerdown", (e) => {
      if (e.pointerType === "mouse" && e.button === 0) this.drag = place(e);
    });
    canvas.addEventListener("pointerup", (e) => {
      const from = this.drag;
      this.drag = null;
      if (from === null || Math.abs(place(e) - from) < 6) return this.draw();
      this.options.zoom(...[from, place(e)].map((p) => this.x(p)).sort((a, b) => a - b));
    });
    canvas.addEventListener("pointerleave", () => {
      this.at = this.drag = null;
      this.draw();
    });
    canvas.addEventListener("dblclick", () => this.options.zoom(null, null));
    canvas.tabIndex = 0;
    canvas.addEventListener("keydown", (e) => {
      const move = { ArrowLeft: -8, ArrowRight: 8 }[e.key];
      if (!move) return;
      e.preventDefault();
      this.at = Math.min(Math.max((this.at ?? canvas.clientWidth) + move, PAD.left), canvas.clientWidth - PAD.right);
      this.draw();
    });
    new ResizeObserver(() => this.draw()).observe(canvas);
  }

  /** Value on the horizontal axis at a place. */
  x(place) {
    const { low, high, width } = this.scale;
    const inside = Math.min(Math.max(place - PAD.left, 0), width);
    return low + ((high - low) * inside) / width;
  }

  draw() {
    const { canvas, options } = this;
    const ratio = window.devicePixelRatio || 1;
    const [w, h] = [canvas.clientWidth, canvas.clientHeight];
    if (w < 80 || h < 60) return;
    if (canvas.width !== Math.round(w * ratio)) canvas.width = Math.round(w * ratio);
    if (canvas.height !== Math.round(h * ratio)) canvas.height = Math.round(h * ratio);
    const c = canvas.getContext("2d");
    c.setTransform(ratio, 0, 0, ratio, 0, 0);
    c.clearRect(0, 0, w, h);
    c.font = "11px system-ui, sans-serif";
    const lines = options.lines().filter((l) => l.xs.length > 0);
    const [width, height] = [w - PAD.left - PAD.right, h - PAD.top - PAD.bottom];
    let [low, high, least, most] = [Infinity, -Infinity, Infinity, -Infinity];
    const range = options.range();
    for (const l of lines) {
      low = Math.min(low, l.xs[0]);
      high = Math.max(high, l.xs[l.xs.length - 1]);
    }
    if (range) [low, high] = range;
    if (!(high > low)) high = low + 1;
    for (const l of lines) {
      for (const values of [l.min ?? l.mean, l.max ?? l.mean]) {
        for (let i = 0; i < values.length; i++) {
          const v = values[i];
          if (v === null || v === undefined || l.xs[i] < low || l.xs[i] > high) continue;
          if (options.log() && !(v > 0)) continue;
          least = Math.min(least, v);
          most = Math.max(most, v);
        }
      }
    }
    this.scale = { low, high, width };
    if (!(most >= least)) {
      c.fillStyle = css("--soft");
      c.fillText("nothing yet", PAD.left, h / 2);
      return options.said("");
    }
    if (most === least) [least, most] = options.log() ? [least / 2, most * 2] : [least - (Math.abs(least) || 1) / 2, most + (Math.abs(most) || 1) / 2];
    const log = options.log() && least > 0;
    const f = log ? Math.log : (v) => v;
    const px = (x) => PAD.left + (width * (x - low)) / (high - low);
    const py = (v) => PAD.top + height * (1 - (f(v) - f(least)) / (f(most) - f(least)));
    this.axes(c, { w, h, width, height, low, high, least, most, log, px, py });
    c.save();
    c.beginPath();
    c.rect(PAD.left, PAD.top - 2, width, height + 4);
    c.clip();
    const fine = (v) => v !== null && v !== undefined && (!log || v > 0);
    for (const l of lines) this.line(c, l, px, py, fine);
    c.restore();
    this.pointer(c, lines, h, px, py, fine);
  }

  axes(c, { w, h, width, height, low, high, least, most, log, px, py }) {
    c.strokeStyle = css("--line");
    c.fillStyle = css("--soft");
    c.lineWidth = 1;
    c.textAlign = "right";
    c.textBaseline = "middle";
    for (const v of log ? logTicks(least, most) : ticks(least, most, 5)) {
      const y = Math.round(py(v)) + 0.5;
      c.beginPath();
      c.moveTo(PAD.left, y);
      c.lineTo(PAD.left + width, y);
      c.stroke();
      c.fillText(this.options.text(v), PAD.left - 6, y);
    }
    c.textAlign = "center";
    c.textBaseline = "top";
    for (const x of ticks(low, high, Math.max(2, Math.floor(width / 90)))) {
      c.fillText(this.options.xText(x), Math.min(Math.max(px(x), PAD.left + 12), w - 20), h - PAD.bottom + 6);
    }
  }

  line(c, l, px, py, fine) {
    c.fillStyle = c.strokeStyle = l.colour;
    if (l.min && l.max) {
      c.globalAlpha = 0.22;
      c.beginPath();
      let from = 0;
      for (let i = 0; i <= l.xs.length; i++) {
        if (i < l.xs.length && fine(l.min[i]) && fine(l.max[i])) continue;
        for (let k = from; k < i; k++) {
          if (k === from) c.moveTo(px(l.xs[k]), py(l.max[k]));
          else c.lineTo(px(l.xs[k]), py(l.max[k]));
        }
        for (let k = i - 1; k >= from; k--) c.lineTo(px(l.xs[k]), py(l.min[k]));
        if (i > from) c.closePath();
        from = i + 1;
      }
      c.fill();
      c.globalAlpha = 1;
    }
    c.lineWidth = 1.5;
    c.lineJoin = "round";
    c.beginPath();
    let on = false;
    for (let i = 0; i < l.xs.length; i++) {
      if (!fine(l.mean[i])) { on = false; continue; }
      if (on) c.lineTo(px(l.xs[i]), py(l.mean[i]));
      else c.moveTo(px(l.xs[i]), py(l.mean[i]));
      on = true;
    }
    if (!l.dots) c.stroke();
    if (l.dots || l.xs.length === 1) {
      for (let i = 0; i < l.xs.length; i++) {
        if (!fine(l.mean[i])) continue;
        c.beginPath();
        c.arc(px(l.xs[i]), py(l.mean[i]), 3, 0, 7);
        c.fill();
      }
    }
  }

  pointer(c, lines, h, px, py, fine) {
    if (this.drag !== null && this.at !== null) {
      c.fillStyle = css("--accent");
      c.globalAlpha = 0.15;
      c.fillRect(Math.min(this.drag, this.at), PAD.top, Math.abs(this.at - this.drag), h - PAD.top - PAD.bottom);
      c.globalAlpha = 1;
    }
    if (this.at === null) return this.options.said(this.options.latest());
    const x = this.x(this.at);
    const said = [];
    let place = this.at;
    for (const l of lines) {
      const i = nearest(l.xs, x);
      if (!fine(l.mean[i])) continue;
      if (!said.length) { said.push(this.options.xSays(l.xs[i])); place = px(l.xs[i]); }
      const spread = l.min && l.max && l.max[i] > l.min[i] ? ` (${this.options.text(l.min[i])} to ${this.options.text(l.max[i])})` : "";
      said.push(`${l.name} ${this.options.text(l.mean[i])}${spread}`);
      c.fillStyle = l.colour;
      c.beginPath();
      c.arc(px(l.xs[i]), py(l.mean[i]), 3.5, 0, 7);
      c.fill();
    }
    c.strokeStyle = css("--soft");
    c.beginPath();
    c.moveTo(place, PAD.top);
    c.lineTo(place, h - PAD.bottom);
    c.stroke();
    this.options.said(said.join("  "));
  }
}
