"""What a training step keeps in memory: freed blocks, and the gradient of a table, as autograd would make it."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from cisformer.config import parse_config
from cisformer.data.batches import TrainingBatches
from cisformer.data.store import CellStore, find_split
from cisformer.model.checkpoint import load_checkpoint
from cisformer.runtime import device
from cisformer.training.row_gradient import RowGradient


@pytest.mark.parametrize("direction", ["atac2rna", "rna2atac"])
def test_gradients_of_rows_are_those_of_the_whole_table(direction, tiny_data, tiny_config, tiny_checkpoints):
    """Over several batches: rows of the last one are cleared. Nothing is updated, so that all gradients compare."""
    given = tiny_config(direction, batch_size=3).model_dump()
    given["datapreprocess"] |= {"dec_max_len": 40, "multiple": 1}
    trained = tiny_checkpoints[direction].folder.parent / "epoch2"
    whole, rows = (load_checkpoint(trained).model.train() for _ in range(2))
    table = rows.sparse_gradients()
    kept = RowGradient(table)
    store = CellStore.open(find_split(tiny_data[direction], "train"))
    batches = TrainingBatches(store, whole.layout, parse_config(given, direction), np.arange(store.n_cells))
    nonzero = []
    for step in range(3):
        for model in (whole, rows):
            model.zero_grad(set_to_none=True)
            torch.manual_seed(step)
            model(batches.draw(1, step)).mean().backward()
        for (name, one), other in zip(whole.named_parameters(), rows.parameters(), strict=True):
            assert (one.grad is None) == (other.grad is None), name
            if one.grad is not None:
                torch.testing.assert_close(other.grad, one.grad, rtol=0, atol=0, msg=name)
        assert table.grad is kept.whole
        nonzero.append(table.grad.any(dim=1))
    assert not nonzero[0].all()
    assert (nonzero[0] & ~nonzero[1]).any()  # else there was nothing to clear


def test_a_batch_that_reads_every_row_is_left_to_autograd():
    table = torch.nn.Parameter(torch.ones(3, 2))
    RowGradient(table)
    (2 * table).sum().backward()
    torch.testing.assert_close(table.grad, torch.full((3, 2), 2.0))


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
@pytest.mark.parametrize("keep", [True, False])
def test_freed_blocks_serve_the_next_ones(keep):
    """Four blocks of 20 MB, freed and made again: without the call all their 20,000 pages come from the system anew."""
    code = (
        "import resource\n"
        "from cisformer.runtime.device import keep_freed_memory\n"
        f"{'keep_freed_memory()' if keep else ''}\n"
        "def n_faults():\n"
        "    [bytes([1]) * (20 << 20) for _ in range(4)]\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "n_faults(); print(n_faults() - n_faults())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (-int(done.stdout) < 1_000) == keep


@pytest.mark.parametrize(("accepts", "kept"), [(1 << 26, 1 << 26), (1 << 25, 1 << 25), (0, None)])
def test_a_glibc_that_refuses_large_blocks_gets_smaller_ones(accepts, kept, monkeypatch):
    """Where it took none, nothing else may be set: that would end glibc's own choice, at 128 kB."""
    taken = {}

    class Libc:
        def mallopt(self, parameter, value):
            if parameter == device.M_MMAP_THRESHOLD and value > accepts:
                return 0
            taken[parameter] = value
            return 1

    monkeypatch.setattr(device.sys, "platform", "linux")
    monkeypatch.setattr(device.ctypes, "CDLL", lambda name: Libc())
    device.keep_freed_memory()
    both = {device.M_MMAP_THRESHOLD: kept, device.M_TRIM_THRESHOLD: device.MOST_KEPT_BYTES}
    assert taken == ({} if kept is None else both)


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
def test_other_mallocs_are_left_alone(platform, monkeypatch):
    """As musl's, which has no `mallopt`."""
    monkeypatch.setattr(device.sys, "platform", platform)
    monkeypatch.setattr(device.ctypes, "CDLL", lambda name: object())
    device.keep_freed_memory()
