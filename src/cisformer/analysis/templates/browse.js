"use strict";
const D = JSON.parse(document.getElementById("data").textContent);
const L = D.links, G = D.genes, C = D.ccres, nC = C.start.length;
const OPEN = Uint8Array.from(atob(D.open), sign => sign.charCodeAt(0));
const $ = id => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg", ROWS = 200, TRACK = 92, HALF = 46;

// ------------------------------------------------------------------ small tools: elements, numbers, names

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes))
    key.startsWith("on") ? made.addEventListener(key.slice(2), value) : made.setAttribute(key, value);
  made.append(...children);
  return made;
}
function mark(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.append(text);
  return made;
}
function titled(shape, text) { shape.append(mark("title", {}, text)); return shape; }
const number = (value, digits = 2) => value === null || value === undefined ? "–" :
  Math.abs(value) > 0 && Math.abs(value) < 0.001 ? value.toExponential(1) : value.toFixed(digits);
const bp = value => value.toLocaleString("en");
const open = (type, ccre) => OPEN[type * nC + ccre] / 255 * D.most;
const chromOf = ccre => C.chroms[C.chrom[ccre]];
const region = ccre => `${chromOf(ccre)}:${C.start[ccre]}-${C.start[ccre] + C.width[ccre]}`;
const tssOf = gene => G.minus[gene] ? G.end[gene] - 1 : G.start[gene];
const linkTo = gene => element("a", { href: "#gene=" + encodeURIComponent(G.id[gene]) }, G.name[gene]);

const linksOf = new Map();
L.gene.forEach((gene, i) => linksOf.has(gene) ? linksOf.get(gene).push(i) : linksOf.set(gene, [i]));
const geneOfId = new Map(G.id.map((id, gene) => [id, gene]));
const geneNamed = text => {
  const wanted = text.toLowerCase(), row = G.name.findIndex((name, i) => i < G.linked && name.toLowerCase() === wanted);
  return row < 0 ? undefined : row;
};
const ccresOn = C.chroms.map(() => []);
C.chrom.forEach((chrom, ccre) => ccresOn[chrom].push(ccre));

// ------------------------------------------------------------------ start page

function drawStart() {
  const heads = ["Cell type", "Gene", "Score", "Specificity", "Distance, bp", "cCRE"];
  const right = [2, 3, 4];
  $("top").replaceChildren(
    element("thead", {}, element("tr", {}, ...heads.map((head, i) =>
      element("th", { scope: "col", class: right.includes(i) ? "n" : "" }, head)))),
    element("tbody", {}, ...D.top.map(i => element("tr", {},
      element("td", {}, D.types[L.type[i]]), element("td", {}, linkTo(L.gene[i])),
      element("td", { class: "n" }, number(L.score[i])), element("td", { class: "n" }, number(L.specificity[i])),
      element("td", { class: "n" }, bp(L.distance[i])), element("td", {}, region(L.ccre[i]))))));
  const specific = D.heat.what === "specificity", most = specific ? 4 : 1;
  $("top-what").textContent = specific ?
    "For each type, links with the highest score × specificity: likely, and more at work here than in the other types." :
    D.types.length > 1 ? "For each type, links whose score is highest above that of the same pair in any other type." :
    "Links with the highest score.";
  $("heat-what").textContent = specific ? "Specificity (log odds; orange: stronger than the mean of the other types, blue: weaker)" : "Score";
  $("heat").replaceChildren(
    element("thead", {}, element("tr", {}, element("td"), ...D.types.map(type =>
      element("th", { scope: "col", title: type }, element("span", {}, type))))),
    element("tbody", {}, ...D.heat.links.map((i, row) => element("tr", {},
      element("th", { scope: "row" }, linkTo(L.gene[i])), ...D.heat.values[row].map((value, type) => {
        const strong = Math.min(Math.abs(value) / most, 1), about = `${G.name[L.gene[i]]}, ${D.types[type]}: ${number(value)}, ${region(L.ccre[i])}`;
        const kind = [value === null ? "none" : "", strong > 0.55 ? "dark" : "", specific && value > 0 ? "more" : ""].join(" ");
        return element("td", { class: kind, style: `--v:${strong}`, title: about }, value === null ? "" : number(value, specific ? 1 : 2));
      })))));
}

