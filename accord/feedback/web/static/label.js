// The labeling page. What a labeler does is in `state` and, at once, in this browser's storage; the server has it a moment later.
// Answers leave by the outbox, which sends each until the server has acknowledged it, also after the page was closed: a request
// names itself, so that sending it twice changes nothing.

const $ = (id) => document.getElementById(id);
const meta = (name) => document.querySelector(`meta[name=${name}]`).content;
const ME = `${meta("store")}.${meta("person")}`; // another store may be served here tomorrow, with items of the same numbers
const OUTBOX = `accord.outbox.${ME}.`; // and the request's name: tabs share it, and none undoes what another does
const draftKey = (id) => `accord.draft.${ME}.${id}`;
const query = new URLSearchParams(location.search);
const asked = query.get("item");
const then = query.get("then") === "disputed" ? "/overview#disputed" : ""; // where to when the item is done; else on to the next one
const FLAGS = [...$("flags").content.children].map((button) => button.dataset.flag);
const LETTERS = "ABCDEFGHI";
const IDLE = 60_000; // milliseconds without a key or a click after which time on the item stands still
const DRAFT = 500; // milliseconds after a change until the server has the draft too
const PATIENCE = 20_000; // milliseconds that a request may take

let item = null; // what is shown
let state = null; // {ranks, ratings, flags, note}: what is said of it, by place
let past = [], future = []; // for undo and redo
let at = 0; // the answer that keys speak of
let before = 0; // the one that they spoke of before: differences are from it
let expects = ""; // "rating" or "flag": what the next digit means
let plain = false;
let seconds = 0, ticked = Date.now(), touched = Date.now();
let refused = false; // the answer that was sent last
let last = null; // the item that was answered last: undo goes back to it
let sending = false, late = false, hinted = false, wait = 1000, retry = null, draftTimer = null, drafting = Promise.resolve(), chosen = false;

// What the browser keeps.

function stored(key, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(key)) ?? otherwise;
  } catch {
    return otherwise;
  }
}
const keep = (key, value) => localStorage.setItem(key, JSON.stringify(value));
const outbox = () => Object.keys(localStorage).filter((key) => key.startsWith(OUTBOX)).map((key) => ({ key, ...stored(key, {}) })).sort((a, b) => a.at - b.at);

// The server. A refusal has its status; no connection has none.

class Refused extends Error {
  constructor(status, text) {
    super(text);
    this.status = status;
  }
}

async function ask(method, path, body, more = {}) {
  const headers = { "X-CSRF-Token": meta("csrf"), "X-Accord-Store": meta("store") };
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const response = await fetch(path, { method, headers, body: body === undefined ? undefined : JSON.stringify(body), signal: AbortSignal.timeout(PATIENCE), ...more });
  const answer = await response.json().catch(() => null); // what a proxy says is no JSON, or not ours
  if (!response.ok) throw new Refused(response.status, answer?.error ?? response.statusText);
  if (answer === null || typeof answer !== "object") throw new Error("This is not the server's answer.");
  return answer;
}

const passing = (error) => !(error instanceof Refused) || error.status >= 500 || error.status === 429; // worth another try

function banner(text, good = false) {
  $("banner").hidden = !text;
  if ($("banner").textContent !== text) $("banner").textContent = text;
  $("banner").classList.toggle("good", good);
}

const say = (text) => { $("live").textContent = text; };

function hint(text) { // until the next key or click
  banner(text);
  hinted = true;
}

function heard() {
  touched = Date.now();
  if (hinted) banner("");
  hinted = false;
}

function counts(work) {
  if (work) $("counts").textContent = `${work.today} today · ${work.done} in all · ${work.left} left`;
}

// The outbox.

function newName() {
  const bytes = crypto.getRandomValues(new Uint8Array(16)); // crypto.randomUUID is not there without TLS
  return Array.from(bytes, (b) => b.toString(16).padStart(2, "0")).join("");
}

