"""Accuracy under a budget: questions with known answers, asked of one model under several cache policies."""
