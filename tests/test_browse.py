"""The page of links, used as a reader would: in a real browser."""

import html
import json
import re

import numpy as np
import pandas as pd
import pytest
from made_links import CCRES, GENES, SCORES, TYPES, made_links, write_links

from cisformer.analysis.browse import browse as write_page
from cisformer.analysis.browse import choose_links, page_data, strength
from cisformer.analysis.stored import open_links
from cisformer.data.reference import Reference
from cisformer.errors import InputError
from cisformer.links.files import COMPONENTS, Links, TypeLinks
from cisformer.runtime.pages import json_for_html

FIRST, SECOND = sorted(TYPES)
USE = """<script>
const out = {};
const all = selector => [...document.querySelectorAll(selector)];
const cells = key => all(`#links td[data-key=${key}]`).map(cell => cell.textContent);
const set = (id, value) => { $(id).value = value; $(id).dispatchEvent(new Event("input")); };
const key = (id, name) => $(id).dispatchEvent(new KeyboardEvent("keydown", { key: name, bubbles: true, cancelable: true }));
const click = selector => document.querySelector(selector).click();
const arrive = act => new Promise(done => { addEventListener("hashchange", () => done(), { once: true }); act(); });
async function use() {
  const kept = [];  // nothing here waits for another process: time is virtual, and would run out on a busy machine
  window.Blob = class { constructor(parts) { kept.push(parts.join("")); } };
  URL.createObjectURL = () => "#kept";
  HTMLAnchorElement.prototype.click = function () { out.file = this.download; };
  out.top = all("#top tbody tr").map(row => row.innerText.split("\\t"));
  out.what = $("top-what").textContent;
  out.heat = all("#heat tbody tr").map(row => row.innerText.split("\\t"));
  set("find", "zzz"); $("search").requestSubmit(); out.unknown = $("told").textContent;
  set("find", "ENSG0"); out.offered = all("#found li").map(item => item.firstChild.textContent);
  key("find", "ArrowDown"); key("find", "ArrowDown");
  out.selected = all("#found li[aria-selected=true]").map(item => item.firstChild.textContent);
  await arrive(() => $("search").requestSubmit());
  out.hash = location.hash; out.title = $("gene-title").textContent; out.focus = document.activeElement.id;
  out.place = $("place").textContent; out.ucsc = $("ucsc")?.href ?? null;
  out.types = cells("type"); out.scores = cells("score"); out.count = $("count").textContent;
  out.arcs = all(".arc").length; out.bars = all(".bar").length; out.names = all("svg .name").map(name => name.firstChild.textContent);
  out.genes = all("svg .italic").map(name => name.firstChild.textContent);
  click("#links th[data-key=distance] button"); out.far = cells("distance");
  out.sorted = document.querySelector("th[aria-sort]").dataset.key;
  click("#links th[data-key=distance] button"); out.near = cells("distance");
  set("least", "0.5"); out.strong = cells("score");
  set("type", "0"); out.one = cells("type"); out.tracks = all("svg .name").length;
  click("#save"); out.saved = kept[0];
  set("type", ""); set("least", "0"); set("within", "1"); out.within = cells("ccre"); set("within", "");
  click("#links tbody tr"); out.marked = all(".arc.on").length;
  const before = $("locus").innerHTML; key("locus", "+"); out.zoomed = $("locus").innerHTML !== before;
  key("locus", "0"); out.restored = all(".arc").length;
  await arrive(() => { location.hash = ""; }); out.home = !$("start").hidden && $("gene").hidden;
  await arrive(() => { location.hash = "#gene=ENSG03"; }); out.other = $("gene-title").textContent;
  await arrive(() => { location.hash = "#gene=" + out.other.toLowerCase(); }); out.by_name = $("gene-title").textContent;
  await arrive(() => { location.hash = "#gene=zzz"; }); out.no_gene = $("told").textContent;
  out.overflow = document.documentElement.scrollWidth - innerWidth;
  out.resources = performance.getEntriesByType("resource").map(one => one.name);
  out.background = getComputedStyle(document.body).backgroundColor;
  out.injected = all("b, i").length;
}
use().catch(error => { out.error = String(error.stack); }).finally(() => {
  const told = document.createElement("output"); told.textContent = JSON.stringify(out); document.body.append(told); });
</script>"""  # noqa: E501


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_links(tmp_path_factory.mktemp("made") / "cisformer_link")


