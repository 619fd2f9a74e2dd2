// What the explorables share: controls that the keyboard reaches, charts as SVG, and the numbers beside them.
// An explorable is a file with two functions: numbers(data, at) computes, program(ui, data) draws.
// `explorable` of bdpo_lit.reference.style puts both, and this file, inside one function in the page.

// ---- numbers

const sum = x => x.reduce((s, v) => s + v, 0);
const dot = (x, y) => x.reduce((s, v, i) => s + v * y[i], 0);
const range = n => Array.from({ length: n }, (_, i) => i);
const kl = (p, q) => sum(p.map((v, i) => v > 0 ? v * Math.log(v / q[i]) : 0));
const totalVariation = (p, q) => sum(p.map((v, i) => Math.abs(v - q[i]))) / 2;

function softmax(x) {
  const top = Math.max(...x), e = x.map(v => Math.exp(v - top)), total = sum(e);
  return e.map(v => v / total);
}

function logSumExp(x) {
  const top = Math.max(...x);
  return top + Math.log(sum(x.map(v => Math.exp(v - top))));
}

// The schedule of Eq. (2.1): entry n belongs to step n, entry 0 is the data.
function vpSchedule(N, betaMax, betaMin = 0.1) {
  const beta = [0], alpha = [1], alphaBar = [1];
  let log = 0;
  for (let n = 1; n <= N; n++) {
    const step = -betaMin / N - 0.5 * (betaMax - betaMin) * (2 * n - 1) / N ** 2;
    log += step;
    beta.push(-Math.expm1(step)); alpha.push(Math.exp(step)); alphaBar.push(Math.exp(log));
  }
  return { beta, alpha, alphaBar };
}

function short(v, digits = 3) {
  const size = Math.abs(v);
  if (size < 1e-12) return "0";
  const text = size < 1e-3 || size >= 1e5 ? v.toExponential(1) : size >= 100 ? v.toFixed(0) : v.toFixed(digits);
  return text.replace("-", "−");
}

// ---- the page

function make(tag, attributes = {}, ...children) {
  const e = document.createElement(tag);
  for (const [k, v] of Object.entries(attributes)) if (v !== undefined) e.setAttribute(k, v);
  e.append(...children);
  return e;
}

const STYLE = `
:host { display: block; font-size: 14px; line-height: 1.45; max-width: 880px; container-type: inline-size; }
:host([hidden]) { display: none; }
* { box-sizing: border-box; }
.row { display: flex; flex-wrap: wrap; gap: .3rem 1.4rem; align-items: center; margin: .3rem 0; }
label { display: flex; gap: .6em; align-items: center; min-height: 32px; }
label.wide { flex: 1 1 260px; }
label .name { white-space: nowrap; }
label .now { min-width: 4em; font-variant-numeric: tabular-nums; }
input[type=range] { flex: 1; min-width: 6rem; height: 28px; margin: 0; accent-color: var(--behavior); }
input[type=checkbox] { width: 18px; height: 18px; accent-color: var(--behavior); }
button, select { font: inherit; color: inherit; background: transparent; border: 1px solid currentColor;
  border-radius: 6px; min-height: 34px; padding: 0 .9em; cursor: pointer; }
select option { color: #111; background: #fff; }
button:hover { background: color-mix(in srgb, currentColor 12%, transparent); }
:focus-visible { outline: 3px solid var(--behavior); outline-offset: 2px; }
.charts { display: flex; flex-wrap: wrap; gap: .4rem; }
.chart { flex: 1 1 300px; min-width: 0; max-width: 100%; }
.chart.whole { flex-basis: 100%; }
svg { display: block; width: 100%; overflow: hidden; }
svg text { fill: currentColor; font: 12px system-ui, sans-serif; font-variant-numeric: tabular-nums; }
.grid { stroke: currentColor; opacity: .14; }
.legend { display: flex; flex-wrap: wrap; gap: 0 1.1rem; font-size: 13px; }
.legend i { display: inline-block; width: 1.3em; height: 0; border-top: 3px solid; vertical-align: middle; margin-right: .4em; }
.legend i.area { height: .8em; border: 0; }
.numbers { display: flex; flex-wrap: wrap; gap: .1rem 1.4rem; margin: .3rem 0; padding: .35rem .7rem;
  border-left: 3px solid var(--data); }
.numbers data { font-weight: 600; font-variant-numeric: tabular-nums; }
@media print { .row { display: none; } }
`;

// The book's colours; brighter where the page is dark.
function theme(host, colors) {
  const [r, g, b] = (getComputedStyle(host).color.match(/[\d.]+/g) || [0, 0, 0]).map(Number);
  const dark = 0.2126 * r + 0.7152 * g + 0.0722 * b > 128;
  for (const [name, color] of Object.entries(colors))
    host.style.setProperty(`--${name}`, dark ? `color-mix(in srgb, ${color} 62%, white)` : color);
}

