"""Evaluation of networks on held-out pairs, questions and videos."""
