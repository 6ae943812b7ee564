"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const { seen, layers, heads, pieces, windows } = data;
const bytesOf = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
const logBeta = new Float32Array(bytesOf(data.log_beta).buffer); // [layer][head][position]
const keptBits = bytesOf(data.kept);
const size = layers * heads;
const threshold = (h) => data.threshold[h];
const at = (h, p) => logBeta[h * seen + p];
const kept = (h, p) => { const i = h * seen + p; return (keptBits[i >> 3] >> (i & 7)) & 1; };

const shares = new Float64Array(seen);
for (let h = 0; h < size; h++) for (let p = 0; p < seen; p++) shares[p] += kept(h, p);
for (let p = 0; p < seen; p++) shares[p] /= size;

// The same estimates as `trimkv_cli/events.py`.
function survival(h, p) {
  const window = windows[Math.floor(h / heads)];
  const inWindow = window === null ? Infinity : p + window - seen;
  if (threshold(h) === null || at(h, p) === Infinity || (at(h, p) >= 0 && !data.static)) return Math.max(0, inWindow);
  if (data.static) return NaN; // such a score says nothing of that
  return Math.max(0, Math.min(inWindow, p + threshold(h) / at(h, p) - seen - 1));
}
const halfLife = (h, p) => (at(h, p) >= 0 ? Infinity : Math.log(0.5) / at(h, p));
const score = (h, p) => (Number.isFinite(at(h, p)) ? at(h, p).toFixed(2) : count(at(h, p)));
const tenths = (share) => String(Math.min(9, Math.floor(share * 10)));
function count(x) {
  if (Number.isNaN(x)) return "?"; // let go before anybody looked
  if (!Number.isFinite(x)) return "∞";
  if (x < 10) return x.toFixed(1);
  return (x < 1000 ? Math.round(x) : Number(x.toPrecision(2))).toLocaleString("en");
}
function bytes(n) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let i = 0;
  while (n >= 1024 && i < units.length - 1) { n /= 1024; i++; }
  return `${i ? n.toFixed(1) : n} ${units[i]}`;
}
function make(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}
const row = (cells) => make("tr", {}, ...cells);
const cell = (text, className = "") => make("td", { textContent: text, className });
const heading = (text, scope, className = "") => make("th", { textContent: text, scope, className });
const shown = (p) => pieces[p].replaceAll("\n", "↵").replaceAll("\t", "⇥") || "(nothing)";

const list = document.getElementById("tokens");
let chosen = -1;

function drawTokens() {
  const all = document.createDocumentFragment();
  for (let p = 0; p < seen; p++) {
    const token = make("span", { id: `t${p}`, textContent: pieces[p].includes("\n") ? `${shown(p)}\n` : pieces[p] });
    token.setAttribute("role", "option");
    token.setAttribute("aria-selected", "false");
    if (shares[p] > 0) token.dataset.tenths = tenths(shares[p]);
    token.style.setProperty("--share", (0.75 * shares[p]).toFixed(3));
    if (shares[p] === 0) token.classList.add("gone");
    if (p >= data.prompt_tokens) token.classList.add("made");
    all.append(token);
  }
  list.append(all);
}

function choose(p, { scroll = false } = {}) {
  if (p < 0 || p >= seen || p === chosen) return;
  if (chosen >= 0) list.children[chosen].setAttribute("aria-selected", "false");
  chosen = p;
  const token = list.children[p];
  token.setAttribute("aria-selected", "true");
  list.setAttribute("aria-activedescendant", token.id);
  if (scroll) list.scrollTop += token.getBoundingClientRect().top - list.getBoundingClientRect().top - list.clientHeight / 2;
  drawDetail(p);
}

function drawDetail(p) {
  let holders = 0, longest = 0;
  for (let h = 0; h < size; h++) if (kept(h, p)) { holders++; longest = Math.max(longest, survival(h, p)); }
  const left = holders && !data.static ? `; the last of them for about ${count(longest)} more tokens` : "";
  document.getElementById("detail-text").textContent =
    `“${shown(p)}” at position ${p} of ${seen}: ${p < data.prompt_tokens ? "prompt" : "answer"}, kept by ${holders} of ${size} heads${left}.`;
  const names = Array.from({ length: heads }, (_, head) => heading(`head ${head}`, "col"));
  const body = Array.from({ length: layers }, (_, layer) => row([
    heading(`layer ${layer}`, "row"),
    ...Array.from({ length: heads }, (_, head) => {
      const h = layer * heads + head;
      if (data.static) return kept(h, p) ? cell(`✓ ${score(h, p)}`, "kept") : cell(score(h, p));
      const life = count(halfLife(h, p));
      return kept(h, p) ? cell(`✓ ${life} · ${count(survival(h, p))}`, "kept") : cell(life);
    }),
  ]));
  document.getElementById("detail-heads").replaceChildren(row([heading("", "col"), ...names]), ...body);
}

function drawMap() {
  const bins = Math.min(128, seen), map = document.getElementById("map");
  for (let b = 0; b < bins; b++) {
    const from = Math.floor((b * seen) / bins), to = Math.floor(((b + 1) * seen) / bins);
    let sum = 0;
    for (let p = from; p < to; p++) sum += shares[p];
    const mean = sum / (to - from), bar = make("span");
    bar.style.height = `${100 * mean}%`;
    const label = `positions ${from} to ${to - 1}: ${(100 * mean).toFixed(0)}% held`;
    const button = make("button", { type: "button", title: label, onclick: () => choose(from, { scroll: true }) }, bar);
    button.setAttribute("aria-label", label);
    map.append(button);
  }
  const axis = [0, Math.floor(seen / 2), seen - 1].map((p) => make("span", { textContent: String(p) }));
  document.getElementById("map-axis").append(...axis);
}

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// Where a score lies between the lowest and the highest that a head gave.
function staticWorth(h) {
  let least = Infinity, most = -Infinity;
  for (let p = 0; p < seen; p++) if (Number.isFinite(at(h, p))) { least = Math.min(least, at(h, p)); most = Math.max(most, at(h, p)); }
  return (p) => (at(h, p) === Infinity ? 1 : (at(h, p) - least) / (most - least || 1));
}

