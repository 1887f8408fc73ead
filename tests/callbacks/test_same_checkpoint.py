import pytest

from lightning_igpt.callbacks import SameCheckpoint
from lightning_igpt.modules import PretrainModule
from tests.modules.helpers import TINY, loader, quiet_trainer
from tests.processes import in_processes


def fit(folder, path, **options):
    trainer = quiet_trainer(folder, max_steps=1, callbacks=[SameCheckpoint(path)], **options)
    trainer.fit(PretrainModule(TINY, "gray:8"), loader())
    return trainer


@pytest.mark.parametrize(("paths", "message"), [(("a.ckpt", None), "do not see the same"), (("a.ckpt", "a.ckpt"), "")])
def test_processes_that_see_different_files_stop(paths, message, tmp_path):
    def work(rank):
        try:
            fit(tmp_path, paths[rank], devices=2, strategy="ddp")
        except ValueError as error:
            assert message and message in str(error) and "process 0 a.ckpt, process 1 none" in str(error)
        else:
            assert not message

    assert in_processes(work) == [0, 0]


def test_one_process_agrees_with_itself(tmp_path):
    assert fit(tmp_path, "a.ckpt").global_step == 1
