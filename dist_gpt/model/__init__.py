"""The GPT: `gpt` holds its blocks, `functions` the pure functions in them, `init` their first weights."""