async function send() {
  if (sending) return;
  sending = true;
  clearTimeout(retry);
  try {
    for (let waiting = outbox(); waiting.length; waiting = outbox()) {
      const { key, id, body } = waiting[0];
      await drafting; // a draft must not arrive after its answer
      let answer;
      try {
        answer = await ask("POST", `/api/items/${id}/label`, body);
        if (!("new" in answer)) throw new Error("This is not the server's answer.");
        refused = false;
      } catch (error) {
        if (passing(error)) throw error;
        if ([401, 403, 409].includes(error.status)) throw error;
        banner(`An answer was refused: ${error.message}`);
        answer = {};
        refused = true;
      }
      localStorage.removeItem(key);
      counts(answer.work);
      if (answer.gold) await calibrate(answer.gold, body.ranks ?? []);
    }
    wait = 1000;
    if (late) banner("");
    late = false;
    if (item === null && then && String(last) === asked && !refused) location.href = then; // a decision is made
    else if (item === null) await next();
  } catch (error) {
    failed(error);
  } finally {
    sending = false;
  }
}

function failed(error) {
  if (passing(error)) return offline(error instanceof Refused ? error.message : "No connection.");
  if (![401, 403, 409].includes(error.status)) return banner(error.message);
  if (Date.now() - stored("accord.reloaded", 0) < 60_000) return offline(error.message);
  keep("accord.reloaded", Date.now()); // logged out, in again elsewhere, another store: the page brings to the login, or is a new one
  location.reload();
}

function offline(why) {
  const waiting = outbox().length;
  late = true;
  banner(`${why} ${waiting ? `${waiting} ${waiting === 1 ? "answer is" : "answers are"} kept in this browser and sent` : "It goes on"} as soon as that works.`);
  clearTimeout(retry);
  retry = setTimeout(send, wait * (0.5 + Math.random())); // not everybody at once when the server is back
  wait = Math.min(wait * 2, 30_000);
}

// Items.

async function next() {
  const { item: given, work } = await ask("POST", "/api/next");
  counts(work);
  show(given);
}

async function open(id) {
  try {
    const { item: given, work } = await ask("GET", `/api/items/${id}`);
    counts(work);
    show(given);
  } catch (error) {
    failed(error);
  }
}

function blank(count) {
  const each = (value) => Array.from({ length: count }, () => structuredClone(value));
  return { ranks: each(null), ratings: each(null), flags: each([]), note: "" };
}

function show(answer) {
  const given = answer ?? null;
  item = given;
  $("work").hidden = !given;
  $("empty").hidden = Boolean(given);
  if (!given) return say("Nothing waits for you.");
  const count = given.completions.length;
  const said = given.label ?? {};
  const drafts = [given.draft, stored(draftKey(given.id), null)].filter((d) => d && d.answers === given.answers).sort((a, b) => b.at - a.at);
  const source = drafts[0] ?? said;
  const usable = (values) => Array.isArray(values) && values.length === count;
  state = blank(count);
  for (const name of ["ranks", "ratings", "flags"]) if (usable(source[name])) state[name] = structuredClone(source[name]);
  state.note = source.note ?? "";
  seconds = drafts[0]?.seconds ?? 0;
  ticked = touched = Date.now();
  past = [], future = [], expects = "";
  at = Math.max(0, state.ranks.indexOf(null)); // where a draft was left
  before = at > 0 ? at - 1 : Math.min(1, count - 1);
  const edits = given.state === "done" || given.state === "skipped";
  $("mode").hidden = !(given.calibration || edits || given.decision);
  $("mode").textContent = given.decision
    ? `You decide this prompt: your ranking stands in the place of the others' in what is trained on.${edits ? " You have decided it before." : ""}`
    : edits ? "You are changing an earlier answer. Submit it, or go on with the next item by E and Esc."
    : "One to begin with: after your answer you see how others rank it.";
  if (given.decision) $("mode").append(" ", element("a", { href: "/overview#disputed", textContent: "Back to what is disputed" }));
  $("prompt").replaceChildren(...given.prompt.map(turn));
  $("completions").replaceChildren(...given.completions.map(card));
  $("board").replaceChildren(...lanes(count));
  draw();
  scrollTo(0, 0);
  $("completions").children[at].focus({ preventScroll: true });
  say(`New item with ${count} answers.`);
}

