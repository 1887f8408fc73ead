"""Our own verbs, one file each: a typed, documented function, or a table ``VERBS`` of several."""
