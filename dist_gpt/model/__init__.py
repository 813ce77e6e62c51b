"""GPT model: its blocks (`gpt`), their pure functions (`functions`, `core`) and initial weights (`init`)."""
