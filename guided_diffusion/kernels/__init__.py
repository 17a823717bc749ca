"""Fused operations, and the capture of many launches in a CUDA graph."""
