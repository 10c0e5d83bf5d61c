"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const T = data.tokens.length, L = data.layers.length;
const state = { place: T - 1, layer: 0, head: 0, degree: data.output.temperatures.indexOf(1) };
const maps = new Map();

// Attention maps are unpacked when they are looked at: rows below and on the diagonal, 16 bits a number.
function attention(layer, head) {
  if (!maps.has(layer)) {
    const bytes = Uint8Array.from(atob(data.layers[layer].attention), (c) => c.charCodeAt(0));
    maps.set(layer, new Uint16Array(bytes.buffer));
  }
  const all = maps.get(layer), size = (T * (T + 1)) / 2, rows = [];
  for (let i = 0, at = head * size; i < T; i++) {
    const row = new Float64Array(T);
    for (let j = 0; j <= i; j++) row[j] = all[at++] / 65535;
    rows.push(row);
  }
  return rows;
}

function probabilities(place, degree) {
  const { top, normaliser } = data.output.next[place], temperature = data.output.temperatures[degree];
  return top.map(([id, text, logit]) => ({ id, text, p: Math.exp(logit / temperature - normaliser[degree]) }));
}

const seen = (text) => text.replace(/ /g, "·").replace(/\n/g, "↵").replace(/\t/g, "⇥") || "∅";
const shape = (sizes) => (sizes.length ? `(${sizes.join(", ")})` : "");
const percent = (p) => `${(100 * p).toFixed(p < 0.1 ? 2 : 1)}%`;

function cell(text, kind) {
  const td = document.createElement("td");
  if (kind) td.className = kind;
  td.textContent = text;
  return td;
}

function meter(share) {
  const td = document.createElement("td"), box = document.createElement("div"), fill = document.createElement("i");
  box.className = "meter";
  fill.style.width = `${100 * Math.min(1, share)}%`;
  box.append(fill);
  td.append(box);
  return td;
}

function fill(table, names, rows) {
  const head = document.createElement("tr");
  for (const name of names) head.append(Object.assign(document.createElement("th"), { textContent: name, scope: "col" }));
  table.replaceChildren(head, ...rows.map((cells) => {
    const tr = document.createElement("tr");
    tr.append(...cells);
    return tr;
  }));
}

// Colours: blue is below 0, red above; of attention, white (or the page) to blue.
const dark = matchMedia("(prefers-color-scheme: dark)");
function colour(value, signed) {
  const v = Math.max(-1, Math.min(1, value)), ground = dark.matches ? [29, 33, 40] : [255, 255, 255];
  const towards = signed && v > 0 ? [200, 85, 61] : dark.matches ? [109, 179, 221] : [20, 80, 120];
  return ground.map((g, k) => Math.round(g + (towards[k] - g) * Math.abs(v)));
}

function paint(canvas, rows, signed, scale = 1) {
  const height = rows.length, width = rows[0].length;
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d"), image = context.createImageData(width, height);
  for (let i = 0, at = 0; i < height; i++)
    for (let j = 0; j < width; j++, at += 4) {
      const [r, g, b] = colour(rows[i][j] / scale, signed);
      image.data.set([r, g, b, 255], at);
    }
  context.putImageData(image, 0, 0);
}

function tokens() {
  $("tokens").replaceChildren(...data.tokens.map((token, t) => {
    const button = Object.assign(document.createElement("button"), { className: "token", textContent: seen(token.text), title: `id ${token.id}` });
    button.onclick = () => { state.place = t; draw(); };
    return button;
  }));
  $("tokens").onkeydown = (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    state.place = Math.max(0, Math.min(T - 1, state.place + step));
    draw();
    $("tokens").children[state.place].focus();
  };
}

function embedding() {
  const row = data.embedding.rows[state.place], columns = Math.ceil(Math.sqrt(row.length * 3)), lines = [];
  for (let i = 0; i < row.length; i += columns) lines.push([...row.slice(i, i + columns), ...Array(Math.max(0, i + columns - row.length)).fill(0)]);
  paint($("vector"), lines, true, Math.max(...row.map(Math.abs)));
  $("vector").style.width = "100%";
  fill($("nearest"), ["token", "id", "cosine"], data.embedding.nearest[state.place].map(([id, text, cosine]) => [cell(seen(text), "piece"), cell(id), cell(cosine.toFixed(3))]));
}

function plane() {
  const own = new Set(data.tokens.map((t) => t.id)), points = data.embedding.plane;
  const span = (k) => [Math.min(...points.map((p) => p[k])), Math.max(...points.map((p) => p[k]))];
  const [left, right] = span(2), [low, high] = span(3), svg = $("plane"), name = "http://www.w3.org/2000/svg";
  svg.replaceChildren(...points.map(([id, text, x, y]) => {
    const g = document.createElementNS(name, "g"), dot = document.createElementNS(name, "circle"), label = document.createElementNS(name, "text");
    const px = 20 + (370 * (x - left)) / (right - left || 1), py = 320 - (300 * (y - low)) / (high - low || 1);
    if (own.has(id)) g.setAttribute("class", "own");
    for (const [key, value] of [["cx", px], ["cy", py], ["r", own.has(id) ? 3.5 : 2]]) dot.setAttribute(key, value);
    label.setAttribute("x", px + 5);
    label.setAttribute("y", py + 4);
    label.textContent = seen(text);
    g.append(dot, label);
    return g;
  }));
}

