"use strict";
// All text of the data is put in as text, never as markup: names and keys come from elsewhere.
const data = JSON.parse(document.getElementById("data").textContent);
const AT_ONCE = 120;  // finds drawn before somebody scrolls on: pictures are decoded as they are needed
const HEADER = ["ImageID", "Source", "LabelName", "Confidence"];
const at = (id) => document.getElementById(id);
const memory = "paml-audit-" + data.id;
const placeOf = new Map(data.finds.map((find, place) => [JSON.stringify([find.key, find.mid]), place]));
let verdicts = recalled();
let shown = [];  // places of the finds that the filters leave
let current = 0; // among the shown ones
let drawn = 0;

function recalled() {
  try {
    const found = JSON.parse(localStorage.getItem(memory) || "{}");
    return new Map(Object.entries(found).map(([place, verdict]) => [Number(place), verdict]));
  } catch (error) {
    return new Map();  // a browser may refuse storage to files: the verdicts then last as long as the page
  }
}

function remember() {
  try {
    localStorage.setItem(memory, JSON.stringify(Object.fromEntries(verdicts)));
  } catch (error) { /* as above */ }
}

function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function option(select, value, text) {
  const made = element("option", text);
  made.value = value;
  select.append(made);
}

function bytesOf(base64) {
  return Uint8Array.from(atob(base64), (sign) => sign.charCodeAt(0));
}

// The map's greys become red with more or less of it; the browser smooths it as it stretches the canvas.
function drawMap(canvas, find) {
  canvas.width = find.map_size[1];
  canvas.height = find.map_size[0];
  const greys = bytesOf(find.map);
  const image = canvas.getContext("2d").createImageData(canvas.width, canvas.height);
  greys.forEach((grey, pixel) => image.data.set([255, 255 - grey, 40, Math.round(0.65 * grey)], 4 * pixel));
  canvas.getContext("2d").putImageData(image, 0, 0);
}

function card(place) {
  const find = data.finds[place];
  const item = element("li", undefined, "find");
  item.dataset.place = place;
  item.tabIndex = -1;
  const photo = element("div", undefined, "photo");
  const picture = element("img");
  picture.src = "data:image/jpeg;base64," + data.pictures[find.picture];
  picture.alt = "photo " + find.key;
  picture.loading = "lazy";
  const overlay = element("canvas");
  drawMap(overlay, find);
  photo.append(picture, overlay);
  const answers = element("div", undefined, "answers");
  for (const verdict of ["yes", "no", "skip"]) {
    const button = element("button", verdict);
    button.type = "button";
    button.dataset.verdict = verdict;
    button.addEventListener("click", () => { go(shown.indexOf(place)); answer(verdict); });
    answers.append(button);
  }
  item.append(
    photo,
    element("div", find.name, "name"),
    element("div", `${find.kind}, rank ${find.rank}`, "facts"),
    element("div", `score ${find.score.toFixed(2)} · probability ${find.probability.toFixed(2)} · now ${find.state}`,
      "facts"),
    element("div", find.evidence, "facts"),
    element("div", `${find.key} · ${find.mid}`, "facts"),
    answers);
  item.addEventListener("click", (event) => { if (event.target.tagName !== "BUTTON") go(shown.indexOf(place)); });
  mark(item, verdicts.get(place));
  return item;
}

function mark(item, verdict) {
  if (verdict) item.dataset.verdict = verdict; else delete item.dataset.verdict;
  for (const button of item.querySelectorAll(".answers button"))
    button.setAttribute("aria-pressed", String(button.dataset.verdict === verdict));
}

function filter() {
  const [kind, cls, answered] = [at("kind").value, at("class").value, at("answered").value];
  const from = Number(at("from").value) || 1;
  const to = Number(at("to").value) || Infinity;
  shown = data.finds.map((_, place) => place).filter((place) => {
    const find = data.finds[place];
    const verdict = verdicts.get(place);
    return (!kind || find.kind === kind) && (!cls || find.mid === cls) && find.rank >= from && find.rank <= to
      && (!answered || (answered === "open" ? !verdict : verdict === answered));
  });
  at("finds").replaceChildren();
  drawn = 0;
  drawMore();
  go(0);
}

function drawMore(least = 0) {
  const until = Math.min(shown.length, Math.max(drawn + AT_ONCE, least));
  for (; drawn < until; drawn++) at("finds").append(card(shown[drawn]));
  at("more").hidden = drawn >= shown.length;
}

function go(place) {
  const before = at("finds").querySelector(".current");
  if (before) before.classList.remove("current");
  current = Math.max(0, Math.min(place, shown.length - 1));
  if (shown.length) {
    if (current >= drawn) drawMore(current + 1);
    const item = at("finds").children[current];
    item.classList.add("current");
    item.focus({ preventScroll: true });
    item.scrollIntoView({ block: "nearest" });
  }
  say();
}

function answer(verdict) {
  if (!shown.length) return;
  const place = shown[current];
  if (verdict) verdicts.set(place, verdict); else verdicts.delete(place);
  remember();
  mark(at("finds").children[current], verdict);
  if (verdict) go(current + 1); else say();
}

