"use strict";
// Colours of the charts by theme: Okabe and Ito's for categories, scales whose lightness alone carries the order.
const THEMES = {
  light: {
    none: "rgba(0,0,0,0)", ink: "#1a2027", muted: "#56606b", grid: "#e3e8ec", surface: "#ffffff", bad: "#a8281c",
    0: "#0072b2", 1: "#d55e00", 2: "#009e73", 3: "#cc79a7", 4: "#56b4e9", 5: "#e69f00", 6: "#555555",
    ramp0: "#9bb9d3", ramp1: "#79a3c8", ramp2: "#4f87b6", ramp3: "#24689f", ramp4: "#084a82",
    sequence: [[0, "#eff4f8"], [0.25, "#b9d3e8"], [0.5, "#73a9d2"], [0.75, "#2f78b3"], [1, "#083a6b"]],
    diverging: [[0, "#8a3b00"], [0.25, "#e0935a"], [0.5, "#f4f4f4"], [0.75, "#5fa3d3"], [1, "#08416f"]],
  },
  dark: {
    none: "rgba(0,0,0,0)", ink: "#e5eaee", muted: "#9daab6", grid: "#2c353d", surface: "#171d23", bad: "#ff9a8d",
    0: "#56b4e9", 1: "#d55e00", 2: "#009e73", 3: "#cc79a7", 4: "#f0e442", 5: "#e69f00", 6: "#dfe5ea",
    ramp0: "#3f5870", ramp1: "#4a7396", ramp2: "#5590bd", ramp3: "#74b0dc", ramp4: "#b9e0fb",
    sequence: [[0, "#1b252e"], [0.25, "#1f4767"], [0.5, "#2f75a5"], [0.75, "#6bb0dc"], [1, "#d3ecfc"]],
    diverging: [[0, "#ffb47d"], [0.25, "#a35a22"], [0.5, "#20262c"], [0.75, "#2f75a5"], [1, "#a8d8f8"]],
  },
};
const PRINTED_WIDTH = { wide: 690, half: 335 };
const PRINTED_HEIGHT = 250;
const byId = (id) => document.getElementById(id);
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const make = (tag, attributes = {}, text = "") => {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text) made.textContent = text;
  return made;
};

// ---- theme ----------------------------------------------------------------------------------------------------------
const system = matchMedia("(prefers-color-scheme: dark)");
let chosen = "auto";
try { chosen = localStorage.getItem("flowerbed-theme") ?? "auto"; } catch { /* storage may be shut for files */ }
const theme = () => (chosen === "auto" ? (system.matches ? "dark" : "light") : chosen);

function showTheme() {
  document.documentElement.dataset.theme = theme();
  for (const button of all(".switch button")) button.setAttribute("aria-pressed", String(button.value === chosen));
  for (const figure of all("figure[data-drawn]")) draw(figure, theme());
}

// ---- charts ---------------------------------------------------------------------------------------------------------
// A colour by its name: @ink, or @0/20 with 20 % opacity.
function colour(name, palette) {
  const [key, percent] = name.slice(1).split("/");
  const found = palette[key];
  if (percent === undefined) return found;
  const [r, g, b] = [1, 3, 5].map((at) => parseInt(found.slice(at, at + 2), 16));
  return `rgba(${r},${g},${b},${percent / 100})`;
}

// A copy of a figure in which names of colours are colours; only what is called a colour is looked at.
function themed(value, palette, key = "") {
  if (Array.isArray(value)) return value.map((item) => themed(item, palette, key));
  if (value !== null && typeof value === "object") {
    return Object.fromEntries(Object.entries(value).map(([name, item]) => [name, themed(item, palette, name)]));
  }
  return typeof value === "string" && /color/.test(key) && value.startsWith("@") ? colour(value, palette) : value;
}

// What is to be drawn: the figure in a theme's colours, without what the legend or a table's filter hides.
function content(figure, name) {
  const spec = figure.spec ??= JSON.parse(figure.querySelector("script").textContent);
  const { data, layout } = themed(spec, THEMES[name]);
  const off = figure.off ??= new Set();
  const rows = figure.rows;
  data.forEach((trace) => {
    const left = rows && trace.meta?.row && !rows.has(trace.meta.row);
    trace.visible = !left && !off.has(trace.legendgroup);
  });
  return { data, layout };
}

