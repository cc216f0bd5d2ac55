// Shows what regd tells in /events, and says so when it tells nothing. What it tells holds names
// from the disk: they become text, never markup.

const SILENT_MS = 25_000; // regd tells something every 10 s
const OLD_S = 75; // it looks anew once a second, and twice a minute in the worst of times
const GRACE_MS = 4_000; // a restart of regd is no reason to call anybody
const AGAIN_MS = [1_000, 2_000, 5_000, 10_000, 20_000];
const MARKS = { good: "✓", busy: "↑", waiting: "…", alarm: "!", lost: "✕" };
const ROW_MARKS = { done: "✓", working: "↑", waiting: "…", held: "–", parked: "!" };
const ICON_COLOURS = {
  good: ["#14632f", "#fff"],
  busy: ["#1250b0", "#fff"],
  waiting: ["#ffc44d", "#2a1c00"],
  alarm: ["#b3211b", "#fff"],
  lost: ["#3d424d", "#fff"],
};

const $ = (id) => document.getElementById(id);

let facts = null; // the latest report
let checkedAt = 0; // when regd last saw that it holds, in seconds by regd's clock
let behindS = 0; // how much this computer's clock is behind regd's
let heardAt = Date.now();
let failingSince = null;
let tooMany = false;
let tries = 0;
let source = null;
let again = null;

// --- small helpers -------------------------------------------------------------------------------

function make(tag, className = "", text = "") {
  const element = document.createElement(tag);
  element.className = className;
  element.textContent = text;
  return element;
}

function say(element, text) {
  // a selection in it, and a reader at it, are left alone as long as nothing changes
  if (element.textContent !== text) element.textContent = text;
}

function sayOrHide(element, text) {
  say(element, text || "");
  element.hidden = !text;
}

