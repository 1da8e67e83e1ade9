"use strict";
// The page: runs as cards, their curves in groups of charts, and tables. Live from the server, or from the data of a report.

const POLL_MILLISECONDS = 2000;
const TITLES = {
  loss: ["Loss", "nats per token"], lr: ["Learning rate"], grad_norm: ["Gradient norm", "before clipping"],
  tokens_per_second: ["Speed", "tokens per second"], mfu: ["MFU", "share of the peak rate"], perplexity: ["Perplexity"],
  bits_per_byte: ["Bits per byte"], accuracy: ["Accuracy", "next token"], skipped_steps: ["Skipped steps", "so far"],
  ema_loss: ["Loss of averaged weights", "nats per token"], phases: ["Phases", "seconds"], tokens: ["Tokens", "per validation"],
  "expert_load/max_violation": ["Busiest expert", "excess over its even share"],
  "expert_load/entropy": ["Evenness of the experts", "1: even"], "expert_load/dead": ["Experts without tokens"],
};
const GROUPS = [
  ["Loss", /^(loss$|loss_by|perplexity|accuracy|bits_per_byte|[^/]*_loss$)/],
  ["Evaluations", /^eval\//],
  ["Optimizer and speed", /^(lr|grad_norm|param_norm|update_norm|tokens_per_second|mfu|phases|.*_seconds)$/],
  ["Norms and statistics", /(^|_)norms?(\/|$)|^activations|^attention/],
  ["Experts", /^(expert|router|moe|balance)/],
  ["Data", /^sources/],
  ["More", /./],
];
const FIRST = ["loss", "bits_per_byte", "perplexity", "accuracy", "lr", "grad_norm", "tokens_per_second", "mfu"];
const EXACT = new Set(["lr", "skipped_steps", "tokens", "tokens_per_second", "mfu", "expert_load/dead"]); // without noise, or averages already
const CLOSED = new Set(["More"]);
const KINDS = {spike: "Spike", "not finite": "Not finite", skipped: "Skipped", "went back": "Went back", resumed: "Resumed",
  stalled: "Stalled", error: "Error", stopped: "Stopped", finished: "Finished"};
const MARKED = new Set(["spike", "not finite", "skipped", "went back", "resumed", "stalled", "error", "stopped"]);

const page = {runs: [], hidden: new Set(), charts: new Map(), choices: new Map(), groups: new Map(), written: null};
const $ = (id) => document.getElementById(id);
const visible = () => page.runs.filter((run) => run && !page.hidden.has(run.number));

function title_of(chart) {
  if (TITLES[chart]) return TITLES[chart];
  const text = chart.replace(/^eval\//, "").replace(/_/g, " ").replace(/\//g, " · ");
  const words = text.replace(/\bmoe\b/g, "MoE").replace(/\blr\b/g, "learning rate").replace(/\bgrad\b/g, "gradient");
  return [words.charAt(0).toUpperCase() + words.slice(1)];
}

// Choices above a chart, which survive updates. They appear where there is something to choose.
function select(key, label, options, update) {
  if (options.length < 2) return null;
  const made = element("select", {"aria-label": label}, ...options.map(([value, text]) => element("option", {value: String(value)}, text)));
  const before = page.choices.get(key);
  if (options.some(([value]) => String(value) === before)) made.value = before;
  made.addEventListener("change", () => (page.choices.set(key, made.value), update()));
  return made;
}

const chosen = (key, options) => {
  const before = page.choices.get(key);
  const found = options.find(([value]) => String(value) === before) || options[0];
  return found ? found[0] : undefined;
};

// Cards.

const PARTS = [
  ["Loss", (s) => shown(s.loss)],
  ["Validation", (s) => shown(s.val_loss), (s) => (s.best_val_loss !== null && s.best_val_loss !== s.val_loss ? `best ${shown(s.best_val_loss)}` : "")],
  ["Step", (s) => s.step.toLocaleString("en-US"), (s) => (s.max_steps ? `of ${s.max_steps.toLocaleString("en-US")}` : "")],
  ["Tokens/s", (s) => shown(s.tokens_per_second)],
  ["MFU", (s) => shown(s.mfu, "mfu")],
  ["Tokens so far", (s) => (s.tokens === null ? "–" : short(s.tokens)), (s) => (s.samples === null ? "" : `${short(s.samples)} samples`)],
];

function duration(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return seconds < 172800 ? `${(seconds / 3600).toFixed(1)} h` : `${Math.round(seconds / 86400)} days`;
}

function card(run) {
  const s = run.summary;
  const several = page.runs.length > 1;
  const box = element("input", {type: "checkbox", checked: !page.hidden.has(run.number)});
  box.addEventListener("change", () => {
    page.hidden[box.checked ? "delete" : "add"](run.number);
    draw();
    $("runs").querySelectorAll("input")[run.number]?.focus();
  });
  const name = several ? element("label", {}, box, run.name) : run.name;
  const when = s.state === "running" && s.seconds_left !== null ? `${duration(s.seconds_left)} left` : "";
  const age = s.age !== null && !page.written ? `last line ${duration(s.age)} ago` : "";
  const done = s.max_steps ? Math.min(100, 100 * s.step / s.max_steps) : 0;
  const warnings = [
    s.problem,
    s.damaged ? `${s.damaged.toLocaleString("en-US")} damaged or half-written line${s.damaged === 1 ? "" : "s"} passed over` : "",
    s.left_out ? `${s.left_out.toLocaleString("en-US")} curves left out` : "",
    s.read < 1 ? `reading the log: ${Math.floor(100 * s.read)} %` : "",
  ].filter(Boolean);
  const facts = PARTS.map(([label, value, more]) => element("div", {}, element("dt", {}, label),
    element("dd", {}, value(s), more && more(s) ? element("small", {}, more(s)) : null)));
  return element("article", {class: page.hidden.has(run.number) ? "card off" : "card", style: {"--run": color(run.number)}},
    element("div", {class: "top"}, element("h2", {}, name), element("span", {class: `state ${s.state}`}, s.state)),
    element("p", {class: "path"}, [run.path, when, age].filter(Boolean).join(" · ")),
    element("div", {class: "bar", role: "progressbar", "aria-label": `progress of ${run.name}`, "aria-valuemin": "0",
      "aria-valuemax": "100", "aria-valuenow": String(Math.round(done))}, element("i", {style: {width: `${done}%`}})),
    element("dl", {class: "facts"}, ...facts),
    ...warnings.map((text) => element("p", {class: "warning"}, text)));
}

// Charts.

// The curves of all visible runs by chart: {chart: [{run, stage, series, curve}]}.
function curves_by_chart() {
  const found = new Map();
  for (const run of visible()) {
    for (const curve of (view.zoom && run.detail) || run.curves) {
      if (!found.has(curve.chart)) found.set(curve.chart, []);
      found.get(curve.chart).push({run, ...curve});
    }
  }
  return found;
}

const natural = new Intl.Collator("en", {numeric: true}).compare;

function line_series(chart, curves) {
  const several = visible().length > 1;
  const names = [...new Set(curves.map((curve) => curve.series))].sort(natural);
  const stages = new Set(curves.map((curve) => curve.stage));
  const options = names.map((name) => [name, name]);
  const only = several && names.length > 1 ? chosen(`series ${chart}`, options) : null;
  const made = [];
  for (const curve of curves) {
    if (only !== null && curve.series !== only) continue;
    const measured = curve.stage !== "train";
    const place = names.indexOf(curve.series);
    let own = names.length > MANY ? ramp(place, names.length) : color(place);
    if (several) own = color(curve.run.number);
    else if (names.length === 1 && measured && stages.size > 1) own = color(1);
    const stage = curve.stage === "val" ? "validation" : curve.stage === "train" ? "training" : "";
    const label = [several ? curve.run.name : "", several ? "" : curve.series, stages.size > 1 || (names.length === 1 && !several) ? stage : ""]
      .filter(Boolean).join(" · ") || stage || chart;
    const base = {label, color: own, points: true, dash: measured && stages.size > 1 && (several || names.length > 1) ? DASHES[1] : []};
    const weight = measured || EXACT.has(chart) || curve.x.length < 20 ? 0 : view.smoothing;
    if (weight > 0) {
      if (names.length === 1 || only !== null) made.push({...base, raw: true, x: curve.x, y: curve.y});
      made.push({...base, exact: curve, x: curve.mean_x || curve.x, y: smoothed(curve.mean_y || curve.y, weight)});
    } else made.push({...base, x: curve.x, y: curve.y});
  }
  // Faint lines first, and validation over training.
  return {series: [...made.filter((s) => s.raw), ...made.filter((s) => !s.raw)], choices: several && names.length > 1 ? options : []};
}

function bar_series(chart, curves) {
  const runs = visible().filter((run) => curves.some((curve) => curve.run === run)).map((run) => [run.number, run.name]);
  const number = chosen(`run ${chart}`, runs);
  const own = curves.filter((curve) => curve.run.number === number).sort((a, b) => natural(a.series, b.series));
  const all = own.length > MANY;
  const series = own.map((curve, n) => ({label: curve.series || chart, color: all ? ramp(n, own.length) : color(n), x: curve.x, y: curve.y}));
  return {series, choices: runs};
}

function marks() {
  return visible().flatMap((run) => run.events.filter((event) => MARKED.has(event.kind))
    .map((event) => ({step: event.step, color: visible().length > 1 ? color(run.number) : css("--warn")})));
}

function place_chart(grid, chart, curves) {
  const bars = chart === "phases";
  const {series, choices} = bars ? bar_series(chart, curves) : line_series(chart, curves);
  const key = `${bars ? "run" : "series"} ${chart}`;
  const [title, unit] = title_of(chart);
  const wide = chart === "loss" || bars;
  const spec = {id: `chart-${chart.replace(/[^a-z0-9]/gi, "-")}`, title, unit, name: chart, series, bars,
    height: wide ? 320 : 210, marks: chart === "loss" ? marks() : []};
  const before = page.charts.get(chart);
  const signature = JSON.stringify(choices);
  if (before && before.choiceSignature === signature && before.figure.parentNode === grid) {
    before.set(spec);
    return;
  }
  if (before) before.remove();
  const made = new Chart(spec, select(key, bars ? "Run" : "Curve", choices, draw));
  made.choiceSignature = signature;
  if (wide) made.figure.classList.add("wide");
  page.charts.set(chart, made);
  grid.append(made.figure);
  requestAnimationFrame(() => made.fit());
}

function group(name, open = true) {
  if (!page.groups.has(name)) {
    const count = element("small");
    const grid = element("div", {class: "grid"});
    const details = element("details", {class: "group", open}, element("summary", {}, element("h2", {}, name), count), grid);
    details.addEventListener("toggle", () => details.open && draw_charts());
    page.groups.set(name, {details, grid, count});
  }
  return page.groups.get(name);
}

function draw_charts() {
  const found = curves_by_chart();
  const order = (chart) => (FIRST.includes(chart) ? FIRST.indexOf(chart) : FIRST.length);
  const charts = [...found.keys()].sort((a, b) => order(a) - order(b) || natural(a, b));
  const rest = new Set(charts);
  for (const [name, rule] of GROUPS) {
    const own = charts.filter((chart) => rest.has(chart) && rule.test(chart));
    own.forEach((chart) => rest.delete(chart));
    const heat = name === "Experts" && visible().some((run) => run.loads.length);
    const made = group(name, !CLOSED.has(name));
    made.details.hidden = !own.length && !heat;
    made.count.textContent = `${own.length + heat} chart${own.length + heat === 1 ? "" : "s"}`;
    if (!made.details.open || made.details.hidden) continue;
    own.forEach((chart) => place_chart(made.grid, chart, found.get(chart)));
    if (heat) draw_heat(made.grid);
  }
  for (const [chart, made] of page.charts) {
    if (!found.has(chart)) {
      made.remove();
      page.charts.delete(chart);
    }
  }
}

function draw_heat(grid) {
  const runs = visible().filter((run) => run.loads.length).map((run) => [run.number, run.name]);
  const run = page.runs[chosen("heat run", runs)];
  const layers = [["all", "All layers: busiest expert"], ...run.loads.map(({layer}) => [layer, `${layer}: each expert`])];
  const layer = chosen("heat layer", layers);
  const signature = JSON.stringify([runs, layers]);
  if (!page.heat || page.heatSignature !== signature) {
    if (page.heat) page.heat.figure.remove();
    page.heat = new HeatMap("heat", element("div", {class: "selects"}, select("heat run", "Run", runs, draw), select("heat layer", "Layer", layers, draw)));
    page.heatSignature = signature;
  }
  if (page.heat.figure.parentNode !== grid) grid.prepend(page.heat.figure);
  const one = run.loads.find((entry) => entry.layer === layer);
  if (one) {
    const rows = one.shares[0].map((_, expert) => ({label: `expert ${expert}`, values: one.shares.map((shares) => shares[expert] ?? 0)}));
    page.heat.set(`Load of each expert, ${layer}`, one.steps, rows);
    return;
  }
  const most = run.loads.reduce((a, b) => (b.steps.length > a.steps.length ? b : a));
  const rows = run.loads.map((entry) => ({label: entry.layer, values: most.steps.map((_, n) => Math.max(...(entry.shares[n] || [0])))}));
  page.heat.set("Load of the busiest expert, by layer", most.steps, rows);
}

// Tables.

function table(heads, rows, numbers = [], name = "") {
  const cell = (tag, content, n) => element(tag, {class: numbers.includes(n) ? "number" : "", ...(tag === "th" ? {scope: "col"} : {})}, content);
  return element("table", {class: name}, element("thead", {}, element("tr", {}, ...heads.map((text, n) => cell("th", text, n)))),
    element("tbody", {}, ...rows.map((row) => element("tr", {}, ...row.map((content, n) => cell("td", content, n))))));
}

function panel(run, ...content) {
  const head = page.runs.length > 1 ? element("h3", {}, element("i", {class: "dot"}), run.name) : null;
  return element("div", {class: "panel", style: {"--run": color(run.number)}}, head, ...content);
}

function section(name, content, open = true) {
  const made = group(name, open);
  made.grid.className = "grid";
  made.details.hidden = !content.length;
  if (content.length) made.grid.replaceChildren(...content);
}

function bytes(size) {
  return size >= 1e9 ? `${(size / 1e9).toFixed(2)} GB` : `${(size / 1e6).toFixed(size < 1e7 ? 2 : 0)} MB`;
}

function stamp(seconds) {
  return seconds === null ? "–" : `${new Date(1000 * seconds).toISOString().slice(0, 16).replace("T", " ")} UTC`;
}

function differences(runs) {
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.config)))].sort();
  const differing = names.filter((name) => new Set(runs.map((run) => run.config[name])).size > 1);
  if (!differing.length) return element("div", {class: "panel note"}, "The configurations are the same.");
  return element("div", {class: "panel"}, table(["Option", ...runs.map((run) => run.name)],
    differing.map((name) => [element("code", {}, name), ...runs.map((run) => run.config[name] ?? "–")])));
}