class Explorable {
  constructor(box, host, colors) {
    const shadow = host.attachShadow({ mode: "open" });
    this.box = box; this.body = make("div"); this.count = 0;
    shadow.append(make("style"), this.body);
    shadow.firstChild.textContent = STYLE;
    this.controls = make("div", { class: "row" });
    this.charts = make("div", { class: "charts" });
    this.legend = make("div", { class: "legend" });
    this.said = make("div", { class: "numbers", role: "status", "aria-live": "polite" });
    this.body.append(this.controls, this.charts, this.legend, this.said);
    const paint = () => theme(host, colors);
    paint();
    const watch = new MutationObserver(paint);
    for (const e of [document.documentElement, document.body])
      watch.observe(e, { attributes: true, attributeFilter: ["class", "style", "data-jp-theme-light", "data-bs-theme"] });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
  }

  // A slider. `show` writes a position as the value it stands for, `value` turns it into one.
  slider(name, { min, max, step = 1, at, value = x => x, show = v => String(v), change }) {
    const input = make("input", { type: "range", min, max, step, value: at, "aria-label": name });
    const now = make("output", { class: "now" });
    const say = () => { now.textContent = show(value(+input.value)); input.setAttribute("aria-valuetext", now.textContent); };
    input.addEventListener("input", () => { say(); change(); });
    say();
    this.controls.append(make("label", { class: "wide" }, make("span", { class: "name" }, name), input, now));
    return { get value() { return value(+input.value); }, set(x) { input.value = x; say(); }, input };
  }

  choice(name, options, change) {     // options: {value: what is shown}
    const select = make("select", {}, ...Object.entries(options).map(([k, v]) => make("option", { value: k }, v)));
    select.addEventListener("change", change);
    this.controls.append(make("label", {}, make("span", { class: "name" }, name), select));
    return select;
  }

  check(name, change) {
    const input = make("input", { type: "checkbox" });
    input.addEventListener("change", change);
    this.controls.append(make("label", {}, input, name));
    return input;
  }

  button(name, press) {
    const button = make("button", { type: "button" }, name);
    button.addEventListener("click", press);
    this.controls.append(button);
    return button;
  }

  // Numbers in words: [name, value, digits]. The element keeps the whole value.
  say(...rows) {
    this.said.replaceChildren(...rows.map(([name, v, digits]) =>
      make("span", {}, `${name} `, typeof v === "number" ? make("data", { value: v }, short(v, digits)) : make("b", {}, v))));
  }

  keys(...entries) {     // [name, colour, "area" or nothing]
    this.legend.replaceChildren(...entries.map(([name, color, kind]) => {
      const i = make("i", { class: kind });
      i.style[kind === "area" ? "background" : "borderColor"] = paintOf(color);
      if (kind === "area") i.style.opacity = .45;
      if (kind === "dash") i.style.borderTopStyle = "dashed";
      return make("span", {}, i, name);
    }));
  }

  chart(options) {
    const host = make("div", { class: options.whole ? "chart whole" : "chart" });
    this.charts.append(host);
    return new Chart(host, options);
  }
}

