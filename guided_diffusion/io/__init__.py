"""Files that are never half-written and never executed: npz, torch files, pickles, copies at URLs."""