function drawMatrix(canvas, h) {
  const edge = Math.min(canvas.width, 256), bins = Math.min(edge, seen), context = canvas.getContext("2d");
  const [red, green, blue] = colour("--held").split(" ").map(Number);
  const image = context.createImageData(bins, bins), worth = data.static ? staticWorth(h) : (p, age) => (at(h, p) >= 0 ? 1 : Math.exp(at(h, p) * age));
  for (let y = 0; y < bins; y++) {
    const now = Math.floor(((y + 1) * seen) / bins) - 1;
    for (let x = 0; x <= y; x++) {
      const from = Math.floor((x * seen) / bins), to = Math.min(now + 1, Math.floor(((x + 1) * seen) / bins));
      let sum = 0;
      for (let p = from; p < to; p++) sum += worth(p, now - p) || 0;
      image.data.set([red, green, blue, to > from ? Math.round((255 * sum) / (to - from)) : 0], 4 * (y * bins + x));
    }
  }
  const small = Object.assign(document.createElement("canvas"), { width: bins, height: bins });
  small.getContext("2d").putImageData(image, 0, 0);
  const width = canvas.width;
  context.clearRect(0, 0, width, canvas.height);
  context.imageSmoothingEnabled = false;
  context.drawImage(small, 0, 0, width, width);
  context.fillStyle = colour("--accent");
  for (let p = 0; p < seen; p++) {
    if (kept(h, p)) context.fillRect((p * width) / seen, width + 1, Math.max(1, width / seen), canvas.height - width - 1);
  }
}

function keptCount(h) {
  let held = 0;
  for (let p = 0; p < seen; p++) held += kept(h, p);
  return held;
}

function drawGrid() {
  const width = heads > 8 ? 64 : 104, canvases = [];
  const when = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) { when.unobserve(entry.target); drawMatrix(entry.target, Number(entry.target.dataset.head)); }
  });
  const head = row([heading("", "col"), ...Array.from({ length: heads }, (_, i) => heading(`head ${i}`, "col"))]);
  const body = Array.from({ length: layers }, (_, layer) => row([
    heading(`layer ${layer}`, "row"),
    ...Array.from({ length: heads }, (_, i) => {
      const h = layer * heads + i;
      const canvas = make("canvas", { width, height: width + 8 });
      canvas.dataset.head = String(h);
      canvases.push(canvas);
      when.observe(canvas);
      const label = `layer ${layer}, head ${i}: keeps ${keptCount(h)} of ${seen} tokens; enlarge`;
      const button = make("button", { type: "button", title: label, onclick: () => enlarge(h) }, canvas);
      button.setAttribute("aria-label", label);
      return make("td", {}, button);
    }),
  ]));
  document.getElementById("grid").append(make("table", {}, head, ...body));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => canvases.forEach((canvas) => when.observe(canvas)));
}

function enlarge(h) {
  const dialog = document.getElementById("large");
  document.getElementById("large-title").textContent = `Layer ${Math.floor(h / heads)}, head ${h % heads}: keeps ${keptCount(h)} of ${seen} tokens`;
  dialog.showModal();
  drawMatrix(dialog.querySelector("canvas"), h);
}

function drawNext() {
  const table = document.getElementById("next");
  if (!data.next_out.length) {
    table.replaceWith(make("p", { textContent: "Nothing has to go yet: there are free slots." }));
    return;
  }
  const shownRows = data.next_out.slice(0, 20);
  table.append(row([heading("token", "col", "text"), heading("position", "col"), heading("heads that give it up first", "col")]));
  for (const [p, given] of shownRows) table.append(row([cell(shown(p), "text"), cell(String(p)), cell(`${given} of ${size}`)]));
  if (data.next_out.length > 20) table.after(make("p", { className: "note", textContent: `and ${data.next_out.length - 20} others` }));
}

function drawMemory() {
  const m = data.memory;
  const lines = [["weights", m.weights_bytes], ["gates", m.gate_bytes], ["KV cache", m.kv_bytes], ["workspace, as planned", m.workspace_bytes],
    ["peak of the process", m.peak_bytes]];
  if (m.budget_bytes !== null) lines.push(["budget", m.budget_bytes]);
  lines.push([`a full cache for these ${m.seen_tokens.toLocaleString("en")} tokens`, m.full_cache_bytes]);
  document.getElementById("memory").append(...lines.map(([name, n]) => row([heading(name, "row", "text"), cell(bytes(n))])));
}

let mouse = "";
list.addEventListener("mouseover", (event) => {
  const place = `${event.clientX} ${event.clientY}`;
  if (place === mouse) return; // the list moved under a mouse that rests
  mouse = place;
  if (event.target.parentElement === list) choose(Number(event.target.id.slice(1)));
});
list.addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, PageDown: 20, PageUp: -20 }[event.key];
  const target = event.key === "Home" ? 0 : event.key === "End" ? seen - 1 : step && Math.max(0, Math.min(seen - 1, chosen + step));
  if (target === undefined) return;
  event.preventDefault();
  choose(target, { scroll: true });
});
document.getElementById("digits").addEventListener("change", (event) => list.classList.toggle("plain", !event.target.checked));

drawTokens();
drawMap();
drawGrid();
drawNext();
drawMemory();
const asked = /^#token=(\d+)$/.exec(location.hash);
if (asked) choose(Number(asked[1]), { scroll: true });
