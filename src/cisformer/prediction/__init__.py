"""From a checkpoint and cells of one modality to the other modality, as AnnData or h5ad."""
