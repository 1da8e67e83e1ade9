"use strict";
// Charts: lines and stacked bars by uPlot, heat maps on a canvas. Everything from a log becomes text content, never markup.

const DARK = matchMedia("(prefers-color-scheme: dark)");
// Okabe and Ito's colors, which color-blind readers tell apart; lighter ones on a dark ground.
const PALETTES = {
  light: ["#0072b2", "#d55e00", "#009e73", "#b5528a", "#b87800", "#3a9bd1", "#5f6672", "#7a4fa3"],
  dark: ["#56b4e9", "#ff8a3d", "#2fc496", "#e39cc6", "#e6b422", "#8fd0ff", "#b3bccb", "#b99be6"],
};
const CIVIDIS = ["#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838"];
const DASHES = [[], [7, 4], [2, 3], [9, 3, 2, 3]];
const MANY = 8; // series of a chart; more get a ramp of colors
const WHOLE = Array.from({length: 40}, (_, n) => [1, 2, 5][n % 3] * 10 ** Math.floor(n / 3)); // between the labels of steps
const SYNC = uPlot.sync("steps");

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const palette = () => PALETTES[DARK.matches ? "dark" : "light"];
const color = (n) => palette()[n % palette().length];

function mixed(stops, place) {
  const at = Math.min(Math.max(place, 0), 1) * (stops.length - 1);
  const low = Math.min(Math.floor(at), stops.length - 2);
  const part = (hex, n) => parseInt(hex.slice(1 + 2 * n, 3 + 2 * n), 16);
  return [0, 1, 2].map((n) => Math.round(part(stops[low], n) + (part(stops[low + 1], n) - part(stops[low], n)) * (at - low)));
}

// One of many series: from dark to light, without the end that the ground would hide.
function ramp(n, count) {
  const place = n / Math.max(1, count - 1);
  const stops = DARK.matches ? CIVIDIS.slice(3) : CIVIDIS.slice(0, 8);
  return `rgb(${mixed(stops, place).join(",")})`;
}

function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "style") for (const [key, inner] of Object.entries(value)) made.style.setProperty(key, inner);
    else if (name === "class") made.className = value;
    else if (name in made && typeof value !== "string") made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

function shown(value, name = "") {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (name === "mfu" || name === "zeros") return `${(100 * value).toFixed(1)} %`;
  const size = Math.abs(value);
  if (value === 0) return "0";
  if (size >= 1e6) return short(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en-US");
  if (size < 1e-3) return value.toExponential(2).replace("e-", "e−").replace(/^-/, "−");
  return String(Number(value.toPrecision(4))).replace("-", "−");
}

function short(value) {
  const size = Math.abs(value);
  for (const [unit, letter] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]])
    if (size >= unit) return `${Number((value / unit).toPrecision(3))}${letter}`;
  return String(Number(value.toPrecision(3)));
}

function ticks(value, name) {
  if (value === null) return "";
  if (name === "mfu" || name === "zeros") return `${Number((100 * value).toPrecision(3))}%`;
  const size = Math.abs(value);
  if (value === 0) return "0";
  if (size >= 1e4) return short(value);
  return size < 1e-3 ? value.toExponential(0) : String(Number(value.toPrecision(4)));
}

// An average that forgets: `weight` of it stays with each point. Gaps stay gaps.
function smoothed(values, weight) {
  let sum = 0, norm = 0;
  return values.map((value) => {
    if (value === null || value === undefined) return value;
    sum = weight * sum + (1 - weight) * value;
    norm = weight * norm + (1 - weight);
    return sum / norm;
  });
}

// The last value of a curve up to a step.
function value_at({x, y}, step) {
  let low = 0, high = x.length; // of the first point after the step
  while (low < high) {
    const middle = (low + high) >> 1;
    if (x[middle] <= step) low = middle + 1;
    else high = middle;
  }
  return y[low - 1];
}

const alive = new Set(); // charts on the page
const view = {smoothing: 0.6, logX: false, logY: false, zoom: null, zoomed: () => {}}; // zoomed is called after each zoom
const resized = new ResizeObserver((entries) => {
  for (const {target} of entries) if (target.chart) target.chart.fit();
});

function zoomTo(range) {
  view.zoom = range;
  document.getElementById("whole").disabled = range === null;
  for (const chart of alive) chart.zoom();
  view.zoomed();
}

