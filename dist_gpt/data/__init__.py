"""Tokens for training: found (`corpus`, `binary`), tokenised (`tokenizer`, `tokens`), kept (`cache`), drawn (`loader`).

Nothing here needs torch, so data are prepared before any rank starts.
"""
