"""Scripts that peers run in environments of their own; nothing here imports them."""
