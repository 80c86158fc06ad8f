"""What a latency consists of: the time of its matrix products, and of each node."""
