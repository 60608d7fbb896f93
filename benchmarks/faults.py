"""Inject faults into the real commands and count after how many of them nothing was lost.

    python benchmarks/faults.py WORK [--kills 20] [--flips 200] [--seed 0]

Killed at random moments (SIGINT, SIGTERM, SIGKILL): `data_preprocess`, `atac2rna_train`, `atac2rna_predict` and
`atac2rna_link`, each run with `--force` over earlier results. Also one training run killed ten times and resumed each
time; a full disk and a read-only one (where this user may mount one); shards, checkpoints and training states with bits
flipped or cut; an input that is written to while it is read; two runs at once into one folder. Prints a markdown table.

Nothing is lost when every result is, byte for byte, the earlier one or that of an undisturbed run; when there is no
other file, but for hidden temporary ones after SIGKILL, which lets nobody clean up; when a full or read-only disk gives
one line and no traceback; when damage is refused; and when a resumed training ends with the losses and weights of an
uninterrupted one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

EPOCHS = 60
CONFIG = """
model: {{dim: 14, dec_depth: 1, dec_heads: 2, dec_ff_mult: 2, dec_dim_head: 7, num_latents: 3, emb_rank: 8,
        linear_rank: 5}}
training: {{epoch: {epochs}, batch_size: 16, lr: 1e-3, patience: 99, num_workers: 2}}
"""
PREPROCESS = ["data_preprocess", "-r", "rna.h5ad", "-a", "atac.h5ad", "--reference", "dataset", "--atac2rna"]
PREDICT = ["atac2rna_predict", "-d", "data/atac2rna_test", "-o", "results", "-m"]
LINK = ["atac2rna_link", "-d", "data/atac2rna_train", "-c", "celltype_info.tsv", "-o", "results", "-m"]
TRAIN = ["atac2rna_train", "-d", "data", "-n", "run", "-c", "config.yaml", "-s", "save"]
COMMANDS = {
    "preprocess": [*PREPROCESS, "-s", "results", "--seed", "1", "--force"],
    "predict": [*PREDICT, "model", "--force"],
    "link": [*LINK, "model", "--force"],
}
"""Each writes into `results`, over what `earlier` made there."""
EARLIER = {
    "preprocess": [*PREPROCESS, "-s", "results", "--seed", "0"],
    "predict": [*PREDICT, "linear"],
    "link": [*LINK, "model", "-n", "9"],
}
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
OCCASION = ("command", "created")


def start(command: list[str], folder: Path) -> subprocess.Popen[str]:
    """Start a `cisformer` command in a folder."""
    return subprocess.Popen(
        [sys.executable, "-m", "cisformer", *command],
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def run(command: list[str], folder: Path) -> None:
    """Run a command to its end; it has to succeed."""
    process = start(command, folder)
    _, errors = process.communicate(timeout=600)
    if process.returncode:
        raise RuntimeError(f"cisformer {' '.join(command)} failed:\n{errors}")


def make_workplace(folder: Path, seed: int, epochs: int = EPOCHS) -> None:
    """Make input, preprocessed cells, a model and its linear start, from simulated cells."""
    size = ["--n_cells", "160", "--n_genes", "150", "--n_ccres", "900", "--n_types", "3", "--seed", str(seed)]
    folder.mkdir(parents=True)
    run(["simulate", "-o", ".", *size], folder)
    (folder / "config.yaml").write_text(CONFIG.format(epochs=epochs))
    run([*PREPROCESS, "-s", "data"], folder)
    run(TRAIN, folder)
    save = next((folder / "save").iterdir())
    shutil.copytree(save / "best", folder / "model")
    shutil.copytree(save / "epoch0", folder / "linear")


def content(path: Path) -> str:
    """Return a checksum of a file; of a manifest without the time, command and run that made it."""
    data = path.read_bytes()
    if path.suffix == ".json":
        about = json.loads(data)
        about.pop("run", None)
        if isinstance(about.get("provenance"), dict):
            about["provenance"] = {
                key: value for key, value in about["provenance"].items() if key not in OCCASION
            }
        data = json.dumps(about).encode()
    return hashlib.sha256(data).hexdigest()


def snapshot(folder: Path) -> dict[str, str]:
    """Return the checksum of every file in a folder that is not hidden, or in a hidden one."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    names = {str(path.relative_to(folder)): path for path in files}
    return {
        name: content(path)
        for name, path in names.items()
        if not any(p.startswith(".") for p in Path(name).parts)
    }


def hidden(folder: Path) -> list[str]:
    """Return what temporary files and folders are left."""
    return [str(path.relative_to(folder)) for path in folder.rglob(".*")]