// ------------------------------------------------------------------ search

let options = [], active = -1;
function candidates(text) {
  const wanted = text.trim().toLowerCase();
  if (!wanted) return [];
  const ranked = [[], [], []];
  for (let gene = 0; gene < G.linked; gene++) {
    const name = G.name[gene].toLowerCase(), id = G.id[gene].toLowerCase();
    if (name === wanted || id === wanted) ranked[0].push(gene);
    else if (name.startsWith(wanted) || id.startsWith(wanted)) ranked[1].push(gene);
    else if (name.includes(wanted)) ranked[2].push(gene);
  }
  return ranked.flat().slice(0, 12);
}
function offer(genes) {
  options = genes; active = -1;
  $("found").replaceChildren(...genes.map((gene, i) => element("li", { role: "option", id: `found${i}`, "aria-selected": "false",
    onmousedown: event => { event.preventDefault(); show(gene); } }, G.name[gene], element("small", {}, G.id[gene]))));
  $("found").hidden = !genes.length;
  $("find").setAttribute("aria-expanded", String(genes.length > 0));
  $("find").removeAttribute("aria-activedescendant");
}
function choose(step) {
  if (!options.length) return;
  active = (active + step + options.length) % options.length;
  [...$("found").children].forEach((item, i) => item.setAttribute("aria-selected", String(i === active)));
  $("found").children[active].scrollIntoView({ block: "nearest" });
  $("find").setAttribute("aria-activedescendant", `found${active}`);
}
function show(gene) {
  offer([]); $("told").textContent = ""; $("find").value = G.name[gene];
  const hash = "#gene=" + encodeURIComponent(G.id[gene]);
  if (location.hash === hash) route(); else location.hash = hash;
}
$("find").addEventListener("input", () => offer(candidates($("find").value)));
$("find").addEventListener("blur", () => offer([]));
$("find").addEventListener("keydown", event => {
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (step) { event.preventDefault(); choose(step); }
  if (event.key === "Escape") offer([]);
});
$("search").addEventListener("submit", event => {
  event.preventDefault();
  const chosen = active >= 0 ? options[active] : candidates($("find").value)[0];
  if (chosen !== undefined) show(chosen);
  else $("told").textContent = `no link of “${$("find").value}” on this page`;
});

// ------------------------------------------------------------------ one gene: state, filters, view

let gene = -1, shown = [], view = [0, 1], whole = [0, 1], marked = -1, allRows = false;
let sorting = { key: "score", down: true };
const COLUMNS = [
  { key: "type", head: "Cell type", of: i => D.types[L.type[i]] },
  { key: "score", head: "Score", n: true, of: i => number(L.score[i], 3), by: i => L.score[i], raw: i => L.score[i] },
  { key: "distance", head: "Distance, bp", n: true, of: i => bp(L.distance[i]), by: i => L.distance[i], raw: i => L.distance[i] },
  { key: "specificity", head: "Specificity", n: true, of: i => number(L.specificity[i]), by: i => L.specificity[i], raw: i => L.specificity[i] },
  { key: "fdr", head: "FDR", n: true, of: i => number(L.fdr[i], 3), by: i => L.fdr[i], raw: i => L.fdr[i] },
  { key: "open", head: "Open", n: true, of: i => (100 * open(L.type[i], L.ccre[i])).toFixed(1) + " %",
    by: i => open(L.type[i], L.ccre[i]), raw: i => open(L.type[i], L.ccre[i]).toFixed(4) },
  { key: "ccre", head: "cCRE", of: i => region(L.ccre[i]), by: i => C.start[L.ccre[i]] },
];

