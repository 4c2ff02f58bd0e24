"""Training: the data, the objective, the steps, and what is kept of them."""
