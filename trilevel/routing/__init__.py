"""Dynamic paths: how much of a model runs for each input, and the proof that little is lost."""
