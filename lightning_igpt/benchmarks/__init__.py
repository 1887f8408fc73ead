"""Measurements of speed and memory, each a program of its own: ``python -m lightning_igpt.benchmarks.<name>``.

======================  =====================================================================================
``train_step``          forward, loss, backward and optimiser, beside ``transformers``' network
``sample``              one more pixel with a cache, in three precisions, beside ``transformers``' cached step
``quantize``            colours to tokens, beside ``transformers``' image processor and a search by torch
``features``            the pooled features of all layers, beside a plain pass and ``transformers``' hidden states
``probe``               logistic regression on many layers, beside scikit-learn
``data``                files to batches, beside bare decoding and plain ``datasets``
======================  =====================================================================================

Both sides of a comparison get the same weights and inputs, must agree before anything is timed, and are measured in one
process in turns, so that a machine that slows down slows both. A figure is the median of its turns, printed with the
fastest and the slowest; a ratio is the median over the turns of the ratio within a turn. The limit is what the machine
reached in the same run with nothing in its way: a large matrix product, a large copy. The last line is one JSON object.

Times are of the wall clock, except in ``data``, which counts CPU time of one thread. Set OMP_NUM_THREADS, and let
nothing else run: where threads wait for each other, another process costs more than its share. All but ``probe`` need
the ``hf`` extra for their peer. What is worth keeping goes to ``docs/benchmarks``.
"""
