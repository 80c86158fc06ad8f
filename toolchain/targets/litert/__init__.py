"""LiteRT: ONNX files converted to .tflite in an interpreter of its own, and run by ai-edge-litert alone."""
