"""Training: the loop, what it learns from, and how what it made is judged."""
