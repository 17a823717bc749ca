"""Evaluation: metrics, feature extractors and reference builders."""
