"""A killed run that continues gives the losses of one that was never killed."""

from functools import partial

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint


@pytest.mark.parametrize("stage", ["adapter_module", "cama_module"])
def test_kill_and_resume(stage, request, fit, interrupt, tmp_path):
    # the cache is empty again after a resume, which must not matter
    options = {"cache": True} if stage == "adapter_module" else {}
    make = partial(request.getfixturevalue(stage), **options)
    validation = {"val_check_interval": 3, "limit_val_batches": 1}
    whole, _ = fit(make(), 9, **validation)

    every = {
        "dirpath": tmp_path,
        "filename": "last",
        "every_n_train_steps": 2,
        "enable_version_counter": False,
    }
    killed, _ = fit(make(), 9, interrupt(stop=5), ModelCheckpoint(**every), **validation)
    resumed, _ = fit(make(), 9, ckpt_path=tmp_path / "last.ckpt", **validation)

    assert list(killed) == [1, 2, 3, 4, 5] and list(resumed) == [5, 6, 7, 8, 9]
    # Not bit by bit: the emptied cache encodes clips in other batches, which moves the last digit.
    assert killed | resumed == pytest.approx(whole, rel=1e-5)
