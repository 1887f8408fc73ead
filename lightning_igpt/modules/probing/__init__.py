"""The parts of ProbeModule: where features wait, how classifiers are fitted or trained, and what is kept of them."""