function options(run) {
  const rows = Object.entries(run.config).map(([name, value]) => [element("code", {}, name), value]);
  const whole = table(["Option", "Value"], rows);
  const filter = element("input", {type: "search", class: "filter", placeholder: "Find an option", "aria-label": "Find an option"});
  filter.addEventListener("input", () => whole.querySelectorAll("tbody tr").forEach((row) => {
    row.hidden = !row.textContent.toLowerCase().includes(filter.value.toLowerCase());
  }));
  const facts = table(["Fact", "Value"], Object.entries(run.facts).map(([name, value]) => [element("code", {}, name), value]));
  return panel(run, element("details", {}, element("summary", {}, `${rows.length} options`), filter, whole),
    element("details", {}, element("summary", {}, "Versions, revision, command"), facts));
}

function draw_tables() {
  const runs = visible();
  const happened = runs.filter((run) => run.events.length).map((run) => panel(run, table(["Step", "What", ""],
    run.events.map((event) => [event.step.toLocaleString("en-US"), element("span", {class: `kind ${event.kind}`}, KINDS[event.kind] || event.kind), event.text]), [0], "narrow")));
  section("What happened", happened);
  section("Texts", runs.filter((run) => run.texts.length).map((run) => panel(run, ...run.texts.slice().reverse().flatMap((text) =>
    [element("p", {class: "note"}, `step ${text.step} · ${text.name}`), element("pre", {}, text.text)]))));
  section("Messages", runs.filter((run) => run.messages.length).map((run) => panel(run, table(["Time", "Step", "Message"],
    run.messages.slice().reverse().map(({time, step, text}) => [stamp(time), step.toLocaleString("en-US"), text]), [1], "narrow"))), false);
  section("Checkpoints", runs.filter((run) => run.checkpoints.length).map((run) => panel(run, table(["Step", "Size", "Written"],
    run.checkpoints.map((c) => [c.step.toLocaleString("en-US"), bytes(c.size), stamp(c.written)]), [0, 1], "narrow"))));
  section("Differences between the runs", runs.length > 1 ? [differences(runs)] : []);
  if (!document.activeElement?.classList.contains("filter")) section("Configuration", runs.map(options));
}

