"use strict";
/* The page of medrun-explain: ten views of one run. Text from the model or the prompt enters the
 * document by textContent alone. State is one object; whatever changes it calls show(). */
const started = performance.now();
const $ = id => document.getElementById(id);
let meta, blocks = {};
const state = {pin: null, token: 1, layer: 0, head: 0, place: 0, hideFirst: false, also: [], allHeads: true, spaces: false, view: 1, guessing: false};

/* ---- reading the data ---------------------------------------------------------------------- */

function decode(text) {
  text = text.trim();
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
  return Uint8Array.from(atob(text), c => c.charCodeAt(0));
}
function readBlocks() {
  const bytes = decode($("bin").textContent), whole = new Uint8Array(bytes).buffer;
  for (const b of meta.blocks) {
    const n = b.shape.reduce((p, x) => p * x, 1), size = b.type === "s8" ? 1 : 4;
    if (b.at + n * size > whole.byteLength) throw new Error("the data of " + b.name + " is cut short");
    const Kind = b.type === "f32" ? Float32Array : b.type === "u32" ? Uint32Array : Uint8Array;
    blocks[b.name] = {data: new Kind(whole, b.at, n), shape: b.shape, unit: b.unit, type: b.type};
  }
}
const has = name => name in blocks;
const D = name => blocks[name].data;
const share = byte => (byte / 255) ** 2;

/* ---- words and numbers --------------------------------------------------------------------- */

const hex = bytes => "⟨" + bytes.map(b => b.toString(16).toUpperCase().padStart(2, "0")).join(" ") + "⟩";
/* A token's text as it is read; VISIBLE: blanks and line ends are signs. */
function piece(id, visible) {
  const p = meta.pieces[id];
  if (p === undefined) return "#" + id;
  if (Array.isArray(p)) return hex(p);
  if (!visible) return p;
  return p.replace(/ /g, "␣").replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/[\u0000-\u001f\u007f\u200b-\u200f\u202a-\u202e\u2028\u2029\u2066-\u2069\ufeff]/g,
    c => "⟨U+" + c.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0") + "⟩") || "⟨empty⟩";
}
const idOf = t => meta.tokens[t][0];
const word = t => piece(idOf(t), true);
const quote = id => "“" + piece(id, true).replace(/^␣/, "") + "”";
const percent = p => p >= .995 && p < .99995 ? (100 * p).toFixed(2) + "\u00a0%" : p >= .0995 ? (100 * p).toFixed(0) + "\u00a0%"
  : p >= .00095 ? (100 * p).toFixed(1) + "\u00a0%" : p >= 1e-6 ? (+(100 * p).toPrecision(1)).toFixed(Math.max(0, -Math.floor(Math.log10(+(100 * p).toPrecision(1))))) + "\u00a0%" : p > 0 ? (100 * p).toExponential(0).replace("e-", "·10⁻").replace(/⁻(\d+)/, (m, d) => "⁻" + [...d].map(c => "⁰¹²³⁴⁵⁶⁷⁸⁹"[c]).join("")) + "\u00a0%" : "0 %";
/* A weight is kept in 8 bits, which tell nothing apart below that. */
const weightText = w => w < .001 ? "less than 0.1\u00a0%" : percent(w);
const signed = (x, n = 2) => (x < 0 ? "−" : "+") + Math.abs(x).toFixed(n);
const sum = list => list.reduce((a, b) => a + b, 0);
const times = x => { const f = Math.exp(Math.abs(x)); return f < 10 ? f.toFixed(1) + " times" : f < 1e6 ? (+f.toPrecision(2)).toLocaleString("en") + " times" : "more than a million times"; };
const ordinal = n => n + (n % 100 > 10 && n % 100 < 14 ? "th" : ["th", "st", "nd", "rd"][n % 10] || "th");

/* ---- making elements ----------------------------------------------------------------------- */

