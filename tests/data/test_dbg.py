import faulthandler, time, sys, torch, pytest
from torch.utils.data import DataLoader
from tests.data.helpers import *
from lightning_igpt.data import *
class D:
    def __getitem__(s,i):
        faulthandler.dump_traceback_later(2, file=open("/tmp/x/tb.txt","w"))
        raise ValueError("x")
def test_first():
    data=PretrainDataModule(tiny(26), batch_size=64); data.setup()
    with pytest.raises(ValueError): data.train_dataloader()
def test_second():
    faulthandler.dump_traceback_later(3, file=open("/tmp/x/tb2.txt","w"))
    with pytest.raises(ValueError): next(iter(DataLoader(D(),batch_size=None,sampler=[0],num_workers=1)))
    faulthandler.cancel_dump_traceback_later()
def test_third():
    pass
