"""Fixtures shared by all tests: a tiny simulated data set, preprocessed and trained once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    import anndata as ad

    from cisformer.config import Config
    from cisformer.model.checkpoint import Checkpoint
    from cisformer.simulation import SimulatedCells

SHARED = Path(__file__).resolve().parents[2] / "shared"
DIRECTIONS = ("atac2rna", "rna2atac")
# The same cases in every run, however slow the machine: a gate must not close by chance.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside a checkout; tests that read it skip elsewhere."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared (real data), which stands beside the project's own checkouts only")
    return SHARED


@pytest.fixture(scope="session")
def tiny() -> SimulatedCells:
    """160 simulated cells, 150 genes, 900 cCREs, 3 types."""
    from cisformer.simulation import simulate

    return simulate(n_cells=160, n_genes=150, n_ccres=900, n_types=3, seed=11)


@pytest.fixture(scope="module")
def cells(tiny: SimulatedCells) -> tuple[ad.AnnData, ad.AnnData]:
    """The first 40 cells of `tiny`: RNA and ATAC, without `uns`."""
    pair = tiny.rna[:40].copy(), tiny.atac[:40].copy()
    for adata in pair:
        adata.uns.clear()
    return pair


@pytest.fixture(scope="session")
def tiny_files(tiny: SimulatedCells, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rna.h5ad, atac.h5ad, celltype_info.tsv and true_links.tsv of `tiny`."""
    folder = tmp_path_factory.mktemp("tiny_files")
    tiny.write(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_data(tiny_files: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`tiny` preprocessed with its own features: direction → folder."""
    from cisformer.data.preprocess import preprocess

    folders = {}
    for direction in DIRECTIONS:
        folders[direction] = tmp_path_factory.mktemp(f"tiny_{direction}")
        preprocess(
            tiny_files / "rna.h5ad", tiny_files / "atac.h5ad", folders[direction], direction=direction,
            reference="dataset", force=True,
        )  # fmt: skip
    return folders


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., Config]:
    """A function that returns a config of a few thousand weights; keyword arguments go to the training section."""

    def make(direction: str, **training: object) -> Config:
        from cisformer.config import parse_config

        model = {
            "dim": 14, "dec_depth": 1, "dec_heads": 2, "dec_ff_mult": 2, "dec_dim_head": 7, "num_latents": 3,
            "emb_rank": 8, "linear_rank": 5,
        }  # fmt: skip
        settings = {"epoch": 2, "batch_size": 16, "lr": 1e-3, "patience": 5, "num_workers": 0} | training
        return parse_config({"model": model, "training": settings}, direction)

    return make


@pytest.fixture(scope="session")
def tiny_checkpoints(
    tiny_data: dict[str, Path], tiny_config: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Checkpoint]:
    """A trained checkpoint of each direction."""
    from cisformer.training.loop import train

    save = tmp_path_factory.mktemp("tiny_save")
    return {
        direction: train(
            tiny_data[direction], direction, direction=direction, save=save, config=tiny_config(direction)
        )
        for direction in DIRECTIONS
    }


@pytest.fixture(scope="session")
def command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """A function that runs `cisformer ARGUMENTS…` as a user would, in a process of its own."""

    def run(*arguments: object, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "cisformer", *map(str, arguments)],
            cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip

    return run


@pytest.fixture(scope="session")
def browse(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[str, list[str]]]:
    """A function that opens a page in headless Chromium: (DOM as text, what the console said)."""
    binary = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if binary is None:
        pytest.skip("needs Chromium (Debian: apt-get install chromium)")

    def run(path: Path, width: int, *more: str) -> tuple[str, list[str]]:
        arguments = [
            binary, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--enable-logging=stderr", f"--user-data-dir={tmp_path_factory.mktemp('chromium')}",
            f"--window-size={width},1000", "--dump-dom", *more, path.as_uri(),
        ]  # fmt: skip
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=True)
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    return run
