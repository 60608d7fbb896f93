"""What links answer: genes of variants and peaks, differences between groups, drivers of genes, a page to look at."""
