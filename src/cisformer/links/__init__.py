"""cCRE–gene links: evidence, score, statistics, files, browser formats, plots, and their benchmark."""
