"""Where a session runs: this machine, a device over ssh, or one that only a bundle reaches."""
