"""What links answer: genes of variants and peaks, differences between groups, factors behind genes, a page to look at."""
