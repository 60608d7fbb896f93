"""Commands that are killed, run out of disk, or find their input changed: nothing is lost.

A small part of what `benchmarks/faults.py` counts, with its own machinery; and each fault of a write, one by one.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from cisformer.__main__ import _hush_destructors, _stopped
from cisformer.data.preprocess import preprocess
from cisformer.data.sources import open_rows
from cisformer.data.store import CellStore, find_split
from cisformer.errors import InputError, OutputExistsError, StoreError, WriteError
from cisformer.runtime.files import atomic_folder, atomic_path
from cisformer.training.split import CellSplit

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "faults.py"


@pytest.fixture(scope="module")
def faults() -> Iterator[ModuleType]:
    """The benchmark, as a module."""
    if not BENCHMARK.is_file():
        pytest.skip("needs benchmarks/faults.py, which is not in the source distribution")
    spec = importlib.util.spec_from_file_location("faults", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["faults"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["faults"]


@pytest.fixture(scope="module")
def workplace(faults: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults") / "workplace"
    faults.make_workplace(folder, seed=0, epochs=12)
    return folder


@pytest.fixture(scope="module", params=["preprocess", "predict", "link"])
def stage(request: pytest.FixtureRequest, faults: ModuleType, workplace: Path) -> object:
    return faults.Stage.prepare(request.param, workplace, workplace.parent / request.param)


# ---- the real commands -------------------------------------------------------------------------------------------


def test_a_killed_command_leaves_earlier_results(stage: object):
    number = signal.SIGTERM if stage.name == "link" else signal.SIGKILL
    _, lost = stage.kill(number, 0.85)
    assert lost == ""


def test_a_full_disk_and_a_read_only_one(stage: object, faults: ModuleType):
    try:
        with faults.small_disk(stage.folder / "disk", 64):
            pass
    except PermissionError as error:
        pytest.skip(str(error))
    assert faults.fill_disk(stage, 40) == ""
    assert faults.lock_disk(stage) == ""


def test_a_training_killed_twice_ends_as_if_it_had_not_been(faults: ModuleType, workplace: Path):
    numbers = [signal.SIGKILL, signal.SIGTERM]
    killed, lost = faults.kill_training(workplace, workplace.parent / "train", numbers, random.Random(1))
    assert lost == ""
    assert killed >= 1


def test_a_stopped_command_says_so(faults: ModuleType, workplace: Path, tmp_path: Path):
    """Stopped on its way, by Ctrl-C: one line, the exit code of shells, no temporary file."""
    process = faults.start([*faults.TRAIN[:-1], str(tmp_path / "save")], workplace)
    while process.poll() is None and faults.n_epochs(tmp_path / "save") == 0:
        pass
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.count("error: stopped by SIGINT; earlier results are as they were") == 1
    assert "--resume" in errors
    assert "Traceback" not in errors
    assert faults.hidden(tmp_path) == []


@pytest.mark.parametrize(
    ("command", "expected"),
    [(["--debug", "run", "-r", "x"], "again: it continues where it stopped"),
     (["rna2atac_train"], "again; training continues with --resume FOLDER"), (["browse"], "again")],
)  # fmt: skip
def test_a_stopped_command_is_told_how_to_go_on(command, expected, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cisformer", *command])
    with pytest.raises(SystemExit):
        _stopped(signal.SIGINT)
    assert capsys.readouterr().err.endswith(f"hint: run the command {expected}\n")


def test_what_hdf5_repeats_for_each_object_of_a_lost_file_is_hidden(monkeypatch: pytest.MonkeyPatch):
    shown: list[str] = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, trace: shown.append(str(error)))
    monkeypatch.setattr(sys, "unraisablehook", lambda found: shown.append(str(found.exc_value)))
    _hush_destructors()
    for text in ("Can't close dataset (file write failed)", "Can't decrement id ref count", "another"):
        sys.excepthook(RuntimeError, RuntimeError(text), None)
        sys.unraisablehook(SimpleNamespace(exc_value=RuntimeError(text)))
    assert shown == ["another", "another"]


KILLED_WHILE_PLACING = """
import os, signal, sys
from cisformer.runtime import files
from cisformer.data.preprocess import preprocess