function element(tag, values = {}, ...children) {
  const made = Object.assign(document.createElement(tag), values);
  made.append(...children);
  return made;
}

function textOf(part) {
  const made = element("div", { className: plain ? "text plain" : "text" });
  if (plain) made.textContent = part.text;
  else made.innerHTML = part.html; // sanitised by the server, and this page's policy runs no inline script
  return made;
}

const turn = (part) =>
  element("div", { className: `turn ${["assistant", "system"].includes(part.role) ? part.role : "user"}` }, element("div", { className: "role", textContent: part.role }), textOf(part));

function card(completion, place) {
  const count = item.completions.length;
  const rank = (value, name) => {
    const button = element("button", { textContent: value, className: value === "F" ? "f" : "" });
    button.dataset.rank = value;
    button.setAttribute("aria-label", `Answer ${LETTERS[place]}: ${name}`);
    button.onclick = () => (go(place), setRank(place, state.ranks[place] === value ? null : value));
    return button;
  };
  const ranks = element("div", { className: "ranks", role: "group" }, ...Array.from({ length: count }, (_, r) => rank(r + 1, `rank ${r + 1}`)), rank("F", "F, no answer"));
  ranks.setAttribute("aria-label", `Rank of answer ${LETTERS[place]}`);
  const rating = element("select", {}, element("option", { value: "", textContent: "–" }), ...[1, 2, 3, 4, 5, 6, 7].map((n) => element("option", { value: n, textContent: n })));
  rating.onchange = () => change((s) => { s.ratings[place] = rating.value ? Number(rating.value) : null; });
  const flags = $("flags").content.cloneNode(true);
  for (const button of flags.children) button.onclick = () => flag(place, button.dataset.flag);
  const made = element(
    "li", { className: "answer", tabIndex: -1 },
    element("header", {}, element("span", { className: "letter", textContent: `Answer ${LETTERS[place]}` }), element("span", { className: "badge" })),
    textOf(completion), ranks,
    element("div", { className: "more" }, element("label", { textContent: "Rating " }, rating), element("span", { className: "flags" }, flags)),
  );
  made.onpointerdown = (event) => { if (!event.target.closest("button, select, a")) go(place); };
  made.onfocus = () => go(place);
  return made;
}

function lanes(count) {
  return [...Array.from({ length: count }, (_, r) => r + 1), "F", ""].map((rank) => {
    const name = rank === 1 ? "1 · best" : rank === "F" ? "F · no answer" : rank === "" ? "not ranked" : String(rank);
    const lane = element("div", { className: "lane" }, element("h3", { textContent: name }));
    lane.dataset.rank = rank;
    lane.ondragover = (event) => (event.preventDefault(), lane.classList.add("over"));
    lane.ondragleave = () => lane.classList.remove("over");
    lane.ondrop = (event) => {
      event.preventDefault();
      lane.classList.remove("over");
      const place = Number(event.dataTransfer.getData("text/plain"));
      if (place in state.ranks) go(place), setRank(place, rank === "" ? null : rank);
    };
    return lane;
  });
}

const titleOf = (rank) => (rank === null ? "" : rank === "F" ? "F" : `Rank ${rank}`);
const complete = () => state.ranks.every((rank) => rank !== null);

