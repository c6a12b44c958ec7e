"""The tests of modeling_uhop, and what they share."""
