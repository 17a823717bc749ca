"""Denoising networks and what they are made of."""