place, left = files._place_folder, int(sys.argv[1])

def place_or_die(*arguments, **options):
    global left
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    place(*arguments, **options)

files._place_folder = place_or_die
preprocess("rna.h5ad", "atac.h5ad", "data", direction="atac2rna", reference="dataset", seed=1, force=True)
"""


@pytest.mark.parametrize("n_placed", [1, 2])
def test_splits_of_two_runs_are_not_taken_for_one_data_set(
    n_placed: int, tiny_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A kill between the renames of a second run: some splits are old, some are new."""
    for name in ("rna.h5ad", "atac.h5ad"):
        shutil.copy(tiny_files / name, tmp_path)
    files, data = (tmp_path / "rna.h5ad", tmp_path / "atac.h5ad"), tmp_path / "data"
    old = preprocess(*files, data, direction="atac2rna", reference="dataset")
    barcodes = {split: set(store.barcodes) for split, store in old.items()}
    script = [sys.executable, "-c", KILLED_WHILE_PLACING, str(n_placed)]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    replaced = [
        split for split in barcodes if barcodes[split] != set(CellStore.open(old[split].path).barcodes)
    ]
    assert replaced == ["train", "val", "test"][-n_placed:]
    for path in (data, data / "atac2rna_train"):
        with pytest.raises(StoreError, match="come from different runs of data_preprocess") as caught:
            CellSplit.open(path, None, "atac2rna", 0)
        assert "run it again" in caught.value.hint
    monkeypatch.chdir(data / "atac2rna_train")
    with pytest.raises(StoreError, match="come from different runs"):
        CellSplit.open(".", "../atac2rna_val", "atac2rna", 0)
    with pytest.raises(StoreError, match="come from different runs"):
        find_split(data, "test")
    preprocess(*files, data, direction="atac2rna", reference="dataset", seed=1, force=True)
    assert CellSplit.open(data, None, "atac2rna", 0).train.path == data / "atac2rna_train"


def test_splits_of_early_versions_name_no_run(tiny_data: dict[str, Path], tmp_path: Path):
    data = Path(shutil.copytree(tiny_data["atac2rna"], tmp_path / "data"))
    for path in data.glob("*/manifest.json"):
        manifest = json.loads(path.read_text())
        del manifest["run"]
        path.write_text(json.dumps(manifest))
    assert CellSplit.open(data, None, "atac2rna", 0).val.path == data / "atac2rna_val"


def test_damage_is_noticed(faults: ModuleType, workplace: Path):
    rng = random.Random(0)
    for path, read in faults.readers(workplace).values():
        assert [lost for _ in range(12) if (lost := faults.unnoticed(read, path, rng))] == []


# ---- an input that changes -----------------------------------------------------------------------------------------