function count(number, noun) {
  return `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
}

function bytes(number) {
  const units = ["B", "kB", "MB", "GB", "TB", "PB"];
  let unit = 0;
  for (; number >= 999.5 && unit < units.length - 1; unit++) number /= 1000;
  return `${number.toLocaleString("en", { maximumSignificantDigits: number < 99.5 ? 2 : 3 })}\u00A0${units[unit]}`;
}

/** Give a list one child an item, by key: those that stay are kept, with focus and selection. */
function list(parent, items, keyOf, create, fill) {
  const focused = document.activeElement;
  const keys = new Set(items.map(keyOf));
  const old = new Map();
  for (const child of [...parent.children]) {
    if (keys.has(child.dataset.key)) old.set(child.dataset.key, child);
    else child.remove();
  }
  let place = parent.firstElementChild;
  for (const item of items) {
    const key = keyOf(item);
    let child = old.get(key);
    if (!child) {
      child = create(item);
      child.dataset.key = key;
    }
    fill(child, item);
    if (child === place) place = place.nextElementSibling;
    else parent.insertBefore(child, place);
  }
  if (focused !== document.activeElement && focused?.isConnected) {
    focused.focus({ preventScroll: true });
  }
}

// --- times ---------------------------------------------------------------------------------------

const HOUR = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit" });
const DAY = new Intl.DateTimeFormat(undefined, { weekday: "short", day: "numeric", month: "short" });
const WHOLE = new Intl.DateTimeFormat(undefined, { dateStyle: "full", timeStyle: "long" });

function relative(seconds) {
  const s = Math.abs(seconds);
  if (s < 60) return seconds > 0 ? "in a moment" : "just now";
  const text =
    s < 3600 ? `${Math.floor(s / 60)} min`
    : s < 48 * 3600 ? `${Math.floor(s / 3600)} h`
    : `${Math.floor(s / 86400)} days`;
  return seconds > 0 ? `in ${text}` : `${text} ago`;
}

function absolute(at) {
  // what regd's clock calls `at`, this computer's clock may call otherwise; people go by theirs
  const date = new Date((at - behindS) * 1000);
  const sameDay = date.toDateString() === new Date().toDateString();
  return sameDay ? HOUR.format(date) : `${DAY.format(date)}, ${HOUR.format(date)}`;
}

function fillTime(element) {
  const at = Number(element.dataset.at);
  say(element, `${absolute(at)} (${relative(at - behindS - Date.now() / 1000)})`);
}

function time(at) {
  const element = document.createElement("time");
  element.dataset.at = at;
  const date = new Date(at * 1000);
  element.dateTime = date.toISOString();
  element.title = WHOLE.format(date);
  fillTime(element);
  return element;
}

/** Put a text and a time into an element, or nothing, and hide it, where there is no time. */
function sayTime(element, text, at) {
  element.hidden = at === null;
  if (at === null) element.replaceChildren();
  else if (element.firstChild?.data !== text || element.lastChild.dataset.at !== String(at)) {
    element.replaceChildren(text, time(at));
  }
}

// --- the statement -------------------------------------------------------------------------------

function statement() {
  const silentMs = Date.now() - heardAt;
  const failing = failingSince !== null && Date.now() - failingSince > GRACE_MS;
  if (tooMany) {
    return {
      state: "lost", title: "Too many of these pages are open", since: null, what_since: "",
      text: "Close some of them. This one goes on by itself then.", detail: "",
    };
  }
  if (failing || silentMs > SILENT_MS) {
    return {
      state: "lost", title: "regd does not answer",
      since: facts ? heardAt / 1000 + behindS : null, what_since: "Since",
      text: "Is it running? Recordings are safe; they are registered once it runs.",
      detail: `On the computer that records: systemctl status regd.${
        facts ? " What is below is how things stood then." : ""}`,
    };
  }
  if (facts && Date.now() / 1000 + behindS - checkedAt > OLD_S) {
    return {
      state: "lost", title: "regd has no news", since: checkedAt, what_since: "Since",
      text: "It runs, but is too busy to look, or its disk does not answer. What is below is how things stood then.",
      detail: "",
    };
  }
  return facts?.statement ?? null;
}

let spokenFor = "";

function showStatement() {
  const now = statement();
  if (!now) return;
  $("whole").dataset.state = now.state;
  say($("title"), now.title.replace(/(\d) /g, "$1\u00A0")); // "2 files" stay on one line
  sayTime($("since"), `${now.what_since} `, now.since);
  say($("text"), now.text);
  sayOrHide($("detail"), now.detail);
  const where = facts ? facts.host : location.hostname;
  const title = `${MARKS[now.state]} ${now.title} · ${where}`;
  if (document.title !== title) document.title = title;
  showIcon(now.state);
  // spoken once for each thing that comes up, not for each file
  const matter = now.state === "busy" ? "busy" : `${now.state} ${now.title}`;
  if (matter !== spokenFor) {
    spokenFor = matter;
    say($("spoken"), `${now.title}. ${now.text}`);
  }
}

function showIcon(state) {
  const link = document.querySelector("link[rel=icon]");
  if (link.dataset.state === state) return;
  link.dataset.state = state;
  const shape = document.querySelector(`[data-icon=${state}]`).getAttribute("d");
  const [fill, ink] = ICON_COLOURS[state];
  link.type = "image/svg+xml";
  link.href = `data:image/svg+xml,${encodeURIComponent(
    `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 24 24"><rect width="24" height="24"
    rx="${state === "alarm" ? 4 : 12}" fill="${fill}"/><path d="${shape}" fill="none"
    stroke="${ink}" stroke-width="3.2" stroke-linecap="round" stroke-linejoin="round"/></svg>`)}`;
}

// --- what needs a person -------------------------------------------------------------------------

function makeChore() {
  const item = make("li");
  const details = make("details");
  details.append(make("summary"), make("ul"));
  item.append(make("h3"), make("p", "why"), make("p", "todo"), make("div", "commands"), details);
  return item;
}

function fillChore(item, chore) {
  const [title, why, todo, commands, details] = item.children;
  say(title, chore.what);
  say(why, chore.reason);
  sayOrHide(todo, chore.hint && `What to do: ${chore.hint}`);
  list(commands, chore.commands, (c) => c, makeCommand, () => {});
  details.hidden = !chore.items.length;
  const rest = chore.count - chore.items.length;
  say(details.firstChild, rest > 0 ? `The first ${chore.items.length} of them` : "All of them");
  list(details.lastChild, chore.items, (i) => i.what, () => {
    const entry = make("li");
    entry.append(make("b"), make("span", "soft"));
    return entry;
  }, (entry, i) => {
    say(entry.firstChild, i.what);
    say(entry.lastChild, ` ${i.reason}`);
  });
}

function makeCommand(command) {
  const line = make("div", "command");
  const code = make("code", "", command);
  const button = make("button", "", "Copy");
  button.type = "button";
  button.setAttribute("aria-label", `Copy the command ${command}`);
  button.addEventListener("click", () => copy(code, button));
  line.append(code, button);
  return line;
}

async function copy(code, button) {
  let done = "Copied";
  try {
    await navigator.clipboard.writeText(code.textContent);
  } catch {
    // from another computer without https, browsers do not let a page copy
    getSelection().selectAllChildren(code);
    done = "Press Ctrl+C";
  }
  button.textContent = done;
  say($("spoken"), done);
  setTimeout(() => { button.textContent = "Copy"; }, 3_000);
}

// --- sessions ------------------------------------------------------------------------------------

function makeRow(session) {
  const row = make("li");
  const name = make("div", "name");
  const parts = session.session.split("/");
  const [subject, date, number] = parts.slice(-3);
  name.append(make("b", "", `${subject} ${number}`), make("span", "soft", session.session));
  name.dataset.date = date;
  const far = make("div", "far");
  const bar = make("progress");
  bar.setAttribute("aria-hidden", "true"); // the words beside it say the same
  far.append(make("span"), bar);
  const words = make("div", "words");
  words.append(make("span"), " ", time(session.since));
  row.append(name, far, words);
  return row;
}

function fillRow(row, session) {
  const [, far, words] = row.children;
  // what is left out of a session that is done is among what needs somebody
  const state = session.state === "done" && session.files.refused ? "parked" : session.state;
  row.dataset.state = state;
  const all = Object.values(session.files).reduce((sum, n) => sum + n, 0);
  const registered = session.files.registered || 0;
  const part = registered && registered < all ? `${bytes(session.registered_bytes)} of ` : "";
  say(far.firstChild, !all ? "no files yet"
    : `${registered.toLocaleString("en")} of ${count(all, "file")} registered, ${part}${bytes(session.size_bytes)}`);
  const bar = far.lastChild;
  bar.hidden = !all;
  bar.max = all || 1;
  bar.value = registered;
  words.dataset.mark = ROW_MARKS[state];
  say(words.firstChild, session.words);
  if (words.lastChild.dataset.at !== String(session.since)) {
    words.lastChild.replaceWith(time(session.since));
  }
}

const URGENT_FIRST = ["parked", "working", "waiting", "held", "done"];

function byUrgency(a, b) {
  return URGENT_FIRST.indexOf(a.state) - URGENT_FIRST.indexOf(b.state) || b.since - a.since;
}

function showRows(id, sessions, more, moreText) {
  const section = $(id);
  list(section.querySelector(".rows"), sessions, (s) => s.session, makeRow, fillRow);
  sayOrHide(section.querySelector(".more"), more > 0 && `${moreText(more)}: regd status`);
}

// --- all of it -----------------------------------------------------------------------------------

function show() {
  const { chores, sessions } = facts;
  const more = facts.more_chores;
  $("chores").hidden = !chores.length;
  list($("chores").querySelector(".cards"), chores, (c) => `${c.what}\n${c.hint}`, makeChore, fillChore);
  sayOrHide($("chores").querySelector(".more"), more > 0 && `And ${count(more, "thing")} more: regd status`);

  const today = new Set(facts.today.map((s) => s.session));
  $("today").hidden = false;
  showRows("today", [...facts.today].sort(byUrgency),
    Object.values(facts.today_sessions).reduce((sum, n) => sum + n, 0) - facts.today.length,
    (n) => `And ${count(n, "session")} more of today`);
  sayOrHide($("today").querySelector(".nothing"), !facts.today.length
    && `No session is dated ${facts.day} yet. As soon as one is recorded, it appears here.`);

  const open = [...facts.working, ...facts.waiting];
  const earlier = open.filter((s) => !today.has(s.session));
  $("earlier").hidden = !earlier.length;
  showRows("earlier", earlier, sessions.working + sessions.waiting - open.length,
    (n) => `And ${count(n, "session")} more`);

  const held = facts.held.filter((s) => !today.has(s.session));
  $("held").hidden = !held.length;
  say($("held").querySelector(".nothing"), `Alyx does not know these sessions, and nobody has asked for them. If one is to be registered, put a file ${facts.flag} into its folder.`);
  showRows("held", held, sessions.held - facts.held.length, (n) => `And ${count(n, "session")} more`);
  showAbout();
  showStatement();
}

function showAbout() {
  const states = (counts) => Object.entries(counts).filter(([, n]) => n)
    .map(([state, n]) => `${n.toLocaleString("en")} ${state}`).join(", ") || "none yet";
  const { alyx, backlog } = facts;
  const lines = [
    ["Sessions", states(facts.sessions)],
    ["Files", states(facts.files)],
    ["Computer", facts.host],
    ["Data folder", facts.data_root ?? "none"],
    ["Alyx", alyx.url ?? "none"],
    ["Last scan", facts.scanned_at],
    ["regd", facts.version],
  ];
  if (backlog.sessions) {
    lines.splice(1, 0, ["Old sessions left alone", `${count(backlog.sessions, "session")}; regd scan --all takes them`]);
  }
  list($("about"), lines, ([term]) => term, ([term]) => {
    const line = make("div");
    line.append(make("dt", "", term), make("dd"));
    return line;
  }, (line, [term, value]) => {
    if (term !== "Last scan") say(line.lastChild, String(value));
    else if (value === null) say(line.lastChild, "not yet");
    else sayTime(line.lastChild, "", value);
  });
}

// --- hearing from regd ---------------------------------------------------------------------------

function heard() {
  heardAt = Date.now();
  failingSince = null;
  tooMany = false;
  tries = 0;
}

function connect() {
  clearTimeout(again);
  source?.close();
  source = new EventSource("events");
  source.addEventListener("report", (event) => {
    heard();
    const before = facts;
    facts = JSON.parse(event.data);
    if (before && before.version !== facts.version) {
      location.reload(); // regd was updated: so is its page
      return;
    }
    behindS = facts.at - Date.now() / 1000;
    checkedAt = facts.at;
    show();
  });
  source.addEventListener("beat", (event) => {
    heard();
    const beat = JSON.parse(event.data);
    behindS = beat.now - Date.now() / 1000;
    checkedAt = beat.checked_at;
    showStatement();
  });
  source.addEventListener("error", lost);
}

async function lost() {
  source.close();
  failingSince ??= Date.now();
  clearTimeout(again);
  again = setTimeout(connect, AGAIN_MS[Math.min(tries++, AGAIN_MS.length - 1)] * (0.75 + Math.random() / 2));
  showStatement();
  try {
    tooMany = (await fetch("events", { method: "HEAD" })).status === 503;
  } catch {
    tooMany = false;
  }
}

setInterval(() => {
  if (Date.now() - heardAt > SILENT_MS && failingSince === null) lost();
  for (const element of document.querySelectorAll("time[data-at]")) fillTime(element);
  showStatement();
}, 1_000);

connect();
