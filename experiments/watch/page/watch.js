// The page of flowerbed watch. Whatever comes from runs is put in as text, never as markup.
"use strict";

const ROWS = 50;
const KEPT = "flowerbed-watch-token";
const SVG = "http://www.w3.org/2000/svg";
const FIRST = ["accuracy", "personal-accuracy", "balanced-accuracy", "loss", "seconds", "failed", "bytes_up"];
const COLUMNS = [
  ["path", "name", ""], ["status", "status", ""], ["strategy", "strategy", ""], ["dataset", "data set", ""],
  ["seed", "seed", "number"], ["round", "round", "number"], ["accuracy", "accuracy", "number"],
  ["loss", "loss", "number"], ["updated", "written", "number"],
];
const main = document.getElementById("main");
const list = { search: "", status: "", kind: "", sort: "updated", order: "descending", offset: 0 };
let view = null;  // an AbortController: what is shown now goes on until it is aborted

// The token comes in the fragment, once; then it stays with this origin, so that reloading works.
function token() {
  const found = /[#&]token=([0-9a-z]+)/i.exec(location.hash);
  if (found) {
    localStorage.setItem(KEPT, found[1]);
    history.replaceState(null, "", location.pathname);
  }
  return localStorage.getItem(KEPT) || "";
}

async function ask(path, values, signal) {
  const query = new URLSearchParams(values || {}).toString();
  const answer = await fetch(query ? `${path}?${query}` : path, {
    headers: { Authorization: `Bearer ${token()}` }, signal, cache: "no-store", credentials: "omit",
  });
  if (!answer.ok) {
    const error = new Error((await answer.text()).trim());
    error.status = answer.status;
    throw error;
  }
  return answer;
}

// Server-sent events through fetch, since EventSource cannot send the token; connects again until aborted.
async function listen(values, signal, heard) {
  let wait = 1;
  while (!signal.aborted) {
    let said = "The server does not answer. Start flowerbed watch again if it has ended.";
    try {
      const reader = (await ask("/api/events", values, signal)).body.pipeThrough(new TextDecoderStream()).getReader();
      connected("live");
      wait = 1;
      let text = "";
      for (;;) {
        const { value, done } = await reader.read();
        if (done) break;
        text += value;
        const events = text.split("\n\n");
        text = events.pop();
        for (const event of events) {
          const name = /^event: (.*)$/m.exec(event), data = /^data: (.*)$/m.exec(event);
          if (name && data) heard(name[1], JSON.parse(data[1]));
        }
      }
    } catch (error) {
      if (signal.aborted) return;
      if (error.status) said = error.message;
      if (error.status === 401) {
        connected(said, true);
        return;
      }
    }
    if (signal.aborted) return;
    connected(`${said} Trying again.`, true);
    await new Promise((go) => setTimeout(go, 1000 * wait));
    wait = Math.min(2 * wait, 10);
  }
}

function connected(text, lost) {
  const place = document.getElementById("connection");
  if (place.textContent !== text) place.textContent = text;
  place.classList.toggle("lost", Boolean(lost));
}

function make(name, attributes, ...children) {
  const element = document.createElement(name);
  set(element, attributes, children);
  return element;
}

function draw(name, attributes, ...children) {
  const element = document.createElementNS(SVG, name);
  set(element, attributes, children);
  return element;
}

function set(element, attributes, children) {
  for (const [key, value] of Object.entries(attributes || {})) {
    if (key === "on") for (const [event, action] of Object.entries(value)) element.addEventListener(event, action);
    else if (value === true) element.setAttribute(key, "");
    else if (value !== false && value != null) element.setAttribute(key, value);
  }
  element.append(...children.filter((child) => child != null));
}

function figure(value) {
  if (value == null) return "";
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value)) return value.toLocaleString("en");
  const size = Math.abs(value);
  return size >= 1e5 || size < 1e-3 ? value.toExponential(2) : String(Number(value.toPrecision(4)));
}

function short(value) {
  return Math.abs(value) >= 1e4 ? value.toLocaleString("en", { notation: "compact" }) : figure(value);
}

function ago(seconds) {
  const passed = Date.now() / 1000 - seconds;
  for (const [unit, length] of [["d", 86400], ["h", 3600], ["min", 60]])
    if (passed >= 2 * length) return `${Math.round(passed / length)} ${unit} ago`;
  return `${Math.max(0, Math.round(passed))} s ago`;
}

