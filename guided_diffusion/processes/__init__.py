"""The processes of a run: who started them, how they meet, on what device, and how they stop."""
