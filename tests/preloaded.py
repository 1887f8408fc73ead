"""What a process that runs small trainings imports, once for all of them."""

import gc

import lightning_igpt.cli  # noqa: F401
import tests.processes  # noqa: F401

gc.collect()
gc.freeze()  # a collection in a child would copy the pages of every object
