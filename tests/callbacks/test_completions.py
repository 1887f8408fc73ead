import numpy as np
import pytest
import torch
from PIL import Image

from lightning_igpt.callbacks import CompletionGrid
from lightning_igpt.modules import PretrainModule
from lightning_igpt.palette import Palette
from lightning_igpt.sampling import HIDDEN, captions, completion_rows
from tests.modules.helpers import BERT, TINY, loader, quiet_trainer
from tests.networks import random_network

PALETTE = Palette.load("gray:8")


@pytest.mark.parametrize("config", [TINY, BERT])
@pytest.mark.parametrize("keep_rows", [None, 0, 3])
def test_rows_hold_prompt_samples_and_truth(config, keep_rows):
    network = random_network(config)
    tokens = torch.randint(8, (2, 16), generator=torch.manual_seed(0))
    rows = completion_rows(network, PALETTE, tokens, n_samples=3, keep_rows=keep_rows, seed=1)
    truth, kept = PALETTE.dequantize(tokens), 2 if keep_rows is None else keep_rows
    assert rows.shape == (2, 5, 3, 4, 4) and rows.dtype == torch.uint8
    assert torch.equal(rows[:, -1], truth)
    assert (rows[:, 0, :, kept:] == torch.tensor(HIDDEN)[:, None, None]).all()
    assert all(torch.equal(rows[:, column, :, :kept], truth[:, :, :kept]) for column in range(4))
    assert not torch.equal(rows[:, 1], rows[:, 2])
    again = completion_rows(network, PALETTE, tokens, n_samples=3, keep_rows=keep_rows, seed=1)
    assert torch.equal(rows, again)
    assert len(captions(3)) == rows.shape[1]


def test_grids_reach_tensorboard_and_files(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = quiet_trainer(
        tmp_path, max_steps=4, val_check_interval=1, logger=True,
        callbacks=[CompletionGrid(n_images=2, n_samples=1, every_n_validations=2)],
    )  # fmt: skip
    trainer.fit(PretrainModule(TINY, "gray:8"), loader(), loader())
    files = sorted(tmp_path.rglob("completions/*.png"))
    assert [file.stem for file in files] == ["step-0000001", "step-0000003"]  # every second validation
    assert np.array(Image.open(files[0])).std() > 0
    events = EventAccumulator(trainer.log_dir).Reload()
    assert [image.step for image in events.Images("completions")] == [1, 3]


def test_sampling_does_not_disturb_training(tmp_path):
    """The run with grids ends with the very weights of the run without."""
    weights = []
    for callbacks in ([], [CompletionGrid(n_images=2)]):
        torch.manual_seed(0)
        module = PretrainModule({**TINY.to_dict(), "dropout": 0.1}, "gray:8")
        trainer = quiet_trainer(tmp_path, max_steps=4, val_check_interval=2, callbacks=callbacks)
        trainer.fit(module, loader(), loader())
        weights.append(torch.cat([parameter.flatten() for parameter in module.parameters()]))
    assert torch.equal(*weights)