// The list.

function showList(signal) {
  document.title = "flowerbed watch";
  const field = (name, label, element) => {
    element.addEventListener(name === "search" ? "input" : "change", () => {
      list[name] = element.value;
      list.offset = 0;
      soon(150);
    });
    return make("label", {}, label, element);
  };
  const search = make("input", { type: "search", autocomplete: "off", placeholder: "words in name, strategy, data set" });
  search.value = list.search;
  const status = make("select"), kind = make("select");
  const place = make("div", { class: "scroll" }), pages = make("div", { class: "pages" }), said = make("p", { class: "dim" });
  main.replaceChildren(
    make("form", { role: "search", on: { submit: (event) => event.preventDefault() } },
      field("search", "search", search), field("status", "status", status), field("kind", "kind", kind)),
    said, place, pages);
  let timer = 0, busy = false, again = false;
  function soon(delay) {
    clearTimeout(timer);
    timer = setTimeout(load, delay);
  }
  async function load() {
    if (busy) { again = true; return; }
    busy = true;
    try {
      const page = await (await ask("/api/list", { ...list, limit: ROWS }, signal)).json();
      if (list.offset && list.offset >= page.matching) {
        list.offset = ROWS * Math.max(0, Math.ceil(page.matching / ROWS) - 1);
        again = true;
      }
      options(status, "status", page.statuses);
      options(kind, "kind", page.kinds);
      said.textContent = summaryOf(page);
      fill(place, page, soon);
      turn(pages, page, soon);
    } catch (error) {
      if (!signal.aborted && error.status) connected(error.message, true);
    }
    busy = false;
    if (again) { again = false; soon(0); }
  }
  // Ages grow without events.
  const clock = setInterval(() => soon(0), 30000);
  signal.addEventListener("abort", () => { clearInterval(clock); clearTimeout(timer); });
  soon(0);
  listen({}, signal, () => soon(300));
}

function options(select, name, values) {
  const wanted = ["", ...values, ...(list[name] && !values.includes(list[name]) ? [list[name]] : [])];
  if (wanted.join("\n") === [...select.options].map((option) => option.value).join("\n")) return;
  select.replaceChildren(...wanted.map((value) => make("option", { value }, value || "all")));
  select.value = list[name];
}

function summaryOf(page) {
  const found = `${page.total.toLocaleString("en")} found${page.complete ? "" : " so far"}`;
  const matching = page.matching === page.total ? "" : `, ${page.matching.toLocaleString("en")} match`;
  const empty = page.total || !page.complete ? "" : " Nothing yet; runs appear here as soon as they start.";
  return `${found}${matching}, ${page.running} running, below ${page.folders.join(" and ")}.${empty}`;
}

function fill(place, page, soon) {
  const held = document.activeElement && document.activeElement.dataset ? document.activeElement.dataset.sort : null;
  const head = make("tr", {}, ...COLUMNS.map(([sort, label, kind]) => {
    const chosen = list.sort === sort;
    const arrow = chosen ? (list.order === "descending" ? " ▼" : " ▲") : "";
    return make("th", { scope: "col", class: kind, "aria-sort": chosen ? list.order : null },
      make("button", { type: "button", "data-sort": sort, on: { click: () => {
        list.order = chosen && list.order === "descending" ? "ascending" : "descending";
        list.sort = sort;
        list.offset = 0;
        soon(0);
      } } }, label + arrow));
  }));
  const rows = page.rows.map((row) => make("tr", {},
    make("td", { class: "path" }, make("a", { href: `#id=${row.id}` }, row.path),
      row.notes.length ? make("span", { class: "silent", title: row.notes.join("\n") }, " (incomplete)") : null,
      row.about ? make("div", { class: "dim" }, row.about) : null),
    make("td", { class: row.status }, row.status || row.kind),
    make("td", {}, row.strategy), make("td", {}, row.dataset),
    make("td", { class: "number", "data-label": "seed" }, figure(row.seed)),
    make("td", { class: "number", "data-label": "round" }, rounds(row)),
    make("td", { class: "number", "data-label": "accuracy" }, figure(row.accuracy)),
    make("td", { class: "number", "data-label": "loss" }, figure(row.loss)),
    make("td", { class: "number dim" }, ago(row.updated))));
  for (const row of rows) for (const cell of row.cells) if (!cell.textContent) cell.removeAttribute("data-label");
  place.replaceChildren(make("table", { id: "list" }, make("thead", {}, head), make("tbody", {}, ...rows)));
  if (held) place.querySelector(`[data-sort=${held}]`).focus();
}