function draw(figure, name, width) {
  const plot = figure.querySelector(".plot");
  const { data, layout } = content(figure, name);
  layout.height = Number(figure.dataset.height);
  if (width) Object.assign(layout, { width, autosize: false });
  // On paper only what has many rows is higher than a third of a page.
  if (width && !layout.yaxis.tickvals) layout.height = Math.min(layout.height, PRINTED_HEIGHT);
  plot.style.minHeight = `${layout.height}px`;
  // A finger that scrolls the page must not zoom a chart.
  layout.dragmode = matchMedia("(pointer: coarse)").matches ? false : "zoom";
  const config = { displayModeBar: false, responsive: !width, showTips: false, doubleClick: "reset" };
  const done = Plotly.react(plot, data, layout, config);
  figure.dataset.drawn = "";
  legend(figure, THEMES[name]);
  return done;
}

// The legend is made of buttons, which a keyboard reaches and a narrow screen wraps.
function legend(figure, palette) {
  const box = figure.querySelector(".legend");
  const shown = figure.spec.data.filter((trace) => trace.showlegend);
  if (!box || shown.length < 1) return;
  const made = shown.map((trace) => {
    const button = make("button", { type: "button", "aria-pressed": String(!figure.off.has(trace.legendgroup)) });
    const line = themed(trace.line ?? {}, palette);
    const marker = themed(trace.marker ?? {}, palette);
    button.append(trace.type === "bar" ? patch(marker.color) : stroke(line, marker), trace.name);
    button.addEventListener("click", () => {
      const group = trace.legendgroup;
      if (!figure.off.delete(group)) figure.off.add(group);
      draw(figure, theme());
      all("button", box).find((one) => one.textContent === trace.name)?.focus();
    });
    return button;
  });
  box.replaceChildren(...made);
}

function svg(tag, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

function patch(fill) {
  const picture = svg("svg", { width: 14, height: 12, "aria-hidden": "true" });
  picture.append(svg("rect", { width: 14, height: 12, rx: 2, fill }));
  return picture;
}

function stroke(line, marker) {
  const picture = svg("svg", { width: 28, height: 12, "aria-hidden": "true" });
  const dashes = { dash: "7 4", dot: "2 3", dashdot: "7 3 2 3" };
  const x = { x1: 0, x2: 28, y1: 6, y2: 6, stroke: line.color ?? marker.color, "stroke-width": 2.2 };
  picture.append(svg("line", { ...x, "stroke-dasharray": dashes[line.dash] ?? "none" }));
  picture.append(svg("circle", { cx: 14, cy: 6, r: 2.8, fill: marker.color ?? line.color }));
  return picture;
}

const figures = all("figure[data-height]");
const visible = (figure) => !figure.closest("details:not([open])");
const watcher = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) {
    if (!isIntersecting || !visible(target)) continue;
    watcher.unobserve(target);
    draw(target, theme());
  }
}, { rootMargin: "600px" });

function prepareFigure(figure) {
  watcher.observe(figure);
  figure.querySelector("button.save")?.addEventListener("click", () => {
    // Away from its page a chart brings its title, its legend and a white ground along.
    const text = figure.querySelector("h4").textContent.trim();
    const { data, layout } = content(figure, "light");
    const margin = { ...layout.margin, t: 60 };
    Object.assign(layout, { showlegend: true, paper_bgcolor: "#ffffff", title: { text, x: 0.02 }, margin });
    const filename = text.replace(/[^\w.]+/g, "-");
    Plotly.downloadImage({ data, layout }, { format: "svg", filename, width: 900, height: 500 });
  });
}

// What is printed is drawn in full, in the colours of paper and at its width; then everything is as it was.
let opened = [];
addEventListener("beforeprint", () => {
  document.documentElement.dataset.theme = "light";
  opened = all("details:not([open]):not(.data)");
  for (const fold of opened) fold.open = true;
  for (const figure of figures) draw(figure, "light", PRINTED_WIDTH[figure.classList.contains("half") ? "half" : "wide"]);
});
addEventListener("afterprint", () => {
  for (const fold of opened) fold.open = false;
  document.documentElement.dataset.theme = theme();
  for (const figure of figures.filter(visible)) draw(figure, theme());
});

// ---- tables ---------------------------------------------------------------------------------------------------------
const RELATIONS = {
  ">": (a, b) => a > b, ">=": (a, b) => a >= b, "<": (a, b) => a < b, "<=": (a, b) => a <= b, "=": (a, b) => a === b,
};
const plain = (text) => text.trim().toLowerCase();
const sortValue = (cell) => cell.dataset.sort ?? "";

function compare(a, b, numeric, sign) {
  // What has no value comes last, in both directions.
  if (a === "" || b === "") return (a === "") - (b === "");
  return sign * (numeric ? a - b : a.localeCompare(b, undefined, { numeric: true }));
}