// Updates.

function draw() {
  $("runs").replaceChildren(...page.runs.filter(Boolean).map(card));
  $("runs").classList.toggle("single", page.runs.length === 1);
  const names = visible().map((run) => run.name);
  document.title = `${names.slice(0, 3).join(", ") || "runs"} – Tinytron`;
  draw_charts();
  draw_tables();
}

function place_groups() {
  $("charts").append(...GROUPS.slice(0, 1).map(([name]) => group(name).details), group("What happened").details,
    ...GROUPS.slice(1).map(([name]) => group(name, !CLOSED.has(name)).details));
  $("tables").append(...["Texts", "Checkpoints", "Differences between the runs", "Configuration", "Messages"].map((name) => group(name, name !== "Messages").details));
}

function controls() {
  $("smoothing").addEventListener("input", (event) => {
    view.smoothing = Number(event.target.value);
    $("smoothing-value").textContent = view.smoothing.toFixed(2);
    draw_charts();
  });
  for (const [id, name] of [["log-y", "logY"], ["log-x", "logX"]]) {
    $(id).addEventListener("change", (event) => {
      view[name] = event.target.checked;
      draw_charts();
    });
  }
  $("whole").addEventListener("click", () => zoomTo(null));
  $("controls").addEventListener("submit", (event) => event.preventDefault());
  DARK.addEventListener("change", draw);
}

