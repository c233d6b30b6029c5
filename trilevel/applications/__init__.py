"""Applications: each a folder with data, model, recipe, evaluation and a README."""