function layer() {
  const own = data.layers[state.layer];
  $("which").textContent = `${state.layer + 1} of ${L}${own.window ? `, looking at the latest ${own.window} tokens` : ""}`;
  $("heads").replaceChildren(...own.habits.map((_, head) => {
    const button = document.createElement("button"), small = document.createElement("canvas");
    button.append(small, document.createElement("br"), `head ${head + 1}`);
    button.onclick = () => { state.head = head; draw(); };
    paint(small, attention(state.layer, head), false, 0.7);
    return button;
  }));
  fill($("shapes"), ["", "shape"], Object.entries(own.shapes).map(([name, sizes]) => [cell(name), cell(shape(sizes), "shape")]));
}

function head() {
  [...$("heads").children].forEach((button, k) => button.setAttribute("aria-pressed", k === state.head));
  const rows = attention(state.layer, state.head), habit = data.layers[state.layer].habits[state.head];
  paint($("map"), rows, false, 0.7);
  $("habit").textContent = `${habit.words}. On the first token ${percent(habit.on_first)}, on the token before ${percent(habit.on_previous)}, on itself ${percent(habit.on_itself)}; mean distance ${habit.distance.toFixed(1)} tokens, entropy ${habit.entropy.toFixed(2)} nats.`;
  const row = [...rows[state.place]].map((p, j) => [p, j]).sort((a, b) => b[0] - a[0]).slice(0, 6);
  fill($("looks"), ["token", "place", "attention", ""], row.map(([p, j]) => [cell(seen(data.tokens[j].text), "piece"), cell(j + 1), cell(percent(p)), meter(p)]));
  read(state.place, row[0][1], rows);
}

function read(i, j, rows = attention(state.layer, state.head)) {
  $("reading").textContent = `“${seen(data.tokens[i].text)}” (${i + 1}) looks at “${seen(data.tokens[j].text)}” (${j + 1}): ${rows[i][j].toFixed(4)}. The row adds up to ${rows[i].reduce((a, b) => a + b, 0).toFixed(4)}.`;
}

function residual() {
  const longest = Math.max(...data.layers.map((l) => l.residual?.[state.place] ?? 0)), said = (value) => (value === null ? "" : value[state.place].toFixed(2));
  const rows = data.layers.map((l, k) => {
    const guess = data.lens[k]?.[state.place];
    return [cell(k + 1), cell(said(l.residual)), meter((l.residual?.[state.place] ?? 0) / longest), cell(said(l.by_attention)), cell(said(l.by_mlp)), cell(guess ? seen(guess[1]) : "", "piece"), cell(guess ? percent(guess[2]) : "")];
  });
  fill($("stream"), ["after layer", "|x|", "", "|attention|", "|mlp|", "it would say", "with"], rows);
}

function output() {
  const temperature = data.output.temperatures[state.degree], before = data.tokens.slice(0, state.place + 1).map((t) => t.text).join("");
  $("degree").textContent = temperature.toFixed(1);
  $("entropy").textContent = data.output.next[state.place].entropy[state.degree].toFixed(3);
  $("after").textContent = `After “${before.slice(-120)}”:`;
  fill($("next"), ["next token", "id", "logit", "probability", ""], probabilities(state.place, state.degree).map(({ id, text, p }, k) =>
    [cell(seen(text), "piece"), cell(id), cell(data.output.next[state.place].top[k][2].toFixed(3)), cell(percent(p)), meter(p)]));
}

function draw() {
  [...$("tokens").children].forEach((button, t) => button.setAttribute("aria-pressed", t === state.place));
  const { id, text } = data.tokens[state.place];
  $("chosen").textContent = `Chosen: token ${state.place + 1} of ${T}, “${seen(text)}”, id ${id}.`;
  embedding();
  head();
  residual();
  output();
}

const shapes = { text: [T], embedding: data.embedding.shape, positions: data.positions.shape, layers: [data.about.heads, T, T], residual: [T, data.about.width], output: data.output.shape };
for (const [id, sizes] of Object.entries(shapes)) document.querySelector(`#${id} .shape`).textContent = shape(sizes);
document.querySelector("#positions .formula").textContent = data.positions.formula;
if (data.positions.rows) {
  $("columns").textContent = `A row is a place in the text, a column a ${data.positions.columns}; red is above 0, blue below.`;
  paint($("waves"), data.positions.rows, true, Math.max(...data.positions.rows.flat().map(Math.abs)));
  $("waves").style.cssText = `width:100%;height:${Math.min(320, 5 * T + 20)}px`;
}
$("layer").max = L;
$("layer").oninput = (event) => { state.layer = event.target.value - 1; state.head = Math.min(state.head, data.layers[state.layer].habits.length - 1); layer(); head(); };
$("temperature").max = data.output.temperatures.length - 1;
$("temperature").value = state.degree;
$("temperature").oninput = (event) => { state.degree = Number(event.target.value); output(); };
$("most").textContent = Math.log(data.output.shape[1]).toFixed(2);
const over = (event) => {
  const box = $("map").getBoundingClientRect(), at = (v, from, size) => Math.max(0, Math.min(T - 1, Math.floor((T * (v - from)) / size)));
  return [at(event.clientY, box.top, box.height), at(event.clientX, box.left, box.width)];
};
$("map").onpointermove = (event) => read(...over(event));
$("map").onpointerdown = (event) => { [state.place] = over(event); draw(); };
dark.onchange = () => { layer(); draw(); };
if (T <= 40) // beyond, names are smaller than what can be read; the pointer tells them
  for (const id of ["rows", "columns_of"]) $(id).replaceChildren(...data.tokens.map((t) => Object.assign(document.createElement("li"), { textContent: seen(t.text).slice(0, 12) })));
tokens();
plane();
layer();
draw();
window.inside = { data, attention, probabilities };