function prepareTable(box) {
  const table = box.querySelector("table");
  const heads = all("thead th", table);
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const cells = rows.map((row) => [...row.cells]);
  const texts = rows.map((row) => plain(row.textContent));
  const place = new Map(rows.map((row, at) => [row, at]));
  heads.forEach((head, column) => {
    head.querySelector("button")?.addEventListener("click", () => {
      const numeric = head.classList.contains("number");
      const before = head.getAttribute("aria-sort");
      // Figures are first sorted from the largest, names from A.
      const next = { ascending: "descending", descending: "ascending" }[before] ?? (numeric ? "descending" : "ascending");
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", next);
      const sign = next === "ascending" ? 1 : -1;
      const key = (row) => sortValue(cells[place.get(row)][column]);
      body.append(...[...rows].sort((a, b) => compare(key(a), key(b), numeric, sign) || place.get(a) - place.get(b)));
    });
  });
  const input = box.querySelector("input");
  if (!input) return;
  const names = heads.map((head) => plain(head.textContent));
  const count = box.querySelector("output");
  const show = () => {
    const wanted = words(input.value).map((word) => condition(word, names));
    let left = 0;
    rows.forEach((row, at) => {
      const fits = wanted.every((test) => test(cells[at], texts[at]));
      row.hidden = !fits;
      left += fits;
    });
    count.textContent = `${left} of ${rows.length} rows`;
    follow(box.id, rows, left);
  };
  input.addEventListener("input", show);
}

// Words, and column>number without or with quotes around it.
function words(text) {
  return [...text.matchAll(/"([^"]*)"|(\S+)/g)].map((found) => plain(found[1] ?? found[2])).filter(Boolean);
}

function condition(word, names) {
  const parts = word.match(/^(.+?)(>=|<=|>|<|=)(.+)$/);
  const column = parts ? pick(names, parts[1]) : -1;
  if (column < 0) return (cells, text) => text.includes(word);
  const [, , relation, given] = parts;
  const share = given.endsWith("%");
  const value = parseFloat(given) / (share ? 100 : 1);
  return (cells) => {
    const found = sortValue(cells[column]);
    if (relation === "=" && (Number.isNaN(value) || found === "" || Number.isNaN(Number(found)))) {
      return plain(cells[column].textContent) === given;
    }
    return found !== "" && RELATIONS[relation](Number(found), value);
  };
}

function pick(names, asked) {
  const exact = names.indexOf(plain(asked));
  return exact >= 0 ? exact : names.findIndex((name) => name.startsWith(plain(asked)));
}

// Charts that follow a table show only the rows that its filter left.
function follow(id, rows, left) {
  const kept = left === rows.length ? undefined : new Set(rows.filter((row) => !row.hidden).map((row) => row.dataset.key));
  for (const figure of figures.filter((one) => one.dataset.follows === id)) {
    figure.rows = kept;
    if ("drawn" in figure.dataset) draw(figure, theme());
  }
}

// ---- the page -------------------------------------------------------------------------------------------------------
async function inflated(id) {
  const packed = Uint8Array.from(atob(byId(id).textContent.trim()), (letter) => letter.charCodeAt(0));
  return new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
}

function run(code) {
  const script = make("script");
  script.textContent = code;
  document.head.append(script);
}

for (const button of all(".switch button")) {
  button.addEventListener("click", () => {
    chosen = button.value;
    try { localStorage.setItem("flowerbed-theme", chosen); } catch { /* as above */ }
    showTheme();
  });
}
system.addEventListener("change", showTheme);
showTheme();
all(".table").forEach(prepareTable);
if (matchMedia("(max-width: 60rem)").matches) all("nav.contents details").forEach((fold) => fold.removeAttribute("open"));
for (const fold of all("details")) {
  fold.addEventListener("toggle", () => {
    if (!fold.open) return;
    for (const figure of all("figure[data-height]", fold)) {
      watcher.unobserve(figure);
      watcher.observe(figure);
    }
  });
}
// A link into the page opens what hides its target.
function reveal() {
  const target = byId(decodeURIComponent(location.hash.slice(1)));
  for (let fold = target?.closest("details"); fold; fold = fold.parentElement?.closest("details")) fold.open = true;
  target?.scrollIntoView();
}
addEventListener("hashchange", reveal);
if (location.hash) reveal();
if (byId("library")) {
  inflated("library").then(run).then(() => {
    figures.forEach(prepareFigure);
    document.documentElement.dataset.ready = "";
  }).catch((error) => {
    for (const figure of figures) figure.querySelector(".plot").textContent = "This browser cannot draw the chart; its numbers are below.";
    console.error(error);
  });
} else {
  document.documentElement.dataset.ready = "";
}
