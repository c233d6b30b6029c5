"""Image classification with a small encoder of 2x2 patches, dense or multi-level: train, evaluate, predict."""