function rounds(row) {
  if (row.round == null) return "";
  return row.rounds == null || row.rounds === row.round ? figure(row.round) : `${figure(row.round)} of ${figure(row.rounds)}`;
}

function turn(pages, page, soon) {
  const step = (label, offset, possible) => make("button", { type: "button", disabled: !possible,
    on: { click: () => { list.offset = offset; soon(0); } } }, label);
  const last = Math.min(list.offset + ROWS, page.matching);
  pages.replaceChildren(
    step("previous", Math.max(0, list.offset - ROWS), list.offset > 0),
    make("span", {}, page.matching ? `${list.offset + 1} to ${last} of ${page.matching.toLocaleString("en")}` : "none"),
    step("next", list.offset + ROWS, last < page.matching));
  pages.hidden = page.matching <= ROWS && list.offset === 0;
}

// One entry.

function showEntry(id, signal) {
  let shown = null;
  main.replaceChildren(make("p", { class: "dim" }, "loading"));
  listen({ id }, signal, (name, data) => {
    if (name === "entry") {
      shown = data;
      renderEntry(data, id, signal);
    } else if (name === "records" && shown) {
      shown.row = data.row;
      for (const part of ["failures", "failed"]) shown[part] = data[part];
      shown.series_notes = data.notes;
      for (const [phase, added] of Object.entries(data.phases)) join(shown, phase, added);
      updateEntry(shown);
    } else if (name === "gone") connected("This folder is there no more.", true);
  });
}

function join(shown, name, added) {
  const phase = shown.phases[name] || (shown.phases[name] = { rounds: [], columns: {}, lists: {} });
  const before = phase.rounds.length;
  phase.rounds.push(...added.rounds);
  phase.lists = added.lists;
  for (const [metric, values] of Object.entries(added.columns)) {
    const column = phase.columns[metric] || (phase.columns[metric] = Array(before).fill(null));
    column.push(...values.slice(-added.rounds.length));
  }
}

let parts = {};

function renderEntry(shown, id, signal) {
  const row = shown.row;
  document.title = `${row.path} - flowerbed watch`;
  parts = { notes: make("div"), facts: make("div"), charts: make("div"), classes: make("div"), failures: make("div") };
  const children = [make("p", {}, make("a", { href: "#" }, "all runs")), make("h2", {}, row.path), parts.notes, parts.facts];
  if (shown.screen) children.push(make("pre", { tabindex: 0 }, shown.screen));
  if (shown.phases) children.push(parts.charts, parts.classes, parts.failures);
  if (shown.pictures.length) children.push(pictureList(shown.pictures, id, signal));
  if (shown.inside.length) children.push(inside(shown));
  if (shown.summary && Object.keys(shown.summary).length) children.push(folded("summary.json", JSON.stringify(shown.summary, null, 1)));
  if (shown.config) children.push(folded("config.yaml", shown.config));
  const open = new Set([...main.querySelectorAll("details[open]")].map((item) => item.dataset.name));
  const top = scrollY;
  main.replaceChildren(...children);
  updateEntry(shown);
  for (const item of main.querySelectorAll("details")) if (open.has(item.dataset.name)) item.open = true;
  scrollTo(0, top);
}

function updateEntry(shown) {
  const row = shown.row;
  const notes = [...shown.notes, ...(shown.series_notes || [])];
  parts.notes.replaceChildren(...(notes.length ? [make("ul", { class: "notes" }, ...notes.map((note) => make("li", {}, note)))] : []));
  const facts = [["status", row.status], ["why", row.kind === "run" ? row.about : ""], ["round", rounds(row)], ["strategy", row.strategy], ["data set", row.dataset],
    ["clients", figure(row.clients)], ["seed", figure(row.seed)], ["accuracy", figure(row.accuracy)], ["loss", figure(row.loss)],
    ["written", ago(row.updated)], ["folder", shown.directory === row.path ? "" : shown.directory]];
  parts.facts.replaceChildren(make("dl", { class: "facts" }, ...facts.filter((fact) => fact[1]).map(([name, value]) =>
    make("div", {}, make("dt", {}, name), make("dd", { class: name === "status" ? row.status : null }, value)))));
  if (!shown.phases) return;
  updateCharts(shown.phases);
  parts.classes.replaceChildren(...classBars(shown.phases));
  const before = parts.failures.querySelector("details");
  parts.failures.replaceChildren(...failureTable(shown));
  const now = parts.failures.querySelector("details");
  if (before && now) now.open = before.open;
}