function draw() {
  for (const [place, made] of [...$("completions").children].entries()) {
    const rank = state.ranks[place];
    made.classList.toggle("at", place === at);
    made.tabIndex = place === at ? 0 : -1;
    made.setAttribute("aria-label", `Answer ${LETTERS[place]}, ${rank === null ? "not ranked" : titleOf(rank)}`);
    const badge = made.querySelector(".badge");
    badge.textContent = titleOf(rank);
    badge.classList.toggle("fail", rank === "F");
    for (const button of made.querySelectorAll(".ranks button")) button.setAttribute("aria-pressed", String(button.dataset.rank === String(rank)));
    for (const button of made.querySelectorAll(".flag")) button.setAttribute("aria-pressed", String(state.flags[place].includes(button.dataset.flag)));
    made.querySelector("select").value = state.ratings[place] ?? "";
  }
  for (const lane of $("board").children) {
    lane.replaceChildren(lane.firstChild);
    state.ranks.forEach((rank, place) => {
      if (String(rank ?? "") !== lane.dataset.rank) return;
      const chip = element("span", { className: "chip", textContent: LETTERS[place], draggable: true });
      chip.ondragstart = (event) => event.dataTransfer.setData("text/plain", place);
      lane.append(chip);
    });
  }
  if ($("note").value !== state.note) $("note").value = state.note;
  $("submit").disabled = !complete();
  $("undo").disabled = !past.length && !last;
  $("redo").disabled = !future.length;
}

// Changes.

function change(how) {
  past.push({ state: structuredClone(state), at });
  future = [];
  how(state);
  changed();
}

function changed() {
  touched = Date.now();
  tick();
  keep(draftKey(item.id), draft());
  clearTimeout(draftTimer);
  draftTimer = setTimeout(saveDraft, DRAFT);
  draw();
}

const draft = () => ({ ...state, seconds, at: Date.now(), answers: item.answers });

function saveDraft(more = {}) {
  clearTimeout(draftTimer);
  draftTimer = null;
  if (!item) return;
  const { id } = item, body = draft();
  drafting = drafting.then(() => ask("PUT", `/api/items/${id}/draft`, body, more)).catch(() => {}); // this browser has it, and the next change tries again
}

function setRank(place, rank) {
  change((s) => { s.ranks[place] = rank; });
  say(`Answer ${LETTERS[place]}: ${rank === null ? "no rank" : titleOf(rank)}.`);
}

function flag(place, name) {
  change((s) => { s.flags[place] = s.flags[place].includes(name) ? s.flags[place].filter((f) => f !== name) : [...s.flags[place], name]; });
}

function go(place) {
  if (place === at) return;
  before = at;
  at = place;
  expects = "";
  draw();
}

function move(by) {
  go((at + by + state.ranks.length) % state.ranks.length);
  $("completions").children[at].focus();
}

function ranked(rank) {
  setRank(at, rank);
  const open = state.ranks.findIndex((value, place) => value === null && place > at);
  const first = open >= 0 ? open : state.ranks.indexOf(null);
  go(first >= 0 ? first : Math.min(at + 1, state.ranks.length - 1)); // all have one: they are being ranked anew
  $("completions").children[at].focus();
}

function undo() {
  if (!past.length) return last && open(last);
  swap(past, future);
  say("Undone.");
}

function redo() {
  if (!future.length) return;
  swap(future, past);
  say("Done again.");
}

function swap(from, to) {
  const then = from.pop();
  to.push({ state, at: then.at });
  state = { ...then.state, note: state.note }; // what was written there has its own undo
  changed();
  go(then.at);
  $("completions").children[at].focus();
}

// Time on the item: what passes while the page is seen and used.

function tick() {
  const now = Date.now();
  if (!document.hidden && now - touched < IDLE) seconds += (now - ticked) / 1000;
  ticked = now;
}
setInterval(tick, 1000);
document.addEventListener("visibilitychange", () => { ticked = Date.now(); });
addEventListener("pagehide", () => {
  if (draftTimer && item) ask("PUT", `/api/items/${item.id}/draft`, draft(), { keepalive: true, signal: undefined }).catch(() => {});
});

// Done with it.

function leave(body) {
  tick();
  clearTimeout(draftTimer);
  draftTimer = null;
  const request = newName();
  keep(OUTBOX + request, { id: item.id, at: Date.now(), body: { request, seconds, ...body } });
  localStorage.removeItem(draftKey(item.id));
  last = item.id;
  item = null;
  $("work").hidden = true;
  send();
}

function submit() {
  if (!complete()) return hint("Some answers have no rank yet.");
  leave({ ranks: state.ranks, ratings: state.ratings, flags: state.flags, note: state.note.trim() });
}

