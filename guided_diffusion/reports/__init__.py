"""A page about runs, made of what they left behind."""
