"""What each task reads, predicts and measures: `pretraining` and `classification`."""