function skip(reason) {
  $("skip-dialog").close();
  if (reason.trim()) leave({ reason: reason.trim(), ratings: state.ratings, flags: state.flags, note: state.note.trim() });
}

function calibrate(gold, mine) {
  const row = (cells, tag) => element("tr", {}, ...cells.map((cell) => element(tag, { textContent: cell })));
  const rows = gold.map((rank, place) => row([LETTERS[place], mine[place] ?? "skipped", rank, String(rank) === String(mine[place]) ? "the same" : ""], "td"));
  $("gold-text").replaceChildren(element("table", { className: "wide" }, row(["answer", "you", "others", ""], "th"), ...rows));
  $("gold-dialog").showModal();
  return new Promise((done) => { $("gold-dialog").addEventListener("close", done, { once: true }); });
}

async function earlier() {
  try {
    const { items } = await ask("GET", "/api/history");
    const list = items.map(({ id, prompt, label, decision }) => {
      const made = element("button", {}, element("b", { textContent: (decision ? "decision: " : "") + (label?.reason ? `skipped: ${label.reason}` : (label?.ranks ?? []).map((r, p) => `${LETTERS[p]} ${r}`).join(", ")) }), element("br"), prompt);
      made.onclick = () => ((chosen = true), $("earlier-dialog").close(), open(id));
      return made;
    });
    $("earlier-list").replaceChildren(...(list.length ? list : [element("p", { textContent: "You have answered nothing yet." })]));
    chosen = false;
    $("earlier-dialog").showModal();
  } catch (error) {
    failed(error);
  }
}

// Differences, word by word: the longest common subsequence.

function difference(first, second) {
  const words = (text) => (text.match(/\s+|[^\s]+/g) ?? []).slice(0, 3000);
  const a = words(first), b = words(second);
  const longest = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
  for (let i = a.length - 1; i >= 0; i--)
    for (let j = b.length - 1; j >= 0; j--)
      longest[i][j] = a[i] === b[j] ? longest[i + 1][j + 1] + 1 : Math.max(longest[i + 1][j], longest[i][j + 1]);
  const parts = [];
  const add = (tag, word) => (parts.at(-1)?.tag === tag ? (parts.at(-1).text += word) : parts.push({ tag, text: word }));
  let i = 0, j = 0;
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && a[i] === b[j]) add("span", a[i++]), j++;
    else if (j >= b.length || (i < a.length && longest[i + 1][j] >= longest[i][j + 1])) add("del", a[i++]);
    else add("ins", b[j++]);
  }
  return parts.map(({ tag, text }) => element(tag, { textContent: text }));
}

function differ() {
  const texts = item.completions.map((c) => c.text);
  const draw = () => $("differ-text").replaceChildren(...difference(texts[$("differ-from").value], texts[$("differ-to").value]));
  for (const [id, place] of [["differ-from", before === at ? (at + 1) % texts.length : before], ["differ-to", at]]) {
    $(id).replaceChildren(...texts.map((_, p) => element("option", { value: p, textContent: `Answer ${LETTERS[p]}` })));
    $(id).value = place;
    $(id).onchange = draw;
  }
  draw();
  $("differ-dialog").showModal();
}

function togglePlain() {
  plain = !plain;
  $("plain").firstChild.textContent = plain ? "Markdown " : "Plain text ";
  [...$("prompt").children].forEach((made, k) => made.lastChild.replaceWith(textOf(item.prompt[k])));
  [...$("completions").children].forEach((made, k) => made.querySelector(".text").replaceWith(textOf(item.completions[k])));
}

// Keys.

const KEYS = {
  f: () => ranked("F"), arrowdown: () => move(1), arrowright: () => move(1), j: () => move(1), arrowup: () => move(-1), arrowleft: () => move(-1), k: () => move(-1),
  backspace: () => setRank(at, null), delete: () => setRank(at, null), enter: submit, s: () => $("skip-dialog").showModal(), z: undo, y: redo, e: earlier, d: differ,
  n: () => $("note").focus(), m: togglePlain, i: () => { location.href = "/instructions"; }, "?": () => $("help-dialog").showModal(),
  r: () => { expects = "rating"; hint("Rating: a digit from 1 to 7."); }, x: () => { expects = "flag"; hint(`Flag: its number, from 1 to ${FLAGS.length}, as they stand under the answer.`); }, escape: () => { expects = ""; },
};

