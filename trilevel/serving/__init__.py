"""Serving: an engine that batches by path, workers that run it, and front ends over REST and gRPC."""
