"use strict";
// Text from data is inserted as text, never as markup, because names and keys are not trusted.
const data = JSON.parse(document.getElementById("data").textContent);
const PAGE_SIZE = 120;  // cards added per scroll, so images are decoded only when they are needed
const HEADER = ["ImageID", "Source", "LabelName", "Confidence"];
const byId = (id) => document.getElementById(id);
const storageKey = "paml-audit-" + data.id;
const numberOf = new Map(data.issues.map((issue, number) => [JSON.stringify([issue.key, issue.mid]), number]));
let verdicts = loadVerdicts();
let visible = [];  // numbers of the issues that pass the filters
let current = 0;   // position in visible
let rendered = 0;  // cards in the page

function loadVerdicts() {
  try {
    const stored = JSON.parse(localStorage.getItem(storageKey) || "{}");
    return new Map(Object.entries(stored).map(([number, verdict]) => [Number(number), verdict]));
  } catch (error) {
    return new Map();  // browsers may deny storage to files: verdicts then last until the page is closed
  }
}

function saveVerdicts() {
  try {
    localStorage.setItem(storageKey, JSON.stringify(Object.fromEntries(verdicts)));
  } catch (error) { /* see loadVerdicts */ }
}

function createElement(tag, text, className) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (className) element.className = className;
  return element;
}

function addOption(select, value, text) {
  const option = createElement("option", text);
  option.value = value;
  select.append(option);
}

// Map scores become red of varying opacity; the browser interpolates when it scales the canvas.
function drawMap(canvas, issue) {
  canvas.width = issue.map_size[1];
  canvas.height = issue.map_size[0];
  const grays = Uint8Array.from(atob(issue.map), (character) => character.charCodeAt(0));
  const image = canvas.getContext("2d").createImageData(canvas.width, canvas.height);
  grays.forEach((gray, pixel) => image.data.set([255, 255 - gray, 40, Math.round(0.65 * gray)], 4 * pixel));
  canvas.getContext("2d").putImageData(image, 0, 0);
}

function createCard(number) {
  const issue = data.issues[number];
  const card = createElement("li", undefined, "issue");
  card.dataset.number = number;
  card.tabIndex = -1;
  const frame = createElement("div", undefined, "image");
  const image = createElement("img");
  image.src = "data:image/jpeg;base64," + data.thumbnails[issue.image];
  image.alt = "image " + issue.key;
  image.loading = "lazy";
  const map = createElement("canvas");
  drawMap(map, issue);
  frame.append(image, map);
  const answers = createElement("div", undefined, "answers");
  for (const verdict of ["yes", "no", "skip"]) {
    const button = createElement("button", verdict);
    button.type = "button";
    button.dataset.verdict = verdict;
    button.addEventListener("click", () => { goTo(visible.indexOf(number)); answer(verdict); });
    answers.append(button);
  }
  card.append(
    frame,
    createElement("div", issue.name, "name"),
    createElement("div", `${issue.kind}, rank ${issue.rank}`, "details"),
    createElement("div", `score ${issue.score.toFixed(2)} · probability ${issue.probability.toFixed(2)} · ` +
      (issue.state === "unobserved" ? "not labeled" : `labeled ${issue.state}`), "details"),
    createElement("div", issue.evidence, "details"),
    createElement("div", `${issue.key} · ${issue.mid}`, "details"),
    answers);
  card.addEventListener("click", (event) => { if (event.target.tagName !== "BUTTON") goTo(visible.indexOf(number)); });
  showVerdict(card, verdicts.get(number));
  return card;
}

function showVerdict(card, verdict) {
  if (verdict) card.dataset.verdict = verdict; else delete card.dataset.verdict;
  for (const button of card.querySelectorAll(".answers button"))
    button.setAttribute("aria-pressed", String(button.dataset.verdict === verdict));
}

function applyFilters() {
  const [kind, cls, answered] = [byId("kind").value, byId("class").value, byId("answered").value];
  const from = Number(byId("from").value) || 1;
  const to = Number(byId("to").value) || Infinity;
  visible = data.issues.map((_, number) => number).filter((number) => {
    const issue = data.issues[number];
    const verdict = verdicts.get(number);
    return (!kind || issue.kind === kind) && (!cls || issue.mid === cls) && issue.rank >= from && issue.rank <= to
      && (!answered || (answered === "open" ? !verdict : verdict === answered));
  });
  byId("issues").replaceChildren();
  rendered = 0;
  renderMore();
  goTo(0);
}

function renderMore(minimum = 0) {
  const end = Math.min(visible.length, Math.max(rendered + PAGE_SIZE, minimum));
  for (; rendered < end; rendered++) byId("issues").append(createCard(visible[rendered]));
  byId("more").hidden = rendered >= visible.length;
}

function goTo(position) {
  const previous = byId("issues").querySelector(".current");
  if (previous) previous.classList.remove("current");
  current = Math.max(0, Math.min(position, visible.length - 1));
  if (visible.length) {
    if (current >= rendered) renderMore(current + 1);
    const card = byId("issues").children[current];
    card.classList.add("current");
    card.focus({ preventScroll: true });
    card.scrollIntoView({ block: "nearest" });
  }
  updateStatus();
}

function answer(verdict) {
  if (!visible.length) return;
  const number = visible[current];
  if (verdict) verdicts.set(number, verdict); else verdicts.delete(number);
  saveVerdicts();
  showVerdict(byId("issues").children[current], verdict);
  if (verdict) goTo(current + 1); else updateStatus();
}