function chosenLinks() {
  const type = $("type").value, least = Number($("least").value) || 0;
  const within = $("within").value === "" ? Infinity : 1000 * Number($("within").value);
  const column = COLUMNS.find(one => one.key === sorting.key), by = column.by || column.of;
  const kept = (linksOf.get(gene) || []).filter(i => L.score[i] >= least && Math.abs(L.distance[i]) <= within &&
    (type === "" || L.type[i] === Number(type)));
  return kept.sort((a, b) => {
    const x = by(a), y = by(b);
    if (x === null || y === null) return (x === null) - (y === null);
    return (typeof x === "string" ? x.localeCompare(y) : x - y) * (sorting.down ? -1 : 1);
  });
}
function reach() {
  const ccres = (linksOf.get(gene) || []).map(i => L.ccre[i]);
  const low = Math.min(G.start[gene], ...ccres.map(c => C.start[c]));
  const high = Math.max(G.end[gene], ...ccres.map(c => C.start[c] + C.width[c]));
  const margin = Math.round(0.05 * (high - low)) + 1000;
  return [Math.max(low - margin, 0), high + margin];
}
function zoom(how) {
  const width = view[1] - view[0];
  const moves = { left: [-0.25, -0.25], right: [0.25, 0.25], in: [0.25, -0.25], out: [-0.5, 0.5] };
  if (how === "all") view = [...whole];
  else {
    const [low, high] = moves[how].map((share, end) => Math.round(view[end] + share * width));
    if (high - low >= 500 && high - low <= 5e6 && high > 0) view = [Math.max(low, 0), high];
  }
  drawLocus();
}
document.querySelectorAll("[data-zoom]").forEach(button => button.addEventListener("click", () => zoom(button.dataset.zoom)));
$("locus").addEventListener("keydown", event => {
  const how = { ArrowLeft: "left", ArrowRight: "right", "+": "in", "=": "in", "-": "out", 0: "all" }[event.key];
  if (how) { event.preventDefault(); zoom(how); }
});

// ------------------------------------------------------------------ the drawing

