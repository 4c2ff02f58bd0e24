"""From prompts to tokens: sampling, compiled steps, and the loop around them."""