function folded(name, text) {
  return make("details", { "data-name": name }, make("summary", {}, name), make("pre", { tabindex: 0 }, text));
}

function inside(shown) {
  const rest = shown.inside_total > shown.inside.length ? `, of ${shown.inside_total} the first ${shown.inside.length}` : "";
  const rows = shown.inside.map((row) => make("tr", {}, make("td", { class: "path" }, make("a", { href: `#id=${row.id}` }, within(row.path, shown.row.path))),
    make("td", { class: row.status }, row.status || row.kind), make("td", { class: "number" }, rounds(row)),
    make("td", { class: "number" }, figure(row.accuracy)), make("td", { class: "number" }, figure(row.loss))));
  return make("section", {}, make("h3", {}, `inside${rest}`), make("div", { class: "scroll" }, make("table", {},
    make("thead", {}, make("tr", {}, ...["name", "status", "round", "accuracy", "loss"].map((name, i) =>
      make("th", { scope: "col", class: i > 1 ? "number" : "" }, name)))), make("tbody", {}, ...rows))));
}

function within(path, above) {
  return path.startsWith(`${above}/`) ? path.slice(above.length + 1) : path;
}

function pictureList(names, id, signal) {
  const place = make("div", { class: "pictures" });
  for (const name of names) {
    const image = make("img", { alt: name.replace(/\.png$/, "").replaceAll("_", " ") });
    place.append(make("figure", {}, make("figcaption", {}, name), image));
    ask("/api/picture", { id, name }, signal).then((answer) => answer.blob()).then((data) => {
      const address = URL.createObjectURL(data);
      image.addEventListener("load", () => URL.revokeObjectURL(address), { once: true });
      image.src = address;
    }).catch(() => { image.alt = `${name} cannot be shown`; });
  }
  return make("section", {}, make("h3", {}, "pictures"), place);
}

function failureTable(shown) {
  const kinds = Object.entries(shown.failed);
  if (!kinds.length) return [];
  const rows = [...shown.failures].reverse().map((one) => make("tr", {}, make("td", { class: "number" }, figure(one.round)),
    make("td", { class: "number" }, figure(one.client)), make("td", {}, String(one.kind)), make("td", {}, String(one.reason).split("\n")[0])));
  return [make("h3", {}, `client failures: ${kinds.map(([kind, count]) => `${count} ${kind}`).join(", ")}`),
    make("details", { "data-name": "failures" }, make("summary", {}, `the last ${rows.length}`), make("div", { class: "scroll" },
      make("table", {}, make("thead", {}, make("tr", {}, ...["round", "client", "kind", "reason"].map((name, i) =>
        make("th", { scope: "col", class: i < 2 ? "number" : "" }, name)))), make("tbody", {}, ...rows))))];
}

// Curves.

function panels(phases) {
  const found = new Map();
  for (const [name, phase] of Object.entries(phases)) {
    for (const metric of Object.keys(phase.columns).sort()) {
      // Mean and worst of the clients belong beside the server's figure: that is their spread.
      const [, base, of] = /^(.*?)(?:-(mean|worst|best))?$/.exec(metric);
      const where = { "evaluate-server": "server", "evaluate-clients": "clients" }[name] || name;
      if (!found.has(base)) found.set(base, []);
      found.get(base).push({ label: of ? `${where}, ${of}` : where, rounds: phase.rounds, values: phase.columns[metric] });
    }
  }
  const place = (name) => (FIRST.includes(name) ? FIRST.indexOf(name) : FIRST.length);
  return [...found].sort(([a], [b]) => place(a) - place(b) || a.localeCompare(b));
}