function drawLocus() {
  const width = Math.max($("locus").clientWidth, 280), [low, high] = view;
  const x = position => (position - low) / (high - low) * width;
  const types = $("type").value === "" ? D.types.map((_, type) => type) : [Number($("type").value)];
  const chrom = C.chroms.indexOf(G.chrom[gene]);
  const seen = (ccresOn[chrom] || []).filter(c => C.start[c] + C.width[c] > low && C.start[c] < high);
  const highest = Math.max(...seen.flatMap(c => types.map(type => open(type, c))), 1e-9);
  const genes = placedGenes(x, width), geneRows = 1 + Math.max(0, ...genes.map(one => one.row));
  const top = 8, floor = top + types.length * TRACK, height = floor + geneRows * 30 + 34;
  const svg = mark("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-labelledby": "locus-title" });
  svg.append(mark("title", { id: "locus-title" }, `${G.name[gene]}: accessibility in ${types.length} cell types and ${shown.length} links`));
  const tss = x(tssOf(gene));
  svg.append(mark("line", { class: "tss", x1: tss, x2: tss, y1: top, y2: floor }));
  types.forEach((type, row) => drawTrack(svg, type, top + row * TRACK, { x, width, seen, highest, tss }));
  drawGenes(svg, genes, floor, x);
  drawTicks(svg, floor + geneRows * 30 + 6, width, x);
  $("locus").replaceChildren(svg);
}
function drawTrack(svg, type, top, { x, width, seen, highest, tss }) {
  const base = top + HALF, linked = new Set(shown.filter(i => L.type[i] === type).map(i => L.ccre[i]));
  const cells = D.cells[type] ? ` ${bp(D.cells[type])} cell${D.cells[type] === 1 ? "" : "s"}` : "";
  svg.append(mark("line", { class: "base", x1: 0, x2: width, y1: base, y2: base }));
  for (const ccre of seen) {
    const share = open(type, ccre), tall = share / highest * (HALF - 14), wide = Math.max(C.width[ccre] / (view[1] - view[0]) * width, 2);
    if (!share) continue;
    svg.append(titled(mark("rect", { class: linked.has(ccre) ? "bar linked" : "bar", x: x(C.start[ccre]), y: base - tall, width: wide, height: tall }),
      `${region(ccre)}, ${D.types[type]}: open ${(100 * share).toFixed(1)} %`));
  }
  for (const i of shown.filter(one => L.type[one] === type).reverse()) {
    const end = x(C.start[L.ccre[i]] + C.width[L.ccre[i]] / 2), across = Math.abs(end - tss) / 2;
    const deep = Math.min(8 + 30 * Math.sqrt(across * 2 / width), HALF - 6);
    const arc = mark("path", { class: i === marked ? "arc on" : "arc", "data-link": i, "stroke-width": 0.8 + 2.6 * L.score[i],
      "stroke-opacity": 0.2 + 0.8 * L.score[i], d: `M${tss} ${base}A${Math.max(across, 1)} ${deep} 0 0 ${end > tss ? 0 : 1} ${end} ${base}` });
    arc.addEventListener("click", () => markLink(i, true));
    svg.append(titled(arc, `${D.types[type]}, ${region(L.ccre[i])}: score ${number(L.score[i], 3)}, ${bp(L.distance[i])} bp`));
  }
  const label = mark("text", { class: "name", x: 4, y: top + 12 }, D.types[type]);
  label.append(mark("tspan", { style: "font-weight:400;fill:var(--soft)" }, cells));
  svg.append(label);
}
function placedGenes(x, width) {
  const inView = [];
  for (let one = 0; one < G.name.length; one++)
    if (G.chrom[one] === G.chrom[gene] && G.end[one] > view[0] && G.start[one] < view[1]) inView.push(one);
  inView.sort((a, b) => (b === gene) - (a === gene) || (G.end[b] - G.start[b]) - (G.end[a] - G.start[a]));
  const rows = [];
  return inView.slice(0, 16).map(one => {
    const left = Math.max(x(G.start[one]), 0), right = Math.min(x(G.end[one]), width), half = 3.8 * G.name[one].length + 9;
    const middle = Math.min(Math.max((left + right) / 2, half), width - half);
    const span = [Math.min(left, middle - half) - 4, Math.max(right, middle + half) + 4];
    let row = rows.findIndex(spans => spans.every(([a, b]) => span[1] < a || span[0] > b));
    if (row < 0) row = rows.push([]) - 1;
    rows[row].push(span);
    return { one, left, right, middle, row };
  });
}
function drawGenes(svg, genes, floor, x) {
  for (const { one, left, right, middle, row } of genes) {
    const own = one === gene ? " own" : "", y = floor + 8 + row * 30;
    svg.append(mark("rect", { class: "body" + own, x: left, y, width: Math.max(right - left, 1.5), height: own ? 5 : 3 }));
    const text = G.minus[one] ? "← " + G.name[one] : G.name[one] + " →";
    svg.append(titled(mark("text", { class: "italic" + own, x: middle, y: y + 17, "text-anchor": "middle" }, text),
      `${G.name[one]}, ${G.chrom[one]}:${bp(G.start[one])}-${bp(G.end[one])}`));
  }
}
function drawTicks(svg, y, width, x) {
  const raw = (view[1] - view[0]) / Math.max(width / 150, 2), power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map(factor => factor * power).find(one => one >= raw), digits = Math.max(0, 6 - Math.floor(Math.log10(step)));
  svg.append(mark("line", { class: "tick", x1: 0, x2: width, y1: y, y2: y }));
  for (let at = Math.ceil(view[0] / step) * step; at <= view[1]; at += step) {
    svg.append(mark("line", { class: "tick", x1: x(at), x2: x(at), y1: y, y2: y + 5 }));
    if (x(at) > 24 && x(at) < width - 24)
      svg.append(mark("text", { x: x(at), y: y + 19, "text-anchor": "middle" }, `${(at / 1e6).toFixed(digits)} Mb`));
  }
}

// ------------------------------------------------------------------ the table