function el(tag, options, ...inside) {
  const e = document.createElement(tag);
  for (const [k, v] of Object.entries(options || {})) {
    if (k === "on") for (const [name, f] of Object.entries(v)) e.addEventListener(name, f);
    else if (k === "a") e.style.setProperty("--a", v.toFixed(3));
    else if (k === "class") e.className = v;
    else if (v === true) e.setAttribute(k, "");
    else if (v !== false && v !== null && v !== undefined) e.setAttribute(k, v);
  }
  for (const x of inside.flat()) if (x !== null && x !== undefined) e.append(x);
  return e;
}
function svg(tag, options, ...inside) {
  const e = document.createElementNS("http" + "://www.w3.org/2000/svg", tag);
  for (const [k, v] of Object.entries(options || {})) e.setAttribute(k, v);
  for (const x of inside.flat()) if (x !== null) e.append(x);
  return e;
}
let liveWait = 0, liveText = "";
function say(text) {
  liveText = text;
  if (liveWait) return;
  liveWait = setTimeout(() => { $("live").textContent = liveText; liveWait = 0; }, 300);
}
const views = [];
/* A view: BUILD fills its element when the state changes; TABLE gives {head, rows} for its twin. */
function view(title, about, build, table) {
  const n = views.length + 1;
  const reading = el("p", {class: "reading", id: "r" + n});
  const body = el("div", {});
  const twin = el("div", {hidden: true, class: "wide", tabindex: 0, role: "region", "aria-label": "Table of " + title});
  const button = el("button", {class: "act noprint", "aria-expanded": "false", on: {click: () => toggle(v)}}, "Numbers as a table (t)");
  const section = el("section", {id: "v" + n, class: n > 3 ? "later" : "", "aria-labelledby": "h" + n},
    el("h2", {id: "h" + n}, n + " " + title), reading, body, el("p", {class: "noprint"}, button), twin,
    el("details", {}, el("summary", {}, "What this cannot show"), el("p", {}, about)));
  const v = {n, title, section, reading, body, twin, button, build, table, open: false};
  section.addEventListener("focusin", () => { state.view = n; });
  views.push(v);
  return v;
}
function fillTwin(v) {
  const t = v.table();
  v.twin.replaceChildren();
  if (!t) { v.twin.append(el("p", {}, "There are no numbers here.")); return; }
  const cell = (x, tag) => el(tag, {class: typeof x === "number" ? "" : "l", scope: tag === "th" ? "col" : null}, typeof x === "number" ? String(+x.toPrecision(6)) : x);
  const shown = t.rows.slice(0, 50);
  v.twin.append(el("table", {}, el("caption", {}, t.caption || v.title, t.rows.length > 50 ? " (50 of " + t.rows.length + " rows)" : ""),
    el("thead", {}, el("tr", {}, t.head.map(h => cell(h, "th")))),
    el("tbody", {}, shown.map(r => el("tr", {}, r.map(x => cell(x, "td")))))));
  v.twin.append(el("p", {}, el("button", {class: "act", on: {click: () => save(v, t)}}, "Save all rows as CSV")));
}
function save(v, t) {
  const field = x => /[",\n]/.test(String(x)) ? '"' + String(x).replace(/"/g, '""') + '"' : String(x);
  const text = [t.head, ...t.rows].map(r => r.map(field).join(",")).join("\r\n") + "\r\n";
  const a = el("a", {href: URL.createObjectURL(new Blob([text], {type: "text/csv"})), download: "view" + v.n + ".csv"});
  a.click();
  setTimeout(() => URL.revokeObjectURL(a.href), 1000);
}
function toggle(v) {
  if (state.guessing) return;
  v.open = !v.open;
  if (v.stale) rebuild(v);
  v.twin.hidden = !v.open;
  v.button.setAttribute("aria-expanded", String(v.open));
  if (v.open) fillTwin(v);
}

/* ---- the text, which four views show ------------------------------------------------------- */

/* VALUE(t) is a share 0 to 1 with a sign, or null; CHOOSE(t) when a token is clicked. */
function textOf(label, value, choose, options = {}) {
  const box = el("div", {class: state.spaces ? "text cut" : "text", role: "group", "aria-label": label});
  const last = state.guessing ? meta.at : options.to === undefined ? meta.tokens.length - 1 : options.to;
  for (let t = 0, joined = 0, whole; t <= last; t++) {
    if (options.gap && t && t < options.gap[0] && t !== state.token) {
      if (t === 1) box.append(el("span", {class: "gap"}, options.gap[1]));
      continue;
    }
    const [id, role] = meta.tokens[t];
    const x = state.guessing ? 0 : value(t);
    const raw = meta.pieces[id], shown = role === 1 || Array.isArray(raw) || state.spaces || !/^[^\n\t\u0000-\u001f\u200b-\u200f\u202a-\u202e\u2028\u2029\u2066-\u2069]*$/.test(raw || "");
    let text = shown ? piece(id, true) : raw;
    /* A blank stands between the tokens, so that no line begins with it; a word of several tokens stays on its line. */
    const blank = !shown && /^ \S/.test(text);
    if (blank) { box.append(" "); text = text.slice(1); }
    if (blank || shown || joined === 0 || joined > 20 || !/^[\p{Script=Latin}\p{N}\p{M}.,;:!?)%’'-]/u.test(text)) { box.append(whole = el("span", {class: "whole"})); joined = 0; }
    joined = shown || /\s$/.test(text) ? 0 : joined + text.length;
    const note = options.note && !state.guessing ? options.note(t) : "";
    const b = el("button", {class: "token" + (role === 1 ? " control" : "") + (x < 0 ? " less" : x > 0 && options.signed ? " more" : "") + (options.also && options.also.includes(t) ? " also" : ""), type: "button",
      tabindex: t === state.token ? 0 : -1, "data-t": t, a: Math.min(1, Math.abs(x || 0)), dir: "auto",
      "aria-label": piece(id, true) + (note ? ", " + note : ""), title: note, "aria-pressed": String(t === state.token)}, text);
    if (options.signed && x && Math.abs(x) > .3) b.append(el("sup", {"aria-hidden": "true"}, x < 0 ? "−" : "+"));
    whole.append(b);
    if (typeof raw === "string" && raw.includes("\n")) box.append(el("span", {class: "break"}));
  }
  const at = (e, f) => { const b = e.target.closest(".token"); if (b) f(+b.dataset.t); };
  box.addEventListener("click", e => at(e, choose));
  if (options.hover) { box.addEventListener("mouseover", e => at(e, options.hover)); box.addEventListener("mouseleave", () => options.hover(null)); }
  return box;
}
function bars(list) {                   // [name, share, note, class, was]
  const box = el("div", {class: "bars"});
  const most = Math.max(...list.map(x => Math.max(x[1], x[4] || 0)), 1e-9);
  for (const [name, p, note, kind, was] of list) {
    const bar = el("div", {class: "bar"});
    const i = el("i", {class: kind === "cut" ? "cut" : ""});
    i.style.width = (100 * p / most) + "%";
    bar.append(i);
    if (was !== undefined) { const w = el("i", {class: "was"}); w.style.width = (100 * was / most) + "%"; bar.append(w); }
    box.append(el("span", {class: "name" + (kind === "now" ? " now" : ""), dir: "auto"}, name), bar, el("span", {class: "number"}, note));
  }
  return box;
}

/* ---- 1 Text -------------------------------------------------------------------------------- */

const bitsText = x => x < .005 ? "less than 0.01 bits" : x.toFixed(2) + " bits";
const surprise = t => t > 0 ? D("surprisal")[t] : null;
function card(t) {
  const row = t - 1, at = row * 10;
  if (row < 0 || row >= meta.rows) return el("div", {class: "card"}, el("p", {}, "Nothing stands before this token, so nothing was expected."));
  const list = [];
  let rest = 1, seen = false;
  for (let i = 0; i < 10; i++) {
    const id = D("top")[at + i], p = Math.exp(D("top_logp")[at + i]);
    if (id === 0xFFFFFFFF) continue;
    const now = t < meta.tokens.length && id === idOf(t);
    seen = seen || now;
    rest -= p;
    list.push([piece(id, true), p, percent(p), now ? "now" : ""]);
  }
  list.push(["all others", Math.max(0, rest), percent(Math.max(0, rest)), "cut"]);
  const came = t < meta.tokens.length;
  return el("div", {class: "card"},
    el("p", {}, came ? "Before position " + t + " the model expected:" : "After the last token the model expects:"), bars(list),
    came ? el("p", {}, quote(idOf(t)) + " came: " + bitsText(surprise(t)) + " of surprise, " +
      (D("rank")[t] ? ordinal(D("rank")[t] + 1) + " of " + meta.shape.vocab + " in rank" : "the likeliest") + "; uncertainty there " + bitsText(D("entropy")[row]) + "; token " + idOf(t) + ".") : null);
}
function buildText(v) {
  let worst = 1;
  const from = meta.tokens.length > meta.n_prompt ? meta.n_prompt : 1;
  for (let t = from; t < meta.tokens.length; t++) if (surprise(t) > surprise(worst) || t === from) worst = t;
  const bits = [];
  for (let t = from; t < meta.tokens.length; t++) bits.push(surprise(t));
  v.reading.textContent = bits.length ? (from > 1 ? "The answer has " : "The text has ") + bits.length + " token" + (bits.length > 1 ? "s" : "") + " and surprised the model by " +
    bitsText(sum(bits) / bits.length) + " a token; the most surprising is “" + word(worst).replace(/^␣/, "") + "” with " + bitsText(surprise(worst)) + "." : "The text is one token.";
  if (state.guessing) {
    v.reading.textContent = "The text as far as the model has read it. What comes next?";
    v.body.replaceChildren(textOf("The text, token by token", () => 0, pin));
    return;
  }
  const slot = el("div", {}, card(state.token));
  const hover = t => slot.replaceChildren(card(t === null ? state.token : t));
  v.body.replaceChildren(
    el("p", {class: "legend dim"}, "Colour and underline: surprise, ", (() => { const i = el("i", {}); i.style.opacity = .06; return i; })(), "0 ", ...[4, 8, 12].flatMap(b => { const i = el("i", {}); i.style.opacity = b / 12; return [i, b + " "]; }), "bits. Dashed: control tokens. Choose a token with the mouse or ← → and Enter."),
    el("div", {class: "controls"}, el("label", {}, el("input", {type: "checkbox", checked: state.spaces, on: {change: e => { state.spaces = e.target.checked; show(); }}}), "show pieces, spaces and line ends")),
    textOf("The text, token by token", t => t ? Math.min(1, surprise(t) / 12) : 0, pin, {hover, note: t => t ? surprise(t).toFixed(2) + " bits" : "first token"}), slot);
}
const tableText = () => ({head: ["position", "token", "id", "bits", "rank", "likeliest", "its probability"], rows: meta.tokens.map(([id], t) => [t, piece(id, true), id,
  t ? surprise(t) : "", t ? D("rank")[t] + 1 : "", t ? piece(D("top")[(t - 1) * 10], true) : "", t ? Math.exp(D("top_logp")[(t - 1) * 10]) : ""])});

/* ---- 2 Why this word ----------------------------------------------------------------------- */

const pairName = k => { const p = D("pair"); return [quote(p[2 * k]), quote(p[2 * k + 1])]; };
const part = (k, i) => D("parts")[k * blocks.parts.shape[1] + i];
const headAdds = (l, h) => D("heads")[l * meta.shape.heads + h];
/* Running sum from the embedding to the total, a row a layer, two bars in it. */
function waterfall() {
  const L = meta.shape.layers, rowH = 20, left = 92, right = 58, W = 640, H = (L + 3) * rowH + 34;
  const list = [["embedding", [[part(0, 0), ""]]]];
  for (let l = 0; l < L; l++) list.push(["layer " + (l + 1), [[part(0, 2 * l + 1), "attention"], [part(0, 2 * l + 2), ""]]]);
  list.push(["rounding", [[D("rest")[0], ""]]]);
  let at = 0, low = 0, high = 0;
  for (const [, steps] of list) for (const [x] of steps) { at += x; low = Math.min(low, at); high = Math.max(high, at); }
  const X = x => left + (x - low) / (high - low || 1) * (W - left - right);
  const g = svg("svg", {viewBox: `0 0 ${W} ${H}`, width: W, height: H, role: "img", "aria-label": "Contributions from the embedding to the last layer, adding up to " + signed(D("total")[0]) + " nats"});
  g.append(svg("line", {class: "zero", x1: X(0), x2: X(0), y1: 4, y2: H - 26}));
  at = 0;
  list.forEach(([name, steps], i) => {
    const y = 6 + i * rowH;
    const t = svg("text", {x: left - 8, y: y + 14, "text-anchor": "end"}); t.textContent = name; g.append(t);
    steps.forEach(([x, kind], s) => {
      const h = steps.length > 1 ? 8 : 16, y0 = y + s * 8 + 1;
      const bar = svg("rect", {class: (x < 0 ? "down " : "up ") + kind, x: Math.min(X(at), X(at + x)), width: Math.max(1, Math.abs(X(at + x) - X(at))), y: y0, height: h});
      const tip = svg("title"); tip.textContent = name + (kind ? ", attention" : steps.length > 1 ? ", feed-forward" : "") + ": " + signed(x, 3); bar.append(tip);
      g.append(bar);
      at += x;
    });
    const all = sum(steps.map(s => s[0])), n = svg("text", {x: W - right + 8, y: y + 14}); n.textContent = signed(all); g.append(n);
  });
  const y = 6 + list.length * rowH;
  g.append(svg("rect", {class: "total", x: Math.min(X(0), X(at)), width: Math.max(1, Math.abs(X(at) - X(0))), y: y + 2, height: 15}));
  const t = svg("text", {x: left - 8, y: y + 14, "text-anchor": "end"}); t.textContent = "sum"; g.append(t);
  const n = svg("text", {x: W - right + 8, y: y + 14}); n.textContent = signed(D("total")[0]); g.append(n);
  const [a, b] = pairName(0), foot = svg("text", {x: left, y: H - 4}), to = svg("text", {x: W - right, y: H - 4, "text-anchor": "end"}); foot.textContent = "← towards " + b; to.textContent = "towards " + a + " →"; g.append(foot, to);
  return g;
}
function colours() { const c = getComputedStyle(document.documentElement); return {blue: c.getPropertyValue("--blue").trim().split(" ").map(Number), brown: c.getPropertyValue("--brown").trim().split(" ").map(Number), paper: c.getPropertyValue("--paper").trim(), ink: c.getPropertyValue("--ink").trim()}; }
const paperRGB = () => matchMedia("(prefers-color-scheme: dark)").matches ? [38, 41, 46] : [247, 247, 247];
function mix(x, c) { const p = paperRGB(), to = x < 0 ? c.brown : c.blue, a = Math.min(1, Math.abs(x)); return p.map((v, i) => Math.round(v + (to[i] - v) * a)); }
/* Layers down, heads across; a cell's colour is its contribution. */
const headSide = () => Math.max(8, Math.min(28, Math.floor(640 / meta.shape.heads)));
function headGrid(choose) {
  const L = meta.shape.layers, H = meta.shape.heads, cell = headSide();
  const c = el("canvas", {width: H * cell, height: L * cell, role: "img", tabindex: 0, "aria-label": "Contribution of each head: " + L + " layers down, " + H + " heads across; arrows move, the numbers are in the table"});
  const draw = () => {
    const g = c.getContext("2d"), col = colours();
    let most = 1e-9;
    for (let i = 0; i < L * H; i++) most = Math.max(most, Math.abs(D("heads")[i]));
    for (let l = 0; l < L; l++) for (let h = 0; h < H; h++) {
      const x = headAdds(l, h) / most;
      g.fillStyle = "rgb(" + mix(x, col) + ")"; g.fillRect(h * cell, l * cell, cell - 1, cell - 1);
      if (Math.abs(x) > .25 && cell > 11) { g.fillStyle = Math.abs(x) > .55 ? "#fff" : col.ink; g.fillRect(h * cell + cell / 2 - 4, l * cell + cell / 2 - 1, 8, 2); if (x > 0) g.fillRect(h * cell + cell / 2 - 1, l * cell + cell / 2 - 4, 2, 8); }
    }
    g.strokeStyle = col.ink; g.lineWidth = 2; g.strokeRect(state.head * cell + 1, state.layer * cell + 1, cell - 3, cell - 3);
  };
  draw();
  c.addEventListener("click", e => { const r = c.getBoundingClientRect(); choose(Math.min(L - 1, Math.floor((e.clientY - r.top) / r.height * L)), Math.min(H - 1, Math.floor((e.clientX - r.left) / r.width * H))); });
  return c;
}
function splitOf(t) {                   // what token t gave through the heads that are listed
  if (!has("split")) return 0;
  const [n, rows] = blocks.split.shape;
  let x = 0;
  if (t >= rows) return 0;
  for (let i = 0; i < n; i++)
    if (state.allHeads || (D("split_head")[2 * i] === state.layer && D("split_head")[2 * i + 1] === state.head)) x += D("split")[i * rows + t];
  return x;
}
function optionTable() {
  const o = meta.options;
  if (!o.list.length) return null;
  const warn = o.mass < .5 || !o.likeliest_is_one;
  const best = o.list.reduce((m, x) => Math.max(m, x.logp), -Infinity);
  return el("div", {}, warn ? el("p", {class: "warning", role: "note"}, "The options together hold " + percent(o.mass) + " of the probability" + (o.likeliest_is_one ? "" : ", and the likeliest token is none of them") +
    ": the model would say something else, so what follows says little about its answer.") : null,
    el("div", {class: "wide", tabindex: 0, role: "region", "aria-label": "Options"}, el("table", {}, el("caption", {}, "Options. Share: of all probability, and of what the options hold together."),
      el("thead", {}, el("tr", {}, ["token", "option", "of all", "of the options", "below the first (nats)"].map((x, i) => el("th", {scope: "col", class: i < 2 ? "l" : ""}, x)))),
      el("tbody", {}, o.list.map((x, i) => el("tr", {}, el("td", {class: "l"}, (x.logp === best ? "▶ " : "") + piece(x.id, true) + (i === o.truth ? " ✓" : "")), el("td", {class: "l"}, x.choice || x.text),
        el("td", {}, percent(Math.exp(x.logp))), el("td", {}, percent(Math.exp(x.logp) / (o.mass || 1))), el("td", {}, (x.logp - best).toFixed(2).replace("-", "−"))))))),
    el("p", {class: "dim"}, (o.truth >= 0 ? "✓ is the answer of the data set. " : "") + "Written " + (o.form ? "with a space in front" : "without a space in front") + "; the other form holds " + percent(o.other_mass) + "."));
}
function rotationTable() {
  if (!meta.rotations) return null;
  const n = meta.options.list.length;
  const rows = meta.options.list.map((x, c) => [x.choice, ...meta.rotations.map(r => Math.exp(r.options[((c - r.turn) % n + n) % n]))]);
  const stay = meta.rotations.map(r => { let b = 0; r.options.forEach((p, i) => { if (p > r.options[b]) b = i; }); return (b + r.turn) % n; });
  const all = new Set(stay).size === 1;
  return el("div", {}, el("h3", {}, "The choices in other places"), el("p", {}, all ? "Wherever the choices stand, the same one leads." : "Which choice leads depends on its place: " + stay.map((c, i) => "“" + meta.options.list[c].choice.slice(0, 40) + (i ? "” when moved by " + i : "” as asked")).join(", ") + "."),
    el("div", {class: "wide", tabindex: 0, role: "region", "aria-label": "Rotations"}, el("table", {}, el("thead", {}, el("tr", {}, el("th", {class: "l", scope: "col"}, "choice"), meta.rotations.map(r => el("th", {scope: "col"}, r.turn ? "moved by " + r.turn : "as asked")))),
      el("tbody", {}, rows.map((r, i) => el("tr", {}, el("td", {class: "l"}, r[0]), r.slice(1).map((p, k) => el("td", {}, percent(p) + (stay[k] === i ? " ▶" : "")))))))));
}
function buildWhy(v) {
  const [a, b] = pairName(0), L = meta.shape.layers, total = D("total")[0];
  let best = 0;
  for (let i = 1; i <= 2 * L; i++) if (Math.abs(part(0, i)) > Math.abs(part(0, best))) best = i;
  const name = best === 0 ? "the embedding" : (best % 2 ? "attention" : "the feed-forward part") + " of layer " + Math.ceil(best / 2);
  v.reading.textContent = a + " leads " + b + " by " + total.toFixed(2) + " nats, which is " + times(total) + " the probability; the largest single part, " + signed(part(0, best)) + ", comes from " + name + ".";
  if (total < 0) v.reading.textContent = a + " is behind " + b + " by " + (-total).toFixed(2) + " nats; the largest single part, " + signed(part(0, best)) + ", comes from " + name + ".";
  let most = 1e-9, kept = 0, every = 0;
  const rows = has("split") ? blocks.split.shape[1] : 0;
  for (let t = 0; t < rows; t++) most = Math.max(most, Math.abs(splitOf(t)));
  if (has("split_head")) for (let i = 0; i < blocks.split_head.shape[0]; i++) kept += Math.abs(headAdds(D("split_head")[2 * i], D("split_head")[2 * i + 1]));
  for (let i = 0; i < L * meta.shape.heads; i++) every += Math.abs(D("heads")[i]);
  const choose = (l, h) => { state.layer = l; state.head = h; show(); say("layer " + (l + 1) + ", head " + (h + 1) + ": " + signed(headAdds(l, h), 3) + " nats"); };
  v.body.replaceChildren(...[optionTable(),
    el("div", {class: "two"},
      el("figure", {}, el("h3", {}, "From layer to layer"), el("div", {class: "wide", tabindex: 0, role: "region", "aria-label": "From layer to layer"}, waterfall()), el("figcaption", {}, "Nats. In each row: attention above (paler, with a frame), the feed-forward part below. Blue to the right: for " + a + "; brown to the left: for " + b + ".")),
      el("figure", {style: "flex-basis: " + Math.max(260, headSide() * meta.shape.heads) + "px"}, el("h3", {}, "Heads"), headGrid(choose), el("figcaption", {}, "Nats. Layers from the top, heads from the left. Chosen: layer " + (state.layer + 1) + ", head " + (state.head + 1) + ": " + signed(headAdds(state.layer, state.head), 3) + " nats; the largest is " + Math.max(...D("heads").slice(0, L * meta.shape.heads).map(Math.abs)).toPrecision(2) + ". + and − mark the large ones."))),
    el("h3", {}, "Which words gave it"),
    el("div", {class: "controls"}, el("button", {class: "act", "aria-pressed": String(state.allHeads), on: {click: () => { state.allHeads = !state.allHeads; show(); }}}, state.allHeads ? "all listed heads" : "only the chosen head")),
    has("split") ? textOf("What each token gave through attention", t => splitOf(t) / most, pin, {signed: true, to: rows - 1, note: t => signed(splitOf(t), 3) + " nats"}) : null,
    el("p", {class: "dim"}, "Through attention, directly: blue for " + a + ", brown and double for " + b + ", the darkest is " + most.toPrecision(2) + " nats. The heads that are listed carry " + percent(every ? kept / every : 0) + " of all heads' contributions (absolute values)."), rotationTable()].filter(x => x));
}
function tableWhy() {
  const rows = [["embedding", part(0, 0)]];
  for (let l = 0; l < meta.shape.layers; l++) {
    rows.push(["layer " + (l + 1) + " attention", part(0, 2 * l + 1)]);
    for (let h = 0; h < meta.shape.heads; h++) rows.push(["layer " + (l + 1) + " head " + (h + 1), headAdds(l, h)]);
    rows.push(["layer " + (l + 1) + " feed-forward", part(0, 2 * l + 2)]);
  }
  rows.push(["rounding of the last product", D("rest")[0]], ["sum", D("total")[0]]);
  for (let k = 1; k < blocks.pair.shape[0]; k++) for (let i = 0; i < blocks.parts.shape[1]; i++)
    rows.push(["against " + pairName(k)[1] + ", " + (i === 0 ? "embedding" : "layer " + Math.ceil(i / 2) + (i % 2 ? " attention" : " feed-forward")), part(k, i)]);
  return {head: ["part", "nats"], rows};
}

/* ---- 3 Layer by layer ---------------------------------------------------------------------- */

const rowName = r => !meta.mid ? (r ? "layer " + r : "embedding") : r === 0 ? "embedding" : "layer " + Math.ceil(r / 2) + (r % 2 ? ", middle" : "");
function settled(p) {
  const [, R] = blocks.lens.shape, id = r => D("lens")[(p * R + r) * 5];
  let r = R - 1;
  while (r > 0 && id(r - 1) === id(R - 1)) r--;
  return r;
}
function lines(p) {
  const [, R, K] = blocks.tracked_logp.shape, W = 640, H = 240, left = 60, bottom = 26, right = 150;
  const g = svg("svg", {viewBox: `0 0 ${W} ${H}`, width: W, height: H, role: "img", "aria-label": "Probability of " + K + " tokens from layer to layer; the numbers are in the table"});
  const low = -12, X = r => left + r / (R - 1 || 1) * (W - left - right), Y = x => 8 + Math.min(1, x / low) * (H - bottom - 14);
  for (const [x, label] of [[0, "100 %"], [-2.303, "10 %"], [-4.605, "1 %"], [-6.908, "0.1 %"], [-9.21, "0.01 %"], [-11.513, "0.001 %"]]) {
    g.append(svg("line", {class: "axis", x1: left, x2: W - right, y1: Y(x), y2: Y(x)}));
    const t = svg("text", {x: left - 5, y: Y(x) + 4, "text-anchor": "end"}); t.textContent = label; g.append(t);
  }
  const dashes = ["", "7 4", "2 3", "9 3 2 3", "1 5", "12 4", "4 4 1 4"], ends = [];
  for (let k = 0; k < K; k++) {
    const pts = [];
    for (let r = 0; r < R; r++) pts.push(X(r).toFixed(1) + "," + Y(D("tracked_logp")[(p * R + r) * K + k]).toFixed(1));
    const line = svg("polyline", {class: "line", points: pts.join(" "), "stroke-dasharray": dashes[k % 7]});
    line.style.stroke = "hsl(" + [215, 28, 150, 290, 0, 190, 60][k % 7] + " 60% 48%)";
    g.append(line);
    ends.push({y: Y(D("tracked_logp")[(p * R + R - 1) * K + k]), k});
  }
  ends.sort((x, y) => x.y - y.y).forEach((e, i) => {
    e.y = i ? Math.max(e.y, ends[i - 1].y + 15) : Math.max(e.y, 10);
    g.append(svg("line", {class: "line", x1: W - right + 6, x2: W - right + 30, y1: e.y, y2: e.y, "stroke-dasharray": dashes[e.k % 7], style: "stroke:hsl(" + [215, 28, 150, 290, 0, 190, 60][e.k % 7] + " 60% 48%)"}));
    const t = svg("text", {x: W - right + 35, y: e.y + 4}); t.textContent = piece(D("tracked")[e.k], true).slice(0, 14); g.append(t);
  });
  const t = svg("text", {x: left, y: H - 4}); t.textContent = "embedding"; g.append(t);
  const u = svg("text", {x: W - right, y: H - 4, "text-anchor": "end"}); u.textContent = "layer " + meta.shape.layers; g.append(u);
  return g;
}
function klBars(p) {
  const [, R] = blocks.lens_kl.shape, W = 640, H = 90, left = 60, right = 150;
  let most = 1e-9;
  for (let r = 0; r < R; r++) most = Math.max(most, D("lens_kl")[p * R + r]);
  const g = svg("svg", {viewBox: `0 0 ${W} ${H}`, width: W, height: H, role: "img", "aria-label": "Distance from the final distribution, layer by layer"});
  for (let r = 0; r < R; r++) {
    const h = D("lens_kl")[p * R + r] / most * (H - 24), w = (W - left - right) / R;
    g.append(svg("rect", {class: "total", x: left + r * w, width: Math.max(1, w - 2), y: H - 20 - h, height: Math.max(1, h)}));
  }
  const t = svg("text", {x: left, y: H - 4}); t.textContent = "distance from the end (KL), most " + most.toFixed(1) + " bits"; g.append(t);
  return g;
}
function buildLens(v) {
  const [P, R] = blocks.lens.shape, places = D("lens_at");
  let p = [...places].indexOf(state.token - 1);
  if (p < 0) p = Math.max(0, [...places].indexOf(meta.at));
  state.place = p;
  const s = settled(p), end = D("lens")[(p * R + R - 1) * 5], row = places[p];
  v.reading.textContent = (s === 0 ? "From the embedding on " : s === R - 1 ? "Only in the last row, " + rowName(s) + ", " : cap(rowName(s)) + " is the first from which ") + quote(end) + (s === R - 1 || s === 0 ? " leads" : " leads to the end") + ", after position " + row + " (“" + word(row).replace(/^␣/, "") + "”).";
  const table = el("table", {class: "lens"}, el("thead", {}, el("tr", {}, el("th", {scope: "col", class: "l"}, "after"), [...places].map(t => el("th", {scope: "col", title: "position " + t}, word(t))))), el("tbody"));
  const shownRows = [];
  for (let r = R - 1; r >= 0; r--) shownRows.push(r);
  for (const r of shownRows)
    table.lastChild.append(el("tr", {class: r === s ? "settled" : ""}, el("th", {scope: "row", class: "l"}, rowName(r) + (r === s ? " ◀" : "")), [...places].map((t, i) => {
      const id = D("lens")[(i * R + r) * 5], x = Math.exp(D("lens_logp")[(i * R + r) * 5]);
      return el("td", {}, el("button", {type: "button", a: x, tabindex: i === p && r === R - 1 ? 0 : -1, "data-p": i, "data-r": r, dir: "auto", "aria-pressed": String(i === p && Math.ceil(meta.mid ? r / 2 : r) === state.layer + 1),
        title: percent(x), "aria-label": rowName(r) + " after " + word(t) + ": " + piece(id, true) + ", " + percent(x), on: {click: () => { state.layer = Math.max(0, Math.ceil(meta.mid ? r / 2 : r) - 1); pin(t + 1); }}}, piece(id, true)));
    })));
  v.body.replaceChildren(el("figure", {}, el("div", {class: "wide", tabindex: 0, role: "region", "aria-label": "The lens, layer by layer"}, table),
    el("figcaption", {}, "What each layer would say if it were the last (the raw logit lens). Colour: its probability. ◀ marks the layer from which the final word stays." + (meta.mid ? " “Middle” is after attention, before the feed-forward part." : ""))),
    el("h3", {}, "After position " + row + ", “" + word(row).replace(/^␣/, "") + "”"), el("figure", {}, el("div", {class: "wide", tabindex: 0, role: "region", "aria-label": "Probability from layer to layer"}, lines(p), klBars(p)), el("figcaption", {}, "Probability of some tokens, on a logarithmic scale, from the embedding to the last layer.")));
}
const cap = s => s[0].toUpperCase() + s.slice(1);
function tableLens() {
  const [, R] = blocks.lens.shape, K = blocks.tracked.shape[0], p = state.place, rows = [];
  for (let r = 0; r < R; r++) rows.push([rowName(r), piece(D("lens")[(p * R + r) * 5], true), Math.exp(D("lens_logp")[(p * R + r) * 5]), D("lens_entropy")[p * R + r], D("lens_kl")[p * R + r],
    ...[...Array(K).keys()].map(k => Math.exp(D("tracked_logp")[(p * R + r) * K + k]))]);
  return {caption: "After position " + D("lens_at")[p], head: ["layer", "leads", "probability", "entropy (bits)", "KL to the end (bits)", ...[...D("tracked")].map(id => "p of " + piece(id, true))], rows};
}

/* ---- 4 Attention --------------------------------------------------------------------------- */

const mapOf = (l, h) => { if (has("map_head")) for (let i = 0; i < blocks.map_head.shape[0]; i++) if (D("map_head")[2 * i] === l && D("map_head")[2 * i + 1] === h) return i; return -1; };
const headName = (l, h) => (l + 1) + "." + (h + 1);
const maps = () => has("map_head") ? blocks.map_head.shape[0] : 0;
/* Of a long text a row and a map have the first token, one column for the mass on those that are left out, and the last 511. */
const LAST = 511, columns = () => meta.tail ? LAST + 2 : meta.rows;
const tailOf = row => !meta.tail ? 1 : row >= meta.tail ? meta.tail : Math.max(1, row + 1 - LAST);
const columnOf = (row, key) => meta.tail && key ? Math.max(1, key - tailOf(row) + 2) : key;
const keyOf = column => meta.tail && column > 1 ? meta.tail + column - 2 : column;
const leftOut = tail => tail === 2 ? "position 1" : "positions 1 to " + (tail - 1);
function weight(i, row, column) { return share(D("maps")[i * blocks.maps.shape[1] + row * (row + 1) / 2 + column]); }
/* Weights of row ROW of the chosen head, or null where the page has none; the first of those that are left out has their sum. */
function rowWeights(row) {
  const i = row && row < meta.tail ? -1 : mapOf(state.layer, state.head), t = [...D("seen_at")].indexOf(row), [, L, H, n] = blocks.seen.shape, tail = tailOf(row);
  if (i < 0 && t < 0) return null;
  const of = c => i < 0 ? share(D("seen")[((t * L + state.layer) * H + state.head) * n + c]) : weight(i, columnOf(row, row), c);
  return [...Array(row + 1).keys()].map(k => k === 1 && tail > 1 ? of(1) : k && k < tail ? 0 : of(columnOf(row, k)));
}
/* The rows behind the pinned token and those that were added to it; what they look at in the mean. */
const rowBehind = t => Math.min(Math.max(0, t - 1), meta.rows - 1);
const rowsShown = () => [...new Set([...state.also, state.token].map(rowBehind))].sort((a, b) => a - b);
function meanWeights(rows) {
  const all = rows.map(rowWeights);
  if (all.some(w => !w)) return null;
  return all[all.length - 1].map((_, k) => sum(all.map(w => w[k] || 0)) / all.length);
}
/* A map's side in dots, of which the two columns before the last ones have eight each; the column of a dot. */
const mapSide = () => columns() + (meta.tail ? 14 : 0), columnAt = dot => meta.tail ? Math.max(dot >> 3 && 1, dot - 14) : dot;
/* No more than MOST dots a side: one of several weights is the largest, so that no thin line is lost. */
function drawMap(canvas, i, size, most) {
  const N = mapSide(), S = Math.min(N, most), from = D("maps"), found = new Int16Array(S * S).fill(-1);
  canvas.width = canvas.height = S;
  for (let y = 0; y < N; y++) {
    const r = columnAt(y), row = i * blocks.maps.shape[1] + r * (r + 1) / 2, line = Math.floor(y * S / N) * S;
    if (meta.tail && r === 1) continue;
    for (let x = 0; x < N && columnAt(x) <= r; x++) {
      const k = columnAt(x), at = line + Math.floor(x * S / N), w = state.hideFirst && !k ? 0 : from[row + k];
      if (w > found[at]) found[at] = w;
    }
  }
  const g = canvas.getContext("2d"), image = g.createImageData(S, S), c = colours(), p = paperRGB();
  found.forEach((w, at) => { for (let j = 0; j < 4; j++) image.data[4 * at + j] = j > 2 ? 255 : w < 0 ? p[j] * .92 : p[j] + (c.blue[j] - p[j]) * w / 255; });
  g.putImageData(image, 0, 0);
  canvas.style.width = size + "px"; canvas.style.height = size + "px";
}
function buildAttention(v) {
  if (!has("seen_at")) { v.reading.textContent = "This page was written without attention (--attention none)."; v.body.replaceChildren(); return; }
  const G = meta.shape.heads / meta.shape.kv_heads, rows = rowsShown(), row = rows[rows.length - 1], w = meanWeights(rows), i = mapOf(state.layer, state.head), tail = Math.max(...rows.map(tailOf)), shown = k => !k || k >= tail;
  const left = w ? sum(w.slice(1, tail)) : 0, choose = (l, h) => { state.layer = l; state.head = h; show(); };
  if (w) {
    let best = state.hideFirst && row > 0 ? 1 : 0;
    for (let k = best; k <= row; k++) if (shown(k) && (!shown(best) || w[k] > w[best])) best = k;
    v.reading.textContent = "Layer " + (state.layer + 1) + ", head " + (state.head + 1) + ", on its way from " + rows.map(r => "“" + word(r).replace(/^␣/, "") + "”").join(", ") + (rows.length > 1 ? " to the " + rows.length + " next tokens, looks in the mean most at “" : " to the next token, looks most at “") + word(best).replace(/^␣/, "") + "” (" + weightText(w[best]) + "), and at the first token with " + weightText(w[0]) + (tail > 1 ? "; the rest up to position " + (tail - 1) + " has " + weightText(left) + " together." : ".");
  } else v.reading.textContent = "For this token the page has no weights of layer " + (state.layer + 1) + ", head " + (state.head + 1) + (row && row < meta.tail ? "; of so long a text it has those of the last " + LAST + " tokens." : "; choose a head that has a map.");
  const first = w ? w[0] : 0, most = w ? Math.max(...w.filter((x, k) => shown(k) && (k || !state.hideFirst)), 1e-9) : 1;
  const list = el("div", {class: "small", role: "group", "aria-label": "Heads that have a map"});
  const adds = m => Math.abs(headAdds(D("map_head")[2 * m], D("map_head")[2 * m + 1]));
  for (const m of [...Array(maps()).keys()].sort((x, y) => adds(y) - adds(x))) {
    const l = D("map_head")[2 * m], h = D("map_head")[2 * m + 1], c = el("canvas", {"aria-hidden": "true"});
    drawMap(c, m, 72, 144);
    list.append(el("button", {type: "button", "aria-pressed": String(l === state.layer && h === state.head), on: {click: () => choose(l, h)}}, c, headName(l, h) + " " + signed(headAdds(l, h)), meta.shape.kv_heads > 1 && G > 1 ? [el("br"), "keys " + (Math.floor(h / G) + 1)] : null));
  }
  const big = i >= 0 ? el("canvas", {role: "img", "aria-label": "Attention of layer " + (state.layer + 1) + ", head " + (state.head + 1) + ": rows look at columns; the numbers are in the table"}) : null;
  if (big) {
    const N = mapSide(), place = (at, from, size) => columnAt(Math.max(0, Math.min(N - 1, Math.floor((at - from) / size * N))));
    drawMap(big, i, Math.min(520, Math.max(240, N * 8)), N);
    big.addEventListener("mousemove", e => { const r = big.getBoundingClientRect(), y = place(e.clientY, r.top, r.height), x = place(e.clientX, r.left, r.width);
      if (x <= y && !(meta.tail && y === 1)) $("maphint").textContent = word(keyOf(y)) + " (" + keyOf(y) + ") looks at " + (meta.tail && x === 1 ? leftOut(meta.tail) + " together" : word(keyOf(x)) + " (" + keyOf(x) + ")") + ": " + weightText(weight(i, y, x)); });
    big.addEventListener("click", e => { const r = big.getBoundingClientRect(), y = place(e.clientY, r.top, r.height); if (!meta.tail || y !== 1) pin(keyOf(y) + 1); });
  }
  v.body.replaceChildren(...[
    el("div", {class: "controls"}, el("button", {class: "act", "aria-pressed": String(state.hideFirst), on: {click: () => { state.hideFirst = !state.hideFirst; show(); }}}, "hide the first token"),
      state.hideFirst ? el("span", {}, "hidden: " + weightText(first) + " of this row") : null,
      el("button", {class: "act", id: "also", "aria-pressed": String(state.also.includes(state.token)), on: {click: () => { state.also = state.also.includes(state.token) ? state.also.filter(t => t !== state.token) : [...state.also, state.token]; show(); }}}, "keep this token"),
      state.also.length ? el("button", {class: "act", on: {click: () => { state.also = []; show(); }}}, "only one token") : null,
      el("label", {}, "layer", choice(meta.shape.layers, state.layer, 1, x => choose(x, state.head))), el("label", {}, "head", choice(meta.shape.heads, state.head, 1, x => choose(state.layer, x)))),
    textOf("Where the head looks from the pinned token", t => !w || t > row || (state.hideFirst && t === 0) ? 0 : w[t] / most, pin, {also: state.also, note: t => !w ? "" : t <= row ? weightText(w[t]) : "later", gap: w && tail > 1 ? [tail, "… " + leftOut(tail) + ": " + weightText(left) + " …"] : null}),
    meta.tail ? el("p", {class: "dim"}, "Beyond 512 tokens the page has the weights on the first token and on the last " + LAST + " one by one, and those on " + leftOut(tail > 1 ? tail : meta.tail) + " as one sum.") : null,
    el("p", {class: "dim"}, (w ? "Colour: weight, the darkest is " + percent(most) + ". " : "") + "The token in the frame is the one that is explained; the look starts one token before it. “Keep this token”, then choose another: the mean of both."),
    big ? el("figure", {}, el("h3", {}, "Layer " + (state.layer + 1) + ", head " + (state.head + 1)), big, el("figcaption", {}, "Each row looks at the columns to its left. Rows from the top, columns from the left: " + (meta.tail ? "position 0, " + leftOut(meta.tail) + " together (of these no rows), positions " + meta.tail : "positions 0") + " to " + (meta.rows - 1) + "."), el("p", {id: "maphint", class: "dim"}, "Point at it for the words.")) : null,
    maps() ? el("h3", {}, "Heads, by what they contribute") : null, maps() ? el("p", {class: "dim"}, headName(state.layer, state.head) + " is layer " + (state.layer + 1) + ", head " + (state.head + 1) + ". The number behind it: what it adds itself, in nats." + (meta.shape.kv_heads > 1 && G > 1 ? " Heads with the same number of keys share these." : "") + (maps() < meta.shape.layers * meta.shape.heads ? " The others have no map in this page." : "")) : null, list].filter(x => x));
}
function choice(n, now, from, f) {
  const s = el("select", {on: {change: e => f(+e.target.value)}});
  for (let i = 0; i < n; i++) s.append(el("option", {value: i, selected: i === now}, String(i + from)));
  return s;
}
function tableAttention() {
  if (!has("seen_at")) return null;
  const rows = rowsShown(), w = meanWeights(rows);
  const tail = w ? Math.max(...rows.map(tailOf)) : 1, list = w ? w.map((x, k) => [k, word(k), x]) : [];
  if (tail > 1) list.splice(1, tail - 1, ["1 to " + (tail - 1), "left out", sum(w.slice(1, tail))]);
  return w ? {caption: "Layer " + (state.layer + 1) + ", head " + (state.head + 1) + ", from position " + rows.join(", "), head: ["position", "token", "weight"], rows: list} : null;
}

/* ---- 5 What each part writes --------------------------------------------------------------- */

function buildParts(v) {
  const L = meta.shape.layers, x = D("stream_rms"), y = D("written_rms"), W = 640, rowH = 18, left = 92, H = (L + 1) * rowH + 24;
  let most = 1e-9, big = 1;
  for (let i = 0; i < x.length; i++) { most = Math.max(most, x[i], y[i]); if (i && y[i] > y[big]) big = i; }
  v.reading.textContent = "The stream grows from " + x[0].toPrecision(2) + " to " + x[x.length - 1].toPrecision(2) + " (root mean square); most is written by " + (big % 2 ? "attention" : "the feed-forward part") + " of layer " + Math.ceil(big / 2) + ".";
  const g = svg("svg", {viewBox: `0 0 ${W} ${H}`, width: W, height: H, role: "img", "aria-label": "What attention and the feed-forward part of each layer write, beside the size of the stream"});
  const X = a => left + a / most * (W - left - 20);
  for (let l = 0; l < L; l++) {
    const y0 = 4 + l * rowH, t = svg("text", {x: left - 8, y: y0 + 13, "text-anchor": "end"}); t.textContent = "layer " + (l + 1); g.append(t);
    g.append(svg("rect", {class: "up attention", x: left, width: Math.max(1, X(y[2 * l + 1]) - left), y: y0, height: 7}), svg("rect", {class: "down", x: left, width: Math.max(1, X(y[2 * l + 2]) - left), y: y0 + 8, height: 7}), svg("line", {class: "line", x1: X(x[2 * l + 2]), x2: X(x[2 * l + 2]), y1: y0 - 1, y2: y0 + 16}));
  }
  const t = svg("text", {x: left, y: H - 6}); t.textContent = "0 to " + most.toPrecision(3) + "; the upright mark is the stream after the layer"; g.append(t);
  const list = has("neuron") ? el("div", {class: "wide", tabindex: 0, role: "region", "aria-label": "Neurons"}, el("table", {}, el("caption", {}, "Neurons that add most to the difference, and the tokens that each raises most"),
    el("thead", {}, el("tr", {}, ["layer.neuron", "active", "adds (nats)", "raises"].map((h, i) => el("th", {scope: "col", class: i === 3 ? "l" : ""}, h)))),
    el("tbody", {}, [...Array(blocks.neuron.shape[0]).keys()].map(i => el("tr", {}, el("td", {}, (D("neuron")[2 * i] + 1) + "." + D("neuron")[2 * i + 1]), el("td", {}, D("neuron_active")[i].toFixed(2).replace("-", "−")), el("td", {}, signed(D("neuron_adds")[i], 3)),
      el("td", {class: "l"}, [...D("neuron_raises").slice(5 * i, 5 * i + 5)].map(id => piece(id, true)).join(" · "))))))) : null;
  v.body.replaceChildren(...[el("figure", {}, el("div", {class: "wide", tabindex: 0, role: "region", "aria-label": "What each part writes"}, g), el("figcaption", {}, "Root mean square at the explained token: attention (blue, framed) and the feed-forward part (brown).")), list].filter(x => x));
}
const tableParts = () => ({head: ["place", "stream", "written"], rows: [...D("stream_rms")].map((x, i) => [i === 0 ? "embedding" : "layer " + Math.ceil(i / 2) + (i % 2 ? " attention" : " feed-forward"), x, D("written_rms")[i]])});

/* ---- 6 What if ----------------------------------------------------------------------------- */

function outcomeBars(x) {
  if (meta.options.list.length)
    return bars(meta.options.list.map((o, i) => [piece(o.id, true) + " " + (o.choice || "").slice(0, 40), Math.exp(x.options[i]), percent(Math.exp(o.logp)) + " → " + percent(Math.exp(x.options[i])), "", Math.exp(o.logp)]));
  const was = new Map();
  for (let i = 0; i < 10; i++) was.set(D("top")[meta.at * 10 + i], Math.exp(D("top_logp")[meta.at * 10 + i]));
  const ids = [...new Set([...was.keys()].slice(0, 5).concat(x.top.map(t => t[0])))], now = new Map(x.top);
  return bars(ids.map(id => { const p = now.has(id) ? Math.exp(now.get(id)) : id === meta.winner ? Math.exp(x.winner) : id === meta.foil ? Math.exp(x.foil) : null, q = was.get(id);
    return [piece(id, true), p === null ? 0 : p, (q === undefined ? "?" : percent(q)) + " → " + (p === null ? "less" : percent(p)), id === meta.winner ? "now" : "", q || 0]; }));
}
function change(x) {
  const before = [];
  for (let t = x.from; t < x.to; t++) before.push(piece(idOf(t), false));
  const control = t => t < 0 || t >= meta.tokens.length || meta.tokens[t][1] === 1;
  let a = "", b = "";
  for (let t = x.from - 1; t >= x.from - 12 && !control(t); t--) a = piece(idOf(t), false) + a;
  for (let t = x.to; t < x.to + 12 && !control(t); t++) b += piece(idOf(t), false);
  a = a.trimStart(), b = b.trimEnd();
  const old = before.join(""), fresh = x.ids.map(id => piece(id, false)).join(""), lead = (old.match(/^\s+/) || fresh.match(/^\s+/) || [""])[0];
  return el("p", {class: "swap", dir: "auto"}, "… " + a + lead, el("del", {}, old.trimStart()), old && fresh ? " " : null, fresh ? el("ins", {}, fresh.trimStart()) : null, b + " …");
}
function scatter() {
  const list = meta.ablations, W = 520, H = 340, left = 60, bottom = 44;
  const base = D("total")[0], pts = list.map(x => [x.head < 0 ? part(0, 2 * x.layer + 2) : headAdds(x.layer, x.head), base - x.difference, x.head < 0 ? "mlp" + (x.layer + 1) : (x.layer + 1) + "." + (x.head + 1)]);
  const most = Math.max(.01, ...pts.flatMap(p => [Math.abs(p[0]), Math.abs(p[1])])) * 1.15, X = a => left + (a / most + 1) / 2 * (W - left - 12), Y = a => 8 + (1 - (a / most + 1) / 2) * (H - bottom - 8);
  const g = svg("svg", {viewBox: `0 0 ${W} ${H}`, width: W, height: H, role: "img", "aria-label": "Direct contribution against the effect of switching off, " + pts.length + " parts"});
  g.append(svg("line", {class: "axis", x1: X(-most), x2: X(most), y1: Y(-most), y2: Y(most)}), svg("line", {class: "zero", x1: X(-most), x2: X(most), y1: Y(0), y2: Y(0)}), svg("line", {class: "zero", x1: X(0), x2: X(0), y1: Y(-most), y2: Y(most)}));
  const taken = pts.map(([a, b]) => [X(a) - 5, Y(b) - 6, 10, 12]);
  for (const [a, b, name] of pts) {
    const wide = 8 * name.length, place = [[8, 4], [-8 - wide, 4], [-wide / 2, -9], [-wide / 2, 19], [8, -9], [8, 19]].map(([x, y]) => [X(a) + x, Y(b) + y - 10, wide, 12])
      .find(p => taken.every(o => p[0] > o[0] + o[2] || p[0] + p[2] < o[0] || p[1] > o[1] + o[3] || p[1] + p[3] < o[1])) || [X(a) + 8, Y(b) - 6, wide, 12];
    taken.push(place);
    const t = svg("text", {x: place[0], y: place[1] + 10}); t.textContent = name;
    g.append(svg("circle", {class: "point", cx: X(a), cy: Y(b), r: 5}), t);
  }
  const t = svg("text", {x: left, y: H - 20}); t.textContent = "across: direct contribution, " + signed(-most, 1) + " to " + signed(most, 1) + " nats"; g.append(t);
  const u = svg("text", {x: left, y: H - 4}); u.textContent = "up: what is lost when it is switched off, same scale"; g.append(u);
  return g;
}
function buildWhatIf(v) {
  const parts = [], [a, b] = pairName(0), base = D("total")[0];
  let reading = "";
  for (const [list, title] of [[meta.what_if, "Other words"], [meta.left_out, "Each part left out in turn"]]) {
    if (!list) continue;
    parts.push(el("h3", {}, title));
    const sorted = title[0] === "E" ? [...list].sort((x, y) => Math.abs(y.difference - base) - Math.abs(x.difference - base)) : list;
    for (const x of sorted) parts.push(el("div", {class: "card"}, change(x), el("p", {}, a + " against " + b + ": " + signed(base) + " → " + signed(x.difference) + " nats; the distribution moves by " + x.kl.toFixed(2) + " bits."), outcomeBars(x), meta.options.list.length ? null : el("p", {class: "dim"}, "Grey: before. Blue: after. “?” and “less”: not among the ten likeliest there.")));
    const top = sorted.reduce((m, x) => Math.abs(x.difference - base) > Math.abs(m.difference - base) ? x : m, sorted[0]);
    if (top) reading += (top.new ? "“" + top.old.trim() + "” → “" + top.new.trim() + "”" : "Without “" + (top.old.trim().length > 60 ? top.old.trim().slice(0, 60) + "…" : top.old.trim()) + "”") + " changes the difference most: from " + signed(base) + " to " + signed(top.difference) + " nats. ";
  }
  if (meta.ablations) {
    const far = meta.ablations.reduce((m, x) => Math.abs(x.difference - base) > Math.abs(m.difference - base) ? x : m, meta.ablations[0]);
    reading += "Switching off " + (far.head < 0 ? "the feed-forward part of layer " + (far.layer + 1) : "layer " + (far.layer + 1) + ", head " + (far.head + 1)) + " moves it by " + signed(far.difference - base) + ".";
    parts.push(el("h3", {}, "Parts switched off"), el("figure", {}, el("div", {class: "wide", tabindex: 0, role: "region", "aria-label": "Parts switched off"}, scatter()), el("figcaption", {}, "4.1 is layer 4, head 1; mlp5 the feed-forward part of layer 5. Switched off: what it finds is replaced by " + (meta.fill === "zero" ? "zeros" : "its mean over this prompt") + ". On the slanting line the two agree. They differ because later layers read what a part writes, and often make good for what is missing.")));
  }
  if (meta.patch) { parts.push(...patchFigure()); reading += patchReading(); }
  v.reading.textContent = reading || "Nothing was changed in this run.";
  if (!parts.length) parts.push(el("p", {}, "medrun-explain asks again with --what-if 'OLD=>NEW', with --leave-out sentences, and with --ablate auto."));
  v.body.replaceChildren(...parts);
}
function tableWhatIf() {
  const rows = [];
  const base = D("total")[0];
  rows.push(["as asked", base, 0, 0, Math.exp(D("top_logp")[meta.at * 10])]);
  for (const x of meta.what_if || []) rows.push([x.old + " => " + x.new, x.difference, base - x.difference, x.kl, Math.exp(x.winner)]);
  for (const x of meta.left_out || []) rows.push(["without " + x.old, x.difference, base - x.difference, x.kl, Math.exp(x.winner)]);
  for (const x of meta.ablations || []) rows.push([x.head < 0 ? "off: layer " + (x.layer + 1) + " feed-forward" : "off: layer " + (x.layer + 1) + " head " + (x.head + 1), x.difference, base - x.difference, x.kl, Math.exp(x.winner)]);
  return {head: ["run", "difference (nats)", "lost (nats)", "KL (bits)", "p of " + pairName(0)[0]], rows};
}
function patchReading() {
  const p = meta.patch, L = meta.shape.layers, half = [...D("patched")].map(x => (x - p.changed) / (p.clean - p.changed) >= .5);
  const from = half.slice(L, 2 * L).indexOf(true), first = half.slice(0, L).indexOf(false), to = first < 0 ? L : first;
  return " Carried from the first run to the changed one, the stream at the changed words gives back half of the difference or more " + (to ? "up to layer " + to : "before no layer") + ", at the last position " + (from < 0 ? "before no layer." : "from layer " + (from + 1) + " on.");
}
function patchFigure() {
  const p = meta.patch, L = meta.shape.layers, x = D("patched"), gap = p.clean - p.changed;
  const cell = y => el("td", {}, signed(y), Math.abs(gap) >= .5 ? " (" + (100 * (y - p.changed) / gap).toFixed(0).replace("-0", "0").replace("-", "−") + "\u00a0%)" : "");
  return [el("h3", {}, "Carried from one run to the other"), el("p", {}, "“" + p.old + "” gives " + signed(p.clean) + " nats, “" + p.new + "” " + signed(p.changed) + "." + (Math.abs(gap) < .5 ? " The gap is too small for shares." : "")),
    el("div", {class: "wide", tabindex: 0, role: "region", "aria-label": "Patching"}, el("table", {}, el("thead", {}, el("tr", {}, ["before layer", "changed words: into the changed run", "last position: into the changed run", "changed words: into the first run", "last position: into the first run"].map(h => el("th", {scope: "col"}, h)))),
      el("tbody", {}, [...Array(L).keys()].map(l => el("tr", {}, el("td", {}, String(l + 1)), cell(x[l]), cell(x[L + l]), el("td", {}, signed(x[2 * L + l])), el("td", {}, signed(x[3 * L + l])))))))];
}

/* ---- 7 Dice -------------------------------------------------------------------------------- */

const dice = {t: null, temp: null, k: null, p: null, min: null, drawn: null};
/* Candidates in the engine's order: temperature, top-k, top-p, min-p; the tail is in quarters of a nat. */
function candidates(place) {
  const T = Math.max(dice.temp, .01), z = [], tail = [];
  for (let i = 0; i < 64; i++) if (D("dice")[place * 64 + i] !== 0xFFFFFFFF) z.push({id: D("dice")[place * 64 + i], w: Math.exp(D("dice_logit")[place * 64 + i] / T)});
  for (let b = 0; b < 96; b++) { const n = D("dice_tail")[place * 96 + b]; if (n) tail.push({n, w: Math.exp(-(b + .5) / 4 / T)}); }
  let total = sum(z.map(c => c.w)) + sum(tail.map(b => b.n * b.w));
  let list = z.map(c => ({id: c.id, p: c.w / total})), rest = sum(tail.map(b => b.n * b.w)) / total, restN = sum(tail.map(b => b.n));
  let entropy = 0;
  for (const c of list) if (c.p) entropy -= c.p * Math.log2(c.p);
  for (const b of tail) { const p = b.w / total; if (p) entropy -= b.n * p * Math.log2(p); }
  let keep = list.length, cut = "";
  const again = n => { if (n < keep) { keep = n; rest = 0; } };
  if (dice.temp === 0) again(1);
  if (dice.k > 0 && dice.k <= list.length) again(dice.k);
  const mass = sum(list.slice(0, keep).map(c => c.p)) + rest;
  if (dice.p < 1) { let s = 0, n = 0; while (n < keep && s < dice.p * mass) s += list[n++].p; if (s >= dice.p * mass) again(Math.max(1, n)); }
  if (dice.min > 0) { let n = 0; while (n < keep && list[n].p >= dice.min * list[0].p) n++; again(Math.max(1, n)); }
  const held = sum(list.slice(0, keep).map(c => c.p)) + rest;
  return {list, keep, rest, restN, held, entropy, cut};
}
function buildDice(v) {
  const places = [...D("dice_at")];
  let i = places.indexOf(state.token - 1);
  if (i < 0) i = places.indexOf(meta.at) < 0 ? places.length - 1 : places.indexOf(meta.at);
  if (dice.temp === null) Object.assign(dice, {temp: meta.temperature, k: meta.top_k, p: meta.top_p, min: meta.min_p});
  const c = candidates(i), left = c.rest > 0 ? c.keep + c.restN : c.keep;
  v.reading.textContent = "After position " + places[i] + " (“" + word(places[i]).replace(/^␣/, "") + "”) " + (left === 1 ? "one token can come" : left + " tokens can come") + " with these settings; without cuts the uncertainty is " + bitsText(c.entropy) + ".";
  const slide = (name, key, min, max, step, show2) => {
    const out = el("output", {class: "number"}, show2(dice[key]));
    return el("label", {}, name, el("input", {type: "range", min, max, step, value: dice[key], on: {input: e => { dice[key] = +e.target.value; out.textContent = show2(dice[key]); refresh(); }}}), out);
  };
  const shown = el("div", {}), drawn = el("p", {role: "status"});
  const refresh = () => {
    const d = candidates(i), rows = d.list.slice(0, 16).map((x, n) => [piece(x.id, true), n < d.keep ? x.p / d.held : x.p, n < d.keep ? percent(x.p / d.held) : "cut", n < d.keep ? "" : "cut"]);
    if (d.rest > 0) rows.push(["others, in sum", (sum(d.list.slice(16, d.keep).map(x => x.p)) + d.rest) / d.held, percent((sum(d.list.slice(16, d.keep).map(x => x.p)) + d.rest) / d.held), "cut"]);
    shown.replaceChildren(bars(rows));
    const n = d.rest > 0 ? d.keep + d.restN : d.keep;
    v.reading.textContent = "After position " + places[i] + " (“" + word(places[i]).replace(/^␣/, "") + "”) " + (n === 1 ? "one token can come" : n + " tokens can come") + " with these settings; without cuts the uncertainty is " + bitsText(d.entropy) + ".";
  };
  const draw = () => {
    const d = candidates(i), counts = new Map();
    for (let n = 0; n < 20; n++) { let x = Math.random() * d.held, id = "others"; for (const cnd of d.list.slice(0, d.keep)) { x -= cnd.p; if (x < 0) { id = piece(cnd.id, true); break; } } counts.set(id, (counts.get(id) || 0) + 1); }
    drawn.textContent = "20 draws: " + [...counts].sort((a, b) => b[1] - a[1]).map(([id, n]) => n + " × " + id).join(", ");
  };
  v.body.replaceChildren(el("div", {class: "controls"}, slide("temperature", "temp", 0, 2, .05, x => x.toFixed(2)), slide("top-k (0: off)", "k", 0, 64, 1, x => x ? String(x) : "off"), slide("top-p", "p", .05, 1, .01, x => x.toFixed(2)), slide("min-p", "min", 0, .5, .01, x => x.toFixed(2))),
    el("div", {class: "controls"}, el("button", {class: "act", on: {click: draw}}, "draw 20"), el("button", {class: "act", on: {click: () => { dice.temp = null; show(); }}}, "as in this run")), drawn, shown,
    el("p", {class: "dim"}, "The order is the engine's: temperature, top-k, top-p, min-p. Tokens beyond the 64 likeliest are known in sums only."));
  refresh();
}
function tableDice() {
  const places = [...D("dice_at")];
  let i = places.indexOf(state.token - 1);
  if (i < 0) i = Math.max(0, places.indexOf(meta.at));
  const c = candidates(i);
  return {caption: "After position " + places[i], head: ["token", "id", "probability at this temperature", "kept"], rows: c.list.map((x, n) => [piece(x.id, true), x.id, x.p, n < c.keep ? "yes" : "no"])};
}

/* ---- 8 Memory, 9 Time ---------------------------------------------------------------------- */

const numberBytes = {f16: 2, f32: 4, int8: 1 + 2 / 64};
/* Bytes of one token's keys and values in HEADS heads. */
const cacheBytes = (kv, heads) => 2 * meta.shape.layers * heads * meta.shape.head_dim * numberBytes[kv];
function buildMemory(v) {
  const s = meta.shape, now = cacheBytes(meta.kv, s.kv_heads), n = meta.rows, G = s.heads / s.kv_heads, W = 640, H = 260, left = 70, right = 190;
  v.reading.textContent = "The cache holds the keys and values of " + n + " tokens: " + (now * n / 1e6).toFixed(2) + " MB, " + (now / 1e3).toFixed(1) + " kB for each token" + (G > 1 ? "; " + G + " heads share one set of keys, without which it would be " + G + " times as much." : ".");
  const series = [["this run, " + meta.kv, now], ["int8", cacheBytes("int8", s.kv_heads)], ["f16, no sharing", cacheBytes("f16", s.heads)]].filter((x, i, a) => a.findIndex(y => y[1] === x[1]) === i);
  const most = s.context, high = Math.max(...series.map(x => x[1])) * most, g = svg("svg", {viewBox: `0 0 ${W} ${H}`, width: W, height: H, role: "img", "aria-label": "Megabytes of the cache over tokens"});
  g.append(svg("line", {class: "zero", x1: left, x2: W - right, y1: H - 30, y2: H - 30}), svg("line", {class: "zero", x1: left, x2: left, y1: 8, y2: H - 30}));
  series.forEach(([name, b], i) => {
    const y = H - 30 - b * most / high * (H - 44), l = svg("line", {class: "line", x1: left, y1: H - 30, x2: W - right, y2: y, "stroke-dasharray": ["", "7 4", "2 4"][i]}); g.append(l);
    const t = svg("text", {x: W - right + 6, y: y + 5}); t.textContent = name + ": " + (b * most / 1e6).toFixed(1) + " MB"; g.append(t);
  });
  const t = svg("text", {x: left, y: H - 10}); t.textContent = "0"; g.append(t);
  const u = svg("text", {x: W - right, y: H - 10, "text-anchor": "end"}); u.textContent = most + " tokens, the longest context"; g.append(u);
  const w = svg("text", {x: left - 6, y: 18, "text-anchor": "end"}); w.textContent = (high / 1e6).toFixed(0) + " MB"; g.append(w);
  v.body.replaceChildren(el("figure", {}, el("div", {class: "wide", tabindex: 0, role: "region", "aria-label": "Memory"}, g), el("figcaption", {}, "2 × " + s.layers + " layers × " + s.kv_heads + " key-value head" + (s.kv_heads > 1 ? "s" : "") + " × " + s.head_dim + " numbers × " + numberBytes[meta.kv].toFixed(2) + " bytes × tokens.")));
}
function tableMemory() {
  const s = meta.shape;
  return {head: ["tokens", "f16 (MB)", "int8 (MB)", "f16 without sharing (MB)"], rows: [1, meta.rows, 512, 1024, 2048, 4096, 8192, s.context].filter((x, i, a) => a.indexOf(x) === i && x <= Math.max(s.context, meta.rows)).sort((x, y) => x - y).map(t => [t, cacheBytes("f16", s.kv_heads) * t / 1e6, cacheBytes("int8", s.kv_heads) * t / 1e6, cacheBytes("f16", s.heads) * t / 1e6])};
}
const stageRows = () => { const out = [], q = meta.time;
  q.stages.forEach(([name, a, b, w, mb]) => { for (const [what, seconds, rows, passes] of [["prompt", a, q.rows[0], 1], ["answer", b, q.rows[1], q.rows[1]]]) if (rows) {
    const n = name === "logits" ? passes : rows; out.push([name, what, 1e3 * seconds, w ? 2e-3 * w * n : null, mb ? mb / 1e3 * passes : null, seconds]); } });
  return out; };
function buildTime(v) {
  const rows = stageRows(), q = meta.time, total = what => sum(rows.filter(r => r[1] === what).map(r => r[5]));
  const a = total("prompt"), b = total("answer"), slow = rows.filter(r => r[1] === (b > 0 ? "answer" : "prompt")).reduce((m, r) => r[5] > m[5] ? r : m);
  v.reading.textContent = "The prompt took " + (1e3 * a).toFixed(0) + " ms (" + (q.rows[0] / a).toFixed(0) + " tokens a second)" + (b > 0 ? ", the answer " + (1e3 * b).toFixed(0) + " ms (" + (q.rows[1] / b).toFixed(0) + " a second)" : "") + "; most of " + (b > 0 ? "the answer" : "it") + " went into " + slow[0] + ".";
  const f = (x, n) => x === null ? "" : x.toFixed(n);
  v.body.replaceChildren(el("div", {class: "wide", tabindex: 0, role: "region", "aria-label": "Time"}, el("table", {}, el("caption", {}, q.threads + " thread" + (q.threads > 1 ? "s" : "") + ", " + q.kernels + " kernels. GOP: thousand million operations; GB: weights read."),
    el("thead", {}, el("tr", {}, ["stage", "of", "ms", "share", "GOP", "GB", "GOP/s", "GB/s"].map((h, i) => el("th", {scope: "col", class: i < 2 ? "l" : ""}, h)))),
    el("tbody", {}, rows.map(r => el("tr", {}, el("td", {class: "l"}, r[0]), el("td", {class: "l"}, r[1]), el("td", {}, r[2].toFixed(1)), el("td", {}, percent(r[5] / (total(r[1]) || 1))), el("td", {}, f(r[3], 2)), el("td", {}, f(r[4], 3)), el("td", {}, r[3] !== null && r[5] > 0 ? (r[3] / r[5]).toFixed(0) : ""), el("td", {}, r[4] !== null && r[5] > 0 ? (r[4] / r[5]).toFixed(1) : "")))))),
    el("p", {class: "dim"}, "A prompt's tokens share each reading of the weights, so it is limited by operations; an answer reads all weights for every token, so it is limited by memory. medrun-lab bench measures this machine's two ceilings."));
}
const tableTime = () => ({head: ["stage", "of", "ms", "GOP", "GB"], rows: stageRows().map(r => [r[0], r[1], r[2], r[3] === null ? "" : r[3], r[4] === null ? "" : r[4]])});

/* ---- 10 Two types -------------------------------------------------------------------------- */

/* What tells the two checkpoints apart: type, name, both, or else their hashes. */
function namesApart() {
  const a = meta, b = meta.other, all = f => [f(a), f(b)], good = p => p[0] !== p[1];
  return [all(m => m.type), all(m => m.model), all(m => m.model + " (" + m.hash.slice(0, 8) + "…)")].find(good) || ["the first", [...D("other_kl")].some(x => x > 0) ? "the changed copy" : "the same file again"];
}
function buildOther(v) {
  if (!meta.other) { v.reading.textContent = "One checkpoint was run."; v.body.replaceChildren(el("p", {}, "medrun-explain --compare OTHER.mdr runs the same tokens through a second one, bf16 beside int8 for instance.")); return; }
  const kl = D("other_kl"), n = meta.rows, differ = [];
  let most = 1e-9, at = 0;
  for (let r = 0; r < n; r++) { if (kl[r] > most) most = kl[r], at = r; if (D("other_top")[r] !== D("top")[r * 10]) differ.push(r); }
  let begins = "";
  if (has("other_far")) { const far = D("other_far"); let l = far.findIndex(x => x > .01); begins = l < 0 ? " The streams never differ by more than 1 %." : " The streams differ by more than 1 % from " + (l === 0 ? "the embedding" : "layer " + Math.ceil(l / 2)) + " on."; }
  const [here, there] = namesApart();
  v.reading.textContent = cap(there) + " beside " + here + ": the likeliest token differs at " + differ.length + " of " + n + " positions; the distributions are " + (sum([...kl]) / n).toPrecision(2) + " bits apart on average, most after “" + word(at).replace(/^␣/, "") + "” (" + most.toPrecision(2) + ")." + begins;
  const parts = [el("p", {class: "dim"}, "Colour: how far apart the two expectations are before each token; the darkest is " + most.toPrecision(2) + " bits."),
    textOf("Distance of the two distributions before each token", t => t ? kl[t - 1] / most : 0, pin, {note: t => t ? kl[t - 1].toPrecision(3) + " bits" : ""})];
  if (differ.length) parts.push(el("div", {class: "wide", tabindex: 0, role: "region", "aria-label": "Where they differ"}, el("table", {}, el("caption", {}, "Where the likeliest token differs"), el("thead", {}, el("tr", {}, ["after", here, there, "apart (bits)"].map((h, i) => el("th", {scope: "col", class: i < 3 ? "l" : ""}, h)))),
    el("tbody", {}, differ.slice(0, 50).map(r => el("tr", {}, el("td", {class: "l"}, r + " " + word(r)), el("td", {class: "l"}, piece(D("top")[r * 10], true)), el("td", {class: "l"}, piece(D("other_top")[r], true)), el("td", {}, kl[r].toPrecision(3))))))));
  v.body.replaceChildren(...parts);
}
const tableOther = () => meta.other ? {head: ["after", "token", "KL (bits)", "likeliest of " + namesApart()[0], "likeliest of " + namesApart()[1], "gain of what came (nats)"], rows: [...D("other_kl")].map((x, r) => [r, word(r), x, piece(D("top")[r * 10], true), piece(D("other_top")[r], true), D("other_gain")[r]])} : null;

/* ---- the page as a whole ------------------------------------------------------------------- */

/* A pin changes what is on the screen at once, and the rest a view at a time. */
let later = 0;
function rebuild(v) { v.stale = false; v.build(v); if (v.open) fillTwin(v); }
function seen(v) { const r = v.section.getBoundingClientRect(); return r.bottom > 0 && r.top < innerHeight; }
function rebuildNext() {
  const v = views.find(x => x.stale);
  if (!v) return;
  rebuild(v);
  later = setTimeout(rebuildNext, 0);
}
function show() {
  const focus = document.activeElement, section = focus && focus.closest ? focus.closest("section") : null;
  const mark = focus && focus.dataset ? (focus.dataset.t !== undefined ? '[data-t="' + state.token + '"]' : focus.tagName === "CANVAS" ? "canvas[tabindex]" : null) : null;
  const control = section && !mark && $(section.id) ? [...$(section.id).querySelectorAll("select, button.act")].indexOf(focus) : -1;
  for (const v of views) v.stale = true;
  for (const v of views) if (seen(v) || v.section === section) rebuild(v);
  clearTimeout(later);
  later = setTimeout(rebuildNext, 40);
  const again = section && !mark ? [...$(section.id).querySelectorAll("select, button.act")][control] : null;
  if (again && document.activeElement !== again) again.focus({preventScroll: true});
  if (section && mark) { const again = $(section.id).querySelector(mark); if (again) again.focus({preventScroll: true}); }
  const hash = "#v=" + state.view + "&t=" + state.token + "&l=" + state.layer + "&h=" + state.head;
  try { history.replaceState(null, "", hash); } catch (e) { /* some browsers refuse this for files */ }
}
function pin(t) {
  state.token = Math.max(0, Math.min(meta.tokens.length - 1, t));
  state.pin = state.token;
  show();
  say("Position " + state.token + ": " + word(state.token) + (state.token ? ", " + surprise(state.token).toFixed(2) + " bits" : ""));
}
function unpin() {
  state.pin = null;
  state.also = [];
  Object.assign(state, startState());
  show();
  say("Unpinned: the explained token");
}
function startState() {
  let best = 0;
  for (let i = 0; i < meta.shape.layers * meta.shape.heads; i++) if (Math.abs(D("heads")[i]) > Math.abs(D("heads")[best])) best = i;
  return {token: Math.min(meta.at + 1, meta.tokens.length - 1), layer: Math.floor(best / meta.shape.heads), head: best % meta.shape.heads};
}
function fromHash() {
  const q = new URLSearchParams(location.hash.slice(1)), n = (k, most) => { const x = parseInt(q.get(k), 10); return x >= 0 && x < most ? x : null; };
  const t = n("t", meta.tokens.length), l = n("l", meta.shape.layers), h = n("h", meta.shape.heads), v = n("v", 11);
  if (t !== null) state.token = t;
  if (l !== null) state.layer = l;
  if (h !== null) state.head = h;
  if (v) { state.view = v; $("v" + v).scrollIntoView(); }
}
function keys(e) {
  if (e.ctrlKey || e.metaKey || e.altKey || (e.key !== "Escape" && /^(INPUT|SELECT|TEXTAREA)$/.test(e.target.tagName))) return;
  const here = e.target.closest && e.target.closest("section"), inside = here && (e.target.classList.contains("token") || e.target.tagName === "CANVAS" || e.target.closest("table.lens"));
  const L = meta.shape.layers, H = meta.shape.heads, move = (l, h) => { state.layer = (state.layer + l + L) % L; state.head = (state.head + h + H) % H; show(); say("Layer " + (state.layer + 1) + ", head " + (state.head + 1) + ", " + signed(headAdds(state.layer, state.head), 3) + " nats"); };
  const grid = e.target.tagName === "CANVAS";
  if (e.key === "Escape") { if ($("keys").open) $("keys").close(); else if ($("words").open) $("words").close(); else unpin(); }
  else if (e.key === "?") $("keys").showModal();
  else if (e.key === "t") toggle(views[(here ? +here.id.slice(1) : state.view) - 1]);
  else if (e.key === "[" || e.key === "]") move(0, e.key === "[" ? -1 : 1);
  else if (grid && /^Arrow/.test(e.key)) move(e.key === "ArrowUp" ? -1 : e.key === "ArrowDown" ? 1 : 0, e.key === "ArrowLeft" ? -1 : e.key === "ArrowRight" ? 1 : 0);
  else if ((e.key === "ArrowLeft" || e.key === "ArrowRight") && (inside || !here)) pin(state.token + (e.key === "ArrowLeft" ? -1 : 1));
  else if ((e.key === "ArrowUp" || e.key === "ArrowDown") && inside) move(e.key === "ArrowUp" ? -1 : 1, 0);
  else if (/^[0-9]$/.test(e.key)) { const v = views[(+e.key + 9) % 10]; v.section.scrollIntoView(); state.view = v.n; v.section.querySelector("[tabindex='0'], button").focus({preventScroll: true}); }
  else return;
  e.preventDefault();
}
/* Does the page's data agree with itself? */
function check() {
  const bad = [], S = blocks.parts.shape[1], H = meta.shape.heads, heads = blocks.heads.shape;
  for (let k = 0; k < blocks.pair.shape[0]; k++) {
    let s = D("rest")[k];
    for (let i = 0; i < S; i++) s += part(k, i);
    if (Math.abs(s - D("total")[k]) > 1e-3) bad.push("contributions add up to " + s + ", not " + D("total")[k]);
    for (let l = 0; l < heads[1]; l++) {
      let x = 0;
      for (let h = 0; h < H; h++) x += D("heads")[(k * heads[1] + l) * H + h];
      if (Math.abs(x - part(k, 2 * l + 1)) > .03) bad.push("heads of layer " + (l + 1) + " add up to " + x + ", not " + part(k, 2 * l + 1));
    }
  }
  for (let r = 0; r < meta.rows; r++) {
    let s = 0;
    for (let i = 0; i < 10; i++) if (D("top")[r * 10 + i] !== 0xFFFFFFFF) s += Math.exp(D("top_logp")[r * 10 + i]);
    if (s > 1 + 1e-5) bad.push("probabilities at " + r + " add up to " + s);
  }
  if (has("seen")) for (let at = 0, n = blocks.seen.shape[3]; at < D("seen").length; at += n) {
    const s = sum([...D("seen").subarray(at, at + n)].map(share));
    if (Math.abs(s - 1) > .02 + .004 * Math.sqrt(n)) bad.push("weights of row " + at / n + " add up to " + s);
  }
  for (let i = 0; i < maps(); i++) for (let r = 0; r < columns(); r++) {
    if (meta.tail && r === 1) continue;
    let s = 0;
    for (let k = 0; k <= r; k++) s += weight(i, r, k);
    if (Math.abs(s - 1) > .02 + .004 * Math.sqrt(r)) bad.push("weights of map " + i + ", row " + r + " add up to " + s);
  }
  return bad;
}
const limits = {
  1: "Surprise is measured against this model's expectation. A fluent mistake surprises it little, and a rare truth much. Probability is no measure of truth.",
  2: "Contributions are direct: what a part writes into the last layer's sum. What it does through later layers is not in them; view 6 shows that when parts are switched off. The pair that is compared is a choice, and another pair has other contributions.",
  3: "Early rows mislead: they are not made to be read by the last layer, so that words there may mean nothing. The lens is raw, without training.",
  4: "Attention weights are no explanation by themselves: they differ between models trained anew that answer alike, and a weight says nothing about what is carried over.",
  5: "Large is not important: much of what is written is never read. A neuron's raised tokens are those of its direct effect; only the four layers whose feed-forward parts add most were searched for neurons.",
  6: "A change of words changes the question. Without a part the model is in a state that it was never trained for. None of this shows a cause in a patient: it shows what moves this model.",
  7: "Chance makes answers differ, not better. Tokens beyond the 64 likeliest are known in sums only.",
  8: "This is the cache alone. Weights and scratch memory come on top; medrun show names them.",
  9: "One run on one machine, watched; other programs that ran meanwhile are in these times.",
  10: "Two runs of the same tokens. What each would have written by itself may part earlier.",
};
const toView = v => el("a", {href: "#v" + v.n, on: {click: e => { e.preventDefault(); state.view = v.n; v.section.scrollIntoView(); v.section.querySelector("button").focus({preventScroll: true}); }}}, v.n + " " + v.title);
/* What a guess was worth: the likeliest token that it is, or begins with. */
function judge(guess) {
  const plain = s => s.replace(/␣/g, " ").trim().toLowerCase(), said = plain(guess), at = meta.at * 10;
  const names = [...Array(10).keys()].map(i => D("top")[at + i] === 0xFFFFFFFF ? "" : plain(piece(D("top")[at + i], true)));
  const chance = i => percent(Math.exp(D("top_logp")[at + i]));
  let found = names.indexOf(said);
  if (found < 0) found = names.findIndex(x => x.length > 1 && said.startsWith(x));
  const first = " Its first is " + quote(D("top")[at]) + " with " + chance(0) + ".";
  return found < 0 ? "“" + guess + "” is none of the model's ten likeliest." + first
    : "“" + guess + "”" + (names[found] === said ? "" : " begins with " + quote(D("top")[at + found]) + ", which") + " is the model's " + ordinal(found + 1) + " of " + meta.shape.vocab + " with " + chance(found) + "." + (found ? first : "");
}
/* Predict first: until somebody has guessed, the page shows no probability and nothing of what came. */
function guessBox() {
  const field = el("input", {id: "guess", type: "text", autocomplete: "off", dir: "auto"}), verdict = el("p", {id: "judged", role: "status"});
  const reveal = text => { state.guessing = false; Object.assign(state, startState()); head(); hideViews(); show(); rebuild(views[0]); $("judged").textContent = text; $("judged").focus(); };
  if (!state.guessing) return el("p", {id: "judged", role: "status", tabindex: -1});
  return el("form", {on: {submit: e => { e.preventDefault(); const guess = field.value.trim(); if (guess) reveal(judge(guess)); else verdict.textContent = "Type a word, or let the page show it."; }}},
    el("p", {}, el("label", {for: "guess"}, "Predict first. Which word comes next, at the end of the text below?")),
    el("p", {class: "controls"}, field, el("button", {class: "act", type: "submit"}, "That is my guess"), el("button", {class: "act", type: "button", id: "reveal", on: {click: () => reveal("")}}, "Show it without a guess")), verdict);
}
function hideViews() {
  for (const v of views) { v.section.hidden = state.guessing && v.n > 1; v.button.hidden = state.guessing; }
  $("contents").hidden = $("check").hidden = state.guessing;
}
/* ---- what a step of a lesson asks ---------------------------------------------------------- */

/* Each gives {is(text), right, hint(text)} from this page's data, or null where the page has none; yes(text)
 * where several answers are right. */
const plainText = text => text.replace(/[“”"␣]/g, " ").trim().toLowerCase();
function aNumber(value, right, hint, near = 0) {
  const read = text => { const m = /-?\d+(\.\d+)?/.exec(text.replace(",", ".")); return m ? +m[0] : NaN; };
  return {is: text => Math.abs(read(text) - value) <= near, right, hint: text => isNaN(read(text)) ? "Type a number. " + hint : hint};
}
function aWord(list, hint) {
  const names = list.map(id => piece(id, true));
  return {is: text => names.some(n => plainText(n) === plainText(text) || (plainText(n).length > 1 && plainText(text).startsWith(plainText(n)))), right: names.map(n => "“" + n.replace(/^␣/, "") + "”").join(" or "), hint: () => hint};
}
/* The head of largest VALUE(layer, head), or one within NEAR of it; null: not known for this head. */
function aHead(value, say2, hint, near = .005) {
  let best = null;
  for (let l = 0; l < meta.shape.layers; l++) for (let h = 0; h < meta.shape.heads; h++)
    if (value(l, h) !== null && (!best || value(l, h) > value(...best))) best = [l, h];
  const read = text => { const m = /(\d+)\D+(\d+)/.exec(text); return m && m[1] >= 1 && m[1] <= meta.shape.layers && m[2] >= 1 && m[2] <= meta.shape.heads ? [m[1] - 1, m[2] - 1] : null; };
  if (!best) return null;
  return {is: text => { const at = read(text); return Boolean(at) && value(...at) !== null && value(...at) >= value(...best) - near; }, right: headName(...best) + ", " + say2(value(...best)),
    yes: text => headName(...read(text)) + ", " + say2(value(...read(text))),
    hint: text => { const at = read(text); return !at ? "Type a head like 4.3: layer 4, head 3." : value(...at) === null ? headName(...at) + " is not shown there. " + hint : headName(...at) + ": " + say2(value(...at)) + ". " + hint; }};
}
const mapped = f => (l, h) => { const i = mapOf(l, h); return i < 0 ? null : f(i); };
const nats = x => signed(x) + " nats";
/* The longest word of the prompt, in pieces. */
function longestWord() {
  let most = 0, pieces = 0, text = "", n = 0;
  for (let t = 0; t <= meta.n_prompt; t++) {
    const p = t < meta.n_prompt && meta.tokens[t][1] !== 1 ? piece(idOf(t), false) : "";
    if (!/^\p{L}+$/u.test(p)) text = "", n = 0;
    if (/^ ?\p{L}+$/u.test(p)) { text += p.trim(); n++; }
    if (text.length > most) most = text.length, pieces = n;
  }
  return pieces;
}
const answers = {
  pieces: () => { const n = longestWord(); return !n ? null : aNumber(n, n + (n === 1 ? " piece" : " pieces"), "Tick “show pieces, spaces and line ends”: a line stands where a piece begins."); },
  controls: () => { const n = meta.tokens.slice(0, meta.n_prompt).filter(t => t[1] === 1).length; return aNumber(n, n + " control tokens", "Count the dashed ones before the answer; “user” and “assistant” are ordinary text."); },
  end: () => { const t = meta.tokens.length - 1; return t < meta.n_prompt || meta.tokens[t][1] !== 1 ? null : aWord([idOf(t)], "It is the last token of the text, a dashed one."); },
  replaced: () => { if (!meta.other) return null; for (let r = meta.n_prompt - 1; r < meta.rows; r++) if (D("other_top")[r] !== D("top")[r * 10]) return aWord([D("other_top")[r]], "Look in the last column of the table, in a row of the answer: the text before the answer does not count."); return null; },
  writes: () => { const y = D("written_rms"); let b = 1; for (let i = 2; i < y.length; i++) if (y[i] > y[b]) b = i; return aNumber(Math.ceil(b / 2), "layer " + Math.ceil(b / 2) + ", " + (b % 2 ? "attention" : "the feed-forward part"), "Look for the longest bar, and type the number of its layer."); },
  settles: () => { const p = [...D("lens_at")].indexOf(meta.at); if (p < 0) return null; const l = meta.mid ? Math.ceil(settled(p) / 2) : settled(p); return aNumber(l, "layer " + l, "Look for ◀ beside the rows, with the explained word chosen (Esc)."); },
  finds: () => !meta.tokens.slice(0, meta.at + 1).some(t => t[0] === meta.winner) ? null : aHead(mapped(i => { let w = 0; for (let k = 0; k <= meta.at; k++) if (idOf(k) === meta.winner) w += weight(i, meta.at, k); return w; }), w => weightText(w) + " on that word", "Another head looks there almost alone.", .1),
  before: () => aHead(mapped(i => { let w = 0; for (let r = 1; r < meta.rows; r++) w += weight(i, r, r - 1); return w / (meta.rows - 1); }), w => weightText(w) + " in the mean on the word before", "Look for a dark line beside the slanting edge.", .03),
  start: () => aHead(mapped(i => D("map_head")[2 * i] ? null : weight(i, meta.at, 0)), w => weightText(w) + " on the first token", "Try the other heads of layer 1.", .03),
  cache: () => { const mb = cacheBytes(meta.kv, meta.shape.kv_heads) * 5e-3; return aNumber(+mb.toFixed(1), mb.toFixed(1) + " MB", "The first sentence says what one token takes: times 5000, and 1000 kB are one MB.", .05 * mb); },
  feeds: () => { let b = 1; for (let l = 2; l <= meta.shape.layers; l++) if (part(0, 2 * l) > part(0, 2 * b)) b = l; return aNumber(b, "layer " + b + ", " + nats(part(0, 2 * b)), "The feed-forward part is the lower bar of each row; the table names it."); },
  half: () => { const was = {...dice}, i = [...D("dice_at")].indexOf(meta.at); if (i < 0) return null; Object.assign(dice, {temp: 2, k: 0, p: .5, min: 0}); const n = candidates(i).keep; Object.assign(dice, was);
    return n >= 64 ? null : aNumber(n, n + (n === 1 ? " token" : " tokens"), "The first sentence of the view counts them: temperature 2, top-k off, top-p 0.50, min-p 0."); },
  adds: () => aHead(headAdds, nats, "Another adds more: the darkest blue cell."),
  changed: () => meta.what_if && meta.what_if.length ? aWord([meta.what_if[0].top[0][0]], "Look for the longest blue bar.") : null,
  costs: () => { const off = (l, h) => (meta.ablations || []).find(x => x.layer === l && x.head === h); return aHead((l, h) => off(l, h) ? D("total")[0] - off(l, h).difference : null, x => nats(x) + " lost", "Look for the highest point, or press t."); },
  surprise: () => { let b = meta.n_prompt; for (let t = b; t < meta.tokens.length; t++) if (surprise(t) > surprise(b)) b = t; return b < meta.tokens.length ? aWord([idOf(b)], "The first sentence names it.") : null; },
  slowest: () => { const of = name => sum(stageRows().filter(r => name.test(r[0]) && r[1] === (meta.time.rows[1] ? "answer" : "prompt")).map(r => r[5])), a = of(/^(q, k, v|attention|o)$/), f = of(/^feed/), name = a > f ? "attention" : "feed-forward";
    return {is: text => plainText(text).startsWith(name.slice(0, 4)), right: name + ", " + (1e3 * Math.max(a, f)).toFixed(0) + " ms against " + (1e3 * Math.min(a, f)).toFixed(0), hint: () => "Add the rows of the answer: q, k, v with attention and o; feed-forward in with out."}; },
};
function answerBox(kind, n) {
  const a = answers[kind] && answers[kind]();
  if (!a) return null;
  const field = el("input", {id: "answer" + n, type: "text", size: 12, autocomplete: "off", dir: "auto", "aria-label": "Your answer to step " + n}), verdict = el("span", {id: "said" + n, role: "status"});
  const show2 = el("button", {class: "act", type: "button", hidden: true, on: {click: () => { verdict.textContent = "It is " + a.right + "."; }}}, "Show it");
  return el("form", {class: "controls noprint", on: {submit: e => { e.preventDefault(); const text = field.value.trim(), good = text && a.is(text);
    verdict.textContent = !text ? "Type your answer first." : good ? "Right: " + (a.yes ? a.yes(text) : a.right) + "." : "Not yet. " + a.hint(text); show2.hidden = Boolean(good) || !text; }}},
    field, el("button", {class: "act", type: "submit"}, "Check"), show2, verdict);
}
/* What a lesson of the course asks its students to look at. */
function lessonBox(lesson) {
  document.title = "Lesson " + lesson.n + ": " + lesson.title;
  return el("section", {class: "lesson", "aria-labelledby": "lesson"}, el("h2", {id: "lesson"}, "Lesson " + lesson.n + ": " + lesson.title), el("p", {class: "reading"}, lesson.question), guessBox(),
    state.guessing ? null : el("ol", {}, lesson.looks.map(([n, what, kind], i) => el("li", {}, toView(views[n - 1]), ": ", what, answerBox(kind, i + 1)))));
}
function head() {
  const a = state.guessing ? "its next word" : pairName(0)[0], t = meta.at + 1;
  document.title = "How " + meta.model + " came to " + a;
  $("title").textContent = "How " + meta.model + " came to " + a;
  const top = [];
  if (meta.options.list.length && (meta.options.mass < .5 || !meta.options.likeliest_is_one))
    top.push(el("p", {class: "warning", role: "note"}, "The options hold " + percent(meta.options.mass) + " of the probability. The model would not answer with one of them."));
  top.push(el("p", {}, "Explained: the token at position " + t + (t < meta.tokens.length ? state.guessing ? "" : ", " + a : ", which would come next") + ". " + (meta.notice || "For research and teaching; not for clinical use.")));
  if (meta.lesson) top.push(lessonBox(meta.lesson));
  $("top").replaceChildren(...top);
  $("run").textContent = meta.engine + "; checkpoint " + meta.hash.slice(0, 16) + "…, " + meta.type + ", " + meta.shape.layers + " layers of " + meta.shape.heads + " heads (" + meta.shape.kv_heads + " of keys), hidden " + meta.shape.hidden + "; " + meta.time.kernels + " kernels, cache " + meta.kv + (meta.strict ? ", strict" : "") + ", template " + meta.template + ", temperature " + meta.temperature + ", seed " + meta.seed + "; " + meta.n_prompt + " + " + (meta.tokens.length - meta.n_prompt) + " tokens.";
  $("command").textContent = meta.time.command;
  $("contents").replaceChildren(...views.map(v => el("li", {}, toView(v))));
}
function begin() {
  meta = JSON.parse($("meta").textContent);
  readBlocks();
  view("Text", limits[1], buildText, tableText);
  view("Why this word", limits[2], buildWhy, tableWhy);
  view("Layer by layer", limits[3], buildLens, tableLens);
  view("Attention", limits[4], buildAttention, tableAttention);
  view("What each part writes", limits[5], buildParts, tableParts);
  view("What if", limits[6], buildWhatIf, tableWhatIf);
  view("Dice", limits[7], buildDice, tableDice);
  view("Memory", limits[8], buildMemory, tableMemory);
  view("Time", limits[9], buildTime, tableTime);
  view("Two types", limits[10], buildOther, tableOther);
  $("views").replaceChildren(...views.map(v => v.section));
  Object.assign(state, startState());
  state.guessing = Boolean(meta.lesson) && !/v=|t=|check/.test(location.hash);
  if (state.guessing) state.token = meta.at;
  head();
  hideViews();
  for (const v of views) v.build(v);
  if (/v=|t=/.test(location.hash)) { fromHash(); for (const v of views) v.build(v); }
  document.addEventListener("keydown", keys);
  $("help").addEventListener("click", () => $("keys").showModal());
  $("close").addEventListener("click", () => $("keys").close());
  $("what").addEventListener("click", () => $("words").showModal());
  $("closewords").addEventListener("click", () => $("words").close());
  $("check").addEventListener("click", () => { const bad = check(); $("verdict").textContent = bad.length ? "check: " + bad.length + " disagree; " + bad[0] : "check: all sums agree"; });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
  if (location.hash === "#check") $("check").click();
  document.documentElement.dataset.ready = (performance.now() - started).toFixed(0);
}
try { begin(); } catch (e) {
  $("title").textContent = "This page is damaged";
  $("top").textContent = "Its data cannot be read: " + e.message + ". Write it again with medrun-explain.";
  document.documentElement.dataset.ready = "failed";
}
