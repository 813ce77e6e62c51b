"""What the product is held against: an independent GPT and textbook formulas. Nothing here imports dist_gpt."""
