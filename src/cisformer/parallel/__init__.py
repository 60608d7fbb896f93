"""Several processes that share one command's work: how they start, and who does what."""