// spec: {id, title, unit, name, height, bars, marks: [{step, color}], series: [{label, color, dash, points, raw, x, y, exact: {x, y}}]}
class Chart {
  constructor(spec, selects = null) {
    this.hiddenLabels = new Set();
    this.caption = element("figcaption", {}, element("h3", {id: `title-${spec.id}`}), selects);
    this.plot = element("div", {class: "plot", tabindex: "0", role: "img"});
    this.legend = element("ul", {class: "legend"});
    this.figure = element("figure", {"aria-labelledby": `title-${spec.id}`}, this.caption, this.plot, this.legend);
    this.plot.chart = this;
    this.plot.addEventListener("keydown", (event) => this.key(event));
    this.set(spec);
    resized.observe(this.plot);
    alive.add(this);
  }

  set(spec) {
    this.spec = spec;
    const title = this.caption.querySelector("h3");
    title.replaceChildren(spec.title, spec.unit ? element("small", {}, ` ${spec.unit}`) : "");
    const tables = spec.series.map((s) => [s.x, s.y]);
    this.own = tables.length ? uPlot.join(tables) : [[]];
    const data = spec.bars ? this.stacked(this.own) : this.own;
    const signature = JSON.stringify([spec.bars, view.logX, this.isLog(), DARK.matches, spec.series.map((s) => [s.label, s.color, s.raw])]);
    if (this.u && signature === this.signature) {
      this.u.setData(this.positive(data), view.zoom === null);
      this.zoom();
    } else {
      this.signature = signature;
      this.build(data);
    }
    this.describe(null);
  }

  isLog() {
    return view.logY && !this.spec.bars && this.spec.series.some((s) => s.y.some((value) => value > 0));
  }

  positive(data) {
    const keep = (column) => column.map((value) => (value > 0 || value === undefined ? value : null));
    let [x, ...columns] = data;
    if (view.logX) {
      const first = x.findIndex((step) => step > 0);
      [x, ...columns] = [x, ...columns].map((column) => column.slice(Math.max(first, 0)));
    }
    return [x, ...(this.isLog() ? columns.map(keep) : columns)];
  }

  stacked([x, ...columns]) {
    const sum = x.map(() => 0);
    const cumulated = columns.map((column) => column.map((value, n) => (sum[n] += value || 0)));
    return [x, ...cumulated.reverse()]; // the highest is drawn first, and the others over it
  }

  build(data) {
    const {spec} = this;
    if (this.u) this.u.destroy();
    const log = this.isLog();
    const font = `12px ${getComputedStyle(document.body).fontFamily}`;
    const axis = {stroke: css("--muted"), font, grid: {stroke: css("--grid"), width: 1}, ticks: {show: false}};
    const count = spec.series.length;
    const series = spec.series.map((s, n) => {
      const own = spec.bars ? spec.series[count - 1 - n] : s;
      const base = {label: own.label, stroke: own.color, width: own.raw ? 1 : own.width || 2, spanGaps: false, points: {show: false}};
      if (spec.bars) return {...base, fill: own.color, width: 0, paths: uPlot.paths.bars({size: [0.8, 60]})};
      if (own.raw) base.alpha = 0.28;
      if (own.dash) base.dash = own.dash;
      const few = own.x.length < 40 && (own.points || own.x.length < 2);
      if (few) base.points = {show: true, size: 6, fill: own.color, stroke: own.color};
      return base;
    });
    const options = {
      width: Math.max(this.plot.clientWidth, 200), height: spec.height || 220, legend: {show: false},
      padding: [10, 12, 0, 0], series: [{}, ...series],
      scales: {
        x: {time: false, distr: view.logX ? 3 : 1, range: (u, low, high) => this.steps(low, high)},
        y: {distr: log ? 3 : 1, range: (u, low, high) => this.values(low, high, log)},
      },
      axes: [
        {...axis, size: 28, ...(view.logX ? {} : {incrs: WHOLE}), values: (u, all) => all.map((value) => ticks(value, "step")), space: 60},
        {...axis, size: (u, all) => Math.max(44, 14 + 7.2 * Math.max(0, ...(all || []).map((text) => text.length))),
          values: (u, all) => all.map((value) => ticks(value, spec.name)), space: 34},
      ],
      cursor: {
        sync: {key: SYNC.key, setSeries: false}, drag: {x: true, y: false, setScale: false}, points: {size: 7},
        bind: {dblclick: () => () => (zoomTo(null), null)},
      },
      hooks: {
        setSelect: [(u) => this.selected(u)],
        setCursor: [(u) => this.describe(u.cursor.idx)],
        draw: [(u) => this.mark(u)],
      },
    };
    this.plot.replaceChildren();
    this.u = new uPlot(options, this.positive(data), this.plot);
    this.zoom();
    this.build_legend();
  }

