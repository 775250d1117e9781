"""Painting from an exported model without torch: numpy, ONNX Runtime, OpenVINO."""