function updateStatus(message) {
  const count = (verdict) => [...verdicts.values()].filter((one) => one === verdict).length;
  const format = (number) => number.toLocaleString("en");
  const position = visible.length ? `Label ${format(current + 1)} of ${format(visible.length)}` : "No labels";
  const hidden = visible.length < data.issues.length ? ` (${format(data.issues.length)} without filters)` : "";
  byId("status").textContent = `${position}${hidden}. Answered: ${count("yes")} yes, ${count("no")} no, ` +
    `${count("skip")} skip.` + (message ? " " + message : "");
}

// Spreadsheets run cells that begin like a formula; the apostrophe is removed when verdicts are read.
const escapeFormula = (field) => (data.formula_prefixes.includes(field[0]) ? "'" + field : field);
const unescapeFormula = (field) =>
  (field[0] === "'" && field.length > 1 && data.formula_prefixes.includes(field[1]) ? field.slice(1) : field);
const quoteField = (field) => (/[",\r\n]/.test(field) ? '"' + field.replaceAll('"', '""') + '"' : field);

function verdictCsv() {
  const rows = [...verdicts].filter(([, verdict]) => verdict !== "skip").sort((one, other) => one[0] - other[0]);
  const lines = rows.map(([number, verdict]) => [data.issues[number].key, "verification", data.issues[number].mid,
    verdict === "yes" ? "1" : "0"].map((field) => quoteField(escapeFormula(field))).join(","));
  return [HEADER.join(","), ...lines].join("\n") + "\n";
}

function exportVerdicts() {
  const link = createElement("a");
  link.href = URL.createObjectURL(new Blob([verdictCsv()], { type: "text/csv" }));
  link.download = "annotations-human.csv";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  updateStatus("Exported annotations-human.csv.");
}

function parseCsv(text) {
  const rows = [];
  let row = [], field = "", quoted = false;
  for (let i = 0; i < text.length; i++) {
    const character = text[i];
    if (quoted) {
      if (character !== '"') field += character;
      else if (text[i + 1] === '"') { field += '"'; i++; }
      else quoted = false;
    } else if (character === '"') quoted = true;
    else if (character === ",") { row.push(field); field = ""; }
    else if (character === "\n") { row.push(field); rows.push(row); row = []; field = ""; }
    else if (character !== "\r") field += character;
  }
  if (field || row.length) rows.push([...row, field]);
  return rows.filter((fields) => fields.length > 1 || fields[0]);
}

function importVerdicts(text) {
  const [header, ...rows] = parseCsv(text.replace(/^\uFEFF/, ""));
  if (!header || header.join() !== HEADER.join()) {
    updateStatus("Nothing was loaded: the first line of the file must be " + HEADER.join() + ".");
    return;
  }
  let loaded = 0;
  for (const [key, , mid, confidence] of rows) {
    const number = numberOf.get(JSON.stringify([unescapeFormula(key), unescapeFormula(mid)]));
    if (number === undefined || !["0", "1"].includes(confidence)) continue;
    verdicts.set(number, confidence === "1" ? "yes" : "no");
    loaded++;
  }
  saveVerdicts();
  applyFilters();
  updateStatus(`Loaded ${loaded} of ${rows.length} verdicts.`);
}

function showMaps(on) {
  byId("overlay").checked = on;
  document.body.classList.toggle("no-map", !on);
}

const SHORTCUTS = {
  y: () => answer("yes"), n: () => answer("no"), s: () => answer("skip"), u: () => answer(undefined),
  j: () => goTo(current + 1), ArrowRight: () => goTo(current + 1),
  k: () => goTo(current - 1), ArrowLeft: () => goTo(current - 1),
  m: () => showMaps(!byId("overlay").checked), c: () => byId("class").focus(), e: exportVerdicts,
  "?": () => byId("keys").showModal(),
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || byId("keys").open) return;
  if (event.target.matches("select, input:not([type=checkbox])")) {
    if (event.key === "Escape") { event.target.blur(); goTo(current); }
    return;
  }
  if (Object.hasOwn(SHORTCUTS, event.key)) {
    event.preventDefault();
    SHORTCUTS[event.key]();
  }
});

byId("title").textContent = data.title;
document.title = data.title;
addOption(byId("kind"), "", "all labels");
for (const kind of new Set(data.issues.map((issue) => issue.kind))) addOption(byId("kind"), kind, kind + "s");
addOption(byId("class"), "", "all");
const classes = new Map();
for (const { mid, name } of data.issues) classes.set(mid, { name, count: (classes.get(mid)?.count || 0) + 1 });
for (const [mid, { name, count }] of [...classes].sort((one, other) => one[1].name.localeCompare(other[1].name)))
  addOption(byId("class"), mid, `${name} (${count})`);
byId("to").value = Math.max(1, ...data.issues.map((issue) => issue.rank));
for (const id of ["kind", "class", "from", "to", "answered"]) byId(id).addEventListener("change", applyFilters);
byId("overlay").addEventListener("change", () => showMaps(byId("overlay").checked));
byId("export").addEventListener("click", exportVerdicts);
byId("help").addEventListener("click", () => byId("keys").showModal());
byId("more").addEventListener("click", () => renderMore());
byId("load").addEventListener("change", async () => {
  const file = byId("load").files[0];
  if (file) importVerdicts(await file.text());
});
new IntersectionObserver((entries) => { if (entries.some((entry) => entry.isIntersecting)) renderMore(); })
  .observe(byId("more"));
applyFilters();
