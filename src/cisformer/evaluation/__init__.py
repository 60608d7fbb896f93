"""Scores of a prediction beside baselines, with intervals, a verdict and a report page."""