function say(more) {
  const count = (verdict) => [...verdicts.values()].filter((one) => one === verdict).length;
  const [yes, no, skip] = ["yes", "no", "skip"].map(count);
  at("status").textContent = `${shown.length.toLocaleString("en")} of ${data.finds.length.toLocaleString("en")} finds` +
    (shown.length ? `, this is number ${(current + 1).toLocaleString("en")}.` : ".") + ` Answered: ${yes} yes, ${no} no, ${skip} skip.` +
    (more ? " " + more : "");
}

// A spreadsheet would run a cell that begins like a formula; the apostrophe is taken off when verdicts are read.
const defused = (field) => (data.formula_marks.includes(field[0]) ? "'" + field : field);
const restored = (field) =>
  (field[0] === "'" && field.length > 1 && data.formula_marks.includes(field[1]) ? field.slice(1) : field);
const quoted = (field) => (/[",\r\n]/.test(field) ? '"' + field.replaceAll('"', '""') + '"' : field);

function verdictCsv() {
  const rows = [...verdicts].filter(([, verdict]) => verdict !== "skip").sort((one, other) => one[0] - other[0]);
  const lines = rows.map(([place, verdict]) => [data.finds[place].key, "verification", data.finds[place].mid,
    verdict === "yes" ? "1" : "0"].map((field) => quoted(defused(field))).join(","));
  return [HEADER.join(","), ...lines].join("\n") + "\n";
}

function exportVerdicts() {
  const link = element("a");
  link.href = URL.createObjectURL(new Blob([verdictCsv()], { type: "text/csv" }));
  link.download = "annotations-human.csv";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  say("Verdicts exported as annotations-human.csv.");
}

function fieldsOf(text) {
  const rows = [];
  let row = [], field = "", inside = false;
  for (let place = 0; place < text.length; place++) {
    const sign = text[place];
    if (inside) {
      if (sign !== '"') field += sign;
      else if (text[place + 1] === '"') { field += '"'; place++; }
      else inside = false;
    } else if (sign === '"') inside = true;
    else if (sign === ",") { row.push(field); field = ""; }
    else if (sign === "\n") { row.push(field); rows.push(row); row = []; field = ""; }
    else if (sign !== "\r") field += sign;
  }
  if (field || row.length) rows.push([...row, field]);
  return rows.filter((fields) => fields.length > 1 || fields[0]);
}

function takeUp(text) {
  const [header, ...rows] = fieldsOf(text.replace(/^\uFEFF/, ""));
  if (!header || header.join() !== HEADER.join()) {
    say("That file has another header than " + HEADER.join() + ": nothing was taken from it.");
    return;
  }
  let taken = 0;
  for (const [key, , mid, confidence] of rows) {
    const place = placeOf.get(JSON.stringify([restored(key), restored(mid)]));
    if (place === undefined || !["0", "1"].includes(confidence)) continue;
    verdicts.set(place, confidence === "1" ? "yes" : "no");
    taken++;
  }
  remember();
  filter();
  say(`Took ${taken} of ${rows.length} verdicts from the file.`);
}

function showMap(on) {
  at("overlay").checked = on;
  document.body.classList.toggle("bare", !on);
}

const KEYS = {
  y: () => answer("yes"), n: () => answer("no"), s: () => answer("skip"), u: () => answer(undefined),
  j: () => go(current + 1), ArrowRight: () => go(current + 1),
  k: () => go(current - 1), ArrowLeft: () => go(current - 1),
  m: () => showMap(!at("overlay").checked), c: () => at("class").focus(), e: exportVerdicts,
  "?": () => at("keys").showModal(),
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || at("keys").open) return;
  const typing = event.target.matches("select, input:not([type=checkbox])");
  if (typing) {
    if (event.key === "Escape") { event.target.blur(); go(current); }
    return;
  }
  if (Object.hasOwn(KEYS, event.key)) {
    event.preventDefault();
    KEYS[event.key]();
  }
});

at("title").textContent = data.title;
document.title = data.title;
option(at("kind"), "", "all");
for (const kind of new Set(data.finds.map((find) => find.kind))) option(at("kind"), kind, kind);
option(at("class"), "", "all");
const counts = new Map();
for (const find of data.finds) counts.set(find.mid, { name: find.name, count: (counts.get(find.mid)?.count || 0) + 1 });
for (const [mid, { name, count }] of [...counts].sort((one, other) => one[1].name.localeCompare(other[1].name)))
  option(at("class"), mid, `${name} (${count})`);
at("to").value = Math.max(1, ...data.finds.map((find) => find.rank));
for (const id of ["kind", "class", "from", "to", "answered"]) at(id).addEventListener("change", filter);
at("overlay").addEventListener("change", () => showMap(at("overlay").checked));
at("export").addEventListener("click", exportVerdicts);
at("help").addEventListener("click", () => at("keys").showModal());
at("more").addEventListener("click", () => drawMore());
at("load").addEventListener("change", async () => {
  const file = at("load").files[0];
  if (file) takeUp(await file.text());
});
new IntersectionObserver((seen) => { if (seen.some((one) => one.isIntersecting)) drawMore(); }).observe(at("more"));
filter();