  steps(low, high) {
    if (view.zoom) return view.zoom;
    if (low === null) return [0, 1];
    if (this.spec.bars) {
      const [x] = this.own;
      const half = x.length > 1 ? (x[x.length - 1] - x[0]) / (x.length - 1) / 2 : 0.5;
      return [low - half, high + half];
    }
    return low === high ? [low - 0.5, high + 0.5] : [low, high];
  }

  values(low, high, log) {
    if (low === null) return [0, 1];
    if (this.spec.bars) return [0, high * 1.05 || 1];
    if (log) return [low / 1.08, high * 1.08];
    const flat = high - low <= 1e-6 * Math.max(Math.abs(low), Math.abs(high)); // rounding is no curve
    const room = flat ? Math.abs(high) * 0.05 || 1 : (high - low) * 0.06;
    return [low >= 0 && low - room < 0 ? 0 : low - room, high + room];
  }

  fit() {
    const width = Math.floor(this.plot.clientWidth);
    if (this.u && width > 0 && width !== this.u.width) this.u.setSize({width, height: this.spec.height || 220});
  }

  zoom() {
    const [x] = this.u.data;
    const [min, max] = view.zoom || (x.length ? this.steps(x[0], x[x.length - 1]) : [0, 1]);
    this.u.setScale("x", {min, max});
  }

  selected(u) {
    if (u.select.width < 4) return;
    const range = [u.posToVal(u.select.left, "x"), u.posToVal(u.select.left + u.select.width, "x")];
    u.setSelect({left: 0, top: 0, width: 0, height: 0}, false);
    zoomTo(range);
  }

  // Small triangles at the top, where something happened.
  mark(u) {
    const {ctx, bbox} = u;
    for (const {step, color} of this.spec.marks || []) {
      const x = u.valToPos(step, "x", true);
      if (!(x >= bbox.left && x <= bbox.left + bbox.width)) continue;
      const size = 5 * devicePixelRatio;
      ctx.save();
      ctx.fillStyle = ctx.strokeStyle = color;
      ctx.globalAlpha = 0.35;
      ctx.setLineDash([3 * devicePixelRatio, 4 * devicePixelRatio]);
      ctx.beginPath();
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bbox.top + bbox.height);
      ctx.stroke();
      ctx.globalAlpha = 1;
      ctx.beginPath();
      ctx.moveTo(x - size, bbox.top - size);
      ctx.lineTo(x + size, bbox.top - size);
      ctx.lineTo(x, bbox.top + size);
      ctx.fill();
      ctx.restore();
    }
  }

  build_legend() {
    const {spec} = this;
    this.outputs = [];
    const items = spec.series.map((s, n) => {
      if (s.raw) return null;
      const sign = element("i", {class: spec.bars ? "square" : s.dash && s.dash.length ? "dashed" : "", style: {"--c": s.color}});
      const output = element("output");
      this.outputs.push([output, n]);
      const button = element("button", {type: "button", "aria-pressed": "true"}, sign, element("span", {}, s.label), output);
      button.disabled = Boolean(spec.bars);
      button.addEventListener("click", () => this.toggle(s.label, button));
      if (this.hiddenLabels.has(s.label)) this.toggle(s.label, button, true);
      return element("li", {}, button);
    });
    this.legend.replaceChildren(...items.filter(Boolean));
  }

  toggle(label, button, off = button.getAttribute("aria-pressed") === "true") {
    button.setAttribute("aria-pressed", String(!off));
    this.hiddenLabels[off ? "add" : "delete"](label);
    this.spec.series.forEach((s, n) => s.label === label && this.u.setSeries(n + 1, {show: !off}));
  }

  // Values under the cursor in the legend, or the newest ones.
  describe(at) {
    const newest = at === null || at === undefined;
    const step = newest ? this.own[0][this.own[0].length - 1] : this.u.data[0][at];
    const texts = [];
    for (const [output, n] of this.outputs || []) {
      const {label, exact, x, y} = this.spec.series[n];
      output.textContent = shown(value_at(exact || {x, y}, step), this.spec.name); // before it is smoothed
      texts.push(`${label || "value"} ${output.textContent}`);
    }
    const text = `${this.spec.title}, step ${step ?? "none"}: ${texts.slice(0, 12).join(", ")}`;
    if (newest) this.plot.setAttribute("aria-label", `${text}. Arrow keys read values, plus and minus zoom, 0 shows all.`);
    return text;
  }

  key(event) {
    const {u} = this;
    const count = u.data[0].length;
    if (!count || event.ctrlKey || event.metaKey || event.altKey) return;
    const at = u.cursor.idx ?? count - 1;
    const stride = event.shiftKey ? Math.max(1, Math.round(count / 20)) : 1;
    const [low, high] = [u.scales.x.min, u.scales.x.max];
    const place = u.data[0][at];
    const moves = {ArrowLeft: at - stride, ArrowRight: at + stride, Home: 0, End: count - 1};
    if (event.key in moves) {
      const next = Math.min(Math.max(moves[event.key], 0), count - 1);
      const left = u.valToPos(u.data[0][next], "x");
      u.setCursor({left, top: u.cursor.top >= 0 ? u.cursor.top : 20}, true);
      document.getElementById("spoken").textContent = this.describe(next);
    } else if (event.key === "+" || event.key === "=") {
      const half = (high - low) / 4;
      zoomTo([Math.max(low, place - half), Math.min(high, place + half)]);
    } else if (event.key === "-") {
      const half = high - low;
      const first = u.data[0][0], last = u.data[0][count - 1];
      const range = [Math.max(first, place - half), Math.min(last, place + half)];
      zoomTo(range[0] <= first && range[1] >= last ? null : range);
    } else if (event.key === "0" || event.key === "Escape") zoomTo(null);
    else return;
    event.preventDefault();
  }

  remove() {
    alive.delete(this);
    resized.unobserve(this.plot);
    if (this.u) this.u.destroy();
    this.figure.remove();
  }
}