function drawTable() {
  const heads = COLUMNS.map(column => element("th", { scope: "col", class: column.n ? "n" : "", "data-key": column.key,
    ...(column.key === sorting.key ? { "aria-sort": sorting.down ? "descending" : "ascending" } : {}) },
    element("button", { type: "button", onclick: () => sortBy(column) }, column.head)));
  const rows = shown.slice(0, allRows ? shown.length : ROWS).map(i => element("tr", { "data-link": i, tabindex: "0", class: i === marked ? "on" : "",
    onclick: () => markLink(i), onkeydown: event => { if (event.key === "Enter") markLink(i); } },
    ...COLUMNS.map(column => element("td", { class: column.n ? "n" : "", "data-key": column.key }, column.of(i)))));
  $("links").replaceChildren(element("thead", {}, element("tr", {}, ...heads)), element("tbody", {}, ...rows));
  $("count").textContent = `(${bp(shown.length)} of ${bp((linksOf.get(gene) || []).length)})`;
  $("more").hidden = allRows || shown.length <= ROWS;
}
function sortBy(column) {
  sorting = { key: column.key, down: sorting.key === column.key ? !sorting.down : Boolean(column.n) };
  refresh();
  document.querySelector(`#links th[data-key=${column.key}] button`).focus();
}
function markLink(i, scroll = false) {
  marked = marked === i ? -1 : i;
  document.querySelectorAll("#links tbody tr").forEach(row => row.classList.toggle("on", Number(row.dataset.link) === marked));
  document.querySelectorAll(".arc").forEach(arc => arc.classList.toggle("on", Number(arc.dataset.link) === marked));
  if (scroll) document.querySelector("#links tr.on")?.scrollIntoView({ block: "nearest" });
}
function asTable() {
  const heads = ["gene_id", "gene_name", "ccre", "cell_type", "distance", "score", "specificity", "fdr", "open_share"];
  const raw = key => COLUMNS.find(column => column.key === key).raw;
  const plain = value => value === null ? "" : String(value).replace(/[\t\r\n]+/g, " ");
  const lines = shown.map(i => [G.id[gene], G.name[gene], region(L.ccre[i]), D.types[L.type[i]],
    ...["distance", "score", "specificity", "fdr", "open"].map(key => raw(key)(i))].map(plain).join("\t"));
  return [heads.join("\t"), ...lines].join("\n") + "\n";
}
$("save").addEventListener("click", () => {
  const url = URL.createObjectURL(new Blob([asTable()], { type: "text/tab-separated-values" }));
  element("a", { href: url, download: `${G.name[gene].replace(/[^\w.-]/g, "_")}_links.tsv` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
});
$("more").addEventListener("click", () => { allRows = true; drawTable(); });

// ------------------------------------------------------------------ all together

function refresh() { shown = chosenLinks(); drawLocus(); drawTable(); }
function drawGene(chosen) {
  gene = chosen; marked = -1; allRows = false; sorting = { key: "score", down: true };
  whole = reach(); view = [...whole];
  const [low, high] = view, place = `${G.chrom[gene]}:${bp(G.start[gene] + 1)}-${bp(G.end[gene])}`;
  $("gene-title").textContent = G.name[gene];
  $("place").replaceChildren(`${G.id[gene]} · ${place}, strand ${G.minus[gene] ? "−" : "+"}`);
  if (/^(hg|mm)[0-9]+$/.test(D.genome)) {
    const chrom = G.chrom[gene].startsWith("chr") ? G.chrom[gene] : "chr" + G.chrom[gene].replace(/^MT$/, "M");
    const where = encodeURIComponent(`${chrom}:${low + 1}-${high}`);
    $("place").append(" · ", element("a", { href: `https://genome.ucsc.edu/cgi-bin/hgTracks?db=${D.genome}&position=${where}`,
      rel: "noopener noreferrer", target: "_blank", id: "ucsc" }, `UCSC, ${D.genome}`));
  }
  refresh();
}
function route() {
  const asked = location.hash.startsWith("#gene=") ? decodeURIComponent(location.hash.slice(6)) : "";
  const wanted = geneOfId.get(asked) ?? geneNamed(asked);
  $("told").textContent = asked && wanted === undefined ? `no link of “${asked}” on this page` : "";
  $("start").hidden = wanted !== undefined; $("gene").hidden = wanted === undefined;
  if (wanted === undefined) { document.title = document.title.replace(/^.* – (?=.* – )/, ""); return; }
  drawGene(wanted);
  $("gene-title").focus({ preventScroll: true }); scrollTo(0, 0);
}
["type", "least", "within"].forEach(id => $(id).addEventListener("input", refresh));
$("type").append(element("option", { value: "" }, "all"), ...D.types.map((type, i) => element("option", { value: i }, type)));
addEventListener("hashchange", route);
let waiting;
addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(() => gene >= 0 && !$("gene").hidden && drawLocus(), 100); });
drawStart();
route();