const paintOf = color => /^[a-z]+$/.test(color) && color !== "currentColor" ? `var(--${color})` : color;
const escaped = t => String(t).replace(/[&<>"]/g, c => `&#${c.charCodeAt(0)};`);

function ticks([lo, hi], log, count) {
  if (log) {
    const all = range(13).map(i => 10 ** (i - 8)).filter(t => t >= lo * .999 && t <= hi * 1.001);
    const every = Math.ceil(all.length / count);
    return all.filter((_, i) => i % every === 0);
  }
  const raw = (hi - lo) / count, unit = 10 ** Math.floor(Math.log10(raw));
  const step = unit * [1, 2, 5, 10].find(m => m * unit >= raw);
  return range(Math.floor(hi / step + 1e-9) - Math.ceil(lo / step - 1e-9) + 1).map(i => (Math.ceil(lo / step - 1e-9) + i) * step);
}

// A chart as wide as its place; text keeps its size. Marks are functions of the two scales.
class Chart {
  constructor(host, options) {
    this.host = host;
    this.o = { height: 200, label: "", x: [0, 1], y: [0, 1], xlabel: "", ylabel: "", logx: false, logy: false, ...options };
    new ResizeObserver(() => this.draw()).observe(host);
  }

  set(options, ...marks) { Object.assign(this.o, options); this.marks = marks; this.draw(); }

  draw() {
    const o = this.o, W = Math.max(220, this.host.clientWidth || 360), H = o.height;
    if (!this.marks) return;
    const l = o.yticks === false ? 10 : 46, r = 10, t = o.title ? 24 : 10, b = o.xlabel ? 38 : 24;
    const scale = ([lo, hi], log, from, to) => {
      const f = log ? v => Math.log(Math.max(v, 1e-300)) : v => v, a = f(lo), z = f(hi);
      return v => from + (f(v) - a) / (z - a) * (to - from);
    };
    const X = scale(o.x, o.logx, l, W - r), Y = scale(o.y, o.logy, H - b, t), near = v => v.toFixed(1);
    const write = v => o.write ? o.write(v) : Math.abs(v) >= 1e4 || (v && Math.abs(v) < 1e-3) ? v.toExponential(0).replace("-", "−") : String(+v.toFixed(4)).replace("-", "−");
    const out = [];
    for (const v of o.xticks || ticks(o.x, o.logx, Math.max(2, W / 80)))
      out.push(`<line class="grid" x1="${near(X(v))}" x2="${near(X(v))}" y1="${t}" y2="${H - b}"/>`,
        `<text x="${near(X(v))}" y="${H - b + 15}" text-anchor="middle">${escaped(o.xnames ? o.xnames(v) : write(v))}</text>`);
    if (o.yticks !== false) for (const v of ticks(o.y, o.logy, Math.max(2, H / 45)))
      out.push(`<line class="grid" x1="${l}" x2="${W - r}" y1="${near(Y(v))}" y2="${near(Y(v))}"/>`,
        `<text x="${l - 5}" y="${near(Y(v) + 4)}" text-anchor="end">${escaped(write(v))}</text>`);
    out.push(`<svg x="${l}" y="${t}" width="${W - l - r}" height="${H - t - b}" viewBox="${l} ${t} ${W - l - r} ${H - t - b}">`,
      ...this.marks.map(mark => mark(X, Y, near, H - b)), "</svg>",
      `<text x="${(l + W - r) / 2}" y="${H - 5}" text-anchor="middle">${escaped(o.xlabel)}</text>`);
    if (o.ylabel) out.push(`<text transform="translate(11 ${(t + H - b) / 2}) rotate(-90)" text-anchor="middle">${escaped(o.ylabel)}</text>`);
    if (o.title) out.push(`<text x="${l}" y="15" font-weight="600">${escaped(o.title)}</text>`);
    this.host.innerHTML = `<svg role="img" aria-label="${escaped(o.label || o.title)}" height="${H}" viewBox="0 0 ${W} ${H}">${out.join("")}</svg>`;
  }
}

// ---- marks

const path = (xs, ys, X, Y, near) => xs.map((x, i) => `${i ? "L" : "M"}${near(X(x))} ${near(Y(ys[i]))}`).join("");

const line = (xs, ys, color, { width = 2, dash = "", opacity = 1 } = {}) => (X, Y, near) =>
  `<path d="${path(xs, ys, X, Y, near)}" fill="none" style="stroke:${paintOf(color)}" stroke-width="${width}" stroke-dasharray="${dash}" opacity="${opacity}" stroke-linejoin="round"/>`;

const area = (xs, ys, color, opacity = .32) => (X, Y, near, floor) =>
  `<path d="${path(xs, ys, X, Y, near)}L${near(X(xs.at(-1)))} ${near(floor)}L${near(X(xs[0]))} ${near(floor)}Z" style="fill:${paintOf(color)}" opacity="${opacity}"/>`;

const dots = (xs, ys, color, { r = 3.5, hollow = false, opacity = 1 } = {}) => (X, Y, near) => xs.map((x, i) =>
  `<circle cx="${near(X(x))}" cy="${near(Y(ys[i]))}" r="${r}" style="${hollow ? `fill:none;stroke:${paintOf(color)};stroke-width:1.6` : `fill:${paintOf(color)}`}" opacity="${opacity}"/>`).join("");

const bars = (left, right, ys, color, opacity = .8) => (X, Y, near, floor) => ys.map((y, i) => y &&
  `<rect x="${near(X(left[i]))}" y="${near(Y(y))}" width="${near(Math.max(1, X(right[i]) - X(left[i]) - 1))}" height="${near(floor - Y(y))}" style="fill:${paintOf(color)}" opacity="${opacity}"/>` || "").join("");

const upright = (x, color, dash = "4 3") => (X, Y, near, floor) =>
  `<line x1="${near(X(x))}" x2="${near(X(x))}" y1="0" y2="${near(floor)}" style="stroke:${paintOf(color)}" stroke-width="1.6" stroke-dasharray="${dash}"/>`;

const level = (y, color, dash = "4 3") => (X, Y, near) =>
  `<line x1="-9" x2="9999" y1="${near(Y(y))}" y2="${near(Y(y))}" style="stroke:${paintOf(color)}" stroke-width="1.4" stroke-dasharray="${dash}"/>`;

const whisker = (x, lo, hi, color) => (X, Y, near) =>
  `<line x1="${near(X(x))}" x2="${near(X(x))}" y1="${near(Y(lo))}" y2="${near(Y(hi))}" style="stroke:${paintOf(color)}" stroke-width="2"/>`;

// ---- start: the still picture makes room when the program has drawn; if anything fails, it stays

function start(box, colors) {
  box.dataset.on = "1";
  const host = make("div", { "data-lm-suppress-shortcuts": "true" });     // arrow keys are ours, not JupyterLab's
  box.append(host);
  try {
    const data = box.querySelector("script[type='application/json']").textContent;
    program(new Explorable(box, host, colors), JSON.parse(data));
    box.querySelector("img").hidden = true;
  } catch (error) { host.remove(); console.error("explorable:", error); }
}