function updateCharts(phases) {
  const all = panels(phases);
  const names = all.map(([name]) => name).join("\n");
  if (parts.names !== names) {
    parts.names = names;
    parts.drawn = new Map();
    const first = all.filter(([name]) => FIRST.includes(name)), rest = all.filter(([name]) => !FIRST.includes(name));
    const grid = (some) => make("div", { class: "charts" }, ...some.map(([name]) => {
      const one = chart(name);
      parts.drawn.set(name, one);
      return one.element;
    }));
    const more = make("details", { "data-name": "more" }, make("summary", {}, `${rest.length} more figures`));
    more.addEventListener("toggle", () => {
      if (more.open && more.children.length === 1) {
        more.append(grid(rest));
        for (const [name, lines] of rest) parts.drawn.get(name).show(lines);
      }
    });
    parts.charts.replaceChildren(make("h3", {}, "curves"), grid(first), ...(rest.length ? [more] : []));
  }
  for (const [name, lines] of all) if (parts.drawn.has(name)) parts.drawn.get(name).show(lines);
}

function chart(name) {
  const [W, H, left, right, top, bottom] = [460, 210, 52, 10, 10, 24];
  const svg = draw("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", tabindex: 0 });
  const reading = make("div", { class: "reading" });
  const element = make("figure", {}, make("figcaption", {}, name), svg, reading);
  let lines = [], at = null, x = null, steps = [], cursor = null;

  function show(given) {
    lines = given;
    const rounds = lines.flatMap((line) => line.rounds), values = lines.flatMap((line) => line.values).filter((v) => v != null);
    steps = [...new Set(rounds)].sort((a, b) => a - b);
    let low = Infinity, high = -Infinity;
    for (const value of values) { low = Math.min(low, value); high = Math.max(high, value); }
    svg.replaceChildren();
    if (!values.length) {
      svg.append(draw("text", { x: W / 2, y: H / 2, "text-anchor": "middle" }, "no finite value"));
      reading.replaceChildren();
      return;
    }
    if (low === high) { const by = Math.abs(low) / 10 || 1; low -= by; high += by; }
    const ticks = nice(low, high, 4);
    low = Math.min(low, ticks[0]); high = Math.max(high, ticks[ticks.length - 1]);
    const from = steps[0], to = Math.max(steps[steps.length - 1], from + 1);
    x = (round) => left + (round - from) / (to - from) * (W - left - right);
    const y = (value) => H - bottom - (value - low) / (high - low) * (H - top - bottom);
    for (const tick of ticks) svg.append(draw("line", { class: "axis", x1: left, x2: W - right, y1: y(tick), y2: y(tick) }),
      draw("text", { x: left - 5, y: y(tick) + 4, "text-anchor": "end" }, short(tick)));
    for (const tick of nice(from, to, 5).filter((t) => Number.isInteger(t) && t >= from && t <= steps[steps.length - 1]))
      svg.append(draw("text", { x: x(tick), y: H - 7, "text-anchor": "middle" }, short(tick)));
    lines.forEach((line) => {
      const colour = colourOf(line.label);
      const usual = distance(line.rounds);
      let path = "", pen = false;
      line.values.forEach((value, j) => {
        if (value == null) { pen = false; return; }
        if (j && usual && line.rounds[j] - line.rounds[j - 1] > usual) pen = false;
        path += `${pen ? "L" : "M"}${x(line.rounds[j]).toFixed(1)} ${y(value).toFixed(1)}`;
        // A point between two gaps has no line; it is drawn as a dot.
        if (!pen && line.values[j + 1] == null) svg.append(draw("circle", { class: colour, cx: x(line.rounds[j]), cy: y(value), r: 2.5 }));
        pen = true;
      });
      svg.append(draw("path", { class: `line ${colour}`, d: path }));
    });
    cursor = draw("line", { class: "cursor", y1: top, y2: H - bottom, visibility: "hidden" });
    svg.append(cursor);
    svg.setAttribute("aria-label", `${name} by round, ${from} to ${to}, between ${figure(low)} and ${figure(high)}`);
    read();
  }

  function read() {
    const round = at != null && steps.includes(at) ? at : null;
    if (cursor) {
      cursor.setAttribute("visibility", round == null ? "hidden" : "visible");
      if (round != null) { cursor.setAttribute("x1", x(round)); cursor.setAttribute("x2", x(round)); }
    }
    reading.replaceChildren(make("span", {}, round == null ? "last" : `round ${round}`), ...lines.map((line) => {
      const j = round == null ? line.values.length - 1 : line.rounds.lastIndexOf(round);
      const value = j < 0 ? "-" : line.values[j] == null ? "not finite or missing" : figure(line.values[j]);
      return make("span", {}, make("i", { class: `key ${colourOf(line.label)}` }), `${line.label} ${value}`);
    }));
  }

  svg.addEventListener("pointermove", (event) => {
    if (!x) return;
    const box = svg.getBoundingClientRect(), place = (event.clientX - box.left) / box.width * W;
    at = steps.reduce((best, step) => (Math.abs(x(step) - place) < Math.abs(x(best) - place) ? step : best), steps[0]);
    read();
  });
  svg.addEventListener("pointerleave", () => { at = null; read(); });
  svg.addEventListener("blur", () => { at = null; read(); });
  svg.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move || !steps.length) return;
    event.preventDefault();
    const now = at == null ? steps.length : steps.indexOf(at);
    at = steps[Math.max(0, Math.min(steps.length - 1, now + move))];
    read();
  });
  return { element, show };
}