def used(folder, path, browse, width, *more, **options):
    """Write a page, let a browser use it, and return what it saw."""
    write_page(folder, path, **({"min_score": 0.0} | options))
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("</body>", f"{USE}</body>"), encoding="utf-8")
    dom, console = browse(path, width, "--virtual-time-budget=4000", *more)
    assert console == []
    told = re.search(r"<output>(.*?)</output>", dom, re.S)
    assert told, f"the browser stopped before the end: {dom[-300:]}"
    seen = json.loads(html.unescape(told[1]))
    assert "error" not in seen, seen["error"]
    return seen


@pytest.mark.parametrize("width", [390, 1200])
def test_a_reader_finds_a_gene_and_reads_sorts_filters_and_takes_its_links(folder, tmp_path, browse, width):
    seen = used(folder, tmp_path / "links.html", browse, width)
    name = GENES["gene_name"][1]
    assert seen["unknown"] == "no link of “zzz” on this page"
    assert seen["offered"] == GENES["gene_name"].tolist()
    assert seen["selected"] == [name]
    assert (seen["hash"], seen["title"], seen["focus"]) == ("#gene=ENSG02", name, "gene-title")
    assert seen["place"].startswith("ENSG02 · chr1:50,001-60,000, strand −")
    assert seen["ucsc"].startswith("https://genome.ucsc.edu/cgi-bin/hgTracks?db=hg38&position=chr1%3A")
    assert list(zip(seen["scores"], seen["types"], strict=True)) == [
        ("0.950", SECOND), ("0.700", FIRST), ("0.300", SECOND),
    ]  # fmt: skip
    assert seen["count"] == "(3 of 3)"
    assert (seen["arcs"], seen["names"]) == (3, [FIRST, SECOND])
    assert seen["bars"] >= 3
    assert f"← {name}" in seen["genes"]
    assert seen["sorted"] == "distance"
    assert seen["far"] == ["34,749", "34,749", "-51"]
    assert seen["near"] == ["-51", "34,749", "34,749"]
    assert sorted(seen["strong"]) == ["0.700", "0.950"]
    assert (seen["one"], seen["tracks"]) == ([FIRST], 1)
    saved = [line.split("\t") for line in seen["saved"].splitlines()]
    assert saved[0][:4] == ["gene_id", "gene_name", "ccre", "cell_type"]
    assert saved[1][:8] == ["ENSG02", name, "chr1:25000-25500", FIRST, "34749", "0.7", "0.2", "0.25"]
    assert len(saved) == 2
    assert seen["file"] == "__script__b__links.tsv"
    assert seen["within"] == ["chr1:59900-60200"]
    assert seen["marked"] == 1
    assert seen["zoomed"]
    assert seen["restored"] == 3
    assert seen["home"]
    assert seen["other"] == "FAR"
    assert seen["by_name"] == "FAR"
    assert seen["no_gene"] == "no link of “zzz” on this page"
    assert seen["resources"] == []
    assert seen["overflow"] <= 0
    assert seen["injected"] == 0  # names with tags in them are text


def test_the_start_page_shows_the_strongest_links_and_the_heat_map(folder, tmp_path, browse):
    seen = used(folder, tmp_path / "links.html", browse, 1200)
    assert [row[:3] for row in seen["top"]] == [
        [FIRST, "NEAR", "0.90"], [FIRST, GENES["gene_name"][1], "0.70"],
        [SECOND, GENES["gene_name"][1], "0.95"], [SECOND, "NEAR", "0.80"], [SECOND, "FAR", "0.60"],
    ]  # fmt: skip
    assert "score × specificity" in seen["what"]
    heat = {row[0]: row[1:] for row in seen["heat"]}
    assert heat["NEAR"] == ["0.4", "0.3"]
    assert heat["FAR"] == ["", "0.1"]


def test_dark_pages_links_of_one_type_and_an_unknown_genome(tmp_path, browse):
    one = write_links(tmp_path / "one" / "cisformer_link", types=TYPES[1:], genome="")
    seen = used(one, tmp_path / "dark.html", browse, 800, "--blink-settings=preferredColorScheme=0")
    assert sum(map(int, re.findall(r"\d+", seen["background"]))) < 150
    assert seen["ucsc"] is None
    assert seen["what"] == "Links with the highest score."
    assert seen["scores"] == ["0.950", "0.300"]


