"""Measurements of onnxprune; each module runs as `python -m benchmarks.NAME`."""
