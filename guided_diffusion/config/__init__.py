"""Configuration: the keys, YAML files with overrides, and the command line."""
