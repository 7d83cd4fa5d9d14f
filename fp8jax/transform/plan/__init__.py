"""What becomes of every product, and what is said of it."""