@dataclass
class Count:
    """How many faults of a kind were tried, and what was lost."""

    kind: str
    tried: int = 0
    done_before: int = 0
    lost: list[str] = field(default_factory=list)

    def row(self) -> str:
        """Return the row of the table."""
        note = f"{self.done_before} had ended before" if self.done_before else ""
        return f"| {self.kind} | {self.tried} | {self.tried - len(self.lost)} | {note} |"

    def add(self, lost: str) -> None:
        """Count a fault; `lost` says what was lost, if anything."""
        self.tried += 1
        if lost:
            self.lost.append(lost)
            print(f"LOST, {self.kind}: {lost}", file=sys.stderr)


def stop_at(process: subprocess.Popen[str], after_s: float, number: signal.Signals) -> tuple[bool, str]:
    """Send a signal after some seconds; return whether the process had ended before, and its stderr."""
    try:
        _, errors = process.communicate(timeout=after_s)
        return True, errors
    except subprocess.TimeoutExpired:
        process.send_signal(number)
        _, errors = process.communicate(timeout=120)
        return False, errors


@dataclass(frozen=True)
class Stage:
    """One command with its earlier results and those of an undisturbed run."""

    name: str
    folder: Path
    earlier: dict[str, str]
    undisturbed: dict[str, str]
    seconds: float

    @classmethod
    def prepare(cls, name: str, workplace: Path, folder: Path) -> Stage:
        """Copy the workplace, make earlier results and note what an undisturbed run makes of them, and its time."""
        shutil.copytree(workplace, folder)
        run(EARLIER[name], folder)
        shutil.copytree(folder / "results", folder / "kept")
        earlier = snapshot(folder / "results")
        began = time.perf_counter()
        run(COMMANDS[name], folder)
        seconds = time.perf_counter() - began
        stage = cls(name, folder, earlier, snapshot(folder / "results"), seconds)
        assert stage.earlier != stage.undisturbed, f"{name}: the run has to make a difference"
        stage.restore()
        return stage

    def restore(self) -> None:
        """Put the earlier results back."""
        shutil.rmtree(self.folder / "results")
        shutil.copytree(self.folder / "kept", self.folder / "results")

    def lost(self, *, cleans_up: bool) -> str:
        """Say what was lost, or nothing; then put the earlier results back."""
        found = snapshot(self.folder / "results")
        left = hidden(self.folder / "results")
        self.restore()
        if found not in (self.earlier, self.undisturbed):
            return f"files differ: {sorted(set(found.items()) ^ set(self.earlier.items()))[:4]}"
        return f"left behind: {left[:3]}" if cleans_up and left else ""

    def kill(self, number: signal.Signals, share: float) -> tuple[bool, str]:
        """Kill a run after a share of its time; return whether it had ended before, and what was lost."""
        ended, errors = stop_at(start(COMMANDS[self.name], self.folder), share * self.seconds, number)
        lost = self.lost(cleans_up=number != signal.SIGKILL)
        return ended, lost or (f"a traceback: {errors}" if "Traceback" in errors else "")


def losses(run_folder: Path) -> list[tuple[float | None, float]]:
    """Return training and validation loss of every epoch."""
    records = map(json.loads, (run_folder / "metrics.jsonl").read_text().splitlines())
    return [(record["train_loss"], record["val_loss"]) for record in records]


def outcome(run_folder: Path) -> tuple[object, ...]:
    """Return what a training run comes to: its losses, and the weights of its best and last epoch."""
    found = losses(run_folder)
    weights = [
        content(run_folder / name / "model.safetensors") for name in ("best", f"epoch{len(found) - 1}")
    ]
    return found, *weights


def kill_training(
    workplace: Path, folder: Path, numbers: list[signal.Signals], rng: random.Random
) -> tuple[int, str]:
    """Start a training, kill and resume it again and again, let it end; return the kills, and what was lost."""
    shutil.copytree(workplace, folder)
    before, finished = snapshot(folder), next((folder / "save").iterdir())
    killed, command = 0, [*TRAIN[:-1], "again"]
    for number in numbers:
        ended, errors = stop_in_training(start(command, folder), folder / "again", number, rng)
        if "Traceback" in errors:
            return killed, f"a traceback: {errors[-300:]}"
        killed += not ended
        command = [*TRAIN[:-1], "again", *resume(folder / "again")]
    run(command, folder)
    runs = [path for path in (folder / "again").iterdir() if path.is_dir()]
    wanted, found = outcome(finished), outcome(max(runs, key=n_epochs))
    changed = {
        name: value for name, value in snapshot(folder).items() if not name.startswith("again")
    } != before
    shutil.rmtree(folder)
    return (
        killed,
        "losses or weights differ" if found != wanted else "earlier files changed" if changed else "",
    )