// Rows of numbers around 1 as colors. rows: [{label, values}], one value for each of `steps`.
class HeatMap {
  constructor(id, selects) {
    this.title = element("h3", {id: `title-${id}`});
    this.canvas = element("canvas", {class: "heat", tabindex: "0", role: "img"});
    this.labels = element("div", {class: "heat-labels", "aria-hidden": "true"});
    this.axis = element("div", {class: "axis"});
    this.bar = element("i", {style: {background: `linear-gradient(90deg, ${CIVIDIS.join(",")})`}});
    this.low = element("span");
    this.high = element("span");
    this.output = element("output");
    this.figure = element("figure", {class: "wide", "aria-labelledby": `title-${id}`},
      element("figcaption", {}, this.title, selects),
      element("div", {class: "heat-row"}, this.labels, element("div", {}, this.canvas, this.axis)),
      element("div", {class: "scale"}, this.low, this.bar, this.high, this.output));
    this.canvas.addEventListener("mousemove", (event) => {
      const box = this.canvas.getBoundingClientRect();
      this.point(Math.floor((event.clientX - box.left) / box.width * this.steps.length),
        Math.floor((event.clientY - box.top) / box.height * this.rows.length));
    });
    this.canvas.addEventListener("keydown", (event) => {
      const moves = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]};
      if (!(event.key in moves)) return;
      event.preventDefault();
      const [right, down] = moves[event.key];
      this.point(this.column + right, this.row + down);
      document.getElementById("spoken").textContent = this.output.textContent;
    });
  }

  set(title, steps, rows) {
    Object.assign(this, {steps, rows});
    this.title.textContent = title;
    const top = Math.max(2, ...rows.flatMap((row) => row.values));
    const height = Math.max(8, Math.min(26, Math.floor(320 / rows.length)));
    this.canvas.width = steps.length;
    this.canvas.height = rows.length;
    this.canvas.style.height = this.labels.style.height = `${height * rows.length}px`;
    const context = this.canvas.getContext("2d");
    const image = context.createImageData(steps.length, rows.length);
    rows.forEach((row, y) => row.values.forEach((value, x) => {
      image.data.set([...mixed(CIVIDIS, value / top), 255], 4 * (y * steps.length + x));
    }));
    context.putImageData(image, 0, 0);
    const stride = Math.ceil(rows.length * 14 / (height * rows.length));
    this.labels.replaceChildren(...rows.map((row, n) => element("span", {}, n % stride ? "" : row.label)).filter((_, n) => n % stride === 0));
    this.axis.replaceChildren(element("span", {}, `step ${steps[0]}`), element("span", {}, `step ${steps[steps.length - 1]}`));
    this.low.textContent = "0×";
    this.high.textContent = `${Number(top.toPrecision(2))}× its even share`;
    this.point(this.column ?? steps.length - 1, this.row ?? 0);
  }

  point(column, row) {
    this.column = Math.min(Math.max(column, 0), this.steps.length - 1);
    this.row = Math.min(Math.max(row, 0), this.rows.length - 1);
    const {label, values} = this.rows[this.row];
    this.output.textContent = `step ${this.steps[this.column]}, ${label}: ${shown(values[this.column])}×`;
    this.canvas.setAttribute("aria-label", `${this.title.textContent}. ${this.output.textContent}. Arrow keys read values.`);
  }
}
