"""From a preprocessed data set to a folder of checkpoints: the split, the closed-form start, the loop."""