// The same line has the same colour in every chart.
const COLOURS = new Map([["server", 0], ["clients", 1], ["clients, mean", 2], ["clients, worst", 3], ["train", 4]]);
function colourOf(label) {
  if (!COLOURS.has(label)) COLOURS.set(label, COLOURS.size % 6);
  return `s${COLOURS.get(label)}`;
}

// The usual distance of two rounds, beyond which some are missing; 0 where most distances differ.
function distance(rounds) {
  const counts = new Map();
  for (let i = 1; i < rounds.length; i++) {
    const gap = rounds[i] - rounds[i - 1];
    if (gap > 0 && rounds[i - 1] > 0) counts.set(gap, (counts.get(gap) || 0) + 1);
  }
  const all = [...counts.values()].reduce((sum, count) => sum + count, 0);
  const [usual, times] = [...counts].reduce((best, one) => (one[1] > best[1] ? one : best), [0, 0]);
  return 2 * times > all ? usual : 0;
}

function nice(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= rough) || 10 * power;
  const ticks = [];
  for (let i = Math.floor(low / step + 1e-9); i * step <= high + step * (1 - 1e-9); i++) ticks.push(Number((i * step).toPrecision(12)));
  return ticks;
}

function classBars(phases) {
  for (const name of ["evaluate-server", "evaluate-clients"]) {
    const lists = phases[name] ? phases[name].lists : {};
    const right = lists["correct-per-class"], all = lists["total-per-class"];
    if (!right || !all || right.length !== all.length || right.length > 200) continue;
    const [W, H] = [460, 150], wide = (W - 60) / right.length;
    const shares = right.map((count, i) => (all[i] ? count / all[i] : null));
    const bars = shares.map((share, i) => draw("rect", { class: "bar", x: 50 + i * wide + wide * .1, width: wide * .8,
      y: 10 + 110 * (1 - (share || 0)), height: 110 * (share || 0) }, draw("title", {}, `class ${i}: ${share == null ? "no sample" : figure(share)}`)));
    const every = Math.ceil(right.length / 12);
    const labels = shares.map((_, i) => (i % every ? null : draw("text", { x: 50 + (i + .5) * wide, y: H - 12, "text-anchor": "middle" }, i)));
    const axis = [0, .5, 1].flatMap((tick) => [draw("line", { class: "axis", x1: 48, x2: W - 8, y1: 120 - 110 * tick, y2: 120 - 110 * tick }),
      draw("text", { x: 44, y: 124 - 110 * tick, "text-anchor": "end" }, `${100 * tick} %`)]);
    const worst = Math.min(...shares.filter((share) => share != null));
    return [make("h3", {}, "last evaluation by class"), make("div", { class: "charts" }, make("figure", {},
      make("figcaption", {}, `accuracy by class, ${name === "evaluate-server" ? "server" : "clients"}`),
      draw("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `accuracy of ${right.length} classes, the least ${figure(worst)}` },
        ...axis, ...bars, ...labels)))];
  }
  return [];
}

function route() {
  const kept = token();
  if (view) view.abort();
  view = new AbortController();
  if (!kept) {
    main.replaceChildren(make("p", {}, "Open the address that flowerbed watch has printed; it holds the token that this page needs."));
    connected("no token", true);
    return;
  }
  const found = /[#&]id=([0-9a-f]+)/.exec(location.hash);
  connected("connecting");
  if (found) showEntry(found[1], view.signal); else showList(view.signal);
}

addEventListener("hashchange", route);
route();