function say(text, kind) {
  if ($("status").textContent !== text) $("status").textContent = text;
  $("status").className = kind;
}

async function fetched(path) {
  const answer = await fetch(path, {cache: "no-store"});
  if (!answer.ok) throw new Error(`${path}: ${answer.status}`);
  return answer.json();
}

// The curves of a long run have a point for many steps. For the steps that are shown, ask the server for more.
async function refine() {
  const zoom = view.zoom;
  try {
    for (const run of page.runs) {
      if (!zoom || !run.curves.some((curve) => curve.mean_x)) run.detail = null;
      else run.detail = (await fetched(`api/runs/${run.number}?first=${zoom[0].toFixed(3)}&last=${zoom[1].toFixed(3)}`)).curves;
      if (view.zoom !== zoom) return; // a later zoom asks itself
    }
    draw_charts();
  } catch (error) {
    console.info(error); // the next poll says that the server is away
  }
}

async function poll() {
  try {
    const {runs} = await fetched("api/runs");
    let changed = false;
    for (const [number, {version, summary}] of runs.entries()) {
      if (page.runs[number]?.version === version) page.runs[number].summary = summary;
      else {
        page.runs[number] = {...(await fetched(`api/runs/${number}`)), number};
        changed = true;
      }
    }
    if (changed) draw();
    if (changed && view.zoom) refine();
    else if (!$("runs").contains(document.activeElement)) $("runs").replaceChildren(...page.runs.map(card));
    const going = runs.filter((run) => run.summary.state === "running").length;
    say(going ? `live, ${going} running` : "connected", "live");
  } catch (error) {
    console.info(error);
    say("the server does not answer; trying again", "lost");
  }
  const reading = page.runs.some((run) => run.summary.read < 1);
  setTimeout(poll, reading ? POLL_MILLISECONDS / 4 : POLL_MILLISECONDS);
}

function start() {
  view.smoothing = Number($("smoothing").value);
  place_groups();
  controls();
  const data = $("data");
  if (data) {
    const {runs, written} = JSON.parse(data.textContent);
    page.written = written;
    page.runs = runs.map((run, number) => ({...run, number}));
    say(`report of ${written}`, "");
    draw();
  } else {
    view.zoomed = refine;
    poll();
  }
}

start();
