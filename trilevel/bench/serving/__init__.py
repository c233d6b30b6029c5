"""`trilevel bench serving`: what the server costs, how much it answers in time, and what it loses when things break."""
