"""Text classification with a pretrained encoder, dense or converted: train on a table, evaluate, predict."""
