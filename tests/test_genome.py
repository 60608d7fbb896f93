"""Regions, TSS, and the joins, held to brute force and to bioframe."""

from __future__ import annotations

import doctest

import bioframe
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cisformer.data import genome
from cisformer.data.genome import (
    overlap_pairs,
    overlaps_any,
    parse_regions,
    region_names,
    rename_chroms,
    signed_distance,
    tss,
    window_pairs,
)
from cisformer.data.reference import load_reference
from cisformer.errors import InputError


def regions(rows: list[tuple[str, int, int]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["chrom", "start", "end"])


def test_the_examples_in_the_docstrings():
    assert doctest.testmod(genome).failed == 0


@pytest.mark.parametrize("name", ["chr1:100-200", "chr1-100-200", "chr1_100_200"])
def test_three_spellings_are_read(name: str):
    assert parse_regions([name]).to_numpy().tolist() == [["chr1", 100, 200]]


@pytest.mark.parametrize("chrom", ["chrUn_KI270742v1", "GL000194.1", "HLA-A*01:01", "1", "NA"])
def test_odd_chromosome_names_survive(chrom: str):
    assert parse_regions([f"{chrom}:5-9"]).to_numpy().tolist() == [[chrom, 5, 9]]


@pytest.mark.parametrize("bad", ["peak_1", "chr1:100", "chr1:200-100", "chr1:5-5", "", "chr1:1-2x"])
def test_the_first_bad_name_is_named(bad: str):
    with pytest.raises(InputError) as caught:
        parse_regions(["chr1:1-2", bad, "chr1:3-4"])
    assert repr(bad) in caught.value.message
    assert "chr1:181117-181803" in caught.value.hint


def test_no_region_at_all():
    assert len(parse_regions([])) == 0


coordinates = st.tuples(
    st.sampled_from(["chr1", "chr10", "chrUn_KI1v1", "2"]), st.integers(0, 10**9), st.integers(1, 10**6)
)


@settings(deadline=None)
@given(st.lists(coordinates, max_size=20))
def test_text_form_round_trips(rows: list[tuple[str, int, int]]):
    frame = regions([(chrom, start, start + width) for chrom, start, width in rows])
    assert parse_regions(region_names(frame)).to_numpy().tolist() == frame.to_numpy().tolist()


def test_tss_and_signed_distance_by_hand():
    genes = regions([("chr1", 1000, 2000)] * 3 + [("", -1, -1)]).assign(strand=["+", "-", "", "-"])
    assert tss(genes).tolist() == [1000, 1999, 1000, -1]
    ccres = regions([("chr1", 400, 600)])  # midpoint 500
    distance = signed_distance(genes, ccres, np.array([0, 1]), np.array([0, 0]))
    assert distance.tolist() == [-500, 1499]  # upstream of +, downstream of -


small = st.tuples(st.sampled_from(["chr1", "chr2", ""]), st.integers(0, 60), st.integers(1, 25))


@settings(deadline=None)
@given(st.lists(small, max_size=12), st.lists(small, max_size=12))
def test_overlaps_agree_with_brute_force(left_rows: list, right_rows: list):
    left, right = (
        regions([(c, s, s + w) if c else ("", -1, -1) for c, s, w in rows])
        for rows in (left_rows, right_rows)
    )
    expected = [
        (i, j)
        for i, a in enumerate(left.itertuples())
        for j, b in enumerate(right.itertuples())
        if a.chrom and a.chrom == b.chrom and a.start < b.end and b.start < a.end
    ]
    assert list(zip(*map(np.ndarray.tolist, overlap_pairs(left, right)), strict=True)) == expected


def test_windows_agree_with_bioframe():
    human = load_reference("human")
    genes = human.genes.iloc[::50].reset_index(drop=True)
    ccres = human.ccres.iloc[::7].sample(frac=1, random_state=0).reset_index(drop=True)
    gene, ccre = window_pairs(genes, ccres, 250_000)
    bodies = bioframe.expand(genes[["chrom", "start", "end"]], pad=250_000)
    bodies["start"] = bodies["start"].clip(lower=0)
    pairs = bioframe.overlap(bodies, ccres, how="inner", return_index=True, return_input=False)
    expected = pairs.astype(np.int64).sort_values(["index", "index_"]).to_numpy()
    assert len(expected) > 10_000
    assert np.array_equal(np.stack([gene, ccre], axis=1), expected)


def test_genes_without_coordinates_have_no_window():
    genes = regions([("", -1, -1), ("chr1", 10, 20)]).assign(strand="")
    gene, _ = window_pairs(genes, regions([("chr1", 0, 5), ("", -1, -1)]), 100)
    assert gene.tolist() == [1]


def test_chromosomes_are_spelt_as_known():
    renamed = rename_chroms(pd.Series(["1", "chrX", "MT", "GL1"]), ["chr1", "X", "chrM"])
    assert renamed.tolist() == ["chr1", "X", "chrM", "GL1"]


@settings(deadline=None)
@given(st.data())
def test_whether_regions_overlap_any_is_what_the_pairs_say(data: st.DataObject):
    near = st.lists(
        st.tuples(st.sampled_from(["chr1", "chr2", "chr3"]), st.integers(-5, 60), st.integers(1, 40)),
        max_size=15,
    )
    left, right = (regions([(c, s, s + w) for c, s, w in data.draw(near)]) for _ in range(2))
    right = regions([(c, max(s, 0), max(s, 0) + e - s) for c, s, e in right.itertuples(index=False)])
    wanted = np.isin(np.arange(len(left)), overlap_pairs(left, right)[0])
    assert overlaps_any(left, right).tolist() == wanted.tolist()
