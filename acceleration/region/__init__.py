"""Region-adaptive sampling: only the tokens that the model is working on run through its blocks."""
