"""The method: teacher, dynamic batch, and the objectives of DKDM and TCCD."""
