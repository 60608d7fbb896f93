"""What links answer: genes of variants and peaks, and a page to look at."""