function digit(value) {
  const what = expects;
  expects = "";
  if (what === "rating") {
    if (value <= 7) change((s) => { s.ratings[at] = value; });
  } else if (what === "flag") {
    if (value <= FLAGS.length) flag(at, FLAGS[value - 1]);
  } else if (value <= state.ranks.length) ranked(value);
  else hint(`There are ${state.ranks.length} answers; ranks go from 1 to ${state.ranks.length}.`);
}

document.addEventListener("keydown", (event) => {
  heard();
  const dialog = document.querySelector("dialog[open]");
  if (dialog) {
    if (dialog.id === "skip-dialog" && !event.target.matches("input")) {
      const choice = /^[1-9]$/.test(event.key) && dialog.querySelectorAll(".choices button")[event.key - 1];
      const written = event.key.length === 1 ? (!event.ctrlKey && !event.metaKey) || event.getModifierState("AltGraph") : ["Process", "Dead"].includes(event.key);
      const presses = event.key === " " && event.target.matches("button");
      if (choice) event.preventDefault(), choice.click();
      else if (event.repeat && event.key !== "Tab") event.preventDefault(); // the key that opened this is still down
      else if (written && !presses) $("skip-words").focus(); // where this letter then lands: a reason in one's own words
    }
    if (dialog.id === "earlier-dialog" && ["ArrowDown", "ArrowUp", "j", "k"].includes(event.key)) {
      const choices = [...$("earlier-list").querySelectorAll("button")], place = choices.indexOf(document.activeElement);
      event.preventDefault();
      choices.at((place + (["ArrowDown", "j"].includes(event.key) ? 1 : place < 0 ? 0 : -1)) % choices.length)?.focus();
    }
    return;
  }
  if (event.altKey || event.isComposing || event.repeat && event.key === "Enter") return;
  if (event.target.matches("textarea, input, select")) {
    if (event.key === "Escape") $("completions").children[at]?.focus();
    return;
  }
  if (event.ctrlKey || event.metaKey) {
    if (!item || event.key.toLowerCase() !== "z") return;
    event.preventDefault();
    return event.shiftKey ? redo() : undo();
  }
  const key = event.key.toLowerCase();
  if ((key === "enter" || key === " ") && event.target.matches("button, a")) return; // a button that has the focus is pressed
  if (!item) {
    if (key === "e") earlier();
    if (key === "z" && last) open(last);
    return;
  }
  if (/^[1-9]$/.test(event.key)) event.preventDefault(), digit(Number(event.key));
  else if (Object.hasOwn(KEYS, key)) event.preventDefault(), KEYS[key]();
});
document.addEventListener("pointerdown", heard);

for (const [id, act] of [["submit", submit], ["skip", KEYS.s], ["undo", undo], ["redo", redo], ["differ", differ], ["earlier", earlier], ["plain", togglePlain], ["help", KEYS["?"]]]) $(id).onclick = act;
for (const button of document.querySelectorAll("dialog .close")) button.onclick = () => button.closest("dialog").close();
for (const button of $("skip-dialog").querySelectorAll(".choices button")) button.onclick = () => skip(button.value);
$("skip-form").onsubmit = (event) => (event.preventDefault(), skip($("skip-words").value));
$("skip-dialog").onclose = () => { $("skip-words").value = ""; };
$("earlier-dialog").onclose = () => { if (!chosen && item && !["open", "late"].includes(item.state)) next().catch(failed); };
$("note").oninput = () => { state.note = $("note").value; changed(); };
$("again").onclick = () => next().catch(failed);
addEventListener("online", () => { wait = 1000; send(); });

// Begin: first what an earlier visit could not send, then an item: the one that was asked for, or the next.

if (asked) await open(asked);
await send();
