"""Reading, aligning and storing cells."""