def stop_in_training(
    process: subprocess.Popen[str], save: Path, number: signal.Signals, rng: random.Random
) -> tuple[bool, str]:
    """Kill a training, one time in four while it starts, else within a second after an epoch has ended."""
    if rng.random() < 0.25:
        return stop_at(process, rng.uniform(0.5, 3), number)
    known = n_epochs(save)
    while process.poll() is None and n_epochs(save) == known:
        time.sleep(0.01)
    return stop_at(process, rng.uniform(0, 1), number)


def n_epochs(folder: Path) -> int:
    """Return how many epochs are on record in a run's folder, or in a save folder."""
    logs = [*folder.glob("metrics.jsonl"), *folder.glob("*/metrics.jsonl")]
    return max((path.read_text().count("\n") for path in logs), default=0)


def resume(save: Path) -> list[str]:
    """Return the option that resumes the run in a save folder; none where it had not yet begun."""
    begun = (
        [path for path in save.glob("*_run*") if (path / "config.yaml").is_file()] if save.is_dir() else []
    )
    return ["--resume", str(begun[0].relative_to(save.parent))] if begun else []


# ---- disks -------------------------------------------------------------------------------------------------------


@contextmanager
def small_disk(folder: Path, size_kb: int) -> Iterator[Path]:
    """Mount a memory disk of that size; raise `PermissionError` where this user may not."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_kb}k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        raise PermissionError("this user may not mount a memory disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill_disk(stage: Stage, room_kb: int) -> str:
    """Run over earlier results on a disk with that much room left; return what was lost."""
    used_kb = sum(-(-path.stat().st_size // 4096) * 4 + 4 for path in (stage.folder / "kept").rglob("*"))
    with small_disk(stage.folder / "disk", used_kb + room_kb + 64) as disk:
        return on_disk(stage, disk)


def lock_disk(stage: Stage) -> str:
    """Run over earlier results on a read-only disk; return what was lost."""
    with small_disk(stage.folder / "disk", 100_000) as disk:
        return on_disk(stage, disk, ["mount", "-o", "remount,ro", str(disk)])


def on_disk(stage: Stage, disk: Path, then: list[str] | None = None) -> str:
    """Run a stage on a disk that cannot take its results; return what was lost."""
    shutil.copytree(stage.folder / "kept", disk / "results")
    if then:
        subprocess.run(then, check=True)
    command = [word.replace("results", str(disk / "results")) for word in COMMANDS[stage.name]]
    process = start(command, stage.folder)
    _, errors = process.communicate(timeout=600)
    found, left = snapshot(disk / "results"), hidden(disk)
    if process.returncode == 0:
        return "" if found == stage.undisturbed else "it claims to have succeeded"
    if process.returncode != 1 or errors.count("error: ") != 1 or "Traceback" in errors:
        return f"no clear message: {errors}"
    if "is full" not in errors and "is read-only" not in errors:
        return f"it does not name the disk: {errors[-200:]}"
    return "" if found == stage.earlier and not left else f"files differ, or are left: {left[:3]}"


# ---- damage ------------------------------------------------------------------------------------------------------


def damage(path: Path, rng: random.Random) -> Callable[[], None]:
    """Flip a bit of a file or cut it; return what puts it right again."""
    whole = path.read_bytes()
    changed = bytearray(whole)
    if rng.random() < 0.3:
        del changed[rng.randrange(len(changed)) :]
    else:
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    path.write_bytes(changed)
    return lambda: (path.write_bytes(whole), None)[1]


def unnoticed(read: Callable[[], object], path: Path, rng: random.Random) -> str:
    """Damage a file and read it; return what is lost where that is not refused as it should be."""
    from cisformer.errors import CisformerError

    whole = read()
    repair = damage(path, rng)
    try:
        return "" if read() == whole else f"damage of {path.name} was not noticed"
    except CisformerError:
        return ""
    except Exception as error:
        return f"{path.name}: {error!r}"
    finally:
        repair()


def summary(state: object) -> str:
    """Return all that is in a training state; its archive has gaps in which a flipped bit changes nothing."""
    import torch

    torch.set_printoptions(threshold=10**9, precision=17)
    return repr(state)


def readers(workplace: Path) -> dict[str, tuple[Path, Callable[[], object]]]:
    """Return files with checksums, and how each is read: into something that is the same only if nothing changed."""
    from cisformer.data.store import CellStore
    from cisformer.model.checkpoint import load_checkpoint
    from cisformer.training.run_folder import read_state

    store, model = workplace / "data/atac2rna_train", workplace / "model"
    state = next((workplace / "save").iterdir()) / "training_state.pt"
    return {
        "shard": (store / "atac2rna_0.pt", lambda: (CellStore.open(store).verify(), object())),
        "checkpoint": (model / "model.safetensors", lambda: load_checkpoint(model)),
        "training state": (state, lambda: summary(read_state(state))),
    }


# ---- others ------------------------------------------------------------------------------------------------------


def change_input(stage: Stage, share: float) -> str:
    """Write to an input of `preprocess`, the same bytes, while it runs; return what was lost."""
    process = start(COMMANDS["preprocess"], stage.folder)
    ended, errors = stop_at_change(process, share * stage.seconds, stage.folder / "atac.h5ad")
    if not ended and process.returncode and "changed while it was read" not in errors:
        return f"no clear message: {errors[-300:]}"
    return stage.lost(cleans_up=True)


def stop_at_change(process: subprocess.Popen[str], after_s: float, path: Path) -> tuple[bool, str]:
    """Touch a file after some seconds and wait for the process; as `stop_at`."""
    try:
        _, errors = process.communicate(timeout=after_s)
        return True, errors
    except subprocess.TimeoutExpired:
        path.write_bytes(path.read_bytes())
        _, errors = process.communicate(timeout=120)
        return False, errors


def two_at_once(stage: Stage) -> str:
    """Start the earlier and the later command, without `--force`, into one new folder; return what was lost."""
    shutil.rmtree(stage.folder / "results")
    later = [word for word in COMMANDS[stage.name] if word != "--force"]
    both = [start(command, stage.folder) for command in (EARLIER[stage.name], later)]
    errors = [process.communicate(timeout=600)[1] for process in both]
    codes = sorted(process.returncode for process in both)
    lost = stage.lost(cleans_up=True)
    if codes != [0, 1] or "exists already" not in "".join(errors) or "Traceback" in "".join(errors):
        return f"exit codes {codes}: {errors}"
    return lost


def main() -> None:
    """Count them all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--kills", type=int, default=20, help="of each stage, training aside")
    parser.add_argument("--flips", type=int, default=200, help="of each kind of file")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    rng, workplace = random.Random(given.seed), given.work / "workplace"
    make_workplace(workplace, given.seed)
    print("| fault | tried | nothing lost | |\n|---|---|---|---|", flush=True)
    for counts in (count_training, count_stages, count_damage):
        for count in counts(given, rng, workplace):
            print(count.row(), flush=True)


