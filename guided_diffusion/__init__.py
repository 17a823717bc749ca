"""Data-free distillation of diffusion models: TCCD and its baseline DKDM.

Importing this package loads nothing heavy; `guided_diffusion.script_util` is the public factory.
"""

__version__ = "0.2.0"