def change_while_reading(path: Path, change: str) -> None:
    """Read some cells, change the file in place, read more."""
    content = path.read_bytes()
    with open_rows(path, "rna") as source:
        source.rows(0, 10)
        with open(path, "rb+") as file:
            if change == "written":
                file.write(content[:100])
            elif change == "longer":
                file.seek(0, os.SEEK_END)
                file.write(b"more")
            else:
                file.truncate(len(content) // 2)
        os.utime(path)
        source.rows(10, 20)


@pytest.mark.parametrize("change", ["written", "longer", "cut"])
def test_an_input_that_changes_while_it_is_read(change: str, tiny_files: Path, tmp_path: Path):
    path = Path(shutil.copy(tiny_files / "rna.h5ad", tmp_path))
    with pytest.raises(InputError, match=r"rna.h5ad (changed while it was read|is cut short or damaged)"):
        change_while_reading(path, change)


def test_an_input_that_is_replaced_while_it_is_read_is_read_to_its_end(tiny_files: Path, tmp_path: Path):
    path = Path(shutil.copy(tiny_files / "rna.h5ad", tmp_path))
    with open_rows(path, "rna") as source:
        whole = source.rows(0, source.n_cells)
        os.replace(shutil.copy(tiny_files / "atac.h5ad", tmp_path / "new.h5ad"), path)
        assert (source.rows(0, source.n_cells) != whole).nnz == 0


# ---- two at once -----------------------------------------------------------------------------------------------------


def write_twice(
    path: Path, writer: Callable[[Path], contextlib.AbstractContextManager[Path]], name: str
) -> None:
    """Write a result while another run writes the same one, and ends first."""
    with writer(path) as second:
        with writer(path) as first:
            (first / name).write_text("first")
        (second / name).write_text("second")


def test_the_second_of_two_runs_into_one_folder_is_refused(tmp_path: Path):
    with pytest.raises(OutputExistsError):
        write_twice(tmp_path / "out", atomic_folder, "a")
    assert (tmp_path / "out" / "a").read_text() == "first"
    with pytest.raises(OutputExistsError):
        write_twice(tmp_path / "file", functools.partial(atomic_path, force=False), "")
    assert (tmp_path / "file").read_text() == "first"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out"]


def test_two_runs_that_start_in_the_same_second_get_folders_of_their_own(tmp_path: Path):
    from accelerate import Accelerator

    from cisformer.config import default_config
    from cisformer.training.run_folder import new_folder

    folders: list[Path] = []
    accelerator, config = Accelerator(cpu=True), default_config("atac2rna")
    starts = [
        threading.Thread(target=lambda: folders.append(new_folder(accelerator, tmp_path, "x", config)))
        for _ in range(8)
    ]
    for thread in starts:
        thread.start()
    for thread in starts:
        thread.join()
    assert len(set(folders)) == 8


# ---- one write -----------------------------------------------------------------------------------------------------


def test_a_folder_or_file_makes_way_only_if_forced(tmp_path: Path):
    for old in ("folder", "file"):
        path = tmp_path / old
        path.mkdir() if old == "folder" else path.write_text("old")
        if old == "folder":
            (path / "x").write_text("old")
        with pytest.raises(OutputExistsError), atomic_folder(path):
            pass
        with atomic_folder(path, force=True) as temporary:
            (temporary / "y").write_text("new")
        assert [file.name for file in path.iterdir()] == ["y"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_a_rename_that_fails_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("old")
    replace = os.replace

    def fail(source: Path, target: Path) -> None:
        if Path(target).name == "out" and ".old" not in Path(source).name:
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="Input/output"), atomic_folder(tmp_path / "out", force=True) as folder:
        (folder / "a").write_text("new")
    assert (tmp_path / "out" / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def full_disk(text: str) -> Callable[[], None]:
    def write() -> None:
        raise RuntimeError(text)

    return write


@pytest.mark.parametrize(
    "write",
    [
        full_disk(
            "Can't write data (file write failed: errno = 28, error message = 'No space left on device')"
        ),
        full_disk("Error while serializing: I/O error: No space left on device (os error 28)"),
        lambda: os.write(os.open("/dev/full", os.O_WRONLY), b"x"),
        full_disk("[enforce fail at inline_container.cc:672] . unexpected pos 17344 vs 17248"),
    ],
)
def test_whatever_a_library_says_of_a_full_disk_is_told_in_one_way(write: Callable[[], None], tmp_path: Path):
    (tmp_path / "a.h5ad").write_text("old")
    wanted = r"cannot write .*a.h5ad: the disk is full; nothing was changed there"
    with pytest.raises(WriteError, match=wanted) as caught, atomic_path(tmp_path / "a.h5ad"):
        write()
    assert "free disk space" in caught.value.hint
    assert (tmp_path / "a.h5ad").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.h5ad"]


def test_other_errors_stay_what_they_are(tmp_path: Path):
    for error in (
        ValueError("x"),
        RuntimeError("errno = 2"),
        PermissionError(13, "Permission denied", "input.h5ad"),
    ):
        with pytest.raises(type(error)), atomic_path(tmp_path / "a"):
            raise error
