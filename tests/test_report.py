"""The page, as a browser sees it."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from cisformer.errors import OutputExistsError
from cisformer.evaluation.evaluate import evaluate_model
from cisformer.evaluation.report import render, write_report
from cisformer.evaluation.verdict import score_text

DIRECTIONS = ["rna2atac", "atac2rna"]
MARKS = {"better": "▲", "tie": "=", "worse": "▼"}
MEASURE = """<script>
const all = selector => [...document.querySelectorAll(selector)];
const charts = 'svg[role=img]';
const box = e => { const b = e.getBoundingClientRect(); return [b.width, b.height, e.querySelectorAll('circle').length]; };
const out = document.createElement('output');
out.textContent = JSON.stringify({
  figures: Object.fromEntries(all('figure').map(f => [f.parentElement.id, [...f.querySelectorAll(charts)].map(box)])),
  overflow: document.documentElement.scrollWidth - innerWidth,
  resources: performance.getEntriesByType('resource').map(r => r.name),
  focusable: all('a, summary, [tabindex="0"]').length,
  untitled: all(charts).filter(s => !s.querySelector('title')?.textContent).length,
  background: getComputedStyle(document.body).backgroundColor,
});
document.body.append(out);
</script>"""  # noqa: E501


@pytest.fixture(scope="module")
def reports(tiny_data, tiny_checkpoints):
    return {d: evaluate_model(tiny_data[d], tiny_checkpoints[d], num_workers=0) for d in DIRECTIONS}


class _Page(HTMLParser):
    """Texts of the score cells and the verdict."""

    def __init__(self, html):
        super().__init__()
        self.cells, self.verdict, self._open, self._verdict = {}, "", None, False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == "td" and "data-metric" in attrs:
            self._open = attrs["data-method"], attrs["data-metric"]
            self.cells[self._open] = ""
        self._verdict = self._verdict or attrs.get("id") == "verdict"

    def handle_endtag(self, tag):
        self._open = None if tag == "td" else self._open
        self._verdict = self._verdict and tag != "p"

    def handle_data(self, data):
        if self._open:
            self.cells[self._open] += data
        if self._verdict:
            self.verdict += data


def _numbers_equal(page, data):
    """Hold every score of the page equal to report.json, with interval and mark."""
    checked = 0
    for (method, metric), text in page.cells.items():
        score = data["scores"][method].get(metric)
        if score is None or score["value"] is None:
            assert text.strip() == "–"
            continue
        assert score_text(score["value"]) in text
        against = [c for c in data["comparisons"] if (c["baseline"], c["metric"]) == (method, metric)]
        assert [mark for mark in MARKS.values() if mark in text] == [MARKS[c["outcome"]] for c in against]
        checked += 1
    return checked


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_numbers_equal_the_json(direction, reports, tmp_path):
    page, data = write_report(reports[direction], tmp_path)
    html, data = page.read_text(encoding="utf-8"), json.loads(data.read_text(encoding="utf-8"))
    parsed = _Page(html)
    assert _numbers_equal(parsed, data) > 20
    assert parsed.verdict == data["verdict"]
    assert page.stat().st_size < 3_000_000


def test_nothing_is_fetched_and_nothing_runs(reports):
    html = render(reports["rna2atac"])
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!#|data:,)|url\(|@import|<script""", html)


def test_an_earlier_report_stays_without_force(reports, tmp_path):
    write_report(reports["rna2atac"], tmp_path)
    before = (tmp_path / "report.html").read_bytes()
    with pytest.raises(OutputExistsError):
        write_report(reports["atac2rna"], tmp_path)
    assert (tmp_path / "report.html").read_bytes() == before
    write_report(reports["atac2rna"], tmp_path, force=True)
    assert (tmp_path / "report.html").read_bytes() != before


def test_names_from_data_are_escaped(reports):
    report = reports["rna2atac"]
    facts = {**report.facts, "notes": ["<script>alert(1)</script>"]}
    figures = json.loads(json.dumps(report.to_dict()["figures"]))
    figures["pseudobulk"] = {"T<sub>&": next(iter(figures["pseudobulk"].values()))}
    html = render(replace(report, figures=figures, facts=facts))
    assert "<script>" not in html
    assert "T<sub>" not in html


def test_a_report_without_baselines_or_figures_renders(reports):
    report = reports["rna2atac"]
    alone = {"model": report.scores["model"]}
    html = render(replace(report, standing="alone", scores=alone, comparisons=[], figures={}))
    assert "no baseline" in html
    assert "<figure>" not in html


def _measured(page, browse, width, *more):
    """Open a copy of the page that measures itself; return its measures, the DOM, and the console."""
    copy = page.with_name("measured.html")
    copy.write_text(
        page.read_text(encoding="utf-8").replace("</body>", f"{MEASURE}</body>"), encoding="utf-8"
    )
    dom, console = browse(copy, width, *more)
    return json.loads(re.search(r"<output>(.*?)</output>", dom)[1]), dom, console


@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_browser_shows_the_figures_and_the_numbers(direction, width, reports, tmp_path, browse):
    page, data = write_report(reports[direction], tmp_path)
    seen, dom, console = _measured(page, browse, width)
    assert console == []
    assert _numbers_equal(_Page(dom), json.loads(data.read_text(encoding="utf-8"))) > 20
    assert seen["resources"] == []
    assert seen["untitled"] == 0
    assert seen["overflow"] <= 0
    assert seen["focusable"] > 8
    wanted = {"gains", "detection", "pseudobulk", "training"}
    assert set(seen["figures"]) == wanted | ({"reliability"} if direction == "rna2atac" else set())
    for name, charts in seen["figures"].items():
        for chart_width, height, marks in charts:
            assert chart_width > 120, name
            assert height > 100, name
            assert marks >= 2, name


def test_a_browser_in_dark_mode_gets_a_dark_page(reports, tmp_path, browse):
    page, _ = write_report(reports["rna2atac"], tmp_path)
    shades = {}
    for name, more in {"light": (), "dark": ("--blink-settings=preferredColorScheme=0",)}.items():
        seen, _, _ = _measured(page, browse, 800, *more)
        shades[name] = sum(map(int, re.findall(r"\d+", seen["background"])))
    assert shades["light"] > 600
    assert shades["dark"] < 150
