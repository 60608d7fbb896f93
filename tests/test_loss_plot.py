"""The picture of a training run."""

import matplotlib.image
import numpy as np

from cisformer.training.loss_plot import REFERENCE, VALIDATION, draw_losses


def records(n):
    known = {"linear_val_loss": 0.25, "mean_val_loss": 0.3}
    return [
        {
            "epoch": i,
            "train_loss": 0.24 - 0.01 * i if i else None,
            "val_loss": 0.25 - 0.01 * min(i, 3),
            **known,
        }
        for i in range(n)
    ]


def share_of(path, colour):
    pixels = matplotlib.image.imread(path)[..., :3]
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return (np.abs(pixels - wanted).max(axis=-1) < 0.1).mean()


def test_the_picture_shows_losses_and_what_they_are_compared_with(tmp_path):
    path = draw_losses(records(6), tmp_path / "training.png", "run")
    assert share_of(path, VALIDATION) > 0.001
    assert share_of(path, REFERENCE) > 0.001
    again = draw_losses(records(6), tmp_path / "again.png", "run")
    assert path.read_bytes() == again.read_bytes()


def test_a_run_of_no_epochs_is_drawn_too(tmp_path):
    assert draw_losses(records(1), tmp_path / "training.svg").stat().st_size > 1000