def count_damage(given: argparse.Namespace, rng: random.Random, workplace: Path) -> Iterator[Count]:
    """Yield the counts of damaged files."""
    for name, (path, read) in readers(workplace).items():
        count = Count(f"{name} with a flipped bit, or cut")
        for _ in range(given.flips):
            count.add(unnoticed(read, path, rng))
        yield count


def count_stages(given: argparse.Namespace, rng: random.Random, workplace: Path) -> Iterator[Count]:
    """Yield the counts of kills, disks, changed inputs and races of preprocess, predict and link."""
    for name in COMMANDS:
        stage = Stage.prepare(name, workplace, given.work / name)
        for number in SIGNALS:
            count = Count(f"{name}: {number.name} at a random moment")
            for _ in range(-(-given.kills // len(SIGNALS))):
                ended, lost = stage.kill(number, rng.uniform(0.1, 1.0))
                count.done_before += ended
                count.add(lost)
            yield count
        for kind, fault in (
            ("disk full", lambda s=stage: fill_disk(s, rng.randrange(0, 300))),
            ("read-only disk", lambda s=stage: lock_disk(s)),
            ("two runs into one folder", lambda s=stage: two_at_once(s)),
        ):
            count = Count(f"{name}: {kind}")
            for _ in range(max(given.kills // 4, 1)):
                count.add(fault())
            yield count
        if name == "preprocess":
            count = Count("preprocess: input written to while it is read")
            for _ in range(max(given.kills // 2, 1)):
                count.add(change_input(stage, rng.uniform(0.1, 1.0)))
            yield count


def count_training(given: argparse.Namespace, rng: random.Random, workplace: Path) -> Iterator[Count]:
    """Yield the counts of one run killed ten times by SIGKILL, and of one by SIGINT and SIGTERM in turn."""
    for kind, numbers in (
        ("SIGKILL", [signal.SIGKILL] * 10),
        ("SIGINT and SIGTERM", [signal.SIGINT, signal.SIGTERM] * 5),
    ):
        count = Count(f"train: one run killed ten times by {kind}, resumed each time")
        killed, lost = kill_training(workplace, given.work / "train", numbers, rng)
        count.tried, count.done_before = len(numbers), len(numbers) - killed
        count.lost = [lost] * bool(lost)
        yield count


if __name__ == "__main__":
    main()