def test_a_table_without_fdr_or_specificity_makes_a_page_too(folder, tmp_path, browse):
    table = pd.read_csv(folder / "links.tsv.gz", sep="\t", keep_default_na=False)
    alone = tmp_path / "some.tsv"
    table.drop(columns=["fdr", "specificity", "n_open"]).to_csv(alone, sep="\t", index=False)
    seen = used(alone, tmp_path / "links.html", browse, 800)
    assert seen["scores"] == ["0.950", "0.700", "0.300"]
    assert "above that of the same pair" in seen["what"]
    assert [row[1] for row in seen["top"] if row[0] == SECOND] == [GENES["gene_name"][1], "FAR"]


def test_without_specificity_a_link_is_as_specific_as_it_is_above_the_next_type(folder):
    rows = choose_links(open_links(folder), 100, 0.0).rows.assign(specificity=np.nan)
    found = rows.assign(strength=strength(rows, 2)).set_index(["gene", "ccre", "type"])["strength"]
    assert found[0, 0, 0] == pytest.approx(0.1)
    assert found[0, 0, 1] == pytest.approx(-0.1)
    assert found[1, 2, 1] == pytest.approx(0.95)


def test_the_strongest_are_shown_and_the_rest_is_counted(folder, tmp_path):
    shown = choose_links(open_links(folder), 3, 0.1)
    assert shown.rows["score"].tolist() == pytest.approx([0.95, 0.9, 0.8])
    assert shown.n_links == 7
    text = write_page(folder, tmp_path / "a.html", max_links=3, min_score=0.1).read_text()
    assert "3 links of 2 genes in 2 cell types, hg38" in text
    assert "the strongest of 7 with a score of 0.1" in re.sub(r"\s+", " ", text)
    data = page_data(shown)
    assert data["links"]["score"] == [0.95, 0.9, 0.8]
    assert [data["genes"]["id"][gene] for gene in data["links"]["gene"]] == ["ENSG02", "ENSG01", "ENSG01"]


def test_the_page_is_refused_where_there_is_nothing_to_show(folder, tmp_path):
    with pytest.raises(InputError, match=r"no link of .* has a score of 0\.99: the highest is 0\.95"):
        write_page(folder, tmp_path / "a.html", min_score=0.99)
    with pytest.raises(InputError, match="max_links is 0"):
        write_page(folder, tmp_path / "a.html", max_links=0)
    with pytest.raises(InputError, match="cannot write a page"):
        write_page(folder, tmp_path / "a.txt")
    assert not list(tmp_path.iterdir())


def test_ten_thousand_links_stay_far_below_fifteen_megabytes(tmp_path):
    rng = np.random.default_rng(0)
    n_genes, n_ccres, n_types, n_links = 3000, 60_000, 8, 1250
    start = np.sort(rng.integers(0, 240_000_000, n_ccres))
    ccres = pd.DataFrame({"chrom": "chr1", "start": start, "end": start + 400})
    site = np.sort(rng.integers(0, 240_000_000, n_genes))
    names = [f"ENSG{number:011d}" for number in range(n_genes)]
    genes = pd.DataFrame(
        {"gene_id": names, "gene_name": names, "chrom": "chr1", "start": site, "end": site + 20_000}
    )
    genes["strand"] = "+"
    types = []
    for number in range(n_types):
        gene = np.sort(rng.integers(0, n_genes, n_links))
        ccre = np.clip(
            np.searchsorted(start, genes["start"].to_numpy()[gene]) + rng.integers(-9, 9, n_links),
            0,
            n_ccres - 1,
        )
        evidence = {name: rng.random(n_links).astype(np.float32) for name in (*COMPONENTS, "score")}
        types.append(TypeLinks(f"type {number}", 100, gene, ccre, start[ccre] - site[gene], evidence))
    Links(Reference("dataset", "hg38", genes, ccres), 250_000, types, {}).write(tmp_path / "cisformer_link")
    page = write_page(tmp_path, tmp_path / "links.html", min_score=0)
    assert page.stat().st_size < 3_000_000


def test_names_cannot_end_the_script_element():
    assert "</" not in json_for_html({"name": "</script><!-- & \u2028"})
    assert json.loads(json_for_html({"name": "</script>"})) == {"name": "</script>"}


def test_the_command(folder, tmp_path, command):
    page = tmp_path / "links.html"
    done = command("browse", "-l", folder, "-o", page, "--title", "Mine <&>")
    assert done.returncode == 0, done.stderr
    assert "wrote" in done.stdout
    assert "Mine &lt;&amp;&gt;" in page.read_text()
    assert command("browse", "-l", folder, "-o", page).returncode != 0


def test_made_links_are_what_they_say():
    links = made_links()
    assert [part.cell_type for part in links.types] == sorted(SCORES)
    assert len(CCRES) == 5
