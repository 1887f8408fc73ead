"""Measurements of speed and memory, each a program: ``python -m lightning_igpt.benchmarks.<name>``.

The names are ``train_step``, ``sample``, ``quantize``, ``probe`` and ``data``; ``--help`` says what each compares. Both
sides of a comparison get the same weights and inputs, must agree before anything is timed, and are measured in one
process in turns. A number is the median of its turns; a ratio is the median over the turns of the ratio within a turn.
The limit is what the machine reached in the same run on a large matrix product or a large copy. The last line is one
JSON object. Set OMP_NUM_THREADS and run nothing else at the same time. All need the ``hf`` extra.
"""
