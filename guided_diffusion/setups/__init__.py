"""What the commands run, put together from a configuration."""
