"""Our verbs, one file each: a typed, documented function, and ``run(words)`` that reads its arguments."""
