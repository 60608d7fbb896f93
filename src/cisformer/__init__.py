"""Predict chromatin accessibility from gene expression and back, and link cCREs to genes per cell type."""

__version__ = "0.1.0"
