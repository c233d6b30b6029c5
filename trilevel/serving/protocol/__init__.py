"""How tensors and requests travel: the Open Inference Protocol, version 2."""
