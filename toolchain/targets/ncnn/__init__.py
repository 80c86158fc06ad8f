"""ncnn on the CPU: files converted by pnnx, run in a process of their own because what ncnn cannot read may end it."""
