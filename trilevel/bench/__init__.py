"""The cases behind `trilevel bench`: each proves correctness first, then measures."""
