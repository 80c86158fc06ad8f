"""ONNX Runtime Web in Node: what web pages run, on this machine's CPU."""
