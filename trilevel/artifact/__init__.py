"""The artifact: one folder that every runtime loads, checks and runs with the same answers."""
